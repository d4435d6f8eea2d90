"""Verify that the contenders compute the same, time them, print the table and write the JSON."""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.contenders import BATCH, DOSES, GENERATE_PROMPTS, NEW_TOKENS, SWEEP_PROMPTS, VECTORS
from benchmarks.subject import LAYERS, LENGTHS, N_PROMPTS, VOCABULARY, WIDTH, Subject, subject
from helpers.lm import architecture

REPETITIONS = 7
SWEEP_REPETITIONS = 5
TOLERANCE = 1e-3  # largest difference of two float32 states of size 1 that batching may make

Times = dict[str, list[float]]


def main(path: Path) -> None:
    """Measure everything on one subject and write `path`."""
    s = subject()
    extraction, differences = measure_extraction(s)
    steering, sweep, agreement = measure_generation(s)
    vectors = measure_vectors(s)
    times = extraction | steering | sweep | vectors
    rows = [
        row("extraction / plain forward pass", times, "ours", "plain", 0.80),
        row("extraction / repeng", times, "ours", "repeng", 0.75),
        row("extraction / nnsight", times, "ours", "nnsight", 0.75),
        row("extraction / nnsight, stopped before the unembedding", times, "ours", "nnsight_stopped", None),
        row("generation with a vector / without", times, "with vector", "without", 1.05),
        row(f"sweep of {len(DOSES)} doses as one batch / in runs", times, "one batch", "runs", 0.60),
        row(f"KL of {VECTORS} vectors by algebra / by a softmax each", times, "algebra", "softmax", 0.50),
    ]
    print(table(rows))
    report = {"about": about(), "rows": rows, "seconds": times}
    report |= {"largest_difference": differences, "sweep_agreement": agreement}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def measure_extraction(s: Subject) -> tuple[Times, dict[str, float]]:
    """Seconds of each way to the states, and how far each one's states are from ours. Raises ValueError if too far."""
    calls = {
        "ours": contenders.ours(s),
        "plain": contenders.plain(s),
        "repeng": contenders.repeng(s),
        "nnsight": contenders.nnsight_trace(s, stopped=False),
        "nnsight_stopped": contenders.nnsight_trace(s, stopped=True),
    }
    differences = check_states(s, {name: call() for name, call in calls.items()})  # the warm-up too
    return interleaved(calls, REPETITIONS), differences


def measure_generation(s: Subject) -> tuple[Times, Times, float]:
    """Seconds of generation with and without a vector, of both sweeps, and the share of tokens in which these agree."""
    deltas = contenders.doses(s)
    vectors = {"with vector": deltas[[DOSES.index(1.0)]], "without": None}
    steering = {name: contenders.generate(s, vector, GENERATE_PROMPTS) for name, vector in vectors.items()}
    sweep = {"one batch": contenders.generate(s, deltas, SWEEP_PROMPTS), "runs": contenders.sweep_in_runs(s, deltas)}
    if torch.equal(steering["with vector"](), steering["without"]()):
        raise ValueError("The vector changed no answer: what is timed is not steering.")
    agreement = (sweep["one batch"]() == sweep["runs"]()).double().mean().item()
    if agreement < 0.9:  # a greedy answer goes its own way after a tie that rounding has broken
        raise ValueError(f"The two sweeps agree in {agreement:.0%} of the tokens: they do not do the same.")
    return interleaved(steering, REPETITIONS), interleaved(sweep, SWEEP_REPETITIONS), agreement


def measure_vectors(s: Subject) -> Times:
    """Seconds of both ways to the KL of many vectors. Raises ValueError where they differ."""
    calls = {name: contenders.kl_of_vectors(s, name == "algebra") for name in ("algebra", "softmax")}
    found = [call() for call in calls.values()]
    if not torch.allclose(*found, rtol=1e-3, atol=TOLERANCE):
        raise ValueError("The two ways to the KL of vectors differ: they do not do the same.")
    return interleaved(calls, SWEEP_REPETITIONS)


def check_states(s: Subject, states: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each contender's states (the plain pass: logits) from ours."""
    final = len(architecture.sites(s.model)) - 1
    ours = states["ours"]  # (N, L + 2, d)
    expected = {
        "plain": architecture.unembedding(s.model)(ours[:, final]),
        "repeng": ours[:, [*range(1, LAYERS), final]],
        **dict.fromkeys(("nnsight", "nnsight_stopped"), ours),
    }
    differences = {name: (states[name] - expected[name]).abs().max().item() for name in expected}
    for name, difference in differences.items():
        if not difference < TOLERANCE:
            raise ValueError(f"The states of {name} differ from ours by {difference:.2g}: it does not do the same.")
    return differences


def interleaved(calls: dict[str, Callable[[], Tensor]], repetitions: int) -> Times:
    """Seconds of each call, already warmed up, in rounds whose order rotates."""
    names = list(calls)
    times: Times = {name: [] for name in names}
    for i in range(repetitions):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = perf_counter()
            calls[name]()
            times[name].append(perf_counter() - start)
    return times


def row(name: str, times: Times, above: str, below: str, target: float | None) -> dict:
    """The ratio of one call's median seconds to another's, the smallest and the largest of one repetition, and what it
    should be at most; a target of None marks a ratio that is reported and not aimed at."""
    ratios = [a / b for a, b in zip(times[above], times[below])]
    ratio = median(times[above]) / median(times[below])
    verdict = "" if target is None else "met" if ratio <= target else "missed"
    spread = {"low": min(ratios), "high": max(ratios)}
    return {"name": name, "ratio": ratio, **spread, "target": target, "verdict": verdict}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    line = "| {name} | {ratio:.2f} | {low:.2f} to {high:.2f} | {aim} | {verdict} |"
    aims = ["" if row["target"] is None else f"<= {row['target']:.2f}" for row in rows]
    head = ["| what | ratio | spread | target | |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(line.format(**row, aim=aim) for row, aim in zip(rows, aims))])


def about() -> dict:
    """What the figures depend on: versions, cores, the model and the prompts."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "repeng", "nnsight")},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "model": {"layers": LAYERS, "width": WIDTH, "vocabulary": VOCABULARY, "dtype": "float32"},
        "prompts": {"n": N_PROMPTS, "tokens": LENGTHS, "batch": BATCH},
        "generation": {"prompts": GENERATE_PROMPTS, "sweep_prompts": SWEEP_PROMPTS, "new_tokens": NEW_TOKENS},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
