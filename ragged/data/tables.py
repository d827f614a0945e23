"""Tables: recorded results, what the paper reports, and distributions of lengths."""

from __future__ import annotations

import contextlib
import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout

from ..checks import check_int
from . import files

if TYPE_CHECKING:  # imported where a table is read
    import pandas as pd

_NUMERIC = ("batch", "keep", "value", "q20", "q80")
_KEY = ("suite", "model", "pruner", "backend", "mode", "batch", "tokens", "keep", "dtype", "metric", "gpu")
LOCK_SECONDS = 300  # a merge takes a moment; longer than this and something hangs
RESULT_COLUMNS = (*_KEY[:-1], "value", "q20", "q80", "unit", "status", "gpu", "driver",
                  "torch", "triton", "flash_attn", "version", "date")  # fmt: skip


# ---- length distributions ----


def lengths(spec: str, batch: int, seed: int = 0) -> list[int]:
    """`batch` token counts (CLS included) as a list of ints.

    spec: "197" (all equal) or "U(20,197)" (uniform, both ends included; drawn from seed); else ValueError.
    """
    check_int("batch", batch, 1)
    found = re.fullmatch(r"\s*(?:U\(\s*(\d+)\s*,\s*(\d+)\s*\)|(\d+))\s*", str(spec))
    if not found:
        raise ValueError(f'lengths: expected a number such as "197" or "U(low,high)" such as "U(20,197)", got {spec!r}')
    low, high = (int(found[3]),) * 2 if found[3] else (int(found[1]), int(found[2]))
    if not 1 <= low <= high:
        raise ValueError(f"lengths: expected 1 <= low <= high, got {spec!r}")
    return np.random.default_rng(seed).integers(low, high + 1, batch).tolist()


# ---- tables: recorded results, and what the paper reports ----


def results(suite: str | None = None, gpu: str | None = None, folder: Path | None = None) -> pd.DataFrame:
    """Recorded measurements as a data frame with RESULT_COLUMNS: all of them, or one suite and/or one GPU.

    gpu: "NVIDIA H200" and "nvidia_h200" name the same folder, and so does the driver's full name of a GPU.  folder:
    where `write_results` wrote, instead of the bundled rows. batch, keep, value, q20 and q80 are floats (NaN where
    blank), the other columns text. Nothing recorded gives an empty frame with the same columns.
    """
    import pandas

    pattern = f"{slug(gpu) if gpu else '*'}/{suite or '*'}.csv"
    paths = sorted((files.data_dir() / "results" if folder is None else Path(folder)).glob(pattern))
    rows = [row for path in paths for row in read_csv(path, RESULT_COLUMNS)]
    frame = pandas.DataFrame(rows, columns=list(RESULT_COLUMNS), dtype=object)
    text = [c for c in RESULT_COLUMNS if c not in _NUMERIC]
    numbers = {c: pandas.to_numeric(frame[c]).astype(float) for c in _NUMERIC}
    return frame.assign(**numbers).astype(dict.fromkeys(text, "str"))


def write_results(rows: Iterable[dict], out_dir: str | Path) -> list[Path]:
    """Merge rows into out_dir/<gpu>/<suite>.csv and return the paths written.

    A row is a dict with RESULT_COLUMNS as keys. The columns up to `metric`, and gpu, must be there ("" or None where
    they do not apply): they are the key. A recorded row with the same key is replaced, the others stay; a file is
    sorted by key and replaced in one step. Several processes may write into out_dir at once: each merges alone, under
    the lock out_dir/.lock. ValueError for unknown or missing columns and for a key that comes twice; OSError if the
    lock cannot be had.
    """
    groups = {}
    for row in rows:
        row = _checked_row(row)
        group = groups.setdefault((slug(row["gpu"]), row["suite"]), {})
        key = tuple(row[c] for c in _KEY)
        if key in group:
            raise ValueError(f"rows: the same key twice in one call: {dict(zip(_KEY, key, strict=True))}")
        group[key] = row
    if not groups:
        return []
    with only_one(Path(out_dir) / ".lock", LOCK_SECONDS):
        return [_merge_csv(Path(out_dir) / gpu / f"{suite}.csv", new) for (gpu, suite), new in groups.items()]


