"""Lesson 02's exercises: the right answer passes, and what is typically wrong is told by its length or its property."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("plotly")
pytest.importorskip("triton")

import plotly.graph_objects as go
from kernel_answers import (
    LSE,
    OUT,
    a_row,
    along_queries,
    as_floats,
    beginnings,
    calls_a_stub,
    every_row,
    every_tile_again,
    far_away,
    flat,
    fold,
    from_the_tile_s_beginning,
    heads_first,
    in_bytes,
    kernel_lse,
    mask_scores,
    nothing,
    of_the_tile,
    one_less,
    one_more,
    row_mask,
    scaled,
    stops,
    stub,
    sums_only,
    the_other_way_round,
    tile_at,
    to_a_large_number,
    to_base_e,
    to_zero,
    turned,
    two_of_three,
    unscaled,
    untouched,
    upside_down,
    whole_numbers,
    without_first,
    without_head,
    without_maxima,
    without_start,
)

from ragged import course
from ragged.course import exercises


@pytest.fixture
def said(capsys, monkeypatch):
    """said(exercise, answer) -> (whether it passed, what was printed, the figures shown)."""
    drawn = []
    monkeypatch.setattr(go.Figure, "show", lambda self, *_, **__: drawn.append(self))
    monkeypatch.setattr(exercises, "_solved", set())

    def check(number, answer):
        drawn.clear()
        passed = course.check(f"02/{number}", answer)
        return passed, capsys.readouterr().out, list(drawn)

    return check


def names(figure):
    return [trace.name for trace in figure.data if trace.name]


def colours(figure):
    """What is really drawn: the names of the kinds of places in a figure of touched rows."""
    z = torch.tensor(figure.data[0].z)
    scale = figure.data[0].colorscale
    return {scale[2 * int(value)][1] for value in z.unique()}


RED, BLACK = "#d7191c", "#222222"


# ---- the addresses of a tile ----


@pytest.mark.parametrize(
    "answer, words, drawn",
    [
        (without_head, "two heads. An image of 16 tokens: the program of head 1 reads numbers of head 0", {RED, BLACK}),
        (without_start, "An image of 17 tokens, the tile from its row 0: it reads packed rows 0 to 4, which belong to "
                        "image 0; its own are 5 to 21", {RED, BLACK}),
        (without_first, "An image of 20 tokens, the tile from its row 16: it reads packed rows 0 to 3 where rows 16 to "
                        "19 should be", {BLACK}),
        (heads_first, "two heads. An image of 16 tokens: the program of head 0 reads numbers of heads 0 to 1",
         {RED, BLACK}),
        (in_bytes, "some of its addresses lie outside of the tensor, whose last is 255. Place [0, 1] of the tile: "
                   "expected address 1, got 4", {RED, BLACK}),
        (far_away, "some of its addresses lie outside of the tensor", {BLACK}),
        (turned, "it reads the right rows and the right head, but puts the numbers into the wrong places", set()),
        (beginnings, "tile_at returned addresses of the shape (16,); expected (16, 16)", None),
        (as_floats, "tile_at returned addresses of the kind float32; expected whole numbers", None),
        (nothing, "tile_at returned None (does every path end in a return?)", None),
        (stops, "It stopped with ValueError: arange's range must be a power of 2, in its line 'return tl.arange", None),
        (stub, "Not begun: the function still raises NotImplementedError", None),
    ],
)  # fmt: skip
def test_wrong_addresses(said, answer, words, drawn):
    """drawn: which of red, "read, but not its own", and black, "its own, not read", the figure shows; None: none."""
    passed, text, figures = said(2, answer)
    assert not passed and words in text and "Traceback" not in text
    assert len(figures) == (drawn is not None)
    if figures:
        assert colours(figures[0]) & {RED, BLACK} == drawn
        assert "read, but not its own" in names(figures[0])


# ---- the load mask ----


NEIGHBOUR = (
    "An image of 65 tokens, the tile from its row 64: rows 65 to 127 belong to its neighbour, and the mask lets "
)
NAN = "The neighbour is NaN here, and so are now 65 of the image's 65 rows"


@pytest.mark.parametrize(
    "answer, words, drawn",
    [
        (every_row, (NEIGHBOUR + "them in", NAN), {RED}),
        (of_the_tile, (NEIGHBOUR + "them in", NAN), {RED}),
        (one_more, ("row 65 belongs to its neighbour, and the mask lets it in", NAN), {RED}),
        (one_less, ("An image of 16 tokens: row 15 is its own, and the mask keeps it out",), {BLACK}),
        (a_row, ("row_mask returned mask of the shape (1, 16); expected (16, 1)",), None),
        (flat, ("row_mask returned mask of the shape (16,); expected (16, 1)",), None),
        (whole_numbers, ("row_mask returned mask of the kind int32; expected bools",), None),
    ],
)
def test_wrong_load_masks(said, answer, words, drawn):
    passed, text, figures = said(3, answer)
    assert not passed and all(part in text for part in words)
    assert len(figures) == (drawn is not None) and (not figures or colours(figures[0]) & {RED, BLACK} == drawn)


# ---- the score mask ----


ZERO = "An image of 5 tokens: keys 5 to 15 are not its own, and their scores are 0"


@pytest.mark.parametrize(
    "answer, words, drawn",
    [
        (to_zero, (ZERO, "only -inf has none"), {RED}),
        (untouched, (ZERO,), {RED}),
        (to_a_large_number, ("their scores became -1e+04. That is finite",), {RED}),
        (along_queries, ("An image of 5 tokens: the mask runs along the rows, which are queries",), {RED}),
        (the_other_way_round, ("keys 0 to 15 are its own, and their scores became -inf",), {BLACK}),
        (from_the_tile_s_beginning, ("An image of 20 tokens, the tile from its row 16: keys 20 to 31",), {RED}),
        (scaled, ("scores of its own keys were changed",), set()),
    ],
)  # fmt: skip
def test_wrong_score_masks(said, answer, words, drawn):
    passed, text, figures = said(4, answer)
    assert not passed and all(part in text for part in words)
    assert colours(figures[0]) & {RED, BLACK} == drawn


# ---- the rescaling line ----


@pytest.mark.parametrize(
    "answer, words",
    [
        (unscaled, "three tiles of keys. An image of 40 tokens: after 2 tiles of keys the sum of row 0 is"),
        (to_base_e, "three tiles of keys. An image of 40 tokens: after 2 tiles of keys the sum of row 0 is"),
        (upside_down, "Before the first tile top is -inf: what does your factor become then?"),
        (without_maxima, "scores of some thousands whose exponentials overflow. An image of 40 tokens: after 1 tile of "
                         "keys row 0 holds the sum inf. Its scores reach"),
        (sums_only, "the sums are right, but the output of rows"),
        (two_of_three, "fold returned 2 values; expected acc and top and total, in this order"),
    ],
)  # fmt: skip
def test_wrong_rescaling(said, answer, words):
    passed, text, figures = said(5, answer)
    assert not passed and words in text
    assert not figures or RED in colours(figures[0])


# ---- a third axis, and the log-sum-exp ----


@pytest.mark.parametrize(
    "answer, words",
    [
        (kernel_lse(f"{OUT}; " + LSE.format("top + tl.log2(total)")), "Lse is the logarithm to base 2"),
        (kernel_lse(f"{OUT}; " + LSE.format("top * 0.6931471805599453")), "Out is right, Lse is not: head 0"),
        (kernel_lse(f"{OUT}; " + LSE.format("tl.log(total)")), "Out is right, Lse is not: head 0"),
        (kernel_lse(OUT), "one query tile. An image of 5 tokens: rows 0 to 4 of Lse in head 0 are never written"),
        (kernel_lse(LSE.format("lse")), "An image of 5 tokens: rows 0 to 4 of Out in head 0 are never written"),
        (kernel_lse(f"{OUT}; " + LSE.format("lse"), first="0"),
         "two query tiles. An image of 20 tokens: rows 16 to 19 of Out in head 0 are never written"),
        (kernel_lse(f"{OUT}; " + LSE.format("lse") + "; tl.store(Out + at, out, mask=row[:, None] < 999)"),
         "Program (0, 0, 0) (image, head, query tile) writes past the end of Out"),
        (kernel_lse(f"{OUT}; tl.store(Lse + (start + row) * HEADS + head, lse, mask=row < length)"),
         "Out is right, Lse is not"),
        (calls_a_stub, "Not begun: stub, which it calls, still raises NotImplementedError"),
    ],
)  # fmt: skip
def test_wrong_log_sum_exps(said, answer, words):
    passed, text, _ = said(7, answer)
    assert not passed and words in text


def test_a_loop_over_query_tiles_that_stayed_is_found(said):
    passed, text, figures = said(7, every_tile_again)
    assert not passed and "row 0 of Out in head 0 is written by several programs, (0, 0, 0) and (0, 0, 1)" in text
    assert figures[0].layout.title.text == "Which log-sum-exps are right"


# ---- what is right ----


def test_right_answers_pass_draw_and_are_known_to_be_solved(said):
    answers = {2: tile_at, 3: row_mask, 4: mask_scores, 5: fold, 7: kernel_lse(f"{OUT}; " + LSE.format("lse"))}
    for which, answer in answers.items():
        assert not course.solved(f"02/{which}")
        passed, text, figures = said(which, answer)
        assert passed and "Correct, in all" in text and len(figures) == 1 and course.solved(f"02/{which}")
        assert not colours(figures[0]) & {RED, BLACK}, "nothing wrong, nothing missed"
    assert course.solved(*(f"02/{which}" for which in answers)) and not course.solved("02/2", "02/1")
    said(2, without_head)
    assert not course.solved("02/2"), "what is broken again is not solved"
    with pytest.raises(ValueError, match="got '02/99'"):
        course.solved("02/99")


def test_an_answer_need_not_be_wrapped(said):
    assert said(3, row_mask.fn)[0]


def test_without_triton_a_check_says_so(said, monkeypatch):
    monkeypatch.setattr("ragged.launch.installed", lambda package: False)
    passed, text, figures = said(2, tile_at)
    assert (passed, figures) == (False, []) and text.startswith("Not tried: Triton is not installed here")


def test_where_triton_is_not_installed_a_check_says_so_too():
    code = "import sys; sys.modules['triton'] = None; from ragged import course; course.check('02/4', lambda *_: 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("Not tried: Triton is not installed here"), done.stderr[-2000:]


# ---- the exercises without a kernel ----


def merge(a, b, top=torch.maximum, power=torch.exp2):
    both = top(a[1], b[1])
    first, second = power(a[1] - both), power(b[1] - both)
    return (a[0] * first[:, None] + b[0] * second[:, None]) / (a[2] * first + b[2] * second)[:, None]


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda a, b: (a[0] + b[0]) / (a[2] + b[2])[:, None], "3 keys and 7"),
        (lambda a, b: (a[0] / a[2][:, None] + b[0] / b[2][:, None]) / 2, "3 keys and 7"),
        (lambda a, b: merge(a, b, power=torch.exp), "3 keys and 7"),
        (lambda a, b: merge(a, b, top=lambda x, y: x), "all keys in the second part"),
        (lambda a, b: merge(a, b, top=torch.minimum), "all keys in the second part"),
        (lambda a, b: merge(a, b, top=lambda x, y: torch.zeros_like(x)), "whose exponentials overflow"),
    ],
)
def test_wrong_merges(said, answer, words):
    passed, text, _ = said(1, answer)
    assert not passed and f"Not yet: {words}" in text.replace("scores of some hundreds, ", "")
    assert said(1, merge)[0]


def finish(copies, computes, stages):
    copied, done = 0, []
    for item, (copy, compute) in enumerate(zip(copies, computes)):
        copied = max(copied, done[item - stages] if item >= stages else 0) + copy
        done.append(max(copied, done[-1] if done else 0) + compute)
    return done[-1]


@pytest.mark.parametrize(
    "answer, case",
    [
        (lambda copies, computes, stages: sum(copies) + sum(computes), "two stages"),
        (lambda copies, computes, stages: max(sum(copies), sum(computes)), "one stage"),
        (lambda copies, computes, stages: finish(copies, computes, len(copies)), "one stage"),
        (lambda copies, computes, stages: finish(copies, computes, stages + 1), "one stage"),
    ],
)
def test_wrong_ends_of_a_pipeline(said, answer, case):
    passed, text, _ = said(8, answer)
    assert not passed and f"Not yet: {case}" in text and "expected" in text
    assert said(8, finish)[0]


@pytest.mark.parametrize(
    "answer, case",
    [
        (lambda lengths, tile: [0.0, 0.0], "half a tile"),
        (lambda lengths, tile: [1 - sum(n * n for n in lengths) / (len(lengths) * max(lengths) ** 2)] * 2, "one image"),
        (lambda lengths, tile: [1 - sum(lengths) / (len(lengths) * max(lengths)),
                                1 - sum(lengths) / sum(-(-n // tile) * tile for n in lengths)], "half a tile"),
    ],
)  # fmt: skip
def test_wrong_shares_of_waste(said, answer, case):
    passed, text, _ = said(6, answer)
    assert not passed and case in text


def test_every_exercise_has_hints():
    from ragged.course.answers.lesson_02 import EXERCISES

    assert list(EXERCISES) == [str(n) for n in range(1, 9)]
    assert all(len(exercise.hints) >= 2 and len(exercise.cases) >= 4 for exercise in EXERCISES.values())
