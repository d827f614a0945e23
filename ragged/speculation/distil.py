"""Making the distilled draft: a network of a few layers learns to say what the target says, on text that the target
writes itself. It begins with random weights, or with copies of some of the target's layers; embedding and output head
are the target's and stay as they are."""

from __future__ import annotations

import copy
import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .drafts import own_names, with_weights
from .llama import OPENING, Attend, Llama, read_tokenizer

TOKENS = 192  # of a text, behind the opening that all share
HELD_OUT = 64  # texts on which the draft is tried, at most


def in_dtype(model: Llama, dtype: torch.dtype) -> Llama:
    """`model` with its weights in another dtype."""
    found = copy.copy(model)
    found.w, found.dtype = {name: x.to(dtype) for name, x in model.w.items()}, dtype
    found.embed = found.w["token_embd.weight"]
    found.head = found.embed if model.head is model.embed else model.head.to(dtype)
    return found


def _lockstep(k: Tensor, v: Tensor, length: int) -> Attend:
    """Attention of equally long texts. k, v: (layers, texts, kv_heads, capacity, headdim), `length` of it filled."""

    def run(slot: int, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        q, new_k, new_v = (x.unflatten(0, (k.shape[1], -1)).transpose(1, 2) for x in (q, new_k, new_v))
        end = length + q.shape[2]
        k[slot, :, :, length:end], v[slot, :, :, length:end] = new_k, new_v
        if q.shape[2] > 1:
            out = F.scaled_dot_product_attention(q, new_k, new_v, is_causal=True, enable_gqa=True)
        else:  # one query for each head: those that share a key head become rows
            rows = q.unflatten(1, (new_k.shape[1], -1)).flatten(2, 3)
            out = F.scaled_dot_product_attention(rows, k[slot, :, :, :end], v[slot, :, :, :end])
            out = out.flatten(1, 2)[:, :, None]
        return out.transpose(1, 2).flatten(0, 1)

    return run


def write_texts(target: Llama, opening: list[int], texts: int, tokens: int, generator: torch.Generator) -> Tensor:
    """int64 (texts, tokens): what `target` writes behind `opening` (tokens) at temperature 1, drawn by the generator:
    behind the header of a question it invents one, and answers it."""
    shape = (len(target.layers), texts, target.kv_heads, len(opening) + tokens, target.headdim)
    k, v = (torch.zeros(shape, dtype=target.dtype, device=target.device) for _ in range(2))
    ids, length, out = torch.tensor(opening, device=target.device).repeat(texts, 1), 0, []
    for _ in range(tokens):
        positions = torch.arange(length, length + ids.shape[1], device=ids.device).repeat(texts)
        x = target.forward(ids.flatten(), positions, _lockstep(k, v, length))
        length += ids.shape[1]
        p = target.logits(x.unflatten(0, (texts, -1))[:, -1]).softmax(-1)
        ids = torch.multinomial(p, 1, generator=generator)
        out.append(ids)
    return torch.cat(out, 1)


def write_for(target: Llama, seconds: float, texts: int, tokens: int, seed: int) -> tuple[Tensor, int]:
    """Texts of `target` for about so many seconds, `texts` at a time, the opening in front: int64 (n, opening +
    tokens); and the length of the opening."""
    opening = read_tokenizer(target.path).encode(OPENING).ids
    generator = torch.Generator(target.device).manual_seed(seed)
    start, found, longest = time.monotonic(), [], 0.0
    while not found or time.monotonic() - start + longest < seconds:
        begun = time.monotonic()
        found.append(write_texts(target, opening, texts, tokens, generator))
        found[-1][-1, -1].item()  # until it is there
        longest = max(longest, time.monotonic() - begun)
        print(f"{len(found) * texts} texts, {len(found) * texts * tokens / (time.monotonic() - start):.0f} tokens/s",
              flush=True)  # fmt: skip
    body = torch.cat(found)
    return torch.cat((torch.tensor(opening, device=body.device).expand(len(body), -1), body), 1), len(opening)


def hidden(model: Llama, ids: Tensor) -> Tensor:
    """Last hidden rows (texts, n, dim) of `model` for whole texts ids, int64 (texts, n), without a cache."""

    def causal(slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (len(ids), -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)

    positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids))
    return model.forward(ids.flatten(), positions, causal).unflatten(0, ids.shape)


