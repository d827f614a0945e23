"""How fast images become labels when they start as JPEG files: `python -m ragged.predict.ceiling --out DIR`.

Every row holds three rates side by side: of decoding alone, of the GPU alone, and of both together. Each way of
decoding is tried with every model, pruned and unpruned: Pillow as `ragged.predict` reads, torchvision, on so many
processes, and nvJPEG on the GPU, through torchvision. What a machine cannot do is a row that says why.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..bench import commandline
from ..bench.folder import picture_config
from ..bench.rounds import Subject
from ..bench.runner import Candidate, Case, Recorder, Skip
from ..bench.timing import Stats, stats, wait
from ..data import data_dir, read_picture
from ..loading import DEITS, load_deit
from ..model import RaggedViT
from ..pruners import PRUNERS
from .classify import Classify
from .reading import Read

METRICS = ("decode_images_per_s", "gpu_images_per_s", "end_to_end_images_per_s")
PROCESSES = (1, 2, 4, 8, 16)
SIZE, QUALITY = (500, 375), 90  # of an ordinary photograph of ImageNet
SLICES = 5  # of a measurement, for its spread
PRUNED = {
    "none": lambda: None,
    "evit": lambda: PRUNERS["evit"](keep=0.7),
    "threshold_l2_tau": lambda: PRUNERS["threshold_l2"](tau=1.0),
}


class Decoded(torch.utils.data.Dataset):
    """uint8 images (3, height, width) as `vit` wants them, of the JPEG files `paths` again and again. way: "pillow",
    "torchvision", or "bytes" for the files as they are."""

    def __init__(self, paths: Sequence[str], way: str, read: Read, config: dict):
        self.paths, self.way, self.read, self.config = paths, way, read, config

    def __len__(self) -> int:
        return 1 << 30  # nobody gets to the end

    def __getitem__(self, i: int) -> Tensor:
        path = self.paths[i % len(self.paths)]
        if self.way == "pillow":
            return self.read.one(path)[0]
        file = torchvision.io.read_file(path)
        if self.way == "bytes":
            return file
        return resized(torchvision.io.decode_jpeg(file, torchvision.io.ImageReadMode.RGB), self.config)


def resized(image: Tensor, config: dict) -> Tensor:
    """A uint8 image (..., 3, height, width) of any size as timm's `config` wants it."""
    side = config["input_size"][-1]
    image = F.resize(image, [int(side / config["crop_pct"])], F.InterpolationMode(config["interpolation"]),
                     antialias=True)  # fmt: skip
    return F.center_crop(image, [side, side])


def batches(files: Decoded, batch: int, processes: int, device: str) -> Iterator[Tensor]:
    """uint8 images (batch, 3, height, width) by `processes`, on the GPU where nvJPEG makes them there."""
    on_gpu = files.way == "bytes"
    pin, collate = device == "cuda" and not on_gpu, list if on_gpu else None
    loader = torch.utils.data.DataLoader(files, batch, num_workers=processes, pin_memory=pin, collate_fn=collate)
    for found in loader:
        if on_gpu:
            decoded = torchvision.io.decode_jpeg(found, torchvision.io.ImageReadMode.RGB, device=device)
            found = torch.stack([resized(image, files.config) for image in decoded])
        yield found


def rate(work: Iterator[int], seconds: float, before: int = 0) -> Stats:
    """images/s of `work`, which yields how many images it just did, in SLICES. before: rounds that do not count."""
    for done in itertools.islice(work, before + 1):
        assert done
    found = []
    for _ in range(SLICES):
        wait()
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / SLICES:
            images += next(work)
        wait()
        found.append(images / (time.perf_counter() - start))
    return stats(found)


def photographs(folder: Path, count: int) -> list[str]:
    """`count` JPEG files in `folder`, of an ordinary size, made of the photographs of the course."""
    sources = [read_picture(path) for path in sorted((data_dir() / "images").glob("*.jpg"))]
    paths = []
    for i in range(count):
        picture = sources[i % len(sources)].resize((SIZE[0] + 8 * (i % 4), SIZE[1]), Image.Resampling.LANCZOS)
        paths.append(str(folder / f"{i}.jpg"))
        picture.save(paths[-1], quality=QUALITY)
    return paths


