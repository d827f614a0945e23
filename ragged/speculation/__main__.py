"""Record how trees of guesses fare on a real language model, or make the distilled draft.

    python -m ragged.speculation record             what is missing of the bundled recordings
    python -m ragged.speculation examples           one tree of each kind, in words, for readers without the model
    python -m ragged.speculation distil --out FILE  self-written text, then training: minutes on one large GPU
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..bench import commandline
from ..bench.runner import machine
from ..data import data_dir, slug
from . import analysis
from . import distil as making
from .drafts import DRAFTS, load_draft, make_draft, save_draft
from .examples import TEMPERATURES, grow, write
from .llama import Llama, chat, check_chat, model_file, read_tokenizer
from .record import MODES, Recording, costs, read_prompt_file, record
from .trees import Tree

COST_BATCHES = (1, 16, 64)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser("python -m ragged.speculation", description=__doc__.split("\n\n")[0])
    commands, count = p.add_subparsers(dest="command", required=True), commandline.positive
    r = commands.add_parser("record", help="a row for every guess; goes on where an earlier recording stopped")
    r.add_argument("--draft", nargs="+", default=list(DRAFTS),
                   help=f"{', '.join(DRAFTS)}, or a .gguf or .npz file (default: those three)")  # fmt: skip
    r.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    r.add_argument("--prompts", type=Path, help="CSV file with the columns domain, prompt (default: the 200 bundled)")
    r.add_argument("--new", type=count, default=64, help="tokens behind each prompt (default 64)")
    r.add_argument("--tree", type=count, nargs="+", default=[2, 2, 2], help="children by depth (default 2 2 2)")
    r.add_argument("--batch", type=count, help="prompts at a time (default 100, on a CPU 4)")
    r.add_argument("--backend", default="auto", help="of varlen_attention, one that computes the log-sum-exp")
    r.add_argument("--costs", action="store_true", help="time passes of target and draft, too")
    r.add_argument("--redo", action="store_true", help="begin anew")
    r.add_argument("--out", type=Path, help="folder (default: the bundled recordings)")
    d = commands.add_parser("distil", help="make the distilled draft")
    d.add_argument("--depth", type=count, default=4, help="layers (default 4)")
    d.add_argument("--layers", type=int, nargs="+", help="begin with copies of these layers of the target")
    d.add_argument("--write-seconds", type=float, default=85, help="writing texts (default 85)")
    d.add_argument("--train-seconds", type=float, default=270, help="training on them (default 270)")
    d.add_argument("--texts", type=count, help="texts written at a time (default 4096, on a CPU 8)")
    d.add_argument("--tokens", type=count, default=making.TOKENS, help=f"of a text (default {making.TOKENS})")
    d.add_argument("--batch", type=count, help="texts a step (default 64, on a CPU 4)")
    d.add_argument("--lr", type=float, default=1e-3)
    d.add_argument("--out", type=Path, default=Path("trained/draft.npz"), help="default trained/draft.npz")
    e = commands.add_parser("examples", help="trees of the first prompt of each kind, by the distilled draft")
    e.add_argument("--out", type=Path, help="CSV file (default: the bundled one)")
    for command in (r, d, e):
        command.add_argument("--model", type=Path, help="GGUF file of the target (default: the installed one)")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser().parse_args(arguments)
    asked.words = [w for w, before in zip(arguments, ["", *arguments]) if "--out" not in (w, before)]
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; leave --device out to work on the CPU")
    asked.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        {"record": run_record, "distil": run_distil, "examples": run_examples}[asked.command](asked)
    return 0


def run_record(asked: argparse.Namespace) -> None:
    """Record every draft in every mode that is asked for."""
    out = asked.out or data_dir() / "results" / "speculation"
    commandline.check_writable(out)
    prompts, tree = read_prompt_file(asked.prompts), Tree(asked.tree)
    target = Llama(asked.model or model_file(), asked.device)
    batch = asked.batch or (100 if asked.device == "cuda" else 4)
    settings = {"model": target.path.name, "model_sha256": target.sha256(), "tree": asked.tree, "new": asked.new,
                "prompts": len(prompts), "seed": asked.seed, "batch": batch, "gpu": machine()["gpu"]}  # fmt: skip
    for name in asked.draft:
        draft = make_draft(name, target, asked.backend)
        label = slug(Path(name).stem)
        for mode in asked.mode:
            recording = Recording(out, label, mode, settings, asked.redo)
            record(target, draft, recording, prompts, tree, asked.new, batch, asked.seed, asked.backend)
            print(f"{recording.path}: {recording.facts}", flush=True)
        if asked.costs:
            check_chat(target)
            tokenizer = read_tokenizer(target.path)
            ids = [tokenizer.encode(chat(prompt)).ids for _, prompt in prompts]
            for n in (n for n in COST_BATCHES if n <= len(ids)):
                found = costs(target, draft, tree, ids[:: len(ids) // n][:n], asked.backend)
                recording.note({f"costs_{n}": found})
                print(f"{label}, {n} prompts: {found}", flush=True)


def run_examples(asked: argparse.Namespace) -> None:
    """Grow a tree for the first prompt of each kind at some temperatures, and write them down."""
    out = asked.out or data_dir() / "speculation" / "examples.csv"
    commandline.check_writable(out.parent)
    target = Llama(asked.model or model_file(), asked.device)
    check_chat(target)
    draft, first = make_draft("distilled", target), dict(reversed(read_prompt_file()))
    prompts = [(domain, first[domain]) for domain in analysis.DOMAINS]
    write(out, [row for t in TEMPERATURES for row in grow(target, draft, prompts, t, seed=asked.seed)])


def run_distil(asked: argparse.Namespace) -> None:
    """Write texts, train the draft on them, and save it with its log and how it was made."""
    commandline.check_writable(asked.out.parent)
    if asked.out.suffix != ".npz":
        raise ValueError(f"--out: expected a file that ends in .npz, got {asked.out}")
    target, cuda = Llama(asked.model or model_file(), asked.device), asked.device == "cuda"
    check_chat(target)
    layers = asked.layers
    if layers and (len(layers) != asked.depth or not set(layers) <= set(range(target.depth))):
        raise ValueError(f"--layers: expected {asked.depth} of 0 to {target.depth - 1}, got {layers}")
    torch.set_float32_matmul_precision("high")
    teacher = making.in_dtype(target, torch.bfloat16) if cuda else target
    start = time.monotonic()
    texts, skip = making.write_for(teacher, asked.write_seconds, asked.texts or (4096 if cuda else 8), asked.tokens,
                                   asked.seed)  # fmt: skip
    facts = {"command": " ".join(["python -m ragged.speculation", *asked.words]), "model": target.path.name,
             "target_sha256": target.sha256(), "depth": asked.depth, "layers": layers, "lr": asked.lr,
             "seed": asked.seed, "written_tokens": texts[:, skip:].numel(),
             "writing_seconds": round(time.monotonic() - start)}  # fmt: skip
    draft = making.new_draft(target, asked.depth, asked.seed, layers)
    log = asked.out.with_suffix(".csv")
    batch = asked.batch or (64 if cuda else 4)
    facts |= making.distil(teacher, draft, texts, skip, asked.train_seconds, batch, asked.lr, asked.seed, log)
    save_draft(asked.out, draft.w, asked.depth, facts | {"made_with": machine()})
    torch.set_float32_matmul_precision("highest")
    stored = making.overlap(target, load_draft(target, asked.out), making.held_out(texts), skip)
    save_draft(asked.out, draft.w, asked.depth, facts | {"made_with": machine(), "stored_overlap": round(stored, 4)})
    print(f"{asked.out}: {asked.out.with_suffix('.json').read_text(encoding='utf-8')}")


if __name__ == "__main__":
    sys.exit(commandline.run(main, "python -m ragged.speculation"))
