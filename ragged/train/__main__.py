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
import csv
import hashlib
import json
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data
from ..bench import commandline, processes
from ..bench.runner import machine
from ..bench.suites.accuracy import HELD_OUT
from ..data import sidecar
from ..data.scene_pool import Pool
from ..loading import DEITS, load_deit
from ..pruners import PRUNERS
from . import memory, several
from .losses import CLASSES, Masked, Taught, dynamicvit_loss, label_loss, schedule, taught_loss, top1

STAGES = {"dense": "", "dynamicvit": "_dynamicvit"}
TEACH = {"boxes": "_digits", "labels": "_digits_labels"}  # what a network is taught with, and what it is then called
STATE_EVERY = 1000  # steps


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 after an error, which is said on stderr, or 130 after Ctrl-C."""
    asked, run = parser().parse_args(arguments), None
    try:
        fill_in(asked)
        out = data.data_dir() / "checkpoints" if asked.bundle else Path(asked.out or "trained")
        processes.take_gpu(asked.device)
        with processes.joined(asked.device) as group:
            run = Run(asked, out / f"{asked.model}{TEACH[asked.teach]}{STAGES[asked.stage]}.safetensors", group)
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
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; --device cpu is for trying things out")
    asked.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in USUAL[asked.device].items():
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    if asked.pool % asked.fresh:
        raise ValueError(f"--pool: expected a multiple of --fresh, got {asked.pool} and {asked.fresh}")
    if not 0 < asked.keep <= 1:
        raise ValueError(f"--keep: expected a share in (0, 1], got {asked.keep}")
    if not 0 <= asked.coarse < 1 or (asked.coarse and asked.stage != "dense"):
        raise ValueError(f"--coarse: expected a share in [0, 1), and 0 for --stage dynamicvit, got {asked.coarse}")
    if asked.start and asked.stage != "dense":
        raise ValueError("--from: expected --stage dense; predictors begin with the network of the stage before")
    if not 0 < asked.lr < math.inf:
        raise ValueError(f"--lr: expected a positive number, got {asked.lr}")
    if not 0 < asked.minutes < math.inf:
        raise ValueError(f"--minutes: expected a positive number, got {asked.minutes}")


class Run:
    """The loop that both stages share: steps, learning rate, progress bar, log, and a state to go on from."""

    def __init__(self, asked: argparse.Namespace, path: Path, group: processes.Group = processes.ALONE):
        """Looks at the place first: ValueError for a finished network that may stay, OSError where nothing can be
        written. group: the processes that share the work."""
        self.group = group
        several.check(asked, group)
        self.asked, self.path, self.settings = asked, path, settings_of(asked)
        self.state, self.log, self.logged = path.with_suffix(".state.pt"), path.with_suffix(".csv"), False
        if path.exists() and not asked.replace:
            raise ValueError(f"{path} is there already; --replace replaces it, --out FOLDER writes elsewhere")
        commandline.check_writable(path.parent)

    def train(self, module: nn.Module, parameters: list[nn.Parameter], loss_of: Callable[..., Tensor]) -> None:
        """loss_of(images, labels, boxes) -> loss; changes `parameters`, all of them parts of `module`. The state that
        is kept at the end, or after Ctrl-C, holds what was trained until then. KeyboardInterrupt after Ctrl-C."""
        asked, start = self.asked, time.monotonic()
        decay = [p for p in parameters if p.dim() > 1]
        groups = [{"params": decay}, {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=asked.lr, weight_decay=0.05, fused=asked.device == "cuda")
        done = self.resume(module, optimizer)
        self.group.agree({"step to go on from": done})
        if done >= asked.steps:
            return
        if asked.device == "cpu" and self.group.first:
            memory.check(asked, parameters, loss_of)
        rank, n = self.group.rank, self.group.size
        if n > 1:
            self.network.share(self.group)
        pool = Pool(asked.device, asked.pool // n, asked.fresh // n, asked.steps,
                    asked.seed + several.SEEDS_APART * rank, done, asked.compile)  # fmt: skip
        with Interrupt() as interrupt:  # from the next line on, Ctrl-C finishes a step and keeps the state
            if self.group.first:
                print(f"{asked.pool} backgrounds drawn in {time.monotonic() - start:.0f} s", flush=True)
            for step in self.steps(done, start):
                for group in optimizer.param_groups:
                    group["lr"] = asked.lr * schedule(step, asked.steps)
                images, labels, boxes = pool.step(asked.batch // n)
                if step < asked.coarse * asked.steps:
                    images = F.avg_pool2d(images, 2)
                with torch.autocast(asked.device, torch.bfloat16):
                    loss = loss_of(images, labels, boxes)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                self.losses.append(loss.detach())
                stop = several.interrupted(interrupt.asked, step + 1, self.group)
                if (step + 1) % STATE_EVERY == 0 or step + 1 == asked.steps or stop:
                    self.keep_state(module, optimizer, step + 1)
                if stop:
                    print(f"stopped after step {step + 1} of {asked.steps}", file=sys.stderr)
                    raise KeyboardInterrupt

    def steps(self, done: int, start: float) -> Iterator[int]:
        """The steps after the first `done`, under a bar and with the log; fewer than asked for where the minutes since
        `start` would not do."""
        asked, clock, self.losses = self.asked, time.monotonic(), []
        settled = 200 if asked.compile else 10  # steps until the speed is the one to reckon with
        every, group = range(done, asked.steps), self.group
        for step in commandline.bar(every, desc=self.path.stem, initial=done, total=asked.steps, mininterval=5.0,
                                    disable=not group.first):  # fmt: skip
            if step >= asked.steps:
                return
            yield step
            if (step + 1) % 100 and step + 1 != asked.steps and step + 1 - done != settled:
                continue
            mean = group.total(torch.stack(self.losses).mean()).item() / group.size  # here the loop waits for the GPU
            rate = len(self.losses) * asked.batch / (time.monotonic() - clock)
            if not math.isfinite(mean):
                raise ValueError(f"the loss is {mean} at step {step + 1}: try a smaller --lr")
            self.note(step + 1, mean, rate)
            if step + 1 - done == settled:
                left = asked.minutes * 60 - (time.monotonic() - start)
                slower = 1 + 4 * (1 - asked.coarse) if asked.coarse else 1  # than the first steps, in the mean
                fit = step + 1 + max(1, int(left * rate / asked.batch / slower))
                if fit < asked.steps:
                    print(f"{asked.steps} steps would take longer than {asked.minutes:g} minutes: {fit} will be done "
                          "(--minutes)", flush=True)  # fmt: skip
                asked.steps = group.of_first(min(asked.steps, fit))
            clock, self.losses = time.monotonic(), []

    def note(self, step: int, loss: float, rate: float) -> None:
        if not self.group.first:
            return
        new = not self.logged or not self.log.exists()
        self.logged = True
        with self.log.open("w" if new else "a", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            if new:
                table.writerow(("step", "loss", "images_per_s", "lr"))
            lr = self.asked.lr * schedule(step - 1, self.asked.steps)
            table.writerow((step, f"{loss:.5f}", f"{rate:.0f}", f"{lr:.3g}"))

    def keep_state(self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if not self.group.first:
            return
        draft = self.state.with_suffix(".draft")
        tensors = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({"step": step, "steps": self.asked.steps, "settings": self.settings} | tensors, draft)
        draft.replace(self.state)

    def resume(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        if not self.state.is_file():
            return 0
        try:
            state = torch.load(self.state, map_location=self.asked.device, weights_only=True)
            step, steps, then = int(state["step"]), int(state["steps"]), dict(state["settings"])
            if then == self.settings:
                module.load_state_dict(state["module"])
                optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch raises several kinds for files that are not its own
            why = type(error).__name__
            raise ValueError(f"{self.state} cannot be read ({why}); remove it to begin anew") from error
        if then != self.settings:
            other = ", ".join(_changed(then, self.settings))
            raise ValueError(f"{self.state} is of another run ({other}); repeat that to go on, or remove it")
        if self.group.first:
            print(f"going on after step {step} of {self.state}")
        self.asked.steps, self.logged = steps, True
        return step

    def save(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """The checkpoint in float16, its hash, and how it was made; the state to go on from is done with."""
        from safetensors.torch import save_file

        save_file({name: x.detach().to("cpu", torch.float16).contiguous() for name, x in tensors.items()}, self.path)
        self.path.chmod(0o644)  # safetensors writes for the owner alone
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        sidecar(self.path).write_text(f"{digest}  {self.path.name}\n", encoding="utf-8")
        asked = settings_of(self.asked)
        how = {"command": _command(asked), "settings": asked, **facts, "sha256": digest}
        text = json.dumps(how | {"made_with": machine()}, indent=2)
        self.path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        self.state.unlink(missing_ok=True)
        print(f"{self.path}: {facts}")

    def command(self) -> str:
        """The command line that goes on with this run."""
        asked = self.asked
        place = " --bundle" if asked.bundle else f" --out {shlex.quote(asked.out)}" if asked.out else ""
        minutes = "" if asked.minutes == 10 else f" --minutes {asked.minutes:g}"
        device = "" if asked.device == "cuda" else " --device cpu"
        return _command(self.settings) + device + place + minutes + " --replace" * asked.replace


class Interrupt:
    """Inside, the first Ctrl-C only sets `asked`, so that a step is finished before its state is kept; the second stops
    at once. In another thread than the main one, Python hands out no signals, and nothing is changed."""

    def __enter__(self) -> Interrupt:
        self.asked, self.before = False, None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_: object) -> None:
        self.asked = True
        again = "Ctrl-C again stops at once" if processes.asked() == 1 else "torchrun hands Ctrl-C to all processes"
        print(f"\nfinishing this step; {again}", file=sys.stderr, flush=True)
        # torchrun sends another one of its own, which must not stop a process before its state is kept
        signal.signal(signal.SIGINT, self.before if processes.asked() == 1 else signal.SIG_IGN)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def settings_of(asked: argparse.Namespace) -> dict:
    """What decides the outcome, and not where or how fast it is reached."""
    elsewhere = ("out", "bundle", "replace", "device", "compile", "minutes")
    unasked = {"start"} if asked.start is None else set()
    return {name: value for name, value in vars(asked).items() if name not in elsewhere and name not in unasked}


def _command(settings: dict) -> str:
    usual = vars(parser().parse_args([settings["model"]])) | USUAL["cuda"]
    return " ".join(["python -m ragged.train", settings["model"], *_changed(settings, usual)])


def _changed(settings: dict, usual: dict) -> list[str]:
    """The options that ask for `settings` where they differ from `usual`; both are of one model."""
    options = {"start": "from"}
    return [f"--{options.get(k, k).replace('_', '-')} {v}" for k, v in settings.items() if v != usual.get(k)]


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
    prefix = "score_predictor."
    tensors = {prefix + name: x for name, x in module.score_predictor.state_dict().items()}
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    run.save(tensors, {"keep": asked.keep, "network": source.name, "network_sha256": digest})
    pruner = PRUNERS["dynamicvit"](keep=asked.keep, predictors=run.path)
    print(f"top-1 at keep {asked.keep}: {top1(vit, pruner, asked.held_out, asked.device):.4f}")


if __name__ == "__main__":
    sys.exit(main())
