"""Train the collection's own small networks: `python -m ragged.train deit_tiny`, minutes on one large GPU.

Two stages. `dense`: a DeiT on digit scenes from nothing -> <out>/deit_tiny_digits.safetensors (float16).
`dynamicvit`: DynamicViT's predictors for that network, which itself stays as it is
-> <out>/deit_tiny_digits_dynamicvit.safetensors, with the published names `score_predictor.*`.
Beside each stand its SHA-256, a table of the training (.csv), and how it was made (.json). A run that was interrupted
goes on from <out>/<name>.state.pt.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import data
from ..bench import commandline
from ..bench.runner import machine
from ..bench.suites.accuracy import HELD_OUT, held_out
from ..data import sidecar
from ..data.scene_pool import Pool
from ..loading import DEITS, load_deit
from ..model import RaggedViT
from ..pruners import PRUNERS, Pruner
from .losses import CLASSES, Masked, Taught, dynamicvit_loss, taught_loss

STAGES = {"dense": "", "dynamicvit": "_dynamicvit"}
STATE_EVERY = 1000  # steps


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    asked = parser().parse_args(arguments)
    torch.manual_seed(asked.seed)
    torch.set_float32_matmul_precision("high")
    try:
        if asked.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device here; --device cpu is for trying things out")
        out = Path(asked.out or data.data_dir() / "checkpoints")
        out.mkdir(parents=True, exist_ok=True)
        run = Run(asked, out / f"{asked.model}_digits{STAGES[asked.stage]}.safetensors")
        (dense if asked.stage == "dense" else dynamicvit)(run)
    except (OSError, ValueError, ImportError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m ragged.train", description=__doc__.split("\n\n")[0])
    p.add_argument("model", choices=DEITS)
    p.add_argument("--stage", choices=STAGES, default="dense")
    count = commandline.positive
    p.add_argument("--steps", type=count, default=4000)
    p.add_argument("--minutes", type=float, default=10, help="take fewer steps if they would not fit into this time")
    p.add_argument("--batch", type=count, default=1024)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--keep", type=float, default=0.7, help="ratio that the predictors are trained for")
    p.add_argument("--pool", type=count, default=4096, help="backgrounds on the GPU at a time")
    p.add_argument("--fresh", type=count, default=16, help="backgrounds replaced by new ones in every step")
    p.add_argument("--held-out", type=count, default=HELD_OUT, help="test scenes in the final count")
    p.add_argument("--out", help="folder of the checkpoints (default: data/checkpoints)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="run the network as it is written")
    return p


class Run:
    """The loop that both stages share: steps, learning rate, progress bar, log, and a state to go on from."""

    def __init__(self, asked: argparse.Namespace, path: Path):
        if asked.pool % asked.fresh:
            raise ValueError(f"--pool: expected a multiple of --fresh, got {asked.pool} and {asked.fresh}")
        if not 0 < asked.keep <= 1:
            raise ValueError(f"--keep: expected a share in (0, 1], got {asked.keep}")
        if not 0 < asked.lr < math.inf:
            raise ValueError(f"--lr: expected a positive number, got {asked.lr}")
        self.asked, self.path, self.settings = asked, path, settings_of(asked)
        self.state, self.log = path.with_suffix(".state.pt"), path.with_suffix(".csv")

    def train(self, module: nn.Module, parameters: list[nn.Parameter], loss_of: Callable[..., Tensor]) -> None:
        """loss_of(images, labels, boxes) -> loss; changes `parameters`, all of them parts of `module`."""
        asked, start = self.asked, time.monotonic()
        decay = [p for p in parameters if p.dim() > 1]
        groups = [{"params": decay}, {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=asked.lr, weight_decay=0.05, fused=asked.device == "cuda")
        done = self.resume(module, optimizer)
        pool = Pool(asked.device, asked.pool, asked.fresh, asked.steps, asked.seed, done)
        print(f"{asked.pool} backgrounds drawn in {time.monotonic() - start:.0f} s", flush=True)
        clock, losses = time.monotonic(), []
        steps = range(done, asked.steps)
        for step in commandline.bar(steps, desc=self.path.stem, initial=done, total=asked.steps, mininterval=5.0):
            if step >= asked.steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = asked.lr * schedule(step, asked.steps)
            with torch.autocast(asked.device, torch.bfloat16):
                loss = loss_of(*pool.step(asked.batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.detach())
            if (step + 1) % 100 == 0 or step + 1 == asked.steps:
                mean = torch.stack(losses).mean().item()  # the only time the loop waits for the GPU
                rate = len(losses) * asked.batch / (time.monotonic() - clock)
                if not math.isfinite(mean):
                    raise ValueError(f"the loss is {mean} at step {step + 1}: try a smaller --lr")
                self.note(step + 1, mean, rate)
                if step + 1 - done == 200:  # by now everything is compiled
                    left = asked.minutes * 60 - (time.monotonic() - start)
                    asked.steps = min(asked.steps, step + 1 + int(left * rate / asked.batch))
                clock, losses = time.monotonic(), []
            if (step + 1) % STATE_EVERY == 0:
                self.keep_state(module, optimizer, step + 1)

    def note(self, step: int, loss: float, rate: float) -> None:
        new = step <= 100 or not self.log.exists()
        with self.log.open("w" if new else "a", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            if new:
                table.writerow(("step", "loss", "images_per_s", "lr"))
            lr = self.asked.lr * schedule(step - 1, self.asked.steps)
            table.writerow((step, f"{loss:.5f}", f"{rate:.0f}", f"{lr:.3g}"))

    def keep_state(self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        draft = self.state.with_suffix(".draft")
        tensors = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({"step": step, "settings": self.settings} | tensors, draft)
        draft.replace(self.state)

    def resume(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        if not self.state.is_file():
            return 0
        try:
            state = torch.load(self.state, map_location=self.asked.device, weights_only=True)
            step, then = int(state["step"]), dict(state["settings"])
            if then == self.settings:
                module.load_state_dict(state["module"])
                optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch raises several kinds for files that are not its own
            why = type(error).__name__
            raise ValueError(f"{self.state} cannot be read ({why}); remove it to begin anew") from error
        if then != self.settings:
            other = ", ".join(_changed(then, self.settings))
            raise ValueError(f"{self.state} is of another run ({other}); repeat that to go on, or remove it")
        print(f"going on after step {step} of {self.state}")
        return step

    def save(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """The checkpoint in float16, its hash, and how it was made; the state to go on from is done with."""
        from safetensors.torch import save_file

        save_file({name: x.detach().to("cpu", torch.float16).contiguous() for name, x in tensors.items()}, self.path)
        self.path.chmod(0o644)  # safetensors writes for the owner alone
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        sidecar(self.path).write_text(f"{digest}  {self.path.name}\n", encoding="utf-8")
        asked = settings_of(self.asked)
        how = {"command": "python -m ragged.train " + _command(asked), "settings": asked, **facts, "sha256": digest}
        text = json.dumps(how | {"made_with": machine()}, indent=2)
        self.path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        self.state.unlink(missing_ok=True)
        print(f"{self.path}: {facts}")


def settings_of(asked: argparse.Namespace) -> dict:
    """What decides the outcome, and not where or how fast it is reached."""
    machine_s = ("out", "device", "compile", "minutes")
    return {name: value for name, value in vars(asked).items() if name not in machine_s}


def _command(asked: dict) -> str:
    return " ".join([asked["model"], *_changed(asked, vars(parser().parse_args([asked["model"]])))])


def _changed(settings: dict, usual: dict) -> list[str]:
    """The options that ask for `settings` where they differ from `usual`; both are of one model."""
    return [f"--{k.replace('_', '-')} {v}" for k, v in settings.items() if v != usual.get(k)]


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: up in a line over the first 5 %, then down along a cosine."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def dense(run: Run) -> None:
    """Stage one: the network itself, labels on the image and on every patch."""
    asked = run.asked
    vit = load_deit(asked.model, weights="random", num_classes=CLASSES, seed=asked.seed).to(asked.device).train()
    module = Taught(vit).to(asked.device)
    network = torch.compile(module) if asked.compile else module
    run.train(module, list(module.parameters()), lambda x, labels, boxes: taught_loss(network(x), labels, boxes))
    vit.eval()
    run.save(vit.state_dict(), {"top1": top1(vit, None, asked.held_out, asked.device), "held_out": asked.held_out})


def dynamicvit(run: Run) -> None:
    """Stage two: predictors that decide which patches of the network of stage one may go."""
    asked = run.asked
    source = run.path.with_name(f"{asked.model}_digits.safetensors")
    data.verify_sha256(source)
    vit = load_deit(asked.model, weights=source).to(asked.device).requires_grad_(False)
    module = Masked(vit).to(asked.device)
    network = torch.compile(module) if asked.compile else module

    @torch.no_grad()
    def teach(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = vit.forward_features(images)
        return vit.forward_head(tokens), tokens

    def loss_of(images: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        return dynamicvit_loss(network(images), teach(images), labels, asked.keep)

    run.train(module, list(module.score_predictor.parameters()), loss_of)
    prefix = "score_predictor."
    tensors = {prefix + name: x for name, x in module.score_predictor.state_dict().items()}
    run.save(tensors, {"keep": asked.keep, "network": source.name})
    pruner = PRUNERS["dynamicvit"](keep=asked.keep, predictors=run.path)
    print(f"top-1 at keep {asked.keep}: {top1(vit, pruner, asked.held_out, asked.device):.4f}")


@torch.no_grad()
def top1(vit: nn.Module, pruner: Pruner | None, scenes: int, device: str) -> float:
    """Share of held-out digit scenes whose digit is named rightly."""
    model = RaggedViT(vit, pruner, "sdpa_padded").to(device)
    right, dtype = 0, vit.patch_embed.proj.weight.dtype
    for images, labels in held_out(scenes):
        x = data.normalise(images.to(device).float() / 255).to(dtype)
        right += (model(x).argmax(1).cpu() == labels).sum().item()
    return right / scenes


if __name__ == "__main__":
    sys.exit(main())
