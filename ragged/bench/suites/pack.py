"""Suite `pack`: bringing the kept rows of a batch together, in the ways that are in use."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ... import data
from ...packing import pack as pack_rows
from ...rows import offsets
from ..rounds import CALL_CLOCKS, Subject
from ..runner import Candidate, Case, Options, Skip, Wrong
from ..timing import as_graph, syncs

DIM, SEQLEN = 768, 197  # DeiT-B
WAYS = ("triton", "triton:counts_known", "triton:index", "mask_indexing", "python_loop", "gather")


def packers(x: Tensor, keep: Tensor, counts: list[int]) -> dict[str, Callable[[], object]]:
    """Ways to bring the kept rows together: x (batch, n, dim), keep bool (batch, n). `triton`, with or without the
    counts on the host, and `mask_indexing` give the flat buffer and cu_seqlens. `python_loop` is the paper's padded
    gather, one image after the other. `triton:index` and `gather` take row numbers: equal counts only."""

    def python_loop() -> Tensor:
        out = x.new_zeros(x.shape)
        for b in range(x.shape[0]):
            rows = x[b][keep[b]]
            out[b, : rows.shape[0]] = rows
        return out

    found: dict[str, Callable[[], object]] = {
        "triton": lambda: pack_rows(x, keep),
        "triton:counts_known": lambda: pack_rows(x, keep, counts=counts),
        "mask_indexing": lambda: (x[keep], offsets(keep.sum(1))),
        "python_loop": python_loop,
    }
    if min(counts) == max(counts):
        index = keep.nonzero()[:, 1].view(x.shape[0], -1)
        found["triton:index"] = lambda: pack_rows(x, index)
        found["gather"] = lambda: x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    return found


def random_keep(tokens: str, batch: int, device: str, seed: int = 0) -> tuple[Tensor, list[int]]:
    """A mask bool (batch, SEQLEN) that keeps CLS and random patches, `tokens` rows in all, and the counts."""
    counts = data.lengths(tokens, batch)
    noise = torch.rand(batch, SEQLEN, generator=torch.Generator().manual_seed(seed))
    noise[:, 0] = -1.0
    ranks = noise.argsort(1).argsort(1)
    return (ranks < torch.tensor(counts)[:, None]).to(device), counts


def _check(out, x: Tensor, keep: Tensor, counts: list[int]) -> None:
    rows = out[0] if isinstance(out, tuple) else getattr(out, "tokens", out)
    if rows.dim() == 3:  # a padded gather: its real rows
        width = rows.shape[1]
        rows = rows[torch.arange(width, device=x.device) < torch.tensor(counts, device=x.device)[:, None]]
    if not torch.equal(rows, x[keep]):
        raise Wrong("other rows than x[keep]")


def _subject(inputs, way: str, mode: str) -> Subject:
    keep, counts, sets = inputs()
    ways = [packers(x, keep, counts) for x in sets]
    if way not in ways[0]:
        raise Skip("needs equal counts")
    calls = [found[way] for found in ways]
    _check(calls[0](), sets[0], keep, counts)
    for call in calls:
        call()
    waits = syncs(calls)
    if mode == "graph" and (waits or not keep.is_cuda):
        raise Skip(f"cannot be captured: it waits for the GPU {waits:g} times a call" if waits else "needs CUDA")
    replay = None if waits or not keep.is_cuda else as_graph(calls)
    if mode == "graph":
        calls = [as_graph([call], 1) for call in calls]
    return Subject(calls, replay, 20, clocks=CALL_CLOCKS)


def _inputs(tokens: str, batch: int, options: Options):
    keep, counts = random_keep(tokens, batch, options.device)
    shape, sets = (batch, SEQLEN, DIM), 4 if batch <= 64 else 2
    return keep, counts, [torch.randn(shape, device=options.device, dtype=options.dtype) for _ in range(sets)]


def pack(options: Options) -> list[Case]:
    """From (batch, 197, 768) to the kept rows. triton: from a mask, which costs one wait; counts_known: the host knows
    the counts; index: from row numbers."""
    cases = []
    batches = options.batches_or((1, 4) if options.quick else (64, 1, 256, 4, 16))
    for batch, tokens in itertools.product(batches, ("99", "U(30,168)")):
        columns = {"suite": "pack", "model": "deit_base", "pruner": "none", "batch": batch, "tokens": tokens,
                   "keep": 0.5, "dtype": str(options.dtype).removeprefix("torch.")}  # fmt: skip
        inputs = functools.cache(functools.partial(_inputs, tokens, batch, options))
        candidates = [
            Candidate({"backend": way, "mode": mode}, functools.partial(_subject, inputs, way, mode), CALL_CLOCKS)
            for way, mode in itertools.product(WAYS, ("eager", "graph"))
        ]
        cases.append(Case(columns, candidates))
    return cases
