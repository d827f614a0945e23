"""Suites without a clock: `memory`, the peak of every pipeline, and `equivalence`, ragged against padded execution."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ... import data
from ...model import RaggedViT
from ...packing import Selection
from ...pruners import PRUNERS, GivenLengths, Pruner
from ..networks import NETWORKS, network, predictors_of
from ..pipelines import Noted, Replay, Workbench, need
from ..rounds import Subject
from ..runner import Candidate, Case, Options, Skip, settle
from .model import CONTESTANTS, SINGLE_CUT, equal_counts

DIFFERENCES = ("max_abs_logit_diff", "mean_abs_logit_diff", "top1_agreement")


def memory(options: Options) -> list[Case]:
    """peak_mb: the most memory allocated while a pipeline is built and run, its weights and images included. graph:
    with all its buckets."""
    quick, cases = options.quick, []
    for name in options.models_or(("deit_tiny",) if quick else ("deit_base",)):
        for batch in options.batches_or((4,) if quick else (64, 256)):
            plan: list[tuple] = [("unpruned", None, {"pruner": "none", "tokens": "197", "keep": 1.0})]
            equal = {"pruner": "threshold_l2", "tokens": "99", "keep": 0.5}
            plan += [(backend, equal_counts(0.5), equal) for backend in ("dense", *CONTESTANTS)]
            lengths = functools.partial(GivenLengths, data.lengths("U(30,168)", batch))
            ragged = {"pruner": "given_lengths", "tokens": "U(30,168)", "keep": 0.5}
            plan += [(backend, lengths, ragged) for backend in CONTESTANTS]
            bench = functools.cache(functools.partial(Workbench, name, batch, options.dtype, options.device, sets=1))
            found = [
                _peak(bench, make, columns | {"backend": backend, "mode": mode})
                for (backend, make, columns), mode in itertools.product(plan, ("eager", "graph"))
            ]
            dtype = str(options.dtype).removeprefix("torch.")
            cases.append(Case({"suite": "memory", "model": name, "batch": batch, "dtype": dtype}, found))
    return cases


def _peak(bench, make: Callable | None, columns: dict) -> Candidate:
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
        peak = torch.cuda.max_memory_allocated() - before + own
        return Subject([], clocks=(), found={"peak_mb": peak / 2**20})

    return Candidate(columns, build, ("peak_mb",))


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
    for name in options.models_or(("deit_tiny",) if quick else ("deit_small", *NETWORKS)):
        for dtype in dtypes:
            columns = {"suite": "equivalence", "model": name, "batch": 8 if quick else 127, "mode": "eager",
                       "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
            vit = functools.partial(network, name, 224, dtype, options.device)
            others = ("triton", "flash_attn", "torch_varlen", "paper_triton", "triton:fp64", "sdpa_padded:fp64")
            found = []
            for pruner in PRUNERS:
                padded = PaddedPasses(vit, functools.partial(_pruner, pruner, name), images, columns["batch"], dtype)
                same = {"pruner": pruner, "tokens": "ragged" if pruner == "ats" else "", "keep": 0.5}
                found += [_difference(padded, same | {"backend": backend}) for backend in others]
            cases.append(Case(columns, found))
    return cases


def pictures(scenes: int) -> Tensor:
    """Normalised digit scenes and all photographs, float32 (n, 3, 224, 224)."""
    photographs, _ = data.photographs()
    return data.normalise(torch.cat((photographs, data.digit_scenes(scenes, "test").images)))


class PaddedPasses:
    """The padded network over all images with one pruner: its selections and logits, computed once for every backend
    that is held against it."""

    def __init__(self, vit: Callable[[], nn.Module], make: Callable[[], Pruner], images: Callable[[], Tensor],
                 batch: int, dtype: torch.dtype):  # fmt: skip
        self.vit, self.images, self.batch, self.dtype, self._make = vit, images, batch, dtype, make

    @functools.cached_property
    def pruner(self) -> Pruner:
        return self._make()

    def batches(self) -> Iterator[Tensor]:
        device = self.vit().patch_embed.proj.weight.device
        return (part.to(device, self.dtype) for part in self.images().split(self.batch))

    @functools.cached_property
    def passes(self) -> tuple[list[list[Selection | None]], Tensor]:
        """What the pruner selected in each batch, and the logits, float64 (images, classes)."""
        selections, logits = [], []
        for x in self.batches():
            noted = Noted(self.pruner)
            model = RaggedViT(self.vit(), noted, "sdpa_padded").to(x.device, x.dtype)  # a predictor comes from a file
            logits.append(model(x).double())
            selections.append(noted.taken)
        return selections, torch.cat(logits)

    @functools.cached_property
    def exact(self) -> Tensor:
        """Logits of the network in float64, for the same selections."""
        return self.replayed(copy.deepcopy(self.vit()).double(), "sdpa_padded", torch.float64)

    def replayed(self, vit: nn.Module, backend: str, dtype: torch.dtype) -> Tensor:
        """Logits of `vit` on `backend` for the same selections, float64 (images, classes)."""
        selections, _ = self.passes
        pairs = zip(self.batches(), selections)
        return torch.cat([RaggedViT(vit, Replay(self.pruner, t), backend)(x.to(dtype)).double() for x, t in pairs])


def _difference(padded: PaddedPasses, columns: dict) -> Candidate:
    backend, _, truth = columns["backend"].partition(":")

    def build() -> Subject:
        need(padded.vit(), backend)
        _, logits = padded.passes
        want = padded.exact if truth else logits
        got = padded.replayed(padded.vit(), backend, padded.dtype)
        gap, agree = (want - got).abs(), (want.argmax(1) == got.argmax(1)).double()
        found = zip(DIFFERENCES, (gap.max().item(), gap.mean().item(), agree.mean().item()))
        return Subject([], clocks=(), found=dict(found))

    return Candidate(columns, build, DIFFERENCES)


def _pruner(name: str, model: str) -> Pruner:
    """A pruner at about half the tokens, in the paper's single cut; its predictor trained where the network is."""
    knobs: dict = {"samples": 98} if name == "ats" else {"keep": 0.5}
    if name == "dynamicvit":
        knobs["predictors"] = predictors_of(model)
    return PRUNERS[name](**knobs, **SINGLE_CUT)
