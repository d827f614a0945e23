"""A transformer block in pieces: four row-wise ones around one attention call.

Row-wise pieces do not care whether they get (batch, n, dim) or (total, dim); only attention does. Every piece is a
plain function of a block and tensors, so that `torch.compile` compiles it once and uses it for all blocks; an eager
pass gives it a `Bare` block. One more comes before the first block: `embed`. They take the place of timm's `forward`
methods where a block is plain; support/ decides that.

What a block adds last it may leave to add: a compiler then does it where the next block, or a cut, reads the tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..attention import varlen_attention
from ..backends import masked_sdpa, unfused_softmax
from ..gradients import split_projection
from ..kernels.padding import image_of_rows
from ..packing import Counts, Packed
from ..rows import added, host_offsets
from ..rules import run_module
from ..support.bare import Bare
from ..support.training import drop_images


def embed(vit: nn.Module, images: Tensor, as_product: bool) -> Tensor:
    """Tokens (batch, n, dim) of images (batch, channels, height, width), with vit's prefix tokens and positions.
    as_product: the patch embedding is one matrix product (see `Survey`)."""
    x = vit._pos_embed(_patch_rows(vit.patch_embed, images) if as_product else vit.patch_embed(images))
    return vit.norm_pre(vit.patch_drop(x))


def _patch_rows(patch: nn.Module, images: Tensor) -> Tensor:
    """The patch embedding as the matrix product that it is. As a convolution with stride 16 it runs in kernels made
    for overlapping windows: a fifth of a DeiT-S forward pass, and the same however many tokens are pruned."""
    conv, batch = patch.proj, images.shape[0]
    (high, wide), (down, across), channels = patch.grid_size, conv.kernel_size, conv.in_channels
    images = images[..., : high * down, : wide * across]  # what is left over at the edge is in no patch
    pixels = images.reshape(batch, channels, high, down, wide, across).permute(0, 2, 4, 1, 3, 5)
    rows = pixels.reshape(batch * high * wide, channels * down * across)  # one row a patch
    x = nn.functional.linear(rows, conv.weight.flatten(1), conv.bias)  # (batch * patches, dim)
    return patch.norm(x.unflatten(0, (batch, high * wide)))  # (batch, patches, dim)


def scale_of(block: nn.Module | Bare) -> float:
    """What the scores of a block are multiplied by. timm's fused attention does not ask `attn.scale`."""
    return block.attn.head_dim**-0.5 if block.attn.fused_attn else block.attn.scale


