"""Suite `mixed`: images of different sizes in one batch, packed, against what people do today, with the same tricks.

tokens U(112,448) px   square images, their sides drawn evenly from the multiples of 16 between the two numbers
backend triton         packed from the first token on
backend sdpa_padded    padded to the largest, with a mask
backend resized        every image resized to the largest
backend grouped        one batch for each size
backend one_by_one     one image after the other

The last three get networks that were made for each size. Captured, they are one graph of exactly these sizes, which a
server could not use for the next batch; packed and padded passes are captured for any sizes. Two more cases: tokens
from a quadtree against uniform patches, and ATS as published, with nine cuts.

timm's own NaFlexVit is no rival here: it pads and masks as `sdpa_padded` does, but reads every image's grid from the
device one number at a time, and resamples positions in every pass. So it cannot be captured, and would lose by that
alone; `sdpa_padded` is its way with all that taken out.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...backends import BACKENDS
from ...blocks import compiled_pieces
from ...data import normalise, photographs
from ...graph import CapturedList
from ...graph.parts import Recorder
from ...model import RaggedViT
from ...packing import Counts, Selection
from ...pruners import PRUNERS, Pruner
from ..pipelines import EPS, METRICS, MODES, PIPELINE_CLOCKS, Noted, Pipeline, Workbench, need, network, rms
from ..quadtree import quadtree_tokens
from ..rounds import Subject
from ..runner import Candidate, Case, Options, Skip, Wrong

SPREAD = "U(112,448) px"
SPREADS = ("U(224,224) px", "U(192,256) px", "U(160,320) px")
RIVALS = ("triton", "sdpa_padded", "grouped", "resized", "one_by_one")
LIST_METRICS = tuple(metric for metric in METRICS if metric != "flops_ratio")
EVIT = functools.partial(PRUNERS["evit"], keep=0.7)
QUADTREE, VARIANCE = "quadtree 16/32 px", 0.5


def sides(spread: str, batch: int, seed: int = 0) -> list[int]:
    """Sides in pixels of `batch` square images; spread: such as "U(112,448) px"."""
    low, high = map(int, re.fullmatch(r"U\((\d+),(\d+)\) px", spread).groups())
    draw = random.Random(seed)
    return [draw.randrange(low, high + 1, 16) for _ in range(batch)]


class InOrder(Pruner):
    """Selects what another pruner selected, call after call: taken, as a `Noted` keeps them."""

    def __init__(self, pruner: Pruner, taken: list[Selection | None]):
        super().__init__(pruner.name, pruner.at, pruner.where)
        self.left, self.adaptive = iter(taken), pruner.adaptive

    def select(self, view) -> Selection | None:
        return next(self.left)


class NotedInGraphs(Noted):
    """Notes what is recorded, and nothing else: after a replay the notes hold what that selected."""

    def select(self, view) -> Selection | None:
        selection = self.pruner.select(view)
        if torch.cuda.is_current_stream_capturing():
            self.taken.append(selection)
        return selection


def read_now(selection: Selection | None) -> Selection | None:
    """A selection of a recording, its counts as they are now: the host noted those of stand-ins."""
    if selection is None:
        return None

    def counted(counts):
        return Counts(counts.device, tuple(counts.device.tolist())) if isinstance(counts, Counts) else counts

    return replace(selection, counts=counted(selection.counts), fused=counted(selection.fused))


class Lists:
    """One network with its float32 twin, for any size, and sets of random images of the sizes that a spread says."""

    def __init__(self, name: str, batch: int, spread: str, dtype: torch.dtype, device: str, sets: int = 2):
        self.batch, self.dtype, self.device, self.sides = batch, dtype, device, sides(spread, batch)
        self.vit, self.exact = network(name, 224, dtype, device), network(name, 224, torch.float32, device)
        self._sized: dict[tuple[bool, int], nn.Module] = {}
        g = torch.Generator(device).manual_seed(0)
        draw = functools.partial(torch.randn, generator=g, device=device)
        self.images = [[draw(3, side, side).to(dtype) for side in self.sides] for _ in range(sets)]

    @property
    def tokens(self) -> int:
        """Rows of all images together, before any cut."""
        return sum((side // 16) ** 2 + self.vit.num_prefix_tokens for side in self.sides)

    def sized(self, exact: bool, side: int) -> nn.Module:
        """The network as if made for images of this side; all but the positions is shared."""
        if (exact, side) not in self._sized:
            vit = self.exact if exact else self.vit
            shared = {id(p): p for name, p in vit.named_parameters() if name != "pos_embed"}
            other = self._sized[exact, side] = copy.deepcopy(vit, shared)
            other.set_input_size(img_size=(side, side))
        return self._sized[exact, side]


def forward(bench: Lists, how: str, pruner: Pruner | None, exact: bool = False, compiled: bool = False) -> Callable:
    """A function from a list of images to logits, by the rival `how`."""
    if how in BACKENDS:
        model = RaggedViT(bench.exact if exact else bench.vit, pruner, how)
        return _compiled(model) if compiled else model
    backend, models = "sdpa_padded" if exact else "auto", {}
    for side in {max(bench.sides)} if how == "resized" else set(bench.sides):
        models[side] = RaggedViT(bench.sized(exact, side), pruner, backend)
    if compiled:
        for model in models.values():
            _compiled(model)
    return functools.partial({"grouped": _grouped, "resized": _resized, "one_by_one": _one_by_one}[how], models)


@functools.cache
def _pieces() -> dict[str, Callable]:
    return compiled_pieces(dynamic=True)


def _compiled(model: RaggedViT) -> RaggedViT:
    """`model.compile(dynamic=True)` with pieces that all rivals share: compiled once instead of a hundred times."""
    model._compiled, model._run = {"dynamic": True}, _pieces()
    return model


def _grouped(models: dict[int, RaggedViT], images: Sequence[Tensor]) -> Tensor:
    groups: dict[int, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape[1], []).append(i)
    logits = [models[side](torch.stack([images[i] for i in group])) for side, group in groups.items()]
    place = torch.tensor(list(itertools.chain(*groups.values()))).argsort().tolist()
    rows = torch.cat(logits).split(1)
    return torch.cat([rows[i] for i in place])


def _resized(models: dict[int, RaggedViT], images: Sequence[Tensor]) -> Tensor:
    ((side, model),) = models.items()
    resize = functools.partial(nn.functional.interpolate, size=(side, side), mode="bilinear")
    return model(torch.cat([resize(image[None]) if image.shape[1] != side else image[None] for image in images]))


def _one_by_one(models: dict[int, RaggedViT], images: Sequence[Tensor]) -> Tensor:
    return torch.cat([models[image.shape[1]](image[None]) for image in images])


class Exactly:
    """A function of a list of images in one graph, for exactly the sizes that it was made with."""

    waits, counts = 0, None

    def __init__(self, function: Callable, images: Sequence[Tensor]):
        self.images, recorder = [image.clone() for image in images], Recorder(None)
        for _ in range(2):
            recorder.try_out(lambda _: function(self.images))
        self.chain = recorder.record(lambda _: function(self.images))

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        torch._foreach_copy_(self.images, list(images))
        self.chain.replay()
        return self.chain.result.clone()


class ListPipeline:
    """A rival in one mode, on the lists of a bench, built when asked for."""

    def __init__(self, bench, pruner: Callable | None, how: str, mode: str):
        self.bench, self.pruner, self.how, self.mode, self.run = bench, pruner, how, mode, None
        self.kept = 0.0

    def build(self) -> Subject:
        bench = self.bench()
        need(bench.vit, self.how if self.how in BACKENDS else "auto")
        if self.mode != "eager" and bench.device != "cuda":
            raise Skip("CUDA graphs need a CUDA device")
        compiled, noted = self.mode == "compile+graph", Noted if self.mode == "eager" else NotedInGraphs
        pruner = None if self.pruner is None else noted(self.pruner())
        self.run = forward(bench, self.how, pruner, compiled=compiled)
        if self.mode != "eager":
            self.run = self._captured(self.run)
        self._check(pruner)
        if self.mode == "eager" and pruner is not None:  # on the clock nobody takes notes
            self.run = forward(bench, self.how, pruner.pruner)
        calls = [functools.partial(self.run, images) for images in bench.images]
        queued = (lambda: [call() for call in calls]) if self.mode != "eager" and not self.run.waits else None
        return Subject(calls, queued, len(calls), torch.no_grad, PIPELINE_CLOCKS)

    def _captured(self, eager: Callable):
        bench = self.bench()
        if self.how not in BACKENDS:
            return Exactly(eager, bench.images[0])
        for images in bench.images:
            eager(images)
        longest, total = (max(bench.sides) // 16) ** 2 + bench.vit.num_prefix_tokens, bench.tokens
        # only the capacities about this one; as coarse as if lists of any sizes up to twice as many tokens came
        between = (longest, longest) if BACKENDS[self.how].pads else None
        tokens = (total, 2 * total) if between else (total, int(1.03 * total))
        side = max(bench.sides)
        return eager.capture(bench.batch, tokens=tokens, longest=(side, side), between=between)

    def _check(self, pruner: Noted | None) -> None:
        """What runs against float32 with the selections that it made itself (another program may decide near ties the
        other way), twice the error of padded half precision allowed."""
        bench = self.bench()
        logits = self.run(bench.images[0])
        taken = [] if pruner is None else self._taken(pruner)

        def replayed(exact: bool) -> Tensor:
            images = [image.float() if exact else image for image in bench.images[0]]
            replay = None if pruner is None else InOrder(pruner, taken)
            how = "sdpa_padded" if self.how in BACKENDS else self.how
            return forward(bench, how, replay, exact)(images)

        exact, plain = replayed(True), replayed(False)
        allowed = 2 * rms(plain - exact) + EPS[bench.dtype] * rms(exact)
        error = rms(logits - exact)
        if not error <= allowed:
            raise Wrong(f"root mean square error of the logits {error:.2g}, allowed {allowed:.2g}")
        self.kept = bench.tokens / bench.batch
        if taken:
            stages = len(pruner.at)
            self.kept = sum(map(_rows, taken[stages - 1 :: stages])) / bench.batch

    def _taken(self, pruner: Noted) -> list[Selection | None]:
        """What was selected in the last call."""
        if not isinstance(self.run, CapturedList):  # it is all there is
            return [read_now(selection) for selection in pruner.taken]
        recorded = list(reversed(self.run.capacities)).index(self.run.size)
        stages = len(pruner.at)
        return [read_now(selection) for selection in pruner.taken[recorded * stages :][:stages]]

    def values(self, subject: Subject) -> dict[str, float]:
        """kept_tokens: mean rows per image after the last cut.  capacity_waste:
        rows computed per row of the images as they are, before any cut, minus one."""
        bench = self.bench()
        longest = (max(bench.sides) // 16) ** 2 + bench.vit.num_prefix_tokens
        if self.how in ("resized", "sdpa_padded"):
            waste = bench.batch * longest / bench.tokens - 1
        else:
            waste = self.run.token_waste if self.how in BACKENDS and self.mode != "eager" else 0.0
        return {"kept_tokens": self.kept, "capacity_waste": waste}


def _rows(selection: Selection) -> int:
    """Rows of all images that a selection with fixed counts leaves."""
    if isinstance(selection.counts, int):
        return (selection.counts + (selection.blend is not None)) * len(selection.index)
    fused = 0 if selection.blend is None else sum(selection.fused.host)
    return sum(selection.counts.host) + fused


class QuadtreePipeline(Pipeline):
    """Tokens from a quadtree, made eagerly, through the blocks in one mode."""

    def build(self) -> Subject:
        bench, vit = self.bench(), self.bench().vit
        if self.mode != "eager" and bench.device != "cuda":
            raise Skip("CUDA graphs need a CUDA device")
        model = bench.model(None, self.backend)
        if self.mode == "compile+graph":
            _compiled(model)
        given = [quadtree_tokens(vit, images, VARIANCE) for images in bench.images]
        self.rows = [sum(lengths) for *_, lengths in given]
        body = model.forward_tokens
        for tokens, cu, lengths in given:
            body(tokens, cu, lengths=lengths)
        if self.mode != "eager":
            tokens = (min(self.rows), int(1.03 * max(self.rows)))
            body = model.capture(bench.batch, tokens=tokens, longest=max(given[0][2] + given[-1][2]), embedded=True)
        self.run = body

        def call(images: Tensor) -> Tensor:
            tokens, cu, lengths = quadtree_tokens(vit, images, VARIANCE)
            return body(tokens, cu, lengths=lengths)

        tokens, cu, lengths = given[0]
        want = model.with_pruner(None).forward_tokens(tokens, cu, lengths=lengths)
        if not rms(call(bench.images[0]) - want) <= 10 * EPS[bench.dtype] * rms(want):
            raise Wrong("the captured pass is not the eager one")
        calls = [functools.partial(call, images) for images in bench.images]
        return Subject(calls, None, len(calls), torch.no_grad, PIPELINE_CLOCKS)

    def values(self, subject: Subject) -> dict[str, float]:
        waste = 0.0 if self.mode == "eager" else self.run.token_waste
        return {"kept_tokens": self.rows[0] / self.bench().batch, "capacity_waste": waste}


class Photographs(Workbench):
    """A workbench whose images are photographs: where a quadtree has something to save."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype, device: str):
        super().__init__(name, batch, dtype, device)
        photos = normalise(photographs()[0])
        for k, images in enumerate(self.images):
            order = [(i + k) % len(photos) for i in range(batch)]
            images.copy_(photos[order])


