"""The paper beside recorded rows, and its claims as ratios.

`beside` finds for every row of a table of the paper what was recorded. A `Claim` is what the paper claims, the same
comparison in the paper's setup, and a fair one. paper_setup repeats the paper's comparison: its baseline, its clock,
eager. fair gives both sides the same: padding to the longest with fused attention, compile + graph for both, or host
and GPU time apart. Both are functions of `Rows`. A value that is not recorded is NaN, and breaks nothing; the verdict
is left to whoever asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .. import data

NAN = float("nan")
KERNEL = "paper_triton:contiguous"  # the paper timed its kernel on contiguous q, k and v; its models copy
ALL_MODES = ("eager", "graph", "compile+graph")


class Rows:
    """Recorded rows of one GPU, a frame as `ragged.data.results` returns it. Values are asked for by metric and
    columns; a list allows several values. bfloat16, measured beside float16, is only found where dtype asks for it.
    `touched` says whether a disturbed row was among those that were looked at since somebody set it to False."""

    def __init__(self, rows):
        self.rows = rows[rows["status"] == "ok"]
        judged = {"batch", "tokens", "q20", "q80"} <= set(self.rows.columns) and len(self.rows)
        self.disturbed = data.disturbed(self.rows) if judged else self.rows["status"] != "ok"
        self.touched = False
        self.by_metric = dict(tuple(self.rows.groupby("metric")))  # every question is of one

    def values(self, metric: str, **columns):
        found = self.by_metric.get(metric, self.rows[:0])
        there = found["value"].notna()
        if "dtype" not in columns:
            there &= found["dtype"] != "bfloat16"
        for column, wanted in columns.items():
            there &= found[column].isin(wanted if isinstance(wanted, list) else [wanted])
        found = found.loc[there, "value"]
        self.touched |= bool(self.disturbed[found.index].any())
        return found

    def value(self, metric: str, **columns) -> float:
        """The first value there is, a `data.Disturbed` where its row is."""
        found = self.values(metric, **columns)
        return data.noted(found.iloc[0], self.disturbed[found.index[0]]) if len(found) else NAN

    def call(self, backend, tokens="39", batch=32, mode="eager", clock="wall_us") -> float:
        """µs of one attention call."""
        return self.value(clock, suite="attention", backend=backend, tokens=tokens, batch=batch, mode=mode)

    def speed(self, backend, batch=64, mode="eager", model="deit_base", tokens="99", suite="model") -> float:
        """Images per second of a whole model that keeps half of its patches; of "unpruned", all."""
        if backend == "unpruned":
            tokens = {"289": "577"}.get(tokens, "197")
        at = dict(suite=suite, model=model, batch=batch, mode=mode)
        return self.value("images_per_s", backend=backend, tokens=tokens, **at)

    def peak(self, backend, model="deit_base", modes=("eager",)) -> float:
        """The best images per second over batches and modes."""
        tokens = "197" if backend == "unpruned" else "99"
        at = dict(suite="model", model=model, backend=backend, tokens=tokens, mode=list(modes))
        return float(self.values("images_per_s", **at).max())

    def sparse(self, metric, pruner, keep, mode="eager", backend="triton") -> float:
        """A value of DeiT-B at batch 64 under a pruner that was asked to keep this share."""
        knob = dict(tokens=f"samples={round(196 * keep)}") if pruner == "ats" else dict(keep=keep)
        return self.value(metric, suite="sparsity", batch=64, mode=mode, pruner=pruner, backend=backend, **knob)

    def cut(self, pruner, keep, mode="eager", backend="triton") -> float:
        """Times the unpruned model's images per second, DeiT-B at batch 64."""
        unpruned = self.value("images_per_s", suite="sparsity", batch=64, mode=mode, backend="unpruned")
        return self.sparse("images_per_s", pruner, keep, mode, backend) / unpruned

    def near(self, batch: float) -> float:
        """The batch nearest to this one, by ratio, at which the paper's pipelines are recorded."""
        at = dict(suite="model", backend="paper_padded", tokens="99", model="deit_base", mode="eager")
        there = self.rows.loc[self.values("images_per_s", **at).index, "batch"]
        return min(there, key=lambda b: (abs(math.log(b / batch)), -b), default=batch)  # of two as near, the larger

    def floor(self, backend, clock="wall_us") -> float:
        """The least µs of a call at batch 32: what is left when the GPU has next to nothing to do."""
        return min(self.call(backend, tokens, clock=clock) for tokens in ("39", "99", "197"))

    def nested_slowdown(self, backend="paper_nested") -> float:
        """The largest ratio of its wall time to FlashAttention-2's over all recorded shapes."""
        at = dict(suite="attention", mode="eager")
        slow, fast = (self.rows.loc[self.values("wall_us", backend=b, **at).index] for b in (backend, "flash_attn"))
        both = slow.merge(fast, on=["batch", "tokens"])
        return float((both["value_x"] / both["value_y"]).max())

    def largest_gain(self, backend, rival, mode="eager") -> float:
        """The largest ratio of images per second at 384 pixels."""
        at = dict(tokens="289", suite="resolution", mode=mode)
        found = [self.speed(backend, b, **at) / self.speed(rival, b, **at) for b in (1, 4, 16, 64)]
        return max((f for f in found if f == f), default=NAN)


