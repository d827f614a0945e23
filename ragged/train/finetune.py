"""Fine-tune a network while it drops tokens: `python -m ragged.train.finetune deit_tiny --pruner evit --keep 0.5`.

Begins with a network of `python -m ragged.train` (a bundled one, or --from FILE) and leaves one that was trained under
the cut that it will run with: <out>/<name>_<pruner>_<keep>.safetensors, beside it a log (.csv) and how it was made
(.json), with what it reads rightly under that cut before and after, each with its 95 % interval. Steps, state and
processes are those of `python -m ragged.train`. The schedules are their authors' (recipes.py). `--record FOLDER` adds
the counts to the rows of a suite called finetune.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..bench import commandline, processes
from ..bench.accuracy import UNPRUNED, Setting
from ..bench.runner import machine
from ..bench.suites.accuracy import COUNT_BATCH, HELD_OUT, counted, held_out
from ..data import RESULT_COLUMNS, checkpoint_path, write_results
from ..data.intervals import wilson
from ..loading import BUNDLED, DEITS, load_deit
from . import several
from .recipes import RECIPES, Recipe, pruner_of
from .run import Run, fill_usual, scorers, write_half

NETWORKS = {"boxes": BUNDLED["digits"], "labels": BUNDLED["digits-labels"]}  # how it was taught -> what it is called
USUAL = {
    "cuda": {"steps": 600, "batch": 256, "pool": 1024, "fresh": 4, "held_out": HELD_OUT},
    "cpu": {"steps": 100, "batch": 16, "pool": 64, "fresh": 2, "held_out": 200},
}


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser("python -m ragged.train.finetune", description=__doc__.split("\n\n")[0])
    p.add_argument("model", choices=DEITS)
    count = commandline.positive
    p.add_argument("--pruner", choices=RECIPES, default="evit", help="and its recipe; dynamicvit_soft trains "
                   "DynamicViT's predictors and the network together, masked and dense, as published")  # fmt: skip
    p.add_argument("--keep", type=float, default=0.5, help="the share that stays; of ats: sample points per patch")
    p.add_argument("--teach", choices=NETWORKS, default="boxes", help="begin with the network taught with boxes "
                   "(default), or the one taught with labels alone")  # fmt: skip
    p.add_argument("--from", dest="start", metavar="FILE", help="begin with these weights instead")
    p.add_argument("--predictors", metavar="FILE", help="of dynamicvit: trained scorers in place of the bundled ones")
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--minutes", type=float, default=10, help="take fewer steps if they would not fit into this time")
    for name, text in (("steps", "steps"), ("batch", "pictures a step"), ("pool", "backgrounds in memory at a time"),
                       ("fresh", "backgrounds replaced in every step"), ("held_out", "test scenes in the counts")):
        usual = f"(default {USUAL['cuda'][name]}, on a CPU {USUAL['cpu'][name]})"
        p.add_argument(f"--{name.replace('_', '-')}", type=count, help=f"{text} {usual}")
    p.add_argument("--out", help="folder of the checkpoints (default: trained, in the current folder)")
    p.add_argument("--record", metavar="FOLDER", help="add the counts to the rows in this folder of results")
    p.add_argument("--replace", action="store_true", help="replace a finished network of the same name")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the pieces of the pass")
    return p


def fill_in(asked: argparse.Namespace) -> None:
    """Fill in what was not asked for, by the device. ValueError for what cannot be."""
    fill_usual(asked, USUAL)
    if asked.predictors and not asked.pruner.startswith("dynamicvit"):
        raise ValueError(f"--predictors: are for --pruner dynamicvit, got {asked.pruner}")
    if asked.start and asked.pruner.startswith("dynamicvit") and not asked.predictors:
        raise ValueError("--predictors: FILE is needed with --from and --pruner dynamicvit")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 130 after Ctrl-C."""
    asked, run = parser().parse_args(arguments), None
    fill_in(asked)
    processes.take_gpu(asked.device)
    with processes.joined(asked.device) as group:
        name = network_name(asked)
        path = Path(asked.out or "trained") / f"{name}_{asked.pruner}_{asked.keep:g}.safetensors"
        run = Run(asked, path, vars(parser().parse_args([asked.model])) | USUAL["cuda"], group, "ragged.train.finetune")
        torch.manual_seed(asked.seed)
        torch.set_float32_matmul_precision("high")
        try:
            with torch.enable_grad():
                finetune(run)
        except KeyboardInterrupt:
            kept = run.state.is_file()
            left = f"the state is in {run.state}; to go on: {run.command()}" if kept else "nothing is kept"
            print(f"\nfinetune: stopped; {left}", file=sys.stderr)
            return 130
    return 0


def network_name(asked: argparse.Namespace) -> str:
    """What the network is called that is begun with: of a file, its name without the ending."""
    return Path(asked.start).stem if asked.start else f"{asked.model}{NETWORKS[asked.teach]}"


