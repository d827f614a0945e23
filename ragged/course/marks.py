"""What a student has guessed and solved: one CSV beside the notebooks, to look at and to hand in."""

from __future__ import annotations

import csv
import datetime
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from .output import saving

if TYPE_CHECKING:  # imported where a table is made
    import pandas as pd

COLUMNS = ("name", "kind", "done", "guess", "answer", "unit", "tries", "date")
FIRST, SOLUTIONS = "00_start_here.ipynb", "solutions"  # how the folders of the course are known
NEAR = 1.5  # a guess within this factor of the answer counts as near


def path() -> Path | None:
    """The file: `ragged_progress.csv` beside the lessons, wherever in the checkout a notebook runs, and in the working
    folder where it runs alone, as in Colab; or what RAGGED_PROGRESS names. None where nothing is kept
    (RAGGED_PROGRESS=off, or a notebook that runs to be saved)."""
    named = os.environ.get("RAGGED_PROGRESS", "")
    if named.lower() == "off" or saving():
        return None
    return Path(named or lessons() / "ragged_progress.csv")


def lessons() -> Path:
    """The folder of the lessons: the working folder, the one above `solutions`, or `notebooks` in a checkout."""
    here = Path.cwd()
    if here.name == SOLUTIONS and (here.parent / FIRST).is_file():
        return here.parent
    return here / "notebooks" if not (here / FIRST).is_file() and (here / "notebooks" / FIRST).is_file() else here


def note(name: str, kind: str, done: bool, guess: float | None = None, answer: float | None = None,
         unit: str = "") -> None:  # fmt: skip
    """Keep that something was tried. name: "lesson/…".  kind: "exercise" or "guess".  done: whether it is solved, or a
    guess was made; what was done once stays done.  guess, answer: numbers in `unit`."""
    file = path()
    if file is None or not name or Path.cwd().name == SOLUTIONS:  # what a solution solves is nobody's work
        return
    try:
        with FileLock(f"{file}.lock", timeout=10):
            rows = read_rows(file)
            old = rows.get((name, kind), {})
            rows[name, kind] = {
                "name": name, "kind": kind, "done": int(done or old.get("done") == "1"),
                "guess": old.get("guess") or ("" if guess is None else f"{guess:.6g}"),  # the first guess stays
                "answer": "" if answer is None else f"{answer:.6g}", "unit": unit,
                "tries": int(old.get("tries") or 0) + 1, "date": datetime.date.today().isoformat(),
            }  # fmt: skip
            write(file, rows)
    except OSError as error:  # a read-only folder: the lesson goes on
        print(f"(progress is not kept: {error})")


def read_rows(file: Path) -> dict[tuple[str, str], dict]:
    """What `read` reads, by name and kind."""
    return {(row["name"], row["kind"]): row for row in read(file)}


def write(file: Path, rows: dict[tuple[str, str], dict]) -> None:
    """Write a progress file anew. rows: as `read_rows` returns them."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def take_in(file: Path, others: Sequence[str | Path]) -> None:
    """Add what other progress files hold, for lessons done on several machines: done is what is done in one of them,
    the earlier guess counts, tries add up. ValueError for what is no progress file, and nothing is changed."""
    with FileLock(f"{file}.lock", timeout=10):
        rows = read_rows(file)
        for other in map(Path, others):
            if not other.is_file():
                raise ValueError(f"take_in: there is no file {other}")
            if other.resolve() == file.resolve():
                continue
            for key, row in read_rows(other).items():
                mine = rows.get(key, row)
                early = min(mine, row, key=lambda one: one["date"])
                done, tries = max(mine["done"], row["done"]), int(mine["tries"]) + int(row["tries"]) * (key in rows)
                rows[key] = early | {"done": done, "tries": tries}
        write(file, rows)


def read(file: Path) -> list[dict]:
    """The rows of a progress file, none if there is no file. ValueError for another kind of file."""
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file}: expected a progress file with the columns {', '.join(COLUMNS)}")
        return list(rows)


# ---- a guess before the answer ----

_guesses: dict[str, tuple[float, str]] = {}


def guess(name: str, value: float | None, unit: str = "") -> None:
    """Commit yourself before the answer is shown. name: "lesson/letter".  value: your guess in `unit`, or None: then
    the lesson goes on without one."""
    if value is None:
        print("No guess yet: put a number in the place of None, and run this cell again before you go on.")
        _guesses.pop(name, None)
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"value: expected a number, got {value!r}")
    _guesses[name] = float(value), unit
    print(f"Your guess: {value:g} {unit}".rstrip() + ".")


def reveal(name: str, answer: float, unit: str = "") -> None:
    """Show how far the guess of that name was from `answer`, a number in `unit`, and keep both."""
    answer = float(answer)
    said = f"{answer:.4g} {unit}".rstrip()
    if name not in _guesses:
        print(f"It is {said}.")
        return
    value, unit_of_guess = _guesses[name]
    note(name, "guess", True, value, answer, unit or unit_of_guess)
    if value == answer:
        words = "exactly"
    elif value > 0 and answer > 0:
        factor = max(value / answer, answer / value)
        near = "near" if factor <= NEAR else "far off"
        words = f"{factor:.2g} times too {'high' if value > answer else 'low'}, {near}"
    else:
        words = f"off by {value - answer:+.4g}"
    print(f"It is {said}; you guessed {f'{value:g} {unit or unit_of_guess}'.rstrip()}: {words}.")


# ---- all of it ----


def progress(file: str | Path | None = None, take: Sequence[str | Path] = ()) -> pd.DataFrame:
    """What is done, a row for each lesson, and where the file to hand in lies.

    file: a progress file (default: this session's).  take: progress files of other machines, such as every lesson in
    Colab leaves one; what they hold is added to the file first (ValueError for other files). Returns
    exercises solved and tried, guesses made, and how many of them were near.
    """
    import pandas

    found = path() if file is None else Path(file)
    if take and found is not None:
        take_in(found, take)
    rows = read(found) if found is not None else []
    table: dict[str, dict] = {}
    for row in rows:
        lesson = table.setdefault(row["name"].partition("/")[0], {"solved": 0, "tried": 0, "guesses": 0, "near": 0})
        if row["kind"] == "exercise":
            lesson["tried"] += 1
            lesson["solved"] += row["done"] == "1"
        else:
            lesson["guesses"] += 1
            lesson["near"] += is_near(row)
    if rows:
        print(f"To hand in: {found.resolve()}")
    else:
        print("Nothing is kept yet: run a check, or commit a guess.")
    frame = pandas.DataFrame.from_dict(table, orient="index", columns=["solved", "tried", "guesses", "near"])
    return frame.sort_index().rename_axis("lesson")


def is_near(row: dict) -> bool:
    """Whether the guess in a row of a progress file came within a factor of NEAR."""
    try:
        value, answer = float(row["guess"]), float(row["answer"])
    except (TypeError, ValueError):
        return False
    return value == answer or (value > 0 and answer > 0 and max(value / answer, answer / value) <= NEAR)
