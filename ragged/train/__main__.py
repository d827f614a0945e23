"""Train the collection's own small networks: `python -m ragged.train deit_tiny`, minutes on one large GPU.

Two stages. `dense`: a DeiT on digit scenes from nothing -> <out>/deit_tiny_digits.safetensors (float16), taught with
the digit's box too; with `--teach labels`, with nothing but labels -> <out>/deit_tiny_digits_labels.safetensors.
`dynamicvit`: DynamicViT's predictors for one of them, which itself stays as it is
-> <out>/deit_tiny_digits_dynamicvit.safetensors, with the published names `score_predictor.*`; no box is used.
Beside each stand its SHA-256, a table of the training (.csv), and how it was made (.json). A run that was interrupted
goes on from <out>/<name>.state.pt. <out> is ./trained; the networks that the package carries, and any other that is
finished, are replaced only on demand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import data
from ..bench import commandline, processes
from ..bench.suites.accuracy import HELD_OUT
from ..loading import DEITS, load_deit
from ..pruners import PRUNERS
from . import several
from .losses import CLASSES, Masked, Taught, dynamicvit_loss, label_loss, taught_loss, top1
from .run import Run, fill_usual, scorers

STAGES = {"dense": "", "dynamicvit": "_dynamicvit"}
TEACH = {"boxes": "_digits", "labels": "_digits_labels"}  # what a network is taught with, and what it is then called


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 after an error, which is said on stderr, or 130 after Ctrl-C."""
    asked, run = parser().parse_args(arguments), None
    try:
        fill_in(asked)
        out = data.data_dir() / "checkpoints" if asked.bundle else Path(asked.out or "trained")
        processes.take_gpu(asked.device)
        with processes.joined(asked.device) as group:
            path = out / f"{asked.model}{TEACH[asked.teach]}{STAGES[asked.stage]}.safetensors"
            run = Run(asked, path, vars(parser().parse_args([asked.model])) | USUAL["cuda"], group)
            torch.manual_seed(asked.seed)
            torch.set_float32_matmul_precision("high")
            (dense if asked.stage == "dense" else dynamicvit)(run)
    except KeyboardInterrupt:
        kept = run is not None and run.state.is_file()
        left = f"the state is in {run.state}; to go on: {run.command()}" if kept else "nothing is kept"
        print(f"\ntrain: stopped; {left}", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError) as error:
        print(f"train: {commandline.sentence(error)}", file=sys.stderr)
        return 1
    return 0


# How much to do where nothing else is asked for. A CPU is for trying things out: see `cpu_warning`.
USUAL = {
    "cuda": {"steps": 4000, "batch": 1024, "pool": 4096, "fresh": 16, "held_out": HELD_OUT, "compile": True},
    "cpu": {"steps": 100, "batch": 16, "pool": 256, "fresh": 4, "held_out": 200, "compile": False},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m ragged.train", description=__doc__.split("\n\n")[0])
    p.add_argument("model", choices=DEITS)
    p.add_argument("--stage", choices=STAGES, default="dense")
    p.add_argument("--teach", choices=TEACH, default="boxes", help="what the network learns from: the class and the "
                   "box of every digit (boxes, the default), or the class alone (labels)")  # fmt: skip
    count = commandline.positive

    def usual(name: str) -> str:
        return f"(default {USUAL['cuda'][name]}, on a CPU {USUAL['cpu'][name]})"

    p.add_argument("--steps", type=count, help=usual("steps"))
    p.add_argument("--minutes", type=float, default=10, help="take fewer steps if they would not fit into this time")
    p.add_argument("--batch", type=count, help=f"pictures a step {usual('batch')}")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--coarse", type=float, default=0.0, help="share of the steps, the first ones, that see pictures of "
                   "half the size: four times as fast, for the stage dense (default 0)")  # fmt: skip
    p.add_argument("--from", dest="start", metavar="FILE", help="begin with the weights of this network, taught the "
                   "same way, instead of random ones; its commands stand in the new one's json")  # fmt: skip
    p.add_argument("--keep", type=float, default=0.7, help="ratio that the predictors are trained for")
    p.add_argument("--pool", type=count, help=f"backgrounds in memory at a time {usual('pool')}")
    p.add_argument("--fresh", type=count, help=f"backgrounds replaced by new ones in every step {usual('fresh')}")
    p.add_argument("--held-out", type=count, help=f"test scenes in the final count {usual('held_out')}")
    where = p.add_mutually_exclusive_group()
    where.add_argument("--out", help="folder of the checkpoints (default: trained, in the current folder)")
    where.add_argument("--bundle", action="store_true", help="write into data/checkpoints, what the package carries")
    p.add_argument("--replace", action="store_true", help="replace a finished network of the same name")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                   help="torch.compile the network (default: on a GPU)")  # fmt: skip
    return p


