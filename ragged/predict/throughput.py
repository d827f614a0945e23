"""Where the time goes between a file and its label: images/s of decoding, of the way to the GPU, of the GPU, and of all
three together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch

from .classify import Classify
from .reading import Read, ahead, together

PARTS = ("decode", "transfer", "GPU", "end to end")


def throughput(classify: Classify, read: Read, paths: Sequence[str], workers: int,
               seconds: float = 10.0) -> dict[str, float | None]:  # fmt: skip
    """images/s of each of PARTS over the images in `paths`, again and again for so many `seconds` a part.

    classify, read: as in a run.  workers: processes that read. None for the transfer where there is no GPU. The first
    batches, which the processes had ready when the clock began, do not count.
    """
    cuda = classify.device.startswith("cuda")
    few = list(itertools.islice(itertools.cycle(paths), classify.batch))
    images = together([(path, *read.one(path)) for path in few]).images
    images = images.pin_memory() if cuda else images
    found: dict[str, float | None] = dict.fromkeys(PARTS)
    found["decode"] = _read(classify, read, paths, workers, seconds, label=False)
    if cuda:
        found["transfer"] = _repeat(lambda: images.to(classify.device, non_blocking=True), len(images), seconds)
    there = images.to(classify.device)
    found["GPU"] = _repeat(lambda: classify.run(there), len(images), seconds)
    found["end to end"] = _read(classify, read, paths, workers, seconds, label=True)
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _repeat(work: Callable[[], object], images: int, seconds: float) -> float:
    for _ in range(3):
        work()
    _wait()
    times, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            work()
        _wait()
        times += 4
    return times * images / (time.perf_counter() - start)


def _read(classify: Classify, read: Read, paths: Sequence[str], workers: int, seconds: float, label: bool) -> float:
    ready = 2 * workers + 1  # batches that PyTorch's loader has under way
    rounds = list(itertools.islice(itertools.cycle(paths), max(len(paths), 1000 * classify.batch)))
    images, start = 0, 0.0
    for number, batch in enumerate(ahead(rounds, read, classify.batch, workers, classify.device.startswith("cuda"))):
        if label:
            classify.run(batch.images)
        if number < ready:
            start = time.perf_counter()
            continue
        images += len(batch.paths)
        if time.perf_counter() - start >= seconds:
            break
    return images / (time.perf_counter() - start)


def line(found: dict[str, float | None], device: str, workers: int) -> str:
    """What `throughput` found, side by side, as text. device, workers: where, and with how many processes."""
    names = {"GPU": "model on the CPU"} if device == "cpu" else {}
    cells = [f"{names.get(part, part)} {'none' if rate is None else f'{rate:,.0f}'}" for part, rate in found.items()]
    return f"images/s with {workers} reading processes: {' | '.join(cells)}"
