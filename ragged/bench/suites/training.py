"""Suite `training`: a whole step of training, forward, backward and optimizer, while tokens are dropped.

backend unpruned    the same network without a cut
tokens 99           equal counts: threshold_l2 at keep 0.5, the paper's single cut after the fourth block
tokens U(30,168)    truly ragged: prescribed random lengths, mean 99, which the host is not told
torch_varlen        FlashAttention-2 as PyTorch has it, with PyTorch's own backward pass for it
dtype               of the products: weights, residual stream and optimizer are float32, under autocast

images_per_s is counted over steps one behind the other. peak_mb: the most memory allocated in a step, weights, moments
and images included. flops_ratio: arithmetic of the unpruned network over this one's, the same forward and in a step.
Before any clock runs, gradients on a few images are held against those of the padded network in float32 with the same
selections.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import data
from ...backends import BACKENDS
from ...blocks import begin_block, end_block, finish_attention
from ...model import RaggedViT
from ...pruners import PRUNERS, GivenLengths, Pruner
from ..flops import forward_flops
from ..networks import network
from ..pipelines import Noted, Replay, rms
from ..rounds import Subject
from ..runner import Candidate, Case, Options, Skip, Wrong, settle
from .model import MODELS, SINGLE_CUT

METRICS = ("images_per_s", "peak_mb", "kept_tokens", "flops_ratio")
MODES = ("eager", "compile")
KEEPS = (0.5, 0.7, 0.3)
RIVALS = ("torch_varlen", "flash_attn")
EQUAL, RAGGED = ("triton", "dense", *RIVALS), ("triton", "sdpa_padded", *RIVALS)
CHECKED = 8  # images whose gradients are looked at
EPS = 1e-2  # slack of that, relative to the gradient


def training(options: Options) -> list[Case]:
    """DeiT-B, -S and -Ti, unpruned, with equal counts and truly ragged, by every backend that trains, eager and with
    compiled pieces."""
    cases, quick = [], options.quick
    for batch, name in itertools.product(
        options.batches_or((4,) if quick else (256, 64)), options.models_or(("deit_tiny",) if quick else MODELS)
    ):
        bench = functools.cache(functools.partial(Bench, name, batch, options.device))
        found = []
        for mode in MODES[:1] if quick else MODES:
            unpruned = {"pruner": "none", "backend": "unpruned", "tokens": "197", "keep": 1.0}
            found.append(Step(bench, None, unpruned | {"mode": mode}).candidate())
            for keep in (0.5,) if quick else KEEPS:
                make = functools.partial(_equal, keep)
                columns = {"pruner": "threshold_l2", "tokens": str(1 + int(196 * keep)), "keep": keep, "mode": mode}
                found += [Step(bench, make, columns | {"backend": backend}).candidate() for backend in EQUAL]
            make = functools.partial(_ragged, data.lengths("U(30,168)", batch))
            columns = {"pruner": "given_lengths", "tokens": "U(30,168)", "keep": 0.5, "mode": mode}
            found += [Step(bench, make, columns | {"backend": backend}).candidate() for backend in RAGGED]
        dtype = "bfloat16"
        cases.append(Case({"suite": "training", "model": name, "batch": batch, "dtype": dtype}, found))
    return cases


def _equal(keep: float, images: int) -> Pruner:
    return PRUNERS["threshold_l2"](keep=keep, **SINGLE_CUT)


def _ragged(lengths: list[int], images: int) -> Pruner:
    return GivenLengths(lengths[:images])


class Bench:
    """A network in float32, its optimizer, and a batch of random images, shared by all steps of a case."""

    def __init__(self, name: str, batch: int, device: str):
        self.vit = copy.deepcopy(network(name, 224, torch.float32, device)).requires_grad_(True)
        self.batch, self.device = batch, device
        generator = torch.Generator(device).manual_seed(0)
        self.images = torch.randn(batch, 3, 224, 224, device=device, generator=generator)
        self.labels = torch.randint(10, (batch,), device=device, generator=generator)
        self.optimizer = torch.optim.AdamW(self.vit.parameters(), lr=1e-6, fused=device == "cuda")

    def gradients(self, model: RaggedViT, images: Tensor, autocast: bool = True) -> list[Tensor]:
        """Of a few weights of the network, by `model` for the first so many labels."""
        blocks = self.vit.blocks
        weights = [blocks[0].attn.qkv.weight, blocks[5].mlp.fc1.weight, blocks[-1].attn.proj.weight]
        with torch.enable_grad(), torch.autocast(self.device, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images).float(), self.labels[: len(images)])
        return torch.autograd.grad(loss, weights)

    def check(self, model: RaggedViT, pruner: Pruner | None) -> None:
        """Gradients of `model`, with `pruner` for a few images, against those in float32. Raises Wrong."""
        images = self.images[:CHECKED]
        noted = None if pruner is None else Noted(pruner)
        got = self.gradients(model.with_pruner(noted), images)
        again = None if noted is None else Replay(pruner, noted.taken)
        padded = RaggedViT(self.vit, again, "sdpa_padded")
        exact, plain = (self.gradients(padded, images, autocast) for autocast in (False, True))
        for a, b, c in zip(got, exact, plain, strict=True):
            error, allowed = rms(a - b), 2 * rms(c - b) + EPS * rms(b)
            if not error <= allowed:
                raise Wrong(f"root mean square error of a gradient {error:.2g}, allowed {allowed:.2g}")


class Step:
    """A step of one provider in one mode. make: images -> the pruner, None without one."""

    def __init__(self, bench: Callable[[], Bench], make: Callable[[int], Pruner] | None, columns: dict):
        self.bench, self.make, self.columns = bench, make, columns
        self.stages: list = []

    def candidate(self) -> Candidate:
        """The provider as the recorder takes it."""
        return Candidate(self.columns, self.build, METRICS, self.values)

    def build(self) -> Subject:
        """The step, checked, and its peak."""
        bench, name = self.bench(), self.columns["backend"]
        settle()
        backend = "auto" if name == "unpruned" else name
        headdim = bench.vit.embed_dim // bench.vit.blocks[0].attn.num_heads
        if backend != "auto" and (why := BACKENDS[backend].why_not(bench.device, torch.bfloat16, headdim)):
            raise Skip(why)
        pruner, few = (self.make(n) if self.make else None for n in (bench.batch, min(CHECKED, bench.batch)))
        model = RaggedViT(bench.vit, pruner, backend)
        if backend == "torch_varlen":
            model._run = model._run | {"packed_block": native_block}
        if self.columns["mode"] == "compile":
            if bench.device != "cuda":
                raise Skip("compiled for a CUDA device")
            self._compile(model)
        bench.check(model, few)
        with torch.no_grad(), torch.autocast(bench.device, torch.bfloat16):
            self.stages = model.trace(bench.images).stages
        step = functools.partial(one_step, bench, model)
        return Subject([step], clocks=("stream_us",), around=functools.partial(training_mode, model),
                       found={"peak_mb": peak_mb(step, model)})  # fmt: skip

    def _compile(self, model: RaggedViT) -> None:
        own = model._run["packed_block"]
        model.compile(dynamic=True)
        if own is native_block:
            model._run["packed_block"] = torch.compile(native_block, dynamic=True)

    def values(self, subject: Subject) -> dict[str, float]:
        """What needs no clock."""
        bench = self.bench()
        counts = self.stages[-1].counts if self.stages else [197]
        ratio = forward_flops(bench.vit, batch=bench.batch) / forward_flops(bench.vit, self.stages, bench.batch)
        return subject.found | {"kept_tokens": sum(counts) / len(counts), "flops_ratio": ratio}


def one_step(bench: Bench, model: RaggedViT) -> None:
    """Forward, loss, backward, and the optimizer's step."""
    with torch.autocast(bench.device, torch.bfloat16):
        loss = F.cross_entropy(model(bench.images).float(), bench.labels)
    bench.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    bench.optimizer.step()


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Gradients, and `model` in training mode; the network is shared."""
    with torch.enable_grad():
        model.train()
        try:
            yield
        finally:
            model.eval()


def peak_mb(step: Callable[[], None], model: nn.Module) -> float | None:
    """The most memory allocated in the second of two steps, in MB; None without CUDA."""
    with training_mode(model):
        step()
        if not torch.cuda.is_available():
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20


def native_block(block: nn.Module, x: Tensor, more: Tensor | None, cu: Tensor, longest: int, scale: float,
                 backend: str, drops: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`packed_block` with FlashAttention-2 called as PyTorch's users call it, so that its backward pass is PyTorch's
    own; arguments as there."""
    from torch.nn.attention.varlen import varlen_attn

    x, *qkv = begin_block(block, x, more)
    q, k, v = (y.to(torch.bfloat16) for y in qkv)
    heads = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale)
    return end_block(block, finish_attention(block, x, heads, cu, drops), cu, drops)
