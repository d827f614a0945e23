"""Races of lessons: nothing is ranked that the rounds do not agree on. All times here are made up."""

import random

import pytest

from ragged.bench.races import (
    ALIKE,
    FASTER,
    NOISY,
    SLOWER,
    WORDS,
    Standing,
    race,
    said,
    speeds,
    standing,
    table_rows,
)


def rounds(us, n=15, jitter=0.01, seed=0):
    draw = random.Random(seed)
    return [us * (1 + jitter * draw.uniform(-1, 1)) for _ in range(n)]


def busy(times, share, factor=4.0, seed=1):
    """A share of the rounds disturbed, each by up to `factor`."""
    draw = random.Random(seed)
    return [t * draw.uniform(1.5, factor) if draw.random() < share else t for t in times]


@pytest.mark.parametrize(
    "own, rival, word",
    [
        (rounds(100), rounds(200, seed=1), FASTER), (rounds(200), rounds(100, seed=1), SLOWER),
        (rounds(100), rounds(101, seed=1), ALIKE),
        (rounds(100, n=4), rounds(200, n=4, seed=1), NOISY),  # too few rounds to say anything
        (busy(rounds(100), 0.5), busy(rounds(110, seed=2), 0.5, seed=3), NOISY),
        (busy(rounds(100), 0.1), rounds(200, seed=1), FASTER),  # a few disturbed rounds change nothing
        (rounds(100, jitter=0.4), rounds(100, jitter=0.4, seed=1), NOISY),
    ],
)  # fmt: skip
def test_rounds_rank_only_where_they_agree(own, rival, word):
    found = standing(own, rival)
    assert found.word == word in WORDS and found.q20 <= found.ratio <= found.q80


def test_what_slows_a_whole_round_down_does_not_count():
    slow = [random.Random(i).uniform(1, 5) for i in range(15)]
    own, rival = ([t * s for t, s in zip(rounds(us, seed=us), slow)] for us in (100, 130))
    found = standing(own, rival)
    assert found.word == FASTER and found.ratio == pytest.approx(1.3, rel=0.03) and not found.unsure


def test_a_size_that_rounds_do_not_carry_is_marked_and_never_explained():
    wide, narrow = Standing(2.0, 1.2, 3.2, FASTER), Standing(2.0, 1.9, 2.1, FASTER)
    assert str(wide) == "2.00x (1.20 to 3.20)*" and str(narrow) == "2.00x (1.90 to 2.10)"
    assert said(wide, 2.1) == "faster, size unsure" and said(narrow, 2.05) == "faster, as predicted"
    assert said(narrow, 3.0) == "faster, less than predicted"
    assert said(narrow, 1.5) == "faster, more than predicted"
    assert said(Standing(1.86, 1.55, 1.91, FASTER), 1.56) == "faster, prediction undecided"  # an end is no hit
    assert said(Standing(1.0, 0.5, 2.0, NOISY), 2.1) == NOISY


def test_a_table_has_a_row_for_everybody():
    times = {"unpruned": rounds(200), "packed": rounds(100, seed=1), "lost": busy(rounds(200), 0.5)}
    rows = table_rows(times, "unpruned", {"packed": 2.0, "lost": 1.0})
    assert [row["pipeline"] for row in rows] == list(times) and rows[0]["the rounds say"] == "-"
    assert rows[1]["the rounds say"] == "faster, as predicted" and rows[1]["ms"] == pytest.approx(0.1, rel=0.02)
    assert len({tuple(row) for row in rows}) == 1


def test_a_race_takes_turns_in_shuffled_order_after_a_warm_up():
    seen = []
    times = race({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=6, calls=2)
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", 6)
    turns = [tuple(seen[i : i + 6 : 2]) for i in range(0, len(seen), 6)]
    assert len(turns) == 7 and all(sorted(turn) == list("abc") for turn in turns) and len(set(turns)) > 1
    assert all(t >= 0 for own in times.values() for t in own)


def test_images_per_second_have_quantiles():
    found = speeds({"a": [1e6, 1e6, 2e6], (4, "b"): [5e5] * 3}, {"a": 8, (4, "b"): 4})
    assert found["a"]["value"] == 8 and found["a"]["q20"] < 8 == found["a"]["q80"]
    assert speeds({"a": [1e6]}, 2)["a"] == dict(value=2, q20=2, q80=2)


@pytest.mark.parametrize(
    "call, what",
    [
        (lambda: standing([1.0], [1.0, 2.0]), "same rounds"), (lambda: standing([], []), "same rounds"),
        (lambda: race({"a": int}, rounds=0), "rounds"), (lambda: race({"a": int}, calls=0), "calls"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()


RACING = ("00_start_here", "01_dispatch_bottleneck", "05_pack_attend_unpack", "06_whole_model",
          "08_paper_table_by_table", "09_your_turn")  # fmt: skip


@pytest.mark.parametrize("name", RACING)
def test_a_lesson_that_races_asks_the_rounds(name):
    """Nothing is judged by its fastest round, and every ratio of live times comes from `standing`."""
    import notebook_files

    cells = notebook_files.code(notebook_files.read(notebook_files.ROOT / "notebooks" / f"{name}.ipynb"))
    source = "\n".join(cell["source"] for cell in cells)
    assert "races.standing(" in source or "races.table_rows(" in source
    assert "best = min(" not in source and "min(wall_us" not in source and "] = min(" not in source
