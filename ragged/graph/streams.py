"""The streams on which passes are recorded, and what hangs on them.

A matrix product may need memory to work in. PyTorch allocates it once for each stream and keeps it, and it has no more
than 32 streams, which it hands out in turn. Was a recording's stream used before, that memory is somebody else's: of an
earlier recording's pool, which goes with it, or of everybody's, where PyTorch may give it away, as
torch.compile(mode="reduce-overhead") has it do. The graphs would still write there. So a recording gets streams that no
other has used. When they are used up, PyTorch has to give back all such memory. That is not done each time, because a
graph of somebody else's may count on what it has.
"""

from __future__ import annotations

import functools
import threading

import torch

STREAMS = 32  # that PyTorch has for each device
_lock = threading.Lock()
_used: set[int] = set()  # that something was recorded on
_kept: set[int] = set()  # that passes are tried out on, and the branches of recordings that are none of ours
_branches: dict[int, torch.cuda.Stream] = {}  # stream of a recording -> the one beside it


def for_recording() -> torch.cuda.Stream:
    """A stream on the current device that no recording has used, with a branch of its own, for as long as there are
    any."""
    with _lock:
        stream, branch = _unused(2) or _given_back(2)
        _used.update((stream.cuda_stream, branch.cuda_stream))
        _branches[stream.cuda_stream] = branch
    return stream


def branch_of(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """Where to record beside `stream`, on the current device. Nothing ever runs there."""
    return _branches.get(stream.cuda_stream) or _other_branch(torch.cuda.current_device())


@functools.cache
def for_trials(device: int) -> torch.cuda.Stream:
    """The stream on which passes are tried out on `device` before they are recorded."""
    return _keep(device)


@functools.cache
def _other_branch(device: int) -> torch.cuda.Stream:
    return _keep(device)


def _keep(device: int) -> torch.cuda.Stream:
    with _lock, torch.cuda.device(device):
        (stream,) = _unused(1) or _given_back(1)
        _kept.add(stream.cuda_stream)
    return stream


def _unused(number: int) -> list[torch.cuda.Stream]:
    """So many streams that are neither used nor kept, or none."""
    found: dict[int, torch.cuda.Stream] = {}
    taken = _used | _kept
    for _ in range(STREAMS):
        stream = torch.cuda.Stream()
        if stream.cuda_stream not in taken:
            found[stream.cuda_stream] = stream
        if len(found) == number:
            return [*found.values()]
    return []


def _given_back(number: int) -> list[torch.cuda.Stream]:
    """The same, after PyTorch has given back what cuBLAS works in."""
    torch._C._cuda_clearCublasWorkspaces()
    _used.clear()
    _branches.clear()
    return _unused(number)
