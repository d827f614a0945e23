"""From candidates to rows: build, check, time in rounds, write. Whatever fails becomes a row that says why."""

from __future__ import annotations

import collections
import datetime
import functools
import gc
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from ..data import RESULT_COLUMNS, read_csv, slug, write_results
from .rounds import Broken, Subject, is_fatal, measure
from .timing import Stats, stats, wait

UNITS = {
    "syncs": "1", "images_per_s": "images/s", "peak_mb": "MB", "kept_tokens": "tokens", "capacity_waste": "1",
    "max_abs_logit_diff": "logit", "mean_abs_logit_diff": "logit", "top1_agreement": "1", "top1": "1",
    "flops_ratio": "1", "images": "images", "size_correlation": "1", "size_correlation_low": "1",
    "size_correlation_high": "1", "feature_cosine": "1",
    "decode_images_per_s": "images/s", "gpu_images_per_s": "images/s",
    "end_to_end_images_per_s": "images/s",
}  # fmt: skip
_IDENTITY = ("model", "pruner", "backend", "mode", "batch", "tokens", "dtype")


class Wrong(Exception):
    """An output that does not agree with the reference: such a call is not timed."""


class Skip(Exception):
    """A reason why something is not measured here."""


# What somebody at this machine can put right: install, download, mend a kernel. The command's exit code says so.
MENDABLE = (ImportError, OSError, Wrong)


@dataclass(frozen=True)
class Options:
    """What the command line asked for. models, batches: only these; empty means what the suite calls for.  counts: only
    what needs no clock.  networks: folders of trained networks, for `seeds`.  images, weights: for `fidelity`. pruners,
    backends: see `chosen`."""

    device: str = "cuda"
    quick: bool = False
    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    counts: bool = False
    networks: tuple[Path, ...] = ()
    images: Path | None = None
    weights: str | None = None
    pruners: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """float16; float32 on a CPU, where half precision is emulated."""
        return torch.float16 if self.device == "cuda" else torch.float32

    def batches_or(self, usual: Iterable[int]) -> list[int]:
        return list(self.batches or usual)

    def models_or(self, usual: Iterable[str]) -> list[str]:
        return list(self.models or usual)


@dataclass(frozen=True)
class Candidate:
    """One provider in one mode. columns: its part of a row's key.  build: makes the checked call, or raises.
    metrics: the rows that a failure leaves blank.  values: further metrics, asked for after the timing.
    found_columns: columns that only building tells, such as the share that an adaptive pruner keeps; asked for when a
    row is written, and put over `columns`."""

    columns: dict
    build: Callable[[], Subject]
    metrics: tuple[str, ...]
    values: Callable[[Subject], dict[str, float | Stats]] = lambda subject: subject.found
    found_columns: Callable[[], dict] = dict


@dataclass(frozen=True)
class Case:
    """What is compared with each other, in the same rounds. columns: what all candidates share.
    finish: may add rows made from the finished ones."""

    columns: dict
    candidates: list[Candidate]
    finish: Callable[[list[dict]], list[dict]] = lambda rows: rows

    @property
    def name(self) -> str:
        return " ".join(str(self.columns.get(c, "")) for c in ("suite", "model", "batch", "tokens", "dtype"))


def chosen(cases: Iterable[Case], options: Options) -> list[Case]:
    """The cases with only the pruners and backends that were asked for; whatever prunes nothing stays, to compare with.
    ValueError for a name that no candidate has."""
    cases = list(cases)
    for column in ("pruner", "backend"):
        asked = getattr(options, f"{column}s")
        there = {str(c.columns.get(column, case.columns.get(column, ""))) for case in cases for c in case.candidates}
        if unknown := [name for name in asked if name not in there]:
            raise ValueError(f"--{column}: expected {', '.join(sorted(there))}, got {', '.join(unknown)}")
        if asked:
            keep = {*asked, "none"} if column == "pruner" else {*asked, "unpruned", "timm"}
            cases = [replace(case, candidates=[c for c in case.candidates if c.columns.get(
                column, case.columns.get(column)) in keep]) for case in cases]  # fmt: skip
    return cases


