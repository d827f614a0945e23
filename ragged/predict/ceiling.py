"""How fast images become labels when they start as JPEG files: `python -m ragged.predict.ceiling --out DIR`.

Three rates stand side by side: of decoding alone, of the GPU alone, and of both together. Each way of decoding is tried
with every model, pruned and unpruned: torchvision on so many processes, Pillow, as `ragged.predict` reads, on the most
of them, and nvJPEG on the GPU, through torchvision and through torchcodec. What a machine cannot do is a row that says
why.
"""

from __future__ import annotations

import argparse
import contextlib
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

ON_GPU = ("nvjpeg", "nvjpeg:torchcodec")
WAYS = ("torchvision", "pillow", *ON_GPU)
METRICS = ("decode_images_per_s", "gpu_images_per_s", "end_to_end_images_per_s")
PROCESSES = (1, 2, 4, 8, 16)
SIZE, QUALITY = (500, 375), 90  # of an ordinary photograph of ImageNet
SLICES = 3  # of a measurement, for its spread
PRUNED = {  # the fast ones first
    "evit": lambda: PRUNERS["evit"](keep=0.7),
    "threshold_l2_tau": lambda: PRUNERS["threshold_l2"](tau=1.0),
    "none": lambda: None,
}


class Decoded(torch.utils.data.Dataset):
    """uint8 images (3, height, width) as timm's `config` wants them, of the JPEG files `paths` again and again. way:
    "pillow", by `read`, "torchvision", or one of ON_GPU, for which the files come as they are."""

    def __init__(self, paths: Sequence[str], way: str, read: Read, config: dict):
        self.paths, self.way, self.read, self.config = paths, way, read, config

    def __len__(self) -> int:
        return 1 << 30  # nobody gets to the end

    def __getitem__(self, i: int) -> Tensor:
        path = self.paths[i % len(self.paths)]
        if self.way == "pillow":
            return self.read.one(path)[0]
        file = torchvision.io.read_file(path)
        if self.way in ON_GPU:
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
    on_gpu = files.way in ON_GPU
    decode = decoder(files.way, device) if on_gpu else None
    pin, collate = device == "cuda" and not on_gpu, end_to_end if on_gpu else None
    loader = torch.utils.data.DataLoader(files, batch, num_workers=processes, pin_memory=pin, collate_fn=collate)
    for found in loader:
        if decode is not None:
            whole, lengths = found
            found = torch.stack([resized(image, files.config) for image in decode(list(whole.split(lengths)))])
        yield found


def end_to_end(files: list[Tensor]) -> tuple[Tensor, list[int]]:
    """The bytes of `files`, uint8 each, in one tensor, and their lengths: tensors of another process hold a file
    descriptor each, and those are few."""
    return torch.cat(files), [len(file) for file in files]


