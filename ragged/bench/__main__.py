"""Measure, and write tidy rows: `python -m ragged.bench attention model --out DIR`.

Suites: dispatch, attention, backward, pack, model, sparsity, resolution, mixed, memory, equivalence, accuracy,
fidelity, seeds, training, speculation, and `report`, which prints what the paper states, what was recorded on an H200
and an H100, and what this machine measured, side by side. A recording may be stopped and resumed: rows that this
version has written already are not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import data
from ..backends import BACKENDS
from ..speculation.suite import speculation
from . import commandline, options, processes
from .report import report, write_summary
from .rounds import Broken
from .runner import Case, Options, Recorder, chosen, machine, settle
from .suites.accuracy import accuracy, imagenet
from .suites.attention import attention
from .suites.backward import backward
from .suites.checks import equivalence, memory
from .suites.dispatch import dispatch, write_traces
from .suites.fidelity import fidelity
from .suites.mixed import mixed
from .suites.model import model, resolution, sparsity
from .suites.pack import pack
from .suites.seeds import seeds
from .suites.training import training

SUITES: dict[str, Callable[[Options], list[Case]]] = {
    suite.__name__: suite
    for suite in (dispatch, attention, backward, pack, model, sparsity, resolution, mixed, memory, equivalence,
                  accuracy, fidelity, seeds, training, speculation)
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 3 when a provider broke the GPU's context and the rest needs a new process, or 4
    when cases failed for reasons that can be put right (`options.EXIT_CODES`)."""
    asked = parser().parse_args(arguments)
    options.check(asked)
    processes.take_gpu(asked.device)
    out = Path(asked.out or ("quick_results" if asked.quick else data.data_dir() / "results"))
    repeats = asked.repeats or (3 if asked.quick else 5)
    suites = [suite for suite in asked.suites if suite != "report"]
    if suites:
        commandline.check_writable(out)
    if suites and processes.asked() == 1:
        say_what_is_missing(asked.device)
    wanted = options.wanted(asked)
    recorder = Recorder(out, repeats, 1000 if asked.quick else 4000, asked.redo, asked.budget)
    wake()
    with torch.no_grad():
        for suite in suites:
            try:
                if suite == "accuracy" and asked.imagenet:
                    imagenet(options.folder(asked), recorder)
                else:
                    run_suite(suite, wanted, recorder)
            except Broken as error:
                print(f"{suite}: {error.subject.columns} broke CUDA ({error}); run again for the rest", file=sys.stderr)
                return 3
    if "report" in asked.suites:
        text = report(out)
        print(text)
        if asked.markdown:
            Path(asked.markdown).write_text(text, encoding="utf-8")
        if asked.readme:
            write_summary(Path(asked.readme))
    for why, times in recorder.failures.items():
        print(f"failed {times} times: {why}", file=sys.stderr)
    return 4 if recorder.failures else 0


def say_what_is_missing(device: str) -> None:
    """One line for each backend whose package is not installed: its rows will hold the reason in place of numbers."""
    for name, backend in BACKENDS.items():
        why = backend.why_not(device, torch.float16, 64) or ""
        if "not installed" in why:
            print(f"{name} will not be measured: {why}", file=sys.stderr)


def wake(seconds: float = 1.0) -> None:
    """Work for a moment, so that the GPU's clock is up before the first case."""
    if torch.cuda.is_available():
        x, start = torch.randn(4096, 4096, device="cuda", dtype=torch.float16), time.monotonic()
        while time.monotonic() - start < seconds:
            torch.mm(x, x)
            torch.cuda.synchronize()


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    return options.parser(tuple(SUITES), __doc__.split("\n\n")[0])


def run_suite(name: str, wanted: Options, recorder: Recorder) -> None:
    """All cases of a suite, with a progress bar; stops in between when the time is up."""
    start, rows, bad = time.monotonic(), 0, 0
    cases = SUITES[name](wanted)
    if name in options.USE_CHOICE:
        cases = chosen(cases, wanted)
    for case in progress(cases, name):
        if recorder.late():
            print(f"{name}: the time is up, run the same command again to go on", file=sys.stderr)
            break
        new = recorder.run(case)
        rows, bad = rows + len(new), bad + sum(row["status"] != "ok" for row in new)
        settle()
    if name == "dispatch" and not recorder.late():
        write_traces(recorder.folder() / "traces", wanted)
    seconds = time.monotonic() - start
    spent = ", ".join(f"{what} {s:.0f} s" for what, s in recorder.spent.items())
    print(f"{name}: {rows} rows, {bad} without a value, {seconds:.0f} s ({spent}), {machine()['gpu']}", file=sys.stderr)


def progress(cases: list[Case], name: str):
    """The cases, with a bar that names the present one."""
    bar = commandline.bar(cases, desc=name, unit="case", leave=False, mininterval=1.0)
    for case in bar:
        if bar is not cases:
            bar.set_postfix_str(case.name)
        yield case


if __name__ == "__main__":
    sys.exit(commandline.run(main, "python -m ragged.bench"))
