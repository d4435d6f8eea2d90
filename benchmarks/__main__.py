"""`python -m benchmarks`: make the contenders' environment on first use, then measure in it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
BUILD = ROOT / "build" / "bench"
ALONE = "steering-vectors==0.12.2"  # it asks for an older transformers than ours, and runs with this one
COMPILED = "llama-cpp-python==0.3.36"  # needs a compiler; without one llama.cpp is left out


def environment() -> Path:
    """The Python of build/bench/venv, installed anew where what it has to hold has changed since."""
    venv = BUILD / "venv"
    python, installed = venv / "bin" / "python", venv / "requirements.txt"
    holds = f"{REQUIREMENTS.read_text()}{ALONE}\n{COMPILED}\n"
    if not installed.is_file() or installed.read_text() != holds:
        print(
            "Installing repeng, nnsight, steering-vectors and llama.cpp into an environment of their own (once; some "
            "minutes, of which compiling llama.cpp takes most) ...",
            flush=True,
        )
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", REQUIREMENTS], check=True)
        subprocess.run([*pip, "--no-deps", ALONE], check=True)
        subprocess.run([*pip, COMPILED])
        installed.write_text(holds)
    return python


def main() -> int:
    """Check exports and measure in the environment, offline and without progress bars; the exit status is that of the
    first that fails."""
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    python, env = environment(), {**os.environ, **quiet, "PYTHONPATH": str(ROOT)}
    has_llama_cpp = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode == 0
    if not has_llama_cpp:
        print("llama.cpp is not compared: it did not install here.", flush=True)
    checks = ["benchmarks.exports", *(["benchmarks.in_llama_cpp"] if has_llama_cpp else [])]
    commands = [*([python, "-m", name] for name in checks), [python, "-m", "benchmarks.measure", BUILD / "bench.json"]]
    return next((code for one in commands if (code := subprocess.run(one, cwd=ROOT, env=env).returncode)), 0)


if __name__ == "__main__":
    sys.exit(main())
