"""Whole models as things to time: built the same way for every backend, and checked before any clock runs.

The check: a pruner's selections are noted in one forward pass and replayed in the same network in float32, padded,
eager. A pipeline may be off from that by twice as much as the padded half-precision network that got the same
selections (root mean square over the logits): another attention kernel may round differently, not worse.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..backends import BACKENDS
from ..blocks import compile_with_room
from ..model import RaggedViT
from ..packing import Selection
from ..pruners import Pruner
from .flops import forward_flops
from .networks import network
from .rounds import Subject
from .runner import Skip, Wrong

PIPELINE_CLOCKS = ("host_us", "gpu_us", "wall_us", "stream_us", "syncs")
METRICS = ("host_us", "gpu_us", "wall_us", "syncs", "images_per_s", "kept_tokens", "capacity_waste", "flops_ratio")
EPS = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}  # slack, relative to the logits
MODES = ("eager", "graph", "compile+graph")


class Noted(Pruner):
    """Asks another pruner, and notes what that selects: `taken`, one entry a cut, for one pass of one model."""

    def __init__(self, pruner: Pruner):
        super().__init__(pruner.name, pruner.at, pruner.where)
        self.pruner, self.taken = pruner, []
        self.needs, self.adaptive, self.scores_only = pruner.needs, pruner.adaptive, pruner.scores_only

    def bind(self, dim: int, depth: int) -> None:
        self.pruner.bind(dim, depth)

    def select(self, view) -> Selection | None:
        self.taken.append(self.pruner.select(view))
        return self.taken[-1]


class Replay(Pruner):
    """Selects what another pruner selected: taken, one entry a cut, as a `Noted` keeps them."""

    def __init__(self, pruner: Pruner, taken: list[Selection | None]):
        super().__init__(pruner.name, pruner.at, pruner.where)
        self.taken, self.adaptive = taken, pruner.adaptive

    def select(self, view) -> Selection | None:
        return self.taken[view.stage]


def noted_pass(model: RaggedViT, images: Tensor) -> tuple[Tensor, list[Selection | None]]:
    """Logits of `model` for images (batch, channels, height, width), and what its pruner selected, one entry a cut."""
    if model.pruner is None:
        return model(images), []
    pruner = Noted(model.pruner)
    return model.with_pruner(pruner)(images), pruner.taken


class Workbench:
    """One network with its float32 twin and sets of random images, shared by the pipelines of a case."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype, device: str, img_size: int = 224, sets: int = 2):
        self.name, self.batch, self.dtype, self.device = name, batch, dtype, device
        self.vit, self.exact = network(name, img_size, dtype, device), network(name, img_size, torch.float32, device)
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, 3, img_size, img_size)
        self.images = [torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(sets)]
        self._answers: list[tuple[list, Tensor, float]] = []

    @functools.cached_property
    def compiled(self) -> RaggedViT:
        """The unpruned model with compiled pieces, which all that are compiled share: nobody's are tuned to shapes of
        his own, and they are compiled once."""
        return RaggedViT(self.vit).compile(dynamic=True)

    def model(self, pruner: Pruner | None, backend: str, compiled: bool = False) -> RaggedViT:
        """The network with `pruner` under `backend`; compiled: with the pieces of `compiled`."""
        if compiled:
            return self.compiled.with_pruner(pruner, backend)
        return RaggedViT(self.vit, pruner, backend).to(self.device, self.dtype)

    def expected(self, pruner: Pruner | None, taken: list[Selection | None]) -> tuple[Tensor, float]:
        """Float32 logits for these selections, and the root mean square error allowed."""
        for known, exact, allowed in self._answers:
            if _same(known, taken):
                return exact, allowed
        replay = None if pruner is None else Replay(pruner, taken)
        exact = RaggedViT(self.exact, replay, "sdpa_padded")(self.images[0].float())
        plain = RaggedViT(self.vit, replay, "sdpa_padded")(self.images[0])
        allowed = 2 * rms(plain - exact) + EPS[self.dtype] * rms(exact)
        self._answers.append((taken, exact, allowed))
        return exact, allowed

    def check(self, model: RaggedViT, run) -> None:
        """Compare `run` (the model, or its capture) with the exact logits for what the model itself selects."""
        first, taken = noted_pass(model, self.images[0])
        exact, allowed = self.expected(model.pruner, taken)
        for logits in (first, run(self.images[0])):
            error = rms(logits - exact)
            if not error <= allowed:
                raise Wrong(f"root mean square error of the logits {error:.2g}, allowed {allowed:.2g}")


def need(vit: nn.Module, backend: str) -> None:
    """Raise Skip, with the reason, where `backend` cannot run on the device and in the dtype of `vit`."""
    if backend == "auto":
        return
    weight, headdim = vit.patch_embed.proj.weight, vit.embed_dim // vit.blocks[0].attn.num_heads
    why = BACKENDS[backend].why_not(weight.device, weight.dtype, headdim)
    if why is not None:
        raise Skip(why)


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def _same(a: list, b: list) -> bool:
    def equal(x, y) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return torch.equal(x, y)
        return x is y if x is None or y is None or isinstance(x, Tensor) or isinstance(y, Tensor) else x == y

    def alike(x, y) -> bool:
        if x is None or y is None:
            return x is y
        return equal(x.counts, y.counts) and equal(x.index, y.index) and equal(x.blend, y.blend)

    return len(a) == len(b) and all(map(alike, a, b))


