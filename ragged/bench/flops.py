"""How much arithmetic a schedule of cuts leaves: the prediction that stands beside every measured speedup.

A multiply-add counts as two. Counted are matrix products and convolutions, as `torch.utils.flop_counter` counts them;
norms, biases, activations, softmax and LayerScale are left out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def block_flops(rows: float, dim: int, hidden: int) -> float:
    """FLOPs of one ordinary transformer block on one image of `rows` tokens: q, k and v of width dim, an MLP of two
    layers with `hidden` numbers between them."""
    return _block(rows, rows, qkv=3 * dim * dim, scores=dim, proj=dim * dim, mlp=2 * dim * hidden)


def _block(rows: float, mlp_rows: float, *, qkv: int, scores: int, proj: int, mlp: int) -> float:
    """rows: of the attention.  mlp_rows: those that reach the MLP.  qkv, proj, mlp: multiply-adds per row, that is
    weights.  scores: width of all heads together."""
    attention = 4 * rows * rows * scores  # q k^T, and the weights times v
    return 2 * rows * (qkv + proj) + attention + 2 * mlp_rows * mlp


def block_sizes(block: nn.Module) -> dict[str, int]:
    """What one timm `block` multiplies per row: weights of "qkv", "proj" and "mlp", and "scores", the width of all
    heads together. Raises ValueError, naming the part, for a block with other parts than these."""
    from timm import layers
    from timm.models.vision_transformer import Attention, Block

    if type(block) is not Block or type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
        kind = type(block if type(block) is not Block else block.attn).__name__
        raise ValueError(f"block: expected timm's Block with its ungated Attention, got {kind}: not counted")
    mlp, attn = block.mlp, block.attn
    names = {layers.Mlp: ("fc1", "fc2"), layers.GluMlp: ("fc1", "fc2"), layers.SwiGLU: ("fc1_g", "fc1_x", "fc2")}
    if type(mlp) not in names:
        kind = type(mlp).__name__
        raise ValueError(f"block: expected an MLP of timm's Mlp, GluMlp or SwiGLU, got {kind}: not counted")
    return {
        "qkv": _weights("attn.qkv", attn.qkv),
        "scores": attn.num_heads * attn.head_dim,
        "proj": _weights("attn.proj", attn.proj),
        "mlp": sum(_weights(f"mlp.{name}", getattr(mlp, name)) for name in names[type(mlp)]),
    }


def _weights(name: str, layer: nn.Module) -> int:
    """Weights of a plain linear layer; none of an identity."""
    if isinstance(layer, nn.Identity):
        return 0
    if type(layer) is not nn.Linear:  # an adapter, a quantised layer: who knows what it multiplies
        raise ValueError(f"{name}: expected nn.Linear, got {type(layer).__name__}: not counted")
    return layer.weight.numel()


def _patches(vit: nn.Module) -> int:
    """Multiply-adds of the patch embedding on one image."""
    from timm.layers import PatchEmbed

    patch = vit.patch_embed
    if type(patch) is not PatchEmbed or type(patch.proj) is not nn.Conv2d:
        kind = type(patch if type(patch) is not PatchEmbed else patch.proj).__name__
        raise ValueError(f"patch_embed: expected timm's PatchEmbed with one convolution, got {kind}: not counted")
    if patch.img_size is None:
        raise ValueError("patch_embed: expected a model that knows its image size; make it with img_size=")
    conv, places = patch.proj, 1
    for side, k, stride, pad, spread in zip(patch.img_size, conv.kernel_size, conv.stride, conv.padding, conv.dilation):
        places *= (side + 2 * pad - spread * (k - 1) - 1) // stride + 1
    if places != patch.num_patches:
        expected = f"expected {patch.num_patches} patches, its convolution makes {places}"
        raise ValueError(f"patch_embed: {expected}: not counted")
    return places * conv.weight.numel()


def _ends(vit: nn.Module) -> int:
    """Multiply-adds of everything outside the blocks, on one image. ValueError where there is more than that."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        raise ValueError(f"vit: expected timm's VisionTransformer or its distilled one, got {type(vit).__name__}")
    if getattr(vit, "attn_pool", None) is not None:
        raise ValueError("attn_pool: a pooling by attention is not counted")
    heads = [(name, getattr(vit, name)) for name in ("head", "head_dist") if hasattr(vit, name)]
    return _patches(vit) + sum(_weights(name, head) for name, head in heads)


def forward_flops(vit: nn.Module, stages: Sequence = (), batch: int = 1) -> float:
    """FLOPs of a whole forward pass of `vit`, a timm ViT, for a batch, counted from the modules that it has.

    stages: what `RaggedViT.trace` lists (block, where, counts per image), or nothing for the unpruned model, which
    needs `batch`.
    Raises ValueError, naming the part, for a model with parts that are not counted.
    """
    ends, sizes = _ends(vit), [block_sizes(block) for block in vit.blocks]
    cuts = {stage.block: stage for stage in stages}
    images = len(stages[0].counts) if stages else batch
    total = float(images * 2 * ends)
    for image in range(images):
        rows = vit.patch_embed.num_patches + vit.num_prefix_tokens
        for i, size in enumerate(sizes):
            cut, after = cuts.get(i), rows if i not in cuts else cuts[i].counts[image]
            where = "" if cut is None else cut.where
            attended, rest = (after if where == "before" else rows), (rows if where == "after" else after)
            total += _block(attended, rest, **size)
            rows = after
    return total
