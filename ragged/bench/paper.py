"""The paper beside recorded rows: `Rows` answers questions about those of one GPU, `beside` finds for every row of a
table of the paper what was recorded, `said` gives a figure of the paper.

A value that is not recorded is NaN, and breaks nothing.
"""

from __future__ import annotations

import math

from .. import data

NAN = float("nan")
KERNEL = "paper_triton:contiguous"  # the paper timed its kernel on contiguous q, k and v; its models copy
BEST = "compile+graph"
ALL_MODES = ("eager", "graph", BEST)
FULL = 64  # images: the best of smaller batches is no peak


class Rows:
    """Recorded rows of one GPU, a frame as `ragged.data.results` returns it. Values are asked for by metric and
    columns; a list allows several values. bfloat16, measured beside float16, is only found where dtype asks for it.
    `touched` says whether a disturbed row gave one of the values since somebody set it to False."""

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
        return found.loc[there, "value"]

    def take(self, found, at) -> float:
        """The value at index `at` of what `values` found, a `data.Disturbed` where its row is."""
        bad = bool(self.disturbed[at])
        self.touched |= bad
        return data.noted(found[at], bad)

    def value(self, metric: str, **columns) -> float:
        """The first value there is."""
        found = self.values(metric, **columns)
        return self.take(found, found.index[0]) if len(found) else NAN

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
        """The best images per second over batches and modes; NaN where only small batches are recorded."""
        tokens = "197" if backend == "unpruned" else "99"
        at = dict(suite="model", model=model, backend=backend, tokens=tokens, mode=list(modes))
        found = self.values("images_per_s", **at)
        full = len(found) and self.rows.loc[found.index, "batch"].max() >= FULL
        return self.take(found, found.idxmax()) if full else NAN

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
        both = slow.assign(row_x=slow.index).merge(fast.assign(row_y=fast.index), on=["batch", "tokens"])
        if both.empty:
            return NAN
        most = both.loc[(both["value_x"] / both["value_y"]).idxmax()]
        pair = (self.take(frame["value"], most[row]) for frame, row in ((slow, "row_x"), (fast, "row_y")))
        return next(pair) / next(pair)

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


def pruned_model(r: Rows, pruner: str, keep: float, mode: str = "eager") -> float:
    """Times the unpruned model, DeiT-B at batch 64: the paper's own kernel where it is recorded, else ours."""
    if (pruner, keep) == ("threshold_l2", 0.5):
        return r.speed("paper_triton", 64, mode) / r.speed("unpruned", 64, mode)
    return r.cut(pruner, keep, mode)


def speedup_over_unpruned(r: Rows, row) -> float:
    """Ours stands in for the paper's kernel where that is not recorded: all but Threshold-L2 at half the patches."""
    if row.metric == "speedup_ceiling":
        return float(r.values("flops_ratio", suite="sparsity", keep=0.1).max())
    if row.backend == "paper_padded":  # recorded for one pruner at one keep rate
        same = row.pruner == "threshold_l2" and row.pruned == 0.5
        return r.speed("paper_padded") / r.speed("unpruned") if same else NAN
    return pruned_model(r, row.pruner or "threshold_l2", round(1 - row.pruned, 1))


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


FIXED = {"speedup_over_unpruned": 64, "stages": 16}  # the one batch that is recorded
LOOK_UP = {f.__name__: f for f in (
    attention_call, dispatch_floor, overhead_share, end_to_end_speedup, end_to_end_throughput, peak_throughput,
    high_resolution_speedup, speedup_over_unpruned, equivalence, stages, accuracy,
)}  # fmt: skip


def _batch(table: str, batch: float, sources: dict[str, Rows]) -> str:
    """The paper's batch, and those that stand in for it."""
    found = {fixed for name, fixed in FIXED.items() if table.endswith(name)}
    if table.endswith("end_to_end_speedup"):
        found = {r.near(batch) for r in sources.values()}
    found = sorted(found - {batch})
    return f"batch {batch:.0f}" + (f" (here {', '.join(f'{b:.0f}' for b in found)})" if found else "")


def beside(table: str, sources: dict[str, Rows]):
    """Every row of a paper's table with its counterpart in every source: a frame with case, backend, what, metric,
    unit, disturbed (the sources whose value rests on a disturbed row), paper, and a column per source. Tables without
    a counterpart (protocols) get NaN. The case says which batch, or which number of tokens, stands in for one that is
    not recorded."""
    import pandas

    find, rows = LOOK_UP.get(table.partition("_")[2]), []
    for row in data.paper(table).itertuples():
        parts = [row.model.replace("deit_", "DeiT-"), row.pruner]
        parts += [_batch(table, row.batch, sources)] if row.batch == row.batch else []
        parts += [f"{row.tokens:.0f} tokens" + " (here 39)" * (row.tokens == 40)] if row.tokens == row.tokens else []
        parts += [f"{row.pruned:.0%} pruned"] if row.pruned == row.pruned else []
        parts += [row.bound]
        what = row.backend + (f" / {row.baseline}" if row.baseline else "")
        found, shaky = {}, []
        for name, r in sources.items():
            r.touched = False
            found[name] = float(find(r, row)) if find else NAN
            shaky += [name] * r.touched
        rows.append({"case": ", ".join(p for p in parts if p) or row.metric.replace("_", " "), "backend": row.backend,
                     "what": what, "metric": row.metric, "unit": row.unit, "disturbed": tuple(shaky),
                     "paper": row.value} | found)  # fmt: skip
    return pandas.DataFrame(rows)


# ---- what the paper says ----


def said(table: str, metric: str, over: str | None = None, **row) -> float:
    """A figure of the paper, NaN where it states none; with `over`, its ratio to the same figure of that other
    backend."""
    frame = data.paper(table)
    frame = frame[frame["metric"] == metric]
    for column, wanted in row.items():
        frame = frame[frame[column] == wanted]
    value = float(frame["value"].iloc[0]) if len(frame) else NAN
    return value if over is None else value / said(table, metric, **(row | {"backend": over}))
