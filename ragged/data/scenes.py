"""Digit scenes: one real handwritten digit at a random place and size on a textured background, and its bounding box.

The task behind the lessons that need a classifier: only the patches under the digit tell its class, and a small digit
leaves many patches to prune, a large one few. Everything is drawn from (seed, split, number of the scene).
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from ..checks import check_int

SPLITS = ("train", "test")
SCALE_RANGE = (0.15, 0.70)  # longer side of the digit / side of the scene
CONTRAST = 0.30  # least luma distance between the digit's ink and every background pixel
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
INK = 0.4  # coverage of an 8x8 cell that counts as ink


class DigitScenes(NamedTuple):
    """n scenes, as torch tensors."""

    images: object  # float32 (n, 3, size, size) in [0, 1]
    labels: object  # int64 (n,), 0..9
    boxes: object  # int64 (n, 4): x0, y0, x1, y1 in pixels, x1 and y1 exclusive; tight around the ink
    digit_index: object  # int64 (n,): row of the digit in the 1797-image UCI set


def digit_scenes(n: int, split: str = "train", seed: int = 0, size: int = 224, first: int = 0) -> DigitScenes:
    """Scenes number first .. first+n-1 of a seed, as DigitScenes of torch tensors (0.6 MB a scene at size 224).

    Scene i of a (seed, split) is the same whatever n and first are, and shows the same thing at every size. Train and
    test never share a digit. Needs scikit-learn, which carries the digits (ImportError). ValueError for bad arguments.
    """
    import torch

    for name, value, least in (("n", n, 0), ("seed", seed, 0), ("size", size, 32), ("first", first, 0)):
        check_int(name, value, least)
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    images = np.empty((n, 3, size, size), np.float32)
    labels, boxes, index = np.empty(n, np.int64), np.empty((n, 4), np.int64), np.empty(n, np.int64)
    for i in range(n):
        rng = np.random.default_rng([seed, SPLITS.index(split), first + i])
        images[i], labels[i], boxes[i], index[i] = _scene(rng, digit_split(split), size)
    return DigitScenes(*map(torch.from_numpy, (images, labels, boxes, index)))


def digit_split(split: str) -> np.ndarray:
    """Rows of the 1797-digit set that belong to a split, as an int64 array: every fifth run of ten rows (20 %) is test.

    Runs, because stretches of the set cycle through 0..9: taking every fifth row leaves twice as many of some classes
    as of others (48 threes, 26 twos) where runs give 33 to 39 of each.
    """
    rows = np.arange(len(_digits()[0]))
    return rows[((rows // 10) % 5 == 4) == (split == "test")]


@functools.lru_cache(1)
def _digits():
    """The 8x8 coverages in 0..1, their labels, and the extent of each one's ink: (n, 4) y0, y1, x0, x1 in cells."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digit scenes use scikit-learn's handwritten digits: pip install scikit-learn") from error
    loaded = load_digits()
    cells = (loaded.images / 16).astype(np.float32)
    fine = 8  # samples per cell; the outermost ink reaches at most half a cell beyond the 8x8 grid
    weights = _resample(8, 9 * fine, -0.5, 8.5)
    ink = np.matmul(np.matmul(weights, cells), weights.T) > INK
    sides = [(line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)) for line in (ink.any(2), ink.any(1))]
    return cells, loaded.target, np.stack([edge / fine - 0.5 for pair in sides for edge in pair], 1)


def _resample(cells, samples, lo, hi):
    """Catmull-Rom weights (samples, cells): read `cells` values (j-th centred at j + 0.5) evenly across lo..hi."""
    at = lo + (np.arange(samples) + 0.5) * (hi - lo) / samples
    d = np.abs(at[:, None] - (np.arange(cells) + 0.5)[None])
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0)).astype(np.float32)


@functools.lru_cache(64)
def _grid_weights(cells, size):
    return _resample(cells + 2, size, 1, cells + 1)  # a spare cell on each side: borders as smooth as the middle


def _noise(rng, size, grids, falloff):
    """Smooth random field (size, size): one octave per grid, each `falloff` as strong as the coarser one before it."""
    field, strength = np.zeros((size, size), np.float32), 1.0
    for cells in grids:
        weights = _grid_weights(cells, size)
        field += weights @ (np.float32(strength) * rng.standard_normal((cells + 2, cells + 2), np.float32)) @ weights.T
        strength *= falloff
    return field


