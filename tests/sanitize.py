"""Every kernel on the smallest inputs that reach all of its branches, for NVIDIA's compute-sanitizer. Not collected:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

tests/test_gpu_sanitizer.py runs it under memcheck, racecheck and initcheck. Every tile choice of ragged/tiles.py is
started, twice (the first start goes through Triton's JIT, the second straight to the driver), with the choice put in by
hand: what a program does is decided by its tiles, not by how many programs there are, so two images will do; the kernel
in Gluon gets as many as take it round its stages more than once, on three multiprocessors. Inputs are
made on the host and every tensor has an allocation of its own, so that one row too many is seen; results are read back
whole and compared with float64, so that a row too few is seen, too.

--part i/n runs every n-th case.  --only TEXT those with TEXT in their name.  --device cpu works with
TRITON_INTERPRET=1.  --wrong makes mistakes on purpose.
"""

import argparse
import functools
import itertools
from unittest import mock

import torch

from ragged import launch
from ragged import rows as row_ops
from ragged import tiles as tiles_of
from ragged.attention import varlen_attention_ref
from ragged.backends import BACKENDS
from ragged.kernels import attention as kernels
from ragged.kernels import backward as backward_kernels
from ragged.rows import scores as score_ops
from ragged.tiles import choose_backward, choose_tiles

HEADS = 2
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@functools.cache
def tile_choices():
    """{tiles: (shortest call, longest call)} over everything `choose_tiles` can answer; a call is (max_q, max_k,
    headdim, itemsize, equal)."""
    found = {}
    for headdim, itemsize in ((64, 2), (80, 2), (64, 4)):
        for programs in (2, 300, 500, 2000, tiles_of.HIGHEST_GRID + 1):
            for equal in (False, True):
                for max_k in range(1, 340):
                    for max_q in (1, 65, 104, 129, 168, 193, 232, 257):  # short last tiles and longer ones
                        tiles = choose_tiles(max_q, max_k, headdim, programs, equal, itemsize)
                        call = (max_q, max_k, headdim, itemsize, equal)
                        found[tiles] = (found.get(tiles, (call,))[0], call)
    return found


def numbers(device, dtype, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def offsets(counts, device):
    return torch.tensor([0, *counts]).cumsum(0).int().to(device)


def tensors(device, dtype, counts_q, counts_k, dim, room, together):
    """q, k and v with `room` surplus rows, which belong to no image. together: as views of one projection."""
    total_q, total_k = sum(counts_q) + room, sum(counts_k) + room
    if together:
        return numbers(device, dtype, total_q, 3, HEADS, dim).unbind(1)
    q = numbers(device, dtype, total_q, HEADS, dim, seed=1)
    return (q, *(numbers(device, dtype, total_k, HEADS, dim, seed=seed) for seed in (2, 3)))


def attention(device, tiles, counts_q, counts_k, dim, dtype, room=0, lse=False, together=False):
    """One call with given tiles against float64. room, together: as in `tensors`."""
    q, k, v = tensors(device, dtype, counts_q, counts_k, dim, room, together)
    arguments = (q, k, v, offsets(counts_q, device), offsets(counts_k, device), max(counts_q), max(counts_k))
    want, want_lse = varlen_attention_ref(*(x.cpu() if torch.is_tensor(x) else x for x in arguments), return_lse=True)
    rows = sum(counts_q)
    highest = 0 if dict(tiles.shape).get("FLAT") else tiles_of.HIGHEST_GRID  # the grid must go with the choice
    with (
        mock.patch.object(kernels, "choose_tiles", lambda *_: tiles),
        mock.patch.object(tiles_of, "HIGHEST_GRID", highest),
    ):
        for _ in range(2):
            out, sums = kernels.attend(*arguments, dim**-0.5, lse)
            close(out[:rows], want[:rows], dtype)
            if lse:
                torch.testing.assert_close(sums.cpu()[:, :rows].double(), want_lse[:, :rows], rtol=1e-5, atol=1e-4)


def close(got, want, dtype):
    """Loose: this is no test of accuracy, but of rows that are missing or foreign."""
    torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-4 if dtype == SINGLE else 3e-2)


