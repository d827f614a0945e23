"""The pruned model: images -> blocks -> pruner -> pack -> attend -> classify, in one loop."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import blocks
from .attention import resolve_backend
from .backends import BACKENDS
from .blocks import PIECES, Positions, compiled_pieces, cuts, scale_of
from .blocks.compiled import pieces_under_a_compiler
from .blocks.cuts import FILLS, Canvas, Cut, Pass, Pending, Stage, State, Trace
from .checks import (
    check_image_list,
    check_images,
    check_intermediates,
    check_packed,
    check_selection,
    dtype_of_products,
    wants_gradients,
    weight_of,
)
from .graph import Captured, aside, capture
from .packing import Packed, Padded, Selection, read_sizes
from .pruners import Pruner, like_weights
from .rules import View
from .support import Bare, Survey, check_supported, convolves_as_usual, refuse_fixed_programs
from .support.training import refuse_to_train

# What timm's tools ask a model for (`timm.data.resolve_model_data_config` the last two).
OF_THE_NETWORK = ("num_classes", "embed_dim", "num_features", "num_prefix_tokens", "pretrained_cfg", "default_cfg")
Images = Tensor | Sequence[Tensor]  # a batch, or a list of images of different sizes
# Of this process, and of the model as it was when looked at.
LOOKED_AT = ("_run", "_outside", "survey", "_known", "_positions")


class RaggedViT(nn.Module):
    """A timm Vision Transformer that drops tokens on its way.

    vit: a model `check_supported` accepts; its weights are used as they are, and it is set to eval mode.
    pruner: a pruner from `PRUNERS`, or None for the unpruned model.  backend: a name in `BACKENDS` or "auto"; layout
    "padded" runs pruned blocks on (batch, n, dim), others on packed rows. Before any cut attention is PyTorch's SDPA,
    but under "triton" and "gluon", and under "auto" where it is one of them and cuts follow.

    Plain blocks run piece by piece on rows. A block with hooks or a `forward` of its own is called as it is, on
    (batch, n, dim), which takes the same count in every image; where counts differ it is refused. What hangs on the
    model is looked at in every call. Gradients flow under backends that have a backward pass (`Backend.backward`), the
    others refuse them. After model.train() dropout is drawn for every number and stochastic depth for every image.
    """

    def __init__(self, vit: nn.Module, pruner: Pruner | None = None, backend: str = "auto"):
        super().__init__()
        if pruner is not None and not isinstance(pruner, Pruner):
            raise TypeError(f"pruner: expected a pruner such as PRUNERS['evit'](keep=0.7) or None, got {pruner!r}")
        self.vit, self.pruner, self.backend = check_supported(vit), pruner, backend
        self.eval()
        self._compiled: dict | None = None  # the options of `compile`
        self.prepare()

    def prepare(self) -> None:
        """Look at everything that a pass relies on. Raises for what cannot be run."""
        vit, pruner, backend = check_supported(self.vit), self.pruner, self.backend
        if backend != "auto" and (not isinstance(backend, str) or backend not in BACKENDS):
            raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend != "auto" and BACKENDS[backend].equal_only and pruner is not None and pruner.adaptive:
            raise ValueError(f"backend {backend!r}: needs equal counts, and {pruner.name} keeps what each image needs")
        self.prefix = vit.num_prefix_tokens
        if pruner is not None:
            fresh = next(pruner.parameters(), None) is None  # bound for the first time: its weights are made now
            pruner.bind(vit.embed_dim, len(vit.blocks))
            self.pruner = pruner = like_weights(pruner, weight_of(vit), in_place=fresh)
        # a cut before block i is a cut after block i - 1, and -1 is the embedding
        before = pruner is not None and pruner.where == "before"
        self._cuts = {} if pruner is None else {i - before: stage for stage, i in enumerate(pruner.at)}
        self.survey, self._known, self._positions = Survey(vit), (pruner, backend), Positions()
        if self._compiled is None:
            self._run: dict[str, Callable] = {piece.__name__: piece for piece in PIECES}
        for i in self._cuts.keys() & self.survey.whole.keys():
            why = "cuts inside it" if pruner.where == "inside" else "needs its attention"
            if pruner.where == "inside" or pruner.needs:
                raise ValueError(f"vit: block {i}: {self.survey.whole[i]}, and {pruner.name} {why}; cut elsewhere")

    def _look(self) -> None:
        """What may have changed since the last call. The compiler takes it as it was when it began."""
        if not torch.compiler.is_compiling():
            if (self.pruner, self.backend) != self._known or not self.survey.still_true(self.vit):
                self.prepare()
            if self.pruner is not None:
                weight, own = weight_of(self.vit), next(self.pruner.parameters(), None)
                if own is not None and (own.dtype != weight.dtype or own.device != weight.device):
                    self.prepare()

    def _look_again(self) -> None:
        """After something foreign ran: it may have changed what comes next."""
        if not torch.compiler.is_compiling() and not self.survey.still_true(self.vit):
            self.prepare()

    def compile(self, **options: object) -> RaggedViT:
        """Compile the pieces of the pass with `torch.compile`, once for all blocks; token counts become dynamic when
        they change. Returns self. options go to `torch.compile`. That, given the model itself or something around it,
        makes the same pieces, but without options, and warns, unless this was called before."""
        self._compiled, self._run = options, compiled_pieces(bool(self.survey.tried), **options)
        return self

    def with_pruner(self, pruner: Pruner | None, backend: str | None = None) -> RaggedViT:
        """The network with another pruner and, if named, backend; compiled pieces are shared, so both round alike."""
        trained = [module.training for module in self.vit.modules()]  # wrapping sets all to eval mode
        twin = RaggedViT(self.vit, pruner, backend or self.backend)
        twin._compiled, twin._run = self._compiled, self._run
        for module, was in zip(self.vit.modules(), trained, strict=True):
            module.training = was
        twin.training = self.training
        return twin

    def __getstate__(self) -> dict:
        # compiled functions and what was looked at belong to this process: a copy makes its own
        return {key: value for key, value in self.__dict__.items() if key not in LOOKED_AT}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.prepare()
        if self._compiled is not None:
            self.compile(**self._compiled)

    @pieces_under_a_compiler
    def forward(self, images: Images) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width), or of a list or tuple of images
        (channels, height, width) of any sizes.

        The images of a list are packed from the embedding on. Each has its own grid of positions and its own counts, as
        if the model, with dynamic_img_size=True, were called with it alone; whether it was made so does not matter.
        Sides are multiples of the patch, or of the size the model was made for: timm refuses others, too, unless
        dynamic_img_pad fills them up. Hooks on the patch embedding then see one image at a time.
        ValueError or TypeError, naming the image, for what does not fit.
        """
        return self._finish(self.begin(images))

    @pieces_under_a_compiler
    def forward_tokens(self, tokens: Tensor, cu_seqlens: Tensor, ids: Tensor | None = None, *,
                       lengths: Sequence[int] | None = None) -> Tensor:  # fmt: skip
        """Logits (batch, classes) of tokens that somebody else made: all blocks, cuts, the norm and the classifier.

        tokens: (total, dim) with positions and all, one image behind the other, the prefix tokens (CLS, ...) first in
        each.  cu_seqlens: int32 (batch + 1,): image b owns rows cu_seqlens[b] to cu_seqlens[b + 1].  ids: int64
        (total,), what a token is called in `Packed`; None numbers each image's own.  lengths: the rows of each image,
        where the host knows them; without them, on a GPU, the offsets are read, which is one wait. Pruners take shares
        of the tokens given here. TypeError or ValueError, naming the argument, for what does not fit.
        """
        run = self._pass(tokens)
        lengths = check_packed(tokens, cu_seqlens, ids, lengths, self.vit, self.prefix)
        state = blocks.packed_state(tokens, cu_seqlens, lengths, ids)
        state = cuts.laid_out(state, run.backend, self._packs(run))
        return self._finish(self._blocks(state, -1, run))

    @pieces_under_a_compiler
    def trace(self, images: Images) -> Trace:
        """`forward` of images, a batch or a list, and what every cut left."""
        stages: list[Stage] = []
        logits = self._finish(self.begin(images, stages))
        trace = Trace(logits, stages)
        size = self.vit.patch_embed.dynamic_feat_size
        lengths = [self.prefix + math.prod(size(tuple(image.shape[-2:]))) for image in images]
        kept = cuts.rows_kept(lengths, stages, logits.device)
        trace.kept = torch.stack(kept) if isinstance(images, Tensor) else kept
        return trace

    def capture(self, batch_size: int, **options: object) -> Captured:
        """The whole forward as CUDA graphs for `batch_size` images; options and errors: see `ragged.graph.capture`."""
        return capture(self, batch_size, **options)

    # ---- as timm's own models

    def forward_features(self, images: Tensor, fill: str = "zero") -> Tensor:
        """Tokens (batch, n, dim) after the final norm, as timm's: patches in their original places, of images (batch,
        channels, height, width). fill: what stands where a token was dropped: "zero"; "last", the token as it was then;
        "nearest", the nearest patch that stayed. EViT's fused tokens have no place."""
        return self.forward_intermediates(images, [], fill=fill)[0]

    @pieces_under_a_compiler
    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, return_prefix_tokens: bool = False,
        norm: bool = False, stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
        output_dict: bool = False, *, fill: str = "zero",
    ) -> list | tuple[Tensor, list] | dict:  # fmt: skip
        """timm's method of this name: what blocks `indices` (the last so many, or all) left. fill: as in
        `forward_features`.

        x: images (batch, channels, height, width).  output_fmt: "NCHW" or "NLC".  norm: after the final norm.
        return_prefix_tokens: (patches, prefix) pairs.  intermediates_only: without the features.  stop_early: no block
        after the last of `indices` runs.  output_dict: a dictionary with timm's keys. Returns (features,
        intermediates), or intermediates.
        """
        wanted, last = check_intermediates(x, indices, output_fmt, fill, FILLS, len(self.vit.blocks))
        taken: list[Canvas] = []
        run = self._pass(x)._replace(wanted=frozenset(wanted), taken=taken, blocks=last + 1 if stop_early else None)
        last = self._finish(self._begin(x, run, features=True))
        grid = tuple(self.vit.patch_embed.dynamic_feat_size(tuple(x.shape[-2:])))

        def shown(canvas: Canvas, norm: bool) -> Tensor:
            return canvas.fill(self.vit.norm(canvas.tokens) if norm else canvas.tokens, fill, self.prefix, grid)

        features, parts = shown(last, True), [shown(canvas, norm) for canvas in taken]
        patches, prefix = ([y[:, rows] for y in parts] for rows in (slice(self.prefix, None), slice(self.prefix)))
        if output_fmt == "NCHW":
            patches = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in patches]
        if output_dict:
            named = {"image_intermediates": patches} | ({"image_intermediates_prefix": prefix} if
                                                        return_prefix_tokens else {})  # fmt: skip
            return named if intermediates_only else {"image_features": features} | named
        patches = list(zip(patches, prefix)) if return_prefix_tokens else patches
        return patches if intermediates_only else (features, patches)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's: logits (batch, classes) of features x (batch, n, dim); pre_logits: what the classifier sees."""
        return self.vit.forward_head(x, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        """timm's: the classifier."""
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's: a new classifier for num_classes; global_pool: "token", others are refused at the next call."""
        self.vit.reset_classifier(num_classes, global_pool)

    # ---- the pass

    def begin(self, images: Images, stages: list[Stage] | None = None,
              after_block: Callable[[], None] | None = None) -> Tensor | Pending:  # fmt: skip
        """Run images until the logits, or until a cut whose size only the GPU knows; every cut is added to `stages`;
        after_block: as in `Pass`."""
        return self._begin(images, self._pass(images)._replace(stages=stages, after_block=after_block))

    def _begin(self, images: Images, run: Pass, features: bool = False) -> Tensor | Canvas | Pending:
        as_usual = convolves_as_usual()
        if isinstance(images, list | tuple):
            product = self.survey.each_product and as_usual
            check_image_list(images, self.vit, product)
            if self.survey.no_list is not None:
                raise ValueError(f"vit: {self.survey.no_list}, so that a list of images cannot be packed")
            state = blocks.embed_each(self.vit, images, product, self._positions)
            return self._blocks(cuts.laid_out(state, run.backend, self._packs(run)), -1, run)
        check_images(images, self.vit)
        x = self._run["embed"](self.vit, images, self.survey.as_product and as_usual)  # (batch, n, dim)
        if self.survey.hooked:
            self._look_again()
        batch, n, _ = x.shape
        state = Padded(x, torch.arange(n, device=x.device).expand(batch, n), n, count=n)
        run = run._replace(canvas=Canvas(x)) if features else run
        return self._blocks(state.flat() if self._packs(run) else state, -1, run)

    def _finish(self, result: Tensor | Canvas | Pending) -> Tensor | Canvas:
        while isinstance(result, Pending):
            result = result.resume(*read_sizes(result.counts))
        return result

    def _blocks(self, state: State, first: int, run: Pass) -> Tensor | Canvas | Pending:
        """The loop: every block up to its cut, the cut, and what remains of the block. Block -1 is the embedding."""
        for i in range(first, len(self.vit.blocks) if run.blocks is None else run.blocks):
            if i in self._cuts:
                cut = self._reach(state, i, run)
                if cut.waits and not run.backend.paper_padding:  # the paper's loop asks by itself
                    return Pending(self, cut, run._replace(after_block=None))
                state = self._leave(cut, run)
            elif i >= 0:
                state = self._whole_block(state, i, run)
                if run.after_block is not None:
                    run.after_block()
            cuts.take_copy(state, i, run)
        if run.canvas is not None:
            run.canvas.update(state)
            return run.canvas
        return self.vit.forward_head(self._normed(state))

    def _block(self, i: int, run: Pass) -> nn.Module | Bare:
        """Block i as the pieces take it: in an eager pass without the calls of its modules."""
        eager = self._compiled is None and not run.drops and not torch.compiler.is_compiling()
        return (eager and self.survey.bare[i]) or self.vit.blocks[i]

    def _whole_block(self, state: State, i: int, run: Pass) -> State:
        if i in self.survey.whole:
            x = self.vit.blocks[i](cuts.as_dense(state, f"block {i}: {self.survey.whole[i]}"))
            self._look_again()
            return state.having(x if isinstance(state, Padded) else x.flatten(0, 1))
        block, x, more = self._block(i, run), state.tokens, state.more
        if isinstance(state, Packed):
            places = (state.cu_seqlens, state.bound, scale_of(block), self._named(state, run))
            return state.having(*self._run["packed_block"](block, x, more, *places, run.drops))
        how = (scale_of(block), cuts.runs_unfused(state, run.backend, block), run.drops)
        return state.having(*self._run["padded_block"](block, x, more, state.lengths, *how))

    def _reach(self, state: State, i: int, run: Pass) -> Cut:
        """Run block i as far as its cut, and ask the pruner which rows stay."""
        if i < 0 or (self.pruner.where != "inside" and not self.pruner.needs):
            state = state if i < 0 else self._whole_block(state, i, run).summed
            return Cut(state, self._select(state, i), i)
        block, pruner = self._block(i, run), self.pruner
        x, q, k, v = self._run["begin_block"](block, state.tokens, state.more)  # (..., nheads, headdim)
        state, scored, drops = state.having(x), (q, k, v, scale_of(block)), _images_of(state, run.drops)
        early = aside(functools.partial(self._select, state, i, *scored), q.is_cuda) if pruner.scores_only else None
        heads = self._attend(state, q, k, v, block, run)
        if early and pruner.where == "inside":  # nobody looks at the sum before its rows are taken
            more = self._run["project_heads"](block, heads, *drops)
            x, more = (x, more) if more.dtype == x.dtype else (x + more, None)
            return Cut(state.having(x, more), early(), i, within=True)
        state = state.having(self._run["finish_attention"](block, x, heads, *drops))
        if pruner.where != "inside":
            state = state.having(*self._run["end_block"](block, state.tokens, *drops))
        if early:
            return Cut(state, early(), i)
        state = state.summed
        return Cut(state, self._select(state, i, *scored), i, within=pruner.where == "inside")

    def _leave(self, cut: Cut, run: Pass, sizes: tuple[int, int] | None = None) -> State:
        """Take the rows that stay, and do what remains of the block. sizes: total and longest, where a cut waits."""
        if run.canvas is not None and cut.selection is not None:  # what is dropped now stays as it is
            cut = replace(cut, state=cut.state.summed)
            run.canvas.update(cut.state)
        bare = self.survey.bare[cut.block] if cut.within and not run.drops else None
        new = cuts.take(cut, run.backend, sizes, bare and bare.norm)
        if run.stages is not None:
            run.stages.append(cuts.stage_of(new, self.pruner.at[self._cuts[cut.block]], self.pruner.where))
        if not cut.within:
            return new
        block, drops = self._block(cut.block, run), _images_of(new, run.drops)
        return new.having(*self._run["end_block"](block, new.summed.tokens, *drops, new.normed))

    def _attend(self, state: State, q: Tensor, k: Tensor, v: Tensor, block: nn.Module | Bare, run: Pass) -> Tensor:
        if isinstance(state, Padded):
            how = (state.lengths, scale_of(block), cuts.runs_unfused(state, run.backend, block))
            return self._run["attend_padded"](q, k, v, *how)
        places = (state.cu_seqlens, state.bound, scale_of(block), self._named(state, run))
        return self._run["attend_packed"](q, k, v, *places)

    def _packs(self, run: Pass) -> bool:
        """Whether equal lengths run packed, too, where our kernel is ahead of dense SDPA: if cuts follow, or if its
        backend was named. Without a pruner "auto" runs the network as PyTorch does."""
        return run.backend.packs_first and (self.pruner is not None or self.backend != "auto")

    def _named(self, state: State, run: Pass) -> str:
        """The backend as `varlen_attention` is asked for it: "auto", which may take a kernel for equal lengths alone,
        where lengths are known to be equal."""
        return "auto" if self.backend == "auto" and state.count is not None else run.backend.name

    def _select(self, state: State, i: int, *scored: Tensor | float) -> Selection | None:
        """Ask the pruner, with the scores it needs from block i's q, k, v (..., nheads, headdim), and its scale."""
        view = View(state, self.prefix, self._cuts[i], apply=self._run["run_module"])
        if self.pruner.needs:
            view = view.scored(self.pruner.needs, *scored)
        selection = self.pruner.select(view)
        if selection is not None:
            check_selection(selection, self.pruner.name, state, self.prefix, self.pruner.adaptive)
        return selection

    def _normed(self, state: State) -> Tensor:
        """The prefix rows of every image after the final norm, (batch, prefix, dim)."""
        if self.survey.norm is None:
            return self.vit.norm(state.first_rows(self.prefix))
        return self.vit.norm(cuts.as_dense(state, f"the final norm: {self.survey.norm}"))[:, : self.prefix]

    @property
    def picked(self) -> str:
        """The backend that runs, with "auto" decided for the model's present device and dtype."""
        weight, head_dim = weight_of(self.vit), self.vit.embed_dim // self.vit.blocks[0].attn.num_heads
        return resolve_backend(self.backend, weight.device, dtype_of_products(weight), head_dim)

    def _pass(self, images: Images) -> Pass:
        """A pass of images under the backend that runs, after all that may have changed was looked at."""
        refuse_fixed_programs(self.pruner, images)
        self._look()
        backend = BACKENDS[self.picked]
        gradients = backend.pads or backend.backward is not None  # padded blocks are made of PyTorch's own operations
        if not gradients and torch.is_grad_enabled() and wants_gradients(self, images):
            others = ", ".join(name for name, b in BACKENDS.items() if b.pads or b.backward)
            raise RuntimeError(f"backend {backend.name!r} has no backward pass ({backend.no_backward}), and gradients "
                               f"are enabled: call the model under torch.no_grad(), or use {others}")  # fmt: skip
        drops = self.training or (not torch.compiler.is_compiling() and self.survey.training())
        if drops:
            refuse_to_train(self.vit, self.survey.whole)
        return Pass(backend, drops=drops)


def _images_of(state: State, drops: bool) -> tuple[Tensor | None, bool]:
    """What the row-wise pieces are told about dropping: where images begin in packed rows, and whether to."""
    return (state.cu_seqlens if drops and isinstance(state, Packed) else None), drops


for name in OF_THE_NETWORK:
    setattr(RaggedViT, name, property(operator.attrgetter(f"vit.{name}")))
