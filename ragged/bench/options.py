"""The options of `python -m ragged.bench`: what they are, and which of them mean something together.

Everything that can be known before the first case is looked at here: options without effect, missing packages, places
that cannot be written.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from ..loading import WEIGHTS, full_name
from . import commandline, processes
from .accuracy import Folder
from .networks import weights_of
from .runner import Options

# What a suite stands on beside PyTorch: (the module, the name under which pip installs it).
_VIT, _TABLES, _DIGITS = ("timm", "timm"), ("pandas", "pandas"), ("sklearn", "scikit-learn")
NEEDS = {
    "model": (_VIT,), "sparsity": (_VIT,), "resolution": (_VIT,), "mixed": (_VIT,), "memory": (_VIT,),
    "equivalence": (_VIT,), "accuracy": (_VIT, _DIGITS), "seeds": (_VIT, _DIGITS),
    "fidelity": (_VIT, ("torchvision", "torchvision")), "training": (_VIT,), "report": (_TABLES,),
}  # fmt: skip
FOR_IMAGENET = ("weights", "sha256", "predictors", "predictors_sha256", "class_map", "workers")
FOR_REPORT = ("markdown", "readme")
# and not for the report alone
FOR_MEASURING = ("model", "batch", "pruner", "backend", "redo", "budget", "repeats", "counts")
NOT_FOR_IMAGENET = ("quick", "repeats", "budget", "counts")  # one pass, counted and not timed, and it goes on by itself
# suites that take --model
USE_MODEL = ("model", "sparsity", "resolution", "mixed", "memory", "equivalence", "accuracy", "fidelity", "training")
USE_BATCH = (*USE_MODEL[:5], "attention", "backward", "pack", "accuracy", "fidelity", "training", "speculation")
USE_PRUNER = ("model", "sparsity")  # suites that take --pruner
USE_CHOICE = (*USE_PRUNER, "attention", "backward", "pack", "training")  # suites that take --backend

EXIT_CODES = """exit codes: 0 everything was measured, or has a row that says why it cannot be here (also when --budget
ended the run); 1 the reader of the output went away; 2 nothing was measured: a wrong option, a missing package, a file
that cannot be read or written; 3 a provider broke the GPU's context, run again for the rest; 4 some cases failed for
reasons that can be put right, named at the end and in their rows, which the next run tries again; 130 Ctrl-C."""


def parser(suites: Sequence[str], description: str) -> argparse.ArgumentParser:
    """The parser for these `suites` and the report. Options that were not given are None or empty."""
    p = argparse.ArgumentParser("python -m ragged.bench", description=description, epilog=EXIT_CODES)
    p.add_argument("suites", nargs="+", choices=[*suites, "report"], metavar="SUITE",
                   help=", ".join([*suites, "report"]))  # fmt: skip
    p.add_argument("--quick", action="store_true", help="a few small cases, to see that everything runs")
    p.add_argument("--out", help="folder for the rows, <out>/<gpu>/<suite>.csv (default: the "
                   "recorded results; with --quick: quick_results)")  # fmt: skip
    p.add_argument("--model", nargs="+", default=(), help="only these models, such as deit_small")
    p.add_argument("--batch", nargs="+", type=commandline.positive, default=(), help="only these batch sizes")
    p.add_argument("--pruner", nargs="+", default=(), help="with `model` and `sparsity`: only these pruners, and what "
                   "prunes nothing")  # fmt: skip
    p.add_argument("--backend", nargs="+", default=(), help="only these backends, and what prunes nothing, with "
                   "the suites that have a choice: " + ", ".join(USE_CHOICE))  # fmt: skip
    p.add_argument("--redo", action="store_true", help="measure again what this version has recorded already; with "
                   "--imagenet, forget an interrupted count and begin anew")  # fmt: skip
    p.add_argument("--budget", type=float, metavar="SECONDS",
                   help="start nothing new after this time; run again to go on")  # fmt: skip
    p.add_argument("--repeats", type=commandline.positive, help="rounds of measuring (default 5, with --quick 3)")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    p.add_argument("--counts", action="store_true", help="with `accuracy`: only what needs no clock, for a GPU that is "
                   "not idle")  # fmt: skip
    p.add_argument("--networks", metavar="DIR", nargs="+", default=(), help="with `seeds`: folders of trained "
                   "networks, as python -m ragged.train --out DIR leaves them")  # fmt: skip
    p.add_argument("--images", metavar="DIR", help="with `fidelity`: a folder of pictures (default: the bundled "
                   "photographs and scikit-image's)")  # fmt: skip
    images = p.add_argument_group("accuracy on ImageNet", "with the suite `accuracy`; --model names one timm model")
    images.add_argument("--imagenet", metavar="DIR", help="validation folder: one folder of images per class")
    images.add_argument("--weights", help="imagenet (timm's, the default), or a checkpoint file, EViT's too; with "
                        "`fidelity` as well")  # fmt: skip
    images.add_argument("--sha256", help="expected hash of the checkpoint file")
    images.add_argument("--predictors", metavar="FILE", help="DynamicViT's checkpoint or its score_predictor.* alone")
    images.add_argument("--predictors-sha256", metavar="SHA256", help="expected hash of that file")
    images.add_argument("--class-map", metavar="FILE", help="names of the class folders, one a line, in the order of "
                        "the model's classes (default: names that are numbers by number, others by text)")  # fmt: skip
    images.add_argument("--workers", type=commandline.positive, help="processes that read images (default 8)")
    p.add_argument("--markdown", metavar="FILE", help="with `report`: write it there too")
    p.add_argument("--readme", metavar="FILE", help="with `report`: renew the table of recorded rows in this README")
    return p


def check(asked: argparse.Namespace) -> None:
    """What the parser cannot know; fills in the device. ValueError, ImportError or OSError before anything is
    measured, not after."""
    effects(asked)
    spread(asked)
    packages(asked)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; leave --device out to measure on the CPU")
    asked.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if asked.budget is not None and not math.isfinite(asked.budget):
        raise ValueError(f"--budget: expected seconds, got {asked.budget}")
    for name in asked.model:
        full_name(weights_of(name)[0], 224)
    if asked.readme and not Path(asked.readme).is_file():
        raise ValueError(f"--readme: there is no file {asked.readme}; its table goes between two marks in it")
    if asked.markdown and Path(asked.markdown).is_dir():
        raise ValueError(f"--markdown: expected a file, {asked.markdown} is a folder")
    for file in filter(None, (asked.markdown, asked.readme)):
        commandline.check_writable(Path(file).resolve().parent)


def effects(asked: argparse.Namespace) -> None:
    """ValueError for an option that the others leave without effect: it was meant to do something."""

    def refuse(names: Sequence[str], why: str) -> None:
        for name in names:
            if getattr(asked, name) not in (None, False, ()):
                raise ValueError(f"--{name.replace('_', '-')}: {why}")

    suites = set(asked.suites)
    if suites == {"report"}:
        refuse((*FOR_MEASURING, "device"), "has no effect on the report; name a suite to measure, or leave it out")
    if "report" not in suites:
        refuse(FOR_REPORT, "is for the report; add the word report after the suites")
    if "accuracy" not in suites:
        refuse(("imagenet",), "is for the suite accuracy, which is not asked for")
    if not suites & {*USE_MODEL}:
        refuse(("model",), f"has no effect here; the suites that take it are {', '.join(USE_MODEL)}")
    if not suites & {*USE_BATCH}:
        refuse(("batch",), f"has no effect here; the suites that take it are {', '.join(USE_BATCH)}")
    for name, users in (("pruner", USE_PRUNER), ("backend", USE_CHOICE)):
        if not suites & {*users}:
            refuse((name,), f"has no effect here; the suites that take it are {', '.join(users)}")
    for name, suite in (("counts", "accuracy"), ("networks", "seeds"), ("images", "fidelity")):
        if suite not in suites:
            refuse((name,), f"is for the suite {suite}, which is not asked for")
    if "seeds" in suites and not asked.networks:
        raise ValueError("--networks: the suite seeds counts networks that were trained here; name their folders")
    if asked.imagenet is None:
        also = ("weights",) if "fidelity" in suites else ()
        refuse([name for name in FOR_IMAGENET if name not in also], "is for --imagenet DIR, which is not given")
        if asked.weights is not None and len(asked.model) != 1:
            raise ValueError("--weights: name the one network they are of with --model")
        return
    if suites <= {"accuracy", "report"}:
        refuse(NOT_FOR_IMAGENET, "has no effect with --imagenet, which counts every image once")
    for name in ("model", "batch"):
        if len(getattr(asked, name)) > 1:
            raise ValueError(f"--{name}: expected one with --imagenet, got {' '.join(map(str, getattr(asked, name)))}")
    if asked.weights in (None, *WEIGHTS):
        refuse(("sha256",), "is the hash of a checkpoint file; give the file with --weights FILE")
    if asked.predictors is None:
        refuse(("predictors_sha256",), "is the hash of --predictors FILE, which is not given")


def spread(asked: argparse.Namespace) -> None:
    """ValueError for what several processes, started by torchrun, would only do several times."""
    if processes.asked() > 1 and (asked.suites != ["accuracy"] or asked.imagenet is None):
        raise ValueError(f"{' '.join(asked.suites)}: torchrun started {processes.asked()} processes, and only "
                         "accuracy --imagenet DIR is shared among them; start the rest without it")  # fmt: skip


def packages(asked: argparse.Namespace) -> None:
    """ImportError naming every package that a suite asked for needs and that is not installed."""
    missing = {}
    for suite in asked.suites:
        needs = NEEDS.get(suite, ())
        if suite == "accuracy" and asked.imagenet is not None:
            needs = (_VIT, ("torchvision", "torchvision"))
        for module, name in needs:
            if find_spec(module) is None:
                missing.setdefault(name, []).append(suite)
    if missing:
        each = [f"{' and '.join(dict.fromkeys(suites))} needs the package {name!r}" for name, suites in missing.items()]
        raise ImportError(f"{'; '.join(each)}, not installed here: pip install {' '.join(missing)}")


def wanted(asked: argparse.Namespace) -> Options:
    """What the suites are told."""
    return Options(
        asked.device, asked.quick, tuple(asked.model), tuple(asked.batch), asked.counts,
        tuple(map(Path, asked.networks)), Path(asked.images) if asked.images else None, asked.weights,
        tuple(asked.pruner), tuple(asked.backend),
    )  # fmt: skip


def folder(asked: argparse.Namespace) -> Folder:
    """The images, the model and the predictors of `--imagenet`."""
    return Folder(
        Path(asked.imagenet), asked.model[0] if asked.model else "deit_small", asked.weights or "imagenet",
        asked.sha256, Path(asked.predictors) if asked.predictors else None, asked.predictors_sha256,
        asked.batch[0] if asked.batch else 128, asked.workers or 8, asked.device,
        Path(asked.class_map) if asked.class_map else None,
    )  # fmt: skip