@contextlib.contextmanager
def only_one(path: Path, seconds: float) -> Iterator[None]:
    """Inside, this process alone holds the lock file `path`; others wait up to so many `seconds` for their turn.

    The file stays: removing it would let a process that waits for it and one that comes later both go in. OSError if
    the turn does not come, or the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=seconds):
            yield
    except Timeout:
        raise OSError(f"another process holds {path}: wait until it is done, or choose another folder") from None


def _checked_row(row):
    """The row as text, one spelling per number so that 32 and 32.0 make the same key."""
    missing, unknown = [c for c in _KEY if c not in row], [c for c in row if c not in RESULT_COLUMNS]
    if missing or unknown:
        raise ValueError(f"rows: missing columns {missing}, unknown columns {unknown}; expected {RESULT_COLUMNS}")
    text = {c: _text(c, row.get(c)) for c in RESULT_COLUMNS}
    for c in ("suite", "metric", "gpu"):
        if not re.search("[A-Za-z0-9]", text[c]) or (c == "suite" and not re.fullmatch(r"\w+", text[c])):
            raise ValueError(f"rows: column {c!r} needs a name, got {text[c]!r}")
    return text


def _text(column, value):
    if value is None or value == "" or value != value:  # NaN is not equal to itself
        return ""
    if column not in _NUMERIC:
        return str(value)
    try:
        return f"{float(value):.8g}"
    except (TypeError, ValueError):
        raise ValueError(f"rows: column {column!r} holds numbers, got {value!r}") from None


def _merge_csv(path, new):
    old = read_csv(path, RESULT_COLUMNS) if path.exists() else []
    merged = {tuple(row[c] for c in _KEY): row for row in old} | new
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")  # same folder: the replacement is then one atomic step
    with draft.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, RESULT_COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(merged[key] for key in sorted(merged, key=_by_number))
    os.replace(draft, path)
    return path


def _by_number(key):
    """Sort key that puts batch 4 before batch 16."""
    return [(0, float(cell), cell) if re.fullmatch(r"[\d.]+", cell) else (1, 0.0, cell) for cell in key]


def slug(gpu: str) -> str:
    """The name of a gpu as a folder's: "NVIDIA H200" is nvidia_h200, and "NVIDIA H100 80GB HBM3", as the driver names
    what is called an H100, is nvidia_h100."""
    return re.sub("[^a-z0-9]+", "_", gpu.lower().replace(" 80gb hbm3", "")).strip("_")


def read_csv(path: Path, columns: Sequence[str] | None = None) -> list[dict]:
    """The rows of the CSV file `path` as dicts of text. ValueError, naming it, if it is damaged or has other
    columns."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            names, rows = tuple(table.fieldnames or ()), list(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if columns and names != tuple(columns):
        raise ValueError(f"{path}: expected the columns {', '.join(columns)}; got {', '.join(names) or 'none'}")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():  # csv's way to say too many cells, or too few
            raise ValueError(f"{path} is damaged: row {number} does not have {len(names)} cells")
    return rows


def notes() -> pd.DataFrame:
    """What was tried and what came of it, from the tables of `data/results/notes.md`: one row a change, all columns
    text: part (the table's heading), tried, predicted, measured, prediction ("held", "failed" or "none") and kept."""
    import pandas

    rows, part = [], ""
    for line in (files.data_dir() / "results" / "notes.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            part = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| tried "):
            rows.append([part, *(cell.strip() for cell in line.strip("|").split("|"))])
    return pandas.DataFrame(rows, columns=["part", "tried", "predicted", "measured", "prediction", "kept"])


def paper_tables() -> list[str]:
    """Names of the tables with the figures that arXiv 2604.15408 reports, v1 and v2."""
    return sorted(path.stem for path in (files.data_dir() / "paper").glob("*.csv"))


def paper(table: str) -> pd.DataFrame:
    """table: one of paper_tables(), else ValueError. Returned as a data frame, one figure per row.

    batch, tokens, pruned and value are floats (NaN where blank), the other columns text.
    """
    import pandas

    if table not in paper_tables():
        raise ValueError(f"table: expected one of {paper_tables()}, got {table!r}")
    frame = pandas.DataFrame(read_csv(files.data_dir() / "paper" / f"{table}.csv"))
    return frame.assign(**{c: pandas.to_numeric(frame[c]) for c in ("batch", "tokens", "pruned", "value")})
