"""Taking turns: everything that is compared is timed in the same rounds, warmed up alike, in shuffled order."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..data.evidence import SPREAD
from .timing import Call, event_us, gpu_us, gpu_us_profiled, host_us, in_turn, stats, stream_us, syncs, wait, wall_us

CLOCKS = ("host_us", "gpu_us", "wall_us", "event_us", "stream_us", "syncs")  # all there are
CALL_CLOCKS = ("host_us", "gpu_us", "wall_us", "event_us", "syncs")  # those of a single call


@dataclass
class Subject:
    """Something to time. calls: the operation on each set of inputs.  replay: enqueues `per` captured calls at once,
    while the GPU sleeps for sleep_us; None where the call cannot be captured.  around: a context in which the calls
    run.  clocks: which to read.  found: values that are known before any clock runs, by metric."""

    calls: list[Call]
    replay: Call | None = None
    per: int = 1
    sleep_us: float = field(default=300, kw_only=True)
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    clocks: tuple[str, ...] = CLOCKS
    found: dict = field(default_factory=dict)
    waits: float = field(default=0.0, init=False)
    times: dict[str, list[float]] = field(default_factory=dict, init=False)
    error: Exception | None = field(default=None, init=False)

    def warm_up(self) -> None:
        if not self.calls:  # nothing to time: its values were found while it was built
            return
        for call in in_turn(self.calls, max(3, len(self.calls))):
            call()
        if "syncs" in self.clocks:
            self.waits = syncs(self.calls)
            self.times["syncs"] = [self.waits]
        wait()

    def sample(self, slice_us: float) -> None:
        """Read every clock once, each for about slice_us."""
        calls, cuda = self.calls, torch.cuda.is_available()
        if not calls:
            return
        known = self.times.get("wall_us") or wall_us(calls, 1)
        fit = max(1, int(slice_us / max(1.0, min(known))))
        readings = {
            "host_us": lambda: host_us(calls, min(50, fit), self.waits),
            "wall_us": lambda: wall_us(calls, min(20, fit)),
            "stream_us": lambda: stream_us(calls, min(30, max(2, fit))),
        }
        if cuda:
            readings["event_us"] = lambda: event_us(calls, min(20, fit))
            if self.replay is not None:
                readings["gpu_us"] = lambda: gpu_us(self.replay, self.per, self.sleep_us)
        for clock in self.clocks:
            if clock in readings:
                self.times.setdefault(clock, []).extend(readings[clock]())

    def disturbed(self) -> list[str]:
        """The clocks whose readings lie too far apart to be kept: 80 % quantile over 20 % quantile above SPREAD."""
        found = {clock: stats(times) for clock, times in self.times.items() if clock != "syncs"}
        return [clock for clock, spread in found.items() if spread.q80 > SPREAD * spread.q20 > 0]

    def finish(self) -> None:
        if self.calls and "gpu_us" in self.clocks and self.replay is None and torch.cuda.is_available():
            self.times["gpu_us"] = gpu_us_profiled(self.calls)


class Broken(Exception):
    """The GPU's context is lost with `subject`: nothing more can run in this process."""

    def __init__(self, subject, error: Exception):
        super().__init__(str(error))
        self.subject = subject


FATAL = ("illegal memory access", "device-side assert", "misaligned address", "launch failure", "illegal instruction")


def is_fatal(error: Exception) -> bool:
    """Whether CUDA is unusable in this process after this error."""
    return any(text in str(error) for text in FATAL)


AGAIN = 3  # times that a disturbed subject is measured once more


def measure(subjects: Sequence[Subject], repeats: int = 7, slice_us: float = 4000, seed: int = 0) -> None:
    """Fill `times` of all subjects: the same warm-up for each, then `repeats` rounds in which every subject has its
    turn, in an order that is shuffled per round, so that a drifting GPU clock favours nobody. What raises gets an
    `error` and drops out; `Broken` if it took the GPU's context with it.

    What a clock of theirs disturbed is read once more, up to AGAIN times, again in turns, and the calmer readings are
    kept. What is then still too wide apart is written as it is, and marked by whoever shows it."""
    _take_turns(subjects, repeats, slice_us, seed)
    for again in range(1, AGAIN + 1):
        shaky = {id(s): (s, s.clocks, s.times) for s in subjects if s.error is None and s.disturbed()}
        for subject, _, _ in shaky.values():
            subject.clocks, subject.times = tuple(subject.disturbed()), {}
        _take_turns([subject for subject, _, _ in shaky.values()], repeats, slice_us, seed + again)
        for subject, clocks, before in shaky.values():
            calmer = {clock: min(before[clock], times, key=_spread) for clock, times in subject.times.items()}
            subject.clocks, subject.times = clocks, before | (calmer if subject.error is None else {})


def _spread(times: list[float]) -> float:
    found = stats(times)
    return found.q80 / found.q20 if found.q20 > 0 else 1.0


def _take_turns(subjects: Sequence[Subject], repeats: int, slice_us: float, seed: int) -> None:
    shuffled, rng = list(subjects), random.Random(seed)
    rounds: list[Callable[[Subject], None]] = [Subject.warm_up]
    rounds += [lambda subject: subject.sample(slice_us)] * repeats + [Subject.finish]
    enabled = gc.isenabled()
    gc.disable()
    try:
        for step in rounds:
            rng.shuffle(shuffled)
            for subject in shuffled:
                if subject.error is None:
                    _guarded(subject, step)
    finally:
        if enabled:
            gc.enable()


def _guarded(subject: Subject, step: Callable[[Subject], None]) -> None:
    try:
        with subject.around():
            step(subject)
    except Exception as error:  # one subject's failure is that subject's row, not the end of the recording
        if is_fatal(error):
            raise Broken(subject, error) from error
        subject.error = error
