"""Which tokens may go: the published methods, a control, and a stand-in for timing.

A pruner knows nothing of layouts or backends: it sees scores as a grid (batch, n) and answers with a `Selection`, which
the rules in rules.py make. To add one, write a class with `select` and enter it in `PRUNERS`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Registry, check_blocks, check_int, check_positive, check_share, per_stage
from .data import expand
from .loading import load_predictors, private_random
from .packing import Counts, Selection
from .rows import scores as score_ops
from .rows import with_prefix
from .rules import View, at_least, chance, chosen_rows, inverse_cdf, row_norms, top_k
from .support.trial import MODULE_PARTS

PLACES = ("before", "inside", "after")
Blocks = int | Iterable[int]
Setting = float | Sequence[float]  # one for all stages, or one for each


# ---- the pruners ----


class Pruner(nn.Module):
    """Base class. name: as in `PRUNERS`.  at: block indices, one stage each.  where: before, inside or after the block.

    needs: extra parts of the `View`, of "attention", "values" and "importance".  scores_only: `select` looks at those
    and at no token, so that a recorded pass may ask it while attention still runs.  adaptive: counts vary by image.

    Settings, which are what the constructor takes, are fixed once a pruner is made: models and recordings rely on them.
    """

    needs: frozenset[str] = frozenset()
    scores_only = False
    adaptive = False
    trained: bool | None = None  # whether learned parts were trained; None where nothing is learned

    def __init__(self, name: str, at: Blocks, where: str):
        super().__init__()
        self.name, self.at, self.where = name, check_blocks(at), where
        if where not in PLACES:
            raise ValueError(f"where: expected one of {', '.join(PLACES)}, got {where!r}")

    def __setattr__(self, name: str, value: object) -> None:
        fixed = ("name", "at", "where", "adaptive", *inspect.signature(type(self).__init__).parameters)
        if name in self.__dict__ and name in fixed:
            raise AttributeError(f"{name}: settings of a pruner are fixed; make another {type(self).__name__}")
        super().__setattr__(name, value)

    def setting(self, name: str, stage: int) -> Any:
        """The setting `name` at a stage, whether it was given once or for every stage."""
        value = getattr(self, name)
        return value[stage] if isinstance(value, tuple) else value

    def bind(self, dim: int, depth: int) -> None:
        """Check the schedule against a model of `depth` blocks and width `dim`."""
        if max(self.at) >= depth:
            raise ValueError(f"at: the model has blocks 0 to {depth - 1}, got a stage at {max(self.at)}")
        if self.where == "before" and self.needs and min(self.at) == 0:
            raise ValueError(f"at: {self.name} scores by attention, and before block 0 there was none")

    def select(self, view: View) -> Selection | None:
        """The rows of `view` that stay, or None for no cut."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.name}, at={self.at}, where={self.where!r}"


def like_weights(pruner: Pruner, weight: Tensor, in_place: bool) -> Pruner:
    """The pruner on the device of weight, its own weights in that dtype. Unless in_place, another dtype makes a copy of
    the weights: other models may use the pruner as it is. What else it holds, a list of what it saw, say, is shared."""
    own = next(pruner.parameters(), None)
    if own is not None and own.dtype != weight.dtype and not in_place:
        held = [x for part in pruner.modules() for name, x in vars(part).items() if name not in MODULE_PARTS]
        pruner = copy.deepcopy(pruner, {id(x): x for x in held})
    return pruner.to(weight)


class ThresholdL2(Pruner):
    """Keeps patches of large L2 norm: the share `keep` of them, or (tau) those of at least tau times the image's mean.
    Either is one number, or one for every stage. at, where: as for `Pruner`. ValueError for both or for values out of
    range. Source: arXiv 2604.15408."""

    def __init__(self, keep: Setting | None = None, tau: Setting | None = None, at: Blocks = (3,),
                 where: str = "after"):  # fmt: skip
        super().__init__("threshold_l2", at, where)
        if keep is not None and tau is not None:
            raise ValueError(f"keep and tau: expected one of the two, got keep={keep!r} and tau={tau!r}")
        keep = 0.5 if keep is None else keep
        self.keep = None if tau is not None else per_stage("keep", keep, len(self.at), check_share)
        self.tau = None if tau is None else per_stage("tau", tau, len(self.at), check_positive)
        self.adaptive = tau is not None

    def select(self, view: View) -> Selection | None:
        norms = view.state.grid(row_norms(view.state.tokens))
        if self.keep is not None:
            count = view.share("threshold_l2", self.setting("keep", view.stage))
            if count is None:
                return None
            norms, real = (x[:, : view.columns] for x in (norms, view.real()))
            return top_k(norms, view.prefix, count, in_place=True, real=real)
        real = view.real()
        patches = real[:, view.prefix :]
        mean = (norms[:, view.prefix :] * patches).sum(1) / patches.sum(1).clamp_min(1)
        return at_least(norms, view.prefix, self.setting("tau", view.stage) * mean[:, None], real)