def decoder(way: str, device: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """What makes uint8 images (3, height, width) on the GPU `device` of the bytes of JPEG files. way: one of ON_GPU.
    Skip, which says why, where this machine has no such decoder."""
    if device != "cuda":
        raise Skip("nvJPEG needs a CUDA device")
    if way == "nvjpeg":
        return functools.partial(torchvision.io.decode_jpeg, mode=torchvision.io.ImageReadMode.RGB, device=device)
    try:
        from torchcodec.decoders import decode_jpeg
    except ModuleNotFoundError as error:
        raise Skip("torchcodec is not installed") from error
    except (ImportError, OSError, RuntimeError) as error:  # an older one, or one made for another PyTorch
        raise Skip(f"this torchcodec decodes no images here: {str(error).strip().splitlines()[0]}"[:160]) from error
    return functools.partial(decode_jpeg, mode="RGB", device=device)


def rate(work: Iterator[int], seconds: float, before: int = 0, turn: int = 1) -> Stats:
    """images/s of `work`, which yields how many images it just did, in SLICES. before: batches that do not count, such
    as those that were ready.  turn: batches that come together, so that they are counted together: one of each process
    that decodes."""
    for done in itertools.islice(work, before + 1):
        assert done
    found = []
    for _ in range(SLICES):
        wait()
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / SLICES:
            images += sum(itertools.islice(work, turn))
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
    """What all rows share: the files, and what was measured already. seconds: of each measurement.

    One set of processes decodes at a time: a process that is forked beside the threads of another set inherits what it
    must not. Whoever changes the way of decoding last, and goes from fast networks to slow ones, waits least.
    """

    def __init__(self, paths: Sequence[str], batch: int, device: str, seconds: float):
        self.paths, self.batch, self.device, self.seconds = paths, batch, device, seconds
        self.files = functools.cache(self._files)
        self.classify = functools.cache(self._classify)
        self.decode = functools.cache(self._decode)
        self.gpu = functools.cache(self._gpu)
        self.open: tuple[str, int] | None = None
        self.reading: Iterator[Tensor] = iter(())
        self.ready = False  # whether batches may be waiting that were decoded while no clock ran

    def _classify(self, model: str, pruner: str) -> Classify:
        vit = load_deit(model, weights="random")  # speed does not ask what the weights know
        return Classify(RaggedViT(vit, PRUNED[pruner]()), self.batch, self.device)

    def _files(self, way: str) -> Decoded:
        vit = load_deit("deit_tiny", weights="random")  # all want the same pictures
        return Decoded(self.paths, way, Read(vit), picture_config(vit))

    def close(self) -> None:
        """End the processes that decode."""
        if self.open is not None:
            self.reading.close()
            self.open = None

    def _rate(self, way: str, processes: int, label: Callable[[Tensor], object] | None) -> Stats:
        if self.open != (way, processes):
            self.close()
            self.open, self.ready = (way, processes), True
            self.reading = batches(self.files(way), self.batch, processes, self.device)

        def work() -> Iterator[int]:
            for images in self.reading:
                if label is not None:
                    label(images)
                yield len(images)

        before, self.ready = processes * (3 if self.ready else 1), False
        return rate(work(), self.seconds, before, processes)

    def _decode(self, way: str, processes: int) -> Stats:
        return self._rate(way, processes, None)

    def _gpu(self, model: str, pruner: str) -> Stats:
        images = torch.stack([self.files("pillow")[i] for i in range(self.batch)]).to(self.device)
        classify = self.classify(model, pruner)
        work = (len(classify.run(images).classes) for _ in itertools.count())
        self.ready = True
        return rate(work, self.seconds, 3)

    def subject(self, model: str, pruner: str, way: str, processes: int) -> Subject:
        """The three rates. Skip where the machine has no such decoder."""
        if way in ("torchvision", "nvjpeg") and not hasattr(torchvision.io, "decode_jpeg"):
            raise Skip(f"torchvision {torchvision.__version__} decodes no JPEG any more")
        if way in ON_GPU:
            decoder(way, self.device)
        if processes > (os.cpu_count() or 1):
            raise Skip(f"this machine has {os.cpu_count()} cores")
        alone = self.gpu(model, pruner), self.decode(way, processes)
        both = self._rate(way, processes, self.classify(model, pruner).run)
        return Subject([], clocks=(), found=dict(zip(METRICS, (alone[1], alone[0], both))))


def cases(ceiling: Ceiling, models: Sequence[str], pruners: Sequence[str],
          ways: Sequence[tuple[str, int]]) -> list[Case]:  # fmt: skip
    """A case for each way of decoding, (name, processes), with every network, the fast ones first."""
    dtype, how = ("float16", "graph") if ceiling.device == "cuda" else ("float32", "eager")
    shared = {"suite": "ceiling", "batch": ceiling.batch, "tokens": "197", "dtype": dtype}
    networks = [(m, p) for m in DEITS for p in PRUNED if m in models and p in pruners]
    found = []
    for way, n in ways:
        candidates = []
        for model, pruner in networks:
            columns = {"model": model, "pruner": pruner, "backend": "unpruned" if pruner == "none" else "auto"}
            build = functools.partial(ceiling.subject, model, pruner, way, n)
            candidates.append(Candidate(columns, build, METRICS))
        found.append(Case(shared | {"mode": f"{how}, {way} x{n}"}, candidates))
    return found


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser("python -m ragged.predict.ceiling", description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, default=Path("results"), help="folder of the rows (default: results)")
    p.add_argument("--model", nargs="+", choices=DEITS, default=DEITS)
    p.add_argument("--way", nargs="+", choices=WAYS, default=WAYS, help="of decoding")
    p.add_argument("--pruner", nargs="+", choices=PRUNED, default=list(PRUNED))
    p.add_argument("--processes", nargs="+", type=commandline.positive, default=PROCESSES, help="that decode")
    p.add_argument("--batch", type=commandline.positive, default=256)
    p.add_argument("--seconds", type=float, default=2.5, help="of each measurement (default 2.5)")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="start no way of decoding after this time; run "
                   "again to go on")  # fmt: skip
    p.add_argument("--redo", action="store_true", help="measure again what is recorded already")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 4 where rows failed for reasons that can be put right."""
    asked = parser().parse_args(arguments)
    commandline.check_writable(asked.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recorder = Recorder(asked.out, redo=asked.redo, budget_s=asked.budget)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), contextlib.ExitStack() as last:
        ceiling = Ceiling(photographs(Path(folder), asked.batch), asked.batch, device, asked.seconds)
        last.callback(ceiling.close)
        most = max(asked.processes)
        ways = [(way, n) for way in asked.way for n in
                (asked.processes if way == "torchvision" else [min(4, most) if way in ON_GPU else most])]  # fmt: skip
        for case in cases(ceiling, asked.model, asked.pruner, ways):
            if recorder.late():
                print("ceiling: the time is up, run the same command again to go on", file=sys.stderr)
                break
            for row in recorder.run(case):
                value = f"{float(row['value']):.0f}" if row["value"] is not None else row["status"]
                print(row["model"], row["pruner"], row["mode"], row["metric"], value, flush=True)
    return 4 if recorder.failures else 0


if __name__ == "__main__":
    sys.exit(commandline.run(main, "python -m ragged.predict.ceiling"))