# ---- the counterpart of a row of the paper; the names are those of the tables ----


def own_name(backend: str) -> str:
    """What the paper's backend is called in the suite `attention`."""
    return {"paper_triton": KERNEL, "library_varlen": "torch_varlen"}.get(backend, backend)


def attention_call(r: Rows, row) -> float:
    tokens = "39" if row.tokens == 40 else f"{row.tokens:.0f}"  # 39 stands for v2's 40
    return r.call(own_name(row.backend), tokens, row.batch, clock=row.metric.replace("_ms", "_us")) / 1e3


def dispatch_floor(r: Rows, row) -> float:
    if row.metric == "slowdown":
        return r.nested_slowdown()
    clock = "wall_us" if row.clock == "wall+sync" else "event_us"
    value = r.floor(own_name(row.backend), clock)
    return value if row.metric == "dispatch_floor_us" else r.floor(row.baseline, clock) / value


def overhead_share(r: Rows, row) -> float:
    backend = own_name(row.backend)
    return 100 * r.floor(backend) / r.call(backend, f"{row.tokens:.0f}")


def end_to_end_speedup(r: Rows, row) -> float:
    batch = r.near(row.batch)
    return r.speed(row.backend, batch) / r.speed(row.baseline, batch)


def end_to_end_throughput(r: Rows, row) -> float:
    return r.speed(row.backend, row.batch)


def peak_throughput(r: Rows, row) -> float:
    return r.peak("unpruned" if row.backend == "dense" else row.backend, row.model)


def high_resolution_speedup(r: Rows, row) -> float:
    return r.largest_gain(row.backend, row.baseline)


def speedup_over_unpruned(r: Rows, row) -> float:
    """Our kernel stands beside the paper's: the suite `sparsity` runs no other ragged one."""
    if row.metric == "speedup_ceiling":
        return float(r.values("flops_ratio", suite="sparsity", keep=0.1).max())
    if row.backend == "paper_padded":  # recorded for one pruner at one keep rate
        same = row.pruner == "threshold_l2" and row.pruned == 0.5
        return r.speed("paper_padded") / r.speed("unpruned") if same else NAN
    return r.cut(row.pruner or "threshold_l2", round(1 - row.pruned, 1))


def equivalence(r: Rows, row) -> float:
    which = {"pruner": row.pruner} if row.pruner else {}
    at = dict(suite="equivalence", model="deit_small", dtype="float16", backend="paper_triton")
    found = r.values(row.metric, **at, **which)
    return float(found.min() if row.metric == "top1_agreement" else found.max())


def stages(r: Rows, row) -> float:
    """Only packing is recorded on its own, at batch 16."""
    way = {"paper_padded": "python_loop", "paper_triton": "triton"}[row.backend]
    at = dict(suite="pack", batch=16, tokens="99", mode="eager")
    return r.value("event_us", backend=way, **at) / 1e3 if row.metric == "pack_event_ms" else NAN


