"""Which tokens may go: a score for every token, and a rule that turns scores into a selection.

Four published methods are four pairs of the two. A pruner knows nothing of layouts or backends: it sees scores as a
grid (batch, n) and answers with a `Selection`. To add one, write a class with `select` and enter it in `PRUNERS`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Registry, check_blocks, check_int, check_positive, check_share, per_stage
from .data import expand
from .loading import load_predictors, private_random
from .packing import Counts, Packed, Padded, Selection
from .rows import best_rows, equal_offsets, kept_rows, with_prefix

PLACES = ("before", "inside", "after")
Blocks = int | Iterable[int]
Setting = float | Sequence[float]  # one for all stages, or one for each


# ---- what a pruner sees, and the rules that turn scores into a selection ----


@dataclass(frozen=True)
class View:
    """What a pruner may look at. state: the tokens at the place of the cut.  prefix: rows that always stay (CLS, ...).
    stage: 0, 1, ... within the schedule.  cls_attention: float32 (batch, n, nheads), softmax attention of CLS to every
    row.  value_norm: float32 (batch, n), norm of every row's value vector, heads concatenated. The last two only where
    the pruner `needs` them; both are zero in padding."""

    state: Packed | Padded
    prefix: int
    stage: int
    cls_attention: Tensor | None = None
    value_norm: Tensor | None = None

    def real(self) -> Tensor:
        """bool (batch, n): which entries of the grid are rows, and which are padding."""
        column = torch.arange(self.state.width, device=self.state.tokens.device)
        lengths = self.state.lengths
        return (column < lengths[:, None]) if lengths is not None else (column >= 0).expand(self.state.batch, -1)

    def equal_rows(self, method: str) -> int:
        """Real rows per image where all images have the same number, which a fixed ratio needs. Raises ValueError,
        naming `method`, where they have not."""
        if self.state.count is None:
            raise ValueError(f"{method}: a fixed keep ratio needs the same number of tokens in every image")
        return self.state.count

    @property
    def columns(self) -> int:
        """How many columns of the grid hold rows of any image."""
        return self.state.width if self.state.count is None else self.state.count

    def share(self, method: str, share: float, *, of_all: bool = False, up: bool = False) -> int | Counts | None:
        """How many patches of every image a fixed share leaves, of those that are there or (of_all) of all the image
        had, rounded down or `up`: one number, one for each image, or None where no image loses any. Raises ValueError,
        naming `method`, where the host does not know how many patches there are."""
        state, prefix, rounded = self.state, self.prefix, math.ceil if up else math.floor
        if state.rows is None:
            now = self.equal_rows(method) - prefix
            count = min(now, rounded(share * ((state.seqlen if of_all else state.count) - prefix)))
            return None if count == now else count
        now, base = state.rows.plus(-prefix), (state.unpruned if of_all else state.rows).plus(-prefix)
        host = tuple(min(n, rounded(share * of)) for n, of in zip(now.host, base.host, strict=True))
        if host == now.host:
            return None
        shares = base.device.double() * share  # the very numbers that Python has on the host
        return Counts((shares.ceil() if up else shares.floor()).int().minimum(now.device), host)


def row_norms(x: Tensor) -> Tensor:
    """L2 norms of x (..., dim), float32 (...), summed up in at least that precision and without a copy of x in it."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()


def top_k(scores: Tensor, prefix: int, count: int | Counts, *, in_place: bool = False,
          real: Tensor | None = None) -> Selection:  # fmt: skip
    """The `count` best patches of every image by scores (batch, n), best first, or (in_place) in the order in which
    they stood. The first `prefix` rows are no patches, and stay. real, bool (batch, n), is False in padding; needed
    where every image has a count of its own."""
    if isinstance(count, int):
        return Selection(best_rows(scores, prefix, count, in_place=in_place), prefix + count)
    index = best_rows(scores.masked_fill(~real, -math.inf), prefix, max(count.host))
    counts = count.plus(prefix)
    if in_place:
        index = kept(chosen_rows(Selection(index, counts), scores.shape[1]), prefix, real).index
    return Selection(index, counts)


def chosen_rows(selection: Selection, width: int) -> Tensor:
    """bool (batch, width): the rows that `selection`, whose counts differ between images, names."""
    index, counts = selection.index, selection.counts
    taken = torch.arange(index.shape[1], device=index.device) < counts.device[:, None]
    return torch.zeros(len(index), width, dtype=torch.bool, device=index.device).scatter(1, index, taken)


def at_least(scores: Tensor, prefix: int, limit: Tensor, real: Tensor) -> Selection:
    """The patches of scores (batch, n) that reach limit (batch, 1), in the order in which they stood; their number
    varies. The first `prefix` rows stay anyway; real, bool (batch, n), is False in padding."""
    return kept(scores >= limit, prefix, real)


def kept(keep: Tensor, prefix: int, real: Tensor) -> Selection:
    """The rows that keep, bool (batch, n), marks, in the order in which they stand. The first `prefix` rows stay
    anyway; real, bool (batch, n), is False in padding."""
    batch, n = keep.shape
    return Selection(*kept_rows(keep & real, equal_offsets(batch, n, keep.device), n, prefix))


