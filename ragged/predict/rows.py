"""The rows of a run: kept as they come, one line of JSON each, so that an interrupted run goes on; and the table made
of them at the end, Parquet or CSV."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

SUFFIXES = (".parquet", ".csv")
GROUP = 65_536  # rows that are written at a time


def check_place(out: Path, replace: bool) -> None:
    """Whether a table can be written to the file `out`. ValueError for another suffix, and for a file that is there
    unless `replace`; ImportError where Parquet needs a package."""
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out: expected a file that ends in {' or '.join(SUFFIXES)}, got {out}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ImportError(f"--out {out}: Parquet needs the package 'pyarrow', which is not installed: "
                          "pip install pyarrow, or write a file that ends in .csv")  # fmt: skip
    if out.exists() and not replace:
        raise ValueError(f"{out} is there already; --replace replaces it")


class Journal:
    """What is done of a run, in the file `path`, which the table `out` replaces in the end.

    columns: of the table, "path" among them.  job: what decides a row, in words and numbers; a file that was begun with
    another is refused, or with `anew` forgotten.  done: the paths that have a row. ValueError for a file that is no
    journal or one of another job.
    """

    def __init__(self, out: Path, columns: Sequence[str], job: dict[str, object], anew: bool = False):
        self.out, self.columns, self.path = out, list(columns), journal_of(out)
        self.done: set[str] = set()
        head = json.loads(json.dumps({"job": job, "columns": self.columns}))
        try:
            begun = self._resume(head)
        except ValueError:
            if not anew:
                raise
            begun, self.done = False, set()
        self.file = self.path.open("a" if begun else "w", encoding="utf-8")
        if not begun:
            self._write([head])

    def _resume(self, head: dict) -> bool:
        """Whether there is a run to go on with; `done` then holds what it did."""
        whole = self.path.read_bytes() if self.path.exists() else b""
        end = whole.rfind(b"\n") + 1
        if not end:
            return False
        try:
            first, *rows = map(json.loads, whole[:end].decode("utf-8").splitlines())
            then, self.done = first["job"], {row[0] for row in rows}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged; begin anew with --replace") from error
        if first != head:
            changed = [what for what in head["job"] if then.get(what) != head["job"][what]] or ["columns"]
            raise ValueError(f"{self.path} is of an interrupted run of something else: the {' and the '.join(changed)} "
                             "differ; go on with what it was begun with, or begin anew with --replace")  # fmt: skip
        with self.path.open("r+b") as file:
            file.truncate(end)  # a line that was being written when the run was killed
        return True

    def _write(self, lines: Iterable[object]) -> None:
        self.file.writelines(json.dumps(line) + "\n" for line in lines)
        self.file.flush()

    def add(self, frame: pd.DataFrame) -> None:
        """Keep the rows of a `frame` with the columns of this journal."""
        self._write([[_plain(cell) for cell in row] for row in frame[self.columns].itertuples(index=False, name=None)])

    def close(self) -> None:
        """Stop here; the file stays for the next run."""
        self.file.close()

    def finish(self, paths: Sequence[str]) -> int:
        """Write the table, the rows of `paths` only, and remove the journal. Returns how many were not read."""
        self.file.close()
        wanted, bad = set(paths), 0
        draft = self.out.with_name(self.out.name + ".draft")

        def rows() -> Iterator[dict]:
            nonlocal bad
            with self.path.open(encoding="utf-8") as file:
                next(file)
                for row in (dict(zip(self.columns, json.loads(line))) for line in file):
                    if row["path"] in wanted:
                        bad += row["status"] != "ok"
                        yield {name: _clean(cell) for name, cell in row.items()}

        (write_parquet if self.out.suffix == ".parquet" else write_csv)(rows(), self.columns, draft)
        draft.replace(self.out)
        self.path.unlink()
        return bad


def journal_of(out: Path) -> Path:
    """Where the rows for the table `out` are kept until it is whole."""
    return out.with_name(out.name + ".part.jsonl")


def _plain(cell: object) -> object:
    """A cell as JSON knows it."""
    if cell is None or cell is pd.NA or (isinstance(cell, float) and math.isnan(cell)):
        return None
    return cell.item() if hasattr(cell, "item") else cell


def _clean(cell: object) -> object:
    """Names of files may hold bytes that are no text; a table holds text."""
    return cell.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(cell, str) else cell


def write_csv(rows: Iterable[dict], columns: Sequence[str], path: Path) -> None:
    """`rows` with `columns` as a CSV file; what a row lacks is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_parquet(rows: Iterable[dict], columns: Sequence[str], path: Path) -> None:
    """`rows` with `columns` as a Parquet file; what a row lacks is null."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"path": pa.string(), "name": pa.string(), "status": pa.string(), "probability": pa.float32()}
    schema = pa.schema([(name, kinds.get(name, pa.int32())) for name in columns])
    rows = iter(rows)
    with parquet.ParquetWriter(path, schema) as file:
        while group := list(itertools.islice(rows, GROUP)):
            file.write_table(pa.Table.from_pylist(group, schema=schema))
