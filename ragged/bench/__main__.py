"""Measure, and write tidy rows: `python -m ragged.bench attention model --out DIR`.

Suites: dispatch, attention, pack, model, sparsity, resolution, memory, equivalence, accuracy, and `report`, which
prints what the paper states, what was recorded on an H200 and what this machine measured, side by side. A recording
may be stopped and resumed: rows that this version has written already are not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import data
from ..loading import full_name
from . import commandline
from .accuracy import Folder
from .report import report, write_summary
from .rounds import Broken
from .runner import Case, Options, Recorder, machine, settle
from .suites.accuracy import accuracy, imagenet
from .suites.attention import attention
from .suites.checks import equivalence, memory
from .suites.dispatch import dispatch, write_traces
from .suites.model import model, resolution, sparsity
from .suites.pack import pack

SUITES: dict[str, Callable[[Options], list[Case]]] = {
    suite.__name__: suite
    for suite in (dispatch, attention, pack, model, sparsity, resolution, memory, equivalence, accuracy)
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 3 when a provider broke the GPU's context and the rest needs a new process."""
    asked = parser().parse_args(arguments)
    check(asked)
    out = Path(asked.out or ("quick_results" if asked.quick else data.data_dir() / "results"))
    options = Options(asked.device, asked.quick, tuple(asked.model), tuple(asked.batch))
    repeats = asked.repeats or (3 if asked.quick else 5)
    if set(asked.suites) - {"report"}:
        commandline.check_writable(out)
    recorder = Recorder(out, repeats, 1000 if asked.quick else 4000, asked.redo, asked.budget)
    wake()
    with torch.no_grad():
        for suite in [s for s in asked.suites if s != "report"]:
            try:
                if suite == "accuracy" and asked.imagenet:
                    imagenet(folder(asked), recorder)
                else:
                    run_suite(suite, options, recorder)
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
    return 0


def check(asked: argparse.Namespace) -> None:
    """What the parser cannot know. ValueError or OSError before anything is measured, not after."""
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; leave --device out to measure on the CPU")
    for name in asked.model:
        full_name(name.removesuffix("_digits"), 224)
    if asked.readme and not Path(asked.readme).is_file():
        raise ValueError(f"--readme: there is no file {asked.readme}; its table goes between two marks in it")
    if asked.markdown and Path(asked.markdown).is_dir():
        raise ValueError(f"--markdown: expected a file, {asked.markdown} is a folder")
    for file in filter(None, (asked.markdown, asked.readme)):
        commandline.check_writable(Path(file).resolve().parent)


def folder(asked: argparse.Namespace) -> Folder:
    """The images, the model and the predictors of `--imagenet`."""
    return Folder(
        Path(asked.imagenet), asked.model[0] if asked.model else "deit_small", asked.weights, asked.sha256,
        Path(asked.predictors) if asked.predictors else None, asked.predictors_sha256,
        asked.batch[0] if asked.batch else 128, asked.workers, asked.device,
    )  # fmt: skip


def wake(seconds: float = 1.0) -> None:
    """Work for a moment, so that the GPU's clock is up before the first case."""
    if torch.cuda.is_available():
        x, start = torch.randn(4096, 4096, device="cuda", dtype=torch.float16), time.monotonic()
        while time.monotonic() - start < seconds:
            torch.mm(x, x)
            torch.cuda.synchronize()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m ragged.bench", description=__doc__.split("\n\n")[0])
    p.add_argument("suites", nargs="+", choices=[*SUITES, "report"], metavar="SUITE",
                   help=", ".join([*SUITES, "report"]))  # fmt: skip
    p.add_argument("--quick", action="store_true", help="a few small cases, to see that everything runs")
    p.add_argument("--out", help="folder for the rows, <out>/<gpu>/<suite>.csv (default: the "
                   "recorded results; with --quick: quick_results)")  # fmt: skip
    p.add_argument("--model", nargs="+", default=(), help="only these models, such as deit_small")
    p.add_argument("--batch", nargs="+", type=commandline.positive, default=(), help="only these batch sizes")
    p.add_argument("--redo", action="store_true", help="measure again what this version has recorded already")
    p.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start nothing new after this time; run again to go on"
    )
    p.add_argument("--repeats", type=commandline.positive, help="rounds of measuring (default 5, with --quick 3)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    images = p.add_argument_group("accuracy on ImageNet", "with the suite `accuracy`; --model names one timm model")
    images.add_argument("--imagenet", metavar="DIR", help="validation folder: one folder of images per class")
    images.add_argument("--weights", default="imagenet", help="imagenet (timm's), or a checkpoint file, EViT's too")
    images.add_argument("--sha256", help="expected hash of the checkpoint file")
    images.add_argument("--predictors", metavar="FILE", help="DynamicViT's checkpoint or its score_predictor.* alone")
    images.add_argument("--predictors-sha256", metavar="SHA256", help="expected hash of that file")
    images.add_argument("--workers", type=commandline.positive, default=8, help="processes that read images")
    p.add_argument("--markdown", metavar="FILE", help="write the report there too")
    p.add_argument("--readme", metavar="FILE", help="renew the table of recorded rows in this README")
    return p


def run_suite(name: str, options: Options, recorder: Recorder) -> None:
    """All cases of a suite, with a progress bar; stops in between when the time is up."""
    start, rows, bad = time.monotonic(), 0, 0
    cases = SUITES[name](options)
    for case in progress(cases, name):
        if recorder.late():
            print(f"{name}: the time is up, run the same command again to go on", file=sys.stderr)
            break
        new = recorder.run(case)
        rows, bad = rows + len(new), bad + sum(row["status"] != "ok" for row in new)
        settle()
    if name == "dispatch" and not recorder.late():
        write_traces(recorder.folder() / "traces", options)
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
