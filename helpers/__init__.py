"""Helpers shared by the notebooks: each module is a screen or two and knows one thing (see README, "How it is built")."""