def fill_in(asked: argparse.Namespace) -> None:
    """Fill in what was not asked for, by the device. ValueError for what cannot be."""
    fill_usual(asked, USUAL)
    if not 0 <= asked.coarse < 1 or (asked.coarse and asked.stage != "dense"):
        raise ValueError(f"--coarse: expected a share in [0, 1), and 0 for --stage dynamicvit, got {asked.coarse}")
    if asked.start and asked.stage != "dense":
        raise ValueError("--from: expected --stage dense; predictors begin with the network of the stage before")


def dense(run: Run) -> None:
    """Stage one: the network itself, from labels on the image and on every patch, or from those on the image alone."""
    asked = run.asked
    before = begun_with(asked)
    shape = {"num_classes": CLASSES, "dynamic_img_size": True}
    vit = load_deit(asked.model, weights=asked.start or "random", seed=asked.seed, **shape)
    module: nn.Module = vit.to(asked.device).float().train()
    if asked.teach == "boxes":
        module = Taught(vit).to(asked.device)
    network = run.network = several.Network(module, {"dynamic": False} if asked.compile else None)

    def loss_of(images: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        found = network(images)
        return label_loss(found, labels) if asked.teach == "labels" else taught_loss(found, labels, boxes)

    run.train(module, list(module.parameters()), loss_of)
    if not run.group.first:
        return
    vit.eval()
    found = {"top1": top1(vit, None, asked.held_out, asked.device), "held_out": asked.held_out}
    run.save(vit.state_dict(), found | before)
    old = run.path.with_name(f"{run.path.stem}{STAGES['dynamicvit']}.safetensors")
    if old.exists():
        print(f"{old} belongs to another network: train it again with --stage dynamicvit --replace")


def begun_with(asked: argparse.Namespace) -> dict:
    """How the network of `--from` was made, with the commands before its own; {} without one. ValueError where that is
    not known, or where it was taught in another way."""
    if not asked.start:
        return {}
    path = Path(asked.start)
    facts = path.with_suffix(".json")
    if not path.is_file() or not facts.is_file():
        raise ValueError(f"--from: expected a network of this command with its .json beside it, found no {facts}")
    data.verify_sha256(path)
    how = json.loads(facts.read_text(encoding="utf-8"))
    was = (how["settings"]["model"], how["settings"].get("teach", "boxes"))
    if was != (asked.model, asked.teach):
        raise ValueError(f"--from: expected {asked.model} taught with {asked.teach}, {path} is {was[0]} with {was[1]}")
    return {"before": how.get("before", []) + [{name: how[name] for name in ("command", "top1", "sha256")}]}


def dynamicvit(run: Run) -> None:
    """Stage two: predictors that decide which patches of the network of stage one may go."""
    asked = run.asked
    source = run.path.with_name(f"{asked.model}{TEACH[asked.teach]}.safetensors")
    if not source.is_file():
        raise ValueError(f"--stage dynamicvit: there is no {source} to train predictors for; run without --stage first")
    data.verify_sha256(source)
    vit = load_deit(asked.model, weights=source).to(asked.device).requires_grad_(False)
    module = Masked(vit).to(asked.device)
    network = run.network = several.Network(module, {} if asked.compile else None)

    @torch.no_grad()
    def teach(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = vit.forward_features(images)
        return vit.forward_head(tokens), tokens

    def loss_of(images: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        return dynamicvit_loss(network(images), teach(images), labels, asked.keep)

    run.train(module, list(module.score_predictor.parameters()), loss_of)
    if not run.group.first:
        return
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    run.save(scorers(module.score_predictor), {"keep": asked.keep, "network": source.name, "network_sha256": digest})
    pruner = PRUNERS["dynamicvit"](keep=asked.keep, predictors=run.path)
    print(f"top-1 at keep {asked.keep}: {top1(vit, pruner, asked.held_out, asked.device):.4f}")


if __name__ == "__main__":
    sys.exit(main())
