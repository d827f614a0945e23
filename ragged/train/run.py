"""The loop that every training here shares: steps, learning rate, progress bar, log, a state to go on from, and what is
left when it is done."""

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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bench import commandline, processes
from ..bench.runner import machine
from ..data import sidecar
from ..data.scene_pool import Pool
from . import memory, several
from .losses import schedule

STATE_EVERY = 1000  # steps


class Run:
    """One training. asked: the options.  path: of the checkpoint.  usual: the options that a command need not name,
    for `asked.model`.  group: the processes that share the work.  program: the command."""

    def __init__(self, asked: argparse.Namespace, path: Path, usual: dict, group: processes.Group = processes.ALONE,
                 program: str = "ragged.train"):  # fmt: skip
        """Looks at the place first: ValueError for a finished network that may stay, OSError where nothing can be
        written."""
        self.usual, self.program = usual, program
        self.group = group
        several.check(asked, group)
        self.asked, self.path, self.settings = asked, path, settings_of(asked)
        self.state, self.log, self.logged = path.with_suffix(".state.pt"), path.with_suffix(".csv"), False
        if path.exists() and not asked.replace:
            raise ValueError(f"{path} is there already; --replace replaces it, --out FOLDER writes elsewhere")
        commandline.check_writable(path.parent)

    def train(self, module: nn.Module, parameters: list[nn.Parameter], loss_of: Callable[..., Tensor],
              before: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
              groups: list[dict] | None = None) -> None:  # fmt: skip
        """loss_of(images, labels, boxes) -> loss, a mean over the images; changes `parameters`, all of them parts of
        `module`. before: is called with each step's number, when its learning rate is set.  groups: of parameters, as
        AdamW takes them, in place of the usual ones. The state that is kept at the end, or after Ctrl-C, holds what was
        trained until then. KeyboardInterrupt after Ctrl-C."""
        asked, start = self.asked, time.monotonic()
        options = {"lr": asked.lr, "weight_decay": 0.05, "fused": asked.device == "cuda"}
        optimizer = torch.optim.AdamW(groups or groups_of(parameters), **options)
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
                before(step, optimizer)
                images, labels, boxes = pool.step(asked.batch // n)
                if step < getattr(asked, "coarse", 0) * asked.steps:
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
                coarse = getattr(asked, "coarse", 0)
                slower = 1 + 4 * (1 - coarse) if coarse else 1  # than the first steps, in the mean
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
            other = ", ".join(changed(then, self.settings))
            raise ValueError(f"{self.state} is of another run ({other}); repeat that to go on, or remove it")
        if self.group.first:
            print(f"going on after step {step} of {self.state}")
        self.asked.steps, self.logged = steps, True
        return step

    def save(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """The checkpoint in float16, its hash, and how it was made; the state to go on from is done with."""
        write_half(tensors, self.path)
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        sidecar(self.path).write_text(f"{digest}  {self.path.name}\n", encoding="utf-8")
        asked = settings_of(self.asked)
        how = {"command": self.said(asked), "settings": asked, **facts, "sha256": digest}
        text = json.dumps(how | {"made_with": machine()}, indent=2)
        self.path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        self.state.unlink(missing_ok=True)
        print(f"{self.path}: {facts}")

    def command(self) -> str:
        """The command line that goes on with this run."""
        asked = self.asked
        place = f" --out {shlex.quote(asked.out)}" if asked.out else ""
        place = " --bundle" if getattr(asked, "bundle", False) else place
        minutes = "" if asked.minutes == 10 else f" --minutes {asked.minutes:g}"
        device = "" if asked.device == "cuda" else " --device cpu"
        return self.said(self.settings) + device + place + minutes + " --replace" * asked.replace

    def said(self, settings: dict) -> str:
        """The command line that asks for these settings."""
        return " ".join([f"python -m {self.program}", settings["model"], *changed(settings, self.usual)])


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


def fill_usual(asked: argparse.Namespace, usual: dict[str, dict]) -> None:
    """Fill in what every training program may leave out: the device, and what is usual there. usual: "cuda" or "cpu" ->
    option -> value. ValueError for what cannot be."""
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; --device cpu is for trying things out")
    asked.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in usual[asked.device].items():
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    if asked.pool % asked.fresh:
        raise ValueError(f"--pool: expected a multiple of --fresh, got {asked.pool} and {asked.fresh}")
    if not 0 < asked.keep <= 1:
        raise ValueError(f"--keep: expected a share in (0, 1], got {asked.keep}")
    for name in ("lr", "minutes"):
        if not 0 < getattr(asked, name) < math.inf:
            raise ValueError(f"--{name}: expected a positive number, got {getattr(asked, name)}")


def write_half(tensors: dict[str, Tensor], path: Path) -> None:
    """Tensors by name as float16 in a safetensors file."""
    from safetensors.torch import save_file

    save_file({name: x.detach().to("cpu", torch.float16).contiguous() for name, x in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes for the owner alone


def scorers(module: nn.Module) -> dict[str, Tensor]:
    """DynamicViT's scorers under their published names."""
    return {f"score_predictor.{name}": x for name, x in module.state_dict().items()}


def settings_of(asked: argparse.Namespace) -> dict:
    """What decides the outcome, and not where or how fast it is reached."""
    elsewhere = ("out", "bundle", "replace", "device", "compile", "minutes")
    unasked = {"start"} if asked.start is None else set()
    return {name: value for name, value in vars(asked).items() if name not in elsewhere and name not in unasked}


def changed(settings: dict, usual: dict) -> list[str]:
    """The options that ask for `settings` where they differ from `usual`; both are of one model."""
    options = {"start": "from"}
    return [f"--{options.get(k, k).replace('_', '-')} {v}" for k, v in settings.items() if v != usual.get(k)]


def groups_of(parameters: list[nn.Parameter]) -> list[dict]:
    """Parameters as AdamW takes them: matrices decay, vectors do not."""
    matrices, vectors = ([p for p in parameters if (p.dim() > 1) == wide] for wide in (True, False))
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