class Pipeline:
    """A model in one mode, built when asked for: eager; graph, the whole forward captured; compile+graph, the pieces
    of its blocks compiled first."""

    def __init__(self, bench, pruner, backend: str, mode: str):
        self.bench, self.pruner, self.backend, self.mode = bench, pruner, backend, mode
        self.run = self.trace = self.facts = None

    def build(self) -> Subject:
        bench, pruner = self.bench(), self.pruner() if self.pruner is not None else None
        name = "auto" if self.backend == "unpruned" else self.backend
        need(bench.vit, name)
        if self.mode != "eager" and bench.device != "cuda":
            raise Skip("CUDA graphs need a CUDA device")
        model = bench.model(pruner, name, self.mode == "compile+graph")
        self.facts = BACKENDS[model.picked]
        if self.mode == "eager":
            self.trace, self.run = model.trace(bench.images[0]), model
        else:
            self.run = self._capture(model)
        bench.check(model, self.run)
        calls = [functools.partial(self.run, images) for images in bench.images]
        queued = None  # captured passes that wait for nothing can be lined up behind each other
        if self.mode != "eager" and self.run.waits == 0:
            queued = functools.partial(_each, calls)
        return Subject(calls, queued, len(calls), torch.no_grad, PIPELINE_CLOCKS)

    def _capture(self, model: RaggedViT):
        bench = self.bench()
        if self.facts.paper_padding:
            raise Skip("the paper's padded pipeline is measured as published: eager")
        traces = [model.trace(images) for images in bench.images]
        self.trace = traces[0]
        if not self.trace.stages:
            return model.capture(bench.batch)
        needs = [max(t.stages[0].counts) if self.facts.pads else sum(t.stages[0].counts) for t in traces]
        # only the buckets that these images use, and their neighbours where rounding may tip a count
        return model.capture(bench.batch, between=(int(0.99 * min(needs)), int(1.01 * max(needs))))

    def values(self, subject: Subject) -> dict[str, float]:
        """kept_tokens: mean rows per image after the last cut, CLS included.  capacity_waste: rows computed per real
        row after it, minus one.  flops_ratio: arithmetic of the unpruned network over this one's."""
        bench, stages, counts = self.bench(), self.trace.stages, self.counts()
        unpruned = forward_flops(bench.vit, batch=bench.batch)
        return {
            "kept_tokens": sum(counts) / len(counts),
            "capacity_waste": self._waste(counts),
            "flops_ratio": unpruned / forward_flops(bench.vit, stages, bench.batch),
        }

    def counts(self) -> list[int]:
        """Rows of each image after the last cut, CLS included; of all rows, where there is none."""
        return self.trace.stages[-1].counts if self.trace.stages else [self._rows()] * self.bench().batch

    def _rows(self) -> int:
        """Rows of an image before any cut."""
        vit = self.bench().vit
        return vit.patch_embed.num_patches + vit.num_prefix_tokens

    def _waste(self, counts: list[int]) -> float:
        if self.mode != "eager" and self.run.counts is not None:
            return self.run.capacity_waste
        if self.facts.paper_padding:
            return self._rows() * len(counts) / sum(counts) - 1
        if self.facts.pads:
            return max(counts) * len(counts) / sum(counts) - 1
        return 0.0


class TimmPipeline:
    """timm's own model, without this package: eager, or (compile+graph) torch.compile with mode="reduce-overhead"."""

    def __init__(self, bench, mode: str):
        self.bench, self.mode = bench, mode

    def build(self) -> Subject:
        bench = self.bench()
        run = bench.vit
        if self.mode != "eager":
            if bench.device != "cuda":
                raise Skip("CUDA graphs need a CUDA device")
            run = compile_with_room(run, mode="reduce-overhead", dynamic=False)
        exact, allowed = bench.expected(None, [])
        for _ in range(3):  # compiled, recorded, replayed
            error = rms(run(bench.images[0]) - exact)
            if not error <= allowed:
                raise Wrong(f"root mean square error of the logits {error:.2g}, allowed {allowed:.2g}")
        calls = [functools.partial(run, images) for images in bench.images]
        return Subject(calls, None, len(calls), torch.no_grad, PIPELINE_CLOCKS)

    def values(self, subject: Subject) -> dict[str, float]:
        """As those of `Pipeline`: every token stays."""
        vit = self.bench().vit
        return {"kept_tokens": vit.patch_embed.num_patches + vit.num_prefix_tokens, "capacity_waste": 0.0,
                "flops_ratio": 1.0}  # fmt: skip


def _each(calls) -> None:
    for call in calls:
        call()