def attention_cases():
    for tiles, calls in tile_choices().items():
        shape = " ".join(f"{key}={value}" for key, value in tiles.shape)
        for max_q, max_k, dim, itemsize, equal in dict.fromkeys(calls):
            name = f"{tiles.kernel} {shape} {dict(tiles.options).get('maxnreg', '')} q={max_q} k={max_k} D={dim}"
            dtype = HALF if itemsize == 2 else SINGLE
            if equal and tiles.kernel == "resident":
                yield name, attention, (tiles, [max_q] * 2, [max_k] * 2, dim, dtype)
                less_q, less_k = max_q - max_q // 3, max_k - max_k // 3  # the guess that all are equal is wrong
                room = max(max_q // 3, max_k // 3)
                yield name + " wrong guess", attention, (tiles, [less_q, max_q], [less_k, max_k], dim, dtype, room)
            else:
                yield name, attention, (tiles, [1, max_q, 0, 3], [2, max_k, 1, 0], dim, dtype)


@functools.cache
def backward_choices():
    """{tiles: (shortest call, longest call)} over everything `choose_backward` can answer; a call is (max_q, max_k,
    headdim, itemsize)."""
    found = {}
    for headdim, itemsize in ((64, 2), (80, 2), (64, 4)):
        for programs in (2, 300):
            for max_q in (1, 16, 17, 39, 64, 65, 128, 129, 197, 256, 257):
                for max_k in (1, 17, 33, 65, 130):
                    tiles = choose_backward(max_q, max_k, headdim, programs, itemsize, True)
                    call = (max_q, max_k, headdim, itemsize)
                    found[tiles] = (found.get(tiles, (call,))[0], call)
    return found


def backward_cases():
    for tiles, calls in backward_choices().items():
        shape = " ".join(f"{t.kernel} {dict(t.shape)}" for t in tiles)
        for max_q, max_k, dim, itemsize in dict.fromkeys(calls):
            name, dtype = f"backward {shape} q={max_q} k={max_k} D={dim}", HALF if itemsize == 2 else SINGLE
            yield name, backward, (tiles, [1, max_q, 0, 3], [2, max_k, 1, 0], dim, dtype, 5)
        if dim == 64:
            yield name + " lse", backward, (tiles, [max_q, 1], [max_k, 2], 24, dtype, 0, True)
            yield name + " one projection", backward, (tiles, [max_q, 1], [max_q, 1], dim, dtype, 3, False, True)


def backward(device, tiles, counts_q, counts_k, dim, dtype, room=0, dlse=False, together=False):
    """One backward pass with given tiles against float64; the arguments as in `attention`."""
    q, k, v = tensors(device, dtype, counts_q, counts_k, dim, room, together)
    total_q = q.shape[0]
    sizes = (offsets(counts_q, device), offsets(counts_k, device), max(counts_q), max(counts_k))
    dout = numbers(device, dtype, total_q, HEADS, dim, seed=4)
    extra = numbers(device, SINGLE, HEADS, total_q, seed=5) if dlse else None
    cpu = [x.cpu() if torch.is_tensor(x) else x for x in (q, k, v, *sizes)]
    rows = [sum(counts_q), sum(counts_k), sum(counts_k)]
    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in cpu[:3]]
        out, lse = varlen_attention_ref(*leaves, *cpu[3:], return_lse=True)
        loss = (out[: rows[0]] * dout.cpu()[: rows[0]]).sum()
        if dlse:
            some = lse.isfinite() & (torch.arange(total_q) < rows[0])
            loss = loss + (lse[some] * extra.cpu()[some]).sum()
        want = [dx.double() for dx in torch.autograd.grad(loss, leaves)]
    given = (out.detach().to(dtype).to(device), lse.detach().float().to(device))
    with mock.patch.object(backward_kernels, "choose_backward", lambda *_: tiles):
        for _ in range(2):
            got = backward_kernels.attend_backward(dout, extra, q, k, v, *given, *sizes, dim**-0.5, True)
            for mine, exact, n in zip(got, want, rows):
                scale = max(1.0, float(exact.abs().max()))
                close(mine[:n] / scale, exact[:n] / scale, dtype)
                assert not mine[n:].cpu().any()


