"""What the paper claims, as ratios.

A `Claim` is what the paper claims, the same comparison in the paper's setup, and a fair one. paper_setup repeats the
paper's comparison: its baseline, its clock, eager. fair gives both sides the same: padding to the longest with fused
attention, compile + graph for both, or host and GPU time apart. Both are functions of `Rows`; a value that is not
recorded is NaN. The verdict is left to `ragged.bench.verdicts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .. import data
from .paper import ALL_MODES, BEST, KERNEL, NAN, Rows, accuracy, own_name, pruned_model, said

Ratio = Callable[[Rows], float]


class Claim(NamedTuple):
    """kind: "gain" (so many times faster), "equal", "bound" (at most) or "least" (at least). group: which reason.
    ceiling: what the arithmetic allows a gain at most, where that is known. asked: the batch of the paper, where
    another may stand in for it: the one that is recorded nearest, or `at`."""

    claim: str
    kind: str
    claimed: float
    paper_setup: Ratio
    fair: Ratio
    group: str
    ceiling: Ratio = lambda r: NAN
    asked: float = NAN
    at: float = NAN

    def substituted(self, rows: Rows) -> float:
        """The batch that stands in for the paper's in these rows; NaN where its own is recorded or none is named."""
        if self.asked != self.asked:
            return NAN
        taken = self.at if self.at == self.at else rows.near(self.asked)
        return NAN if taken == self.asked else taken


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


def over_unpruned(pruner: str, keep: float, mode: str = "eager") -> Ratio:
    return lambda r: pruned_model(r, pruner, keep, mode)


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
                               over_unpruned(which, keep), over_unpruned(which, keep, BEST), "over unpruned",
                               arithmetic(keep), 64 if pruner else 32, 64))  # fmt: skip
    return found


def other_claims() -> list[Claim]:
    """Resolution, packing, equivalence, accuracy."""
    ours, logits, both = "paper_triton", "max_abs_logit_diff", ("deit_small", "deit_tiny_digits")
    found = [
        Claim("384 pixels: over padded, up to", "gain", said("v2_high_resolution_speedup", "speedup"),
              lambda r: r.largest_gain(ours, "paper_padded"), lambda r: r.largest_gain(ours, "sdpa_padded", BEST),
              "padded model"),
        Claim("packing: loop / kernel, v2", "gain", said("v2_stages", "pack_event_ms", ours, backend="paper_padded"),
              packing("python_loop"), packing("mask_indexing"), "packing", asked=8, at=16),
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
