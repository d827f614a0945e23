"""What a kernel touches is seen in the interpreter, without leaving anything behind; and what else lesson 02 asks of
the course: Triton in one call, tried changes, a neighbour that is broken."""

import math
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from ragged import course, data, launch
from ragged.course import lab, stages, touched
from ragged.kernels.attention import number


@triton.jit
def plus_one(x):
    return x + tl.sum(tl.full([1], 1.0, tl.float32), 0)


@triton.jit
def shifted_copy(X, Y, n, shift, WIDTH: tl.constexpr):
    """Y[i] = X[i + shift] + 1, in tiles of WIDTH, for the columns of this program's row."""
    row = tl.program_id(0)
    for first in range(0, number(n), WIDTH):
        at = row * n + first + tl.arange(0, WIDTH)
        real = first + tl.arange(0, WIDTH) < n
        tl.store(Y + at, plus_one(tl.load(X + at + shift, mask=real, other=0.0)), mask=real)


def copied(shift=0):
    x, y = torch.arange(10.0).view(2, 5), torch.zeros(2, 5)
    return x, y, touched.trace(shifted_copy, (2,), x, y, 5, shift, 4)


def test_every_load_and_store_is_kept_with_its_program():
    x, y, touches = copied()
    assert torch.equal(y, x + 1)
    seen = [(t.program[0], t.kind, t.name, t.touched.tolist()) for t in touches]
    assert seen == [
        (0, "load", "X", [0, 1, 2, 3]), (0, "store", "Y", [0, 1, 2, 3]), (0, "load", "X", [4]), (0, "store", "Y", [4]),
        (1, "load", "X", [5, 6, 7, 8]), (1, "store", "Y", [5, 6, 7, 8]), (1, "load", "X", [9]), (1, "store", "Y", [9]),
    ]  # fmt: skip
    assert touches[2].shape == (4,) and touches[2].taken.tolist() == [True, False, False, False]


def test_what_lies_next_to_a_tensor_is_nan_and_told_by_its_place():
    _, y, touches = copied(shift=2)
    assert touches[-2].touched.tolist() == [11] and math.isnan(y[1, 4])
    _, y, touches = copied(shift=-2)
    assert touches[0].touched.tolist() == [-2, -1, 0, 1] and y[0, :2].isnan().all() and y[0, 2] == 1


def test_what_lies_in_no_tensor_is_not_followed():
    _, y, touches = copied(shift=1 << 40)
    assert {t.name for t in touches if t.kind == "load"} == {""} and (y == 1).all()
    assert all(len(t.touched) for t in touches), "kept all the same"


def test_triton_is_afterwards_as_it_was():
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from ragged.kernels import attention

    def state():
        things = (tl, tl.core, tl.math, tl.tensor, tl.dtype)
        return [JITFunction.__call__, attention.INTERPRETED, *({**vars(thing)} for thing in things)]

    before = state()
    copied()
    with pytest.raises(ZeroDivisionError):
        touched.trace(stops, (1,), torch.zeros(1))
    assert state() == before and "create_masked_load" not in vars(interpreter.interpreter_builder)


@triton.jit
def stops(X):
    tl.store(X, 1 / 0)


def test_a_kernel_with_other_arguments_is_refused():
    with pytest.raises(TypeError, match="stops takes 1 arguments, and is given 2"):
        touched.trace(stops, (1,), torch.zeros(1), 3)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(launch, "installed", lambda package: False)
    with pytest.raises(touched.NoTriton, match="exists for Linux only"):
        copied()


# ---- the laboratory ----