def _texture(rng, size):
    """Background pattern (size, size) in [-1, 1]: a gradient, clouds, grain and bent stripes.

    Grain and stripes fill only a part of the scene, so that some patches are busy and others empty.
    """
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    cloud, busy = _noise(rng, size, (2, 4), 0.5), _noise(rng, size, (2, 3), 0.7)
    grain = _noise(rng, size, (8, 16, 32, 64), rng.uniform(0.6, 1.0))
    turn, slope = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    across = line[:, None] * np.float32(math.sin(turn)) + line[None] * np.float32(math.cos(turn))
    stripes = np.sin(np.float32(2 * math.pi * rng.uniform(4, 16)) * across + 1.5 * cloud)
    gradient = line[:, None] * np.float32(math.sin(slope)) + line[None] * np.float32(math.cos(slope))
    where = np.clip(busy + np.float32(rng.uniform(-0.6, 1)), 0, 1)  # from a bare wall to texture everywhere
    mix = rng.uniform(0, 1, 4).astype(np.float32) * np.float32([0.7, 0.4, 1.5, 1.5 if rng.uniform() < 0.4 else 0])
    field = mix[0] * gradient + mix[1] * cloud + where * (mix[2] * grain + mix[3] * stripes)
    return field / max(float(np.abs(field).max()), 1e-6)


def _colour(rng, luma):
    """A random RGB colour of exactly this luma: grey plus a chroma that carries none, as far as the RGB cube allows."""
    chroma = rng.uniform(-1, 1, 3)
    chroma -= chroma @ LUMA  # the weights sum to one
    room = np.where(chroma > 0, 1 - luma, luma) / np.maximum(np.abs(chroma), 1e-6)
    return (luma + chroma * room.min() * rng.uniform(0, 0.6)).astype(np.float32)


def _scene(rng, rows, size):
    """One scene: image (3, size, size) in steps of 1/255, label, box (x0, y0, x1, y1), row of the digit."""
    row = rows[rng.integers(len(rows))]
    side = math.exp(rng.uniform(*np.log(SCALE_RANGE))) * size
    place = rng.uniform(0, 1, 2)
    image, ink, _ = _background(rng, size)
    cover = _cover(row, side)
    y0, x0 = (place * (size + 1 - np.array(cover.shape))).astype(int)
    y1, x1 = y0 + cover.shape[0], x0 + cover.shape[1]
    image[:, y0:y1, x0:x1] += cover * (ink[:, None, None] - image[:, y0:y1, x0:x1])
    return _steps(image).astype(np.float32) / 255, _digits()[1][row], (x0, y0, x1, y1), row


def _steps(image):
    """A picture in steps of 1/255, uint8: 8 bits also hide rounding differences between CPUs."""
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def _background(rng, size):
    """A picture without its digit (3, size, size), a colour of ink that stands out from it, and its range of luma."""
    swing = rng.uniform(0.02, 0.18)  # texture strength, in luma
    middle = rng.uniform(swing + 0.05, 0.95 - swing)
    gaps = (middle - swing - CONTRAST, 1 - middle - swing - CONTRAST)  # luma left for ink, darker or lighter
    below = gaps[1] <= 0 or (gaps[0] > 0 and rng.uniform() < 0.5)
    ink = _colour(rng, rng.uniform(0, gaps[0]) if below else 1 - rng.uniform(0, gaps[1]))
    dark, light = ([_colour(rng, middle + sign * swing) for _ in range(2)] for sign in (-1, 1))
    hue = np.clip(0.5 + 0.5 * _noise(rng, size, (2, 4), 0.5), 0, 1)  # the two pairs of colours blend across the scene
    tone = 0.5 + 0.5 * _texture(rng, size)
    image = np.empty((3, size, size), np.float32)
    for c in range(3):
        low = dark[0][c] + hue * (dark[1][c] - dark[0][c])
        image[c] = low + tone * (light[0][c] + hue * (light[1][c] - light[0][c]) - low)
    return image, ink, (middle - swing, middle + swing)


def training_background(number: int, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Background `number` of a seed, without a digit: uint8 (3, size, size), and its range of luma, float32 (2,)."""
    image, _, luma = _background(np.random.default_rng([seed, len(SPLITS), number]), size)
    return _steps(image), np.array(luma, np.float32)


def digit_fields(split: str = "train", samples: int = 144) -> tuple[np.ndarray, ...]:
    """The digits of a split as smooth fields (n, samples, samples) over 9 cells, -0.5 to 8.5, float32, whose values
    above INK are ink; the extents of the ink (n, 4) y0, y1, x0, x1 in cells; and the labels (n,). For drawing digits
    in bulk."""
    cells, labels, extents = _digits()
    rows = digit_split(split)
    weights = _resample(8, samples, -0.5, 8.5)
    return np.matmul(np.matmul(weights, cells[rows]), weights.T), extents[rows].astype(np.float32), labels[rows]


def _cover(row, side):
    """How much ink covers each pixel, 0..1 (height, width), of a digit cropped to its ink, `side` pixels long."""
    cells, _, extents = _digits()
    y0, y1, x0, x1 = extents[row]
    scale = side / max(y1 - y0, x1 - x0)  # pixels per cell
    height, width = (max(1, round(extent * scale)) for extent in (y1 - y0, x1 - x0))
    ink = _resample(8, height, y0, y1) @ cells[row] @ _resample(8, width, x0, x1).T
    return np.clip((ink - INK) * np.float32(max(1.5, 0.7 * scale)) + 0.5, 0, 1)  # an edge about one pixel wide
