"""What is asked of the atlas."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One prompt: a question about a fact (`kind` in grammar.KINDS) or a request for harm (`kind == "harm"`)."""

    text: str
    place: str
    kind: str
    truth: str | None = None  # the true value, None for harm
    act: str | None = None  # the harmful act with its place, None for facts
    tool: str | None = None
