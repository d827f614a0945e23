"""Suites without a clock: `memory`, the peak of every pipeline, and `equivalence`, ragged against padded execution."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from . import data, pruners
from .model import RaggedViT
from .pipelines import Replay, Workbench, need, network, noting
from .pruners import PRUNERS
from .rounds import Subject
from .runner import Candidate, Case, Options, Skip, settle
from .suite_model import BACKENDS, SINGLE_CUT, equal_counts

CLASSES = 10  # of the networks trained on digits
DIFFERENCES = ("max_abs_logit_diff", "mean_abs_logit_diff", "top1_agreement")


def memory(options: Options) -> list[Case]:
    """peak_mb: the most memory allocated while a pipeline is built and run, its weights and images included. graph:
    with all its buckets."""
    quick, cases = options.quick, []
    for name in options.pick_models(("deit_tiny",) if quick else ("deit_base",)):
        for batch in options.pick_batches((4,) if quick else (64, 256)):
            plan: list[tuple] = [("unpruned", None, {"pruner": "none", "tokens": "197", "keep": 1.0})]
            equal = {"pruner": "threshold_l2", "tokens": "99", "keep": 0.5}
            plan += [(backend, equal_counts(0.5), equal) for backend in ("dense", *BACKENDS)]
            lengths = functools.partial(pruners.given_lengths, data.lengths("U(30,168)", batch))
            ragged = {"pruner": "given_lengths", "tokens": "U(30,168)", "keep": 0.5}
            plan += [(backend, lengths, ragged) for backend in BACKENDS]
            bench = functools.cache(functools.partial(Workbench, name, batch, options.dtype, options.device, sets=1))
            found = [
                _peak(bench, make, columns | {"backend": backend, "mode": mode})
                for (backend, make, columns), mode in itertools.product(plan, ("eager", "graph"))
            ]
            dtype = str(options.dtype).removeprefix("torch.")
            cases.append(Case({"suite": "memory", "model": name, "batch": batch, "dtype": dtype}, found))
    return cases


def _peak(bench, make: Callable | None, columns: dict) -> Candidate:
    found: dict[str, float] = {}

    def build() -> Subject:
        if not torch.cuda.is_available():
            raise Skip("peak memory is read from CUDA's allocator")
        b = bench()
        settle()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = b.model(make() if make else None, "auto" if columns["backend"] == "unpruned" else columns["backend"])
        run = model if columns["mode"] == "eager" else model.capture(b.batch)
        for _ in range(2):
            run(b.images[0])
        torch.cuda.synchronize()
        own = sum(t.numel() * t.element_size() for t in (*b.vit.parameters(), *b.vit.buffers(), *b.images))
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before + own) / 2**20
        return Subject([], clocks=())

    return Candidate(columns, build, ("peak_mb",), lambda subject: found)


def equivalence(options: Options) -> list[Case]:
    """Logits of ragged backends against sdpa_padded for the same selections, over digit scenes and photographs.
    max over all images and logits, mean over both, and the share of images with the same first class. Backends that
    end in :fp64 are compared with the padded network in float64 instead, for the same selections: how much of a
    difference is rounding, and whose."""
    quick = options.quick
    cuda = options.device == "cuda"
    dtypes = (torch.float16, torch.bfloat16, torch.float32) if cuda else (torch.float32,)
    images = functools.cache(functools.partial(pictures, 8 if quick else 2000))
    cases = []
    for name in options.pick_models(("deit_tiny",) if quick else ("deit_small", "deit_tiny_digits")):
        for dtype in dtypes:
            columns = {"suite": "equivalence", "model": name, "batch": 8 if quick else 127, "mode": "eager",
                       "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
            vit = functools.partial(network, name, 224, dtype, options.device)
            found = []
            others = ("triton", "flash_attn", "torch_varlen", "paper_triton", "triton:fp64", "sdpa_padded:fp64")
            for pruner, backend in itertools.product(PRUNERS, others):
                extra = {
                    "pruner": pruner,
                    "backend": backend,
                    "tokens": "ragged" if pruner == "ats" else "",
                    "keep": 0.5,
                }
                build = _difference(vit, images, columns["batch"], dtype, extra)
                found.append(build)
            cases.append(Case(columns, found))
    return cases


def pictures(scenes: int) -> Tensor:
    """Normalised digit scenes and all photographs, float32 (n, 3, 224, 224)."""
    photographs, _ = data.photographs()
    return data.normalise(torch.cat((photographs, data.digit_scenes(scenes, "test").images)))


def _difference(vit, images, batch: int, dtype: torch.dtype, columns: dict) -> Candidate:
    found: dict[str, float] = {}
    backend, _, truth = columns["backend"].partition(":")

    def build() -> Subject:
        plain = vit()
        need(plain, backend)
        device = plain.patch_embed.proj.weight.device
        pruner = _pruner(columns["pruner"], plain.num_classes == CLASSES)
        padded = RaggedViT(plain, pruner, "sdpa_padded").to(device, dtype)
        exact = copy.deepcopy(plain).double() if truth else plain
        largest, total, agree, seen = 0.0, 0.0, 0, 0
        for chunk in images().split(batch):
            x = chunk.to(device, dtype)
            with noting(pruner) as taken:
                a = padded(x).double()
            if truth:
                a = RaggedViT(exact, Replay(pruner, taken), "sdpa_padded")(x.double())
            b = RaggedViT(plain, Replay(pruner, taken), backend)(x).double()
            gap = (a - b).abs()
            largest, total = max(largest, gap.max().item()), total + gap.mean().item() * len(x)
            agree, seen = agree + (a.argmax(1) == b.argmax(1)).sum().item(), seen + len(x)
        found.update(zip(DIFFERENCES, (largest, total / seen, agree / seen)))
        return Subject([], clocks=())

    return Candidate(columns, build, DIFFERENCES, lambda subject: found)


def _pruner(name: str, digits: bool):
    """A pruner at about half the tokens, in the paper's single cut; its predictor trained where the network is."""
    knobs: dict = {"samples": 98} if name == "ats" else {"keep": 0.5}
    if name == "dynamicvit" and digits:
        knobs["predictors"] = data.checkpoint_path("deit_tiny_digits_dynamicvit")
    return PRUNERS[name](**knobs, **SINGLE_CUT)
