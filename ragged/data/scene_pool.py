"""Training pictures without end: digits drawn on the GPU over textured backgrounds, of the kind of `digit_scenes`."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import normalise
from .scenes import CONTRAST, INK, LUMA, SCALE_RANGE, digit_fields, digit_scenes, training_background

SIZE = 224


class Scenes(torch.utils.data.Dataset):
    """Scene i of a split as uint8 (3, 224, 224), its label, and the longer side of its digit in pixels, drawn when
    asked for."""

    def __init__(self, count: int, split: str, seed: int):
        self.count, self.split, self.seed = count, split, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        scene = digit_scenes(1, self.split, self.seed, SIZE, i)
        side = (scene.boxes[0, 2:] - scene.boxes[0, :2]).amax()
        return (scene.images[0] * 255).round().byte(), scene.labels[0], side


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
    loader = torch.utils.data.DataLoader(files, size, num_workers=cores, prefetch_factor=8, worker_init_fn=_one_thread)
    return iter(loader)


def _one_thread(_worker: int) -> None:
    """A process per core draws; were each to start a thread per core for its small products, they would fight. Ctrl-C
    is for the process that asks for the pictures: it may finish its step first."""
    from threadpoolctl import threadpool_limits

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threadpool_limits(1)


class Pool:
    """What training sees: the kind of `digit_scenes`, put together on the GPU, so that no picture comes twice.

    Textured backgrounds are slow to draw, so `size` of them stay on the GPU, and every step replaces `fresh` of the
    oldest by new ones. Digits are drawn over them anew in every step, each turned, stretched, placed and coloured at
    random.
    """

    def __init__(self, device: str, size: int, fresh: int, steps: int, seed: int, done: int = 0, compile: bool = False):
        self.generator = torch.Generator(device).manual_seed(seed + done)
        self.paint = torch.compile(paint, dynamic=False) if compile else paint
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
        theta, edge, boxes = places(self.extents[digit], generator)
        ink = colours(luma[which], generator)
        pixels = self.paint(images[which], self.fields[digit], theta, edge, ink, *changes(batch, device, generator))
        return pixels, self.labels[digit], boxes


def paint(backgrounds: Tensor, fields: Tensor, theta: Tensor, edge: Tensor, ink: Tensor, order: Tensor,
          shifts: Tensor) -> Tensor:  # fmt: skip
    """Normalised pictures (n, 3, 224, 224) of digits over backgrounds, uint8 of that shape. No chance is left in here,
    so that all of it can be compiled into one pass over the pixels; the other arguments are of the functions below."""
    pixels, cover = backgrounds.float() / 255, covered(fields, theta, edge)
    pixels = torch.lerp(pixels, ink[:, :, None, None].expand_as(pixels), cover)
    return normalise(recolour(pixels, order, shifts))


def places(extents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Each digit turned, slanted, stretched, and put somewhere whole: what `covered` needs, theta (n, 2, 3) and the
    sharpness of the edge (n, 1, 1, 1), and the boxes (n, 4): x0, y0, x1, y1 as shares of the side.

    extents: of `ragged.data.scenes.digit_fields`.
    """
    n, device = len(extents), extents.device

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
    edge = (0.7 * scale * SIZE / 2).clamp_min(1.5)[:, None, None, None]  # as sharp as in the scenes: about a pixel
    return theta, edge, torch.cat((place - half, place + half), 1) / 2 + 0.5


def covered(fields: Tensor, theta: Tensor, edge: Tensor) -> Tensor:
    """How much of every pixel ink covers: (n, 1, 224, 224) in 0..1. fields: of `ragged.data.scenes.digit_fields`."""
    grid = F.affine_grid(theta, [len(fields), 1, SIZE, SIZE], align_corners=False)
    field = F.grid_sample(fields[:, None].float(), grid, align_corners=False)
    return ((field - INK) * edge + 0.5).clamp(0, 1)


def colours(luma: Tensor, generator: torch.Generator) -> Tensor:
    """A colour of ink (n, 3) for each background's range of luma (n, 2), darker or lighter by CONTRAST at least."""
    n = len(luma)
    side, depth, mix = torch.rand(3, n, device=luma.device, generator=generator)
    below, above = luma[:, 0] - CONTRAST, 1 - luma[:, 1] - CONTRAST
    darker = (above <= 0) | ((below > 0) & (side < 0.5))
    level = torch.where(darker, depth * below, 1 - depth * above)[:, None]
    chroma = 2 * torch.rand(n, 3, device=luma.device, generator=generator) - 1
    chroma = chroma - (chroma @ luma.new_tensor(LUMA))[:, None]  # leaves the luma as it is
    room = (torch.where(chroma > 0, 1 - level, level) / chroma.abs().clamp_min(1e-6)).amin(1, keepdim=True)
    return level + chroma * room * 0.6 * mix[:, None]


def changes(n: int, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What `recolour` does to n pictures, by chance: order (n, 3) and shifts (3, n, 1, 1, 1)."""
    order = torch.rand(n, 3, device=device, generator=generator).argsort(1)
    return order, torch.rand(3, n, 1, 1, 1, device=device, generator=generator)


def recolour(images: Tensor, order: Tensor, shifts: Tensor) -> Tensor:
    """Swap the colour channels, turn half of the pictures into negatives, and change contrast and brightness a
    little: a digit is a digit in any colour."""
    images = images.gather(1, order[:, :, None, None].expand_as(images))
    flip, contrast, light = shifts
    images = torch.where(flip < 0.5, 1 - images, images)
    return ((images - 0.5) * (0.7 + 0.6 * contrast) + 0.5 + 0.2 * (light - 0.5)).clamp(0, 1)
