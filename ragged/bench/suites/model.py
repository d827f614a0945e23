"""Suites of whole models: `model`, `sparsity`, `resolution`. Every backend gets the same code path and the same tricks.

backend unpruned    the same network without a cut, attention by PyTorch's SDPA; by our kernel it is triton, tokens 197
tokens 99           equal counts: threshold_l2 at keep 0.5, the paper's single cut after the fourth block
tokens U(30,168)    truly ragged: prescribed random lengths, mean 99, which the host is not told
tokens published    a pruner with the schedule and the share of its paper
tokens one cut      the same pruner with one cut, after the fourth block, to a half
backend timm        timm's own model; its mode compile+graph is torch.compile(mode="reduce-overhead")
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

from ... import data
from ...pruners import PRUNERS, GivenLengths
from ..pipelines import METRICS, MODES, Pipeline, TimmPipeline, Workbench
from ..runner import Candidate, Case, Options

MODELS = ("deit_base", "deit_small", "deit_tiny")
CONTESTANTS = ("triton", "sdpa_padded", "flash_attn", "torch_varlen", "paper_triton", "paper_padded")
SINGLE_CUT = {"at": (3,), "where": "after"}
BATCHES = (64, 256, 1, 16, 4, 2, 8, 32, 128)  # where the paper's claims are first, for a recording cut short
REAL = ("dynamicvit", "evit", "ats")  # threshold_l2's published schedule is the stand-in with equal counts
REAL_MODES = ("eager", "compile+graph")
SWEPT = (0.5, 0.1, 0.3, 0.7, 0.9, 0.2, 0.4, 0.6, 0.8, 1.0)


def _columns(suite: str, name: str, batch: int, options: Options) -> dict:
    dtype = str(options.dtype).removeprefix("torch.")
    return {"suite": suite, "model": name, "batch": batch, "dtype": dtype}


def _candidate(bench, pruner: Callable | None, columns: dict) -> Candidate:
    pipeline = Pipeline(bench, pruner, columns["backend"], columns["mode"])
    return Candidate(columns, pipeline.build, METRICS, pipeline.values)


def _bench(name: str, batch: int, options: Options, img_size: int = 224):
    return functools.cache(functools.partial(Workbench, name, batch, options.dtype, options.device, img_size))


def _unpruned(bench, modes, patches: int = 196, backend: str = "unpruned") -> list[Candidate]:
    """The network without a cut. backend: "unpruned", as PyTorch runs it; "triton", by the kernel of the pruned
    networks, so that its gain is not credited to pruning."""
    columns = {"pruner": "none", "backend": backend, "tokens": str(patches + 1), "keep": 1.0}
    return [_candidate(bench, None, columns | {"mode": mode}) for mode in modes]


def _timm(bench, patches: int = 196) -> list[Candidate]:
    columns = {"pruner": "none", "backend": "timm", "tokens": str(patches + 1), "keep": 1.0}
    found = []
    for mode in REAL_MODES:
        pipeline = TimmPipeline(bench, mode)
        found.append(Candidate(columns | {"mode": mode}, pipeline.build, METRICS, pipeline.values))
    return found


def _real(bench) -> list[Candidate]:
    """The pruners themselves, as published and in one cut to a half, by our kernel."""
    found = []
    for name, tokens in itertools.product(REAL, ("published", "one cut")):
        how = {} if tokens == "published" else {"samples": 98} if name == "ats" else {"keep": 0.5}
        make = functools.partial(PRUNERS[name], **how, **({} if tokens == "published" else SINGLE_CUT))
        keep = "" if name == "ats" else 0.7 if tokens == "published" else 0.5
        columns = {"pruner": name, "backend": "triton", "tokens": tokens, "keep": keep}
        found += [_candidate(bench, make, columns | {"mode": mode}) for mode in REAL_MODES]
    return found


def equal_counts(keep: float) -> Callable:
    """A constructor of threshold_l2 in the paper's single cut."""
    return functools.partial(PRUNERS["threshold_l2"], keep=keep, **SINGLE_CUT)


