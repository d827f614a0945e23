"""All the data: photographs, digit scenes, length distributions, recorded results, the paper's figures, checkpoints.

Everything is read from one folder (`data_dir()`) or made on the spot from a seed; nothing is downloaded.
`data/README.md` lists origins and licences.
"""

from .checkpoints import load_state
from .evidence import MARK, NOTE, Disturbed, disturbed, noted
from .files import checkpoint_path, data_dir, expand, sidecar, verify_sha256
from .images import IMAGENET_MEAN, IMAGENET_STD, normalise, photographs, read_picture
from .scenes import DigitScenes, digit_scenes, digit_split
from .tables import RESULT_COLUMNS, lengths, notes, paper, paper_tables, read_csv, results, slug, write_results
from .traces import trace_spans

__all__ = [
    "DigitScenes", "Disturbed", "IMAGENET_MEAN", "IMAGENET_STD", "MARK", "NOTE", "RESULT_COLUMNS", "checkpoint_path",
    "data_dir", "digit_scenes", "digit_split", "disturbed", "expand", "lengths", "load_state", "normalise", "noted",
    "notes", "paper", "paper_tables", "photographs", "read_csv", "read_picture", "results", "sidecar", "slug",
    "trace_spans", "verify_sha256", "write_results",
]  # fmt: skip
