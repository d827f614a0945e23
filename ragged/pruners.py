"""Which tokens may go: a score for every token, and a rule that turns scores into a selection.

Four published methods are four pairs of the two. A pruner knows nothing of layouts or backends: it sees scores as a
grid (batch, n) and answers with a `Selection`. To add one, write a class with `select` and enter it in `PRUNERS`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import load_state
from .layout import Selection
from .registry import Registry
from .selection import View, at_least, inverse_cdf, row_norms, top_k, with_prefix

PLACES = ("before", "inside", "after")
Blocks = int | Iterable[int]


class Pruner(nn.Module):
    """Base class. name: as in `PRUNERS`.  at: block indices, one stage each.  where: before, inside or after the block.

    needs: extra parts of the `View`, of "attention" and "values".  rows_only: an inside cut drops query rows before the
    attention product, and the dropped tokens still serve as keys and values there.  adaptive: counts vary by image.
    """

    needs: frozenset[str] = frozenset()
    rows_only = False
    adaptive = False
    trained: bool | None = None  # whether learned parts were trained; None where nothing is learned

    def __init__(self, name: str, at: Blocks, where: str):
        super().__init__()
        self.name, self.at, self.where = name, _stages(at), where
        if where not in PLACES:
            raise ValueError(f"where: expected one of {', '.join(PLACES)}, got {where!r}")

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
    at, where: as for `Pruner`. ValueError for both or for values out of range. Source: arXiv 2604.15408."""

    def __init__(self, keep: float | None = None, tau: float | None = None, at: Blocks = (3,), where: str = "after"):
        super().__init__("threshold_l2", at, where)
        if keep is not None and tau is not None:
            raise ValueError(f"keep and tau: expected one of the two, got keep={keep!r} and tau={tau!r}")
        self.keep = None if tau is not None else _ratio(0.5 if keep is None else keep)
        self.tau = None if tau is None else _positive(tau, "tau")
        self.adaptive = tau is not None

    def select(self, view: View) -> Selection | None:
        norms = view.state.grid(row_norms(view.state.tokens))
        if self.keep is not None:
            rows = view.equal_rows("threshold_l2")
            count = int((rows - view.prefix) * self.keep)
            return None if count == rows - view.prefix else top_k(norms[:, :rows], view.prefix, count, in_place=True)
        real = view.real()
        patches = real[:, view.prefix :]
        mean = (norms[:, view.prefix :] * patches).sum(1) / patches.sum(1).clamp_min(1)
        return at_least(norms, view.prefix, self.tau * mean[:, None], real)


