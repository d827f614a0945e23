"""From ratios to verdicts: one rule for every claim of the paper, and one for every objection to it.

A claim is measured twice, in the paper's setup and in a fair one (`ragged.bench.claims`). What holds in the fair one
stands. A claim above what the arithmetic allows cannot stand: it is held against what is allowed, and stands in kind
alone. What holds only in the paper's setup is named after what the fair one changed: the baseline, or something else.
An objection is judged on every batch that the paper names and that is recorded, never on one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .. import data
from ..data.evidence import BASELINE, IN_KIND, NOT_HERE, SETUP, STANDS, UNTESTED, VERDICTS
from .claims import Claim
from .paper import BEST, KERNEL, NAN, Rows

SHARE, CLOSE = 0.5, 0.05  # of a gain that must arrive; around an equality, and above the arithmetic

# Reasons, as the claims have them: the family they are counted in, and what their fair setup changes.
GROUPS = {
    "floor": ("launching", "mode"), "flat": ("launching", "clock"), "nested": ("launching", "clock"),
    "loses": ("launching", "clock"), "share": ("shares of overhead", "clock"), "padded call": ("padding", "baseline"),
    "padded model": ("padding", "baseline"), "padded slower": ("padding", "baseline"),
    "packing": ("padding", "baseline"), "over FA2": ("FlashAttention-2, whole models", "mode"),
    "like FA2": ("FlashAttention-2, whole models", "mode"), "over unpruned": ("pruned over unpruned", "mode"),
    "logits": ("same answers", "networks"), "same class": ("same answers", "networks"),
    "accuracy": ("accuracy", "nothing"),
}  # fmt: skip


def holds(kind: str, claimed: float, measured: float, share: float = SHARE) -> bool:
    """Whether a measured ratio bears a claim out; never for NaN. gain: at least `share` of it arrived, a claim below 1
    turned round. equal: within 5 %. bound: not above. least: not below."""
    if kind == "gain":
        if claimed < 1:
            claimed, measured = 1 / claimed, 1 / measured
        return measured - 1 >= share * (claimed - 1)
    if kind == "equal":
        return abs(measured / claimed - 1) <= CLOSE
    return measured <= claimed if kind == "bound" else measured >= claimed


def verdict(kind: str, claimed: float, paper_setup: float, fair: float, changes: str = "baseline",
            ceiling: float = NAN, share: float = SHARE) -> str:  # fmt: skip
    """One of VERDICTS. paper_setup, fair: the measured ratios, NaN where nothing is recorded.  changes: what the fair
    setup changes, as in GROUPS.  ceiling: what the arithmetic allows, NaN where it sets no bound.  share: as for
    `holds`."""
    if math.isnan(fair):
        return UNTESTED
    above = kind == "gain" and claimed > ceiling * (1 + CLOSE)  # never for NaN
    possible = ceiling if above else claimed
    if holds(kind, possible, fair, share):
        return IN_KIND if above else STANDS
    if holds(kind, possible, paper_setup, share):
        return BASELINE if changes == "baseline" else SETUP
    return NOT_HERE


def judged(claims: Sequence[Claim], rows: Rows, share: float = SHARE):
    """A frame with a line for every claim: claim, family, kind, claimed, paper_setup, fair, ceiling, stand_in (what
    stands in for the paper's batch, or NaN), disturbed (whether a disturbed row went into one of the two ratios),
    group, verdict. rows: those of one GPU."""
    import pandas

    found = []
    for one in claims:
        family, changes = GROUPS[one.group]
        rows.touched = False
        ratios = dict(paper_setup=one.paper_setup(rows), fair=one.fair(rows))
        shaky = rows.touched
        ceiling = one.ceiling(rows)
        found.append(dict(
            claim=one.claim, family=family, kind=one.kind, claimed=one.claimed, **ratios, ceiling=ceiling,
            stand_in=one.substituted(rows), disturbed=shaky, group=one.group,
            verdict=verdict(one.kind, one.claimed, **ratios, changes=changes, ceiling=ceiling, share=share),
        ))  # fmt: skip
    return pandas.DataFrame(found)


def by_family(frame):
    """How many claims of each family got each verdict: a frame, families × VERDICTS, of what `judged` returns."""
    import pandas

    table = pandas.crosstab(frame["family"], frame["verdict"])
    return table.reindex(columns=list(VERDICTS), fill_value=0).loc[list(dict.fromkeys(frame["family"]))]


# ---- objections ----

EVERYWHERE, SOMEWHERE, NOWHERE = OUTCOMES = ("upheld", "upheld at some batches only", "not upheld")
APART = 1.1  # what is said to differ differs by 10 %; what is said not to, by less


class Objection(NamedTuple):
    """pair: `(rows, batch)` to the ratio that the objection is about; sides: that ratio in words.  batches: those that
    the paper names for it.  alike: whether it says that the two sides hardly differ; limit: the ratio that lies
    between."""

    text: str
    sides: str
    pair: object
    batches: tuple[float, ...]
    alike: bool = False
    limit: float = APART


MODEL_BATCHES, CALL_BATCHES = (4, 16, 32, 64, 128, 256, 512), (4, 16, 32, 64)


def objections() -> list[Objection]:
    """The six of notebook 08."""
    gpu = dict(clock="gpu_us")
    return [
        Objection("1 the padded baseline is a straw man", "images/s: fair padding over the paper's, both eager",
                  lambda r, b: r.speed("sdpa_padded", b) / r.speed("paper_padded", b), MODEL_BATCHES),
        Objection("2 equal counts need no ragged kernel", f"images/s: the paper's kernel over a dense gather, {BEST}",
                  lambda r, b: r.speed("paper_triton", b, BEST) / r.speed("dense", b, BEST), MODEL_BATCHES, True),
        Objection("3 FA2's GPU time is flat on short images", "GPU time of a call: 99 tokens over 39",
                  lambda r, b: r.call("flash_attn", "99", b, **gpu) / r.call("flash_attn", "39", b, **gpu),
                  CALL_BATCHES, True, 1.5),
        Objection("4 the unpruned baseline is eager", f"images/s: {BEST} over eager",
                  lambda r, b: r.speed("unpruned", b, BEST) / r.speed("unpruned", b), MODEL_BATCHES),
        Objection("5 NestedTensor is timed with its making", "wall time of a call: made inside over made outside",
                  lambda r, b: r.call("paper_nested", "39", b) / r.call("nested", "39", b), CALL_BATCHES),
        Objection("6 three copies per layer are not free", "GPU time of a call: with copies over contiguous",
                  lambda r, b: r.call("paper_triton", "197", b, **gpu) / r.call(KERNEL, "197", b, **gpu), CALL_BATCHES),
    ]  # fmt: skip


def settle(objection: Objection, rows: Rows) -> tuple[str, dict[float, float]]:
    """One of OUTCOMES, or UNTESTED where no batch is recorded; and the ratio at every batch that is, a
    `data.Disturbed` where it rests on a disturbed row."""
    ratios = {}
    for batch in objection.batches:
        rows.touched = False
        ratio = objection.pair(rows, batch)
        if not math.isnan(ratio):
            ratios[batch] = data.noted(ratio, rows.touched)
    if not ratios:
        return UNTESTED, ratios
    upheld = [(ratio < objection.limit) == objection.alike for ratio in ratios.values()]
    return (EVERYWHERE if all(upheld) else SOMEWHERE if any(upheld) else NOWHERE), ratios