def accuracy(r: Rows, row) -> float:
    """Throughput from the suite `model`. Top-1 only where somebody recorded ImageNet."""
    if row.metric == "top1":
        models = ["deit_small_imagenet", "deit_small:imagenet"]
        keep = 1 - row.pruned
        return 100 * r.value("top1", suite="accuracy", model=models, keep=keep, pruner=row.pruner or "none")
    backend = {0.0: "unpruned", 0.5: "paper_triton"}.get(row.pruned)
    return r.peak(backend, "deit_small") if backend else NAN


LOOK_UP = {f.__name__: f for f in (
    attention_call, dispatch_floor, overhead_share, end_to_end_speedup, end_to_end_throughput, peak_throughput,
    high_resolution_speedup, speedup_over_unpruned, equivalence, stages, accuracy,
)}  # fmt: skip


def beside(table: str, sources: dict[str, Rows]):
    """Every row of a paper's table with its counterpart in every source: a frame with case, backend, what, metric,
    unit, paper, and a column per source. Tables without a counterpart (protocols) get NaN."""
    import pandas

    find, rows = LOOK_UP.get(table.partition("_")[2]), []
    for row in data.paper(table).itertuples():
        parts = [row.model.replace("deit_", "DeiT-"), row.pruner]
        parts += [f"batch {row.batch:.0f}"] if row.batch == row.batch else []
        parts += [f"{row.tokens:.0f} tokens"] if row.tokens == row.tokens else []
        parts += [f"{row.pruned:.0%} pruned"] if row.pruned == row.pruned else []
        parts += [row.bound]
        what = row.backend + (f" / {row.baseline}" if row.baseline else "")
        found = {name: find(r, row) if find else NAN for name, r in sources.items()}
        rows.append({"case": ", ".join(p for p in parts if p) or row.metric.replace("_", " "), "backend": row.backend,
                     "what": what, "metric": row.metric, "unit": row.unit, "paper": row.value} | found)  # fmt: skip
    return pandas.DataFrame(rows)


# ---- the claims ----

BEST = "compile+graph"
Ratio = Callable[[Rows], float]


class Claim(NamedTuple):
    """kind: "gain" (so many times faster), "equal", "bound" (at most) or "least" (at least). group: which reason.
    ceiling: what the arithmetic allows a gain at most, where that is known. asked: the batch of the paper, where the
    one that is recorded nearest to it stands in for it."""

    claim: str
    kind: str
    claimed: float
    paper_setup: Ratio
    fair: Ratio
    group: str
    ceiling: Ratio = lambda r: NAN
    asked: float = NAN

    def substituted(self, rows: Rows) -> float:
        """The batch that stands in for the paper's in these rows; NaN where its own is recorded or none is named."""
        near = rows.near(self.asked) if self.asked == self.asked else NAN
        return NAN if near == self.asked else near


def said(table: str, metric: str, over: str | None = None, **row) -> float:
    """A figure of the paper, NaN where it states none; with `over`, its ratio to the same figure of that other
    backend."""
    frame = data.paper(table)
    frame = frame[frame["metric"] == metric]
    for column, wanted in row.items():
        frame = frame[frame[column] == wanted]
    value = float(frame["value"].iloc[0]) if len(frame) else NAN
    return value if over is None else value / said(table, metric, **(row | {"backend": over}))


def faster(slow: str, fast: str, **at) -> Ratio:
    """How many times longer a call of `slow` takes."""
    return lambda r: r.call(slow, **at) / r.call(fast, **at)


def longer(backend: str, clock: str) -> Ratio:
    """A call at 197 tokens over one at 39."""
    return lambda r: r.call(backend, "197", clock=clock) / r.call(backend, "39", clock=clock)


def ahead(backend: str, rival: str, batch: float, mode: str = "eager") -> Ratio:
    """Images per second of one whole model over another's, at the recorded batch nearest to this."""
    return lambda r: r.speed(backend, r.near(batch), mode) / r.speed(rival, r.near(batch), mode)


def peaks(rival: str, model: str, modes) -> Ratio:
    return lambda r: r.peak("paper_triton", model, modes) / r.peak(rival, model, modes)


def packing(way: str) -> Ratio:
    at = dict(suite="pack", batch=16, tokens="99", mode="eager")
    return lambda r: r.value("event_us", backend=way, **at) / r.value("event_us", backend="triton", **at)


