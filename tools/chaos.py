"""Disturb runs of `make figures` and see what is lost and what is said: `make chaos`.

Every trial has artefacts and figures of its own below build/, so nothing of a user's is touched. Its files are compared
with those of one undisturbed run, byte for byte. A trial fails where a file differs, where what had to be said was not,
or where it did not come to what it is about, such as a disk that was never full.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers import places
from helpers.stages import artifacts

BUILD = places.PROJECT / "build" / "chaos"  # make's folder for the profile
TRIALS = places.PROJECT / "build" / "chaos-trials"
KILLS = 10
IMPORTED = 12  # seconds of a processor within which a worker has imported its libraries
SOON = 10  # seconds in which what a killed process had started has to end


@dataclass(frozen=True)
class Place:
    """Where a trial keeps what it makes."""

    name: str

    @property
    def folder(self) -> Path:
        return TRIALS / self.name

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    def start(self, before: Sequence[str] = ()) -> subprocess.Popen:
        """`make figures` there, after the words of another command. What it says goes into a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = {"DSTEER_ARTIFACTS": str(self.artifacts), "DSTEER_FIGURES": str(self.figures)}
        command = [*before, "make", "figures", f"PROFILE={BUILD}.toml"]
        with (self.folder / "said.txt").open("a") as said:
            return subprocess.Popen(command, cwd=places.PROJECT, env=os.environ | own, stdout=said, stderr=said)

    def run(self, before: Sequence[str] = ()) -> int:
        return self.start(before).wait()

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text(errors="replace")

    def made(self) -> list[Path]:
        """The finished artefacts."""
        found = self.artifacts.iterdir() if self.artifacts.exists() else ()
        return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))

    def bytes(self) -> dict[str, str]:
        """The checksum of every figure and of every artefact's file."""
        files = [path for kept in (self.figures, self.artifacts) for path in sorted(kept.rglob("*")) if path.is_file()]
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if ".locks" not in path.parts
        }


@dataclass(frozen=True)
class Outcome:
    """A finished trial: its place, what was said, and whether all went as it has to, apart from the files."""

    place: Place
    said: str
    went_well: bool

    def lost(self, files: dict[str, str]) -> list[str]:
        """The names of the files that it lacks, has besides, or has otherwise than an undisturbed run."""
        found = self.place.bytes()
        return sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))


def reference() -> Place:
    """An undisturbed run. Raises RuntimeError where not even that ends well."""
    place = _fresh("reference")
    if place.run():
        raise RuntimeError(f"The undisturbed run fails:\n{place.said[-2000:]}")
    return place


def _fresh(name: str) -> Place:
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.rmtree(TRIALS / name, ignore_errors=True)
    return Place(name)


def _beginning_with(other: Place, name: str) -> Place:
    """A place that has the artefacts of another."""
    place = _fresh(name)
    shutil.copytree(other.artifacts, place.artifacts)
    return place


# --- Trials: each begins with an undisturbed run's place, and ends with a run that nothing disturbs ---

Trial = Callable[[Place, random.Random], Outcome]


def everything_killed(whole: Place, rng: random.Random) -> Outcome:
    """The moments are drawn among the artefacts, since a run that starts again begins with what is not yet made."""
    place, kills = _fresh("killed"), 0
    for made in sorted(rng.sample(range(len(whole.made())), KILLS)):
        run = place.start()
        while len(place.made()) < made and run.poll() is None:
            time.sleep(0.05)
        with suppress(subprocess.TimeoutExpired):
            run.wait(rng.uniform(0, 2))
        kills += run.poll() is None
        _kill(run)
    ended = place.run()
    return Outcome(place, f"{kills} kills; then the run ends with {ended}", (kills, ended) == (KILLS, 0))


def _kill(run: subprocess.Popen) -> None:
    """Kill a run with all that it has started."""
    if run.poll() is None:
        for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        run.wait()


def kernel_killed(whole: Place, rng: random.Random) -> Outcome:
    place = _fresh("kernel")
    run = place.start()
    while not any(map(_busy, workers := _workers(run))):  # until processes of its own compute
        if run.poll() is not None:
            return Outcome(place, "no worker ever computed", went_well=False)
        time.sleep(0.2)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(workers[0].ppid()).kill()
    _, left = psutil.wait_procs(workers, timeout=SOON)
    run.wait()
    said, was_said = _sentence(place, r"Notebook \w+ stopped: its kernel died[^\n]*")
    ended = place.run()
    after = f"{len(left)} of {len(workers)} workers went on for {SOON} s."
    return Outcome(place, f"{said} {after}", was_said and not left and ended == 0)


def _workers(run: subprocess.Popen) -> list[psutil.Process]:
    found = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
    return [process for process in found if "LokyProcess" in _command(process)]


