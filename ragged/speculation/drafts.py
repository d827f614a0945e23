"""Drafts, which guess trees: some layers of the target, a small network that learnt from it, or a look into the text.

Every draft has three methods. begin: a batch of prompts starts.  guess: a tree for each prompt that still runs, with
the distributions that its guesses come from.  keep: which of the guesses stay.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import data_dir, expand, verify_sha256
from ..data.checkpoints import plain
from .llama import NAMES, Llama, check_vocabulary
from .trees import Cache, Tree, choose, only, read, read_prompts

SKIPPED = range(12, 18)  # of 30 layers; which six can be spared was tried
LEVELS = 63  # a stored weight is one of the whole numbers from -63 to 63, times a scale of its row
LONGEST_MATCH = 3


class ModelDraft:
    """A language model as draft, read through a cache of its own. model: any `Llama` with the target's vocabulary.
    backend: of `varlen_attention`."""

    def __init__(self, model: Llama, backend: str = "auto"):
        self.model, self.backend = model, backend

    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        """Read all but the last token of `prompts`, lists of tokens; capacity: room for each, in rows."""
        self.cache = Cache(self.model, len(prompts), capacity)
        read_prompts(self.model, self.cache, [prompt[:-1] for prompt in prompts], self.backend)

    def guess(self, tree: Tree, texts: Sequence[Sequence[int]], running: Sequence[int], temperature: float,
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A `tree` for each prompt in `running`: tokens, int64 (running, nodes), and logits, (running, inner nodes,
        vocabulary). texts: prompts and answers so far.  temperature: 0 for the likeliest tokens; else they are drawn,
        by the generator, from softmax(logits / temperature)."""
        tokens = torch.tensor([texts[b][-1] for b in running], device=self.model.device)
        tokens, logits = tokens[:, None].expand(-1, tree.nodes).clone(), []
        for level, following in zip(tree.levels, [*tree.levels[1:], None]):
            sees = only(running, len(self.cache.past), tree.sees[level, : level.stop])
            x = read(self.model, self.cache, tokens[:, level].flatten(), sees, self.backend)
            if following is not None:  # the last level is read for its keys and values alone
                logits.append(self.model.logits(x).unflatten(0, (len(running), -1)))
                tokens[:, following] = pick(logits[-1], tree, level, temperature, generator)
        return tokens, torch.cat(logits, 1)

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Of each prompt's tree the nodes in its path stay; paths: one a prompt, empty where it does not run."""
        self.cache.keep(paths)


