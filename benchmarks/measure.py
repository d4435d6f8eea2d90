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
from benchmarks.contenders import ARMS, BATCH, DOSES, GENERATE_PROMPTS, NEW_TOKENS, RECIPE, SITE, SWEEP_PROMPTS
from benchmarks.subject import LAYERS, LENGTHS, N_PROMPTS, VOCABULARY, WIDTH, Subject, subject
from helpers.lm import architecture

REPETITIONS = 5
LONG_REPETITIONS = 3  # of what takes a minute
TOLERANCE = 1e-3  # largest difference of two float32 states of size 1 that batching may make
LOSS_TOLERANCE = 1e-4

Times = dict[str, list[float]]


def main(path: Path) -> None:
    """Measure everything on one subject and write `path`."""
    s = subject()
    extraction, differences = measure_extraction(s)
    steering, agreement = measure_generation(s)
    times = extraction | steering | measure_likelihoods(s) | measure_training()
    rows = [
        row("extraction / plain forward pass with logits", times, "ours", "plain", 0.60),
        row("extraction / repeng", times, "ours", "repeng", 0.60),
        row("extraction / nnsight", times, "ours", "nnsight", 0.60),
        row("extraction / nnsight, stopped before the unembedding", times, "ours", "nnsight_stopped", None),
        row("generation with a vector / without", times, "with vector", "without", 1.05),
        row(f"{len(DOSES)} doses at `final`, one batch / runs of `generate`", times, "final", "final in runs", 0.20),
        row(f"{len(DOSES)} doses at {SITE}, one batch / runs of `generate`", times, SITE, f"{SITE} in runs", None),
        row(f"log-ratios and KL of {ARMS} arms by algebra / a run each", times, "algebra", "runs", 0.15),
        row("a partner trained for two steps / by TRL's DPOTrainer", times, "our partner", "TRL's partner", 0.40),
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


def measure_generation(s: Subject) -> tuple[Times, dict[str, float]]:
    """Seconds of generation with and without a vector and of sweeps as one batch and in runs, and the share of tokens
    in which these agree."""
    deltas = {site: contenders.doses(s, site) for site in ("final", SITE)}
    whole = deltas[SITE][[DOSES.index(1.0)]]
    steering = {
        "with vector": contenders.generate(s, SITE, whole, GENERATE_PROMPTS),
        "without": contenders.generate(s, SITE, None, GENERATE_PROMPTS),
    }
    if torch.equal(steering["with vector"](), steering["without"]()):
        raise ValueError("The vector changed no answer: what is timed is not steering.")
    times, agreement = interleaved(steering, REPETITIONS), {}
    for site, found in deltas.items():
        ways = contenders.generate(s, site, found, SWEEP_PROMPTS), contenders.generate_in_runs(s, site, found)
        agreement[site] = (ways[0]() == ways[1]()).double().mean().item()
        if agreement[site] < 0.9:  # a greedy answer goes its own way after a tie that rounding has broken
            raise ValueError(f"The two sweeps at {site} agree in {agreement[site]:.0%} of the tokens: they differ.")
        times |= interleaved({site: ways[0], f"{site} in runs": ways[1]}, LONG_REPETITIONS)
    return times, agreement


def measure_likelihoods(s: Subject) -> Times:
    """Seconds of both ways to the log-ratios and the KL of many arms. Raises ValueError where they differ."""
    calls = {name: contenders.likelihoods_of_arms(s, name == "algebra") for name in ("algebra", "runs")}
    return agreeing(calls, "log-ratios and KL", TOLERANCE)


def measure_training() -> Times:
    """Seconds of both ways to a partner. Raises ValueError where their losses differ."""
    calls = {"our partner": contenders.training_by_ours(), "TRL's partner": contenders.training_by_trl()}
    return agreeing(calls, "losses", LOSS_TOLERANCE)


def agreeing(calls: dict[str, Callable[[], Tensor]], what: str, tolerance: float) -> Times:
    """Seconds of two calls. Raises ValueError where they do not give the same numbers."""
    one, other = (call() for call in calls.values())
    difference = (one - other).abs().max().item()
    print(f"{what} of {' and '.join(calls)} differ by {difference:.1e} at most", flush=True)
    if not difference < tolerance:
        raise ValueError(f"The {what} of {' and '.join(calls)} differ by {difference:.2g}: they do not do the same.")
    return interleaved(calls, LONG_REPETITIONS)


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
    outcome = "" if target is None else "met" if ratio <= target else "missed"
    spread = {"low": min(ratios), "high": max(ratios)}
    return {"name": name, "ratio": ratio, **spread, "target": target, "outcome": outcome}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    line = "| {name} | {ratio:.2f} | {low:.2f} to {high:.2f} | {aim} | {outcome} |"
    aims = ["" if row["target"] is None else f"<= {row['target']:.2f}" for row in rows]
    head = ["| what | ratio | spread | target | |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(line.format(**row, aim=aim) for row, aim in zip(rows, aims))])


def about() -> dict:
    """What the figures depend on: versions, cores, the model and the prompts."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "repeng", "nnsight")},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "model": {"layers": LAYERS, "width": WIDTH, "vocabulary": VOCABULARY, "dtype": "float32"},
        "prompts": {"n": N_PROMPTS, "tokens": LENGTHS, "batch": BATCH},
        "generation": {"prompts": GENERATE_PROMPTS, "sweep_prompts": SWEEP_PROMPTS, "new_tokens": NEW_TOKENS},
        "training": {"pairs": RECIPE.batch_size, "steps": RECIPE.epochs, "rank": RECIPE.rank},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