def mixed(options: Options) -> list[Case]:
    """Mixed sizes in every way and mode, a quadtree against uniform patches, and nine-stage ATS."""
    quick, cases = options.quick, []
    modes = ("eager", "graph") if quick else MODES
    names = options.models_or(("deit_tiny",) if quick else ("deit_small",))
    batches = options.batches_or((2,) if quick else (16, 64, 1, 4))
    for name in names:  # what the claims are about first, so that a recording cut short holds it
        for batch in batches:
            if batch == max(batches):
                cases.append(_ats(name, batch, modes, options))
            cases.append(_sizes(name, batch, SPREAD if not quick else "U(32,64) px", modes, options))
            if batch == max(batches):
                cases.append(_quadtree(name, batch, modes, options))
        for batch, spread in itertools.product((b for b in batches if b >= 16), SPREADS):
            cases.append(_sizes(name, batch, spread, MODES[-1:], options, (None,)))
    return cases


def _columns(name: str, batch: int, options: Options, tokens: str) -> dict:
    dtype = str(options.dtype).removeprefix("torch.")
    return {"suite": "mixed", "model": name, "batch": batch, "dtype": dtype, "tokens": tokens}


def _sizes(name: str, batch: int, spread: str, modes: Sequence[str], options: Options,
           pruners: Sequence[Callable | None] = (None, EVIT)) -> Case:  # fmt: skip
    bench = functools.cache(functools.partial(Lists, name, batch, spread, options.dtype, options.device))
    candidates = []
    for pruner, how, mode in itertools.product(pruners, RIVALS, modes):
        pipeline = ListPipeline(bench, pruner, how, mode)
        columns = {"pruner": "none" if pruner is None else "evit", "keep": 1.0 if pruner is None else 0.7}
        columns |= {"backend": how, "mode": mode}
        candidates.append(Candidate(columns, pipeline.build, LIST_METRICS, pipeline.values))
    return Case(_columns(name, batch, options, spread), candidates)