class Predictor(nn.Module):
    """DynamicViT's scorer: x (batch, patches, dim) -> log-probabilities (batch, patches, 2); entry 0 means "keep"."""

    def __init__(self, dim: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_conv(x)
        half = x.shape[-1] // 2
        mean = x[..., half:].mean(1, keepdim=True).expand(-1, x.shape[1], -1)  # what the image as a whole looks like
        return self.out_conv(torch.cat((x[..., :half], mean), -1))


class DynamicViT(Pruner):
    """A small network scores every patch; stage i keeps keep ** (i + 1) of all. predictors: file of trained
    scorers (FileNotFoundError, ValueError); None makes random ones from `seed`. Source: arXiv 2106.02034."""

    def __init__(self, keep: float = 0.7, at: Blocks = (3, 6, 9), where: str = "before",
                 predictors: str | Path | None = None, seed: int = 0):  # fmt: skip
        super().__init__("dynamicvit", at, where)
        self.keep, self.seed = _ratio(keep), seed
        self.score_predictor = nn.ModuleList()
        self.trained = predictors is not None
        self._file = None if predictors is None else Path(predictors)
        if self._file is not None and not self._file.is_file():
            raise FileNotFoundError(f"predictors: no such file: {self._file}")

    def bind(self, dim: int, depth: int) -> None:
        super().bind(dim, depth)
        if len(self.score_predictor) == 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.score_predictor.extend(Predictor(dim) for _ in self.at)
            if self._file is not None:
                load_predictors(self.score_predictor, self._file)
        width = self.score_predictor[0].in_conv[1].in_features
        if width != dim:
            raise ValueError(f"predictors: made for width {width}, the model has {dim}")

    def select(self, view: View) -> Selection | None:
        rows = view.equal_rows("dynamicvit")
        count = min(rows - view.prefix, int((view.state.seqlen - view.prefix) * self.keep ** (view.stage + 1)))
        if count == rows - view.prefix:
            return None
        tokens = view.state.grid(view.state.tokens)
        scores = self.score_predictor[view.stage](tokens[:, view.prefix : rows])[..., 0]
        return top_k(nn.functional.pad(scores, (view.prefix, 0)), view.prefix, count)


def load_predictors(modules: nn.ModuleList, path: Path) -> None:
    """Fill `modules` from the file `path` in DynamicViT's format: keys `score_predictor.{stage}...`, alone or among a
    model's. Raises ValueError for keys that are missing or of another shape."""
    prefix = "score_predictor."
    state = {k[len(prefix) :]: v for k, v in load_state(path).items() if k.startswith(prefix)}
    wanted = modules.state_dict()
    missing = [k for k in wanted if k not in state]
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or wrong:
        what = f"lacks {prefix}{missing[0]}" if missing else f"has {prefix}{wrong[0]} of another shape"
        raise ValueError(f"predictors: {path} {what} ({len(missing)} missing, {len(wrong)} of another shape)")
    modules.load_state_dict({k: state[k] for k in wanted})


class EViT(Pruner):
    """Keeps the share `keep` of the patches to which CLS attends most; the others become one token (`fuse`), their
    attention-weighted sum, or are dropped. at, where: as for `Pruner`. Source: arXiv 2202.07800."""

    needs = frozenset({"attention"})

    def __init__(self, keep: float = 0.7, at: Blocks = (3, 6, 9), fuse: bool = True, where: str = "inside"):
        super().__init__("evit", at, where)
        self.keep, self.fuse = _ratio(keep), fuse

    def select(self, view: View) -> Selection | None:
        rows = view.equal_rows("evit")
        count = math.ceil(self.keep * (rows - view.prefix))
        if count >= rows - view.prefix:
            return None
        scores = view.cls_attention[:, :rows].mean(-1)
        chosen = top_k(scores, view.prefix, count)
        blend = scores.scatter(1, chosen.index, 0.0) if self.fuse else None
        return Selection(chosen.index, chosen.counts, blend)


class ATS(Pruner):
    """Draws at most `samples` patches from the distribution of CLS attention times value norm, so that a plain image
    keeps fewer. at, where: as for `Pruner`. Source: arXiv 2111.15667."""

    needs = frozenset({"attention", "values"})
    rows_only = True
    adaptive = True

    def __init__(self, samples: int = 196, at: Blocks = range(3, 12), where: str = "inside"):
        super().__init__("ats", at, where)
        self.samples = _positive_int(samples, "samples")

    def select(self, view: View) -> Selection | None:
        scores = view.cls_attention.sum(-1) * view.value_norm
        return inverse_cdf(scores, view.prefix, self.samples, view.real())


class GivenLengths(Pruner):
    """Keeps lengths[b] rows of image b, pseudo-random patches (`seed`): for timing with chosen distributions. at,
    where: as for `Pruner`. The host is not told the counts, exactly as with a pruner that decides on the GPU."""

    adaptive = True

    def __init__(self, lengths: Sequence[int], at: Blocks = (3,), where: str = "after", seed: int = 0):
        super().__init__("given_lengths", at, where)
        self.lengths = [_positive_int(n, "lengths") for n in lengths]
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
        if (state.batch, state.width, device) not in self._order:
            generator = torch.Generator().manual_seed(self.seed)
            noise = torch.rand(state.batch, state.width - view.prefix, generator=generator)
            self._order[state.batch, state.width, device] = with_prefix(noise.argsort(1), view.prefix).to(device)
        return Selection(self._order[state.batch, state.width, device], self.counts.to(device))


def given_lengths(lengths: Sequence[int], at: Blocks = (3,), where: str = "after", seed: int = 0) -> GivenLengths:
    """A pruner that keeps lengths[b] rows of image b, prefix rows included, chosen by `seed`; at, where: as always."""
    return GivenLengths(lengths, at, where, seed)


PRUNERS = Registry("pruner", {"threshold_l2": ThresholdL2, "dynamicvit": DynamicViT, "evit": EViT, "ats": ATS})


def _stages(at: int | Iterable[int]) -> tuple[int, ...]:
    try:
        stages = (at,) if isinstance(at, Integral) else tuple(operator.index(i) for i in at)
    except TypeError:
        raise TypeError(f"at: expected a block index or several, got {at!r}") from None
    if not stages or min(stages) < 0 or list(stages) != sorted(set(stages)):
        raise ValueError(f"at: expected rising block indices >= 0, got {at!r}")
    return stages


def _ratio(keep: float) -> float:
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0.0 < keep <= 1.0:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep!r}")
    return float(keep)


def _positive(x: float, name: str) -> float:
    if isinstance(x, bool) or not isinstance(x, Real) or not 0.0 < x < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {x!r}")
    return float(x)


def _positive_int(x: int, name: str) -> int:
    if isinstance(x, bool) or not isinstance(x, Integral) or x < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {x!r}")
    return int(x)