class Ceiling:
    """What all rows share: the files, and what was measured already. seconds: of each measurement."""

    def __init__(self, paths: Sequence[str], batch: int, device: str, seconds: float):
        self.paths, self.batch, self.device, self.seconds = paths, batch, device, seconds
        self.classify = functools.lru_cache(1)(self._classify)
        self.decode = functools.cache(self._decode)
        self.gpu = functools.cache(self._gpu)

    def _classify(self, model: str, pruner: str) -> Classify:
        vit = load_deit(model, weights="random")  # speed does not ask what the weights know
        return Classify(RaggedViT(vit, PRUNED[pruner]()), self.batch, self.device)

    def files(self, way: str) -> Decoded:
        """The files, decoded this `way`."""
        vit = load_deit("deit_tiny", weights="random")  # all want the same pictures
        return Decoded(self.paths, {"nvjpeg": "bytes"}.get(way, way), Read(vit), picture_config(vit))

    def _work(self, way: str, processes: int, label: Callable[[Tensor], object] | None) -> Iterator[int]:
        for images in batches(self.files(way), self.batch, processes, self.device):
            if label is not None:
                label(images)
            yield len(images)

    def _decode(self, way: str, processes: int) -> Stats:
        return rate(self._work(way, processes, None), self.seconds, 2 * processes)

    def _gpu(self, model: str, pruner: str) -> Stats:
        images = torch.stack([self.files("pillow")[i] for i in range(self.batch)]).to(self.device)
        classify = self.classify(model, pruner)
        work = (len(classify.run(images).classes) for _ in itertools.count())
        return rate(work, self.seconds, 3)

    def subject(self, model: str, pruner: str, way: str, processes: int) -> Subject:
        """The three rates. Skip where the machine has no such decoder."""
        if way == "nvjpeg" and self.device != "cuda":
            raise Skip("nvJPEG needs a CUDA device")
        if way != "pillow" and not hasattr(torchvision.io, "decode_jpeg"):
            raise Skip(f"torchvision {torchvision.__version__} decodes no JPEG any more")
        if processes > (os.cpu_count() or 1):
            raise Skip(f"this machine has {os.cpu_count()} cores")
        both = rate(self._work(way, processes, self.classify(model, pruner).run), self.seconds, 2 * processes)
        values = self.decode(way, processes), self.gpu(model, pruner), both
        return Subject([], clocks=(), found=dict(zip(METRICS, values)))


def cases(ceiling: Ceiling, models: Sequence[str], processes: Sequence[int]) -> list[Case]:
    """A case for each model and pruner, with every way of decoding."""
    ways = [(way, n) for way in ("pillow", "torchvision") for n in processes] + [("nvjpeg", min(4, max(processes)))]
    dtype, how = ("float16", "graph") if ceiling.device == "cuda" else ("float32", "eager")
    shared = {"suite": "ceiling", "batch": ceiling.batch, "tokens": "197", "dtype": dtype}
    found = []
    for model, pruner in itertools.product(models, PRUNED):
        columns = {"pruner": pruner, "backend": "auto" if pruner != "none" else "unpruned"}
        candidates = [
            Candidate(columns | {"mode": f"{how}, {way} x{n}"},
                      functools.partial(ceiling.subject, model, pruner, way, n), METRICS)
            for way, n in ways
        ]  # fmt: skip
        found.append(Case(shared | {"model": model}, candidates))
    return found


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser("python -m ragged.predict.ceiling", description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, default=Path("results"), help="folder of the rows (default: results)")
    p.add_argument("--model", nargs="+", choices=DEITS, default=DEITS)
    p.add_argument("--processes", nargs="+", type=commandline.positive, default=PROCESSES, help="that decode")
    p.add_argument("--batch", type=commandline.positive, default=256)
    p.add_argument("--seconds", type=float, default=2.5, help="of each measurement (default 2.5)")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="start no model after this time; run again to go on")
    p.add_argument("--redo", action="store_true", help="measure again what is recorded already")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 4 where rows failed for reasons that can be put right."""
    asked = parser().parse_args(arguments)
    commandline.check_writable(asked.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recorder = Recorder(asked.out, redo=asked.redo, budget_s=asked.budget)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ceiling = Ceiling(photographs(Path(folder), asked.batch), asked.batch, device, asked.seconds)
        for case in cases(ceiling, asked.model, asked.processes):
            if recorder.late():
                print("ceiling: the time is up, run the same command again to go on", file=sys.stderr)
                break
            for row in recorder.run(case):
                value = f"{float(row['value']):.0f}" if row["value"] is not None else row["status"]
                print(row["model"], row["pruner"], row["mode"], row["metric"], value, flush=True)
    return 4 if recorder.failures else 0


if __name__ == "__main__":
    sys.exit(commandline.run(main, "python -m ragged.predict.ceiling"))
