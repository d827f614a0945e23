"""Suite `speculation`: the attention of one layer while a language model verifies trees of guesses, for a batch of
prompts of different lengths and with different trees.

Ragged, without a mask (`ragged.speculation.trees`), against padded with a mask. Both read the same cache where it lies.
Padded rows are padded and folded outside the clock, and taken out outside it, too; ragged ones come and go as the
model's projections make and want them. What a pass makes once for all its layers, a plan or a mask, stands outside the
clock and has rows of its own, `<backend>:plan`. q, k and v are random.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import data
from ..backends import BACKENDS
from ..bench.rounds import CALL_CLOCKS, Subject
from ..bench.runner import Candidate, Case, Options, Skip, Wrong
from ..bench.suites.attention import TOLERANCE
from ..bench.timing import as_graph, syncs
from ..blocks import compile_with_room
from .trees import Plan, Tree, attend_trees, piece_for

HEADS = {"smollm2_135m": (9, 3, 64), "llama_2_7b": (32, 32, 128)}  # query heads, key heads, headdim
PAST, SHAPES = "U(64,1024)", ((2, 2, 2), (3, 2, 1, 1), (4, 2), (1, 1, 1, 1, 1))  # 14, 21, 12 and 5 guesses
RAGGED = ("triton", "flash_attn", "torch_varlen", "efficient_varlen")
PLAN_CLOCKS = ("host_us", "wall_us")


class Inputs:
    """Cached prompts with trees on trial: past lengths, trees, and several sets of random q (rows, heads, headdim) and
    k, v (prompts * capacity, kv_heads, headdim)."""

    def __init__(self, model: str, batch: int, dtype: torch.dtype, device: str):
        self.heads, self.kv_heads, self.dim = HEADS[model]
        self.group, self.batch, self.device = self.heads // self.kv_heads, batch, device
        self.past = data.lengths(PAST, batch)
        self.trees = [Tree(SHAPES[b % len(SHAPES)]) for b in range(min(batch, len(SHAPES)))]
        self.trees = [self.trees[b % len(SHAPES)] for b in range(batch)]
        self.sees = [tree.sees for tree in self.trees]
        self.nodes = max(tree.nodes for tree in self.trees)
        self.capacity = -(-(max(self.past) + self.nodes) // 16) * 16
        rows, generator = sum(tree.nodes for tree in self.trees), torch.Generator(device).manual_seed(0)
        make = functools.partial(torch.randn, device=device, dtype=dtype, generator=generator)
        keys = (batch * self.capacity, self.kv_heads, self.dim)
        sets = 4 if batch <= 16 else 2
        self.sets = [(make((rows, self.heads, self.dim)), make(keys), make(keys)) for _ in range(sets)]
        starts = itertools.accumulate((tree.nodes for tree in self.trees), initial=0)
        place = [torch.arange(tree.nodes) + b * self.nodes for b, tree in enumerate(self.trees)]
        self.starts, self.place = list(starts), torch.cat(place).to(device)  # of packed rows among padded ones

    def mask(self) -> Tensor:
        """bool (batch, nodes, capacity): what a padded row may see; rows that are padding see the first key."""
        column, length = torch.arange(self.capacity), torch.tensor(self.past)[:, None, None]
        mask = (column < length).repeat(1, self.nodes, 1)
        for b, tree in enumerate(self.trees):
            mask[b, : tree.nodes, self.past[b] : self.past[b] + tree.nodes] = tree.sees
        return mask.to(self.device)

    def plan(self, whole: bool = False) -> Plan:
        """Who sees whom, with the past cut as `read` cuts it, or whole."""
        piece = None if whole else piece_for(self.batch, self.kv_heads, self.device)
        return Plan(self.past, self.capacity, self.sees, self.heads, self.kv_heads, self.device, piece)

    def check(self, out: Tensor) -> None:
        """Wrong unless the packed rows `out` of the first set are right, for up to 16 prompts in float64."""
        q, k, v = self.sets[0]
        for b in range(0, self.batch, max(1, self.batch // 16)):
            tree, first = self.trees[b], b * self.capacity
            keys, values = (x[first : first + self.past[b] + tree.nodes].double() for x in (k, v))
            rows = slice(self.starts[b], self.starts[b + 1])
            heads = q[rows].double().unflatten(1, (self.kv_heads, -1))
            scores = torch.einsum("nkgd,mkd->kgnm", heads, keys) * self.dim**-0.5
            seen = F.pad(tree.sees, (self.past[b], 0), value=True).to(scores.device)
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            truth = torch.einsum("kgnm,mkd->nkgd", weights, values).flatten(1, 2)
            error = ((out[rows].double() - truth).norm() / truth.norm()).item()
            if not error < TOLERANCE[out.dtype]:
                raise Wrong(f"prompt {b}: relative error {error:.2g}, allowed {TOLERANCE[out.dtype]:.0e}")


Build = Callable[[tuple], Callable[[], Tensor]]  # a set -> a call
Make = Callable[[Inputs], Build]


def ragged(backend: str, whole: bool, x: Inputs) -> Build:
    """The past by `varlen_attention`, joined with the branches; whole: never cut the past."""
    if backend not in BACKENDS:
        raise Skip(f"this version has no backend {backend!r}")
    why = BACKENDS[backend].why_not(x.device, x.sets[0][0].dtype, x.dim)
    if why is not None:
        raise Skip(why)
    plan = x.plan(whole)
    return lambda qkv: lambda: attend_trees(*qkv, plan, backend)


def _padded(x: Inputs, qkv: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """q padded to the largest tree outside the clock, (batch, kv_heads, nodes * group, headdim): query heads that share
    a key head are rows here too. k, v: views of the cache, (batch, kv_heads, capacity, headdim)."""
    q, k, v = qkv
    wide = q.new_zeros((x.batch * x.nodes, *q.shape[1:]))
    wide[x.place] = q
    wide = wide.view(x.batch, x.nodes, x.kv_heads, x.group, x.dim).transpose(1, 2).flatten(2, 3).contiguous()
    return wide, *(t.view(x.batch, x.capacity, x.kv_heads, x.dim).transpose(1, 2) for t in (k, v))


def _unpadded(x: Inputs, out: Tensor) -> Tensor:
    return out.unflatten(2, (x.nodes, x.group)).transpose(1, 2).flatten(0, 1)[x.place].flatten(1, 2)


def padded(x: Inputs) -> Build:
    """SDPA with the mask of a pass as numbers to add, so that no call has to convert it."""
    numbers = torch.zeros(x.batch, x.nodes, x.capacity, device=x.device, dtype=x.sets[0][0].dtype)
    numbers = numbers.masked_fill(~x.mask(), float("-inf")).repeat_interleave(x.group, 1)[:, None]

    def make(qkv: tuple) -> Callable[[], Tensor]:
        q, k, v = _padded(x, qkv)
        call = functools.partial(F.scaled_dot_product_attention, q, k, v, attn_mask=numbers)
        return _with_rows(x, call)

    return make


def flex(x: Inputs) -> Build:
    """flex_attention, compiled; a block mask leaves out what nobody sees."""
    if x.device != "cuda":
        raise Skip("flex: compiled for CUDA only here")
    from torch.nn.attention.flex_attention import create_block_mask

    seen, group = x.mask(), x.group
    sizes = (x.batch, None, x.nodes * x.group, x.capacity)
    blocks = create_block_mask(lambda b, h, i, j: seen[b, i // group, j], *sizes, x.device)

    def make(qkv: tuple) -> Callable[[], Tensor]:
        q, k, v = _padded(x, qkv)
        return _with_rows(x, functools.partial(_compiled_flex(), q, k, v, block_mask=blocks))

    return make


def _with_rows(x: Inputs, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return call()

    run.rows = functools.partial(_unpadded, x)
    return run


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return compile_with_room(flex_attention, dynamic=False)


def _subject(inputs: Callable[[], Inputs], make: Make, mode: str) -> Subject:
    x = inputs()
    if mode == "graph" and x.device != "cuda":
        raise Skip("CUDA graphs need a CUDA device")
    build = make(x)
    calls = [build(qkv) for qkv in x.sets]
    out = calls[0]()
    x.check(getattr(calls[0], "rows", lambda rows: rows)(out))
    for call in calls:
        call()
    waits = syncs(calls)
    if mode == "graph" and waits:
        raise Skip(f"cannot be captured: it waits for the GPU {waits:g} times a call")
    replay = None if waits or x.device != "cuda" else as_graph(calls)
    if mode == "graph":
        calls = [as_graph([call], 1) for call in calls]
    return Subject(calls, replay, 20, clocks=CALL_CLOCKS)


def _planning(inputs: Callable[[], Inputs], make: Callable[[Inputs], object]) -> Subject:
    x = inputs()
    return Subject([functools.partial(make, x)], clocks=PLAN_CLOCKS)


def speculation(options: Options) -> list[Case]:
    """Prefixes U(64,1024), four shapes of tree in turn. ":whole" does not cut the past where `piece_for` would;
    "sdpa_padded" and "flex" are one masked call on padded rows."""
    found, models = [], ("smollm2_135m",) if options.quick else HEADS
    for batch, model in itertools.product(options.batches_or((1, 4) if options.quick else (16, 64, 256, 4, 1)), models):
        columns = {"suite": "speculation", "model": model, "pruner": "none", "batch": batch, "tokens": PAST,
                   "dtype": str(options.dtype).removeprefix("torch.")}  # fmt: skip
        inputs = functools.cache(functools.partial(Inputs, model, batch, options.dtype, options.device))
        makes: dict[str, Make] = {"sdpa_padded": padded}
        if options.quick or batch >= 16:  # its compilation is dear
            makes["flex"] = flex
        for backend in RAGGED:
            makes[backend] = functools.partial(ragged, backend, False)
            if piece_for(batch, HEADS[model][1], options.device) is not None:
                makes[f"{backend}:whole"] = functools.partial(ragged, backend, True)
        candidates = [
            Candidate({"backend": name, "mode": mode}, functools.partial(_subject, inputs, make, mode), CALL_CLOCKS)
            for (name, make), mode in itertools.product(makes.items(), ("eager", "graph"))
        ]
        plans = {"sdpa_padded:plan": Inputs.mask, "ragged:plan": Inputs.plan}
        candidates += [
            Candidate({"backend": name, "mode": "eager"}, functools.partial(_planning, inputs, make), PLAN_CLOCKS)
            for name, make in plans.items()
        ]
        found.append(Case(columns, candidates))
    return found
