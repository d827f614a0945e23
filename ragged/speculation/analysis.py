"""What the recordings say: acceptance by domain, depth and rank, beside the measure of arXiv 2604.14682.

Every figure here is made of sums over prompts. So a resample of the prompts is a row of weights, and a thousand of them
are one matrix product: `Sample.total`. Prompts are drawn, never nodes, since nodes of one prompt are alike.

The paper's measure of a node is min(1, p / q), whether or not the text ever got there. What happens is `accepted`,
among nodes whose parent is accepted (`reached`). Both are columns here: `paper` and `accepted`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..checks import check_int
from ..data import data_dir, read_csv

if TYPE_CHECKING:
    import pandas as pd

DOMAINS = ("code", "math", "logic", "chat")
NAN = float("nan")


def folder() -> Path:
    """Where the bundled recordings lie."""
    return data_dir() / "results" / "speculation"


def recorded(draft: str, mode: str, where: Path | None = None) -> pd.DataFrame:
    """The rows that were recorded with `draft`, such as "skip", in `mode`, "greedy" or "sampled", and the paper's
    measure as column `paper`. where: a folder, by default the bundled one. FileNotFoundError where there are none."""
    import pandas

    path = (where or folder()) / f"{draft}_{mode}.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(f"no such recording: {path}; `python -m ragged.speculation record` makes one")
    frame = pandas.read_csv(path)
    return frame.assign(paper=(frame["target_prob"] / frame["draft_prob"]).clip(upper=1))


def facts(where: Path | None = None) -> dict[str, dict]:
    """How each recording was made, by its name. where: a folder, by default the bundled one."""
    return json.loads(((where or folder()) / "record.json").read_text(encoding="utf-8"))


def paper() -> dict[tuple[str, str], float]:
    """The figures that the paper reports, by (metric, domain)."""
    rows = read_csv(data_dir() / "speculation" / "paper.csv", ("metric", "domain", "value"))
    return {(row["metric"], row["domain"]): float(row["value"]) for row in rows}


class Sample:
    """The rows `frame` of a recording, and `resamples` draws of its prompts with return, each domain's for itself, from
    `seed`. What the methods return is an array: the value itself, then its value in every resample."""

    def __init__(self, frame: pd.DataFrame, resamples: int = 1000, seed: int = 0):
        check_int("resamples", resamples, 1)
        self.frame, rng = frame, np.random.default_rng(seed)
        numbers, self.prompt = np.unique(frame["prompt"], return_inverse=True)
        domains = frame.groupby("prompt")["domain"].first().loc[numbers].to_numpy()
        self.weights = np.ones((resamples + 1, len(numbers)))
        for domain in np.unique(domains):
            own = domains == domain
            self.weights[1:, own] = rng.multinomial(own.sum(), np.full(own.sum(), 1 / own.sum()), resamples)

    def where(self, **columns: object) -> np.ndarray:
        """bool (rows,): which rows have these values in these columns."""
        found = np.ones(len(self.frame), bool)
        for name, value in columns.items():
            found &= (self.frame[name] == value).to_numpy()
        return found

    def total(self, values: np.ndarray | float, where: np.ndarray) -> np.ndarray:
        """Sums of `values`, one a row or one for all, over the rows in `where`."""
        return self.weights @ np.bincount(self.prompt, where * np.asarray(values, float), self.weights.shape[1])

    def mean(self, column: str, where: np.ndarray) -> np.ndarray:
        """Means of a `column` over the rows in `where`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total(self.frame[column].to_numpy(), where) / self.total(1, where)

    def measured(self, measure: str, **columns: object) -> np.ndarray:
        """Means of a `measure`: "accepted" over reached nodes, others over all; columns as of `where`."""
        return self.mean(measure, self.where(**columns, **({"reached": 1} if measure == "accepted" else {})))

    def length(self, **columns: object) -> np.ndarray:
        """Accepted guesses a step, where `columns` have these values."""
        first = self.where(**columns, node=1)
        return self.total(self.frame["accepted"].to_numpy(), self.where(**columns)) / self.total(1, first)

    def paper_length(self, **columns: object) -> np.ndarray:
        """The paper's expected length: the means of its measure, multiplied from depth to depth, and added up."""
        depths = sorted(set(self.frame["depth"]))
        means = [self.mean("paper", self.where(**columns, depth=depth)) for depth in depths]
        return np.cumprod(means, axis=0).sum(0)

    def correlation(self, x: str, y: str, where: np.ndarray, ranks: bool = True) -> np.ndarray:
        """Spearman's correlation of two columns over the rows in `where`; without `ranks`, Pearson's. A resample counts
        the ranks that rows have among all."""
        a, b = (self.frame[name][where].rank() if ranks else self.frame[name][where] for name in (x, y))
        columns = np.zeros((2, len(self.frame)))
        columns[:, where] = [a - a.mean(), b - b.mean()]
        a, b = columns
        n, *sums = (self.total(values, where) for values in (1, a, b, a * a, b * b, a * b))
        a, b, aa, bb, ab = (s / n for s in sums)
        return (ab - a * b) / np.sqrt((aa - a * a) * (bb - b * b))

    def explained(self, column: str, by: str, where: np.ndarray) -> np.ndarray:
        """eta²: the share of the variance of a `column`, over the rows in `where`, that lies between the values of the
        column `by`."""
        y = self.frame[column].to_numpy()
        middle, n = self.mean(column, where), self.total(1, where)
        between = 0.0
        for value in np.unique(self.frame[by]):
            own = where & self.where(**{by: value})
            between = between + self.total(1, own) * (self.mean(column, own) - middle) ** 2
        return between / (self.total(y * y, where) - n * middle**2)


