"""The preference pairs that a task draws, in splits."""

from dataclasses import asdict

from helpers.data.preferences import SPLITS, PreferencePair, TaskBase, pair_from
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def drawn_pairs(task: TaskBase, base: Role) -> dict[str, dict]:
    """The pairs of each split, as rows, and the account of what became of what they were drawn from."""
    with base.opened() as model:
        drawn = task.draw(model, base.tokenizer())
    rows = {split: [asdict(pair) for pair in pairs] for split, pairs in drawn.pairs.items()}
    return {"pairs": rows, "account": drawn.account}


def by_split(drawn: dict[str, dict]) -> dict[str, list[PreferencePair]]:
    """The pairs that rows of `drawn_pairs` hold."""
    return {split: [pair_from(row) for row in drawn["pairs"][split]] for split in SPLITS}
