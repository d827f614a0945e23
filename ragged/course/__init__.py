"""What the notebooks need beside the package: a set-up line, sliders, recorded rows, feedback, progress."""

from .controls import dropdowns
from .exercises import Exercise, check_exercise, hint, solved
from .history import Tried, tried
from .kernels import Language, language
from .lesson import Here, backends_table, check, difference, recorded, setup, slider, steps, versions
from .marks import guess, progress, reveal
from .output import figure_bundle, saving, use_small_pictures
from .stages import equal_items, handover
from .tables import Table, table
from .tape import Tape

__all__ = [
    "Exercise", "Here", "Language", "Table", "Tape", "Tried", "backends_table", "check", "check_exercise",
    "difference", "dropdowns", "equal_items", "figure_bundle", "guess", "handover", "hint", "language", "progress",
    "recorded", "reveal", "saving", "setup", "slider", "solved", "steps", "table", "tried", "use_small_pictures",
    "versions",
]  # fmt: skip