def interval(values: np.ndarray) -> dict[str, float]:
    """value, low and high: the first of values, and the 95 % interval of the others."""
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def by_domain(sample: Sample, **about: object) -> pd.DataFrame:
    """One row a domain and measure, with value, low, high and `about`: "paper" and "accepted" (means), "overlap" of
    first guesses that were reached, "length" and "paper length" (guesses a step), "target entropy" (nats, a step)."""
    import pandas

    found = []
    for domain in DOMAINS:
        first = {"domain": domain, "reached": 1, "rank": 1}
        every = {
            "paper": sample.measured("paper", domain=domain), "accepted": sample.measured("accepted", domain=domain),
            "overlap": sample.mean("overlap", sample.where(**first)), "length": sample.length(domain=domain),
            "paper length": sample.paper_length(domain=domain),
            "target entropy": sample.mean("target_entropy", sample.where(domain=domain, node=1)),
        }  # fmt: skip
        found += [about | {"domain": domain, "measure": name} | interval(x) for name, x in every.items()]
    return pandas.DataFrame(found)


def profile(sample: Sample, by: str, **about: object) -> pd.DataFrame:
    """One row a value of the column `by`, "depth" or "rank", and measure, "paper" or "accepted", with value, low, high
    and `about`."""
    import pandas

    return pandas.DataFrame([
        about | {"by": by, "at": int(at), "measure": name} | interval(sample.measured(name, **{by: at}))
        for at in sorted(set(sample.frame[by])) for name in ("paper", "accepted")
    ])  # fmt: skip


def break_even(costs: dict[str, float], clock: str = "gpu") -> dict[str, float]:
    """How many guesses a step must be accepted, on average, for speculation to be no slower than plain decoding.

    costs: µs, as `record.costs` measures them.  clock: "gpu" or "wall". "paper": L = c D, where checking a tree costs
    as much as a token; "real": L = (guess + tree) / step - 1.
    """
    step, tree, guess = (costs[f"{name}_{clock}_us"] for name in ("step", "tree", "guess"))
    return {"paper": guess / step, "real": (guess + tree) / step - 1}


class Claim(NamedTuple):
    """A claim of the paper's as one number: its name, its kind (as in the rule of notebook 08: gain, bound or least),
    the paper's figure, and functions of a `Sample`: by the paper's measure, and by what happened."""

    name: str
    kind: str
    claimed: float
    paper_setup: Callable[[Sample], np.ndarray]
    fair: Callable[[Sample], np.ndarray]


def all_claims() -> list[Claim]:
    """The claims of arXiv 2604.14682, each with its counterpart by the paper's measure and by real acceptance."""
    said = paper()

    def ratio(a: str, b: tuple[str, ...], value: Callable) -> Callable[[Sample], np.ndarray]:
        return lambda s: value(s, a) / np.mean([value(s, d) for d in b], axis=0)

    def most(value: Callable) -> Callable[[Sample], np.ndarray]:
        return lambda s: value(s, "chat") / np.max([value(s, d) for d in DOMAINS[:3]], axis=0)

    def paper_mean(s, d):
        return s.measured("paper", domain=d)

    def accepted(s, d):
        return s.measured("accepted", domain=d)

    def entropy(s, d):
        return s.mean("target_entropy", s.where(domain=d, node=1))

    found = []
    for a, b in (("chat", DOMAINS[:3]), ("chat", ("math",)), ("code", ("math",)), ("logic", ("math",))):
        claimed = said["acceptance", a] / np.mean([said["acceptance", d] for d in b])
        name = f"acceptance, {a} over {b[0] if len(b) == 1 else 'the others'}"
        found.append(Claim(name, "gain", claimed, ratio(a, b, paper_mean), ratio(a, b, accepted)))
    lengths = (lambda s, d: s.paper_length(domain=d)), (lambda s, d: s.length(domain=d))
    claimed = said["expected_length", "chat"] / said["expected_length", "math"]
    found.append(Claim("expected length, chat over math", "gain", claimed,
                       *(ratio("chat", ("math",), x) for x in lengths)))  # fmt: skip
    found.append(Claim("chat has the highest entropy", "least", 1.0, most(entropy), most(entropy)))
    found.append(Claim("chat has the highest acceptance", "least", 1.0, most(paper_mean), most(accepted)))
    found.append(Claim("domain explains more than depth", "least", 1.0,
                       lambda s: _explained(s, "paper", s.where()),
                       lambda s: _explained(s, "accepted", s.where(reached=1))))  # fmt: skip
    for name, kind, end in (("entropy lowers acceptance", "bound", "high"), ("... but weakly", "least", "low")):
        found.append(Claim(name, kind, said["entropy_rho", end],
                           lambda s: s.correlation("target_entropy", "paper", s.where()),
                           _real_correlation))  # fmt: skip
    return found


def _real_correlation(s: Sample) -> np.ndarray:
    return s.correlation("target_entropy", "overlap", s.where(rank=1, reached=1))


def _explained(s: Sample, column: str, where: np.ndarray) -> np.ndarray:
    return s.explained(column, "domain", where) / s.explained(column, "depth", where)
