"""Trees of guesses, which of them the target accepts, and the trees of many prompts in one pass: a ragged batch.

Node 0 of a tree is the last token that is already certain; its key and value are computed together with the guesses.
What the target says at node i is the distribution from which the children of node i are judged.

A guess sees its prompt and its own branch, and there is no mask anywhere:
  past    ragged attention, one sequence a prompt: all rows of its tree are the queries, the cached rows are the keys,
          where they lie. A long past may be cut into pieces, which are sequences of their own;
  branch  the guess itself and its ancestors, a handful of keys, each a dot product.
A finished part of a softmax counts like one more key: its log-sum-exp is the score, its output the value. So one small
softmax over parts and branch makes the whole. Query heads that share a key head become further query rows, so that no
key is repeated.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import launch
from ..attention import varlen_attention
from ..checks import check_int
from .llama import Attend, Llama

MOST_NODES = 1024
PIECE = 256  # cached rows to a sequence, where the past is cut; times: data/results/notes.md
LONGEST = 128  # keys of a branch that a program of the joining kernel holds at once
CHUNK = 64  # rows of a prompt that are read at a time: each row's ancestors are gathered


class Tree:
    """The shape of a tree: every node at depth d has shape[d] children; (2, 2, 2) has 2 + 4 + 8 guesses.

    parent, depth, rank, children: by node, in order of depth; ranks of siblings count from 1.  levels: the nodes of
    each depth.  inner: so many nodes, the first ones, have children.  sees: bool (nodes, nodes), a node's ancestors and
    itself.  Raises ValueError for a shape that is no tree, or too large a one.
    """

    def __init__(self, shape: Sequence[int]):
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
        self.sees = sees = torch.eye(self.nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parent[1:], 1):
            self.children[parent].append(node)
            sees[node] |= sees[parent]  # itself, its parent, and all that its parent sees


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
    sees: for each prompt bool (new rows, rows on trial), which of the rows on trial, old and new, a new row sees beside
    itself; all see the past.  heads, kv_heads: of queries and keys; the `group` of query heads that share a key head
    become rows one behind the other.  piece: cut the past into pieces of so many rows, each a sequence of its own, so
    that few prompts keep a whole GPU busy.

    branch: int32 (rows, longest branch), the cache rows that a new row sees beside the past, its own first, -1 for
    none.  place, position: int32 (rows,), where it lies in the cache and in its text.  cu_past_q, cu_past_k,
    max_past_q, max_past_k: the past as sequences of `varlen_attention`.  asked: its queries, int64 (queries *
    kv_heads,), as rows of all heads one behind the other; None where all are asked once, as they stand.  parts: int32
    (rows * group, most pieces), where its output holds the parts of a row, -1 for none.
    """

    def __init__(self, past: Sequence[int], capacity: int, sees: Sequence[Tensor], heads: int, kv_heads: int,
                 device: torch.device | str, piece: int | None = None):  # fmt: skip
        for b, (length, mask) in enumerate(zip(past, sees, strict=True)):
            if length + mask.shape[1] > capacity:
                raise ValueError(
                    f"sees: prompt {b} has {length} rows and {mask.shape[1]} on trial, but room for {capacity}"
                )
        masks = {id(mask): mask for mask in sees}  # many prompts share a tree
        shapes = {key: _branches(mask) for key, mask in masks.items()}
        width = max(branch.shape[1] for branch in shapes.values())
        for key, branch in shapes.items():
            shapes[key] = np.pad(branch, ((0, 0), (0, width - branch.shape[1])), constant_values=-1)
        branch, new = np.concatenate([shapes[id(mask)] for mask in sees]), np.array([len(mask) for mask in sees])
        past = np.array(past)
        first = np.repeat(np.arange(len(past)) * capacity + past, new)  # where a row's prompt begins its trial
        position = (branch >= 0).sum(1) - 1 + np.repeat(past, new)
        branch = np.where(branch >= 0, branch + first[:, None], -1)
        numbers = {"branch": branch, "place": branch[:, 0], "position": position}
        self.group, self.asked = heads // kv_heads, None
        numbers |= self._past(past, capacity, new * self.group, piece)
        if "asked" in numbers:
            row, head = np.divmod(numbers["asked"], self.group)
            numbers["asked"] = (row[:, None] * heads + np.arange(kv_heads) * self.group + head[:, None]).ravel()
        self.__dict__.update(_to(device, numbers))
        self.asked = None if self.asked is None else self.asked.long()

    def _past(self, past: np.ndarray, capacity: int, queries: np.ndarray, piece: int | None) -> dict[str, np.ndarray]:
        pieces = np.ones_like(past) if piece is None else np.maximum(1, -(-past // piece))
        prompt = np.repeat(np.arange(len(past)), pieces + 1)  # of each sequence; a prompt's last is the room behind
        first = np.cumsum(pieces + 1) - pieces - 1
        number = np.arange(len(prompt)) - first[prompt]
        room, cut = number == pieces[prompt], capacity if piece is None else piece
        keys = np.where(room, capacity - past[prompt], np.minimum(cut, past[prompt] - number * cut))
        asked = np.where(room, 0, queries[prompt])  # nobody asks the room
        self.max_past_q, self.max_past_k = int(asked.max(initial=0)), max(1, int(keys.max(initial=0)))
        cu_q, cu_k = (np.append(0, np.cumsum(lengths)) for lengths in (asked, keys))
        own = np.repeat(np.arange(len(past)), queries)  # the prompt of each query row
        local, slot = np.arange(len(own)) - (np.cumsum(queries) - queries)[own], np.arange(pieces.max())
        at = cu_q[np.minimum(first[own, None] + slot, len(prompt) - 1)] + local[:, None]
        parts, found = np.where(slot < pieces[own, None], at, -1), {"cu_past_q": cu_q, "cu_past_k": cu_k}
        if pieces.max() > 1:
            found["asked"] = np.empty(cu_q[-1], int)
            found["asked"][parts[parts >= 0]] = np.nonzero(parts >= 0)[0]
        return found | {"parts": parts}


def piece_for(prompts: int, kv_heads: int, device: torch.device | str) -> int | None:
    """The `piece` of a `Plan` for so many prompts and a model with so many key heads: a program works on one sequence
    and key head, so where these are fewer than the GPU's multiprocessors, `PIECE`. None, no cutting, otherwise, and
    where `device` is no GPU."""
    if torch.device(device).type != "cuda":
        return None
    return PIECE if prompts * kv_heads < torch.cuda.get_device_properties(device).multi_processor_count else None


def _branches(mask: Tensor) -> np.ndarray:
    """The columns that each row of a mask (new, on trial) sees, its own first, filled up with -1."""
    seen, (new, trial) = mask.cpu().numpy().copy(), mask.shape
    own = np.arange(trial - new, trial)
    seen[np.arange(new), own] = False
    count = seen.sum(1)
    order = np.argsort(~seen, axis=1, kind="stable")[:, : count.max(initial=0)]
    others = np.where(np.arange(order.shape[1]) < count[:, None], order, -1)
    return np.concatenate((own[:, None], others), 1)


def _to(device: torch.device | str, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Whole numbers as int32 tensors on `device`, all in one copy; each begins on a multiple of 16 bytes."""
    sizes = [-(-x.size // 4) * 4 for x in arrays.values()]
    flat, starts = np.zeros(sum(sizes), np.int32), itertools.accumulate(sizes, initial=0)
    spans = [slice(start, start + x.size) for start, x in zip(starts, arrays.values())]
    for span, x in zip(spans, arrays.values()):
        flat[span] = x.ravel()
    flat = torch.from_numpy(flat).to(device)
    return {name: flat[span].view(x.shape) for (name, x), span in zip(arrays.items(), spans)}


def attend_trees(q: Tensor, k: Tensor, v: Tensor, plan: Plan, backend: str = "auto") -> Tensor:
    """Attention of the new rows of a `plan`, with no mask. q: (rows, heads, headdim).  k, v: (prompts * capacity,
    kv_heads, headdim), the new rows' own among them.  backend: one that computes the log-sum-exp. Returns rows like q;
    raises what `varlen_attention` raises."""
    if plan.asked is None:
        asked = q.unflatten(1, (-1, plan.group)).transpose(1, 2).flatten(0, 1)  # (rows * group, kv_heads, headdim)
    else:
        asked = q.flatten(0, 1)[plan.asked].unflatten(0, (-1, k.shape[1]))
    sizes = (plan.cu_past_q, plan.cu_past_k, plan.max_past_q, plan.max_past_k)
    part, lse = varlen_attention(asked, k, v, *sizes, return_lse=True, backend=backend)
    rest = (q, k, v, part, lse, plan.branch, plan.parts, q.shape[-1] ** -0.5)
    if not launch.usable(q.device) or q.dtype == torch.float64 or plan.branch.shape[1] > LONGEST:
        return _join(*rest)
    from .kernel import join  # imported here: Triton is optional

    return join(*rest)


def _join(q, k, v, part, lse, branch, parts, scale) -> Tensor:
    """`kernel.join` in PyTorch. Sizes: n rows, g query heads to a key head, h key heads, a keys, p parts."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q4 = q.unflatten(1, (k.shape[1], -1)).transpose(1, 2).to(exact)  # (n, g, h, headdim)
    parts = parts.unflatten(0, q4.shape[:2])  # (n, g, p)
    scores = torch.einsum("nghd,nahd->ngha", q4, k[branch].to(exact)) * scale
    sums = lse.T[parts].transpose(2, 3).to(exact)  # (n, g, h, p)
    none = torch.cat((branch[:, None].expand(*q4.shape[:2], -1), parts), 2)[:, :, None] < 0
    weights = torch.cat((scores, sums), 3).masked_fill(none, float("-inf")).softmax(-1)
    keys = branch.shape[1]
    out = torch.einsum("ngha,nahd->nghd", weights[..., :keys], v[branch].to(exact))
    out = out + torch.einsum("nghp,ngphd->nghd", weights[..., keys:], part[parts].to(exact))
    return out.transpose(1, 2).flatten(1, 2).to(q.dtype)


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


def only(running: Sequence[int], prompts: int, mask: Tensor) -> list[Tensor]:
    """`sees` of a pass in which the prompts in `running`, of so many, get the new rows of a `mask`, and others none."""
    found = [mask[:0, :0]] * prompts
    for b in running:
        found[b] = mask
    return found


def read(model: Llama, cache: Cache, ids: Tensor, sees: Sequence[Tensor], backend: str = "auto") -> Tensor:
    """Last hidden rows (rows, dim) of `model` for the new tokens ids, int64 (rows,), of all prompts one behind the
    other, which are put on trial in `cache`. sees: as in `Plan`.  backend: of `varlen_attention`."""
    piece = piece_for(len(cache.past), model.kv_heads, model.device)
    plan = Plan(cache.past, cache.capacity, sees, model.heads, model.kv_heads, model.device, piece)
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
