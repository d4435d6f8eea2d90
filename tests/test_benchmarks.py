"""What `make bench` measures runs in an environment of its own, without most of what the project installs."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import MagicMock

import torch

ROOT = Path(__file__).parents[1]
IMPORTED_AS = {"scikit-learn": "sklearn", "rouge-score": "rouge_score"}


def names(requirements: list[str]) -> set[str]:
    return {re.split("[=<>]", line)[0] for line in requirements if line and not line.startswith("#")}


def test_what_is_measured_imports_no_more_than_its_requirements():
    project = names(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    there = names((ROOT / "benchmarks/requirements.txt").read_text().splitlines())
    # what those bring along themselves
    missing = project - there - {"accelerate", "huggingface_hub", "filelock"}
    assert {"datasets", "trl", "pandas"} <= missing
    hidden = sorted(IMPORTED_AS.get(name, name) for name in missing)
    ours = "from helpers.lm import activations, architecture, decoding, likelihoods, tilts"
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); {ours}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_our_own_contenders_do_what_is_timed(monkeypatch):
    """The other libraries are not installed here, so only what is ours runs."""
    for other in ("nnsight", "repeng", "repeng.extract"):
        monkeypatch.setitem(sys.modules, other, MagicMock())
    subject = importlib.import_module("benchmarks.subject")
    for size, small in {"VOCABULARY": 97, "LAYERS": 2, "WIDTH": 64, "N_PROMPTS": 20}.items():
        monkeypatch.setattr(subject, size, small)
    contenders = importlib.import_module("benchmarks.contenders")
    monkeypatch.delitem(sys.modules, "benchmarks.contenders")
    monkeypatch.setattr(contenders, "NEW_TOKENS", 3)
    s = subject.subject()
    deltas = contenders.doses(s)[-2:]
    assert contenders.generate(s, None, 2)().shape == (1, 2, 3)
    assert contenders.generate(s, deltas, 2)().tolist() == contenders.sweep_in_runs(s, deltas)()[:, :2].tolist()
    assert torch.allclose(*(contenders.kl_of_vectors(s, way)() for way in (True, False)), rtol=1e-3, atol=1e-3)
    states, logits = contenders.ours(s)(), contenders.plain(s)()
    assert (s.model.lm_head(states[:, -1]) - logits).abs().max() < 1e-3