def special_cases():
    """Narrow heads, views of a projection, log-sum-exp, and the other kernels."""
    choices = {(t.kernel, dict(t.shape).get("EQUAL"), dict(t.shape).get("ONE_TILE")): (t, c[0]) for t, c in
               tile_choices().items() if c[0][2] == 64 and c[0][3] == 2}  # fmt: skip
    for (kernel, equal, _), (tiles, (max_q, max_k, *_)) in choices.items():
        counts = ([max_q] * 2, [max_k] * 2) if equal else ([1, max_q, 0], [2, max_k, 1])
        for dim, lse in ((24, False), (64, True)):
            yield f"{kernel} equal={equal} D={dim} lse={lse}", attention, (tiles, *counts, dim, HALF, 0, lse)
        both = [max_k] * 2 if equal else [1, max_k, 0]
        if max_q == max_k or not equal:
            yield f"{kernel} views of a projection", attention, (tiles, both, both, 64, HALF, 0, False, True)
    for dtype, dim in ((HALF, 64), (SINGLE, 24)):
        yield f"paper {dtype} D={dim}", paper, (dtype, dim)
        yield f"cls {dtype} D={dim}", cls, (dtype, dim)
        for longest in (40, 197, 300):
            yield f"samples {dtype} D={dim} n={longest}", samples, (dtype, dim, longest)
        for width in (1, 130, 384):
            yield f"copies {dtype} dim={width}", copies, (dtype, width)
        for batch in (1, 3, 150):
            yield f"take {dtype} batch={batch}", takes, (dtype, batch)
            yield f"return {dtype} batch={batch}", returns, (dtype, batch)
        for n in (5, 197, 577):
            yield f"rank {dtype} n={n}", ranks, (dtype, n)


def gluon_cases():
    """Every choice of tiles of the kernel in Gluon, at its longest; a right guess and a wrong one."""
    seen = set()
    for n, programs in itertools.product(reversed(tiles_of.GLUON_LENGTHS), (1, 10**6)):
        tiles = tiles_of.pipe_tiles(n, 64, programs, 1)
        if tiles not in seen:
            seen.add(tiles)
            for dtype, lse, counts, dim in ((HALF, False, [n] * 14, 64), (BRAIN, True, [n, n - 1, 0, n], 32)):
                if counts[1] == n or n in (80, 197, 208):
                    yield f"gluon n={n} {dict(tiles.shape)} {counts[:2]}", gluon, (programs, counts, dim, dtype, lse)


def gluon(device, programs, counts, dim, dtype, lse):
    from ragged.kernels import hopper

    n, rows, room = max(counts), sum(counts), len(counts) * max(counts) - sum(counts)
    q, k, v = numbers(device, dtype, rows + room, 3, HEADS, dim).unbind(1)
    cu = offsets(counts, device)
    arguments = (*(x[:rows].cpu() for x in (q, k, v)), cu.cpu(), cu.cpu(), n, n)
    want, want_lse = varlen_attention_ref(*arguments, return_lse=True)
    choice = lambda n, dim, _, processors: tiles_of.pipe_tiles(n, dim, programs, processors)  # noqa: E731
    with mock.patch.object(hopper, "pipe_tiles", choice), mock.patch.object(hopper.launch, "processors", lambda _: 3):
        for _ in range(2):
            out, sums = hopper.attend(q, k, v, cu, cu, n, dim**-0.5, lse)
            close(out[:rows], want, dtype)
            if lse:
                torch.testing.assert_close(sums.cpu()[:, :rows].double(), want_lse, rtol=1e-5, atol=1e-4)


def paper(device, dtype, dim):
    counts = [70, 1, 0, 64]
    q, k, v = (numbers(device, dtype, sum(counts), HEADS, dim, seed=seed) for seed in (1, 2, 3))
    cu = offsets(counts, device)
    want = varlen_attention_ref(q.cpu(), k.cpu(), v.cpu(), cu.cpu(), cu.cpu(), 70, 70)
    for _ in range(2):
        close(kernels.paper_attend(q, k, v, cu, 70, dim**-0.5), want, dtype)


