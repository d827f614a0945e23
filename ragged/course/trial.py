"""The contestants of lesson 09's project, on one network and one batch: recorded as rows, and raced round by round."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from .. import data
from ..bench import races
from ..bench.pipelines import METRICS, Pipeline, Workbench
from ..bench.runner import Candidate, Case, Recorder
from ..model import RaggedViT
from ..pruners import Pruner

if TYPE_CHECKING:
    import pandas as pd

SUITE = "your_turn"


class Entrant(NamedTuple):
    """A contestant. who: name of its pruner.  make: () -> a new pruner, or None for the unpruned network.  tokens: its
    setting, in a word.  keep: the share that stays, NaN where counts vary.  backend: a name of `BACKENDS`, or
    "unpruned"."""

    who: str
    make: Callable[[], Pruner] | None
    tokens: str
    keep: float
    backend: str


class Trial:
    """A network, its batches, and what was measured of its contestants.

    name: of the network, for the rows.  vit: a plain timm Vision Transformer.  batches: float (batch, 3, height,
    width) each, on its device; one or more.  out: folder for the rows.  repeats: rounds of the recorder.
    """

    def __init__(self, name: str, vit: nn.Module, batches: Sequence[Tensor], out: str | Path, repeats: int = 3):
        images = batches[0]
        self.vit, self.images, self.out = vit, images, Path(out)
        self.bench = Workbench(name, len(images), images.dtype, images.device.type)
        self.bench.vit, self.bench.exact = vit, copy.deepcopy(vit).float()
        self.bench.images = list(batches)
        self.recorder = Recorder(self.out, repeats=repeats, slice_us=1000, redo=True)
        self.columns = dict(suite=SUITE, model=name, batch=len(images),
                            dtype=str(images.dtype).removeprefix("torch."))  # fmt: skip
        self.rows: pd.DataFrame | None = None

    def record(self, entrants: Mapping[str, Entrant], mode: str = "eager") -> pd.DataFrame:
        """Check and measure all entrants in turn, write their rows, and return all rows so far, with a column
        `disturbed`. mode: eager, graph or compile+graph."""
        found = []
        for one in entrants.values():
            pipeline = Pipeline(lambda: self.bench, one.make, one.backend, mode)
            columns = dict(pruner=one.who, backend=one.backend, mode=mode, tokens=one.tokens, keep=one.keep)
            found.append(Candidate(columns, pipeline.build, METRICS, pipeline.values))
        self.recorder.run(Case(self.columns, found))
        rows = data.results(SUITE, self.recorder.machine["gpu"], self.out)
        self.rows = rows.assign(disturbed=data.disturbed(rows))
        return self.rows

    def value(self, metric: str, entrant: Entrant, mode: str = "eager") -> float:
        """One recorded value, times in ms; a `data.Disturbed` where the row is. LookupError if there is none."""
        rows = self.rows
        if rows is None:
            raise LookupError("rows: nothing is recorded yet; call record() first")
        found = rows[(rows["metric"] == metric) & (rows["pruner"] == entrant.who) & (rows["mode"] == mode)
                     & (rows["tokens"] == entrant.tokens) & (rows["backend"] == entrant.backend)]  # fmt: skip
        if found.empty:
            raise LookupError(f"entrant: no row of {metric} for {entrant.who}, {entrant.tokens}, {entrant.backend}")
        one = found.iloc[0]
        return data.noted(one["value"] / (1e3 if metric.endswith("_us") else 1), bool(one["disturbed"]))

    def race(self, entrants: Mapping[str, Entrant], rounds: int) -> dict[str, list[float]]:
        """µs of every entrant in every round, eager, on the first batch."""
        calls = {}
        for label, one in entrants.items():
            model = RaggedViT(self.vit) if one.make is None else RaggedViT(self.vit, one.make(), one.backend)
            calls[label] = functools.partial(model, self.images)
        return races.race(calls, rounds)
