"""Label files of images: `python -m ragged.predict photos --out labels.parquet`.

A row for each image: path, class, probability, and the tokens that stayed after each cut. What cannot be read is a row
with the reason. An interrupted run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..backends import BACKENDS
from ..bench import commandline
from ..bench.accuracy import weights_hash
from ..bench.runner import machine
from ..data.tables import only_one
from ..loading import load_deit
from ..model import RaggedViT
from ..pruners import PRUNERS, Pruner
from .classify import Classify
from .reading import Read, ahead, find
from .rows import Journal, check_place, journal_of
from .throughput import line, throughput

OPTIONS = ("keep", "tau", "samples", "at", "where", "predictors")  # of pruners


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser("python -m ragged.predict", description=__doc__.split("\n\n")[0])
    count = commandline.positive
    p.add_argument("images", nargs="+", metavar="IMAGES", help="files, and folders of them")
    p.add_argument("--out", type=Path, metavar="FILE", help="table to write, .parquet (needs pyarrow) or .csv")
    p.add_argument("--replace", action="store_true", help="replace a finished table, and forget an interrupted run of "
                   "something else")  # fmt: skip
    p.add_argument("--throughput", action="store_true", help="print images/s of decoding, transfer, GPU and end to end")
    p.add_argument("--seconds", type=float, default=10.0, help="of --throughput, for each of them (default 10)")
    p.add_argument("--batch", type=count, help="images at once (default 256, on a CPU 16)")
    p.add_argument("--workers", type=count, help="processes that read images (default: the cores, 16 at most)")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    network = p.add_argument_group("the network")
    network.add_argument("--model", default="deit_small", help="deit_tiny, deit_small (default), deit_base, or a plain "
                         "ViT of timm's")  # fmt: skip
    network.add_argument("--weights", default="imagenet", help="imagenet (timm's, default), digits, or a checkpoint")
    network.add_argument("--sha256", help="expected hash of the checkpoint file")
    network.add_argument("--img-size", type=count, default=224, help="pixels a side (default 224)")
    network.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line: adds a column")
    network.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="who attends (default auto)")
    pruning = p.add_argument_group("the pruner", "what is not given is as published")
    pruning.add_argument("--pruner", choices=PRUNERS, help="default: none, all tokens stay")
    pruning.add_argument("--keep", type=float, help="share of the tokens that stay at a cut")
    pruning.add_argument("--tau", type=float, help="threshold_l2: the threshold in place of a share")
    pruning.add_argument("--samples", type=count, help="ats: samples at a cut")
    pruning.add_argument("--at", type=int, nargs="+", help="blocks with a cut")
    pruning.add_argument("--where", help="place of the cut in its block: before, inside or after")
    pruning.add_argument("--predictors", type=Path, metavar="FILE", help="dynamicvit: trained predictors")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0; images that cannot be read are rows, other errors are raised."""
    asked = parser().parse_args(arguments)
    check(asked)
    paths = find(asked.images)
    names = None if asked.classes is None else asked.classes.read_text(encoding="utf-8").rstrip().splitlines()
    vit = load_deit(asked.model, weights=asked.weights, img_size=asked.img_size, sha256=asked.sha256)
    read = Read(vit)
    if names is not None and len(names) != vit.num_classes:
        raise ValueError(f"--classes: expected {vit.num_classes} names, one a line; {asked.classes} has {len(names)}")
    classify = Classify(RaggedViT(vit, pruner_of(asked), asked.backend), asked.batch, asked.device, names)
    if classify.device == "cuda" and classify.eager:
        print(f"not captured as a CUDA graph: {classify.eager}", file=sys.stderr)
    if asked.out is not None:
        label(asked, classify, read, paths)
    if asked.throughput:
        found = throughput(classify, read, paths, asked.workers, asked.seconds)
        print(line(found, classify.device, asked.workers))
    return 0


def check(asked: argparse.Namespace) -> None:
    """Fill in the device and the processes. ValueError, ImportError or OSError for what cannot be, before any work."""
    if asked.out is None and not asked.throughput:
        raise ValueError("--out: expected a file for the rows, or --throughput to measure alone")
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; leave --device out to work on the CPU")
    if not 0 < asked.seconds < float("inf"):
        raise ValueError(f"--seconds: expected a positive number, got {asked.seconds}")
    asked.workers = asked.workers or min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                                         else os.cpu_count() or 1)  # fmt: skip
    pruner_of(asked)
    if asked.out is not None:
        check_place(asked.out, asked.replace)
        commandline.check_writable(asked.out.resolve().parent)


def pruner_of(asked: argparse.Namespace) -> Pruner | None:
    """The pruner that is asked for. ValueError for options that it does not take."""
    given = {name: getattr(asked, name) for name in OPTIONS if getattr(asked, name) is not None}
    if asked.pruner is None:
        if given:
            raise ValueError(f"--{next(iter(given))}: is for --pruner NAME, which is not given")
        return None
    takes = [name for name in inspect.signature(PRUNERS[asked.pruner]).parameters if name in OPTIONS]
    for name in given:
        if name not in takes:
            raise ValueError(f"--{name}: {asked.pruner} takes {', '.join(f'--{one}' for one in takes)}")
    if asked.predictors is None and asked.pruner == "dynamicvit":
        raise ValueError("--pruner dynamicvit: needs trained predictors, --predictors FILE")
    return PRUNERS[asked.pruner](**given)


def label(asked: argparse.Namespace, classify: Classify, read: Read, paths: Sequence[str]) -> None:
    """Label `paths` and write the table."""
    job = {"weights": weights_hash(classify.model), "pruner": repr(classify.model.pruner),
           "settings of the pruner": [getattr(asked, name) and str(getattr(asked, name)) for name in OPTIONS],
           "image size": list(classify.size), "device": classify.device, "backend": asked.backend,
           "version of ragged": machine()["version"]}  # fmt: skip
    part = journal_of(asked.out)
    with only_one(asked.out.with_name(f".{asked.out.name}.lock"), 0):
        journal = Journal(asked.out, classify.columns, job, asked.replace)
        left = [path for path in paths if path not in journal.done]
        if len(left) < len(paths):
            print(f"going on after {len(paths) - len(left)} of {len(paths)} images, from {part}", file=sys.stderr)
        try:
            total = -(-len(left) // classify.batch)
            batches = ahead(left, read, classify.batch, asked.workers, classify.device == "cuda")
            for batch in commandline.bar(batches, total=total, desc="predict", unit="batch", mininterval=1.0):
                journal.add(classify.table(*batch))
        except BaseException:
            print(f"\nwhat is finished stays in {part}; the same command goes on from there", file=sys.stderr)
            raise
        finally:
            journal.close()
        bad = journal.finish(paths)
    print(f"{asked.out}: {len(paths)} images" + (f", {bad} of them could not be read" if bad else ""), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(commandline.run(main, "python -m ragged.predict"))