def source(asked: argparse.Namespace) -> str | Path:
    """Where the weights come from that are begun with."""
    return Path(asked.start) if asked.start else checkpoint_path(network_name(asked))


def finetune(run: Run) -> None:
    """Count, train, count again, and keep what came of it."""
    asked, scenes = run.asked, None
    vit = load_deit(asked.model, weights=source(asked)).to(asked.device).float()
    recipe: Recipe = RECIPES[asked.pruner](asked, vit, predictors(asked))
    network = run.network = several.Network(recipe.module, None)
    before: dict = {}
    if run.group.first:
        scenes = held_out(asked.held_out)
        before = {name: count(vit, setting, scenes) for name, setting in (
            ("unpruned", UNPRUNED), ("before", setting_of(asked, predictors(asked))))}  # fmt: skip
        for name, found in before.items():
            print(f"{name}: {said(found)}", flush=True)
    recipe.module.train()
    run.train(recipe.module, recipe.parameters, lambda *batch: recipe.loss(network, *batch), recipe.before,
              recipe.groups)  # fmt: skip
    if not run.group.first:
        return
    recipe.module.eval()
    facts: dict = {"network": network_name(asked), "pruner": asked.pruner, "keep": asked.keep}
    trained = None
    if recipe.predictors is not None:
        trained = run.path.with_name(f"{run.path.stem}_predictors.safetensors")
        write_half(scorers(recipe.predictors), trained)
        facts["predictors"] = trained.name
    after = count(vit, setting_of(asked, trained or predictors(asked)), scenes)
    print(f"after: {said(after)}", flush=True)
    run.save(vit.state_dict(), facts | before | {"after": after})
    if asked.record:
        write_results(rows(asked, before | {"after": after}), asked.record)


def predictors(asked: argparse.Namespace) -> Path | None:
    """DynamicViT's trained scorers for the network that is begun with, or None for other pruners."""
    if not asked.pruner.startswith("dynamicvit"):
        return None
    if asked.predictors:
        return Path(asked.predictors)
    return checkpoint_path(f"{network_name(asked)}_dynamicvit")


# ---- what it was good for ----


def setting_of(asked: argparse.Namespace, trained: Path | None) -> Setting:
    """The pruner that is counted, and how."""
    name = asked.pruner.removesuffix("_soft")
    keep = None if name == "ats" else asked.keep
    return Setting(name, "published", keep, lambda: pruner_of(name, asked.keep, trained))


def count(vit: nn.Module, setting: Setting, scenes: list) -> dict:
    """Of the scenes, in half precision on a GPU: top1 with its 95 % interval, images, kept_tokens and the mean share of
    patches that stayed."""
    with torch.no_grad():
        twin = copy.deepcopy(vit).eval().requires_grad_(False)
        twin = twin.half() if next(vit.parameters()).is_cuda else twin
        share, found = counted(twin, setting, "auto", scenes)
    low, high = wilson(found["top1"], found["images"])
    return {"top1": found["top1"], "low": low, "high": high, "images": found["images"],
            "kept_tokens": found["kept_tokens"].median, "share": share}  # fmt: skip


def said(found: dict) -> str:
    """A count in words."""
    return (f"{found['top1']:.4f} ({found['low']:.4f} to {found['high']:.4f}) of {found['images']} scenes, "
            f"{found['kept_tokens']:.1f} tokens at the end")  # fmt: skip


def rows(asked: argparse.Namespace, found: dict[str, dict]) -> list[dict]:
    """Rows of the suite finetune. tokens: unpruned, before or after.  batch: of the count; that of the training, and
    its steps, are rows too. The interval of top1 stands in top1_low and top1_high."""
    dtype = "float16" if asked.device == "cuda" else "float32"
    shared = dict.fromkeys(RESULT_COLUMNS, "") | machine() | {
        "suite": "finetune", "model": network_name(asked), "backend": "auto", "mode": "eager", "dtype": dtype,
        "batch": COUNT_BATCH, "status": "ok"}  # fmt: skip
    made = []
    for when, values in found.items():
        pruner, keep = ("none", 1.0) if when == "unpruned" else (asked.pruner, asked.keep)
        where = {"tokens": when, "pruner": pruner, "keep": keep}
        numbers = {"top1": values["top1"], "top1_low": values["low"], "top1_high": values["high"],
                   "images": values["images"], "kept_tokens": values["kept_tokens"]}  # fmt: skip
        units = {"images": "images", "kept_tokens": "tokens"}
        made += [shared | where | {"metric": m, "value": v, "unit": units.get(m, "1")} for m, v in numbers.items()]
        if when == "after":
            size = (("train_steps", asked.steps, "steps"), ("train_batch", asked.batch, "images"))
            made += [shared | where | {"metric": m, "value": v, "unit": u} for m, v, u in size]
    return made


if __name__ == "__main__":
    sys.exit(commandline.run(main, "python -m ragged.train.finetune"))