@pytest.mark.parametrize(
    "options",
    [{"lengths": (5, 17, 0, 9)}, {"lengths": (1,), "heads": 1}, {"lengths": (65, 70), "tile": 64, "nan": 1},
     {"lengths": (40, 9), "size": 600.0}],
)  # fmt: skip
def test_the_kernel_itself_is_right(options):
    run = lab.attend(lab.batch(**options))
    torch.testing.assert_close(run.out.double(), run.want, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not run.said and {call.part for call in run.calls} == set(lab.PARTS)
    assert {t.name for t in run.touches} == {"Q", "K", "V", "Cu", "Out"}


def test_scores_may_be_asked_for_far_below_zero():
    run = lab.batch((20, 9), shift=-20000.0)
    scores = torch.einsum("qhd,khd->hqk", run.q[:20], run.k[:20]) * run.dim**-0.5
    assert -20100 < scores.min() and scores.max() < -19900


@pytest.mark.parametrize(
    "load_mask, score_mask, nan_rows, wrong_images",
    [(True, True, 0, set()), (True, False, 0, {0, 2}), (False, True, 18, {0}), (False, False, 18, {0, 2})],
)
def test_a_broken_neighbour_is_kept_out_by_the_masks(load_mask, score_mask, nan_rows, wrong_images):
    run = lab.without_masks((18, 5, 9, 16), 1, load_mask, score_mask)
    others = [image for image in (0, 2, 3)]
    nan = sum(int(run.out[run.rows(image)].isnan().flatten(1).any(1).sum()) for image in others)
    wrong = {
        image for image in others
        if not torch.allclose(run.out[run.rows(image)].double(), run.want[run.rows(image)], 1e-3, 1e-4)
    }  # fmt: skip
    assert (nan, wrong) == (nan_rows, wrong_images) and run.out[run.rows(1)].isnan().all()


# ---- what was tried ----


def test_a_tried_change_is_found_by_its_first_words():
    notes = data.notes()
    for part, words, case in (
        ("The attention kernels", "query tiles of 128", "256 × 197"),
        ("The attention kernels", "a last query tile", "256 × 197"),
        ("The attention kernels", "99 equal tokens", "16 × 99"),
        ("A kernel in Gluon", "as many stages", "64 × 99"),
    ):
        one = course.tried(part, words)
        assert notes["measured"].eq(one.measured).sum() == 1 and one.measured[:20] in str(one)
        before, after = (
            float(number) for number in one.measured.split(f"{case}: ")[1].split(" µs")[0].split(";")[0].split(" → ")
        )
        assert one.longer(case) == pytest.approx(100 * (after - before) / before)


def test_the_change_of_one_case():
    one = course.Tried("x", "y", "256 × 99: 1,000 → 1,500; 6 × 99: 4.0 → 3.0 µs, 56 × 99: gone", "no")
    assert one.longer("256 × 99") == pytest.approx(50) and one.longer("6 × 99") == pytest.approx(-25)
    for case in ("56 × 99", "1 × 99", "99"):
        with pytest.raises(ValueError, match="case: expected one with two times"):
            one.longer(case)
    for part, words in (
        ("The attention kernels", "nobody tried this"),
        ("The attention kernels", "a "),
        ("no part", ""),
    ):
        with pytest.raises(ValueError, match="words: expected the beginning of one change"):
            course.tried(part, words)


# ---- stages of shared memory ----


def test_a_handover_keeps_its_rules():
    """Each worker does one item at a time, in order; no product before its copy, no copy before its stage is free."""
    generator = torch.Generator().manual_seed(3)
    for room in (1, 2, 3, 9):
        copies, computes = torch.randint(1, 6, (2, 8), generator=generator).tolist()
        bars = stages.handover(copies, computes, room)
        ends = [
            {item: (start, start + ticks) for row, start, ticks, item in bars if row == worker} for worker in (0, 1)
        ]
        assert [list(end) for end in ends] == [list(range(8))] * 2 and len(bars) == 16
        for item in range(8):
            waited = ends[0][item - 1][1] if item else 0, ends[1][item - room][1] if item >= room else 0
            assert ends[0][item][0] == max(waited), "a copy begins as soon as it may"
            assert ends[1][item][0] == max(ends[0][item][1], ends[1][item - 1][1] if item else 0)
    assert course.equal_items(3, 4, 2, items=5) == stages.handover([3] * 5, [4] * 5, 2)
    for bad in (([1], [1, 2], 1), ([1], [1], 0), ([0], [1], 1)):
        with pytest.raises(ValueError, match="copies, computes and stages"):
            stages.handover(*bad)


# ---- Triton for a lesson ----


def test_the_language_of_a_lesson():
    found = course.language(interpret=False)
    assert found.triton is triton and found.tl is tl and found.number is number
    assert (found.why_not is None) == (found.place != "nowhere")
    assert found.dtype == (torch.float16 if found.device.type == "cuda" else torch.float32)


def test_where_triton_is_missing_kernels_are_text(monkeypatch):
    monkeypatch.setattr(launch, "installed", lambda package: False)
    found = course.language()
    assert found.triton.jit(test_the_language_of_a_lesson) is test_the_language_of_a_lesson
    assert found.tl.constexpr is int and found.number(3) == 3 and "triton" in sys.modules
    assert found.why_not is not None and found.place == "nowhere"


def test_places_are_told_for_numbers_of_any_size():
    for dtype in (torch.int64, torch.float16, torch.float32):
        room = touched._Room(torch.zeros(6, dtype=dtype))
        places, near = room.places(np.array([room.first, room.first + 5 * room.item, room.first + 99999 * room.item]))
        assert places.tolist() == [0, 5, 99999] and near.tolist() == [True, True, False]
