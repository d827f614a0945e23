"""Thousands of calls of the kernel in Gluon, each with all shared memory full of NaN beforehand. Not collected:

    for i in 0 1 2 3; do python tests/stress.py --calls 1 --part $i/4 & done; wait   # compiles
    python tests/stress.py --calls 14400

A kernel that reads what it did not write, or reads too early, finds a NaN and not what an earlier call left there,
which would be right by luck. Cells go round all token counts and a few batches, both dtypes, with log-sum-exp and
without. Every call is compared bit by bit with the first of its cell, and that one with float64, all on the GPU.
Prints one JSON object; the exit status is 1 if anything was wrong. tests/test_gpu_gluon.py runs a short one.
"""

import argparse
import json
import sys
import time

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import ragged
from ragged.tiles import GLUON_LENGTHS

ROOM = 56  # tiles of 4 KiB that one program of the filler takes: as much as the largest of ours

HEADS, SIZES = 3, (8, 44, 90, 300)  # images: few share the queries of a head, many go round the stages
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # ‖out - ref‖ / ‖ref‖


@gluon.jit
def fill_kernel(Sink, value, ROOM: gl.constexpr):
    """Every word of a multiprocessor's shared memory becomes `value`; reading it back keeps the stores alive."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words = gl.allocate_shared_memory(gl.float32, [ROOM, 8, 128], shared)
    rows: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    seen = gl.zeros([8, 128], gl.float32, rows)
    for i in gl.static_range(ROOM):
        words.index(i).store(gl.zeros([8, 128], gl.float32, rows) + value)
    for i in gl.static_range(ROOM):
        seen += words.index(i).load(rows)
    total = gl.sum(gl.sum(seen, 1), 0)
    gl.store(Sink + gl.arange(0, 128, layout), total + gl.zeros([128], gl.float32, layout))


def poison(sink):
    """Two programs for each multiprocessor, so that none is left out."""
    fill_kernel[(2 * torch.cuda.get_device_properties(sink.device).multi_processor_count,)](sink, float("nan"), ROOM)


class Cell:
    """One shape: its inputs, its first result, and how often a later one was another."""

    def __init__(self, batch, tokens, dtype, want_lse):
        self.name = f"{batch}x{tokens} {str(dtype)[6:]}{' with lse' * want_lse}"
        g = torch.Generator("cuda").manual_seed(tokens)
        qkv = torch.randn(batch * tokens, 3, HEADS, 64, device="cuda", generator=g).to(dtype)
        cu = torch.arange(0, batch * tokens + 1, tokens, device="cuda", dtype=torch.int32)
        self.arguments = (*qkv.unbind(1), cu, cu, tokens, tokens)
        self.want_lse = want_lse
        self.first, self.differ = None, torch.zeros((), device="cuda", dtype=torch.int64)
        self.error, self.allowed = 0.0, LIMITS[dtype]

    def truth(self):
        q, k, v, cu, *_ = self.arguments
        q, k, v = (x.double().unflatten(0, (len(cu) - 1, -1)).transpose(1, 2) for x in (q, k, v))
        return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(0, 1)

    def call(self):
        got = ragged.varlen_attention(*self.arguments, backend="gluon", return_lse=self.want_lse)
        got = got if self.want_lse else (got,)
        if self.first is None:
            want = self.truth()
            self.first, self.error = [x.clone() for x in got], float((got[0] - want).norm() / want.norm())
        for x, y in zip(got, self.first):
            self.differ += (x.view(torch.int16) != y.view(torch.int16)).any()


def run(calls, seconds, part=(0, 1)):
    """So many calls over all token counts, or over the i-th of n parts of them, or until the time is over."""
    sink, begin, done, wrong = torch.empty(128, device="cuda"), time.monotonic(), 0, []
    first, end = (i * len(GLUON_LENGTHS) // part[1] for i in (part[0], part[0] + 1))
    lengths = GLUON_LENGTHS[first:end]
    each = -(-calls // len(lengths))
    for n in lengths:
        cells = [Cell(SIZES[n % 4], n, torch.float16, False), Cell(SIZES[(n + 2) % 4], n, torch.bfloat16, True)]
        for k in range(max(each, 2)):
            blank = [torch.full_like(x, float("nan")) for x in cells[k % 2].arguments[:2]]
            del blank  # the allocator hands this memory to the results
            poison(sink)
            cells[k % 2].call()
            done += 1
        wrong += [f"{c.name}: relative error {c.error:.2g}" for c in cells if not c.error <= c.allowed]
        wrong += [f"{c.name}: {int(c.differ)} calls with other bits" for c in cells if int(c.differ)]
        if time.monotonic() - begin > seconds:
            break
    assert sink.isnan().all(), "nothing was poisoned"
    return {"calls": done, "lengths": lengths.index(n) + 1, "of": len(lengths), "seconds": time.monotonic() - begin,
            "gpu": torch.cuda.get_device_name(), "wrong": wrong}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--part", default="0/1", help="i/n: the i-th of n parts of the token counts")
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    result = run(options.calls, options.seconds, tuple(map(int, options.part.split("/"))))
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["wrong"]) or result["lengths"] < result["of"])
