"""Rows of `data/results/notes.md` as a lesson asks for them: what was tried, what was expected, what the clock said."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from .. import data


@dataclass(frozen=True)
class Tried:
    """One change. tried, predicted, measured, kept: as the notes say it."""

    tried: str
    predicted: str
    measured: str
    kept: str

    def longer(self, case: str) -> float:
        """By how many per cent the time of `case`, such as "256 × 197", grew; below zero it fell. ValueError where
        the note gives no two times for it."""
        found = re.search(rf"(?<![\w,]){re.escape(case)}: ([\d.,]*\d) → ([\d.,]*\d)", self.measured)
        if found is None:
            raise ValueError(f"case: expected one with two times, as in '256 × 197', got {case!r}: {self.measured}")
        before, after = (float(number.replace(",", "")) for number in found.groups())
        return 100 * (after / before - 1)

    def __str__(self) -> str:
        parts = (("tried", self.tried), ("predicted", self.predicted), ("measured", self.measured), ("kept", self.kept))
        return "\n".join(
            textwrap.fill(f"{word + ':':<11}{text}", 100, subsequent_indent=" " * 11) for word, text in parts
        )


def tried(part: str, words: str) -> Tried:
    """The change under the heading `part` of the notes whose description begins with `words`. ValueError unless there
    is exactly one."""
    notes = data.notes()
    rows = notes[(notes["part"] == part) & notes["tried"].str.startswith(words)]
    if len(rows) != 1:
        raise ValueError(f"words: expected the beginning of one change under {part!r}, got {words!r}: {len(rows)} fit")
    return Tried(*rows.iloc[0][["tried", "predicted", "measured", "kept"]])
