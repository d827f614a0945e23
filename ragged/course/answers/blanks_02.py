"""What a check of lesson 02 says about a blank of the kernel: whose rows were touched, which scores counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:  # it imports Triton
    from ..lab import Call, Run


def filled(part: str) -> Callable:
    """How an answer to the blank `part` is tried: (function, options of `lab.batch`) -> the run."""

    def run(yours: Callable, options: dict) -> Run:
        from .. import lab

        return lab.attend(lab.batch(**options), {part: yours})

    return run


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> "0 to 2 and 7"."""
    runs: list[list[int]] = []
    for n in sorted({int(n) for n in numbers}):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    said = [f"{a} to {b}" if b > a else str(a) for a, b in runs[:4]] + ["so on"] * (len(runs) > 4)
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def named(rows: Sequence[int], word: str = "row") -> str:
    """[65, 66] -> "rows 65 to 66"."""
    return f"{word}{'s' * (len({*map(int, rows)}) > 1)} {spans(rows)}"


def _belong(run: Run, rows: Sequence[int]) -> str:
    """To whom packed rows belong, as the end of a sentence about them."""
    ends, total = run.cu[1:].tolist(), int(run.cu[-1])
    images = sorted({sum(end <= row for end in ends) for row in rows if 0 <= row < total})
    past = any(not 0 <= row < total for row in rows)
    several = len(rows) > 1
    said = [f"{'belong' if several else 'belongs'} to {named(images, 'image')}"] if images else []
    return " or ".join(said + [f"{'lie' if several else 'lies'} past the end of the tensor"] * past)


def _of(run: Run, call: Call) -> str:
    n = run.lengths[call.image]
    tile = f", the tile from its row {call.first}" if n > run.tile else ""
    return f"An image of {n} token{'s' * (n != 1)}{tile}:"


def _broken(run: Run, image: int) -> str:
    """What the neighbour's NaN did to an image."""
    bad = int(run.out[run.rows(image)].isnan().flatten(1).any(1).sum())
    if run.nan is None or not bad:
        return ""
    return f" The neighbour is NaN here, and so are now {bad} of the image's {run.lengths[image]} rows."


# ---- the four blanks ----


def addresses(run: Run, options: dict) -> str | None:
    """What is wrong with tile_at."""
    if run.said:
        return run.said
    for call in (c for c in run.calls if c.part == "tile_at"):
        own = run.rows(call.image)
        lanes = np.arange(min(run.tile, run.lengths[call.image] - call.first))
        want = ((own.start + call.first + lanes)[:, None] * run.heads + call.head) * run.dim + np.arange(run.dim)
        got = call.got["addresses"][: len(lanes)].astype(np.int64)
        if (got == want).all():
            continue
        run.program, at = (call.image, call.head), tuple(np.argwhere(got != want)[0])
        return (f"{_of(run, call)} {_misread(run, call, want, got)}. Place {list(map(int, at))} of the tile: "
                f"expected address {want[at]}, got {got[at]}.")  # fmt: skip
    return None


