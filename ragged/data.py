"""All the data: photographs, digit scenes, length distributions, recorded results, the paper's figures, checkpoints.

Everything is read from one folder (`data_dir()`) or made on the spot from a seed; nothing is downloaded.
torch is imported only by the functions that return tensors, so that plotting code can read tables without it.
`data/README.md` lists origins and licences.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .checkpoints import verify_sha256
from .scenes import DigitScenes, check_int, digit_scenes, digit_split

if TYPE_CHECKING:
    import pandas as pd
    import torch

# fmt: off
__all__ = [
    "DigitScenes", "IMAGENET_MEAN", "IMAGENET_STD", "RESULT_COLUMNS", "checkpoint_path", "data_dir",
    "digit_scenes", "digit_split", "lengths", "normalise", "paper", "paper_tables", "photographs", "results",
    "verify_sha256", "write_results",
]
# fmt: on

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NUMERIC = ("batch", "keep", "value", "q20", "q80")
_KEY = ("suite", "model", "pruner", "backend", "mode", "batch", "tokens", "keep", "dtype", "metric", "gpu")
RESULT_COLUMNS = (*_KEY[:-1], "value", "q20", "q80", "unit", "status", "gpu", "driver",
                  "torch", "triton", "flash_attn", "version", "date")  # fmt: skip


def data_dir() -> Path:
    """Path of the data folder: `data/` of a checkout, else the copy inside an installed package.

    FileNotFoundError if there is neither.
    """
    here = Path(__file__).resolve().parent
    places = (here.parent / "data", here / "_data")
    for place in places:
        if (place / "images" / "attribution.csv").is_file():  # any folder may be called data; ours holds this file
            return place
    raise FileNotFoundError("no data folder: looked for images/attribution.csv under " + " and ".join(map(str, places)))


# ---- photographs ----


def photographs(size: int = 224) -> tuple[torch.Tensor, list[dict]]:
    """The bundled photographs: float32 tensor (n, 3, size, size) in [0, 1], and a list of n records.

    A record is a dict with name, title, author, licence, licence_url and source, all text.
    """
    import torch
    from PIL import Image

    check_int("size", size, 1)
    folder = data_dir() / "images"
    records = read_csv(folder / "attribution.csv")
    files = [Image.open(folder / f"{record['name']}.jpg").convert("RGB") for record in records]
    pixels = np.stack([np.asarray(file.resize((size, size), Image.Resampling.BICUBIC)) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous(), records


def normalise(
    images: torch.Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> torch.Tensor:
    """(images - mean) / std for a float tensor (..., 3, H, W) in [0, 1]: what the network expects.

    Keeps shape, dtype and device. ValueError for anything but floats with three channels.
    """
    import torch

    tensor = isinstance(images, torch.Tensor)
    if not tensor or not images.is_floating_point() or images.dim() < 3 or images.shape[-3] != 3:
        got = f"{images.dtype} {tuple(images.shape)}" if tensor else type(images).__name__
        raise ValueError(f"images: expected floats (..., 3, H, W) in [0, 1], got {got}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean, std: expected three numbers each, got {mean!r} and {std!r}")
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


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


def results(suite: str | None = None, gpu: str | None = None) -> pd.DataFrame:
    """Recorded measurements as a data frame with RESULT_COLUMNS: all of them, or one suite and/or one GPU.

    gpu: "NVIDIA H200" and "nvidia_h200" name the same folder. batch, keep, value, q20 and q80 are floats (NaN where
    blank), the other columns text. Nothing recorded gives an empty frame with the same columns.
    """
    import pandas

    pattern = f"{slug(gpu) if gpu else '*'}/{suite or '*'}.csv"
    rows = [row for path in sorted((data_dir() / "results").glob(pattern)) for row in read_csv(path, RESULT_COLUMNS)]
    frame = pandas.DataFrame(rows, columns=list(RESULT_COLUMNS), dtype=object)
    text = [c for c in RESULT_COLUMNS if c not in _NUMERIC]
    numbers = {c: pandas.to_numeric(frame[c]).astype(float) for c in _NUMERIC}
    return frame.assign(**numbers).astype(dict.fromkeys(text, "str"))


def write_results(rows: Iterable[dict], out_dir: str | Path) -> list[Path]:
    """Merge rows into out_dir/<gpu>/<suite>.csv and return the paths written.

    A row is a dict with RESULT_COLUMNS as keys. The columns up to `metric`, and gpu, must be there ("" or None where
    they do not apply): they are the key. A recorded row with the same key is replaced, the others stay; a file is
    sorted by key and replaced in one step. ValueError for unknown or missing columns and for a key that comes twice.
    """
    groups = {}
    for row in rows:
        row = _checked_row(row)
        group = groups.setdefault((slug(row["gpu"]), row["suite"]), {})
        key = tuple(row[c] for c in _KEY)
        if key in group:
            raise ValueError(f"rows: the same key twice in one call: {dict(zip(_KEY, key, strict=True))}")
        group[key] = row
    return [_merge_csv(Path(out_dir) / gpu / f"{suite}.csv", new) for (gpu, suite), new in groups.items()]


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
    recorded = read_csv(path, RESULT_COLUMNS) if path.exists() else []
    merged = {tuple(row[c] for c in _KEY): row for row in recorded} | new
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
    """The name of a gpu as a folder's: "NVIDIA H200" is nvidia_h200."""
    return re.sub("[^a-z0-9]+", "_", gpu.lower()).strip("_")


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


def paper_tables() -> list[str]:
    """Names of the tables with the figures that arXiv 2604.15408 reports, v1 and v2."""
    return sorted(path.stem for path in (data_dir() / "paper").glob("*.csv"))


def paper(table: str) -> pd.DataFrame:
    """table: one of paper_tables(), else ValueError. Returned as a data frame, one figure per row.

    batch, tokens, pruned and value are floats (NaN where blank), the other columns text.
    """
    import pandas

    if table not in paper_tables():
        raise ValueError(f"table: expected one of {paper_tables()}, got {table!r}")
    frame = pandas.DataFrame(read_csv(data_dir() / "paper" / f"{table}.csv"))
    return frame.assign(**{c: pandas.to_numeric(frame[c]) for c in ("batch", "tokens", "pruned", "value")})


# ---- checkpoints ----


def checkpoint_path(name: str) -> Path:
    """Path of the bundled checkpoint `name`, verified against its .sha256 file.

    FileNotFoundError, naming the alternatives, if it is not bundled; ValueError if it is damaged.
    """
    folder = data_dir() / "checkpoints"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        there = sorted(p.stem for p in folder.glob("*.safetensors")) or "none"
        raise FileNotFoundError(
            f'weights {name!r} are not bundled (bundled: {there}); use weights="random" or weights=<path of a file>'
        )
    verify_sha256(path)
    return path
