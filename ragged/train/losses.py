"""What a network is taught, how, and how well it then does: the two modules that are trained, their losses, a count.

The task is small but not easy for a Vision Transformer that starts from nothing: most patches say nothing, and until
attention has found the digit the class label alone teaches little. So every patch is taught too (token labelling,
arXiv 2104.10858): a patch says which share of it lies under the digit's box, and of which class. That second head is
thrown away after training. CLS is told where to look, and patches whether their vectors should be long: see
`taught_loss`. A network that is taught nothing of this, so that nobody prepared it for pruning, has `label_loss`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data
from ..bench.suites.accuracy import held_out
from ..blocks import finish_attention, finish_block
from ..data.scene_pool import SIZE
from ..model import RaggedViT
from ..pruners import Predictor, Pruner

CLASSES = 10


def patch_targets(labels: Tensor, boxes: Tensor, patches: int = SIZE // 16) -> Tensor:
    """What every patch should say: (n, patches**2, 11), the share under the box for the class, the rest for "none"."""
    edges = torch.arange(patches + 1, device=boxes.device) / patches
    shares = []
    for low, high in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        inside = torch.minimum(edges[1:], high[:, None]) - torch.maximum(edges[:-1], low[:, None])
        shares.append(inside.clamp_min(0) * patches)  # (n, patches)
    share = (shares[1][:, :, None] * shares[0][:, None, :]).flatten(1)[..., None]
    one_hot = F.one_hot(labels, CLASSES + 1).to(share.dtype)[:, None]
    none = torch.zeros(CLASSES + 1, device=boxes.device)
    none[CLASSES] = 1
    return share * one_hot + (1 - share) * none


class Taught(nn.Module):
    """A network with what it is taught beside the class: images -> class logits (n, 10), patch logits (n, patches, 11),
    the log of CLS's attention to the patches in the blocks from `cut` on (n, blocks, patches), and the norms of the
    patches after block `cut`, relative to their mean (n, patches)."""

    def __init__(self, vit: nn.Module, cut: int = 3):
        super().__init__()
        self.vit, self.cut, self.patch_head = vit, cut, nn.Linear(vit.embed_dim, CLASSES + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        vit, looks, norms = self.vit, [], None
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for i, block in enumerate(vit.blocks):
            attn, normed = block.attn, block.norm1(x)
            q, k, v = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            x = finish_block(block, finish_attention(block, x, heads))
            if i >= self.cut:
                scores = (q[:, :, :1] @ k.transpose(-2, -1))[:, :, 0].float() * attn.scale
                looks.append((scores.softmax(-1).mean(1)[:, 1:] + 1e-6).log())
            if i == self.cut:
                norms = torch.linalg.vector_norm(x[:, 1:].float(), dim=-1)
        x = vit.norm(x)
        relative = norms / norms.mean(1, keepdim=True)
        return vit.forward_head(x), self.patch_head(x[:, 1:]), torch.stack(looks, 1), relative


def taught_loss(taught: tuple[Tensor, Tensor, Tensor, Tensor], labels: Tensor, boxes: Tensor) -> Tensor:
    """Cross-entropy of the image; of every patch; of where CLS looks (0.1); and of which vectors are long (0.2).

    The last two make the network one that can be pruned: importance shows where the published scores read it. A
    network that learned from labels alone need not be so kind.
    """
    logits, patch_logits, looks, norms = taught
    target = patch_targets(labels, boxes, math.isqrt(patch_logits.shape[1]))
    share = 1 - target[..., CLASSES]
    weight = 1 + 4 * share  # patches without ink are many, so the others count more

    def weighted(each: Tensor) -> Tensor:
        return (each * weight).sum() / weight.sum()

    of_patches = F.cross_entropy(patch_logits.float().transpose(1, 2), target.transpose(1, 2), reduction="none")
    under = share / share.sum(1, keepdim=True)
    of_looks = -(under[:, None] * looks).sum(-1).mean()
    of_norms = F.binary_cross_entropy_with_logits(6 * (norms - 1.15), share, reduction="none")
    return label_loss(logits, labels) + weighted(of_patches) + 0.1 * of_looks + 0.2 * weighted(of_norms)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the image, logits (n, 10) and labels (n,), smoothed by 0.05."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.05)


# ---- DynamicViT: the decision of every predictor is a mask, so that gradients can pass ----


class Masked(nn.Module):
    """DynamicViT while it is trained: no token leaves, but nobody looks at dropped ones.

    images -> class logits, the last block's tokens (n, 1 + patches, dim), the final decisions (n, patches, 1), and the
    mean share kept at every stage (n, stages).
    """

    def __init__(self, vit: nn.Module, at: tuple[int, ...] = (3, 6, 9)):
        super().__init__()
        self.vit, self.at = vit, at
        self.score_predictor = nn.ModuleList(Predictor(vit.embed_dim) for _ in at)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        vit = self.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        keep, shares = x.new_ones(x.shape[0], x.shape[1] - 1, 1), []
        for i, block in enumerate(vit.blocks):
            if i in self.at:
                scores = masked_scores(self.score_predictor[self.at.index(i)], x[:, 1:], keep)
                keep = F.gumbel_softmax(scores.float(), hard=True)[..., :1].to(x.dtype) * keep
                shares.append(keep.float().mean((1, 2)))
            policy = torch.cat((torch.ones_like(keep[:, :1]), keep), 1)[..., 0]
            x = finish_block(block, x + block.ls1(masked_attention(block.attn, block.norm1(x), policy)))
        x = vit.norm(x)
        return vit.forward_head(x), x, keep, torch.stack(shares, 1)


def masked_scores(predictor: Predictor, x: Tensor, keep: Tensor) -> Tensor:
    """`Predictor.forward` where the mean is taken over the tokens (n, patches, dim) that are still kept."""
    x = predictor.in_conv(x)
    half = x.shape[-1] // 2
    mean = (x[..., half:] * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp_min(1)
    return predictor.out_conv(torch.cat((x[..., :half], mean.expand(-1, x.shape[1], -1)), -1))


def masked_attention(attn: nn.Module, x: Tensor, policy: Tensor) -> Tensor:
    """Attention in which a token (n, tokens) of policy 0 is seen by itself alone; differentiable in the policy."""
    n, tokens, dim = x.shape
    q, k, v = attn.qkv(x).view(n, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)).float() * attn.scale
    own = torch.eye(tokens, device=x.device)
    visible = policy[:, None, None, :].float()
    seen = visible + (1 - visible) * own
    # The largest of what is seen: beside a dropped token that drew far more attention, all others would underflow.
    most = scores.masked_fill(seen == 0, -torch.inf).amax(-1, keepdim=True)
    weights = (scores - most).clamp_max(0).exp() * seen
    weights = weights / weights.sum(-1, keepdim=True)
    return attn.proj((weights.to(v.dtype) @ v).transpose(1, 2).reshape(n, tokens, dim))


def dynamicvit_loss(student: tuple, teacher: tuple[Tensor, Tensor], labels: Tensor, ratio: float) -> Tensor:
    """The published four: cross-entropy, distance of the kept shares from ratio, ratio², ratio³ (weight 2), and
    distillation of the logits (KL) and of the kept tokens (mean squares) from the unpruned network (0.5 each)."""
    logits, tokens, keep, shares = student
    teacher_logits, teacher_tokens = teacher
    wanted = ratio ** torch.arange(1, shares.shape[1] + 1, device=shares.device)
    of_shares = (shares - wanted).square().mean()
    of_logits = F.kl_div(
        F.log_softmax(logits.float(), -1), F.log_softmax(teacher_logits.float(), -1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip
    gap = (tokens[:, 1:].float() - teacher_tokens[:, 1:].float()).square().mean(-1, keepdim=True)
    of_tokens = (gap * keep).sum() / keep.sum().clamp_min(1)
    return F.cross_entropy(logits.float(), labels) + 2 * of_shares + 0.5 * of_logits + 0.5 * of_tokens


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: up in a line over the first 5 %, then down along a cosine."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def top1(vit: nn.Module, pruner: Pruner | None, scenes: int, device: str) -> float:
    """Share of held-out digit scenes whose digit is named rightly."""
    model = RaggedViT(vit, pruner, "sdpa_padded").to(device)
    right, dtype = 0, vit.patch_embed.proj.weight.dtype
    for images, labels, _ in held_out(scenes):
        x = data.normalise(images.to(device).float() / 255).to(dtype)
        right += (model(x).argmax(1).cpu() == labels).sum().item()
    return right / scenes