def _misread(run: Run, call: Call, want: np.ndarray, got: np.ndarray) -> str:
    """What addresses mean that are not the wanted ones."""
    width, own, total = run.heads * run.dim, run.rows(call.image), int(run.cu[-1])
    rows, wanted = ({*(x // width).ravel().tolist()} for x in (got, want))
    heads = {*(got // run.dim % run.heads).ravel().tolist()}
    if any(not 0 <= row < total for row in rows):
        return f"some of its addresses lie outside of the tensor, whose last is {total * width - 1}"
    mine = range(own.start, own.stop)
    if foreign := sorted(rows - {*mine}):
        return f"it reads packed {named(foreign)}, which {_belong(run, foreign)}; its own are {spans(mine)}"
    if rows != wanted:
        return f"it reads packed {named(rows)} where {named(wanted)} should be"
    if heads != {call.head}:
        return f"the program of head {call.head} reads numbers of {named(heads, 'head')}"
    return "it reads the right rows and the right head, but puts the numbers into the wrong places"


def loads(run: Run, options: dict) -> str | None:
    """What is wrong with row_mask."""
    if run.said:
        return run.said
    for call in (c for c in run.calls if c.part == "row_mask"):
        n, got = run.lengths[call.image], call.got["mask"][:, 0]
        rows = call.first + np.arange(run.tile)
        more, less = rows[got & (rows >= n)], rows[~got & (rows < n)]
        run.program = (call.image, call.head)
        if len(more):
            whose = _belong(run, (run.rows(call.image).start + more).tolist())
            whose = whose.replace(f"to image {call.image + 1}", "to its neighbour")
            return (f"{_of(run, call)} {named(more)} {whose}, and the mask lets {'them' if len(more) > 1 else 'it'} in."
                    f"{_broken(run, call.image)}")  # fmt: skip
        if len(less):
            are, them = ("are", "them") if len(less) > 1 else ("is", "it")
            return f"{_of(run, call)} {named(less)} {are} its own, and the mask keeps {them} out."
    run.program = None
    return None


def scores(run: Run, options: dict) -> str | None:
    """What is wrong with mask_scores."""
    if run.said:
        return run.said
    for call in (c for c in run.calls if c.part == "mask_scores"):
        n, keys = run.lengths[call.image], call.first + np.arange(run.tile)
        before, after = call.given["scores"], call.got["scores"]
        own = (keys < n)[None, :] & np.ones_like(after, dtype=bool)
        here, gone = _of(run, call), np.isneginf(after)
        run.program = (call.image, call.head)
        if (own & gone).any():
            if (gone.all(1) | ~gone.any(1)).all() and not gone.all():
                return f"{here} the mask runs along the rows, which are queries. Keys are the columns."
            shut = keys[(own & gone).any(0)]
            are, their = ("are", "their") if len(shut) > 1 else ("is", "its")
            return f"{here} {named(shut, 'key')} {are} its own, and {their} scores became -inf."
        open_ = ~own & ~gone
        if open_.any():
            values = after[open_]
            what = named(keys[open_.any(0)], "key")
            are, their = ("are", "their") if open_.any(0).sum() > 1 else ("is", "its")
            count = f"{here} {what} {are} not its own, and {their} scores"
            if (values == 0).all():
                return (f"{count} are 0, as those of rows that the load mask kept out. "
                        "exp2(0 - max) is a weight like any other; only -inf has none.")  # fmt: skip
            if np.array_equal(values, before[open_], equal_nan=True):
                return f"{count} are as they came: each takes a share of the softmax."
            return (f"{count} became {values.flat[0]:.4g}. That is finite: beside scores that are "
                    "lower still it wins. Only -inf never does.")  # fmt: skip
        if not np.array_equal(before[own], after[own], equal_nan=True):
            return f"{here} scores of its own keys were changed."
    run.program = None
    return None


def folds(run: Run, options: dict) -> str | None:
    """What is wrong with fold."""
    if run.said:
        return run.said
    good = torch.isclose(run.out.double(), run.want, 2e-4, 1e-5)
    if good.all():
        return None
    seen: list[np.ndarray] = []
    for call in (c for c in run.calls if c.part == "fold"):
        seen = [*seen, call.given["scores"]] if call.first else [call.given["scores"]]
        every = np.concatenate(seen, 1).astype(np.float64)
        top = every.max(1)
        total = np.exp2(every - top[:, None]).sum(1)
        with np.errstate(all="ignore"):
            yours = call.got["total"] * np.exp2(call.got["top"].astype(np.float64) - top)
        tiles = f"after {len(seen)} tile{'s' * (len(seen) > 1)} of keys"
        n = run.lengths[call.image]
        if not np.isfinite(call.got["acc"]).all() or not np.isfinite(call.got["total"]).all():
            row = int(np.argwhere(~np.isfinite(call.got["total"]) | ~np.isfinite(call.got["acc"]).all(1))[0, 0])
            why = "Before the first tile top is -inf: what does your factor become then?"
            if top[row] > 120:  # a float32 ends at 2 ** 128
                why = (f"Its scores reach {top[row]:.4g}, and 2 to that power overflows: what is summed must be "
                       "relative to the largest score so far.")  # fmt: skip
            return f"An image of {n} tokens: {tiles} row {row} holds the sum {call.got['total'][row]:.4g}. {why}"
        off = ~np.isclose(yours, total, 1e-3)
        if off.any():
            row = int(off.argmax())
            right = total[row] * np.exp2(top[row] - call.got["top"][row])
            return (f"An image of {n} tokens: {tiles} the sum of row {row} is {call.got['total'][row]:.4g}; relative "
                    f"to the maximum that you return it should be {right:.4g}.")  # fmt: skip
    bad = (~good).flatten(1).any(1)
    image = next(i for i in range(len(run.lengths)) if bad[run.rows(i)].any())
    rows = named(bad[run.rows(image)].nonzero().flatten().tolist())
    return (f"An image of {run.lengths[image]} tokens: the sums are right, but the output of {rows} is not. Does acc "
            "shrink as total does?")  # fmt: skip


# ---- what is drawn ----


def _program(run: Run) -> tuple[int, int]:
    """(image, head) of the program to draw: that of the complaint, or of the longest image that ends inside a tile."""
    n, tile = run.lengths, run.tile
    return run.program or (max(range(len(n)), key=lambda image: (n[image] % tile > 0, n[image])), 0)


def memory(run: Run, options: dict) -> object:
    """Which numbers of q, k and v one program read."""
    if run.said:
        return None
    from ...plots import touched_rows

    total, width, (image, head) = int(run.cu[-1]), run.heads * run.dim, _program(run)
    touches = [t for t in run.touches if t.kind == "load" and t.program[:2] == (image, head) and t.name != "Cu"]
    places = np.concatenate([t.touched for t in touches] or [np.zeros(0, dtype=np.int64)])
    past = max(0, min(run.tile, int(places.max(initial=0)) // width + 1 - total))
    touched = np.zeros((total + past) * width, dtype=bool)
    touched[places[(places >= 0) & (places < touched.size)]] = True
    needed = np.zeros((total + past, run.heads, run.dim), dtype=bool)
    needed[run.rows(image), head] = True
    return touched_rows(run.lengths, touched.reshape(-1, width).T, needed.reshape(-1, width).T,
                        title="Which numbers a program reads", below=f"image {image}, head {head}",
                        across="number in the row",
                        words=("read", "read, but not its own", "its own, not read"))  # fmt: skip


def softmax_keys(run: Run, options: dict) -> object:
    """Which keys took part in the softmax of one program's first query tile."""
    if run.said:
        return None
    from ...plots import touched_rows

    total, (image, head) = int(run.cu[-1]), _program(run)
    first, n = run.rows(image).start, run.lengths[image]
    calls = [c for c in run.calls if (c.part, c.image, c.head) == ("mask_scores", image, head)][: -(-n // run.tile)]
    room = max(total, first + len(calls) * run.tile)
    touched, needed = np.zeros((2, min(n, run.tile), room), dtype=bool)
    needed[:, run.rows(image)] = True
    for call in calls:
        reach = slice(first + call.first, first + call.first + run.tile)
        touched[:, reach] = ~np.isneginf(call.got["scores"][: len(touched)])
    width = max(total, int(touched.any(0).nonzero()[0].max(initial=0)) + 1)
    return touched_rows(run.lengths, touched[:, :width], needed[:, :width], title="Which keys count in the softmax",
                        below=f"image {image}, head {head}, its first query tile", across="query row",
                        words=("counts", "counts, but is no key of the image", "its key, does not count"))  # fmt: skip


def output(run: Run, options: dict) -> object:
    """Which numbers of the output are right."""
    if run.said:
        return None
    from ...plots import touched_rows

    good = torch.isclose(run.out.double(), run.want, 2e-4, 1e-5).flatten(1).T.numpy()
    return touched_rows(run.lengths, np.ones_like(good), good, title="Which numbers of the output are right",
                        below="all programs", across="number in the row",
                        words=("right", "wrong", "not written"))  # fmt: skip


# ---- the kernel with a third grid axis ----


def third_axis(yours: Callable, options: dict) -> Run:
    """How a kernel with the log-sum-exp is tried: one program for each image, head and query tile of the longest."""
    from .. import lab, touched

    run = lab.batch(**options)
    total, tiles = int(run.cu[-1]), -(-max(run.lengths) // run.tile)
    run.touches += touched.trace(
        yours, (len(run.lengths), run.heads, tiles), run.q, run.k, run.v, run.out, run.lse, run.cu, run.scale_log2,
        total, run.heads, run.dim, run.tile,
    )  # fmt: skip
    return run


def _writers(run: Run, size: int, name: str) -> list[list[tuple]]:
    """The programs that wrote each place of a tensor."""
    found: list[list[tuple]] = [[] for _ in range(size)]
    for touch in run.touches:
        if touch.kind == "store" and touch.name == name:
            for place in touch.touched:
                if 0 <= place < size:
                    found[place].append(touch.program)
    return found


def written(run: Run, options: dict) -> str | None:
    """What is wrong with where a kernel with three grid axes writes, and then with what."""
    total, width = int(run.cu[-1]), run.heads * run.dim
    for touch in (t for t in run.touches if t.kind == "store"):
        size = {"Out": total * width, "Lse": total * run.heads}.get(touch.name, 0)
        if ((touch.touched < 0) | (touch.touched >= size)).any():
            where = f"past the end of {touch.name}" if size else "outside of Out and Lse"
            return f"Program {touch.program} (image, head, query tile) writes {where}."
    for name, numbers in (("Out", width), ("Lse", run.heads)):
        found = _writers(run, total * numbers, name)
        for image, n in enumerate(run.lengths):
            rows = range(run.rows(image).start, run.rows(image).stop)
            at = (lambda r: r * width) if name == "Out" else (lambda r: r)  # a row's place in head 0
            if none := [r - rows.start for r in rows if not found[at(r)]]:
                verb = "are" if len(none) > 1 else "is"
                return f"An image of {n} tokens: {named(none)} of {name} in head 0 {verb} never written."
            for r in rows:
                if len(programs := sorted({*found[at(r)]})) > 1:
                    return (f"An image of {n} tokens: row {r - rows.start} of {name} in head 0 is written by several "
                            f"programs, {programs[0]} and {programs[1]} (image, head, query tile). Each has one query "
                            "tile: the third axis takes the place of the loop over them.")  # fmt: skip
    good = torch.isclose(run.out.double(), run.want, 2e-4, 1e-5, equal_nan=True).flatten(1).all(1)
    for image, n in enumerate(run.lengths):
        if not good[run.rows(image)].all():
            bad = (~good[run.rows(image)]).nonzero().flatten().tolist()
            return f"An image of {n} tokens: {named(bad)} of Out {'are' if len(bad) > 1 else 'is'} wrong."
    return _logarithm(run)


def _logarithm(run: Run) -> str | None:
    """What is wrong with the values of Lse."""
    got, want = run.lse.double(), run.want_lse
    if torch.allclose(got, want, 1e-4, 1e-4, equal_nan=True):
        return None
    own = want.isfinite()
    head, row = (~torch.isclose(got, want, 1e-4, 1e-4, equal_nan=True)).nonzero()[0].tolist()
    said = f"head {head}, packed row {row} should be {want[head, row]:.4g}, is {got[head, row]:.4g}"
    if torch.allclose(got[own] * np.log(2), want[own], 1e-4, 1e-4):
        return f"Out is right, Lse is the logarithm to base 2 where the natural one is asked: {said}."
    return f"Out is right, Lse is not: {said}. The sum is relative to the maximum, and both count in powers of two."


def logarithms(run: Run, options: dict) -> object:
    """Which log-sum-exps are right, and which were never written."""
    from ...plots import touched_rows

    good = torch.isclose(run.lse.double(), run.want_lse, 1e-4, 1e-4, equal_nan=True).numpy()
    there = np.array([bool(w) for w in _writers(run, good.size, "Lse")]).reshape(good.shape)
    return touched_rows(run.lengths, there, good | ~there, title="Which log-sum-exps are right",
                        below="all programs; a number for each head and row", across="head",
                        words=("right", "wrong", "not written"))  # fmt: skip
