"""Recorded rows as the tables of lessons 07 and 10, and sentences that follow from them.

Each function takes a frame of `ragged.data.results` and returns rows for `course.table`; none where nothing is
recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data import noted
from ..data.intervals import wilson

if TYPE_CHECKING:
    import pandas as pd

FIXED = ("threshold_l2", "dynamicvit", "dynamicvit:untrained", "evit", "random")  # pruners with a knob called keep
SIGNS = {"above": "+", "below": "−", "unclear": "·"}
SHAPES = (("39", 64), ("99", 64), ("197", 1), ("197", 64), ("U(20,197)", 64), ("577", 32))


# ---- accuracy ----


def shares(rows: pd.DataFrame, tokens: str = "single cut") -> pd.DataFrame:
    """Top-1 accuracy with its 95 % interval: columns model, pruner, keep, share, low, high, images. rows: of the suites
    accuracy or seeds.  tokens: the schedule; rows of the unpruned network come along."""
    rows = rows[rows["metric"].isin(["top1", "images"]) & (rows["mode"] == "eager") & (rows["status"] == "ok")]
    rows = rows[rows["tokens"].isin([tokens, "unpruned"]) & (rows["backend"] != "sdpa_padded")]
    wide = rows.pivot_table(index=["model", "pruner", "keep"], columns="metric", values="value").dropna().reset_index()
    ends = [wilson(share, int(images)) for share, images in zip(wide["top1"], wide["images"])]
    low, high = zip(*ends) if ends else ((), ())
    return wide.rename(columns={"top1": "share"}).assign(low=low, high=high)


def top1(rows: pd.DataFrame, networks: Mapping[str, str], keeps: Sequence[float] = (0.9, 0.7, 0.5, 0.3),
         tokens: str = "single cut") -> list[dict]:  # fmt: skip
    """What each pruner leaves of the accuracy, in per cent with the 95 % interval, a line for each network and pruner.

    rows: of the suite accuracy.  networks: what it was taught, in a word -> its name in the rows.  keeps: the columns.
    tokens: the schedule.
    """
    found, lines = shares(rows, tokens), []
    for word, name in networks.items():
        own = found[(found["model"] == name) & found["pruner"].isin(FIXED)].set_index(["pruner", "keep"])
        for pruner in dict.fromkeys(own.index.get_level_values("pruner")):
            line = {"taught": word, "pruner": pruner}
            for keep in keeps:
                here = (pruner, keep) in own.index
                one = own.loc[(pruner, keep)] if here else None
                line[f"keep {keep:g}"] = (
                    f"{100 * one['share']:.1f} ({100 * one['low']:.0f} to {100 * one['high']:.0f})" if here else "-"
                )
            lines.append(line)
    return lines


def size_correlations(rows: pd.DataFrame, networks: Mapping[str, str]) -> list[dict]:
    """Rank correlation of kept tokens and the size of the object, with its 95 % interval. rows: of the suite accuracy.
    networks: as in `top1`."""
    rows = rows[rows["metric"].str.startswith("size_correlation") & (rows["status"] == "ok")]
    rows = rows[(rows["tokens"] == "single cut") & (rows["backend"] == "triton") & (rows["mode"] == "eager")]
    wide = rows.pivot_table(index=["pruner", "model", "keep"], columns="metric", values="value").sort_index()
    words = {name: word for word, name in networks.items()}
    return [{"pruner": pruner, "taught": words.get(model, model), "keeps": f"{keep:.0%}",
             "correlation": f"{one['size_correlation']:+.2f}",
             "95 %": f"{one['size_correlation_low']:+.2f} to {one['size_correlation_high']:+.2f}"}
            for (pruner, model, keep), one in wide.iterrows() if keep > 0]  # fmt: skip


# ---- seeds ----


def seeds_of(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """`shares` of every training of one network, with a column seed. rows: of the suites seeds and accuracy; those of
    accuracy with the name alone are seed 0."""
    named = rows["model"].where(rows["suite"] != "accuracy", rows["model"] + " seed 0")
    own = rows.assign(model=named)[named.str.startswith(f"{model} seed ")]
    found = shares(own)
    return found.assign(seed=[int(name.rpartition(" ")[2]) for name in found["model"]])


def beside_random(found: pd.DataFrame, keeps: Sequence[float] = (0.7, 0.5, 0.3)) -> list[dict]:
    """Whether a pruner is above (+) or below (−) random choice, or cannot be told apart from it (·): a sign for every
    seed, in order, in a column for every keep. found: what `seeds_of` returns. Pruners that a seed lacks are left
    out."""
    seeds = sorted(set(found["seed"]))
    cells = found.set_index(["pruner", "seed", "keep"])
    lines = []
    for pruner in (p for p in FIXED if p != "random"):
        line = {"pruner": pruner}
        for keep in keeps:
            keys = [((pruner, seed, keep), ("random", seed, keep)) for seed in seeds]
            if all(a in cells.index and b in cells.index for a, b in keys):
                line[f"keep {keep:g}"] = " ".join(_sign(cells.loc[a], cells.loc[b]) for a, b in keys)
        if len(line) > 1:
            lines.append(line)
    return lines


def _sign(one: pd.Series, other: pd.Series) -> str:
    if one["low"] > other["high"]:
        return SIGNS["above"]
    return SIGNS["below"] if one["high"] < other["low"] else SIGNS["unclear"]


def agreed(lines: Sequence[dict]) -> str:
    """What all seeds say alike, and where they differ, in sentences. lines: what `beside_random` returns."""
    said: dict[str, dict[str, list[str]]] = {"above": {}, "below": {}, "unclear": {}, "differ": {}}
    names = {sign: kind for kind, sign in SIGNS.items()}
    for line in lines:
        for column, signs in line.items():
            if column != "pruner":
                kinds = set(signs.split())
                kind = names[kinds.pop()] if len(kinds) == 1 else "differ"
                said[kind].setdefault(line["pruner"], []).append(column.removeprefix("keep "))
    heads = {"above": "above random choice with every seed", "below": "below it with every seed",
             "unclear": "not told apart from it with any seed", "differ": "the seeds disagree"}  # fmt: skip
    return "\n".join(f"{heads[kind]}: " + "; ".join(f"{p} at {', '.join(keeps)}" for p, keeps in found.items())
                     for kind, found in said.items() if found)  # fmt: skip


# ---- training ----


def finetuned(rows: pd.DataFrame) -> list[dict]:
    """Accuracy before and after fine-tuning under a cut, with 95 % intervals. rows: of the suite finetune."""
    rows = rows[rows["status"] == "ok"]
    cells = {(r.model, r.pruner, r.keep, r.tokens, r.metric): r.value for r in rows.itertuples()}
    lines = []
    for model, pruner, keep in sorted({key[:3] for key in cells if key[1] != "none"}):
        line = {"network": model.removeprefix("deit_tiny_"), "pruner": pruner, "keep": f"{keep:g}",
                "unpruned": f"{cells.get((model, 'none', 1.0, 'unpruned', 'top1'), math.nan):.3f}"}  # fmt: skip
        for when in ("before", "after"):
            parts = [cells.get((model, pruner, keep, when, m), math.nan) for m in ("top1", "top1_low", "top1_high")]
            line[when] = "{:.3f} ({:.3f} to {:.3f})".format(*parts)
        lines.append(line)
    return lines


def clocks(rows: pd.DataFrame, metric: str = "gpu_us", dtype: str = "float16") -> dict[tuple, float]:
    """(mode, backend, tokens, batch) -> median of that clock; a `data.Disturbed` where the row is. rows: of the suite
    backward, with the column disturbed."""
    rows = rows[(rows["metric"] == metric) & (rows["dtype"] == dtype) & (rows["status"] == "ok")]
    return {(r.mode, r.backend, r.tokens, int(r.batch)): noted(r.value, r.disturbed) for r in rows.itertuples()}


def backward(us: Mapping[tuple, float], rivals: Mapping[str, str], shapes: Sequence[tuple] = SHAPES) -> list[dict]:
    """Our backward pass: µs, as a multiple of the forward pass, and the rivals' time over ours.

    us: what `clocks` returns.  rivals: name of a backend -> head of its column.  shapes: pairs of tokens and batch.
    """
    lines = []
    for tokens, batch in shapes:
        ours, both = (us.get((mode, "triton", tokens, batch), math.nan) for mode in ("backward", "eager"))
        if math.isnan(ours):
            continue
        line = {"tokens": tokens, "batch": batch, "ours, µs": ours, "over forward": ours / (both - ours)}
        others = {head: us.get(("backward", name, tokens, batch), math.nan) for name, head in rivals.items()}
        lines.append(line | {f"{head} / ours": other / ours for head, other in others.items()})
    return lines


def projection(us: Mapping[tuple, float], shapes: Sequence[tuple] = SHAPES) -> list[dict]:
    """What the gradient of the projection adds to forward and backward, ours and PyTorch's FlashAttention-2, in µs.
    us, shapes: as in `backward`."""
    lines = []
    for tokens, batch in shapes:
        line = {"tokens": tokens, "batch": batch}
        for name, head in (("triton", "ours"), ("torch_varlen", "FlashAttention-2")):
            alone, whole = (us.get(("eager", name + end, tokens, batch), math.nan) for end in ("", ":projection"))
            line |= {f"{head}, µs": alone, f"{head}: adds": whole - alone}
        if not math.isnan(line["ours, µs"]):
            lines.append(line)
    return lines


def training(rows: pd.DataFrame, model: str = "deit_base", batch: int = 256) -> list[dict]:
    """A step of training for every mode, count and backend: images/s, how many times the unpruned step that is and how
    many the arithmetic predicts, peak memory, and its share of the unpruned step's. rows: of the suite training, with
    the column disturbed.  model, batch: which of them."""
    rows = rows[(rows["model"] == model) & (rows["batch"] == batch) & (rows["status"] == "ok")]
    cells = {(r.mode, r.tokens, r.backend, r.metric): noted(r.value, r.disturbed) for r in rows.itertuples()}
    lines = []
    for mode, tokens, backend in sorted({key[:3] for key in cells}):
        names = ("images_per_s", "peak_mb", "flops_ratio")
        speed, memory, flops = (cells.get((mode, tokens, backend, m), math.nan) for m in names)
        base = [cells.get((mode, "197", "unpruned", m), math.nan) for m in names[:2]]
        line = {"mode": mode, "tokens": tokens, "backend": backend, "images/s": speed, "speed-up": speed / base[0]}
        lines.append(line | {"predicted": flops, "peak GB": memory / 1024, "of unpruned": memory / base[1]})
    return lines


def told(lines: Sequence[dict]) -> str:
    """What the eager steps say: whether they follow their arithmetic, and what dense gathers and padding do beside the
    ragged kernel. lines: what `training` returns."""
    cells = {(one["tokens"], one["backend"]): one for one in lines if one["mode"] == "eager"}
    ours = {tokens: one for (tokens, backend), one in cells.items() if backend == "triton"}
    said = [f"{tokens} tokens: {one['speed-up']:.2f} times the unpruned step, {one['predicted']:.2f} predicted"
            for tokens, one in ours.items()]  # fmt: skip
    for name, words in (("dense", "a dense gather"), ("sdpa_padded", "padding to the longest")):
        for tokens, one in ours.items():
            if (tokens, name) in cells:
                share = cells[tokens, name]["images/s"] / one["images/s"]
                said.append(f"{tokens} tokens: {words} makes {share:.2f} of our images/s")
    return "\n".join(said)


# ---- memory ----


def kept_mb(model: nn.Module, images: Tensor) -> float:
    """What autograd keeps of a forward pass for the backward pass, in MiB, weights not counted. images: float (batch,
    3, height, width)."""
    held: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(images)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in held.items() if place not in own) / 2**20
