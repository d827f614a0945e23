"""Typical wrong answers to the exercises of lessons 00, 01 and 03, and what the feedback says; and what those lessons
use of the package."""

import math
import re

import pytest
import torch
from answer_cases import said

from ragged import course, launch
from ragged.course import compiled, exercises, toy
from ragged.plots.call import PEAKS


@pytest.fixture(autouse=True)
def unkept(monkeypatch):
    monkeypatch.setenv("RAGGED_PROGRESS", "off")


def cls_rows(tokens, cu, shift=0, upto=-1):
    return tokens[(cu[:upto] if upto else cu[:-1]) + shift] if upto != "all" else tokens[cu.clamp(max=len(tokens) - 1)]


def ceiling(n, cut, whole=12, square=4, linear=24, all_of_it=False):
    def block(rows):
        return linear * rows * 192**2 + square * rows**2 * 192

    return 12 * block(197) / (whole * block(n) if all_of_it else cut * block(197) + (12 - cut) * block(n))


def wasted(keep, longest=None, over="padded", share=1.0):
    counts = keep.sum(1)
    padded = len(keep) * (keep.shape[1] if longest else counts.max())
    return float(share * (padded - counts.sum()) / (padded if over == "padded" else counts.sum()))


def stream_us(n, host, gpu, often=max, once=min):
    return n * often(host, gpu) + once(host, gpu)


def one_us(tokens, batch, gpu):
    peak, bandwidth = PEAKS[gpu]
    return 1e6 * batch * max(4 * tokens**2 * 768 / peak, 8 * tokens * 768 / bandwidth)


def break_even(host, tokens, gpu, rounding=math.ceil, least=1, sure=True):
    batch = max(least, rounding(host / one_us(tokens, 1, gpu)) - sure)
    while sure and one_us(tokens, batch, gpu) < host:
        batch += 1
    return batch


def with_waits(n, every, host, gpu, left=True, often=True):
    full, rest = divmod(n, every)
    if not often:
        return stream_us(n, host, gpu) + full * gpu
    return full * stream_us(every, host, gpu) + (stream_us(rest, host, gpu) if rest and left else 0.0)


def gains(host, gpu, ratio, both=False, stream=max, swap=False):
    after = host / ratio if both else host
    found = (host + gpu) / (after + gpu / ratio), stream(host, gpu) / stream(after, gpu / ratio)
    return found[::-1] if swap else found


def key(x, of=lambda x: (x.dtype, x.shape[1], x.stride())):
    return of(x)


WIDTHS = {"*": 64, "i64": 64, "i32": 32, "fp32": 32}


def extra(bits, kinds, check=True, behind=True, pointer=64):
    wanted = [pointer if kind[0] == "*" else WIDTHS[kind] for kind in kinds]
    if check and (bits[: len(wanted)] != wanted or behind and set(bits[len(wanted) :]) - {64}):
        return -1
    return len(bits) - len(kinds)


def served(tape, buffer, out, fill=True, copy=True, check=True):
    def fast(x):
        if check and x.shape != buffer.shape:
            raise ValueError("another shape")
        if fill:
            buffer.copy_(x)
        tape.replay()
        return out.clone() if copy else out

    return fast


def fewest(low, high, percent, ahead=1, rounding=int):
    count, total = 0, low
    while total <= high:
        count, total = count + 1, rounding((100 + percent) * total / 100) + ahead
    return count