def differences(metric: str, best: Callable, *models: str) -> Ratio:
    at = dict(suite="equivalence", dtype="float16", backend="paper_triton", model=list(models))
    return lambda r: float(best(r.values(metric, **at), default=NAN))


def call_claims() -> list[Claim]:
    """One attention call."""
    v1, floor = dict(table="v1_attention_call", metric="wall_ms"), "dispatch_floor_us"
    fa2, event, wide = "flash_attn", dict(clock="event_us"), dict(tokens="197", batch=64)
    flat = said(**v1, backend=fa2, batch=32, tokens=197) / said(**v1, backend=fa2, batch=32, tokens=39)
    graph = faster(fa2, KERNEL, mode="graph")
    short = dict(over="paper_triton", batch=32, tokens=39)
    return [
        Claim("floor: FA2 / kernel, v1", "gain", said("v1_dispatch_floor", floor, "paper_triton", backend=fa2),
              faster(fa2, KERNEL), graph, "floor"),
        Claim("floor: FA2 / kernel, v2", "gain", said("v2_dispatch_floor", "speedup"), faster(fa2, KERNEL, **event),
              faster(fa2, KERNEL, **event, mode="graph"), "floor"),
        Claim("FA2 call: 197 / 39 tokens", "equal", flat, longer(fa2, "wall_us"), longer(fa2, "host_us"), "flat"),
        Claim("NestedTensor / FA2, up to", "gain", said("v1_dispatch_floor", "slowdown"), Rows.nested_slowdown,
              lambda r: r.nested_slowdown("nested"), "nested"),
        Claim("padded / kernel call, 80 % pruned", "gain", said(**v1, **short, backend="paper_padded"),
              faster("paper_padded", KERNEL), faster("sdpa_padded:attention", KERNEL), "padded call"),
        Claim("FA2 / kernel call, 80 % pruned", "gain", said(**v1, **short, backend=fa2), faster(fa2, KERNEL), graph,
              "floor"),
        Claim("FA2 / kernel call, batch 64, unpruned", "gain",
              said(**v1, over="paper_triton", backend=fa2, batch=64, tokens=197), faster(fa2, KERNEL, **wide),
              faster(fa2, KERNEL, **wide, clock="gpu_us"), "loses"),
    ]  # fmt: skip


def share_claims() -> list[Claim]:
    """Overhead: the paper divides the floor by the total; fair is the share of the total without GPU work."""
    found = []
    for backend, label in (("flash_attn", "FA2"), ("paper_triton", "kernel")):
        for n in (197, 99, 39):
            claimed = said("v1_overhead_share", "overhead_share", backend=backend, tokens=n) / 100
            name, tokens = own_name(backend), str(n)
            found.append(Claim(
                f"overhead share of {label}, {n} tokens", "equal", claimed,
                lambda r, name=name, tokens=tokens: r.floor(name) / r.call(name, tokens),
                lambda r, name=name, tokens=tokens: 1 - r.call(name, tokens, clock="gpu_us") / r.call(name, tokens),
                "share",
            ))  # fmt: skip
    return found


def model_claims() -> list[Claim]:
    """Whole models with half of the patches, equal counts as in the paper."""
    v1, ours = dict(table="v1_end_to_end_speedup", metric="speedup"), "paper_triton"
    found = [
        Claim(f"model over padded, batch {b}", "gain", said(**v1, baseline="paper_padded", batch=b),
              ahead(ours, "paper_padded", b), ahead(ours, "sdpa_padded", b, BEST), "padded model", asked=b)
        for b in (32, 512)
    ] + [
        Claim(f"model over FA2, batch {b}, at least", "gain", said(**v1, baseline="flash_attn", batch=b, bound="min"),
              ahead(ours, "flash_attn", b), ahead(ours, "flash_attn", b, BEST), "over FA2", asked=b) for b in (4, 16)
    ]  # fmt: skip
    found.append(Claim("model like FA2 from batch 32", "equal", 1.0, ahead(ours, "flash_attn", 32),
                       ahead(ours, "flash_attn", 32, BEST), "like FA2", asked=32))  # fmt: skip
    padded = said("v1_speedup_over_unpruned", "speedup", backend="paper_padded", pruner="threshold_l2", pruned=0.5)
    found.append(Claim("padded model / unpruned, batch 64", "gain", padded, ahead("paper_padded", "unpruned", 64),
                       ahead("sdpa_padded", "unpruned", 64, BEST), "padded slower", asked=64))  # fmt: skip
    for model in ("deit_tiny", "deit_small", "deit_base"):
        for over, own, fair in (("dense", "unpruned", "unpruned"), ("paper_padded", "paper_padded", "sdpa_padded")):
            claimed = said("v1_peak_throughput", "images_per_s", over, backend=ours, model=model)
            found.append(Claim(f"peak over {own}, {model.replace('deit_', 'DeiT-')}", "gain", claimed,
                               peaks(own, model, ("eager",)), peaks(fair, model, ALL_MODES),
                               "over unpruned" if own == "unpruned" else "padded model"))  # fmt: skip
    return found


