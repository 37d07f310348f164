"""Time the original and every engine in one interleaved run.

One batch size after the other: every candidate is warmed until its time holds still; then blocks follow one another, in
each of which every candidate runs for a while, in random order. Two candidates are compared block by block, so what
slows the whole machine for a second slows both. The original runs twice under two names: what distance there is between
it and itself is noise, and `compiler.validate.judge` decides nothing that is finer.

Why this schedule: of two runs of one model one after the other, means differ by 17 % and p99 by 24 % at the median on a
shared machine, and 40 % of such comparisons report a slowdown of 5 %; the median of 20 block ratios differs by 0.3 %.

Outliers are kept. Time spent is counted from the calls themselves, so the schedule is a function of what the runners say.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from compiler.errors import RecipeError
from compiler.recipe import LatencySection
from compiler.spec import Feeds, Latencies, Latency, Platform, Progress, Runner, no_progress
from compiler.validate.estimates import CONTROL, EAGER, MIN_BLOCKS

WARM_S = 0.2
STEADY_BLOCKS = 5
STEADY_WITHIN = 0.02
"""Warm-up lasts at least `WARM_S`, and until the medians of its last `STEADY_BLOCKS` blocks agree this closely."""
WARM_LIMIT_S, WARM_SHARE = 2.0, 0.25
"""A candidate that does not hold still is warmed no longer than this, first call aside, nor all together for more than
this share of ``limit_s``; a note says so."""

MIN_CALLS = 3
"""Calls of a candidate in a block, however slow they are."""
MAX_BLOCKS = 80

BUSY_SHARE = 0.1
"""Above this share of waiting for a core, a note says that the machine is not this run's own."""

SEED = 0

BOUNDARY = (
    "one synchronised call of a loaded model, from arrays in host memory to arrays in host memory, "
    "copies to and from a device included; loading, pre- and post-processing are not"
)


def measure(
    section: LatencySection,
    candidates: Mapping[str, Runner],
    feeds_at: Callable[[int], Feeds],
    batches: Sequence[int],
    *,
    engine_sha256: Mapping[str, str],
    platform: Platform,
    threads: int,
    undecided: Callable[[Sequence[Latency]], bool],
    progress: Progress = no_progress,
    notes: Sequence[str] = (),
) -> Latencies:
    """Interleaved calls of every candidate at every batch size.

    Each candidate runs ``max(3 calls, block_ms)`` in a block. ``section.blocks`` blocks are doubled, to at most 80, while
    ``undecided`` says of the latencies of a batch size that a gate on them is. No batch size takes longer than
    ``section.limit_s``, but for 5 blocks, which it always gets; up to a quarter of it more goes to warming up.

    Args:
        candidates: ``"eager"`` (the original), ``"compile"`` where it works, and the engines by name. ``"control"``, the
            A/A control, is the eager runner again.
        feeds_at: feeds at a batch size.
        engine_sha256: by engine name; goes into the record.
        threads: what every candidate was opened with; recorded only.
        notes: what a reader of the record should know besides what happens here.

    Raises:
        BuildError: a candidate cannot run.
        RecipeError: an engine has the control's name.
    """
    if CONTROL in candidates:
        raise RecipeError(
            f"[[engines]] name: found '{CONTROL}', which names the A/A control in every latency run. Choose another name."
        )
    runners = dict(candidates)
    if EAGER in runners:
        runners[CONTROL] = runners[EAGER]
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    load_before = _load()
    found = list(notes)
    latencies: list[Latency] = []
    for index, batch in enumerate(batches):
        feeds = feeds_at(batch)

        def advance(blocks: int, wanted: int, index: int = index) -> None:
            progress(index * wanted + blocks, len(batches) * wanted)

        before = _scheduled_ns()
        taken, more = _measure_batch(section, runners, feeds, batch, engine_sha256, undecided, advance)
        latencies.extend(taken)
        found.extend(more)
        if (share := waiting_share(before, _scheduled_ns())) > BUSY_SHARE:
            found.append(
                f"batch {batch}: threads that could run waited {share:.0%} of the time for a core; other work shares this "
                "machine and slows candidates unequally, so trust these ratios less than their bounds"
            )
    return Latencies(
        latencies=tuple(latencies),
        platform=platform,
        threads=threads,
        boundary=BOUNDARY,
        started=started,
        load_before=load_before,
        load_after=_load(),
        notes=(
            *found,
            f"order of candidates inside a block: numpy.random.default_rng([{SEED}, batch, block]).permutation of "
            + ", ".join(runners),
        ),
    )


