"""Exercises and their solutions belong together: solved cells pass the lesson's checks, stubs fail them."""

import ast

import pytest
from notebook_files import LESSONS, SOLUTIONS, as_in_a_notebook, code, exercise_headings, read, run, tagged

pytest.importorskip("plotly")


def solution_path(lesson):
    return lesson.parent / "solutions" / lesson.name


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def pair(request):
    """A lesson and its solution."""
    lesson = request.param
    assert solution_path(lesson).is_file(), f"there is no solutions/{lesson.name}"
    return read(lesson), read(solution_path(lesson))


def verdicts(notebook, stubs=None):
    """{number: what check-number returned}, running the notebook's code with some exercise cells replaced."""
    exercises, checks = tagged(notebook, "exercise"), tagged(notebook, "check")
    replaced = {id(exercises[number]): cell["source"] for number, cell in (stubs or {}).items()}
    numbers = {id(cell): number for number, cell in checks.items()}
    found, names = {}, {"__name__": "__main__"}
    with as_in_a_notebook(notebook["path"].parent):
        for cell in code(notebook):
            value = run(replaced.get(id(cell), cell["source"]), names, f"{notebook['path'].name} {cell['id']}")
            if id(cell) in numbers:
                found[numbers[id(cell)]] = value
    return found


def test_no_solution_without_a_lesson():
    assert {path.name for path in SOLUTIONS} <= {path.name for path in LESSONS}


def test_the_cells_of_a_lesson_and_its_solution_correspond(pair):
    """The same numbers 1, 2, …, the same headings, and checks that are the same to the letter."""
    lesson, solution = pair
    numbers = list(range(1, len(tagged(lesson, "exercise")) + 1))
    assert len(numbers) >= 2, "two exercises at least"
    for notebook in pair:
        for kind in ("exercise", "check"):
            assert list(tagged(notebook, kind)) == numbers, f"{notebook['path']}: cells tagged {kind}-…"
        assert [int(number) for number, _ in exercise_headings(notebook)] == numbers
    assert exercise_headings(lesson) == exercise_headings(solution)
    for number in numbers:
        assert tagged(lesson, "check")[number]["source"] == tagged(solution, "check")[number]["source"]
        assert tagged(lesson, "exercise")[number]["source"] != tagged(solution, "exercise")[number]["source"]


def test_a_heading_comes_first_and_a_check_after_its_exercise(pair):
    for notebook in pair:
        at = {}
        for place, cell in enumerate(notebook["cells"]):
            at |= {tag: place for tag in cell["metadata"].get("tags", [])}
            at |= {f"heading-{n}": place for n, _ in exercise_headings({"cells": [cell]})}
        for number in tagged(notebook, "exercise"):
            assert at[f"heading-{number}"] < at[f"exercise-{number}"] < at[f"check-{number}"], notebook["path"].name


def test_a_stub_says_what_is_wanted(pair):
    """A function or class with a docstring, and NotImplementedError where the answer goes."""
    for number, cell in tagged(pair[0], "exercise").items():
        tree = ast.parse(cell["source"])
        defined = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert any(ast.get_docstring(node) for node in defined), f"exercise-{number} defines nothing with a docstring"
        raised = [ast.unparse(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
        assert any(text.startswith("NotImplementedError") for text in raised), f"exercise-{number} is not a stub"


def test_the_solutions_pass(pair):
    found = verdicts(pair[1])
    assert found and all(value is True for value in found.values()), found


def test_the_stubs_fail_and_stop_nothing(pair):
    """Every check says False, and none raises: a lesson with nothing done runs to its end."""
    lesson, solution = pair
    found = verdicts(solution, stubs=tagged(lesson, "exercise"))
    assert found and all(value is False for value in found.values()), found


def test_each_stub_fails_alone(pair):
    """A check looks at its own exercise: with the others solved, the stub still fails."""
    lesson, solution = pair
    for number, cell in tagged(lesson, "exercise").items():
        assert verdicts(solution, stubs={number: cell})[number] is False, f"check-{number} passes a stub"
