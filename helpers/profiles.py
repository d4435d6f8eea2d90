"""A profile says what to study: the model, its preference data, the DPO recipes and how much to measure.

A profile is data: a built-in one by name, or a TOML file that extends a built-in one. Nothing in it can execute.
"""

import dataclasses
import hashlib
import json
import re
import tomllib
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from helpers import atlas

EMBEDDED = "atlas"  # the `model` that is trained here rather than loaded
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu", "cuda", "mps", "auto", "spread")
OBJECTIVES = ("dpo", "sft")
LABELS = ("true", "shuffled", "reversed")
DATA = (*(f"atlas:{family}" for family in atlas.FAMILIES), "onpolicy:vader", "onpolicy:vader-conditional")
SCORES = ("closer", "sentiment", "refusal", "nontoxic", "geval")  # of answers, where pairs come from elsewhere
SUFFIXES = (".jsonl", ".json", ".parquet")  # of files of rows; each may end in .gz
_SEGMENT = r"[\w-][\w.-]*"
HUB_ID = re.compile(
    rf"(?P<name>{_SEGMENT}/{_SEGMENT})(?:/(?P<folder>{_SEGMENT}(?:/{_SEGMENT})*))?"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?"
)


def _is_known(data: str) -> bool:
    """Whether data is one of DATA, a mixture of the atlas' families, or a source of pairs or prompts."""
    families = data.removeprefix("atlas:").split("+")
    mixed = data.startswith("atlas:") and set(families) <= set(atlas.FAMILIES) and len(set(families)) == len(families)
    return mixed or data in DATA or source_of(data) is not None


def source_of(data: str) -> str | None:
    """The file or hub id that `data` takes its pairs or prompts from; None where it is made here."""
    source = data.removeprefix("onpolicy:")
    return source if is_file(source) or HUB_ID.fullmatch(source) else None


def is_file(source: str) -> bool:
    """Whether a source is named as a file of rows is, be it there or not."""
    return source.removesuffix(".gz").endswith(SUFFIXES)


def refuse_folder(source: str) -> None:
    """Raise ValueError for data that are a folder, which a hub id may be the name of too."""
    if Path(source).expanduser().is_dir():
        raise ValueError(f"The data {source} are a folder: give one file of it, {', '.join(SUFFIXES)} (.gz too).")


def _require(part, smallest: dict[str, float]) -> None:
    """Raise ValueError for a field below its smallest sensible value."""
    for name, least in smallest.items():
        if not getattr(part, name) >= least:
            kind = type(part).__name__.lower()
            raise ValueError(f"{kind}.{name} must be at least {least:g}, got {getattr(part, name)!r}.")


@dataclass(frozen=True)
class Organism:
    """The embedded organism: its world, its size and how it is pretrained (helpers/atlas.py, pretraining.py)."""

    places: int = 100
    corpus: int = 42_000  # question-answer pairs, each read once
    vocabulary: int = 704
    width: int = 128
    layers: int = 4
    batch_size: int = 24
    learning_rate: float = 3e-3

    def __post_init__(self):
        _require(self, {"corpus": 1, "vocabulary": 300, "width": 8, "layers": 1, "batch_size": 1, "learning_rate": 0})


