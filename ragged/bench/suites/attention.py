"""Suite `attention`: one layer's attention by every provider.

Every provider is called through its own public function, not through this package's: nobody pays for our wrapper.
q, k and v are views of one (total, 3, nheads, headdim) projection, as they are in a model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import data
from ...attention import varlen_attention, varlen_attention_ref
from ...backends import BACKENDS, masked_sdpa, pad_rows
from ...blocks import compile_with_room
from ...rows import offsets
from ...tiles import GLUON_LENGTHS
from ..rounds import CALL_CLOCKS, Subject
from ..runner import Candidate, Case, Options, Skip, Wrong
from ..timing import as_graph, syncs

HEADS, HEADDIM = 12, 64  # DeiT-B
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}  # ‖out - ref‖ / ‖ref‖
DENSE = {"dense_flash": "FLASH_ATTENTION", "dense_cudnn": "CUDNN_ATTENTION", "dense_efficient": "EFFICIENT_ATTENTION"}
VARLEN = ("triton", "gluon", "flash_attn", "torch_varlen", "flash_attn_3", "efficient_varlen", "sdpa_padded",
          "paper_triton", "paper_padded")  # fmt: skip


class Inputs:
    """A ragged batch: cu_seqlens, lengths, and several sets of random q, k, v, each (total, HEADS, HEADDIM)."""

    def __init__(self, tokens: str, batch: int, dtype: torch.dtype, device: str, sets: int = 4):
        self.lengths = data.lengths(tokens, batch)
        self.batch, self.longest, self.total = batch, max(self.lengths), sum(self.lengths)
        self.equal = min(self.lengths) == self.longest
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.total, 3, HEADS, HEADDIM)
        make = functools.partial(torch.randn, shape, device=device, dtype=dtype, generator=generator)
        self.sets = [make().unbind(1) for _ in range(sets if self.total < 20000 else 2)]
        self.cu = offsets(torch.tensor(self.lengths, device=device))
        # the float64 reference is slow: in large batches it looks at 16 images, the first and the last among them
        self.judges = range(batch) if batch <= 16 else [*range(0, batch - 1, -(-batch // 15)), batch - 1]
        image = torch.repeat_interleave(torch.tensor(self.lengths))
        self.judged = torch.isin(image, torch.tensor(list(self.judges))).to(device)

    @functools.cached_property
    def truth(self) -> Tensor:
        q, k, v = (t[self.judged] for t in self.sets[0])
        lengths = [self.lengths[i] for i in self.judges]
        cu = offsets(torch.tensor(lengths, device=q.device))
        return varlen_attention_ref(q, k, v, cu, cu, self.longest, self.longest).to(q.device)

    def check(self, out: Tensor) -> None:
        if out.numel() != self.total * HEADS * HEADDIM:
            raise Wrong(f"{out.numel()} numbers, expected {self.total * HEADS * HEADDIM}")
        judged = out.reshape(self.total, HEADS, HEADDIM)[self.judged]
        error = ((judged.double() - self.truth).norm() / self.truth.norm()).item()
        if not error < TOLERANCE[out.dtype]:
            raise Wrong(f"relative error {error:.2g}, allowed {TOLERANCE[out.dtype]:.0e}")


Make = Callable[[Inputs, tuple], Callable[[], Tensor]]  # a set of inputs -> a call


def varlen(name: str, x: Inputs, qkv: tuple) -> Callable[[], Tensor]:
    """The provider's own variable-length function."""
    q, k, v = qkv
    why = BACKENDS[name].why_not(q.device, q.dtype, HEADDIM)
    if why is not None:
        raise Skip(why)
    places = (x.cu, x.cu, x.longest, x.longest)
    if BACKENDS[name].equal_only and not x.equal:
        raise Skip(f"{name}: equal counts only")
    if name in ("triton", "gluon"):
        if name == "gluon" and x.longest not in GLUON_LENGTHS:
            raise Skip(f"gluon: {GLUON_LENGTHS[0]} to {GLUON_LENGTHS[-1]} tokens only")
        return lambda: varlen_attention(q, k, v, *places, backend=name)
    if name == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return lambda: flash_attn_varlen_func(q, k, v, *places)
    if name == "torch_varlen":
        from torch.nn.attention.varlen import varlen_attn

        return lambda: varlen_attn(q, k, v, *places)
    run, scale = BACKENDS[name].run, HEADDIM**-0.5
    return lambda: run(q, k, v, *places, scale, False)[0]


