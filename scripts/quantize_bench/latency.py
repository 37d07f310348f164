"""Candidates timed in turns, in one process: ``python -m quantize_bench.latency job.json result.json``.

A round calls every candidate, in random order; the ratio of two candidates is the median over rounds of the ratio within
the round, so that what slows the machine down for a while slows both. On a busy machine waiting for a core is part of
every call and hides what a candidate gains; the shortest call of all rounds has waited least, so it is kept, too. The job: ``samples``, ``threads``, ``batches``,
``rounds``, ``candidates`` (name, path, runtime, options), ``base`` (the name that ratios are taken to).
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .runners import open_runner
from .samples import Samples

LIMIT_S, LEAST_ROUNDS = 90.0, 5
"""No batch size is timed longer than this, but for so many rounds."""

TURN_S = 0.05
"""A turn repeats a call at least this long; its time is the median of its calls."""


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    turn_s: float = TURN_S,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of each call's turn in every round, and of its shortest call. A first round, to warm up, is not counted."""
    order, shuffle = list(calls), random.Random(seed).shuffle
    taken: dict[str, list[float]] = {name: [] for name in calls}
    best = dict.fromkeys(calls, float("inf"))
    began_all = clock()
    for number in range(rounds + 1):
        if number > LEAST_ROUNDS and clock() - began_all > limit_s:
            break
        shuffle(order)
        for name in order:
            times = []
            ends = clock() + turn_s
            while True:
                began = clock()
                calls[name]()
                times.append(clock() - began)
                if clock() >= ends:
                    break
            if number:
                taken[name].append(statistics.median(times) * 1e3)
                best[name] = min(best[name], min(times) * 1e3)
    return taken, best


def ratio(candidate: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of ``candidate / base`` in the same round.

    >>> ratio([1.0, 20.0, 1.0], [2.0, 40.0, 2.0])
    0.5
    """
    return statistics.median(one / other for one, other in zip(candidate, base, strict=True))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {"errors": {}, "ms": {}, "best_ms": {}}
    samples = Samples(job["samples"])
    runners = {}
    for candidate in job["candidates"]:
        try:
            runners[candidate["name"]] = open_runner(
                candidate["path"], candidate["runtime"], threads=job["threads"], options=candidate["options"]
            )
        except Exception as exc:
            found["errors"][candidate["name"]] = f"{type(exc).__name__}: {str(exc).strip().splitlines()[0][:200]}"
    for batch in job["batches"]:
        feeds = samples.feeds(0, batch)
        calls = {}
        for name, run in runners.items():
            try:
                run(feeds)
            except Exception as exc:
                found["errors"][name] = f"{type(exc).__name__}: {str(exc).strip().splitlines()[0][:200]}"
                continue
            calls[name] = lambda run=run, feeds=feeds: run(feeds)
        found["ms"][str(batch)], found["best_ms"][str(batch)] = take_turns(calls, rounds=job["rounds"], seed=batch)
        Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
