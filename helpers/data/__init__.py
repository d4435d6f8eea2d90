"""Prompts and preference pairs, where they come from, and who judges answers."""
