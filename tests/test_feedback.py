"""Feedback on exercises: which case failed, and why, in words; guesses before answers; progress in a file."""

import csv
import re

import pytest
import torch

from ragged import course
from ragged.course import exercises, marks
from ragged.course.exercises import Exercise, unlike


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """A progress file of this test's own."""
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    monkeypatch.setenv("RAGGED_PROGRESS", str(tmp_path / "kept.csv"))
    monkeypatch.setattr(marks, "_guesses", {})
    monkeypatch.setattr(exercises, "_given", {})
    return tmp_path / "kept.csv"


DOUBLE = Exercise(spec=lambda x: x * 2, cases={"a zero": (torch.zeros(2),), "two numbers": (torch.tensor([1.0, 3.0]),)},
                  hints=("What is twice a number?", "x + x"))  # fmt: skip


def said(capsys, yours, exercise=DOUBLE, name="99/1"):
    good = course.check_exercise(name, yours, exercise)
    return good, capsys.readouterr().out


# ---- one answer ----


def test_a_right_answer_names_its_cases(capsys):
    assert said(capsys, lambda x: x + x) == (True, "Correct, in all 2 cases: a zero; two numbers.\n")


def test_the_first_wrong_case_is_named_with_what_was_given(capsys):
    good, text = said(capsys, lambda x: x * 3)
    assert not good and text.startswith(
        "Not yet: two numbers. 2 of 2 places differ (place 0, 1). At [0]: expected 2, got 3."
    )
    assert "Given: [1.0, 3.0]" in text and "1 of 2 cases are right" in text and 'course.hint("99/1")' in text


def stub(x):
    raise NotImplementedError


def nothing(x):
    pass


def broken(x):
    return x[7]


def greedy(x):
    x += x
    return x


@pytest.mark.parametrize(
    "yours, words",
    [
        (stub, "Not begun"),
        (nothing, "It returned None"),
        (broken, "stopped with IndexError: .*in its line 'return x.7.'"),
        (greedy, "It changed its argument x"),
        (lambda x: [0.0, 0.0, 0.0], "expected the shape"),
        (lambda x: x.int(), "expected floats .float32., got whole numbers"),
        (lambda x: "2", "expected"),
        (7, "Expected a function"),
        (lambda x, y: x, "stopped with TypeError"),
        (lambda x: x * float("nan"), "values are NaN"),
    ],
)
def test_every_way_to_fail_has_its_words(capsys, yours, words):
    good, text = said(capsys, yours, Exercise(spec=lambda x: x * 2, cases={"some": (torch.tensor([1.0, 3.0]),)}))
    assert not good and re.search(words, text) and "Traceback" not in text


def test_a_property_that_no_single_answer_decides(capsys):
    shuffled = Exercise(
        None, {"five": (torch.arange(5),)}, needs={"the same numbers": lambda a, x: a.sort()[0].equal(x)}
    )
    assert said(capsys, lambda x: x.flip(0), shuffled)[0]
    assert "Expected: the same numbers" in said(capsys, lambda x: x[:4], shuffled)[1]
    assert "Looking for it failed with AttributeError" in said(capsys, lambda x: 3, shuffled)[1]


def test_the_old_form_still_compares(capsys):
    assert course.check(torch.arange(3.0), [0.0, 1.0, 2.0]) and course.check(
        lambda x: x * 2, lambda x: x + x, torch.ones(2)
    )
    assert course.check(float("inf"), float("inf")) and course.check(197, 197)
    assert not course.check(lambda x: x, stub, 1.0) and not course.check(torch.zeros(2), None)
    assert "Not begun" in capsys.readouterr().out


@pytest.mark.parametrize(
    "want, got, words",
    [
        ({"a": 1.0}, {"b": 1.0}, "keys"),
        ({"a": 1.0, "b": [1, 2]}, {"a": 1.0, "b": [1, 3]}, r"\['b'\]: "),
        ([1, 2], [1], "shape"),
        ("yes", "no", "expected 'yes'"),
        ([[1], [2, 3]], [[1], [2, 4]], r"\[1\]: "),
        ([[1], [2, 3]], 5, "expected 2 values"),
        (5.0, float("inf"), "expected 5, got inf"),
        (float("nan"), float("nan"), "expected nan"),
        (True, 1, "expected bools"),
        (torch.eye(3), torch.zeros(3, 3), r"3 of 3 rows differ \(row 0, 1, 2\). At \[0, 0\]: expected 1, got 0"),
        (1.0, object(), "expected float"),
    ],
)
def test_two_values_beside_each_other(want, got, words):
    assert re.search(words, unlike(want, got))
    assert unlike(want, want) is None or want != want


def test_names_and_hints(capsys):
    with pytest.raises(ValueError, match="expected a name such as '02/1'"):
        exercises.find("77/1")
    with pytest.raises(ValueError, match="got '02/99'"):
        course.hint("02/99")
    hints = exercises.find("02/1").hints
    for i in (*range(len(hints)), 0):
        course.hint("02/1")
        assert f"Hint {i + 1} of {len(hints)}: {hints[i]}" in capsys.readouterr().out