def project(block: nn.Module | Bare, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block for tokens x (..., dim), each (..., nheads, headdim): views of one
    projection."""
    if isinstance(block, Bare):
        return block.project(x)
    attn = block.attn
    qkv = attn.qkv(block.norm1(x))  # (..., 3 * dim)
    qkv = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim))  # (..., 3, nheads, headdim)
    q, k, v = split_projection(qkv) if qkv.dim() == 4 and qkv.requires_grad else qkv.unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


def project_heads(block: nn.Module | Bare, heads: Tensor, cu: Tensor | None = None, drops: bool = False) -> Tensor:
    """What attention adds to the residual stream (..., dim), made of heads (..., nheads, headdim). drops: with what is
    dropped in training; cu: then the offsets of packed rows."""
    if isinstance(block, Bare):
        return block.project_heads(heads)
    attn, out = block.attn, heads.flatten(-2)  # (..., dim)
    out = attn.proj(attn.norm(out) if hasattr(attn, "norm") else out)
    if drops:
        return drop_images(block.drop_path1, block.ls1(attn.proj_drop(out)), cu)
    return block.ls1(out)


def finish_attention(block: nn.Module | Bare, x: Tensor, heads: Tensor, cu: Tensor | None = None,
                     drops: bool = False) -> Tensor:  # fmt: skip
    """The residual x (..., dim) plus the attention output of a block; heads, cu, drops: as in `project_heads`."""
    return x + project_heads(block, heads, cu, drops)


def run_mlp(block: nn.Module | Bare, x: Tensor, cu: Tensor | None = None, drops: bool = False,
            normed: Tensor | None = None) -> Tensor:  # fmt: skip
    """What the MLP of a block adds to the residual stream x (..., dim); cu, drops: as in `project_heads`; normed: x
    after the norm, where somebody has it."""
    if isinstance(block, Bare):
        return block.run_mlp(x, normed)
    out = block.ls2(block.mlp(block.norm2(x) if normed is None else normed))
    return drop_images(block.drop_path2, out, cu) if drops else out


def finish_block(block: nn.Module | Bare, x: Tensor, cu: Tensor | None = None, drops: bool = False) -> Tensor:
    """The MLP half of a block on x (..., dim); cu, drops: as in `finish_attention`."""
    return x + run_mlp(block, x, cu, drops)


def left_open(x: Tensor, more: Tensor) -> tuple[Tensor, Tensor | None]:
    """x and what is to be added to it, both (..., dim): a compiler fuses that with whatever reads the sum. In an eager
    pass, where gradients are recorded, and where the two differ in dtype: the sum, and None."""
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.dtype == more.dtype:
        return x, more
    return x + more, None


def begin_block(block: nn.Module | Bare, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, ...]:
    """The tokens x (..., dim), `more` added, and their queries, keys and values, as `project` returns them."""
    x = added(x, more)
    return x, *project(block, x)


def end_block(block: nn.Module | Bare, x: Tensor, cu: Tensor | None = None, drops: bool = False,
              normed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`finish_block`, with its sum `left_open`; normed: as in `run_mlp`."""
    return left_open(x, run_mlp(block, x, cu, drops, normed))


def attend_packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, backend: str) -> Tensor:
    """Attention on packed q, k, v (total, nheads, headdim); cu (batch + 1,), longest, scale, backend: as
    `varlen_attention` takes them. Under autocast in its dtype, as `scaled_dot_product_attention`."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return varlen_attention(q, k, v, cu, cu, longest, longest, softmax_scale=scale, backend=backend)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, lengths_k: Tensor | None, scale: float, unfused: bool) -> Tensor:
    """Attention on q, k, v (batch, n, nheads, headdim) times scale; lengths_k (batch,) marks the real keys. unfused: as
    the paper pads."""
    real = None if lengths_k is None else torch.arange(k.shape[1], device=k.device) < lengths_k[:, None]
    return (unfused_softmax if unfused else masked_sdpa)(q, k, v, real, scale)


def packed_block(block: nn.Module | Bare, x: Tensor, more: Tensor | None, cu: Tensor, longest: int, scale: float,
                 backend: str, drops: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One whole block on packed tokens x (total, dim), to which `more` is to be added, and its own sum `left_open`; cu
    (batch + 1,), longest, scale, backend: as in `attend_packed`; drops: as in `finish_attention`."""
    x, q, k, v = begin_block(block, x, more)
    heads = attend_packed(q, k, v, cu, longest, scale, backend)
    return end_block(block, finish_attention(block, x, heads, cu, drops), cu, drops)


