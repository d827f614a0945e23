"""Assignments for otter-grader: what a student gets holds no solution, and the solutions are graded with full marks."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from notebook_files import LESSONS, ROOT, read, tagged

from ragged.course import assignment, notebooks

nbformat = pytest.importorskip("nbformat")
LIGHT = "03"  # runs quickly; RAGGED_GRADE_ALL=1 grades all of them, which takes minutes


def solutions(lesson):
    solved = tagged(read(lesson.parent / "solutions" / lesson.name), "exercise")
    return {number: cell["source"] for number, cell in solved.items()}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_exercise_is_a_question(lesson):
    made = assignment.master(lesson, lesson.parent / "solutions" / lesson.name)
    raw = [cell.source for cell in made.cells if cell.cell_type == "raw"]
    asked = tagged(read(lesson), "exercise")
    assert [text.split()[4] for text in raw if text.startswith("# BEGIN QUESTION")] == [f"q{n}" for n in asked]
    for words in ("BEGIN SOLUTION", "END SOLUTION", "BEGIN TESTS", "END TESTS", "END QUESTION"):
        assert raw.count(f"# {words}") == len(asked), words
    tests = [made.cells[i + 1].source for i, cell in enumerate(made.cells) if cell.source == "# BEGIN TESTS"]
    for text in tests:
        compile(text, "test", "exec")
        assert "good = course.check(" in text and text.endswith("assert good, said.getvalue()")


def test_a_test_is_silent_or_says_what_the_check_said(capsys):
    source = assignment.as_test("x = 2\ncourse.check(x,\n             yours);")
    from ragged import course

    exec(source, {"course": course, "yours": 2})
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="Expected 2, got 3"):
        exec(source, {"course": course, "yours": 3})


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    if assignment.find_spec("otter") is not None:
        assert assignment.main(["77", "--out", str(tmp_path)]) == 1
        assert "no lesson begins with 77" in capsys.readouterr().err
    monkeypatch.setattr(assignment, "find_spec", lambda name: None)
    assert assignment.main(["00", "--out", str(tmp_path)]) == 1
    assert 'pip install "ragged-vit[assignment]"' in capsys.readouterr().err
    other = [tmp_path / f"0{i}_x.ipynb" for i in range(2)]
    shutil.copy(LESSONS[0], other[0])
    shutil.copy(LESSONS[4].parent / "solutions" / LESSONS[4].name, other[1])
    with pytest.raises(notebooks.NotebookError, match="do not have the same exercises"):
        assignment.master(*other)


GRADED = LESSONS if os.environ.get("RAGGED_GRADE_ALL") else [path for path in LESSONS if path.name.startswith(LIGHT)]


@pytest.mark.parametrize("lesson", GRADED, ids=lambda path: path.stem)
def test_otter_grades_the_solutions_and_the_student_gets_none(lesson, tmp_path):
    pytest.importorskip("otter", reason="otter-grader is not installed")
    (folder,) = assignment.build(tmp_path, [lesson.name])
    student = nbformat.read(folder / "student" / lesson.name, as_version=4)
    text = "\n".join(cell.source for cell in student.cells)
    assert "BEGIN" not in text and text.count("grader.check(") == len(solutions(lesson))
    for number, solution in solutions(lesson).items():
        assert solution not in text, f"the solution of exercise {number} is handed out"
    (archive,) = (folder / "autograder").glob("*.zip")
    command = [sys.executable, "-m", "otter", "run", "-a", str(archive), "-o", str(tmp_path), "--no-logo"]
    done = subprocess.run(
        [*command, str(folder / "autograder" / lesson.name)], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    graded = {test["name"]: (test["score"], test["max_score"]) for test in results["tests"] if "score" in test}
    wrong = {name: score for name, score in graded.items() if score[0] != score[1]}
    assert len(graded) >= len(solutions(lesson)) and not wrong, results