def paper_contiguous(x: Inputs, qkv: tuple) -> Callable[[], Tensor]:
    """The paper's kernel on q, k and v that are contiguous already, so that its three copies have nothing to do."""
    return varlen("paper_triton", x, tuple(t.contiguous() for t in qkv))


def padded_attention(x: Inputs, qkv: tuple) -> Callable[[], Tensor]:
    """What a padded model does per layer: masked SDPA on tensors padded to the longest outside the clock."""
    padded = [pad_rows(t, x.cu, x.longest)[0] for t in qkv]
    lengths = x.cu.diff()
    real = None if x.equal else torch.arange(x.longest, device=lengths.device) < lengths[:, None]
    rows = None if x.equal else real.flatten().nonzero()[:, 0]

    def call() -> Tensor:
        return masked_sdpa(*padded, real, HEADDIM**-0.5)

    call.real = rows
    return call


def dense(x: Inputs, qkv: tuple) -> Callable[[], Tensor]:
    """SDPA on (batch, nheads, n, headdim) views; which of its kernels runs is up to the context round it."""
    if not x.equal:
        raise Skip("dense: equal counts only")
    q, k, v = (t.unflatten(0, (x.batch, x.longest)).transpose(1, 2) for t in qkv)
    return lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def nested(x: Inputs, qkv: tuple) -> Callable[[], Tensor]:
    """NestedTensor SDPA on tensors made outside the clock, without copying."""
    if not qkv[0].is_cuda:
        raise Skip(BACKENDS["nested"].why_not(qkv[0].device, qkv[0].dtype, HEADDIM))
    make = functools.partial(torch.nested.nested_tensor_from_jagged, min_seqlen=min(x.lengths), max_seqlen=x.longest)
    q, k, v = (make(t, x.cu.long()).transpose(1, 2) for t in qkv)
    return lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


def paper_nested(x: Inputs, qkv: tuple) -> Callable[[], Tensor]:
    """The paper's protocol: the tensors of every image are nested, attended and joined again inside the clock."""
    if not qkv[0].is_cuda:
        raise Skip(BACKENDS["nested"].why_not(qkv[0].device, qkv[0].dtype, HEADDIM))

    def call() -> Tensor:
        images = (torch.nested.nested_tensor(list(t.split(x.lengths)), layout=torch.jagged) for t in qkv)
        q, k, v = (t.transpose(1, 2) for t in images)
        return torch.cat(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unbind())

    return call


def flex(x: Inputs, qkv: tuple) -> Callable[[], Tensor]:
    """flex_attention, compiled, with a document mask made outside the clock."""
    if not qkv[0].is_cuda:
        raise Skip("flex: compiled for CUDA only here")
    from torch.nn.attention.flex_attention import create_block_mask

    image = torch.repeat_interleave(torch.arange(x.batch, device=x.cu.device), x.cu.diff(), output_size=x.total)
    mask = create_block_mask(lambda b, h, i, j: image[i] == image[j], None, None, x.total, x.total, x.cu.device)
    q, k, v = (t.transpose(0, 1)[None] for t in qkv)
    run = _compiled_flex()
    return lambda: run(q, k, v, block_mask=mask)[0].transpose(0, 1)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return compile_with_room(flex_attention)


