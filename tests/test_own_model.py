"""A reader's own checkpoint and preference data go through notebooks 02 to 05 in the smoke profile.

Two pages on each of two architectures, which differ in all that a page can depend on: norms, special tokens, a chat
template, prompts that are conversations. What a study finds of each architecture is held against plain forward passes
elsewhere.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pytest
from chat_server import KEY, Server, completion
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell
from papermill.exceptions import PapermillExecutionError
from test_architectures import opened, write_inputs

from helpers import places, profiles
from helpers.stages import artifacts
from tools import headless

PAGES = {  # of a model type: its notebooks, their figures and the claims that they judge
    "gpt2": {
        "02_dpo_lora": ({"fig02_recipes", "fig02_training", "fig1a_projection"}, {"C3"}),
        "03_steering_vector": ({"fig3_cosines", "fig03_layers", "fig1c_clouds", "fig03_tokens"}, {"C4", "C5"}),
    },
    "gemma": {
        "04_add_subtract": (
            {"fig2a_adding", "fig2b_subtracting", "fig04_shares", "fig04_open_text", "fig04_layers"}, set(),
        ),
        "05_spectral_signatures": (
            {"fig4a_entropy", "fig4b_singular_values", "fig05_example_mass"}, {"C8", "C9", "C10"},
        ),
    },
}  # fmt: skip
MAY_BE_ABSENT = {"fig04_shares", "fig04_layers"}  # shares of a way, where DPO has gone none
TOKEN = "hf_planted7b31e0"
HERE = """from helpers.stages import parallel
parallel.each = lambda function, items, name: [function(item) for item in items]"""  # each worker imports for seconds


def write_notebook(folder: Path, names: Iterable[str], given: dict[str, str]) -> None:
    """The notebooks as one, so that libraries are imported once; none sees what another one has defined."""
    read = []
    for name in names:
        headless.prepare(name, profiles.load("smoke", given["MODEL"], given["DATA"]), given, folder / "parts")
        read.append(nbformat.read(folder / "parts" / f"{name}.ipynb", as_version=4))
    whole, *others = read
    for notebook in others:
        whole.cells += [new_code_cell("%reset -f"), *notebook.cells]
    whole.cells.insert(0, new_code_cell(HERE))
    for i, cell in enumerate(whole.cells):
        cell.id = f"cell-{i}"
    nbformat.write(whole, folder / "all.ipynb")


@pytest.fixture(scope="module")
def judge():
    """A judge on loopback, which gives every answer a 4."""
    server = Server(lambda request: completion("4"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module", params=PAGES)
def model_type(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(model_type, tmp_path_factory, tokenizer, judge):
    """Where the notebooks have been run, on a model of this type."""
    folder = tmp_path_factory.mktemp(model_type)
    write_inputs(folder, model_type, tokenizer)
    given = {"PROFILE": "smoke", "MODEL": str(folder / "model"), "DATA": str(folder / "pairs.jsonl")}
    write_notebook(folder, PAGES[model_type], given)
    environment = {
        "JUDGE_BASE_URL": judge.url,
        "JUDGE_MODEL": "judge-1",
        "JUDGE_API_KEY": KEY,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "1",
        "DSTEER_ARTIFACTS": str(folder / "artifacts"),
        "DSTEER_FIGURES": str(folder / "figures"),
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLBACKEND": "agg",  # figures are drawn once, into their files
        "PYTHONPATH": str(places.PROJECT),  # the kernel is to import what is tested here
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(headless, "NOTEBOOKS", folder)
        try:
            headless.run("all", opened(folder).profile, {}, folder / "run")
        except PapermillExecutionError as error:
            pytest.fail(headless.explain("all", error, folder / "run"), pytrace=False)
        except DeadKernelError:
            pytest.fail("The kernel died.", pytrace=False)
        yield folder


def absent(numbers, path=()):
    """Where JSON holds no number."""
    if numbers is None:
        yield path
    if isinstance(numbers, dict | list):
        for key, value in numbers.items() if isinstance(numbers, dict) else enumerate(numbers):
            yield from absent(value, (*path, key))


def test_every_figure_is_there_with_finite_numbers(folder, model_type):
    drawn, pages = folder / "figures" / "smoke", PAGES[model_type]
    about = {path.stem: json.loads(path.with_suffix(".json").read_text()) for path in drawn.glob("*.png")}
    assert {name: {f for f in about if about[f]["notebook"] == name} for name in pages} == {
        name: figures for name, (figures, _) in pages.items()
    }
    lacking = {(name, path[0]) for name in about for path in absent(about[name]["numbers"])}
    assert lacking <= {(name, column) for name in MAY_BE_ABSENT for column in ("share", "value", "low", "high")}
    judged = json.loads((drawn / "claims.json").read_text()).keys()
    assert judged == set().union(*(claims for _, claims in pages.values()))


@pytest.mark.parametrize("model_type", ["gemma"], indirect=True)
def test_dose_0_of_the_figure_is_the_base(folder):
    """Nothing more is computed here than the notebooks did."""
    numbers = json.loads((folder / "figures" / "smoke" / "fig2a_adding.json").read_text())["numbers"]
    assert numbers["doses"] == [0, 1]
    drawn = {metric: [value for value, _, _ in curves["v*"]] for metric, curves in numbers["curves"].items()}
    with artifacts.nothing_made():
        base = opened(folder).answers("base", "heldout")
    for metric in ("preferred", "not_opposed", "token_loss"):
        assert drawn[metric][0] == pytest.approx(base[metric].mean(), rel=1e-5)


@pytest.mark.parametrize("model_type", ["gemma"], indirect=True)
def test_the_judge_was_asked_and_neither_its_key_nor_the_hub_s_token_is_left_anywhere(folder, judge):
    """In no artefact, figure, notebook or log."""
    assert {headers["authorization"] for _, headers in judge.headers} == {f"Bearer {KEY}"}
    shown = json.loads((folder / "figures" / "smoke" / "fig04_open_text.json").read_text())["numbers"]
    assert {curve["geval"][0] for curve in shown.values()} == {4.0}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {".json", ".ipynb", ".log", ".safetensors", ".png"} <= {path.suffix for path in files}
    planted = [secret.encode() for secret in (KEY, TOKEN)]
    assert [path for path in files if any(secret in path.read_bytes() for secret in planted)] == []
