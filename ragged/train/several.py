"""Training on several processes, as torchrun starts them: each takes its share of a batch, and PyTorch's
DistributedDataParallel makes their gradients one. The first process writes; what it keeps fits any number of them."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from ..bench.processes import Group

SEEDS_APART = 1_000_003  # between the pictures of two processes
ASK_EVERY = 10  # steps between two looks at whether any process was interrupted


def check(asked: argparse.Namespace, group: Group) -> None:
    """Whether `asked` can be shared by `group`. ValueError for numbers that do not divide, and for processes that were
    asked for different things or stand on different GPUs."""
    if group.size == 1:
        return
    for name in ("batch", "pool", "fresh"):
        if getattr(asked, name) % group.size:
            raise ValueError(f"--{name}: expected a multiple of the {group.size} processes, got {getattr(asked, name)}")
    gpu = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
    group.agree({"options": vars(asked), "GPU": gpu, "version of PyTorch": torch.__version__})


class Network:
    """`module` as it is called while it is trained: compiled with `torch.compile` where `options` are given, and shared
    once `share` was called."""

    def __init__(self, module: nn.Module, options: dict | None):
        self.module, self.options = module, options
        self.call = self._compiled(module)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.call(images)

    def _compiled(self, module: nn.Module) -> nn.Module:
        return module if self.options is None else torch.compile(module, **self.options)

    def share(self, group: Group) -> None:
        """From now on gradients are means over the processes of `group`; weights become those of the first."""
        where = [torch.cuda.current_device()] if next(self.module.parameters()).is_cuda else None
        if self.options is not None:
            # otherwise PyTorch cuts the network into a piece for each bucket of gradients, wherever it is compiled, so
            # that sharing begins before the last gradient is there; between GPUs of one machine the cuts cost more
            torch._dynamo.config.optimize_ddp = False
        inner, less_copying = self._compiled(self.module), {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        self.call = nn.parallel.DistributedDataParallel(inner, device_ids=where, **less_copying)


def interrupted(asked: bool, step: int, group: Group) -> bool:
    """Whether to stop after `step`: `asked` of this process, or, looked at every few steps, of any."""
    if group.size == 1:
        return asked
    return step % ASK_EVERY == 0 and bool(group.total(torch.tensor([int(asked)])).item())