class LookupDraft:
    """Guesses what followed in the text so far, where its last tokens stood before: no network at all.

    A place counts 8 times more for each of the last `LONGEST_MATCH` tokens that stand before it too. vocabulary: number
    of tokens.  device: of what is returned."""

    def __init__(self, vocabulary: int, device: torch.device | str = "cpu"):
        self.vocabulary, self.device = vocabulary, torch.device(device)

    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        """Nothing to do: `prompts` come again as texts; capacity is not needed."""

    def guess(self, tree: Tree, texts: Sequence[Sequence[int]], running: Sequence[int], temperature: float,
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As of `ModelDraft`: a `tree` for each of the texts in `running`, by temperature and generator; the logits are
        logarithms of shares, -inf for tokens that the text does not hold."""
        longest = max(len(texts[b]) for b in running) + LONGEST_MATCH
        rows = [[-1] * (longest - len(texts[b])) + list(texts[b]) for b in running]
        text = torch.tensor(rows, device=self.device)  # (running, longest), filled up in front
        tokens, logits = text[:, -1:].expand(-1, tree.nodes).clone(), []
        for level, following in zip(tree.levels, tree.levels[1:]):
            nodes = range(level.start, level.stop)
            logits.append(torch.stack([self._next(text, tokens, tree, node) for node in nodes], 1))
            tokens[:, following] = pick(logits[-1], tree, level, temperature, generator)
        return tokens, torch.cat(logits, 1)

    def _next(self, text: Tensor, tokens: Tensor, tree: Tree, node: int) -> Tensor:
        """Log of the shares of what may follow behind one node, (running, vocabulary)."""
        path = tree.sees[node].nonzero()[1:, 0].to(text.device)  # without the root, which is the text's last token
        ending = torch.cat((text, tokens[:, path]), 1)
        after = text[:, LONGEST_MATCH:]
        weight, same = (after >= 0).float(), torch.ones_like(after, dtype=torch.bool)
        for back in range(1, LONGEST_MATCH + 1):
            same = same & (text[:, LONGEST_MATCH - back : -back] == ending[:, -back, None])
            weight = weight * torch.where(same, 8.0, 1.0)
        shares = torch.zeros(len(text), self.vocabulary, device=text.device).scatter_add_(1, after.clamp_min(0), weight)
        return (shares / shares.sum(1, keepdim=True)).log()

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Nothing to do: paths show in the next texts."""


def pick(logits: Tensor, tree: Tree, level: slice, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Tokens for the children of the nodes of a level of `tree`, (running, children), by the logits (running, nodes of
    the level, vocabulary), temperature and generator."""
    width = tree.shape[tree.depth[level.start]]
    chosen = choose(logits, width) if temperature == 0 else choose(logits / temperature, width, generator)
    return chosen.flatten(1)


# ---- drafts made from the target ----


def skipping(target: Llama, layers: Sequence[int] = SKIPPED) -> Llama:
    """`target` without some of its layers: no training, no further bytes. ValueError for layers that it lacks, or for
    all of them."""
    left = [layer for layer in range(target.depth) if layer not in layers]
    if not left or not set(layers) <= set(range(target.depth)):
        raise ValueError(f"layers: expected some of 0 to {target.depth - 1}, and not all, got {list(layers)}")
    draft = copy.copy(target)
    draft.layers = left
    return draft


def with_weights(target: Llama, w: dict[str, Tensor], depth: int) -> Llama:
    """A network of `depth` layers with the weights w (names as in `Llama.w`); embedding and head are `target`'s."""
    draft = copy.copy(target)
    draft.w, draft.layers, draft.depth = {"token_embd.weight": target.embed} | w, list(range(depth)), depth
    return draft


def own_names(depth: int) -> list[str]:
    """Names of the weights that a distilled draft of `depth` layers has of its own."""
    return [f"blk.{layer}.{name}.weight" for layer in range(depth) for name in NAMES] + ["output_norm.weight"]


def save_draft(path: str | Path, w: dict[str, Tensor], depth: int, facts: dict) -> None:
    """Write the weights w of a distilled draft of `depth` layers into the .npz file `path`, matrices as whole numbers
    (see `LEVELS`) with a float16 scale a row; beside it its SHA-256, and `facts` as .json."""
    arrays = {"depth": np.int64(depth), "target": np.array(facts["target_sha256"])}
    for name in own_names(depth):
        x = w[name].detach().float().cpu()
        if x.dim() == 1:
            arrays[name] = x.numpy()
            continue
        scale = (x.abs().amax(1, keepdim=True) / LEVELS).clamp_min(1e-7).half()
        arrays[name] = (x / scale.float()).round().clamp(-LEVELS, LEVELS).to(torch.int8).numpy()
        arrays[f"{name}.scale"] = scale.numpy()
    path = Path(path)
    np.savez_compressed(path, **arrays)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    text = json.dumps(facts | {"bytes": path.stat().st_size, "sha256": digest}, indent=2)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def draft_file() -> Path:
    """The distilled draft that the package carries."""
    return data_dir() / "speculation" / "draft.npz"


def load_draft(target: Llama, path: str | Path | None = None) -> Llama:
    """The distilled draft in the file `path`, by default the bundled one, held against the .sha256 beside it. Raises
    FileNotFoundError, or ValueError for a damaged file, or one that another model than `target` taught."""
    path = draft_file() if path is None else expand(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such draft: {path}; `python -m ragged.speculation distil` makes one")
    verify_sha256(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        depth, taught = int(arrays["depth"]), str(arrays["target"])
        w = {}
        for name in own_names(depth):
            x = torch.from_numpy(arrays[name]).float()
            w[name] = x * torch.from_numpy(arrays[f"{name}.scale"]).float() if x.dim() == 2 else x
    except Exception as error:  # zipfile, zlib and NumPy raise several kinds
        raise ValueError(f"{path} is no distilled draft: {plain(f'{type(error).__name__}: {error}')}") from None
    if taught != target.sha256():
        raise ValueError(f"{path} was taught by another model than {target.path}; its embedding would not fit")
    for name, x in w.items():
        like = target.w[name.replace(f"blk.{name.split('.')[1]}.", "blk.0.")]
        if x.shape != like.shape or not torch.isfinite(x).all():
            raise ValueError(f"{path}: {name} has shape {tuple(x.shape)}, expected finite {tuple(like.shape)}")
        w[name] = x.to(target.device, target.dtype)
    return with_weights(target, w, depth)


DRAFTS = ("skip", "distilled", "lookup")


def make_draft(name: str, target: Llama, backend: str = "auto") -> ModelDraft | LookupDraft:
    """The draft called `name` for `target`: one of DRAFTS, the path of a .npz file that `distil` wrote, or of a GGUF
    file with the same vocabulary. backend: of `varlen_attention`. Raises what reading a file raises."""
    if name == "lookup":
        return LookupDraft(len(target.words), target.device)
    if name == "skip":
        return ModelDraft(skipping(target), backend)
    if name == "distilled" or name.endswith(".npz"):
        return ModelDraft(load_draft(target, None if name == "distilled" else name), backend)
    if not name.endswith(".gguf"):
        raise ValueError(f"draft: expected one of {', '.join(DRAFTS)}, or a .gguf or .npz file, got {name!r}")
    model = Llama(name, target.device, target.dtype)
    check_vocabulary(target, model)
    return ModelDraft(model, backend)
