"""Where a site goes: built beside its place, moved in when it is complete, and known by a list of its files.

What stands in the folder and is not on that list belongs to somebody else: it is neither deleted nor written over.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..notebooks import NotebookError

MANIFEST = ".ragged-site.json"  # in the folder of a site: the files that this program made there


@contextlib.contextmanager
def draft(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`; what was built in it is moved to `out` at the end, and nothing at all if the
    building fails. NotebookError if `out` is no place for a site, OSError where nothing can be written."""
    old = made_there(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        new = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        check(out, old, new)
        move(folder, out, old, new)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def made_there(out: Path) -> list[str]:
    """The files in `out` that an earlier build made; none for a new or empty folder. NotebookError for any other
    folder, and for a list that leads out of it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return []
    try:
        files = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]
        inside = [p for p in map(PurePosixPath, files) if p.parts and not p.is_absolute() and ".." not in p.parts]
    except (FileNotFoundError, NotADirectoryError):
        raise NotebookError(f"{out} exists and is not a site, or its list {MANIFEST} is gone: choose another folder "
                            "with --out, or remove that one yourself") from None  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise NotebookError(f"{out / MANIFEST} is damaged ({error!r}): remove {out} yourself") from None
    if len(inside) != len(files):
        raise NotebookError(f"{out / MANIFEST} is damaged, it names files outside: remove {out} yourself")
    return files


def check(out: Path, old: list[str], new: list[str]) -> None:
    """Whether the move can be done: NotebookError for files of others in the way, PermissionError for folders that
    cannot be written, before anything is moved."""
    for name in {*old, *new}:
        for folder in list(PurePosixPath(name).parents):
            place = out / folder
            if place != out and place.is_symlink() or (place.exists() and not place.is_dir()):
                raise NotebookError(f"{place} is in the way of the site, which did not make it")
            if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied", str(place))
    for name in new:
        place = out / name
        if place.is_dir() or (name not in old and os.path.lexists(place)):
            raise NotebookError(f"{place} is in the way of the site, which did not make it")


def move(folder: Path, out: Path, old: list[str], new: list[str]) -> None:
    """Replace file by file, so that others stay where they are; then remove what the site no longer has. The list is
    of both until all is done, so that the next build can go on from anywhere."""
    out.mkdir(exist_ok=True)
    note(out, {*old, *new})
    for name in new:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, out / name)
    for name in set(old) - set(new):
        (out / name).unlink(missing_ok=True)
        for above in list((out / name).parents)[: len(PurePosixPath(name).parts) - 1]:
            with contextlib.suppress(OSError):  # others have something there
                above.rmdir()
    note(out, set(new))


def note(out: Path, files: set[str]) -> None:
    """Write the list."""
    text = json.dumps({"made_by": "python -m ragged.course.site", "files": sorted(files)}, indent=1)
    (out / f"{MANIFEST}.new").write_text(text + "\n", encoding="utf-8")
    os.replace(out / f"{MANIFEST}.new", out / MANIFEST)
