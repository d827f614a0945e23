"""One tree for each kind of prompt and some temperatures, with its guesses in words: what can be drawn and read without
the model. `python -m ragged.speculation examples` makes the bundled ones."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data import data_dir, read_csv
from .drafts import ModelDraft
from .llama import Llama, chat, read_tokenizer
from .record import rows_of, speculate
from .trees import Tree

TEMPERATURES = (0.0, 0.5, 1.0, 1.5)
COLUMNS = ("domain prompt temperature answer root node parent depth rank word draft_prob target_prob reached "
           "accepted").split()  # fmt: skip
STEP = 2  # the tree of the third step: the answer has begun


def bundled() -> list[dict]:
    """The rows of the bundled trees, all cells text."""
    return read_csv(data_dir() / "speculation" / "examples.csv", COLUMNS)


def grow(target: Llama, draft: ModelDraft, prompts: Sequence[tuple[str, str]], temperature: float, new: int = 24,
         seed: int = 0) -> list[tuple]:  # fmt: skip
    """Rows with COLUMNS: for each of prompts, (domain, prompt), the answer of `target`, at most `new` tokens, and a
    tree that `draft` guessed on the way, at this temperature with draws from `seed`."""
    tokenizer, tree, kept = read_tokenizer(target.path), Tree((2, 2, 2)), {}
    ids = [tokenizer.encode(chat(text)).ids for _, text in prompts]

    def note(running, step, tokens, p, q, paths):
        if step <= STEP:  # a short answer ends before: its last tree is kept
            kept.update(zip(running, zip(tokens[:, 0].tolist(), rows_of(tree, step, tokens, p, q, paths))))

    generator = torch.Generator(target.device).manual_seed(seed)
    answers = speculate(target, draft, ids, tree, new, temperature, generator, note)
    found = []
    for b, (domain, text) in enumerate(prompts):
        root, rows = kept[b]
        for _, node, parent, depth, rank, token, q, p, *_, reached, accepted in rows:
            found.append((domain, text, temperature, tokenizer.decode(answers[b]), tokenizer.decode([root]), node,
                          parent, depth, rank, tokenizer.decode([token]), q, p, reached, accepted))  # fmt: skip
    return found


def write(path: Path, rows: Sequence[tuple]) -> None:
    """Write `rows` of `grow` into the CSV file `path`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
