"""The course as assignments for otter-grader: `python -m ragged.course.assignment --out FOLDER` (`make assignment`).

Every lesson and its solution become one notebook in the form that `otter assign` reads; it writes two folders,
`student` to hand out and `autograder` with the solutions and the archive that `otter run` or Gradescope grades with.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .notebooks import ROOT, NotebookError

CONFIG = """# ASSIGNMENT CONFIG
name: {name}
init_cell: true
export_cell: false
check_all_cell: false
solutions_pdf: false
run_tests: {run_tests}
generate:
    pdf: false
"""
QUESTION = """# BEGIN QUESTION
name: q{number}
points: 1
"""


def numbered(notebook: Any, kind: str) -> dict[int, Any]:
    """{number: cell} of a notebook's cells tagged kind-number. kind: "exercise" or "check"."""
    found = {}
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            if match := re.fullmatch(rf"{kind}-(\d+)", tag):
                found[int(match[1])] = cell
    return found


def master(lesson: Path, solution: Path, run_tests: bool = False) -> Any:
    """The notebook that `otter assign` reads: the lesson, each exercise with its solution and its check as a question.

    lesson, solution: the two notebooks.  run_tests: whether otter grades the solution while it writes. NotebookError
    where the two do not belong together.
    """
    import nbformat
    from nbformat.v4 import new_code_cell, new_raw_cell

    asked, answered = (nbformat.read(path, as_version=4) for path in (lesson, solution))
    solutions, checks = numbered(answered, "exercise"), numbered(asked, "check")
    if set(solutions) != set(numbered(asked, "exercise")) or set(solutions) != set(checks):
        raise NotebookError(f"{lesson.name} and its solution do not have the same exercises")
    cells = [new_raw_cell(CONFIG.format(name=lesson.stem, run_tests=str(run_tests).lower()))]
    for cell in asked.cells:
        number = next((n for n, found in numbered(asked, "exercise").items() if found is cell), None)
        check = next((n for n, found in checks.items() if found is cell), None)
        if number is not None:
            stub = cell.source.replace('"""', "'''")  # in the copy with solutions the prompt is a string
            prompt = f'""" # BEGIN PROMPT\n{stub}\n""" # END PROMPT\n'
            code = f"# BEGIN SOLUTION\n{solutions[number].source}\n# END SOLUTION"
            cells += [new_raw_cell(QUESTION.format(number=number)), new_raw_cell("# BEGIN SOLUTION")]
            cells += [new_code_cell(prompt + code), new_raw_cell("# END SOLUTION")]
        elif check is not None:
            cells += [new_raw_cell("# BEGIN TESTS"), new_code_cell(as_test(cell.source)), new_raw_cell("# END TESTS")]
            cells += [new_raw_cell("# END QUESTION")]
        else:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            cells.append(cell)
    made = nbformat.v4.new_notebook(cells=cells, metadata=asked.metadata)
    for i, cell in enumerate(made.cells):
        cell.id = f"cell-{i}"
    return made


def as_test(source: str) -> str:
    """A check cell as a test: silent where `course.check`, its last line, is content; else it says what the check said.
    """
    lines = source.rstrip().rstrip(";").splitlines()
    start = max(i for i, line in enumerate(lines) if re.match(r"course\.check\(", line))
    check = "\n".join([f"    good = {lines[start]}", *(f"    {line}" for line in lines[start + 1 :])])
    listen = "with contextlib.redirect_stdout(io.StringIO()) as said:"
    return "\n".join(["import contextlib, io", *lines[:start], listen, check, "assert good, said.getvalue()"])


def build(out: Path, names: list[str], root: Path = ROOT, run_tests: bool = False) -> list[Path]:
    """Write the assignments of some lessons into `out`, replacing what is there; the folders are returned.

    names: beginnings of file names, such as "02"; none are all.  root: the checkout.  run_tests: grade the solutions
    too. NotebookError where otter-grader is missing, a lesson is not found, or otter fails.
    """
    import nbformat

    if find_spec("otter") is None:
        raise NotebookError('otter-grader is not installed: pip install "ragged-vit[assignment]"')
    lessons = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    chosen = [path for path in lessons if not names or path.name.startswith(tuple(names))]
    if not chosen:
        raise NotebookError(f"no lesson begins with {' or '.join(names) or 'a number'} in {root / 'notebooks'}")
    folders = []
    for lesson in chosen:
        folder = out / lesson.stem
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as there:
            source = Path(there) / lesson.name
            nbformat.write(master(lesson, lesson.parent / "solutions" / lesson.name, run_tests), source)
            command = [sys.executable, "-m", "otter", "assign", "--no-pdfs", str(source), str(folder.resolve())]
            done = subprocess.run(command, capture_output=True, text=True, cwd=there)
        if done.returncode:
            raise NotebookError(f"otter assign failed on {lesson.name}:\n{(done.stdout + done.stderr)[-2000:]}")
        folders.append(folder)
    return folders


def main(arguments: list[str] | None = None) -> int:
    """Command line: write the assignments and name their folders."""
    parser = argparse.ArgumentParser(prog="python -m ragged.course.assignment", description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", help="beginnings of names, such as 02 05 (default: all)")
    parser.add_argument("--out", type=Path, default=Path("assignment"), help="where to (default: assignment)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    parser.add_argument("--grade", action="store_true", help="run every lesson with its solutions, and grade them")
    given = parser.parse_args(arguments)
    try:
        folders = build(given.out, given.lessons, given.root, given.grade)
    except NotebookError as error:
        print(f"python -m ragged.course.assignment: {error}", file=sys.stderr)
        return 1
    for folder in folders:
        print(f"{folder}: student, autograder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