def hangs(module: nn.Module) -> bool:
    """Whether hooks hang on module, or a `forward` of its own: then it has to be called as it is."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class Predictor(nn.Module):
    """DynamicViT's scorer: x (batch, patches, dim) -> log-probabilities (batch, patches, 2); entry 0 means "keep".
    real: bool (batch, patches), which of them are patches, where that differs between images."""

    def __init__(self, dim: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def scores(self, view: View) -> Tensor | None:
        """The log-probabilities of "keep" of a view's patches (batch, patches), in two launches; None where the kernels
        do not run, or where something hangs on this network."""
        patches, x = view.columns - view.prefix, view.state.tokens
        if x.element_size() != 2 or not 0 < view.state.batch * patches * x.shape[-1] <= score_ops.MOST_SCORED:
            return None
        parts = [*self.in_conv, *self.out_conv]
        kinds = [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear, nn.LogSoftmax]
        if [type(part) for part in parts] != kinds or any(map(hangs, (self, self.in_conv, self.out_conv, *parts))):
            return None
        state, lengths = view.state, view.lengths
        starts = None if isinstance(lengths, int) else state.starts
        layers = (parts[0], parts[1::2])
        return score_ops.patch_scores(x.flatten(0, -2), starts, lengths, view.prefix, patches, *layers)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        x = self.in_conv(x)
        half = x.shape[-1] // 2
        if real is None:
            mean = x[..., half:].mean(1, keepdim=True)  # what the image as a whole looks like
        else:
            own = torch.where(real[..., None], x[..., half:], 0.0).sum(1, keepdim=True)
            mean = own / real.sum(1).clamp_min(1).to(own.dtype)[:, None, None]
        mean = mean.expand(-1, x.shape[1], -1)
        return self.out_conv(torch.cat((x[..., :half], mean), -1))


class DynamicViT(Pruner):
    """A small network scores every patch; stage i keeps keep ** (i + 1) of all the image's patches, or keep[i] of them
    where one share is given for every stage. predictors: file of trained scorers (FileNotFoundError, ValueError); None
    makes random ones from `seed`. at, where: as for `Pruner`. Source: arXiv 2106.02034."""

    def __init__(self, keep: Setting = 0.7, at: Blocks = (3, 6, 9), where: str = "before",
                 predictors: str | Path | None = None, seed: int = 0):  # fmt: skip
        super().__init__("dynamicvit", at, where)
        self.keep, self.seed = per_stage("keep", keep, len(self.at), check_share), check_int("seed", seed, 0)
        if isinstance(self.keep, tuple) and list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(f"keep: these are shares of all patches, so they cannot rise, got {self.keep!r}")
        self.score_predictor = nn.ModuleList()
        self.trained = predictors is not None
        self._file = None if predictors is None else expand(predictors)
        if self._file is not None and not self._file.is_file():
            raise FileNotFoundError(f"predictors: no such file: {self._file}")

    def bind(self, dim: int, depth: int) -> None:
        super().bind(dim, depth)
        if len(self.score_predictor) == 0:
            with private_random(self.seed):
                made = nn.ModuleList(Predictor(dim) for _ in self.at)
            if self._file is not None:
                load_predictors(made, self._file)
            self.score_predictor.extend(made)  # only now: a file that is refused once is refused again
        width = self.score_predictor[0].in_conv[1].in_features
        if width != dim:
            raise ValueError(f"predictors: made for width {width}, the model has {dim}")

    def select(self, view: View) -> Selection | None:
        share = self.keep[view.stage] if isinstance(self.keep, tuple) else self.keep ** (view.stage + 1)
        count = view.share("dynamicvit", share, of_all=True)
        if count is None:
            return None
        predictor, real = self.score_predictor[view.stage], view.real() if isinstance(count, Counts) else None
        scores = predictor.scores(view)
        if scores is None:
            patches = view.state.grid(view.state.tokens)[:, view.prefix : view.columns]
            every = (patches,) if real is None else (patches, real[:, view.prefix :])
            scores = view.apply(predictor, *every)[..., 0]
        if real is None:
            return top_k(scores, view.prefix, count, patches_only=True)
        return top_k(nn.functional.pad(scores, (view.prefix, 0)), view.prefix, count, real=real)


class EViT(Pruner):
    """Keeps the share `keep` of the patches to which CLS attends most, one number or one for every stage; the others
    become one token (`fuse`), their attention-weighted sum, or are dropped. at, where: as for `Pruner`.
    Source: arXiv 2202.07800."""

    needs = frozenset({"attention"})
    scores_only = True

    def __init__(self, keep: Setting = 0.7, at: Blocks = (3, 6, 9), fuse: bool = True, where: str = "inside"):
        super().__init__("evit", at, where)
        self.keep, self.fuse = per_stage("keep", keep, len(self.at), check_share), bool(fuse)

    def select(self, view: View) -> Selection | None:
        count = view.share("evit", self.setting("keep", view.stage), up=True)
        if count is None:
            return None
        scores = view.cls_attention[:, : view.columns]  # (batch, n, nheads)
        if isinstance(count, int):
            return top_k(scores, view.prefix, count, fuse=self.fuse)
        scores = scores.mean(-1)
        chosen, rows = top_k(scores, view.prefix, count, real=view.real()), view.state.rows
        if not self.fuse:
            return chosen
        fewer = tuple(int(a < b) for a, b in zip(chosen.counts.host, rows.host, strict=True))
        fused = Counts((chosen.counts.device < rows.device).int(), fewer)  # an image that loses nothing has none
        return replace(chosen, blend=scores.masked_fill(chosen_rows(chosen, scores.shape[1]), 0.0), fused=fused)


class ATS(Pruner):
    """Draws at most `samples` patches, one number or one for every stage, from the distribution of CLS attention times
    value norm, so that a plain image keeps fewer. at, where: as for `Pruner`. Source: arXiv 2111.15667."""

    needs = frozenset({"importance"})
    scores_only = True
    adaptive = True

    def __init__(self, samples: int | Sequence[int] = 196, at: Blocks = range(3, 12), where: str = "inside"):
        super().__init__("ats", at, where)
        self.samples = per_stage("samples", samples, len(self.at), functools.partial(check_int, least=1))

    def select(self, view: View) -> Selection | None:
        scores = view.weighed
        if scores is None:  # a view made by hand
            scores = view.cls_attention.sum(-1) * view.value_norm
        return inverse_cdf(scores, view.prefix, self.setting("samples", view.stage), view.lengths)


class Random(Pruner):
    """Keeps patches by chance, the rival that every score has to beat: the share `keep` of those that are there, one
    number or one for every stage. adaptive: every image draws its own share, evenly, as far to both sides of `keep` as
    there is room. What stays depends on `seed`, the stage, and the places of image and patch in the batch, on no pixel.
    at, where: as for `Pruner`. Source: none, a control."""

    def __init__(self, keep: Setting = 0.5, adaptive: bool = False, at: Blocks = (3, 6, 9), where: str = "before",
                 seed: int = 0):  # fmt: skip
        super().__init__("random", at, where)
        self.keep, self.seed = per_stage("keep", keep, len(self.at), check_share), check_int("seed", seed, 0)
        self.adaptive = bool(adaptive)

    def select(self, view: View) -> Selection | None:
        keep, real = self.setting("keep", view.stage), view.real()[:, : view.columns]
        draw = functools.partial(chance, len(real), device=real.device)
        scores = draw(real.shape[1], (self.seed, view.stage, 0))
        if self.adaptive:
            own = 2 * draw(1, (self.seed, view.stage, 1)) - 1
            return at_least(scores, view.prefix, 1 - keep - own * min(keep, 1 - keep), real)
        count = view.share("random", keep)
        return None if count is None else top_k(scores, view.prefix, count, in_place=True, real=real)


class GivenLengths(Pruner):
    """Keeps lengths[b] rows of image b, pseudo-random patches (`seed`): for timing with chosen distributions. at,
    where: as for `Pruner`. The host is not told the counts, exactly as with a pruner that decides on the GPU."""

    adaptive = True

    def __init__(self, lengths: Sequence[int], at: Blocks = (3,), where: str = "after", seed: int = 0):
        super().__init__("given_lengths", at, where)
        self.lengths = [check_int("lengths", n, 1) for n in lengths]
        self.register_buffer("counts", torch.tensor(self.lengths, dtype=torch.int32), persistent=False)
        self.seed, self._order = seed, {}

    def select(self, view: View) -> Selection:
        state, device = view.state, view.state.tokens.device
        rows = view.equal_rows("given_lengths")
        if min(self.lengths) < view.prefix or max(self.lengths) > rows:
            got = f"{min(self.lengths)} to {max(self.lengths)}"
            raise ValueError(f"lengths: expected {view.prefix} to {rows} rows for every image, got {got}")
        if state.batch != self.counts.shape[0]:
            raise ValueError(f"lengths: given for a batch of {self.counts.shape[0]}, got {state.batch} images")
        place = (state.batch, state.width - view.prefix, device)
        if place not in self._order:
            noise = chance(*place[:2], (self.seed,), device)
            self._order[place] = with_prefix(noise.argsort(1), view.prefix)
        return Selection(self._order[place], self.counts.to(device))


PRUNERS = Registry("pruner", {"threshold_l2": ThresholdL2, "dynamicvit": DynamicViT, "evit": EViT, "ats": ATS,
                              "random": Random})  # fmt: skip
