"""Exercises of lesson 03."""

import torch

from ..exercises import Exercise
from ..tape import Tape
from ..toy import compile_variant


def _same_program(a, b):
    """By what the toy compiler writes, and for which type."""
    one, other = ((m.dtype, compile_variant(m.dtype, m.shape[1], *m.stride()).source) for m in (a, b))
    return _kinds(one == other)


def _kinds(same):
    return "one kind" if same else "two kinds"


def _extra(bits, kinds):
    """Parameter by parameter, from the front."""
    sizes = {"*": 64, "i64": 64, "i32": 32, "fp32": 32, "fp64": 64}
    wanted = [sizes["*" if kind.startswith("*") else kind] for kind in kinds]
    rest = list(bits)
    for size in wanted:
        if not rest or rest.pop(0) != size:
            return -1
    return -1 if any(size != 64 for size in rest) else len(rest)


def _served(make, inputs, wrong):
    """Tape 2 x + 1 on zeros, make it a function, and call that on every input; then on one that does not fit."""
    buffer = torch.zeros_like(inputs[0])
    with Tape() as tape:
        out = buffer * 2 + 1
    fast = make(tape, buffer, out)
    if not callable(fast):
        return {"kind": type(fast).__name__}
    found = {"results": [fast(x) for x in inputs]}
    if wrong is not None:
        try:
            fast(wrong)
            found["refused"] = False
        except ValueError:
            found["refused"] = True
    return found


def _trap(answer, inputs, wrong):
    """Which of a tape's rules was broken, in words."""
    if "kind" in answer:
        return f"Expected a function of one tensor, got {answer['kind']}."
    results = answer["results"]
    if any(not isinstance(y, torch.Tensor) for y in results):
        return "Calling it gave no tensor."
    right = [torch.equal(y, 2 * x + 1) for x, y in zip(inputs, results)]
    if all(right):
        if answer.get("refused", True):
            return None
        return (f"An input of shape {tuple(wrong.shape)} went into a buffer of {tuple(inputs[0].shape)} without a "
                "ValueError: copy_ repeated its rows.")  # fmt: skip
    if torch.equal(results[0], torch.ones_like(results[0])):
        return "It still answers for the input that was taped: new numbers have to go into the buffer."
    if right[-1]:
        return "The first result was right, and the second call wrote over it: it is the tape's own memory."
    return f"Expected 2 x + 1: {(2 * inputs[0] + 1).tolist()}, got {results[0].tolist()}."


def _by_search(low, high, percent):
    best = {low - 1: 0}  # best[c]: capacities needed until c is the largest
    for c in range(low, high + 1):
        reach = [best[b] for b in best if 100 * c <= (100 + percent) * (b + 1)]  # b + 1 is the worst served
        best[c] = 1 + min(reach)
    return best[high]


BASE = torch.zeros(12, 12)
ONE, TWO = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)
EXERCISES = {
    "1": Exercise(
        spec=_same_program, run=lambda key, a, b: _kinds(len({key(a), key(b)}) == 1),
        cases={
            "more rows, or fewer": (BASE, BASE[:5]), "the same matrix transposed": (BASE[:, :4], BASE[:4].T),
            "fewer columns, the same strides": (BASE, BASE[:, :4]), "every other row": (BASE, BASE[::2]),
            "another type": (BASE, BASE.int()), "a contiguous copy": (BASE[:, :4], BASE[:, :4].contiguous()),
            "elsewhere in memory": (torch.zeros(3, 12), torch.zeros(7, 12)),
        },
        show=lambda answer, a, b: f"One matrix is {_looks(a)}; the other {_looks(b)}. One kind: their keys are equal.",
        hints=(
            "Print compile_variant(...).source for two matrices. Which numbers stand in the text?",
            "What does the program take as an argument? That must not be in the key.",
            "The text holds the width and both strides; the casts in it hold the type.",
        ),
    ),
    "2": Exercise(
        spec=_extra,
        cases={
            "the toy: two pointers and a number": ([64, 64, 32], ["*fp32", "*fp32", "i32"]),
            "two scratch pointers behind the arguments": ([64, 32, 32, 64, 64], ["*fp16", "i32", "fp32"]),
            "an integer of 64 bits": ([64, 64, 64], ["*fp16", "i64"]),
            "a number where the list has a pointer": ([64, 64, 32], ["*fp16", "i32", "i32"]),
            "fewer parameters than arguments": ([64, 32], ["*fp16", "i32", "i32"]),
            "a number behind the arguments": ([64, 32, 32], ["*fp16", "i32"]),
        },
        hints=(
            "What has to hold for the first parameters, before the ones behind them may be counted?",
            "A pointer is 64 bits wide, whatever it points to. i32 and fp32 are 32, i64 is 64.",
            "Scratch pointers are pointers: whatever follows the arguments must be 64 bits wide, each of them.",
        ),
    ),
    "3": Exercise(
        spec=None, run=_served, judge=_trap,
        cases={
            "one call, on numbers that were not taped": ([ONE], None),
            "a result that is looked at after the next call": ([ONE, TWO], None),
            "an input of one row, where two were taped": ([ONE], ONE[:1]),
        },
        hints=(
            "A tape reads one piece of memory and writes another. Which lines of section 8 moved numbers in and out?",
            "The result is the tape's memory. What has to be handed out in its place?",
            "copy_ broadcasts. Compare shapes before it, and raise ValueError.",
        ),
    ),
    "4": Exercise(
        spec=_by_search,
        cases={
            "100 to 160 rows, 5 %": (100, 160, 5), "one total": (10, 10, 0), "two totals, nothing spare": (64, 65, 0),
            "50 to 200 rows, 10 %": (50, 200, 10), "30 to 300 rows, 2 %": (30, 300, 2),
            "1 to 40 rows, 50 %": (1, 40, 50),
        },
        hints=(
            "Begin with the smallest total. Which capacities may serve it?",
            "Of these, the largest serves the most other totals. Which total is the first that it does not hold?",
            "Whole numbers: the largest capacity for t rows is (100 + percent) * t // 100.",
        ),
    ),
}  # fmt: skip


def _looks(m):
    return f"{tuple(m.shape)}, strides {m.stride()}, {str(m.dtype).removeprefix('torch.')}"