def kernel_context(name: str):
    """The context that leaves SDPA one kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return functools.partial(sdpa_kernel, getattr(SDPBackend, DENSE[name]))


def attention_subject(inputs: Callable[[], Inputs], make: Make, mode: str, around=nullcontext) -> Subject:
    """The checked call of one provider, eager or as a CUDA graph."""
    x = inputs()
    with around():
        calls = [make(x, qkv) for qkv in x.sets]
        out, rows = calls[0](), getattr(calls[0], "real", None)
        x.check(out if rows is None else out.flatten(0, 1)[rows])
        for call in calls:
            call()
        waits = syncs(calls)
        if mode == "graph" and waits:
            raise Skip(f"cannot be captured: it waits for the GPU {waits:g} times a call")
        if not x.cu.is_cuda:
            if mode == "graph":
                raise Skip("CUDA graphs need a CUDA device")
            return Subject(calls, clocks=CALL_CLOCKS)
        replay = None if waits else as_graph(calls)
        if mode == "graph":
            return Subject([as_graph([call], 1) for call in calls], replay, 20, clocks=CALL_CLOCKS)
        return Subject(calls, replay, 20, around, clocks=CALL_CLOCKS)


def shapes(options: Options) -> list[tuple[int, str, torch.dtype]]:
    """(batch, tokens, dtype) of every case, here and in suite `backward`."""
    half = options.dtype
    if options.quick:
        plan = [(b, t, half) for b in options.batches_or((1, 32) if half == torch.float16 else (1, 2)) for t in
                ("39", "U(20,197)")]  # fmt: skip
    else:
        plan = [(b, t, half) for b in options.batches_or((32,)) for t in ("288", "577")]
        plan += [(b, "U(20,197)", half) for b in options.batches_or((64, 256))]
        # the best counts of rivals that work in tiles of 128 or 64: the others leave much of a tile empty
        plan += [(b, t, half) for b in options.batches_or((64,)) for t in ("140", "192")]
        sizes = itertools.product(options.batches_or((64, 1, 32, 256, 4, 16)), ("39", "99", "197"))
        plan += [(b, t, half) for b, t in sizes]
        if half == torch.float16:
            plan += [(b, t, torch.bfloat16) for b in options.batches_or((32,)) for t in ("39", "99", "197")]
    return list(dict.fromkeys(plan))


def attention(options: Options) -> list[Case]:
    """One attention call. mode graph: the call alone in a CUDA graph. gpu_us of both modes is one graph of 20 calls.
    backend `dense` repeats the rows of the fastest of its three kernels. paper_triton copies q, k and v first, as in a
    model; paper_triton:contiguous gets them contiguous. sdpa_padded pads and unpads inside the call;
    sdpa_padded:attention gets them padded, as in a padded model."""
    found = []
    for batch, tokens, dtype in shapes(options):
        columns = {"suite": "attention", "model": "deit_base", "pruner": "none", "batch": batch, "tokens": tokens,
                   "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
        inputs = functools.cache(functools.partial(Inputs, tokens, batch, dtype, options.device))
        flexible = options.quick or batch == 64 or (batch, tokens) == (32, "39")
        found.append(Case(columns, _providers(inputs, tokens, flexible), _name_the_fastest))
    return found


def _providers(inputs: Callable[[], Inputs], tokens: str, flexible: bool) -> list[Candidate]:
    makes: dict[str, tuple] = {name: (functools.partial(varlen, name), nullcontext) for name in VARLEN}
    if tokens.isdigit():  # equal counts
        makes |= {name: (dense, kernel_context(name)) for name in DENSE}
    makes |= {"nested": (nested, nullcontext), "paper_nested": (paper_nested, nullcontext)}
    makes["paper_triton:contiguous"] = (paper_contiguous, nullcontext)
    makes["sdpa_padded:attention"] = (padded_attention, nullcontext)
    if flexible:  # its compilation is dear
        makes["flex"] = (flex, nullcontext)
    found = []
    for (name, (make, around)), mode in itertools.product(makes.items(), ("eager", "graph")):
        build = functools.partial(attention_subject, inputs, make, mode, around)
        found.append(Candidate({"backend": name, "mode": mode}, build, CALL_CLOCKS))
    return found


def _name_the_fastest(rows: list[dict]) -> list[dict]:
    """Rows `dense`: those of the fastest of SDPA's kernels, by GPU time, or on a CPU by wall time."""
    by = "gpu_us" if torch.cuda.is_available() else "wall_us"
    for mode in ("eager", "graph"):
        of = [r for r in rows if r["backend"] in DENSE and r["mode"] == mode]
        timed = [r for r in of if r["metric"] == by and r["status"] == "ok"]
        if timed:
            fastest = min(timed, key=lambda r: r["value"])["backend"]
            rows = rows + [r | {"backend": "dense"} for r in of if r["backend"] == fastest]
    return rows
