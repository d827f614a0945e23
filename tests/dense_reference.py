"""The four published pruning methods and a random one, written the slow and obvious way.

One image at a time, the full N x N softmax attention, no packing, no padding, no shared batch. Since there is only one
image in flight, "ragged" needs no special care: a cut is an index into the rows of one matrix. The package is tested
against this file, so nothing here is imported from the package.

Sources: Threshold-L2 arXiv 2604.15408, DynamicViT arXiv 2106.02034, EViT arXiv 2202.07800, ATS arXiv 2111.15667.

Shapes in comments: n rows now (prefix rows included), D channels, H heads, d channels of a head, P prefix rows.
Row ids are row numbers of the un-pruned sequence (0 = CLS); a fused row has id -1.
"""

import math
from collections import namedtuple
from dataclasses import dataclass, field

import torch
from torch import nn

FUSED = -1


# What one cut left: ids[b] is the ordered list of row ids of image b, counts[b] its length.
DenseStage = namedtuple("DenseStage", "block ids counts")

# logits (B, classes); a DenseStage per cut; and how safe the comparison is: set_margin[b] is the smallest relative
# distance of any decision about image b to the opposite decision, order_margin[b] the same for the order of the kept
# rows. Below about 1e-6 two correct fp32 programs may disagree.
Dense = namedtuple("Dense", "logits stages set_margin order_margin")


@dataclass
class Cut:
    """A decision on one image: rows (k,) to keep, prefix first, in order; optionally one fused row (1, D)."""

    rows: torch.Tensor
    fused: torch.Tensor | None = None
    set_margin: float = math.inf
    order_margin: float = math.inf


@dataclass
class State:
    """Image `number` of a batch on its way: tokens (n, D), ids (n,), the last attention (H, n, n) and its values
    (H, n, d)."""

    tokens: torch.Tensor
    ids: torch.Tensor
    prefix: int
    number: int
    attention: torch.Tensor | None = None
    values: torch.Tensor | None = None
    cuts: list = field(default_factory=list)


# --- the model, one image


def qkv_and_attention(attn, x):
    """(n, D) -> attention (H, n, n) after the softmax, values (H, n, d)."""
    n = x.shape[0]
    qkv = attn.qkv(x).reshape(n, 3, attn.num_heads, attn.head_dim)
    q, k, v = (qkv[:, i].transpose(0, 1) for i in range(3))  # (H, n, d) each
    q, k = attn.q_norm(q), attn.k_norm(k)
    return torch.softmax(q @ k.transpose(1, 2) / math.sqrt(attn.head_dim), dim=-1), v


def mix(attn, attention, values):
    """attention (H, rows, n) @ values (H, n, d) -> (rows, D), heads concatenated and projected."""
    out = (attention @ values).transpose(0, 1).reshape(attention.shape[1], -1)
    return attn.proj(attn.norm(out) if hasattr(attn, "norm") else out)


def apply_cut(state, cut):
    """Keep the rows of the cut, append the fused row. The attention is left alone: its block is over."""
    state.tokens, state.ids = state.tokens[cut.rows], state.ids[cut.rows]
    if cut.fused is not None:
        state.tokens = torch.cat([state.tokens, cut.fused])
        state.ids = torch.cat([state.ids, torch.tensor([FUSED])])
    state.cuts.append((cut, state.ids.tolist()))


def forward_one(vit, image, select, at, where, rows_only=False, number=0):
    """Run one image. select(stage, state) -> Cut is asked once per block listed in `at`, at the place `where`.

    rows_only: an "inside" cut chooses the query rows of the attention itself, before it is computed.
    """
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]  # (N, D)
    state = State(tokens, torch.arange(len(tokens)), vit.num_prefix_tokens, number)
    for i, block in enumerate(vit.blocks):
        stage = at.index(i) if i in at else None
        if stage is not None and where == "before":
            apply_cut(state, select(stage, state))
        state.attention, state.values = qkv_and_attention(block.attn, block.norm1(state.tokens))
        rows = torch.arange(len(state.tokens))
        if stage is not None and where == "inside" and rows_only:
            cut = select(stage, state)
            rows = cut.rows
            apply_cut(state, cut)  # the residual stream loses the rows; keys and values do not
        state.tokens = state.tokens + block.ls1(mix(block.attn, state.attention[:, rows], state.values))
        if stage is not None and where == "inside" and not rows_only:
            apply_cut(state, select(stage, state))
        state.tokens = state.tokens + block.ls2(block.mlp(block.norm2(state.tokens)))
        if stage is not None and where == "after":
            apply_cut(state, select(stage, state))
    # The head reads prefix rows only (CLS, and the distillation token where there is one).
    return vit.forward_head(vit.norm(state.tokens[: state.prefix][None]))[0], state


