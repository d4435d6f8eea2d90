"""Helpers that the notebooks share: each module knows one thing (see README, "How it is built")."""
