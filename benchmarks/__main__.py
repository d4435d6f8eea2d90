"""`python -m benchmarks`: make the contenders' environment on first use, then measure in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
BUILD = ROOT / "build" / "bench"


def environment() -> Path:
    """The Python of build/bench/venv, installed anew where requirements.txt has changed since."""
    venv = BUILD / "venv"
    python, installed = venv / "bin" / "python", venv / "requirements.txt"
    if not installed.is_file() or installed.read_bytes() != REQUIREMENTS.read_bytes():
        print("Installing repeng and nnsight into an environment of their own (once; some minutes) ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", REQUIREMENTS], check=True)
        shutil.copyfile(REQUIREMENTS, installed)
    return python


def main() -> int:
    """Measure in the environment, offline and without progress bars; the exit status is that of the measurement."""
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [environment(), "-m", "benchmarks.measure", BUILD / "bench.json"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet, "PYTHONPATH": str(ROOT)}).returncode


if __name__ == "__main__":
    sys.exit(main())