def new_draft(target: Llama, depth: int, seed: int, layers: list[int] | None = None) -> Llama:
    """A network of `depth` layers like `target`'s, float32: random weights by `seed`, or copies of these layers."""
    generator, w = torch.Generator(target.device).manual_seed(seed), {}
    spread = target.embed.float().std()
    for name in own_names(depth):
        slot = name.split(".")[1]
        layer = layers[int(slot)] if layers and slot.isdigit() else 0
        like = target.w[name.replace(f"blk.{slot}.", f"blk.{layer}.")].float()
        if layers:
            w[name] = like.clone()
        elif like.dim() == 1:  # norms begin as ones, the last such that logits spread by 2
            size = 2 / (spread * math.sqrt(len(like))) if name == "output_norm.weight" else 1.0
            w[name] = torch.ones_like(like) * size
        else:  # what a layer adds begins smaller than the embedding that it is added to
            adds = "attn_output" in name or "ffn_down" in name
            size = spread / math.sqrt(depth) if adds else 1.0
            noise = torch.randn(like.shape, generator=generator, device=target.device)
            w[name] = noise * size / math.sqrt(like.shape[1])
        w[name].requires_grad_()
    return with_weights(target, w, depth)


def overlap(target: Llama, draft: Llama, texts: Tensor, skip: int) -> float:
    """Mean Σ min(p, q) over `texts` behind their first `skip` tokens: the acceptance rate of one sampled guess."""
    with torch.no_grad():
        found = []
        for ids in texts.split(16):
            p, q = (model.logits(hidden(model, ids)[:, skip:]).softmax(-1) for model in (target, draft))
            found.append(torch.minimum(p, q).sum(-1).mean())
    return torch.stack(found).mean().item()


def held_out(texts: Tensor) -> Tensor:
    """The first of `texts`, which the draft does not learn from."""
    return texts[: min(HELD_OUT, len(texts) // 4)]


def distil(target: Llama, draft: Llama, texts: Tensor, skip: int, seconds: float, batch: int, lr: float, seed: int,
           log: Path) -> dict:  # fmt: skip
    """Train `draft` for about so many seconds on `texts`, int64 (texts, n), whose first `skip` tokens teach nothing.
    target: the teacher.  batch: texts a step.  lr: the highest learning rate.  log: a CSV file. Returns what was
    done."""
    own = [draft.w[name] for name in own_names(draft.depth)]
    groups = [{"params": [w for w in own if w.dim() == n], "weight_decay": 0.05 * (n > 1)} for n in (1, 2)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=target.device.type == "cuda")
    unseen = held_out(texts)
    texts = texts[len(unseen) :]
    batch, start, rows = min(batch, len(texts)), time.monotonic(), []
    for step, share in _steps(seconds):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
        torch.manual_seed(seed + step)
        loss = _loss(target, draft, texts[torch.randint(len(texts), (batch,)).to(texts.device)], skip)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        if step % 200 == 0:
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is {loss.item()} at step {step}: try a smaller --lr")
            rows.append((step, f"{loss.item():.4f}", f"{overlap(target, draft, unseen, skip):.4f}",
                         (step + 1) * batch * texts.shape[1], f"{time.monotonic() - start:.0f}"))  # fmt: skip
            print("step {} loss {} overlap {} tokens {} after {} s".format(*rows[-1]), flush=True)
    with log.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("step", "loss", "overlap", "tokens", "seconds"), *rows])
    return {"steps": step + 1, "batch": batch, "texts": len(texts), "tokens_seen": (step + 1) * batch * texts.shape[1],
            "training_seconds": round(time.monotonic() - start),
            "overlap": round(overlap(target, draft, unseen, skip), 4)}  # fmt: skip


def _steps(seconds: float) -> Iterator[tuple[int, float]]:
    """Numbers of steps, and the share of the time that is gone, until it is."""
    start, step = time.monotonic(), 0
    while (share := (time.monotonic() - start) / seconds) < 1 or step == 0:
        yield step, min(1.0, share)
        step += 1


def _loss(target: Llama, draft: Llama, ids: Tensor, skip: int) -> Tensor:
    """Cross entropy of the draft with the target as the truth: its gradient is that of the Kullback-Leibler
    divergence."""
    with torch.no_grad():
        p = target.logits(hidden(target, ids)[:, skip:]).softmax(-1)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda), torch.enable_grad():
        q = draft.logits(hidden(draft, ids)[:, skip:])
        return F.cross_entropy(q.flatten(0, 1), p.flatten(0, 1))