class Recorder:
    """Measures cases and writes their rows. out: folder of results.  redo: measure again what is recorded already.
    repeats, slice_us: rounds, and time per clock and round.  budget_s: start no case later than that.

    failures: how many candidates failed for each reason that can be put right (MENDABLE)."""

    def __init__(self, out: Path, repeats: int = 7, slice_us: float = 4000, redo: bool = False, budget_s=None):
        self.out, self.repeats, self.slice_us, self.redo = Path(out), repeats, slice_us, redo
        self.deadline = None if budget_s is None else time.monotonic() + budget_s
        self.machine, self.spent = machine(), {"building": 0.0, "timing": 0.0}
        self.failures: collections.Counter[str] = collections.Counter()

    def run(self, case: Case) -> list[dict]:
        """Measure what is missing of a case, write it, and return the new rows."""
        missing = case.candidates if self.redo else self._missing(case)
        built, rows = self._build(case, missing)
        start = time.monotonic()
        try:
            measure([subject for _, subject in built], self.repeats, self.slice_us)
        except Broken as error:
            (culprit,) = [c for c, subject in built if subject is error.subject]
            self._give_up(case, culprit, error)
        self.spent["timing"] += time.monotonic() - start
        for candidate, subject in built:
            try:
                rows += self._rows(case, candidate, subject)
            except Exception as error:
                rows += self._failed(case, candidate, error)
        rows = case.finish(rows) if rows else rows
        if rows:
            write_results(rows, self.out)
        return rows

    def _build(self, case: Case, candidates: list[Candidate]) -> tuple[list[tuple[Candidate, Subject]], list[dict]]:
        built: list[tuple[Candidate, Subject]] = []
        rows: list[dict] = []
        start = time.monotonic()
        for candidate in candidates:
            try:
                built.append((candidate, candidate.build()))
                wait()
            except Exception as error:  # recorded as a row: one provider's trouble does not stop the others
                if is_fatal(error):
                    self._give_up(case, candidate, error)
                rows += self._failed(case, candidate, error)
        self.spent["building"] += time.monotonic() - start
        return built, rows

    def _give_up(self, case: Case, candidate: Candidate, error: Exception) -> None:
        """Write down the one that broke the GPU's context; the others are for the next process."""
        write_results(self._failed(case, candidate, error), self.out)
        raise Broken(candidate, error) from error

    def folder(self) -> Path:
        """Where this machine's rows are."""
        return self.out / slug(self.machine["gpu"])

    def late(self) -> bool:
        """Whether the time is used up."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def _rows(self, case: Case, candidate: Candidate, subject: Subject) -> list[dict]:
        if subject.error is not None:
            raise subject.error
        found: dict = {clock: stats(times) for clock, times in subject.times.items()}
        found |= candidate.values(subject)
        stream = found.pop("stream_us", None)
        if stream is not None and "images_per_s" in candidate.metrics:
            batch = case.columns["batch"] * 1e6
            found["images_per_s"] = Stats(batch / stream.median, batch / stream.q80, batch / stream.q20)
        return [self.row(case, candidate, name, found.get(name)) for name in candidate.metrics]

    def row(self, case: Case, candidate: Candidate, metric: str, value, status: str = "ok") -> dict:
        """One row of a candidate, with the columns of RESULT_COLUMNS."""
        if value is None and status == "ok":
            status = "no CUDA device, nothing to read" if not torch.cuda.is_available() else "not read"
        numbers = value if isinstance(value, Stats) else Stats(value, None, None)
        key = case.columns | candidate.columns | candidate.found_columns()
        row = dict.fromkeys(RESULT_COLUMNS, "") | key | self.machine
        row |= {"metric": metric, "value": numbers.median, "q20": numbers.q20, "q80": numbers.q80}
        return row | {"unit": UNITS.get(metric, "us"), "status": status}

    def _failed(self, case: Case, candidate: Candidate, error: Exception) -> list[dict]:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
        if isinstance(error, MENDABLE):
            self.failures[reason(error)] += 1
        return [self.row(case, candidate, metric, None, reason(error)) for metric in candidate.metrics]

    def _missing(self, case: Case) -> list[Candidate]:
        suite = case.columns["suite"]
        there = recorded(self.out, self.machine["gpu"], suite, self.machine["version"])
        rows = [(candidate, case.columns | candidate.columns) for candidate in case.candidates]
        return [c for c, row in rows if tuple(_plain(row.get(name, "")) for name in identity(suite)) not in there]


def recorded(out: Path, gpu: str, suite: str, version: str) -> set[tuple]:
    """What a version is done with, as values of the columns that identify a candidate: measured, or known to be
    impossible. What failed and may succeed the next time is not among it."""
    path = Path(out) / slug(gpu) / f"{suite}.csv"
    if not path.exists():
        return set()
    rows = [row for row in read_csv(path, RESULT_COLUMNS) if row["version"] == version]
    done, again = set(), set()
    for row in rows:
        (again if worth_another_try(row["status"]) else done).add(tuple(_plain(row[c]) for c in identity(suite)))
    return done - again


def worth_another_try(status: str) -> bool:
    """Whether a row with this status is measured again by the next run: it failed, by an error or for want of a
    package. Refusals are final, and what broke the GPU's context would break it again: those wait for --redo."""
    if status == "ok" or status.startswith("NotImplementedError: ") or is_fatal(Exception(status)):
        return False
    return bool(re.match(r"wrong: |\w*(Error|Exception|Timeout|Expired): ", status)) or "is not installed" in status


def identity(suite: str) -> tuple[str, ...]:
    """The columns that tell candidates apart. keep may be a measurement (ats), but suites of accuracy tell places of a
    curve apart by it; an adaptive pruner is measured again there."""
    return (*_IDENTITY, "keep") if suite in ("accuracy", "seeds", "fidelity") else _IDENTITY


def _plain(cell) -> str:
    return str(cell).removesuffix(".0")


def reason(error: Exception) -> str:
    """One line for the status column."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, Wrong):
        return f"wrong: {lines[0]}"
    if isinstance(error, Skip):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def settle() -> None:
    """Between two cases: free what the last one held."""
    gc.collect()
    if torch.cuda.is_available():
        wait()
        torch.cuda.empty_cache()


@functools.cache
def machine() -> dict[str, str]:
    """The columns that say where and with what a row was measured."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "cpu", "driver": _driver() if cuda else "",
        "torch": torch.__version__, "triton": _version("triton"), "flash_attn": _version("flash_attn"),
        "version": _own_version(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(query).split("\n")[0]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _own_version() -> str:
    """The package's version, with the commit of a checkout. RAGGED_REVISION names it for a copy without its .git."""
    package = Path(__file__).resolve().parents[1]
    version = re.search(r'__version__ = "(.+?)"', (package / "__init__.py").read_text(encoding="utf-8"))[1]
    commit = os.environ.get("RAGGED_REVISION")
    if commit is None and (package.parent / ".git").exists():
        commit = _output(["git", "-C", str(package.parent), "rev-parse", "--short=7", "HEAD"])
    return f"{version}+g{commit}" if commit else version


def _output(command: Iterable[str]) -> str:
    try:
        return subprocess.run(list(command), capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
