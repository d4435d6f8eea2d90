"""What `make bench` measures runs in an environment of its own, without most of what the project installs."""

import importlib
import re
import sys
import tomllib
from pathlib import Path
from unittest.mock import MagicMock

import torch

from helpers.stages import keys

ROOT = Path(__file__).parents[1]
IMPORTED_AS = {"scikit-learn": "sklearn", "rouge-score": "rouge_score"}


def names(requirements: list[str]) -> set[str]:
    return {re.split("[=<>]", line)[0] for line in requirements if line and not line.startswith("#")}


def test_what_is_measured_imports_no_more_than_its_requirements():
    project = names(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    there = names((ROOT / "benchmarks/requirements.txt").read_text().splitlines())
    # what those bring along themselves
    missing = project - there - {"huggingface_hub", "filelock", "pandas", "pyarrow", "psutil", "gguf"}
    assert {"seaborn", "papermill", "sacrebleu"} <= missing
    ours = ["activations", "architecture", "decoding", "exports", "likelihoods", "shared_prompts", "tilts", "training"]
    reached = set().union(*(keys._reached(f"helpers.lm.{name}")[1] for name in ours))
    assert not reached & {IMPORTED_AS.get(name, name) for name in missing}


def test_our_own_contenders_do_what_is_timed(monkeypatch):
    """The other libraries are not installed here, so only what is ours runs."""
    for other in ("nnsight", "repeng", "repeng.extract"):
        monkeypatch.setitem(sys.modules, other, MagicMock())
    subject = importlib.import_module("benchmarks.subject")
    for size, small in {"VOCABULARY": 97, "LAYERS": 2, "WIDTH": 36, "N_PROMPTS": 20}.items():
        monkeypatch.setattr(subject, size, small)
    contenders = importlib.import_module("benchmarks.contenders")
    monkeypatch.delitem(sys.modules, "benchmarks.contenders")
    monkeypatch.setattr(contenders, "NEW_TOKENS", 3)
    s = subject.subject()
    for site in ("final", contenders.SITE):
        deltas = contenders.doses(s, site)[-2:]
        at_once = contenders.generate(s, site, deltas, contenders.SWEEP_PROMPTS)()
        assert at_once.shape == (2, contenders.SWEEP_PROMPTS, 3)
        assert torch.equal(at_once, contenders.generate_in_runs(s, site, deltas)())
    assert torch.allclose(*(contenders.likelihoods_of_arms(s, way)() for way in (True, False)), rtol=1e-3, atol=1e-3)
    assert torch.allclose(contenders.training_by_ours()(), contenders.training_by_trl()(), atol=1e-5)
    states, logits = contenders.ours(s)(), contenders.plain(s)()
    assert (s.model.lm_head(states[:, -1]) - logits).abs().max() < 1e-3
