"""Time several things fairly: warm, in turn, in another order each round.

What drifts (clocks, heat, other people's processes) then hits all alike, and the runs of one round can be compared in
pairs. A turn is one untimed run and one timed run: the untimed one brings back the caches, and outlasts the threads of
the candidate before, which spin for a while when they have nothing to do.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from deploycli.models.memory import collector_paused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from deploycli.exporters.bench.candidate import BenchOptions

    Clock = Callable[[], float]

MIN_ROUNDS = 5
"""Whatever the time: with fewer there is no spread to speak of."""

_TOLD_EVERY = 2.0  # seconds between two signs of life: a log wants few, and Ctrl-C is looked for at each


def warm_up(run: Callable[[], object], options: BenchOptions, clock: Clock = time.perf_counter) -> int:
    """Run untimed, at least once, until the runs or the seconds are used up; return how often it ran."""
    end = clock() + options.warmup_seconds
    for count in range(1, options.warmup_runs + 1):
        run()
        if clock() >= end:
            return count
    return options.warmup_runs


def interleave(
    runs: Sequence[Callable[[], object]],
    options: BenchOptions,
    *,
    clock: Clock = time.perf_counter,
    tick: Callable[[int, int], None] = lambda _done, _total: None,
) -> npt.NDArray[np.float64]:
    """Time everything in turn, round after round.

    Args:
        runs: what to time; each returns when its work is done.
        options: the number of rounds, or the seconds after which no new round begins, and the seed of the order.
        clock: seconds.
        tick: called now and then, between two rounds, with how many rounds (or seconds) are done, of how many.

    Returns:
        Seconds, [runs, rounds].
    """
    rng = np.random.default_rng(options.seed)
    rounds: list[list[float]] = []
    tick(*_progress(0, 0.0, options))
    with collector_paused():
        begin = told = clock()
        while not _enough(len(rounds), clock() - begin, options):
            row = [0.0] * len(runs)
            for i in rng.permutation(len(runs)):
                run = runs[i]
                run()
                start = clock()
                run()
                row[i] = clock() - start
            rounds.append(row)
            if (now := clock()) - told >= _TOLD_EVERY:
                told = now
                tick(*_progress(len(rounds), now - begin, options))
    seconds: npt.NDArray[np.float64] = np.asarray(rounds, np.float64).reshape(len(rounds), len(runs)).T
    return seconds


def _enough(rounds: int, seconds: float, options: BenchOptions) -> bool:
    if options.rounds is not None:
        return rounds >= options.rounds
    return rounds >= MIN_ROUNDS and seconds >= options.seconds


def _progress(rounds: int, seconds: float, options: BenchOptions) -> tuple[int, int]:
    done, total = (seconds, options.seconds) if options.rounds is None else (rounds, options.rounds)
    return min(int(done), math.ceil(total) - 1), math.ceil(total)
