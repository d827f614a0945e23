"""The paper beside recorded rows: one function for every kind of table finds the counterpart of a row.

Nothing here needs torch. A value that is not recorded is NaN, and breaks nothing.
"""

from __future__ import annotations

import math

from . import data

NAN = float("nan")
KERNEL = "paper_triton:contiguous"  # the paper timed its kernel on contiguous q, k and v; its models copy
ALL_MODES = ("eager", "graph", "compile+graph")


class Record:
    """Recorded rows of one GPU. Values are asked for by metric and columns; a list allows several values."""

    def __init__(self, rows):
        self.rows = rows[(rows["status"] == "ok") & (rows["dtype"] != "bfloat16")]

    def values(self, metric: str, **columns):
        found = self.rows[self.rows["metric"] == metric]
        for column, wanted in columns.items():
            found = found[found[column].isin(wanted if isinstance(wanted, list) else [wanted])]
        return found["value"].dropna()

    def value(self, metric: str, **columns) -> float:
        found = self.values(metric, **columns)
        return float(found.iloc[0]) if len(found) else NAN

    def call(self, backend, tokens="39", batch=32, mode="eager", clock="wall_us") -> float:
        """µs of one attention call."""
        return self.value(clock, suite="attention", backend=backend, tokens=tokens, batch=batch, mode=mode)

    def speed(self, backend, batch=64, mode="eager", model="deit_base", tokens="99", suite="model") -> float:
        """Images per second of a whole model that keeps half of its patches; of "unpruned", all."""
        if backend == "unpruned":
            tokens = {"99": "197", "289": "577"}[tokens]
        at = dict(suite=suite, model=model, batch=batch, mode=mode)
        return self.value("images_per_s", backend=backend, tokens=tokens, **at)

    def peak(self, backend, model="deit_base", modes=("eager",)) -> float:
        """The best images per second over batches and modes."""
        tokens = "197" if backend == "unpruned" else "99"
        at = dict(suite="model", model=model, backend=backend, tokens=tokens, mode=list(modes))
        return float(self.values("images_per_s", **at).max())

    def cut(self, pruner, keep, mode="eager") -> float:
        """Ours, times the unpruned model's images per second, DeiT-B at batch 64."""
        at = dict(suite="sparsity", batch=64, mode=mode)
        knob = dict(tokens=f"samples={round(196 * keep)}") if pruner == "ats" else dict(keep=keep)
        pruned = self.value("images_per_s", pruner=pruner, backend="triton", **knob, **at)
        return pruned / self.value("images_per_s", backend="unpruned", **at)

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


def attention_call(r: Record, row) -> float:
    tokens = "39" if row.tokens == 40 else f"{row.tokens:.0f}"  # 39 stands for v2's 40
    return r.call(own_name(row.backend), tokens, row.batch, clock=row.metric.replace("_ms", "_us")) / 1e3


def dispatch_floor(r: Record, row) -> float:
    if row.metric == "slowdown":
        return r.nested_slowdown()
    clock = "wall_us" if row.clock == "wall+sync" else "event_us"
    value = r.floor(own_name(row.backend), clock)
    return value if row.metric == "dispatch_floor_us" else r.floor(row.baseline, clock) / value


def overhead_share(r: Record, row) -> float:
    backend = own_name(row.backend)
    return 100 * r.floor(backend) / r.call(backend, f"{row.tokens:.0f}")


def end_to_end_speedup(r: Record, row) -> float:
    batch = r.near(row.batch)
    return r.speed(row.backend, batch) / r.speed(row.baseline, batch)


def end_to_end_throughput(r: Record, row) -> float:
    return r.speed(row.backend, row.batch)


def peak_throughput(r: Record, row) -> float:
    return r.peak("unpruned" if row.backend == "dense" else row.backend, row.model)


def high_resolution_speedup(r: Record, row) -> float:
    return r.largest_gain(row.backend, row.baseline)


def speedup_over_unpruned(r: Record, row) -> float:
    """Our kernel stands beside the paper's: the suite `sparsity` runs no other ragged one."""
    if row.metric == "speedup_ceiling":
        return float(r.values("flops_ratio", suite="sparsity", keep=0.1).max())
    if row.backend == "paper_padded":  # recorded for one pruner at one keep rate
        same = row.pruner == "threshold_l2" and row.pruned == 0.5
        return r.speed("paper_padded") / r.speed("unpruned") if same else NAN
    return r.cut(row.pruner or "threshold_l2", round(1 - row.pruned, 1))


def equivalence(r: Record, row) -> float:
    which = {"pruner": row.pruner} if row.pruner else {}
    at = dict(suite="equivalence", model="deit_small", dtype="float16", backend="paper_triton")
    found = r.values(row.metric, **at, **which)
    return float(found.min() if row.metric == "top1_agreement" else found.max())


def stages(r: Record, row) -> float:
    """Only packing is recorded on its own, at batch 16."""
    way = {"paper_padded": "python_loop", "paper_triton": "triton"}[row.backend]
    at = dict(suite="pack", batch=16, tokens="99", mode="eager")
    return r.value("event_us", backend=way, **at) / 1e3 if row.metric == "pack_event_ms" else NAN


def accuracy(r: Record, row) -> float:
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


def beside(table: str, sources: dict[str, Record]):
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
