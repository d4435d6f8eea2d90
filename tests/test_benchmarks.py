"""What `make bench` measures runs in an environment of its own, without most of what the project installs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden})); from helpers import activations, generation, models"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
