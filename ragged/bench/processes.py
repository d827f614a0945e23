"""Several processes of one program, as torchrun starts them: who is who, one sum over all, and trouble that names the
process and its cause."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .commandline import sentence

START_SECONDS = 120  # until all processes must have found each other
WAIT_SECONDS = 1800  # that one process waits for another, which may read slower files


@dataclass(frozen=True)
class Group:
    """The processes of a run. rank: which of them this is, 0 writes.  size: how many there are.  device: what sums
    are made on."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of an int64 or float tensor, of one shape everywhere, over all processes, on the CPU."""
        if self.size == 1:
            return numbers
        whole = numbers.to(self.device, copy=True)
        self._collect(lambda: dist.all_reduce(whole))
        return whole.cpu()

    def wait(self) -> None:
        """Until all processes are here, and their GPUs idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.total(torch.zeros(1))

    def of_first(self, value: object) -> object:
        """What the first process has for `value`."""
        held = [value]
        if self.size > 1:
            self._collect(lambda: dist.broadcast_object_list(held, src=0, device=torch.device("cpu")))
        return held[0]

    def agree(self, facts: dict[str, object]) -> None:
        """ValueError, naming the process and the fact, where `facts` are not the same in all of them."""
        everyone: list = [None] * self.size
        if self.size == 1:
            return
        self._collect(lambda: dist.all_gather_object(everyone, facts))
        for rank, other in enumerate(everyone):
            for what in facts:
                if other[what] != everyone[0][what]:
                    here, there = (str(f[what])[:60] for f in (everyone[0], other))
                    raise ValueError(f"the {what} of rank {rank} and of rank 0 differ: {there!r} and {here!r}; all "
                                     "processes must have the same")  # fmt: skip

    def _collect(self, work: Callable[[], object]) -> None:
        try:
            work()
        except RuntimeError as error:  # every kind that torch.distributed raises is one
            raise OSError(f"another process ended or does not answer, and says why itself ({_short(error)})") from error


ALONE = Group()


def asked() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def take_gpu(device: str) -> None:
    """Make the GPU of this process the current one. ValueError where there is none, and, with the rank, where there are
    fewer than processes."""
    if device != "cuda":
        return
    there = torch.cuda.device_count()
    if not there:
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; --device cpu is for trying things out")
    if asked() == 1:
        return
    rank = os.environ["RANK"]
    local = int(os.environ.get("LOCAL_RANK", rank))
    if local >= there:
        raise ValueError(f"rank {rank} of {asked()}: there are {there} GPUs here, and this is process {local + 1} of "
                         f"this machine; start with --nproc-per-node={there} at most")  # fmt: skip
    torch.cuda.set_device(local)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group of this process inside. device: "cuda", of which each process of a machine takes its own, or "cpu".

    What is raised inside as OSError, ValueError or ImportError, and want of memory, comes out as ValueError with the
    rank in front; so does a group that does not come up.
    """
    if asked() == 1:
        yield Group(device=device)
        return
    rank, size = int(os.environ["RANK"]), asked()
    try:
        yield _join(rank, size, device)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"rank {rank} of {size}: its GPU has too little memory left for this; take a smaller --batch, "
                         f"or look who else is on it ({_short(error)})") from error  # fmt: skip
    except (OSError, ValueError, ImportError) as error:
        # the group is left as it is: the others may wait in it, and torchrun ends them
        raise ValueError(f"rank {rank} of {size}: {sentence(error)}") from error
    dist.destroy_process_group()


def _join(rank: int, size: int, device: str) -> Group:
    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=datetime.timedelta(seconds=START_SECONDS)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size,
                                timeout=datetime.timedelta(seconds=WAIT_SECONDS))  # fmt: skip
        dist.barrier(device_ids=[torch.cuda.current_device()] if device == "cuda" else None)
    except (RuntimeError, ValueError) as error:
        raise OSError(f"the {size} processes did not find each other at {where} within {START_SECONDS} s "
                      f"({_short(error)}); start them all, with torchrun") from error  # fmt: skip
    return Group(rank, size, device)


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:160]
