"""The data folder, its bundled checkpoints, and the hashes that hold files against what they should be."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def data_dir() -> Path:
    """Path of the data folder: `data/` of a checkout, else the copy inside an installed package.

    FileNotFoundError if there is neither.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package.parent / "data", package / "_data")
    for place in places:
        if (place / "images" / "attribution.csv").is_file():  # any folder may be called data; ours holds this file
            return place
    raise FileNotFoundError("no data folder: looked for images/attribution.csv under " + " and ".join(map(str, places)))


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


def verify_sha256(path: str | Path, expected: str | None = None) -> None:
    """Check a file against a SHA-256 (64 hex digits), by default the first word of <path>.sha256.

    ValueError if they differ, FileNotFoundError without a file to read the expected one from.
    """
    path = expand(path)
    if expected is None:
        if not sidecar(path).is_file():
            raise FileNotFoundError(f"no checksum for {path.name}: expected it in {sidecar(path)}")
        expected = (sidecar(path).read_text(encoding="utf-8", errors="replace").split() or [""])[0][:80]
    if not isinstance(expected, str) or not re.fullmatch("[0-9a-fA-F]{64}", expected):
        raise ValueError(f"expected: a SHA-256 is 64 hex digits, got {expected!r}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):  # a checkpoint may be larger than the memory
            digest.update(chunk)
    found = digest.hexdigest()
    if found != expected.lower():
        raise ValueError(f"{path} is damaged or another file: SHA-256 is {found}, expected {expected.lower()}")


def expand(path: str | Path) -> Path:
    """`path` with ~ and ~user written out; as it is where there is nobody of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def sidecar(path: Path) -> Path:
    """Where the SHA-256 of the file `path` stands: beside it, with .sha256 after its whole name."""
    return path.with_name(path.name + ".sha256")
