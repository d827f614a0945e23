"""How much arithmetic a schedule of cuts leaves: the prediction that stands beside every measured speedup."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def block_flops(
    rows: float, dim: int, hidden: int, *, keys: float | None = None, mlp_rows: float | None = None
) -> float:
    """FLOPs of one transformer block on one image, a multiply-add counted as two; norms and GELU left out.

    rows: query rows.  keys: rows that serve as keys and values (default: the same rows).  mlp_rows: rows that reach
    the MLP (default: the same rows).  dim: width.  hidden: width inside the MLP.
    """
    keys = rows if keys is None else keys
    mlp_rows = rows if mlp_rows is None else mlp_rows
    projections = 2 * dim * (3 * max(rows, keys) * dim + rows * dim)  # q, k, v of every row there is, then the output
    attention = 4 * rows * keys * dim  # q k^T, and the weights times v
    return projections + attention + 4 * mlp_rows * dim * hidden


def forward_flops(vit: nn.Module, stages: Sequence = (), batch: int = 1, rows_only: bool = False) -> float:
    """FLOPs of a whole forward pass of `vit`, a timm ViT, for a batch.

    stages: what `RaggedViT.trace` lists (block, where, counts per image), or nothing for the unpruned model, which
    needs `batch`. rows_only: cuts inside a block drop query rows before the attention product (ATS).
    """
    conv = vit.patch_embed.proj
    patches, dim, depth = vit.patch_embed.num_patches, vit.embed_dim, len(vit.blocks)
    hidden = vit.blocks[0].mlp.fc1.out_features
    cuts = {stage.block: stage for stage in stages}
    images = len(stages[0].counts) if stages else batch
    ends = 2 * patches * conv.weight[0].numel() * dim + 2 * dim * vit.num_classes
    total = float(images * ends)
    for image in range(images):
        rows = patches + vit.num_prefix_tokens
        for i in range(depth):
            cut, after = cuts.get(i), rows if i not in cuts else cuts[i].counts[image]
            where = "" if cut is None else cut.where
            if where == "before":
                total += block_flops(after, dim, hidden)
            elif where == "inside" and rows_only:
                total += block_flops(after, dim, hidden, keys=rows)
            elif where == "inside":
                total += block_flops(rows, dim, hidden, mlp_rows=after)
            else:
                total += block_flops(rows, dim, hidden)
            rows = after
    return total
