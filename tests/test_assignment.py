"""Assignments for otter-grader: what a student gets holds no solution, and the solutions are graded with full marks."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from notebook_files import LESSONS, ROOT, read, tagged

from ragged.course import assignment, notebooks

nbformat = pytest.importorskip("nbformat")
LIGHT = "03"  # graded as a whole, with what a lesson measures; the others by their solutions alone, which is quick


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


def graded(folder, name, answers):
    """Run otter's grader on a notebook of answers: {test: (score, most)}."""
    (archive,) = (folder / "autograder").glob("*.zip")
    command = [sys.executable, "-m", "otter", "run", "-a", str(archive), "-o", str(folder), "--no-logo", str(answers)]
    around = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=around)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    return {test["name"]: (test["score"], test["max_score"]) for test in results["tests"] if "score" in test}


def assert_full_marks(found, exercises):
    assert len(found) >= exercises > 0 and all(score == most for score, most in found.values()), found


@pytest.mark.slow
def test_otter_grades_a_lesson_and_the_student_gets_no_solution(tmp_path):
    pytest.importorskip("otter", reason="otter-grader is not installed")
    lesson = next(path for path in LESSONS if path.name.startswith(LIGHT))
    (folder,) = assignment.build(tmp_path, [lesson.name])
    student = nbformat.read(folder / "student" / lesson.name, as_version=4)
    text = "\n".join(cell.source for cell in student.cells)
    assert "BEGIN" not in text and text.count("grader.check(") == len(solutions(lesson))
    for number, solution in solutions(lesson).items():
        assert solution not in text, f"the solution of exercise {number} is handed out"
    assert_full_marks(graded(folder, lesson.name, folder / "autograder" / lesson.name), len(solutions(lesson)))
    found = graded(folder, lesson.name, folder / "student" / lesson.name)
    assert all(score == 0 for name, (score, _) in found.items() if re.search(r"\bq\d", name)), found


@pytest.mark.slow
@pytest.mark.parametrize("lesson", [p for p in LESSONS if not p.name.startswith(LIGHT)], ids=lambda path: path.stem)
def test_otter_gives_the_solutions_full_marks(lesson, tmp_path):
    pytest.importorskip("otter", reason="otter-grader is not installed")
    for folder in ("notebooks", "notebooks/solutions"):
        (tmp_path / folder).mkdir()
        shutil.copy(lesson.parent / "solutions" / lesson.name, tmp_path / folder / lesson.name)
    (folder,) = assignment.build(tmp_path / "out", [lesson.name], tmp_path)
    assert_full_marks(graded(folder, lesson.name, folder / "autograder" / lesson.name), len(solutions(lesson)))