def cls(device, dtype, dim):
    counts = [70, 0, 1, 64]
    q, k = (numbers(device, dtype, sum(counts), HEADS, dim, seed=seed) for seed in (1, 2))
    cu = offsets(counts, "cpu")
    starts, lengths = cu[:-1].contiguous().to(device), cu.diff().to(device)
    for _ in range(2):
        probs = score_ops.cls_attention(q, k, starts, lengths, 70, dim**-0.5).cpu()
    for start, n in zip(cu.tolist(), counts):
        scores = torch.einsum(
            "hd,nhd->nh", q.cpu()[start : start + 1].sum(0).float(), k.cpu()[start : start + n].float()
        )
        torch.testing.assert_close(probs[start : start + n], (scores * dim**-0.5).softmax(0), rtol=1e-3, atol=1e-5)


def samples(device, dtype, dim, longest):
    """ATS: the parts of scores, and the kernel that adds them up and draws, against the same without kernels."""
    counts = [longest, 0, 1, longest - 6]
    q, k, v = (numbers(device, dtype, sum(counts), HEADS, dim, seed=seed) for seed in (1, 2, 3))
    cu = offsets(counts, "cpu")
    starts, lengths = cu[:-1].contiguous().to(device), cu.diff().to(device)
    for _ in range(2):
        parts = score_ops.importance(q, k, v, starts, lengths, longest, dim**-0.5)
        index, drawn = score_ops.sampled_rows(parts, 1, 20, lengths)
    with mock.patch.object(launch, "usable", lambda device: False):
        want = score_ops.importance(q, k, v, starts, lengths, longest, dim**-0.5).grid()
    scores = parts.grid()
    torch.testing.assert_close(scores, want, rtol=1e-3, atol=1e-5)
    for b, n in enumerate(counts):
        chosen = index[b, : drawn[b]].tolist()
        assert len(set(chosen)) == len(chosen) <= n and all(0 <= row < n for row in chosen)


def kept(x, ids, keep, cu):
    """The rows of one image that a mask marks, by way of an index."""
    index, counts = row_ops.kept_rows(keep, cu, keep.shape[0])
    return row_ops.take_rows(x, ids, cu[:-1], index, counts, int(keep.sum()), keep.shape[0])[:2]


def copies(device, dtype, width):
    x, ids = numbers(device, dtype, 29, width), torch.arange(29).to(device)
    rows, keep = torch.tensor([28, 0, 5, 5, 7]), torch.arange(29) % 3 != 1
    starts, blend = torch.zeros(1, dtype=torch.int32).to(device), torch.arange(29).float()[None].to(device) / 29
    every = torch.tensor([0, 29], dtype=torch.int32).to(device)
    for _ in range(2):
        for (got, got_ids), want in (
            (row_ops.move_rows(x, ids, starts, rows[None].to(device), None)[:2], rows),
            (kept(x, ids, keep.to(device), every), keep.nonzero()[:, 0]),
        ):
            assert torch.equal(got.cpu(), x.cpu()[want]) and torch.equal(got_ids.cpu(), want)
        for more in (None, -2 * x):
            got, got_ids, cu = row_ops.move_rows(x, ids, starts, rows[None].to(device), blend, more)
            whole = x if more is None else x + more
            assert torch.equal(got[:-1].cpu(), whole.cpu()[rows]) and got_ids[-1] == -1 and cu.tolist() == [0, 6]
            fused = (blend.to(dtype).double() @ whole.double())[0]
            torch.testing.assert_close(got[-1].double(), fused, rtol=1e-2, atol=1e-2)