def _measure_batch(
    section: LatencySection,
    runners: Mapping[str, Runner],
    feeds: Feeds,
    batch: int,
    engine_sha256: Mapping[str, str],
    undecided: Callable[[Sequence[Latency]], bool],
    advance: Callable[[int, int], None],
) -> tuple[list[Latency], list[str]]:
    names, notes = list(runners), []
    distinct = len({id(runner) for runner in runners.values()})
    warm_s = min(WARM_LIMIT_S, WARM_SHARE * section.limit_s / distinct)
    calls: dict[str, int] = {}
    for name, runner in runners.items():
        twin = next((other for other in calls if runners[other] is runner), None)
        if twin is not None:
            calls[name] = calls[twin]
            continue
        call_s, steady = _warm(runner, feeds, warm_s)
        calls[name] = max(MIN_CALLS, math.ceil(section.block_ms / 1e3 / call_s))
        if not steady:
            notes.append(
                f"batch {batch}: {name} did not hold still within {warm_s:.2g} s of warm-up "
                f"(the last medians differ by more than {STEADY_WITHIN:.0%})"
            )
    samples: dict[str, list[float]] = {name: [] for name in names}
    blocks_of: dict[str, list[int]] = {name: [] for name in names}
    spent_s, block, wanted = 0.0, 0, section.blocks
    while True:
        while block < wanted and (block < MIN_BLOCKS or spent_s + spent_s / block <= section.limit_s):
            for position in np.random.default_rng([SEED, batch, block]).permutation(len(names)):
                name = names[position]
                # To the nanosecond: what a clock can tell, and half as long in JSON.
                taken = [round(call_s, 9) for call_s in runners[name].time(feeds, calls[name])]
                samples[name].extend(taken)
                blocks_of[name].extend([block] * len(taken))
                spent_s += sum(taken)
            block += 1
            advance(block, wanted)
        latencies = [
            Latency(
                candidate=name,
                batch=batch,
                samples_s=tuple(samples[name]),
                block_of=tuple(blocks_of[name]),
                engine_sha256=engine_sha256.get(name),
            )
            for name in names
        ]
        if block < wanted:
            notes.append(
                f"batch {batch}: stopped after {block} of {wanted} blocks, at the limit of {section.limit_s:g} s"
            )
            return latencies, notes
        if wanted >= MAX_BLOCKS or not undecided(latencies):
            return latencies, notes
        wanted = min(2 * wanted, MAX_BLOCKS)


def _warm(runner: Runner, feeds: Feeds, limit_s: float) -> tuple[float, bool]:
    """Seconds per call once warm, and whether it holds still. The first call, which may compile, does not count."""
    runner.time(feeds, 1)
    call_s = runner.time(feeds, 1)[0]
    spent_s, medians = call_s, list[float]()
    while True:
        taken = runner.time(feeds, max(1, math.ceil(WARM_S / STEADY_BLOCKS / call_s)))
        spent_s += sum(taken)
        call_s = float(np.median(taken))
        medians.append(call_s)
        last = medians[-STEADY_BLOCKS:]
        # Calls so slow that the limit ends their warm-up early have not been seen to move.
        steady = max(last) <= min(last) * (1 + STEADY_WITHIN)
        if spent_s >= limit_s or (steady and spent_s >= WARM_S and len(last) == STEADY_BLOCKS):
            return call_s, steady


def _scheduled_ns() -> tuple[int, int]:
    """Nanoseconds that the threads of this process have run, and have waited for a core; zeros where unknown.

    Source: https://docs.kernel.org/scheduler/sched-stats.html, /proc/<pid>/schedstat.
    """
    ran = waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # a thread may end while it is looked at
            run_ns, wait_ns, _ = path.read_text().split()
            ran, waited = ran + int(run_ns), waited + int(wait_ns)
    return ran, waited


def waiting_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    """Of the time in which threads could run, the share in which they waited for a core.

    >>> waiting_share((10, 5), (40, 15))
    0.25
    >>> waiting_share((0, 0), (0, 0))
    0.0
    """
    ran, waited = after[0] - before[0], after[1] - before[1]
    return waited / (ran + waited) if ran > 0 and waited > 0 else 0.0


def _load() -> float:
    """One-minute load average; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
