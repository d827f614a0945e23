"""Trees of guesses, which of them the target accepts, and the trees of many prompts in one pass: a ragged batch.

Node 0 of a tree is the last token that is already certain; its key and value are computed together with the guesses.
What the target says at node i is the distribution from which the children of node i are judged.

A guess sees its prompt and its own ancestors. Both are ragged attention, and there is no mask anywhere:
  past   one sequence a prompt: all rows of its tree are the queries, the cached rows are the keys, where they lie;
  tree   one sequence a guess: its ancestors and itself are the keys, gathered.
Outputs a and b of the two, with log-sum-exps la and lb, make up the whole softmax: w a + (1 - w) b with
w = sigmoid(la - lb). Query heads that share a key head become further query rows, so that no key is repeated.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import varlen_attention
from ..checks import check_int
from .llama import Attend, Llama

MOST_NODES = 1024
CHUNK = 64  # rows of a prompt that are read at a time: each row's ancestors are gathered


class Tree:
    """The shape of a tree: every node at depth d has shape[d] children; (2, 2, 2) has 2 + 4 + 8 guesses.

    parent, depth, rank, children: by node, in order of depth; ranks of siblings count from 1.  levels: the nodes of
    each depth.  inner: so many nodes, the first ones, have children.  sees: bool (nodes, nodes), a node's ancestors and
    itself.  Raises ValueError for a shape that is no tree, or too large a one.
    """

    def __init__(self, shape: Sequence[int], device: torch.device | str = "cpu"):
        self.shape = tuple(check_int("shape", width, 1) for width in shape)
        sizes = list(itertools.accumulate((1, *self.shape), lambda nodes, width: min(nodes * width, MOST_NODES + 1)))
        if not self.shape or sum(sizes) > MOST_NODES:
            raise ValueError(f"shape: expected one width or more and at most {MOST_NODES} nodes, got {self.shape}")
        self.parent, self.depth, self.rank, self.levels = [-1], [0], [0], [slice(0, 1)]
        for depth, width in enumerate(self.shape, 1):
            first = len(self.parent)
            for node in range(self.levels[-1].start, first):
                self.parent += [node] * width
                self.rank += range(1, width + 1)
            self.depth += [depth] * (len(self.parent) - first)
            self.levels.append(slice(first, len(self.parent)))
        self.nodes, self.inner = len(self.parent), self.levels[-1].start
        self.children: list[list[int]] = [[] for _ in self.parent]
        sees = torch.eye(self.nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parent[1:], 1):
            self.children[parent].append(node)
            sees[node] |= sees[parent]  # itself, its parent, and all that its parent sees
        self.sees = sees.to(device)


# ---- which guesses stay ----


def choose(logits: Tensor, width: int, generator: torch.Generator | None = None) -> Tensor:
    """width different tokens for every row of logits (..., vocabulary), in order: the likeliest, or with a generator
    drawn one after the other without return. int64 (..., width)."""
    if generator is not None:  # Gumbel noise: the largest sums are such a draw
        logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
    return logits.topk(width).indices


def accept_greedy(tree: Tree, tokens: Sequence[int], best: Sequence[int]) -> tuple[list[int], int]:
    """The path of nodes of `tree`, the root first, on which every guess in tokens (one a node) is what the target likes
    best behind the node's parent; best: the target's favourite behind every node. And the token that follows."""
    path = [0]
    while True:
        right = [child for child in tree.children[path[-1]] if tokens[child] == best[path[-1]]]
        if not right:
            return path, best[path[-1]]
        path += right


def accept_sampled(tree: Tree, tokens: Sequence[int], p: Tensor, q: Tensor,
                   generator: torch.Generator | None = None) -> tuple[list[int], int]:  # fmt: skip
    """A path of nodes of `tree` and one more token, distributed exactly as if the target had drawn them one by one.

    tokens: one a node, the children of a node drawn from q without return.  p, q: float (nodes, vocabulary) and (inner
    nodes, vocabulary), the target's and the draft's distributions behind every node.  generator: on p's device.

    A guess x stays with probability min(1, p(x) / q(x)). If it does not, what is left to draw from is p - q where
    positive, and the next guess was drawn from q without x.
    """
    path = [0]
    while True:
        node = path[-1]
        left = p[node]
        draft = q[node] if tree.children[node] else None
        for child in tree.children[node]:
            x = tokens[child]
            if not draft[x] > 0:
                continue  # q holds fewer tokens than there are children: this one was not drawn
            rest = (left - draft).clamp_min(0)
            total = rest.sum()
            chance = torch.rand((), generator=generator, device=p.device) * draft[x]
            if bool((chance < left[x]) | (total <= 0)):  # nothing left: p is q, and a refusal would be rounding
                path.append(child)
                break
            left, draft = rest / total, draft.index_fill(0, torch.tensor(x, device=p.device), 0)
            draft = draft / draft.sum().clamp_min(torch.finfo(draft.dtype).tiny)
        else:
            return path, int(torch.multinomial(left, 1, generator=generator))


# ---- which rows see which ----


class Plan:
    """New rows of a batch of prompts, and what each sees; made once a pass and used in every layer.

    past: so many rows of each prompt are cached, from row b * capacity on; the rest of its room is for rows on trial.
    sees: for each prompt bool (new rows, rows on trial), which of the rows on trial, old and new, a new row sees; all
    see the past.  group: query heads to a key head.  piece: cut the past into pieces of so many rows, each a sequence
    of its own, so that few prompts keep a whole GPU busy.
    """

    def __init__(self, past: Sequence[int], capacity: int, sees: Sequence[Tensor], group: int,
                 device: torch.device | str, piece: int | None = None):  # fmt: skip
        self.group, known = group, {}
        counts, seen, number, place, position = [], [], [], [], []
        for b, (length, mask) in enumerate(zip(past, sees, strict=True)):
            new, trial = mask.shape
            if length + trial > capacity:
                raise ValueError(f"sees: prompt {b} has {length} rows and {trial} on trial, but room for {capacity}")
            if id(mask) not in known:
                mask = mask.cpu()
                known[id(sees[b])] = mask.nonzero()[:, 1], mask.sum(1), torch.arange(trial - new, trial)
            columns, ancestors, own = known[id(sees[b])]
            counts.append(new)
            seen.append(columns + (b * capacity + length))
            number.append(ancestors)
            place.append(own + (b * capacity + length))
            position.append(ancestors + (length - 1))
        self.place, self.position, self.seen = (torch.cat(x).to(device) for x in (place, position, seen))
        number = torch.cat(number)
        self.cu_node = torch.arange(len(number) + 1, dtype=torch.int32, device=device) * group
        self.cu_seen, self.max_seen = _offsets(number.tolist(), device), int(number.max())
        self._past(past, capacity, counts, device, piece)

    def _past(self, past, capacity, counts, device, piece) -> None:
        queries, keys, again, parts = [], [], [], []
        starts = list(itertools.accumulate(counts, initial=0))
        for b, length in enumerate(past):
            cut = length if piece is None else piece
            pieces = [min(cut, length - at) for at in range(0, length, cut)] if length else [0]
            queries += [counts[b] * self.group] * len(pieces) + [0]  # no query sees the room behind the past
            keys += [*pieces, capacity - length]
            rows = torch.arange(starts[b] * self.group, starts[b + 1] * self.group)
            again.append(rows.repeat(len(pieces)))
            parts += [len(pieces)] * len(rows)
        self.cu_past_q, self.cu_past_k = _offsets(queries, device), _offsets(keys, device)
        self.max_past_q, self.max_past_k = max(queries), max(1, *keys)
        self.again = self.parts = None
        if piece is not None:  # where the parts of a row's output are, the tree's last; -1: there is none
            again, rows = torch.cat(again), len(parts)
            order = torch.full((rows, max(parts) + 1), -1)
            by_row = again.argsort(stable=True)
            slot = torch.cat([torch.arange(n) for n in parts])
            order[again[by_row], slot] = by_row
            order[:, -1] = len(again) + torch.arange(rows)
            self.again, self.parts = again.to(device), order.to(device)


def _offsets(lengths: Sequence[int], device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def attend_trees(q: Tensor, k: Tensor, v: Tensor, plan: Plan, backend: str = "auto") -> Tensor:
    """Attention of the new rows of a `plan`, with no mask. q: (rows, heads, headdim).  k, v: (prompts * capacity,
    kv_heads, headdim), the new rows' own among them.  backend: one that computes the log-sum-exp. Returns rows like q;
    raises what `varlen_attention` raises."""
    call = functools.partial(varlen_attention, return_lse=True, backend=backend)
    rows = q.unflatten(1, (-1, plan.group)).transpose(1, 2).flatten(0, 1)  # (rows * group, kv_heads, headdim)
    asked = rows if plan.again is None else rows[plan.again]
    past, la = call(asked, k, v, plan.cu_past_q, plan.cu_past_k, plan.max_past_q, plan.max_past_k)
    tree, lb = call(rows, k[plan.seen], v[plan.seen], plan.cu_node, plan.cu_seen, plan.group, plan.max_seen)
    if plan.again is None:
        out = tree.lerp(past, torch.sigmoid(la - lb).T[..., None].to(q.dtype))
    else:
        out = _merge(torch.cat((past, tree)), torch.cat((la, lb), 1), plan.parts).to(q.dtype)
    return out.unflatten(0, (-1, plan.group)).transpose(1, 2).flatten(1, 2)


def _merge(out: Tensor, lse: Tensor, parts: Tensor) -> Tensor:
    """Any number of parts of one softmax: each counts by the softmax of the log-sum-exps."""
    weight = lse.T[parts].masked_fill((parts < 0)[..., None], float("-inf")).softmax(1)  # (rows, parts, kv_heads)
    return (weight[..., None] * out[parts]).sum(1)


# ---- the cache, and reading into it ----


class Cache:
    """Keys and values of a batch of prompts: past[b] rows of prompt b that stay, and behind them rows on trial, until
    `keep` chooses. model: whose.  capacity: room for each prompt, in rows. Raises ValueError where a prompt would
    outgrow the model's context."""

    def __init__(self, model: Llama, prompts: int, capacity: int):
        if capacity > model.context:
            raise ValueError(
                f"capacity: prompts, new tokens and trees need {capacity} rows, but {model.path.name} has a context of "
                f"{model.context}; ask for fewer tokens or a smaller tree"
            )
        shape = (len(model.layers), prompts * capacity, model.kv_heads, model.headdim)
        self.k, self.v = (torch.zeros(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        self.capacity, self.past = capacity, [0] * prompts

    def attend(self, plan: Plan, backend: str = "auto") -> Attend:
        """What `Llama.forward` calls in each layer: writes the new rows of `plan` and attends by `backend`."""

        def run(slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[slot, plan.place], self.v[slot, plan.place] = k, v
            return attend_trees(q, self.k[slot], self.v[slot], plan, backend)

        return run

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Of each prompt's rows on trial those in its path stay, in this order; the others are forgotten."""
        places = [(b * self.capacity + n, path) for b, (n, path) in enumerate(zip(self.past, paths, strict=True))]
        old = [place + node for place, path in places for node in path]
        new = [place + i for place, path in places for i in range(len(path))]
        old, new = (torch.tensor(rows, device=self.k.device, dtype=torch.long) for rows in (old, new))
        for x in (self.k, self.v):
            x[:, new] = x[:, old]
        self.past = [n + len(path) for n, path in zip(self.past, paths)]


def read(model: Llama, cache: Cache, ids: Tensor, sees: Sequence[Tensor], backend: str = "auto") -> Tensor:
    """Last hidden rows (rows, dim) of `model` for the new tokens ids, int64 (rows,), of all prompts one behind the
    other, which are put on trial in `cache`. sees: as in `Plan`.  backend: of `varlen_attention`."""
    plan = Plan(cache.past, cache.capacity, sees, model.heads // model.kv_heads, model.device)
    return model.forward(ids, plan.position, cache.attend(plan, backend))


def read_prompts(model: Llama, cache: Cache, prompts: Sequence[Sequence[int]], backend: str = "auto") -> None:
    """Put `prompts`, lists of tokens, into the empty `cache` of `model`: chains, trees without branches. backend: of
    `varlen_attention`."""
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    for start in range(0, max(map(len, prompts)), CHUNK):
        parts = [list(prompt[start : start + CHUNK]) for prompt in prompts]
        ids = torch.tensor([token for part in parts for token in part], device=model.device)
        read(model, cache, ids, [causal[: len(part), : len(part)] for part in parts], backend)
        cache.keep([range(len(part)) for part in parts])