def takes(device, dtype, batch):
    n, surplus = 23, 11
    x, ids = numbers(device, dtype, batch * n, 200), torch.arange(batch * n).to(device)
    starts, counts = torch.arange(0, batch * n, n, dtype=torch.int32), torch.arange(batch, dtype=torch.int32) % (n + 1)
    index = torch.arange(n).flip(0).expand(batch, n).contiguous()
    rows = torch.cat([b * n + index[b, :c] for b, c in enumerate(counts.tolist())])
    sizes = (len(rows) + surplus, n)
    for more in (None, -2 * x):
        places = (t.to(device) for t in (starts, index, counts))
        got, got_ids, cu = row_ops.take_rows(x, ids, *places, *sizes, more)
        whole = x if more is None else x + more
        assert torch.equal(got[: len(rows)].cpu(), whole.cpu()[rows]) and not got[len(rows) :].any()
        assert got_ids.cpu().tolist() == rows.tolist() + [-1] * surplus
        assert torch.equal(cu.cpu(), row_ops.offsets(counts))
        norm = torch.nn.LayerNorm(200, device=device, dtype=dtype)
        places = (t.to(device) for t in (starts, index, counts))
        again, _, _, normed = row_ops.take_normed_rows(x, ids, *places, *sizes, more, norm)
        assert torch.equal(again, got)
        torch.testing.assert_close(normed, norm(got), rtol=1e-2, atol=1e-2)


def returns(device, dtype, batch):
    """Gradients of rows that were taken, of rows that were moved with a fused token, and of the row of CLS, against
    those that PyTorch finds without the kernels."""
    n = 23
    x, ids = numbers(device, dtype, batch * n, 200), torch.arange(batch * n).to(device)
    starts, counts = torch.arange(0, batch * n, n, dtype=torch.int32), torch.arange(batch, dtype=torch.int32) % (n + 1)
    index, starts, counts = (t.to(device) for t in (torch.arange(n).flip(0).repeat(batch, 1), starts, counts))
    blend = torch.rand(batch, n).to(device).scatter(1, index[:, :7], 0.0)
    q, k = (numbers(device, dtype, batch * n, 2, 24) for _ in range(2))
    calls = (
        (lambda x: row_ops.take_rows(x, ids, starts, index, counts, int(counts.sum()) + 5, n)[0], (x,)),
        (lambda x, b: row_ops.move_rows(x, ids, starts, index[:, :7], b)[0], (x, blend)),
        (lambda q, k: score_ops.cls_attention(q, k, starts, counts, n, 0.3), (q, k)),
    )
    for call, leaves in calls:
        found = []
        for usable in (launch.usable, lambda device: False):
            with mock.patch.object(launch, "usable", usable), torch.enable_grad():
                mine = [leaf.clone().requires_grad_() for leaf in leaves]
                out = call(*mine)
                found.append(torch.autograd.grad(out.float().cos().sum(), mine))
        for got, want in zip(*found):
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def ranks(device, dtype, n):
    scores = numbers(device, dtype, 3, n)
    want = scores.cpu()[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, : n // 2] + 1
    for in_place, rows in ((False, want), (True, want.sort(1).values)):
        for _ in range(2):
            got, rest = score_ops.best_rows(scores, 1, n // 2, in_place=in_place, rest=True)
            assert torch.equal(got.cpu()[:, 1:], rows)
            assert torch.equal(rest.cpu(), torch.nn.functional.pad(scores.cpu()[:, 1:].float(), (1, 0)).scatter(
                1, got.cpu(), 0.0))  # fmt: skip


def mistakes(device):
    """What the tools must not let pass: a row far outside, and rows that nobody has written."""
    x, ids = numbers(device, HALF, 29, 384), torch.arange(29).to(device)
    blank = torch.empty(29, 384, device=device, dtype=HALF)
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    row_ops.move_rows(blank, ids, starts, torch.tensor([[1, 2, 3]]).to(device), None)
    row_ops.move_rows(x, ids, starts, torch.tensor([[1, 2, 1 << 20]]).to(device), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case, from the i-th on")
    parser.add_argument("--only", default="", help="cases with this word in their name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wrong", action="store_true", help="make mistakes on purpose")
    options = parser.parse_args()
    if options.wrong:
        return mistakes(options.device)
    part, parts = map(int, options.part.split("/"))
    every = [*attention_cases(), *special_cases(), *backward_cases()]
    if BACKENDS["gluon"].why_not(options.device, HALF, 64) is None:
        every += gluon_cases()
    cases = [case for case in every if options.only in case[0]][part::parts]
    for name, run, arguments in cases:
        try:
            run(options.device, *arguments)
        except Exception as error:
            error.add_note(f"in case: {name}") if hasattr(error, "add_note") else print(f"in case: {name}")
            raise
    print(f"{len(cases)} cases right")


if __name__ == "__main__":
    main()