def run(vit, images, select, at, where, rows_only=False):
    """Loop forward_one over the batch (B, 3, H, W) and gather a Dense."""
    at = tuple(at)
    results = [forward_one(vit, image, select, at, where, rows_only, number) for number, image in enumerate(images)]
    cuts = [state.cuts for _, state in results]
    stages = [DenseStage(i, [c[s][1] for c in cuts], [len(c[s][1]) for c in cuts]) for s, i in enumerate(at)]
    set_margin = [min(cut.set_margin for cut, _ in c) for c in cuts]
    order_margin = [min(cut.order_margin for cut, _ in c) for c in cuts]
    return Dense(torch.stack([logits for logits, _ in results]), stages, set_margin, order_margin)


# --- small decisions


def with_prefix(state, patches):
    """Patch numbers (0 = first row after the prefix) -> row numbers, with all prefix rows in front."""
    return torch.cat([torch.arange(state.prefix), patches + state.prefix])


def smallest_gap(ranked):
    """Smallest distance of two neighbours in a ranking, relative to the neighbours themselves."""
    gaps = (ranked[1:] - ranked[:-1]).abs() / torch.maximum(ranked[1:].abs(), ranked[:-1].abs())
    return gaps.min().item() if len(gaps) else math.inf


def best_first(scores, count):
    """The `count` highest scores in descending order -> (patch numbers, set_margin, order_margin)."""
    order = torch.argsort(scores, descending=True, stable=True)
    ranked = scores[order]
    return order[:count], smallest_gap(ranked[max(count - 1, 0) : count + 1]), smallest_gap(ranked[: count + 1])


def cls_attention(state):
    """Softmax attention of the CLS row to the patches, (H, n - P)."""
    return state.attention[:, 0, state.prefix :]


# --- the pruners


def threshold_l2(vit, images, keep=None, tau=None, at=(3,), where="after"):
    """Patches ranked by the L2 norm of their residual stream; the kept ones stay in place.

    keep: int(patches now * keep) of them. tau: all those with norm >= tau * mean norm of the image's patches now.
    """

    def select(stage, state):
        norms = state.tokens[state.prefix :].norm(dim=-1)
        if tau is not None:
            relative = norms / norms.mean()
            passed = torch.nonzero(norms >= tau * norms.mean())[:, 0]
            margin = (relative - tau).abs().min().item() if len(relative) else math.inf
            return Cut(with_prefix(state, passed), set_margin=margin)
        patches, margin, _ = best_first(norms, int(len(norms) * keep))
        return Cut(with_prefix(state, patches.sort().values), set_margin=margin)

    return run(vit, images, select, at, where)


class Predictor(nn.Module):
    """DynamicViT: patches (n - P, D) -> log-probabilities (n - P, 2), index 0 = keep. Keys as published."""

    def __init__(self, dim):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, patches):
        x = self.in_conv(patches)
        half = x.shape[-1] // 2
        everyone = x[:, half:].mean(dim=0).expand(len(x), half)  # all rows still here are kept rows
        return self.out_conv(torch.cat([x[:, :half], everyone], dim=-1))


def load_predictors(state_dict, dim):
    """Keys `score_predictor.{s}.in_conv...` / `.out_conv...` -> list of Predictor."""
    stages = {int(key.split(".")[1]) for key in state_dict}
    predictors = nn.ModuleList(Predictor(dim) for _ in sorted(stages))
    predictors.load_state_dict({key.split(".", 1)[1]: value for key, value in state_dict.items()})
    return list(predictors.eval())