def _ats(name: str, batch: int, modes: Sequence[str], options: Options) -> Case:
    bench = functools.cache(functools.partial(Workbench, name, batch, options.dtype, options.device))
    candidates = []
    for backend, mode in itertools.product(("triton", "sdpa_padded"), modes):
        columns = {"pruner": "ats", "backend": backend, "mode": mode, "keep": ""}
        pipeline = Pipeline(bench, PRUNERS["ats"], backend, mode)
        candidates.append(Candidate(columns, pipeline.build, METRICS, pipeline.values))
    return Case(_columns(name, batch, options, "samples=196 at 3-11"), candidates)


def _quadtree(name: str, batch: int, modes: Sequence[str], options: Options) -> Case:
    bench = functools.cache(functools.partial(Photographs, name, batch, options.dtype, options.device))
    candidates = []
    for kind, tokens, mode in itertools.product((Pipeline, QuadtreePipeline), ("197", QUADTREE), modes):
        if (kind is Pipeline) != (tokens == "197"):
            continue
        columns = {"pruner": "none", "backend": "triton", "mode": mode, "keep": 1.0, "tokens": tokens}
        pipeline = kind(bench, None, "triton", mode)
        candidates.append(Candidate(columns, pipeline.build, LIST_METRICS, pipeline.values))
    return Case(_columns(name, batch, options, QUADTREE), candidates)