def inverse_cdf(scores: Tensor, prefix: int, samples: int, real: Tensor) -> Selection:
    """Adaptive sampling: where the scores are concentrated, many sample points hit the same patch, and few stay.

    The scores (batch, n) of an image behind its `prefix`, where `real` (batch, n), sorted and summed up, make a
    staircase from 0 to 1. `samples` evenly spaced heights, from the first positive step to 1, each pick the nearest
    step; patches picked more than once stay once, lowest score first.
    """
    scores, real = scores[:, prefix:].float(), real[:, prefix:]
    if scores.shape[1] == 0:  # no patch is left in any image: nothing to choose from
        return Selection(with_prefix(real.long(), prefix), real.sum(1, dtype=torch.int32) + prefix)
    ranked, order = torch.where(real, scores, math.inf).sort(1)
    real = real.gather(1, order)
    cdf = torch.where(real, ranked, 0.0).cumsum(1)
    cdf = cdf / cdf[:, -1:].clamp_min(torch.finfo(torch.float32).tiny)
    low, high = cdf[:, :1], cdf[:, -1:]
    cdf = (cdf - low) / torch.where(high > low, high - low, 1.0)
    cdf = torch.where(real, cdf, 2.0)  # past every height, so that padding is never the nearest step
    start = torch.where(cdf > 0, cdf, 2.0).amin(1, keepdim=True).clamp_max(1.0)
    height = start + (1.0 - start) * torch.linspace(0.0, 1.0, samples, device=cdf.device, dtype=torch.float32)
    last = cdf.shape[1] - 1  # among NaNs a search ends past it
    above = torch.searchsorted(cdf, height).clamp_max(last)
    below = torch.searchsorted(cdf, cdf.gather(1, (above - 1).clamp_min(0))).clamp_max(last)  # the first of equal steps
    nearer = (cdf.gather(1, above) - height).abs() < (height - cdf.gather(1, below)).abs()
    picked = torch.zeros_like(real).scatter_(1, torch.where(nearer, above, below), True)
    steps = kept(picked, 0, real)
    return Selection(with_prefix(order.gather(1, steps.index), prefix), steps.counts + prefix)


def chance(batch: int, columns: int, numbers: Sequence[int], device: torch.device) -> Tensor:
    """Pseudo-random float32 (batch, columns) in [0, 1) on `device`, each a hash of `numbers`, its row and its column:
    no state moves on, so that a captured pass, another layout and another backend see the same."""

    def mixed(x: Any, more: Any) -> Any:  # the integer hash "lowbias32", of ints or of int64 tensors
        x = (x + more) & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 16)

    rows = mixed(functools.reduce(mixed, numbers, 0), torch.arange(batch, device=device))
    return (mixed(rows[:, None], torch.arange(columns, device=device)) >> 8).float() * 2.0**-24


# ---- the pruners ----


class Pruner(nn.Module):
    """Base class. name: as in `PRUNERS`.  at: block indices, one stage each.  where: before, inside or after the block.

    needs: extra parts of the `View`, of "attention" and "values".  rows_only: an inside cut drops query rows before the
    attention product, and the dropped tokens still serve as keys and values there.  adaptive: counts vary by image.

    Settings, which are what the constructor takes, are fixed once a pruner is made: models and recordings rely on them.
    """

    needs: frozenset[str] = frozenset()
    rows_only = False
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
        patches = view.state.grid(view.state.tokens)[:, view.prefix : view.columns]
        real = view.real() if isinstance(count, Counts) else None
        scores = self.score_predictor[view.stage](patches, None if real is None else real[:, view.prefix :])[..., 0]
        return top_k(nn.functional.pad(scores, (view.prefix, 0)), view.prefix, count, real=real)


class EViT(Pruner):
    """Keeps the share `keep` of the patches to which CLS attends most, one number or one for every stage; the others
    become one token (`fuse`), their attention-weighted sum, or are dropped. at, where: as for `Pruner`.
    Source: arXiv 2202.07800."""

    needs = frozenset({"attention"})

    def __init__(self, keep: Setting = 0.7, at: Blocks = (3, 6, 9), fuse: bool = True, where: str = "inside"):
        super().__init__("evit", at, where)
        self.keep, self.fuse = per_stage("keep", keep, len(self.at), check_share), bool(fuse)

    def select(self, view: View) -> Selection | None:
        count = view.share("evit", self.setting("keep", view.stage), up=True)
        if count is None:
            return None
        scores = view.cls_attention[:, : view.columns].mean(-1)
        if isinstance(count, int):
            chosen = top_k(scores, view.prefix, count)
            return replace(chosen, blend=scores.scatter(1, chosen.index, 0.0) if self.fuse else None)
        chosen, rows = top_k(scores, view.prefix, count, real=view.real()), view.state.rows
        if not self.fuse:
            return chosen
        fewer = tuple(int(a < b) for a, b in zip(chosen.counts.host, rows.host, strict=True))
        fused = Counts((chosen.counts.device < rows.device).int(), fewer)  # an image that loses nothing has none
        return replace(chosen, blend=scores.masked_fill(chosen_rows(chosen, scores.shape[1]), 0.0), fused=fused)


class ATS(Pruner):
    """Draws at most `samples` patches, one number or one for every stage, from the distribution of CLS attention times
    value norm, so that a plain image keeps fewer. at, where: as for `Pruner`. Source: arXiv 2111.15667."""

    needs = frozenset({"attention", "values"})
    rows_only = True
    adaptive = True

    def __init__(self, samples: int | Sequence[int] = 196, at: Blocks = range(3, 12), where: str = "inside"):
        super().__init__("ats", at, where)
        self.samples = per_stage("samples", samples, len(self.at), functools.partial(check_int, least=1))

    def select(self, view: View) -> Selection | None:
        scores = view.cls_attention.sum(-1) * view.value_norm
        return inverse_cdf(scores, view.prefix, self.setting("samples", view.stage), view.real())


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
