"""Speculating on a batch of prompts, and a row for every guess: what draft and target thought of it, what became of it.

One file for each draft and way to decode, `<draft>_<greedy or sampled>.csv.gz`, and `record.json` with how they were
made. A file grows by whole batches of prompts, each a gzip member of its own, so that a recording goes on where it
stopped.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..bench.commandline import bar
from ..bench.runner import machine
from ..bench.timing import gpu_us_profiled, wall_us
from ..checks import check_int
from ..data import data_dir, read_csv
from .drafts import LookupDraft, ModelDraft
from .llama import Llama, chat, check_chat, read_tokenizer
from .trees import Cache, Tree, accept_greedy, accept_sampled, only, read, read_prompts

COLUMNS = ("domain prompt step node parent depth rank token draft_prob target_prob draft_entropy target_entropy "
           "overlap best reached accepted").split()  # fmt: skip
MODES = {"greedy": 0.0, "sampled": 1.0}  # temperatures
Note = Callable[[list[int], int, Tensor, Tensor, Tensor, list[list[int]]], None]


def speculate(target: Llama, draft: ModelDraft | LookupDraft, prompts: Sequence[Sequence[int]], tree: Tree, new: int,
              temperature: float = 0.0, generator: torch.Generator | None = None, note: Note | None = None,
              backend: str = "auto") -> list[list[int]]:  # fmt: skip
    """At most `new` tokens of `target` behind each of prompts (lists of tokens), exactly what it would have said alone.

    draft: guesses a `tree` in every step.  temperature: 0 is greedy; else tokens are drawn by the generator, on the
    target's device.  note: called after every step with (running prompts, step, tokens, logits of target and draft,
    paths).  backend: of `varlen_attention`. Raises ValueError for an empty prompt, and where a text would outgrow the
    context.
    """
    check_prompts(prompts)
    check_int("new", new, 1)
    texts, ends = [list(prompt) for prompt in prompts], [len(prompt) + new for prompt in prompts]
    capacity, step, running = max(ends) + 2 * tree.nodes, 0, list(range(len(prompts)))
    cache = Cache(target, len(prompts), capacity)
    read_prompts(target, cache, [prompt[:-1] for prompt in prompts], backend)
    draft.begin(prompts, capacity)
    while running:
        tokens, q = draft.guess(tree, texts, running, temperature, generator)
        sees = only(running, len(prompts), tree.sees)
        p = target.logits(read(target, cache, tokens.flatten(), sees, backend)).unflatten(0, tokens.shape)
        paths: list[list[int]] = [[] for _ in prompts]
        found = _accept(tree, tokens.tolist(), p, q, temperature, generator)
        for b, words, (path, last) in zip(running, tokens.tolist(), found):
            paths[b] = path
            texts[b] += [words[node] for node in path[1:]] + [last]
        if note is not None:
            note(running, step, tokens, p, q, [path for path, _ in found])
        for cached in (cache, draft):
            cached.keep(paths)
        running = [b for b in running if not _done(texts[b], len(prompts[b]), ends[b], target.end)]
        step += 1
    answers = [text[len(prompt) : end] for text, prompt, end in zip(texts, prompts, ends)]
    return [answer[: answer.index(target.end) + 1] if target.end in answer else answer for answer in answers]


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """ValueError unless every one of `prompts` has two tokens or more."""
    if not prompts or min(map(len, prompts)) < 2:
        raise ValueError(f"prompts: expected two tokens or more in each, got lengths {[len(p) for p in prompts]}")


def _done(text: list[int], start: int, end: int, stop: int) -> bool:
    return len(text) >= end or stop in text[start:]


def _accept(tree, tokens, p, q, temperature, generator) -> list[tuple[list[int], int]]:
    if temperature == 0:
        return [accept_greedy(tree, words, best) for words, best in zip(tokens, p.argmax(-1).tolist())]
    p, q = ((x / temperature).softmax(-1) for x in (p, q))
    return [accept_sampled(tree, words, p[i], q[i], generator) for i, words in enumerate(tokens)]


def decode(target: Llama, prompts: Sequence[Sequence[int]], new: int, backend: str = "auto") -> list[list[int]]:
    """Plain greedy decoding, a token a pass: at most `new` tokens of `target` behind each of prompts (lists of tokens).
    backend: of `varlen_attention`."""
    check_prompts(prompts)
    cache, one = Cache(target, len(prompts), max(map(len, prompts)) + new), torch.ones(1, 1, dtype=torch.bool)
    read_prompts(target, cache, [prompt[:-1] for prompt in prompts], backend)
    texts, running = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    while running:
        ids = torch.tensor([texts[b][-1] for b in running], device=target.device)
        sees = only(running, len(prompts), one)
        best = target.logits(read(target, cache, ids, sees, backend)).argmax(-1).tolist()
        cache.keep([[0] if len(mask) else [] for mask in sees])
        for b, token in zip(running, best):
            texts[b].append(token)
        running = [b for b in running if not _done(texts[b], len(prompts[b]), len(prompts[b]) + new, target.end)]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts)]


# ---- rows ----


def entropy(logits: Tensor) -> Tensor:
    """Of softmax(logits), logits (..., vocabulary), in nats."""
    p = logits.softmax(-1)
    return logits.logsumexp(-1) - torch.nan_to_num(p * logits).sum(-1)  # 0 * -inf is nothing


def rows_of(tree: Tree, step: int, tokens: Tensor, p: Tensor, q: Tensor, paths: list[list[int]]) -> list[list[tuple]]:
    """For each running prompt a row for every guess of its `tree` in this step, with the columns from `step` on.

    tokens: (running, nodes).  p, q: logits of target and draft, (running, nodes or inner nodes, vocabulary), recorded
    as probabilities at temperature 1.  paths: accepted nodes."""
    parents, inner = torch.tensor(tree.parent[1:], device=p.device), tree.inner
    best = p.argmax(-1)[:, parents] == tokens[:, 1:]
    h = [entropy(x[:, :inner])[:, parents] for x in (q, p)]
    p, q = p[:, :inner].softmax(-1), q.softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)[:, parents]
    chance = [x[:, parents].gather(2, tokens[:, 1:, None])[..., 0] for x in (q, p)]
    numbers = torch.stack([*chance, *h, overlap], -1).tolist()  # (running, guesses, 5)
    found = []
    for words, facts, right, path in zip(tokens.tolist(), numbers, best.tolist(), map(set, paths)):
        found.append([
            (step, node, tree.parent[node], tree.depth[node], tree.rank[node], words[node],
             *(f"{x:.4g}" for x in facts[node - 1]), int(right[node - 1]), int(tree.parent[node] in path),
             int(node in path)) for node in range(1, tree.nodes)
        ])  # fmt: skip
    return found


def read_prompt_file(path: Path | None = None) -> list[tuple[str, str]]:
    """(domain, prompt) of the file `path`, by default the 200 bundled ones."""
    return [(r["domain"], r["prompt"]) for r in read_csv(path or data_dir() / "speculation" / "prompts.csv",
                                                       ("domain", "prompt"))]  # fmt: skip


class Recording:
    """One file of rows. out: folder.  name: of the draft.  mode: a key of MODES.  settings: what decides the rows; a
    file that others made is not gone on with.  Raises ValueError for such a file, or a damaged one."""

    def __init__(self, out: Path, name: str, mode: str, settings: dict, redo: bool = False):
        self.key, self.mode, self.settings = f"{name}_{mode}", mode, settings | {"temperature": MODES[mode]}
        self.path, self.log = out / f"{self.key}.csv.gz", out / "record.json"
        self.done: set[int] = set()
        self.facts = {} if redo else self._log().get(self.key, {})
        if redo or not self.path.exists():
            self.facts = {}
            return
        before = self.facts.get("settings")
        if before != self.settings:
            raise ValueError(f"{self.path} was recorded with other settings ({before}); --redo begins anew")
        try:
            with gzip.open(self.path, "rt", newline="", encoding="utf-8") as file:
                self.done = {int(row["prompt"]) for row in csv.DictReader(file)}
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); --redo begins anew") from None

    def _log(self) -> dict:
        return json.loads(self.log.read_text(encoding="utf-8")) if self.log.exists() else {}

    def add(self, rows: list[tuple], facts: dict) -> None:
        """Append the rows of a batch of prompts, and add `facts`, numbers, to what is known; a reader sees all of a
        batch or nothing."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        if not self.done:
            table.writerow(COLUMNS)
        table.writerows(rows)
        before = self.path.read_bytes() if self.done else b""
        _replace(self.path, before + gzip.compress(text.getvalue().encode(), 9, mtime=0))
        self.done |= {row[1] for row in rows}
        for name, value in facts.items():
            self.facts[name] = self.facts.get(name, 0) + value
        self.note({"settings": self.settings, "prompts": len(self.done), "machine": machine()})

    def note(self, facts: dict) -> None:
        """Put `facts` into record.json."""
        self.facts |= facts
        _replace(self.log, (json.dumps(self._log() | {self.key: self.facts}, indent=1) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    os.replace(draft, path)


def record(target: Llama, draft: ModelDraft | LookupDraft, recording: Recording, prompts: list[tuple[str, str]],
           tree: Tree, new: int, batch: int, seed: int, backend: str = "auto") -> None:  # fmt: skip
    """Speculate on `prompts`, (domain, prompt), in batches, and write what is missing of `recording`.

    target, draft, tree, new, backend: as of `speculate`.  seed: with a batch's first prompt it decides the draws.
    A greedy recording holds every answer against plain decoding, and counts those that are equal.
    """
    check_chat(target)
    tokenizer, temperature = read_tokenizer(target.path), MODES[recording.mode]
    ids = [tokenizer.encode(chat(prompt)).ids for _, prompt in prompts]
    missing = [i for i in range(len(prompts)) if i not in recording.done]
    batches = [missing[i : i + batch] for i in range(0, len(missing), batch)]
    for numbers in bar(batches, desc=recording.key, unit="batch"):
        rows: list[tuple] = []

        def note(running, step, tokens, p, q, paths, rows=rows, numbers=numbers):
            for b, own in zip(running, rows_of(tree, step, tokens, p, q, paths)):
                rows += [(prompts[numbers[b]][0], numbers[b], *row) for row in own]

        generator = torch.Generator(target.device).manual_seed(seed * 100_003 + numbers[0])
        asked, start = [ids[i] for i in numbers], time.monotonic()
        answers = speculate(target, draft, asked, tree, new, temperature, generator, note, backend)
        facts = {"rows": len(rows), "tokens": sum(map(len, answers)), "seconds": round(time.monotonic() - start, 1)}
        if temperature == 0:
            plain = decode(target, asked, new, backend)
            facts["equal_to_plain"] = sum(a == b for a, b in zip(answers, plain))
        recording.add(sorted(rows, key=lambda row: row[1:4]), facts)


def costs(target: Llama, draft: ModelDraft | LookupDraft, tree: Tree, prompts: list[list[int]],
          backend: str = "auto") -> dict[str, float]:  # fmt: skip
    """µs of a pass of the target over a token a prompt (`step`), over a `tree` a prompt (`tree`), and of guessing such
    trees (`guess`), medians, each as `wall_us` and on CUDA `gpu_us`. prompts: lists of tokens; target, draft, backend:
    as of `speculate`."""
    capacity = max(map(len, prompts)) + 2 * tree.nodes
    cache, everyone = Cache(target, len(prompts), capacity), range(len(prompts))
    one, whole = ([mask] * len(prompts) for mask in (torch.ones(1, 1, dtype=torch.bool), tree.sees))
    read_prompts(target, cache, [prompt[:-1] for prompt in prompts], backend)
    draft.begin(prompts, capacity)
    last = torch.tensor([prompt[-1] for prompt in prompts], device=target.device)
    calls = {
        "step": lambda: target.logits(read(target, cache, last, one, backend)),
        "tree": lambda: target.logits(read(target, cache, last.repeat_interleave(tree.nodes), whole, backend)),
        "guess": lambda: draft.guess(tree, prompts, everyone, 0.0),
    }
    found = {}
    for name, call in calls.items():
        call()
        found[f"{name}_wall_us"] = round(statistics.median(wall_us([call], 10)), 1)
        if target.device.type == "cuda":
            found[f"{name}_gpu_us"] = round(gpu_us_profiled([call])[0], 1)
    return found