def dynamicvit(vit, images, keep, predictors, at=(3, 6, 9), where="before"):
    """A learned predictor per stage; stage s (from 1) keeps int(ORIGINAL patches * keep**s), best first.

    predictors: a list of Predictor, one per stage at least.
    """

    original = vit.patch_embed.num_patches

    def select(stage, state):
        scores = predictors[stage](state.tokens[state.prefix :])[:, 0]
        patches, *margins = best_first(scores, int(original * keep ** (stage + 1)))
        return Cut(with_prefix(state, patches), None, *margins)

    return run(vit, images, select, at, where)


def evit(vit, images, keep, at=(3, 6, 9), where="inside", fuse=True):
    """CLS attention, mean over heads: ceil(keep * patches now) best first; the rest summed, weighted, to one row."""

    def select(stage, state):
        scores = cls_attention(state).mean(dim=0)
        count = math.ceil(keep * len(scores))
        if count >= len(scores):
            return Cut(torch.arange(len(state.tokens)))
        patches, *margins = best_first(scores, count)
        left = torch.ones(len(scores), dtype=torch.bool)
        left[patches] = False
        fused = (scores[left, None] * state.tokens[state.prefix :][left]).sum(dim=0, keepdim=True)
        return Cut(with_prefix(state, patches), fused if fuse else None, *margins)

    return run(vit, images, select, at, where)


def ats(vit, images, samples, at=tuple(range(3, 12)), where="inside"):
    """Inverse-CDF sampling of patches by CLS attention x value norm; kept: prefix, then ascending score."""

    def select(stage, state):
        if len(state.tokens) - state.prefix <= 1:
            return Cut(torch.arange(len(state.tokens)))
        value_norm = state.values[:, state.prefix :].transpose(0, 1).flatten(1).norm(dim=-1)  # (n - P,)
        scores = (cls_attention(state) * value_norm).sum(dim=0)
        ranked, order = (scores / scores.sum()).sort(stable=True)
        cdf = ranked.cumsum(dim=0)
        cdf = (cdf - cdf.min()) / (cdf.max() - cdf.min())
        points = torch.linspace(cdf[cdf > 0].min().item(), 1, samples, dtype=cdf.dtype)
        distance = (points[:, None] - cdf[None, :]).abs()  # (samples, n - P)
        picked = distance.argmin(dim=1).unique()  # duplicates collapse
        nearest = distance.sort(dim=1).values  # how much farther is the second nearest entry?
        margin = ((nearest[:, 1] - nearest[:, 0]) / points).min().item()
        # A swap of neighbours in the ranking changes the set too, when only one of them is picked.
        margin = min(margin, smallest_gap(ranked))
        return Cut(with_prefix(state, order[picked]), None, margin, margin)

    return run(vit, images, select, at, where, rows_only=True)


def lowbias32(x):
    """A hash of 32 bits, by Chris Wellons."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def drawn(*numbers):
    """A number in [0, 1), made of the upper 24 bits of the hash of all numbers, one after the other."""
    found = 0
    for number in numbers:
        found = lowbias32((found + number) % 2**32)
    return (found >> 8) / 2**24


def random(vit, images, keep, adaptive=False, at=(3, 6, 9), where="before", seed=0):
    """Patches by chance: int(keep * patches now), or those above a limit that every image draws for itself. A number
    is drawn from seed, stage, kind (0: a patch, 1: the image), image and row."""

    def select(stage, state):
        rows = range(state.prefix, len(state.tokens))
        scores = torch.tensor([drawn(seed, stage, 0, state.number, row) for row in rows], dtype=torch.float32)
        if adaptive:
            share = keep + (2 * drawn(seed, stage, 1, state.number, 0) - 1) * min(keep, 1 - keep)
            passed = torch.nonzero(scores >= 1 - share)[:, 0]
            margin = (scores - (1 - share)).abs().min().item() if len(scores) else math.inf
            return Cut(with_prefix(state, passed), set_margin=margin)
        patches, margin, _ = best_first(scores, int(len(scores) * keep))
        return Cut(with_prefix(state, patches.sort().values), set_margin=margin)

    return run(vit, images, select, at, where)
