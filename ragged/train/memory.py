"""How much memory a training run takes on a CPU, said before it takes it: there, too much ends in a killed process."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.scene_pool import SIZE

GB = 1e9
PICTURE = 3 * SIZE * SIZE  # bytes of a background
PROCESS = 0.6e9  # PyTorch itself, and what every process that draws backgrounds has for its own


def check(asked: argparse.Namespace, parameters: list[nn.Parameter], loss_of: Callable[..., Tensor]) -> None:
    """Say what training on the CPU will give and need. ValueError if this machine has less memory.

    asked: the options, `batch` and `pool` among them.  parameters: what is trained.  loss_of: as in `Run.train`.
    """
    need, have = estimate(asked, parameters, loss_of), available()
    print(f"on the CPU, {asked.steps} steps of {asked.batch} pictures: enough to see the loss fall, not for a network "
          f"that reads digits (a large GPU takes 4000 steps of 1024 in minutes); about {need / GB:.1f} GB of memory"
          + (f", {have / GB:.1f} GB are free" if have else ""), file=sys.stderr, flush=True)  # fmt: skip
    if have and need > have:
        raise ValueError(f"--batch {asked.batch}, --pool {asked.pool}: they need about {need / GB:.1f} GB of memory, "
                         f"{have / GB:.1f} GB are free; take smaller ones")  # fmt: skip


def estimate(asked: argparse.Namespace, parameters: list[nn.Parameter], loss_of: Callable[..., Tensor]) -> float:
    """Bytes: the parameters four times (gradient, two moments), what autograd keeps of a batch and a third more for
    what comes and goes, the pool and a copy of it. What autograd keeps is counted on two pictures."""
    held: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return x

    own = {p.untyped_storage().data_ptr() for p in parameters}
    boxes = torch.tensor([[0.2, 0.2, 0.6, 0.6]] * 2)
    pictures = torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, dtype=torch.int64), boxes
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = loss_of(*pictures)
    del loss
    kept = sum(size for place, size in held.items() if place not in own)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    cores = min(os.cpu_count() or 1, 32)
    return 4 * weights + kept / 2 * asked.batch * 4 / 3 + 2 * asked.pool * PICTURE + PROCESS * (1 + cores / 4)


def available() -> float | None:
    """Bytes of memory that are free here, within the limit of a container; None where the system does not say."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        most, used = ((group / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current"))
        if most != "max":
            facts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
            free.append(int(most) - int(used) + int(facts["inactive_file"]))  # files read once give their place away
    except (KeyError, OSError, ValueError):  # not Linux, or no such control group
        pass
    return float(min(free)) if free else None
