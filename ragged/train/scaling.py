"""How much faster several GPUs are: `torchrun --nproc-per-node=N -m ragged.train.scaling --out DIR`.

Evaluation and training from tensors that are already there, the same batch on every GPU (weak scaling). The rows say in
`gpu` how many there were; what was gained over the rows of one, of the same GPU in the same folder, is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..bench import commandline, processes
from ..bench.processes import Group
from ..bench.runner import machine
from ..bench.timing import Stats, stats
from ..data import RESULT_COLUMNS, read_csv, slug, write_results
from ..loading import DEITS, load_deit
from ..model import RaggedViT
from ..pruners import PRUNERS
from .losses import CLASSES, Taught, taught_loss
from .several import Network

ROUNDS = 5
PRUNED = {"none": lambda: None, "evit": lambda: PRUNERS["evit"](keep=0.7)}
KEY = ("model", "pruner", "mode", "batch", "dtype")  # what two rows must have in common to be compared


def rate(work: Callable[[], object], images: int, seconds: float, group: Group) -> Stats:
    """images/s of all processes together, each of which does `work` on so many `images` again and again. A round ends
    when the slowest process is done. seconds: of all rounds."""
    for _ in range(3):
        work()
    group.wait()
    start = time.perf_counter()
    work()
    group.wait()
    times = max(1, int(group.of_first(seconds / ROUNDS / (time.perf_counter() - start))))
    found = []
    for _ in range(ROUNDS):
        group.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        group.wait()
        found.append(times * images * group.size / (time.perf_counter() - start))
    return stats(found)


@torch.no_grad()
def evaluation(model: str, pruner: str, batch: int, device: str) -> Callable[[], object]:
    """A step of an evaluation: the pass, captured on a GPU, and the count of right answers."""
    cuda = device == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    network = RaggedViT(load_deit(model, weights="random"), PRUNED[pruner]()).to(device, dtype)
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    labels, right = torch.zeros(batch, dtype=torch.int64, device=device), torch.zeros((), device=device)
    run = network.capture(batch) if cuda else network

    @torch.no_grad()
    def step() -> None:
        right.add_((run(images).argmax(1) == labels).sum())

    return step


def training(model: str, batch: int, device: str, group: Group) -> Callable[[], object]:
    """A step of the training of `python -m ragged.train`, its pictures being there already."""
    vit = load_deit(model, weights="random", num_classes=CLASSES).to(device).train()
    module: nn.Module = Taught(vit).to(device)
    network = Network(module, {} if device == "cuda" else None)
    if group.size > 1:
        network.share(group)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=device == "cuda")
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    boxes = torch.tensor([[0.2, 0.2, 0.6, 0.6]], device=device).expand(batch, -1)

    @torch.enable_grad()
    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = taught_loss(network(images), labels, boxes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return step


def works_of(model: str, batch: int, device: str, group: Group) -> dict[tuple[str, str, str], Callable[[], object]]:
    """What is measured of a model, by its pruner, mode and dtype."""
    half = "float16" if device == "cuda" else "float32"
    how, compiled = ("graph", "compile") if device == "cuda" else ("eager", "eager")
    found = {(p, f"evaluation, {how}", half): evaluation(model, p, batch, device) for p in PRUNED}
    return found | {("none", f"training, {compiled}", "bfloat16"): training(model, batch, device, group)}


def row(model: str, pruner: str, mode: str, batch: int, dtype: str, value: Stats, group: Group) -> dict:
    """A row with the number of GPUs in its `gpu`."""
    here = machine()
    gpu = here["gpu"] if group.size == 1 else f"{here['gpu']} x{group.size}"
    found = dict.fromkeys(RESULT_COLUMNS, "") | here | {"gpu": gpu, "suite": "scaling", "model": model}
    found |= {"pruner": pruner, "backend": "auto" if pruner != "none" else "unpruned", "mode": mode, "batch": batch}
    found |= {"tokens": "197", "dtype": dtype, "metric": "images_per_s", "unit": "images/s", "status": "ok"}
    return found | {"value": value.median, "q20": value.q20, "q80": value.q80}


def gains(rows: Sequence[dict], one: Sequence[dict]) -> list[str]:
    """A line for each of `rows` that has its like among the rows of `one` GPU: how many times as fast."""
    before = {tuple(str(r[c]) for c in KEY): float(r["value"]) for r in one if r["status"] == "ok"}
    found = []
    for r in rows:
        key = tuple(str(r[c]) for c in KEY)
        if key in before:
            found.append(f"{' '.join(key)}: {float(r['value']) / before[key]:.3f} times one")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser("python -m ragged.train.scaling", description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, default=Path("results"), help="folder of the rows (default: results)")
    p.add_argument("--model", nargs="+", choices=DEITS, default=DEITS)
    p.add_argument("--batch", type=commandline.positive, default=256, help="on each GPU (default 256)")
    p.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default 5)")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    p.add_argument("--against", type=Path, metavar="FILE", help="rows of one GPU, to compare with "
                   "(default: those that are in --out)")  # fmt: skip
    return p


def of_one(asked: argparse.Namespace) -> list[dict]:
    """The rows of one GPU to compare with: those that were asked for, or those recorded before, if any."""
    path = asked.against or asked.out / slug(machine()["gpu"]) / "scaling.csv"
    return read_csv(path, RESULT_COLUMNS) if asked.against or path.exists() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0."""
    asked = parser().parse_args(arguments)
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes.take_gpu(device)
    one = of_one(asked)
    with processes.joined(device) as group:
        commandline.check_writable(asked.out)
        group.agree({"options": vars(asked), "GPU": machine()["gpu"], "version of PyTorch": torch.__version__})
        works = {model: works_of(model, asked.batch, device, group) for model in asked.model}
        for work in (work for found in works.values() for work in found.values()):
            work()  # everything is captured and compiled before the first clock runs
            work()
        for model, found in works.items():
            rows = [row(model, pruner, mode, asked.batch, dtype, rate(work, asked.batch, asked.seconds, group), group)
                    for (pruner, mode, dtype), work in found.items()]  # fmt: skip
            if group.first:
                write_results(rows, asked.out)
                for r in rows:
                    print(f"{r['gpu']}: {model} {r['pruner']} {r['mode']}: {r['value']:.0f} images/s", flush=True)
                for gain in gains(rows, one):
                    print(gain, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(commandline.run(main, "python -m ragged.train.scaling"))
