"""What training needs beside a network: scenes on the GPU, their augmentation, and the losses.

The task is small but not easy for a Vision Transformer that starts from nothing: most patches say nothing, and until
attention has found the digit the class label alone teaches little. So every patch is taught too (token labelling,
arXiv 2104.10858): a patch says which share of it lies under the digit's box, and of which class. That second head is
thrown away after training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import normalise
from .pruners import Predictor
from .scenes import CONTRAST, INK, SCALE_RANGE, digit_fields, digit_scenes, training_background

CLASSES = 10
SIZE = 224


class Scenes(torch.utils.data.Dataset):
    """Scene i of a split as uint8 (3, 224, 224) and its label, drawn when asked for."""

    def __init__(self, count: int, split: str, seed: int):
        self.count, self.split, self.seed = count, split, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        scene = digit_scenes(1, self.split, self.seed, SIZE, i)
        return (scene.images[0] * 255).round().byte(), scene.labels[0]


class Backgrounds(torch.utils.data.Dataset):
    """Backgrounds first, first + 1, ... of a seed as uint8 (3, 224, 224), and their range of luma (2,)."""

    def __init__(self, count: int, seed: int, first: int = 0):
        self.count, self.seed, self.first = count, seed, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return tuple(map(torch.from_numpy, training_background(self.first + i, self.seed, SIZE)))


def batches(files: torch.utils.data.Dataset, size: int) -> Iterator[list[Tensor]]:
    """Batches in a fixed order, drawn by as many processes as there are cores."""
    cores = min(os.cpu_count() or 1, 32)
    return iter(torch.utils.data.DataLoader(files, size, num_workers=cores, prefetch_factor=8))


class Pool:
    """What training sees: the kind of `digit_scenes`, put together on the GPU, so that no picture comes twice.

    Textured backgrounds are slow to draw, so `size` of them stay on the GPU, and every step replaces `fresh` of the
    oldest by new ones. Digits are drawn over them anew in every step, each turned, stretched, placed and coloured at
    random.
    """

    def __init__(self, device: str, size: int, fresh: int, steps: int, seed: int, done: int = 0):
        self.generator = torch.Generator(device).manual_seed(seed + done)
        # after `done` steps the pool holds the last `size` of the backgrounds drawn so far
        self.new = batches(Backgrounds(size + (steps - done) * fresh, seed, done * fresh), fresh)
        chunks = [next(self.new) for _ in range(size // fresh)]
        self.parts = [torch.cat(part).to(device) for part in zip(*chunks)]
        self.oldest = 0
        fields, extents, labels = digit_fields("train")
        self.fields = torch.from_numpy(fields).to(device, torch.float16)
        self.extents, self.labels = torch.from_numpy(extents).to(device), torch.from_numpy(labels).to(device)

    def step(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (batch, 3, 224, 224), labels (batch,), and boxes (batch, 4) as shares of the side."""
        images, luma = self.parts
        for part, new in zip(self.parts, next(self.new)):
            part[self.oldest : self.oldest + len(new)] = new.to(part.device, non_blocking=True)
        self.oldest = (self.oldest + len(new)) % len(luma)
        device, generator = luma.device, self.generator
        which = torch.randint(len(luma), (batch,), device=device, generator=generator)
        digit = torch.randint(len(self.labels), (batch,), device=device, generator=generator)
        cover, boxes = draw(self.fields[digit], self.extents[digit], generator)
        ink = colours(luma[which], generator)[:, :, None, None]
        pixels = images[which].float() / 255
        pixels = recolour(torch.lerp(pixels, ink.expand_as(pixels), cover), generator)
        return normalise(pixels), self.labels[digit], boxes


