"""Disturb runs of the notebooks and see what is lost and what is said: `make chaos`.

Every trial has artefacts and figures of its own below build/, so nothing of a user's is touched. Its files are compared
with those of one undisturbed run, byte for byte.
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

    def bytes(self) -> dict[str, str]:
        """The checksum of every figure and of every artefact's file."""
        files = [path for kept in (self.figures, self.artifacts) for path in sorted(kept.rglob("*")) if path.is_file()]
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if ".locks" not in path.parts
        }


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: its files and how many seconds it took."""

    files: dict[str, str]
    seconds: float

    def lost(self, place: Place) -> str:
        """What a finished trial lacks of these files, or has otherwise, in words."""
        found = place.bytes()
        wrong = sorted(name for name in self.files.keys() | found.keys() if self.files.get(name) != found.get(name))
        return (
            f"{len(wrong)} of {len(self.files)} files, {wrong[0]}" if wrong else f"nothing of {len(self.files)} files"
        )


def reference() -> Reference:
    """Raises RuntimeError where not even an undisturbed run ends well."""
    place, began = _fresh("reference"), time.monotonic()
    if place.run():
        raise RuntimeError(f"The undisturbed run fails:\n{place.said[-2000:]}")
    return Reference(place.bytes(), time.monotonic() - began)


def _fresh(name: str) -> Place:
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.rmtree(TRIALS / name, ignore_errors=True)
    return Place(name)


def _beginning_with(other: Place, name: str) -> Place:
    """A place that has the artefacts of another."""
    place = _fresh(name)
    shutil.copytree(other.artifacts, place.artifacts)
    return place


# --- Trials: each says what was lost and what was said ---

Trial = Callable[[Reference, random.Random], tuple[str, str]]


def everything_killed(whole: Reference, rng: random.Random) -> tuple[str, str]:
    place, kills = _fresh("killed"), 0
    for _ in range(KILLS):
        run = place.start()
        try:
            run.wait(whole.seconds * rng.uniform(0.04, 0.2))
            break
        except subprocess.TimeoutExpired:
            for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            run.wait()
            kills += 1
    ended = place.run()
    return whole.lost(place), f"{kills} kills; then the run ends with {ended}"


def kernel_killed(whole: Reference, rng: random.Random) -> tuple[str, str]:
    place = _fresh("kernel")
    run = place.start()
    while not (workers := _workers(run)):  # until it computes in processes of its own
        if run.poll() is not None:
            return "no worker was ever started", _last_line(place)
        time.sleep(0.2)
    psutil.Process(workers[0].ppid()).kill()
    _, left = psutil.wait_procs(workers, timeout=SOON)
    run.wait()
    said = _sentence(place, r"Notebook \w+ stopped: its kernel died[^\n]*")
    place.run()
    return whole.lost(place), f"{said}; {len(left)} of its workers went on for {SOON} s"


def _workers(run: subprocess.Popen) -> list[psutil.Process]:
    found = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
    return [process for process in found if "LokyProcess" in _command(process)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def bytes_flipped(whole: Reference, rng: random.Random) -> tuple[str, str]:
    place, kinds = _beginning_with(Place("reference"), "flipped"), {}
    for folder in sorted(path for path in place.artifacts.iterdir() if path.is_dir() and path.name[0] != "."):
        kinds.setdefault(folder.name.rsplit("-", 1)[0], []).append(folder)
    for folders in kinds.values():
        files = sorted(path for path in rng.choice(folders).rglob("*") if path.is_file() and path.stat().st_size)
        _flip(rng.choice(files), rng)
    place.run()
    told = len(set(re.findall(r"The artefact (\S+) (?:is damaged|has no readable|was stored)", place.said)))
    return whole.lost(place), f"{told} of {len(kinds)} damaged artefacts were told of and made again"


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def disk_full(whole: Reference, rng: random.Random) -> tuple[str, str]:
    place, size = _fresh("full"), sum(f.stat().st_size for f in Place("reference").artifacts.rglob("*") if f.is_file())
    kept = place.folder / "kept"
    mounted = f'mount -t tmpfs -o size={int(size * rng.uniform(0.3, 0.7))} tmpfs "{place.artifacts}"'
    ended = _in_namespace(place, place.artifacts, mounted, f'cp -a "{place.artifacts}" "{kept}"')
    if ended == 0:
        return "the disk never was full", ""
    said = _sentence(place, r"No space is left for [^\n]*")
    whole_ones = [_is_whole(folder) for folder in kept.iterdir() if folder.is_dir() and folder.name[0] != "."]
    shutil.rmtree(place.artifacts)
    kept.rename(place.artifacts)
    place.run()
    return whole.lost(place), f"{said}; {sum(whole_ones)} of {len(whole_ones)} artefacts were whole"


def _is_whole(folder: Path) -> bool:
    try:
        artifacts.verify(folder, artifacts.key_in(folder))
    except artifacts.DamagedArtifact:
        return False
    return True


def figures_locked(whole: Reference, rng: random.Random) -> tuple[str, str]:
    place = _beginning_with(Place("reference"), "locked")
    at = place.figures
    if _in_namespace(place, at, f'mount --bind "{at}" "{at}" && mount -o remount,bind,ro "{at}"', "true") == 0:
        return "the folder was never locked", ""
    said = _sentence(place, r"The folder \S+ cannot be written to[^\n]*")
    place.run()
    return whole.lost(place), said


def _in_namespace(place: Place, folder: Path, mount: str, after: str) -> int:
    """`make figures` where a folder is mounted for it alone, and a command after it; its exit status."""
    folder.mkdir(parents=True)
    script = f'{mount} && {{ "$@"; ended=$?; {after}; exit $ended; }}'
    return place.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])


def two_at_once(whole: Reference, rng: random.Random) -> tuple[str, str]:
    place = _fresh("two")
    runs = [place.start(), place.start()]
    ended = [run.wait() for run in runs]
    said = _sentence(place, r"Another run is at work[^\n]*")
    return whole.lost(place), f"{said}; they end with {ended}"


def _sentence(place: Place, pattern: str) -> str:
    found = re.search(pattern, place.said)
    said = found[0] if found else f"(nothing like it: {_last_line(place)})"
    return said.replace(str(places.PROJECT), "...")


def _last_line(place: Place) -> str:
    return (place.said.strip().splitlines() or [""])[-1][:200]


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
    whole, is_well = reference(), True
    print("| What was done | What was lost | What was said |\n|---|---|---|", flush=True)
    for name, trial in TRIED.items():
        if given.only in name:
            lost, said = trial(whole, random.Random(given.seed))
            print(f"| {name} | {lost} | {said} |", flush=True)
            is_well &= lost.startswith("nothing")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