def model(options: Options) -> list[Case]:
    """DeiT-Ti, -S and -B, unpruned and pruned to a half, by every backend in every mode; beside them the published
    pruners by our kernel, and timm's own model."""
    cases = []
    quick = options.quick
    for name in options.models_or(("deit_tiny",) if quick else MODELS):
        for batch in options.batches_or((4,) if quick else BATCHES):
            bench = _bench(name, batch, options)
            candidates = _unpruned(bench, MODES) + _unpruned(bench, REAL_MODES, backend="triton")
            candidates += _timm(bench) + _real(bench)
            columns = {"pruner": "threshold_l2", "tokens": "99", "keep": 0.5}
            for backend, mode in itertools.product(("dense", *CONTESTANTS), MODES):
                candidates.append(_candidate(bench, equal_counts(0.5), columns | {"backend": backend, "mode": mode}))
            columns = {"pruner": "given_lengths", "tokens": "U(30,168)", "keep": 0.5}
            lengths = functools.partial(GivenLengths, data.lengths("U(30,168)", batch))
            for backend, mode in itertools.product(CONTESTANTS, MODES):
                candidates.append(_candidate(bench, lengths, columns | {"backend": backend, "mode": mode}))
            cases.append(Case(_columns("model", name, batch, options), candidates))
    return cases


def sparsity(options: Options) -> list[Case]:
    """Speed against the share kept, for the four pruners in the paper's single cut. ats draws 196 * keep sample points
    and keeps what they hit: its keep column is the measured mean share, and its tokens column names the points."""
    quick, cases = options.quick, []
    modes = ("eager", "graph") if quick else ("eager", "compile+graph")
    for name in options.models_or(("deit_tiny",) if quick else ("deit_base",)):
        for batch, keep in itertools.product(
            options.batches_or((4,) if quick else (64, 256)), (0.5, 0.1) if quick else SWEPT
        ):
            bench = _bench(name, batch, options)
            candidates = _unpruned(bench, modes) if keep == 0.5 else []
            for pruner, backend, mode in itertools.product(PRUNERS, ("triton", "sdpa_padded"), modes):
                candidates.append(_cut(bench, pruner, keep, {"backend": backend, "mode": mode}))
            cases.append(Case(_columns("sparsity", name, batch, options) | {"tokens": f"keep {keep}"}, candidates))
    return cases


def _cut(bench, pruner: str, keep: float, columns: dict) -> Candidate:
    if pruner != "ats":
        make, tokens = functools.partial(PRUNERS[pruner], keep=keep, **SINGLE_CUT), f"{1 + int(196 * keep)}"
        if pruner == "evit":  # it rounds up, and adds the fused token
            tokens = str(1 + math.ceil(196 * keep) + (keep < 1))
        return _candidate(bench, make, columns | {"pruner": pruner, "tokens": tokens, "keep": keep})
    samples = round(196 * keep)
    make = functools.partial(PRUNERS["ats"], samples=samples, **SINGLE_CUT)
    columns = columns | {"pruner": "ats", "tokens": f"samples={samples}", "keep": keep}
    pipeline = Pipeline(bench, make, columns["backend"], columns["mode"])
    return Candidate(columns, pipeline.build, METRICS, pipeline.values, functools.partial(_mean_share, pipeline))


def _mean_share(pipeline: Pipeline) -> dict:
    """keep as it was measured: the mean share of patches that stayed. Nothing where the pipeline was not built."""
    if pipeline.trace is None:
        return {}
    counts = pipeline.counts()
    return {"keep": round((sum(counts) / len(counts) - 1) / 196, 2)}


def resolution(options: Options) -> list[Case]:
    """224 and 384 pixels, 196 and 576 patches, at keep 0.5."""
    quick, cases = options.quick, []
    sizes = ((224, 196),) if quick else ((384, 576), (224, 196))
    modes = ("eager", "graph") if quick else ("eager", "compile+graph")
    backends = ("triton", "sdpa_padded") if quick else ("dense", *CONTESTANTS)
    for name in options.models_or(("deit_tiny",) if quick else ("deit_base",)):
        for (size, patches), batch in itertools.product(sizes, options.batches_or((2,) if quick else (64, 16, 4, 1))):
            bench = _bench(name, batch, options, size)
            candidates = _unpruned(bench, modes, patches)
            columns = {"pruner": "threshold_l2", "tokens": str(1 + patches // 2), "keep": 0.5}
            for backend, mode in itertools.product(backends, modes):
                candidates.append(_candidate(bench, equal_counts(0.5), columns | {"backend": backend, "mode": mode}))
            if not quick:
                low, high = patches * 30 // 196, patches * 168 // 196
                spec = f"U({low},{high})"
                lengths = functools.partial(GivenLengths, data.lengths(spec, batch))
                columns = {"pruner": "given_lengths", "tokens": spec, "keep": 0.5}
                for backend, mode in itertools.product(("triton", "sdpa_padded", "flash_attn"), modes):
                    candidates.append(_candidate(bench, lengths, columns | {"backend": backend, "mode": mode}))
            cases.append(Case(_columns("resolution", name, batch, options) | {"tokens": f"{size} pixels"}, candidates))
    return cases
