"""What the notebooks need beside the package: a set-up line, sliders, recorded rows, feedback on exercises."""

from .lesson import Here, backends_table, check, difference, progress, recorded, setup, slider, table, versions
from .output import figure_bundle, saving, use_small_pictures

__all__ = [
    "Here", "backends_table", "check", "difference", "figure_bundle", "progress", "recorded", "saving", "setup",
    "slider", "table", "use_small_pictures", "versions",
]  # fmt: skip