def padded_block(block: nn.Module | Bare, x: Tensor, more: Tensor | None, lengths: Tensor | None, scale: float,
                 unfused: bool, drops: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One whole block on x (batch, n, dim), of which lengths (batch,) rows are real (None: all); more: as in
    `packed_block`; scale, unfused: as in `attend_padded`; drops: as in `finish_attention`."""
    x, q, k, v = begin_block(block, x, more)
    x = finish_attention(block, x, attend_padded(q, k, v, lengths, scale, unfused), None, drops)
    return end_block(block, x, None, drops)


PIECES = (embed, begin_block, project_heads, finish_attention, end_block, attend_packed, attend_padded, packed_block,
          padded_block, run_module)  # fmt: skip

# Fixed block sizes for row-wise kernels. By itself the compiler times two, on the first batch that comes by, and keeps
# the winner of that moment: a pass becomes up to a tenth slower, and another one every time.
STEADY = {"triton.autotune_pointwise": False}


VARIANTS = 64  # of one function, for other sizes, settings and modules; PyTorch gives up at more


def compile_with_room(function: Callable, **options: object) -> Callable:
    """`torch.compile` with these options, and room for VARIANTS variants of the function in every thread."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options.setdefault("recompile_limit", VARIANTS)
    else:  # of an older PyTorch, where it is one setting for all threads
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(function, **options)


def compiled_pieces(foreign: bool = False, **options: object) -> dict[str, Callable]:
    """Every piece, by name, compiled with options for `torch.compile`; with `STEADY`, unless they name a mode, options
    or a backend of their own. foreign: modules of unknown types are in there, which may break a graph."""
    if not {"mode", "options", "backend"} & options.keys():
        options["options"] = STEADY
    return {piece.__name__: compile_with_room(piece, fullgraph=not foreign, **options) for piece in PIECES}


# ---- the front: images of any sizes, packed from the first token on ----


class Positions:
    """The positions of a network's patches on grids of any size, resampled as timm does, and kept by size.

    They are made anew once the network has others: another tensor, memory, or version, which every way of changing
    weights leaves behind but writing through `.data`; after that call `RaggedViT.prepare`."""

    MOST = 64  # sizes kept

    def __init__(self):
        self._kept: dict[tuple[int, int], tuple[tuple, torch.UntypedStorage, Tensor]] = {}

    def __call__(self, vit: nn.Module, grid: tuple[int, int]) -> Tensor:
        """Positions (n, dim) for the prefix tokens and the patches of grid (rows, columns); zero for prefix tokens
        that have none."""
        own = vit.pos_embed
        if own.is_inference() or (own.requires_grad and torch.is_grad_enabled()):  # no version, or a graph behind it
            return self._resampled(vit, grid)
        state = (id(own), own._version, own.data_ptr(), own.dtype, own.device, vit.no_embed_class,
                 vit.patch_embed.grid_size)  # fmt: skip
        then, _, table = self._kept.get(grid, (None, None, None))
        if then != state:
            table = self._resampled(vit, grid).clone()  # for its own grid it is the network's parameter itself
            if len(self._kept) >= self.MOST:
                self._kept = {}
            self._kept[grid] = (state, own.untyped_storage(), table)  # held, so that nothing else gets this memory
        return table

    @staticmethod
    def _resampled(vit: nn.Module, grid: tuple[int, int]) -> Tensor:
        from timm.layers import resample_abs_pos_embed

        prefix = vit.num_prefix_tokens
        with_prefix = 0 if vit.no_embed_class else prefix
        table = resample_abs_pos_embed(vit.pos_embed, list(grid), vit.patch_embed.grid_size, with_prefix)[0]
        return table if with_prefix else nn.functional.pad(table, (0, 0, prefix, 0))


def embed_each(vit: nn.Module, images: Sequence[Tensor], as_product: bool, positions: Positions) -> Packed:
    """The tokens of images (channels, height, width) of any sizes, one image behind the other, with vit's prefix tokens
    and positions as timm has them with dynamic_img_size=True. as_product: one matrix product makes all patches; else
    vit's patch embedding is called image by image."""
    patch, prefix = vit.patch_embed, vit.num_prefix_tokens
    grids = [tuple(patch.dynamic_feat_size(tuple(image.shape[-2:]))) for image in images]
    if as_product:
        rows = torch.cat([_pixel_rows(patch, image, grid) for image, grid in zip(images, grids, strict=True)])
        x = patch.norm(nn.functional.linear(rows, patch.proj.weight.flatten(1), patch.proj.bias))
    else:
        x = torch.cat([patch(image[None]).flatten(0, -2) for image in images])  # (all patches, dim)
    lengths = [prefix + high * wide for high, wide in grids]
    own = (getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    first = torch.cat([token[0] for token in own if token is not None])  # (prefix, dim)
    x = torch.cat([part for patches in x.split([n - prefix for n in lengths]) for part in (first, patches)])
    if vit.pos_embed is not None:
        x = x + torch.cat([positions(vit, grid) for grid in grids])
    return packed_state(vit.norm_pre(vit.pos_drop(x)), host_offsets(lengths, x.device), lengths)


def packed_state(tokens: Tensor, cu_seqlens: Tensor, lengths: list[int], ids: Tensor | None = None) -> Packed:
    """tokens (total, dim) of images of `lengths` rows, which cu_seqlens says on the device, as nothing has been pruned
    yet. ids: as in `Packed`; None numbers the rows of each image."""
    batch, longest = len(lengths), max(lengths)
    if ids is None:
        row = torch.arange(tokens.shape[0], device=tokens.device)
        ids = row - cu_seqlens[image_of_rows(cu_seqlens, tokens.shape[0])]
    if min(lengths) == longest:
        return Packed(tokens, ids, cu_seqlens, longest, batch, longest, longest)
    counts = Counts(cu_seqlens.diff(), tuple(lengths))
    return Packed(tokens, ids, cu_seqlens, longest, batch, longest, None, counts, counts)


def _pixel_rows(patch: nn.Module, image: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of an image (channels, height, width), a row a patch: (patches, channels * pixels of a patch)."""
    (high, wide), (down, across) = grid, patch.proj.kernel_size
    if patch.dynamic_img_pad:
        image = nn.functional.pad(image, (0, wide * across - image.shape[2], 0, high * down - image.shape[1]))
    image = image[:, : high * down, : wide * across]
    return image.reshape(-1, high, down, wide, across).permute(1, 3, 0, 2, 4).reshape(high * wide, -1)