def test_a_softmax_without_maxima_fails_where_it_overflows(capsys):
    def without_maxima(a, b):
        acc = a[0] * torch.exp2(a[1])[:, None] + b[0] * torch.exp2(b[1])[:, None]
        return acc / (a[2] * torch.exp2(a[1]) + b[2] * torch.exp2(b[1]))[:, None]

    good, text = said(capsys, without_maxima, exercises.find("02/1"), "02/1")
    assert not good and "overflow" in text and "NaN" in text


# ---- guesses and progress ----


def test_a_guess_is_kept_and_its_distance_shown(kept, capsys):
    course.guess("01/a", 5, "µs")
    course.reveal("01/a", 10.0, "µs")
    assert capsys.readouterr().out.endswith("It is 10 µs; you guessed 5 µs: 2 times too low, far off.\n")
    course.guess("01/a", 9, "µs")
    course.reveal("01/a", 10.0, "µs")
    (row,) = csv.DictReader(kept.open())
    assert (row["guess"], row["answer"], row["tries"]) == ("5", "10", "2"), "the first guess stays"


def test_no_guess_stops_nothing(kept, capsys):
    course.guess("01/b", None)
    course.reveal("01/b", 3.0)
    assert "No guess yet" in (text := capsys.readouterr().out) and "It is 3." in text and not kept.exists()
    for value in ("5", True, float("nan")):
        with pytest.raises(ValueError, match="value: expected a number"):
            course.guess("01/b", value)


@pytest.mark.parametrize(
    "value, words", [(0.0, r"off by -3"), (-2, "off by -5"), (3, "exactly"), (4, "too high, near")]
)
def test_distances_in_words(value, words, capsys):
    course.guess("01/c", value)
    course.reveal("01/c", 3.0)
    assert re.search(words, capsys.readouterr().out)


def test_progress_counts_lessons_and_what_was_done_stays_done(kept, capsys):
    assert course.progress().empty and "Nothing is kept yet" in capsys.readouterr().out
    said(capsys, lambda x: x + x, name="03/1")
    said(capsys, lambda x: x, name="03/1")
    said(capsys, lambda x: x, name="03/2")
    course.guess("04/a", 2)
    course.reveal("04/a", 2.5)
    table = course.progress()
    assert table.loc["03"].tolist() == [1, 2, 0, 0] and table.loc["04"].tolist() == [0, 0, 1, 1]
    assert str(kept) in capsys.readouterr().out
    assert course.progress(kept).equals(table)


def test_where_nothing_may_be_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RAGGED_PROGRESS", "off")
    said(capsys, lambda x: x + x)
    assert marks.path() is None and course.progress().empty
    (tmp_path / "a file").touch()
    monkeypatch.setenv("RAGGED_PROGRESS", str(tmp_path / "a file" / "kept.csv"))
    assert "progress is not kept" in said(capsys, lambda x: x + x)[1]
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a progress file"):
        course.progress(other)


def at(monkeypatch, folder):
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)


def test_progress_is_one_file_wherever_in_a_checkout_a_lesson_runs(kept, tmp_path, monkeypatch):
    monkeypatch.delenv("RAGGED_PROGRESS")
    notebooks = tmp_path / "checkout" / "notebooks"
    for folder in (notebooks, notebooks / "solutions", notebooks.parent):
        at(monkeypatch, folder)
        (notebooks / "00_start_here.ipynb").touch()
        assert marks.path() == notebooks / "ragged_progress.csv", folder
    at(monkeypatch, tmp_path / "content")  # a notebook alone
    assert marks.path() == tmp_path / "content" / "ragged_progress.csv"
    assert course.check_exercise("00/1", None) is False and marks.path().is_file()


def test_what_a_solution_solves_is_not_kept(kept, tmp_path, monkeypatch):
    at(monkeypatch, tmp_path / "solutions")
    marks.note("00/1", "exercise", True)
    assert not kept.exists()


def test_the_files_of_several_machines_become_one(kept, tmp_path, capsys):
    marks.note("00/1", "exercise", False)
    marks.note("00/a", "guess", True, 2.0, 4.0, "µs")
    other = tmp_path / "other.csv"
    other.write_text(",".join(marks.COLUMNS) + "\n00/1,exercise,1,,,,2,2020-01-01\n01/1,exercise,1,,,,1,2020-01-02\n"
                     "00/a,guess,1,9,4,µs,1,2020-01-01\n", encoding="utf-8")  # fmt: skip
    table = course.progress(take=[other, kept])
    assert table.loc["00"].to_dict() == {"solved": 1, "tried": 1, "guesses": 1, "near": 0} and "01" in table.index
    rows = marks.read_rows(kept)
    assert rows["00/1", "exercise"]["tries"] == "3" and rows["00/a", "guess"]["guess"] == "9"
    before = kept.read_bytes()
    for wrong in ("nowhere.csv", tmp_path):
        with pytest.raises(ValueError, match="there is no file"):
            course.progress(take=[wrong])
    assert kept.read_bytes() == before