def pruned_model(pruner: str, keep: float, mode: str) -> Ratio:
    """Times the unpruned model, DeiT-B at batch 64: with the paper's own kernel where it is recorded, which is for
    Threshold-L2 at half the patches; else with ours."""
    if (pruner, keep) == ("threshold_l2", 0.5):
        return ahead("paper_triton", "unpruned", 64, mode)
    return lambda r: r.cut(pruner, keep, mode)


def arithmetic(keep: float) -> Ratio:
    """What the arithmetic allows at most: the recorded ratio of FLOPs at this share."""
    return lambda r: float(r.values("flops_ratio", suite="sparsity", keep=keep).max())


def pruner_claims() -> list[Claim]:
    """Each pruner over the unpruned model, DeiT-B; v2 names no pruner, and Threshold-L2 stands in."""
    found = []
    for version, pruner in (*(("v1", p) for p in ("threshold_l2", "dynamicvit", "evit", "ats")), ("v2", "")):
        for pruned in (0.5, 0.9):
            claimed = said(f"{version}_speedup_over_unpruned", "speedup", pruner=pruner, backend="paper_triton",
                           pruned=pruned)  # fmt: skip
            keep, which = round(1 - pruned, 1), pruner or "threshold_l2"
            found.append(Claim(f"{pruner or 'v2'} over unpruned, {pruned:.0%} pruned", "gain", claimed,
                               pruned_model(which, keep, "eager"), pruned_model(which, keep, BEST), "over unpruned",
                               arithmetic(keep)))  # fmt: skip
    return found


def other_claims() -> list[Claim]:
    """Resolution, packing, equivalence, accuracy."""
    ours, logits, both = "paper_triton", "max_abs_logit_diff", ("deit_small", "deit_tiny_digits")
    found = [
        Claim("384 pixels: over padded, up to", "gain", said("v2_high_resolution_speedup", "speedup"),
              lambda r: r.largest_gain(ours, "paper_padded"), lambda r: r.largest_gain(ours, "sdpa_padded", BEST),
              "padded model"),
        Claim("packing: loop / kernel, v2", "gain", said("v2_stages", "pack_event_ms", ours, backend="paper_padded"),
              packing("python_loop"), packing("mask_indexing"), "packing"),
        Claim("largest logit difference", "bound", said("v1_equivalence", logits, bound="max"),
              differences(logits, max, "deit_small"), differences(logits, max, *both),
              "logits"),
        Claim("same predictions, share", "least", said("v1_equivalence", "top1_agreement"),
              differences("top1_agreement", min, "deit_small"), differences("top1_agreement", min, *both),
              "same class"),
    ]  # fmt: skip
    top1 = {row.pruned: row for row in data.paper("v1_accuracy").itertuples() if row.metric == "top1"}
    for pruned in (0.25, 0.5):
        kept = lambda r, pruned=pruned: accuracy(r, top1[pruned]) / accuracy(r, top1[0.0])  # noqa: E731
        claimed = top1[pruned].value / top1[0.0].value
        found.append(Claim(f"ImageNet top-1 kept, {pruned:.0%} pruned", "equal", claimed, kept, kept, "accuracy"))
    return found


def all_claims() -> list[Claim]:
    return call_claims() + share_claims() + model_claims() + pruner_claims() + other_claims()
