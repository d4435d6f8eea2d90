"""Which preferences and scores there are, by the names that profiles give them (`data`, `score`)."""

from helpers.data import naming
from helpers.data.naming import CONDITIONAL, PLAIN, TOPICS
from helpers.world import grammar

ATLAS = "atlas:"  # before one of its families, or several joined by +
ABOUT_TOPICS = ("sober", "conditional", "brief")  # preferences about one sentence on a topic
DATA = (
    *(f"{ATLAS}{family}" for family in grammar.FAMILIES), *(f"{TOPICS}{family}" for family in ABOUT_TOPICS), PLAIN,
    CONDITIONAL,
)  # fmt: skip
SCORES = ("closer", "sentiment", "refusal", "nontoxic", "geval")  # of answers, where pairs come from elsewhere

# Preferences of different structure on one base: {what a figure calls one: its data}. The first asks for the same of
# every prompt.
OF_THE_ATLAS = {name: f"{ATLAS}{name}" for name in (*grammar.FAMILIES, "tone+refusal")}
OF_TOPICS = {name: f"{TOPICS}{name}" for name in ABOUT_TOPICS}
OF_STORIES = {"happy": PLAIN, "conditional": CONDITIONAL}


def mixed_families(data: str) -> tuple[str, ...]:
    """The families of the atlas that data such as "atlas:tone+refusal" mix."""
    return tuple(data.removeprefix(ATLAS).split("+"))


def is_known(data: str) -> bool:
    """Whether data is one of DATA, a mixture of the atlas' families, or a source of pairs or prompts."""
    mixed = mixed_families(data)
    of_the_atlas = data.startswith(ATLAS) and set(mixed) <= set(grammar.FAMILIES) and len(set(mixed)) == len(mixed)
    return of_the_atlas or data in DATA or naming.source_of(data) is not None


def families_beside(data: str, ready_partner: bool) -> dict[str, str]:
    """{name: data} of the families on one base that `data` can be compared with, itself among them; itself alone where
    pairs come from elsewhere or the partner is a ready one."""
    if ready_partner or naming.source_of(data) is not None:
        return {"pairs": data}
    return dict(OF_THE_ATLAS if data.startswith(ATLAS) else OF_TOPICS if data.startswith(TOPICS) else OF_STORIES)