RIGHT = {
    "00/1": cls_rows, "00/2": ceiling, "00/3": wasted, "01/1": stream_us, "01/2": break_even, "01/3": with_waits,
    "01/4": gains, "03/1": key, "03/2": extra, "03/3": served, "03/4": lambda *a: fewest(*a),
}  # fmt: skip
WRONG = [  # exercise, what is wrong, what is said
    ("00/1", dict(upto="all"), "four images .*expected the shape"), ("00/1", dict(shift=1), "four images|IndexError"),
    ("00/1", dict(upto=-2), "expected the shape"),
    ("00/2", dict(all_of_it=True), "a cut after the last block"), ("00/2", dict(square=0), "half the tokens"),
    ("00/2", dict(linear=12), "half the tokens"),
    ("00/3", dict(longest=True), "3 and 2 of 5 tokens"), ("00/3", dict(over="kept"), "3 and 2 of 5 tokens"),
    ("00/3", dict(share=100), "3 and 2 of 5 tokens"),
    ("01/1", dict(once=max), "a lone call"), ("01/1", dict(once=lambda host, gpu: 0.0), "a lone call"),
    ("01/1", dict(often=lambda host, gpu: host + gpu), "a lone call"),
    ("01/1", dict(often=lambda host, gpu: host, once=lambda host, gpu: gpu), "twelve calls, a slow GPU"),
    ("01/2", dict(rounding=math.floor, sure=False), "39 tokens on an H200"),
    ("01/2", dict(rounding=round, sure=False), "tokens on"),
    ("01/2", dict(rounding=lambda x: math.floor(x) + 1, sure=False), "one image is enough|exactly|to the last digit"),
    ("01/3", dict(left=False), "the last group is not full"), ("01/3", dict(often=False), "a wait after every call"),
    ("01/4", dict(both=True), "the stream gains nothing"), ("01/4", dict(swap=True), "The order is: a lone call"),
    ("01/4", dict(stream=lambda host, gpu: host + gpu), "the stream gains nothing"),
    ("03/1", dict(of=lambda x: x.shape), "more rows"), ("03/1", dict(of=lambda x: x.stride()), "fewer columns"),
    ("03/1", dict(of=lambda x: (x.shape[1], x.stride())), "another type. expected 'two kinds', got 'one kind'"),
    ("03/1", dict(of=lambda x: (x.dtype, x.shape[1], x.is_contiguous())), "transposed|every other row"),
    ("03/1", dict(of=lambda x: [x.dtype]), "unhashable"),
    ("03/2", dict(check=False), "a number where the list has a pointer"),
    ("03/2", dict(behind=False), "a number behind the arguments"), ("03/2", dict(pointer=32), "the toy"),
    ("03/3", dict(fill=False), "still answers for the input that was taped"),
    ("03/3", dict(copy=False), "wrote over it"), ("03/3", dict(check=False), "copy_ repeated its rows"),
]  # fmt: skip
OTHERS = [
    ("01/3", lambda n, every, host, gpu: stream_us(n, host, gpu), "a wait after every call"),
    ("03/3", lambda tape, buffer, out: out, "Expected a function of one tensor"),
    ("03/4", lambda *a: fewest(*a, ahead=0) if a[2] else 1, "100 to 160|two totals"),
    ("03/4", lambda low, high, percent: math.ceil(math.log(high / low) / math.log(1 + max(percent, 1) / 100)),
     "160 rows|one total"),
    ("03/4", lambda *a: fewest(*a, rounding=math.ceil), "100 to 160|30 to 300|1 to 40"),
    ("03/4", lambda low, high, percent: high - low + 1, "100 to 160"),
]  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_without_its_mistake_every_one_of_them_is_right(name, capsys):
    good, text = said(capsys, name, RIGHT[name])
    assert good and "Correct, in all" in text, text


@pytest.mark.parametrize("name, mistake, words", WRONG, ids=[f"{name}-{next(iter(how))}" for name, how, _ in WRONG])
def test_a_mistake_is_named_by_the_case_it_fails(name, mistake, words, capsys):
    good, text = said(capsys, name, lambda *given: RIGHT[name](*given, **mistake))
    assert not good and text.startswith("Not yet") and re.search(words, text, re.DOTALL), text


@pytest.mark.parametrize("name, yours, words", OTHERS)
def test_another_way_to_be_wrong(name, yours, words, capsys):
    good, text = said(capsys, name, yours)
    assert not good and re.search(words, text), text


def test_every_exercise_has_hints_cases_and_three_wrong_answers():
    assert [name[:2] for name in RIGHT].count("00") == 3 and len(RIGHT) == 11
    for name in RIGHT:
        exercise = exercises.find(name)
        assert len(exercise.hints) >= 3 and len(exercise.cases) >= 3
        assert len([n for n, *_ in (*WRONG, *OTHERS) if n == name]) >= 3, name


# ---- what the lesson on launching uses ----


def test_the_toy_computes_row_sums_and_its_driver_counts_letters():
    x, out = torch.randn(5, 4)[:, ::2], torch.empty(5)
    made = toy.compile_variant(x.dtype, x.shape[1], *x.stride())
    toy.driver(made.function, 1, 1, 1, *made.metadata, "OOi", (x.data_ptr(), out.data_ptr(), 5), 0)
    torch.testing.assert_close(out, x.sum(1))
    with pytest.raises(ValueError, match="one for each of 3 arguments"):
        toy.driver(made.function, 1, 1, 1, *made.metadata, "OO", (x.data_ptr(), out.data_ptr(), 5), 0)


def test_the_stand_ins_are_gone_afterwards():
    before = launch.current_device, launch.current_stream, launch.cu_launch_kernel
    with pytest.raises(KeyError), toy.instead_of_cuda():
        assert launch.current_device() == -1 and launch.cu_launch_kernel is toy.driver
        raise KeyError
    assert (launch.current_device, launch.current_stream, launch.cu_launch_kernel) == before


def test_a_tape_repeats_operations_in_their_memory_and_refuses_to_read():
    x = torch.ones(3)
    with course.Tape() as tape:
        out = (x * 2).view(3, 1)
    x.copy_(torch.arange(3.0))
    tape.replay()
    assert out.flatten().tolist() == [0, 2, 4] and len(tape.steps) == 1, "a view is no step"
    for read in (lambda: x.max().item(), lambda: x.tolist(), lambda: bool(x.sum() > 0)):
        with pytest.raises(RuntimeError, match="the host would wait"), course.Tape(refuse_reads=True):
            read()
    assert x.tolist() == [0, 1, 2], "afterwards everything may be read again"


@pytest.mark.skipif(not launch.installed("triton") or launch.INTERPRET, reason="needs Triton's compiler")
def test_aligned_pointers_make_fewer_instructions():
    plain, wide = (compiled.row_mover(aligned).asm["ptx"].count(".global.") for aligned in (False, True))
    assert 0 < wide < plain
