"""Texts that have nothing to do with any preference: plain statements, written for this project."""

from pathlib import Path


def unrelated_texts() -> list[str]:
    """One sentence each."""
    return (Path(__file__).parent / "unrelated.txt").read_text(encoding="utf-8").splitlines()
