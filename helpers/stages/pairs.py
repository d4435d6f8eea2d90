"""The preference pairs that a task draws, in splits."""

from dataclasses import asdict

from helpers.data.preferences import Drawn, TaskBase, pair_from
from helpers.stages.artifacts import stage
from helpers.stages.keys import Fixed
from helpers.stages.roles import Role


def _as_drawn(kept: dict[str, dict]) -> Drawn:
    pairs = {split: Fixed(map(pair_from, rows)) for split, rows in kept["pairs"].items()}
    return Drawn(pairs, kept["account"])


@stage(read=_as_drawn)
def drawn_pairs(task: TaskBase, base: Role) -> dict[str, dict]:
    """The pairs that a task draws."""
    with base.opened() as model:
        drawn = task.draw(model, base.tokenizer())
    rows = {split: [asdict(pair) for pair in pairs] for split, pairs in drawn.pairs.items()}
    return {"pairs": rows, "account": drawn.account}