def draw(fields: Tensor, extents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each digit turned, slanted, stretched, and put somewhere whole: its cover (n, 1, 224, 224) in 0..1, and its box.

    fields, extents: of `ragged.scenes.digit_fields`. Boxes are (n, 4): x0, y0, x1, y1 as shares of the side.
    """
    n, device = len(fields), fields.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, device=device, generator=generator)

    low, high = extents[:, [2, 0]], extents[:, [3, 1]]  # x, y in cells
    centre, half = (low + high) / 2, (high - low) / 2
    turn = uniform(-0.22, 0.22)
    rotation = torch.stack((turn.cos(), -turn.sin(), turn.sin(), turn.cos()), 1).view(n, 2, 2)
    stretch = torch.diag_embed(torch.exp(uniform(-0.12, 0.12, 2)))
    stretch[:, 0, 1] = uniform(-0.15, 0.15)
    shape = rotation @ stretch
    reach = (shape.abs() @ half[:, :, None]).amax((1, 2))  # half of the longer side, in cells
    scale = torch.exp(uniform(*map(math.log, SCALE_RANGE))) / reach  # the side is 2 in grid_sample's coordinates
    shape = shape * scale[:, None, None]
    half = (shape.abs() @ half[:, :, None])[..., 0]
    place = uniform(-1, 1, 2) * (1 - half)
    back = torch.linalg.inv(shape)  # from a place in the picture to cells around the digit's centre
    offset = centre - (back @ place[:, :, None])[..., 0]
    theta = torch.cat((back / 4.5, ((offset + 0.5) / 4.5 - 1)[:, :, None]), 2)  # the field is 9 cells wide
    grid = F.affine_grid(theta, [n, 1, SIZE, SIZE], align_corners=False)
    field = F.grid_sample(fields[:, None].float(), grid, align_corners=False)
    edge = (0.7 * scale * SIZE / 2).clamp_min(1.5)[:, None, None, None]  # as sharp as in the scenes: about a pixel
    return ((field - INK) * edge + 0.5).clamp(0, 1), torch.cat((place - half, place + half), 1) / 2 + 0.5


def colours(luma: Tensor, generator: torch.Generator) -> Tensor:
    """A colour of ink (n, 3) for each background's range of luma (n, 2), darker or lighter by CONTRAST at least."""
    n = len(luma)
    side, depth, mix = torch.rand(3, n, device=luma.device, generator=generator)
    below, above = luma[:, 0] - CONTRAST, 1 - luma[:, 1] - CONTRAST
    darker = (above <= 0) | ((below > 0) & (side < 0.5))
    level = torch.where(darker, depth * below, 1 - depth * above)[:, None]
    chroma = 2 * torch.rand(n, 3, device=luma.device, generator=generator) - 1
    chroma = chroma - (chroma @ luma.new_tensor((0.299, 0.587, 0.114)))[:, None]  # leaves the luma as it is
    room = (torch.where(chroma > 0, 1 - level, level) / chroma.abs().clamp_min(1e-6)).amin(1, keepdim=True)
    return level + chroma * room * 0.6 * mix[:, None]


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Swap the colour channels, turn half of the pictures into negatives, and change contrast and brightness a
    little: a digit is a digit in any colour."""
    n, device = len(images), images.device
    order = torch.rand(n, 3, device=device, generator=generator).argsort(1)
    images = images.gather(1, order[:, :, None, None].expand_as(images))
    flip, contrast, light = torch.rand(3, n, 1, 1, 1, device=device, generator=generator)
    images = torch.where(flip < 0.5, 1 - images, images)
    return ((images - 0.5) * (0.7 + 0.6 * contrast) + 0.5 + 0.2 * (light - 0.5)).clamp(0, 1)


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
    """A network with a second head on its patches: images -> class logits (n, 10), patch logits (n, patches, 11)."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit, self.patch_head = vit, nn.Linear(vit.embed_dim, CLASSES + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.vit.forward_features(images)
        return self.vit.forward_head(x), self.patch_head(x[:, self.vit.num_prefix_tokens :])


def taught_loss(logits: Tensor, patch_logits: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
    """Cross-entropy of the image, and of its patches; those without ink are many, so the others count more."""
    target = patch_targets(labels, boxes)
    each = F.cross_entropy(patch_logits.float().transpose(1, 2), target.transpose(1, 2), reduction="none")
    weight = 1 + 4 * (1 - target[..., CLASSES])
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.05) + (each * weight).sum() / weight.sum()


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
            x = x + block.ls1(masked_attention(block.attn, block.norm1(x), policy))
            x = x + block.ls2(block.mlp(block.norm2(x)))
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
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * (visible + (1 - visible) * own)
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
