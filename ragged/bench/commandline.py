"""What the command lines share: trouble that a user can mend is said in a sentence, not with a traceback; a progress
bar."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def run(main: Callable[[], int], program: str) -> int:
    """`main()`, and the exit code for the shell: 2 after an error, which is said on stderr; 130 after Ctrl-C.

    Only files, values and missing packages are spoken for: other errors are the program's own and keep their traceback,
    as all do with RAGGED_TRACEBACK=1.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console whose alphabet has no Δ shows ? in its place
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError) as error:
        if os.environ.get("RAGGED_TRACEBACK") == "1":
            raise
        print(f"{program}: error: {sentence(error)}", file=sys.stderr)
        return 2


def sentence(error: Exception) -> str:
    """What went wrong, in words."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this needs the package {error.name.partition('.')[0]!r}, which is not installed"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def bar(items: Iterable, **options: object) -> Iterable:
    """The items under a bar with these options of tqdm's; where tqdm is not installed, the items themselves."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, **options)


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def check_writable(folder: Path) -> None:
    """Make the folder, and see that files can be made in it: better now than after an hour. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(folder)) from None