def _busy(worker: psutil.Process) -> bool:
    """Whether a worker has done more than import its libraries."""
    try:
        return sum(worker.cpu_times()[:2]) > IMPORTED
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def bytes_flipped(whole: Place, rng: random.Random) -> Outcome:
    place, kinds = _beginning_with(whole, "flipped"), {}
    for folder in place.made():
        kinds.setdefault(folder.name.rsplit("-", 1)[0], []).append(folder)
    damaged = [rng.choice(folders) for folders in kinds.values()]
    for folder in damaged:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        _flip(rng.choice([path for path in files if path.name != artifacts.MANIFEST]), rng)
    ended = place.run()
    told = set(re.findall(r"The artefact (\S+) is damaged", place.said))
    said = (
        f"{len(told)} of {len(kinds)} kinds: The artefact ... is damaged: ... missing or changed. It is computed again."
    )
    return Outcome(place, said, told == {folder.name for folder in damaged} and ended == 0)


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def disk_full(whole: Place, rng: random.Random) -> Outcome:
    place, size = _fresh("full"), sum(path.stat().st_size for path in whole.artifacts.rglob("*") if path.is_file())
    kept = place.folder / "kept"
    mounted = f'mount -t tmpfs -o size={int(size * rng.uniform(0.3, 0.7))} tmpfs "{place.artifacts}"'
    _in_namespace(place, place.artifacts, mounted, f'cp -a "{place.artifacts}" "{kept}"')
    said, was_said = _sentence(place, r"No space is left for [^\n]*")
    if not kept.exists():
        return Outcome(place, said, went_well=False)
    place.artifacts.rmdir()
    kept.rename(place.artifacts)
    broken = [folder for folder in place.made() if not _is_whole(folder)] + sorted(place.artifacts.glob(".partial*"))
    ended = place.run()
    return Outcome(place, f"{said} {len(broken)} artefacts were half-written.", was_said and not broken and ended == 0)


def _is_whole(folder: Path) -> bool:
    try:
        artifacts.verify(folder, artifacts.key_in(folder))
    except artifacts.DamagedArtifact:
        return False
    return True


def figures_locked(whole: Place, rng: random.Random) -> Outcome:
    place = _beginning_with(whole, "locked")
    at = place.figures
    _in_namespace(place, at, f'mount --bind "{at}" "{at}" && mount -o remount,bind,ro "{at}"', "true")
    said, was_said = _sentence(place, r"The folder \S+ cannot be written to[^\n]*")
    ended = place.run()
    return Outcome(place, said, was_said and ended == 0)


def _in_namespace(place: Place, folder: Path, mount: str, after: str) -> None:
    """`make figures` where a folder is mounted for it alone, as Linux can, and a command after it."""
    folder.mkdir(parents=True)
    script = f'{mount} && {{ "$@"; {after}; }}'
    place.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])


def two_at_once(whole: Place, rng: random.Random) -> Outcome:
    place = _fresh("two")
    runs = [place.start(), place.start()]
    ended = [run.wait() for run in runs]
    said, was_said = _sentence(place, r"Another run is at work[^\n]*")
    return Outcome(place, f"{said} They end with {ended[0]} and {ended[1]}.", was_said and ended == [0, 0])


def _sentence(place: Place, pattern: str) -> tuple[str, bool]:
    """The sentence of a pattern, or what was said last in its stead, and whether it was said."""
    found = re.search(pattern, place.said)
    said = found[0] if found else (place.said.strip().splitlines() or [""])[-1][:200]
    return said.replace(str(places.PROJECT), "..."), found is not None


TRIED: dict[str, Trial] = {
    f"kill -9 of everything, at {KILLS} random moments": everything_killed,
    "kill -9 of a notebook's kernel alone": kernel_killed,
    "a byte flipped in an artefact of every kind": bytes_flipped,
    "a full disk": disk_full,
    "a figures folder that cannot be written to": figures_locked,
    "two runs of one profile at once": two_at_once,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="smoke", help="a built-in profile")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and bytes")
    parser.add_argument("--only", default="", help="trials whose names hold this")
    given = parser.parse_args()
    BUILD.parent.mkdir(exist_ok=True)
    BUILD.with_suffix(".toml").write_text(f'extends = "{given.profile}"\n')
    chosen = {name: trial for name, trial in TRIED.items() if given.only in name}
    whole = reference()
    print("| What was done | What was lost | What was said | |\n|---|---|---|---|", flush=True)
    passed = [_passes(name, trial(whole, random.Random(given.seed)), whole.bytes()) for name, trial in chosen.items()]
    return 0 if passed and all(passed) else 1


def _passes(name: str, outcome: Outcome, files: dict[str, str]) -> bool:
    """Print a trial's row of the table and return whether all is as it has to be."""
    lost = outcome.lost(files)
    told = f"{len(lost)} of {len(files)} files, {lost[0]} first" if lost else f"nothing of {len(files)} files"
    passes = outcome.went_well and not lost
    print(f"| {name} | {told} | {outcome.said} | {'passes' if passes else 'FAILS'} |", flush=True)
    return passes


if __name__ == "__main__":
    sys.exit(main())