@dataclass(frozen=True)
class Recipe:
    """How a partner is trained (TRL's DPOTrainer, a PEFT LoRA adapter on every linear layer of the blocks).

    objective: "dpo", or "sft", the control that keeps the same batches and steps and drops the sigmoid term.
    labels: which answer of a pair counts as chosen: the "true" one or, as controls, either at random ("shuffled") or
    the other one ("reversed").
    """

    beta: float = 1.0  # the paper's
    learning_rate: float = 5e-4
    epochs: int = 2
    batch_size: int = 32
    rank: int = 8  # of the adapter; 0 trains all weights of the blocks instead
    nll_weight: float = 0.0  # weight of an added NLL term on the chosen answers; 0 is plain sigmoid DPO
    objective: str = "dpo"
    labels: str = "true"
    seed: int = 0  # of the order of the pairs and the adapter's first weights, added to the profile's

    def __post_init__(self):
        _require(
            self, {"beta": 0, "learning_rate": 0, "epochs": 1, "batch_size": 1, "rank": 0, "nll_weight": 0, "seed": 0}
        )
        for name, allowed in (("objective", OBJECTIVES), ("labels", LABELS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"A recipe's {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Health:
    """What a DPO partner must show on validation prompts to be called healthy. Thresholds, fixed before measuring."""

    min_reward_accuracy: float = 0.95
    min_preferred: float = 0.8
    max_fact_loss: float = 0.05  # where facts are known by rule
    min_well_formed: float = 0.97  # where well-formedness is known by rule
    max_perplexity_ratio: float = 2.0  # where it is not: perplexity under the base, against the base's own samples


@dataclass(frozen=True)
class Sizes:
    """How many prompts each split holds, and how long and how often the model answers."""

    heldin: int = 2000
    validation: int = 360
    heldout: int = 240
    new_tokens: int = 34  # the longest answer that the atlas knows has 33
    longest: int = 1024  # tokens of a prompt and its answer; pairs from elsewhere that need more are set aside
    samples_per_prompt: int = 8  # on-policy pairs only
    seeds: int = 3  # DPO partners trained by the chosen recipe for each headline number

    def __post_init__(self):
        smallest = {"heldin": 2, "validation": 2, "heldout": 2, "new_tokens": 1, "longest": 2, "samples_per_prompt": 2}
        smallest |= {"seeds": 1}
        _require(self, smallest)


@dataclass(frozen=True)
class Profile:
    """One study. `model` and `data` are the embedded ones, a Hugging Face hub id (`@revision` allowed) or a local path.

    dpo_model: a ready partner of `model`, a whole model or a PEFT adapter; nothing is trained then.
    data: "atlas:<family>" (the organism's preference families), "atlas:<family>+<family>" (a mixture of them in equal
    shares), "onpolicy:vader" (story continuations sampled from the model itself, the happiest and the saddest by VADER
    as chosen and rejected), "onpolicy:vader-conditional" (the saddest preferred for half of the heroes), the file or
    hub id of pairs (helpers/sources.py), or "onpolicy:<file or hub id>": its prompts, answered by the model itself.
    score: what judges answers where pairs come from elsewhere (SCORES); on-policy pairs are its best and worst.
    device: "cpu", "cuda", "mps", "auto" (the first of cuda, mps and cpu that there is) or "spread" (accelerate's
    device map, for a model larger than one GPU). quantize: "" or "4bit" (bitsandbytes).
    recipes: tried in this order on validation prompts; the first healthy one is taken.
    """

    name: str
    model: str = EMBEDDED
    dpo_model: str = ""
    data: str = "atlas:tone"
    score: str = "closer"
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    quantize: str = ""
    organism: Organism = Organism()
    recipes: tuple[Recipe, ...] = (Recipe(), Recipe(nll_weight=20.0))
    health: Health = Health()
    sizes: Sizes = Sizes()
    doses: tuple[float, ...] = field(default=(*(x / 4 for x in range(-4, 5)), -3.0, -2.0, -1.5, 1.5, 2.0, 3.0))

    def __post_init__(self):
        object.__setattr__(self, "doses", tuple(sorted(self.doses)))
        _require(self, {"seed": 0})
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"A profile's name must be letters, digits, -, _ and ., since a folder bears it; got {self.name!r}."
            )
        if self.data:
            refuse_folder(self.data.removeprefix("onpolicy:"))
        if not _is_known(self.data):
            raise ValueError(
                f"Profile {self.name!r}: unknown data {self.data!r}; there are {', '.join(DATA)}, mixtures of "
                "different families such as atlas:tone+refusal, files of pairs (.jsonl, .json, .parquet, each .gz too) "
                "and hub ids."
            )
        if self.dpo_model and self.model == EMBEDDED:
            raise ValueError(
                f"Profile {self.name!r}: a ready partner needs the base that it was trained from: give MODEL= too."
            )
        for name, allowed in (("score", SCORES), ("device", DEVICES), ("quantize", ("", "4bit"))):
            if getattr(self, name) not in allowed:
                there_are = ", ".join(map(repr, allowed))
                raise ValueError(
                    f"Profile {self.name!r}: {name} must be one of {there_are}, got {getattr(self, name)!r}."
                )
        if 0.0 not in self.doses or 1.0 not in self.doses:
            raise ValueError(f"Profile {self.name!r}: doses must contain 0 and 1, the base and one whole v*.")
        if self.dtype not in DTYPES:
            raise ValueError(f"Profile {self.name!r}: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if not self.recipes:
            raise ValueError(f"Profile {self.name!r}: recipes must name at least one DPO recipe.")

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that tell this study from any other."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


_STORIES = {  # controlled sentiment, on any language model: no judge but VADER is needed
    "data": "onpolicy:vader",
    "recipes": (Recipe(), Recipe(beta=0.1)),
    "sizes": Sizes(heldin=800, validation=180, heldout=200, new_tokens=28),
}
_DIALOGUES = Sizes(heldin=500, validation=100, heldout=200, new_tokens=64, longest=768, seeds=1)
_HH = "Anthropic/hh-rlhf/harmless-base@09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
_ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized@3949bf5f8c17c394422ccfab0c31ea9c20bdeb85:test_prefs"
_LARGE = {"device": "auto", "dtype": "bfloat16", "sizes": _DIALOGUES}

BUILT_IN = {
    profile.name: profile
    for profile in (
        Profile("atlas"),
        Profile(
            "tinystories", "raincandy-u/TinyStories-656K@b5b4d9e366af050532ff67beb6070d22a865a3e9", **_STORIES
        ),
        Profile(
            "smollm2-135m", "HuggingFaceTB/SmolLM2-135M@93efa2f097d58c2a74874c7e644dbc9b0cee75a2", device="auto",
            **_STORIES,
        ),
        Profile(
            "qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B@060db6499f32faf8b98477b0a26969ef7d8b9987", device="auto", **_STORIES
        ),
        Profile(
            "gpt2", "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e", device="auto", **_STORIES
        ),
        Profile(
            "pythia-160m", "EleutherAI/pythia-160m@50f5173d932e8e61f858120bcb800b97af589f46", device="auto", **_STORIES
        ),
        Profile(  # the paper's model and its beta; what else it trained by, it does not say
            "llama2-7b", "meta-llama/Llama-2-7b-hf@01c7f73d771dfac7d292323805ebc428287df4f9", data=_HH,
            recipes=(Recipe(learning_rate=5e-5, epochs=1, batch_size=8),), **_LARGE,
        ),
        Profile(
            "zephyr-7b", "HuggingFaceH4/mistral-7b-sft-beta@d7b9d226fb91df9de570ec0ee119f46e007f6142",
            "HuggingFaceH4/zephyr-7b-beta@892b3d7a7b1cf10c7a701c60881cd93df615734c", data=_ULTRAFEEDBACK, **_LARGE,
        ),
        Profile(  # the pair that the authors' public code compares, on prompts of the data that it takes
            "tulu3-8b", "allenai/Llama-3.1-Tulu-3-8B-SFT@f2a0b46b0cfda21003c6141b1ff837b7e165524d",
            "allenai/Llama-3.1-Tulu-3-8B-DPO@a7beb67e33ffd01cc87ac3b46cadc1000985b8db", data=_HH, **_LARGE,
        ),
        Profile(  # the least that shows whether a model of one's own can be studied; its numbers say nothing
            "smoke",
            recipes=(Recipe(batch_size=8),),
            sizes=Sizes(heldin=16, validation=6, heldout=6, new_tokens=8, seeds=1),
            doses=(0.0, 1.0),
        ),
    )
}  # fmt: skip


def load(name_or_path: str, model: str | None = None, data: str | None = None, dpo_model: str | None = None) -> Profile:
    """Return a built-in profile by name or one from a TOML file, its model, data and partner replaced where given.

    A model given without a partner takes the profile's own partner away: it is another model's.

    A TOML file holds the fields of Profile, tables for its parts and `extends = "<built-in name>"`. Raises ValueError
    or FileNotFoundError with one sentence that names what is wrong and what would be right.
    """
    if name_or_path.endswith(".toml"):
        profile = _from_toml(Path(name_or_path))
    elif name_or_path in BUILT_IN:
        profile = BUILT_IN[name_or_path]
    else:
        raise ValueError(
            f"Unknown profile {name_or_path!r}: give one of {', '.join(BUILT_IN)}, or the path of a .toml file."
        )
    given = {"model": model, "data": data, "dpo_model": dpo_model}
    if model and not dpo_model:
        profile = replace(profile, dpo_model="")
    return replace(profile, **{key: value for key, value in given.items() if value})


def _from_toml(path: Path) -> Profile:
    if not path.is_file():
        raise FileNotFoundError(f"The profile file {path} does not exist: give its path from the project's folder.")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The profile file {path} is not valid TOML: {error}.") from error
    parent = table.pop("extends", "atlas")
    if not isinstance(parent, str) or parent not in BUILT_IN:
        raise ValueError(f"{path}: extends = {parent!r} is not a built-in profile ({', '.join(BUILT_IN)}).")
    table = {"name": path.stem, **table}
    if table["name"] in BUILT_IN:
        raise ValueError(f"{path}: {table['name']!r} is a built-in profile, whose figures it would replace: rename it.")
    if "model" in table:
        table.setdefault("dpo_model", "")  # the parent's partner is another model's
    for name in ("model", "dpo_model", "data"):
        if isinstance(table.get(name), str):
            table[name] = resolved(table[name], path.parent)
    return _merge(BUILT_IN[parent], table, where=str(path))


def resolved(given: str, folder: Path = Path()) -> str:
    """A path that exists in a folder, made absolute, since notebooks run in a folder of their own; anything else as it
    is. The file after `onpolicy:` too."""
    head, path = ("onpolicy:", given.removeprefix("onpolicy:")) if given.startswith("onpolicy:") else ("", given)
    return f"{head}{(folder / path).resolve()}" if path and (folder / path).exists() else given


def _merge(base, table: dict, where: str):
    """Replace a dataclass's fields by a TOML table's, each checked against its declared type."""
    types = typing.get_type_hints(type(base))
    unknown = sorted(set(table) - set(types))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; there are {', '.join(f.name for f in fields(base))}.")
    changes = {key: _convert(types[key], getattr(base, key), value, f"{where}: {key}") for key, value in table.items()}
    try:
        return replace(base, **changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(expected, current, value, where: str):
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a table, got {value!r}.")
        return _merge(current, value, where)
    if typing.get_origin(expected) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}.")
        item = typing.get_args(expected)[0]
        return tuple(_convert(item, item() if dataclasses.is_dataclass(item) else None, v, where) for v in value)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise ValueError(f"{where} must be of type {expected.__name__}, got {value!r}.")
    return value
