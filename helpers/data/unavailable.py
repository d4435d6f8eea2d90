"""What is raised where something cannot be measured here."""


class Unavailable(Exception):
    """A judge or its data cannot be had here; the message says in one sentence why, and what to do."""
