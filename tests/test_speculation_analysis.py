"""The analysis of recorded speculation: against pandas and SciPy, and on numbers that are known."""

import csv

import numpy as np
import pytest

from ragged import data
from ragged.speculation import analysis


@pytest.fixture
def made():
    """80 prompts, of which the domain decides how much is accepted."""
    import pandas

    rng, rows = np.random.default_rng(0), []
    for prompt in range(80):
        domain = analysis.DOMAINS[prompt % 4]
        for step in range(6):
            for node in (1, 2):
                entropy, accepted = rng.uniform(0, 3), int(rng.random() < 0.2 * (prompt % 4 + 1))
                rows.append((domain, prompt, step, node, node, 1, entropy, -entropy, accepted, 1))
    names = "domain prompt step node depth rank target_entropy overlap accepted reached".split()
    return pandas.DataFrame(rows, columns=names).assign(paper=0.5)


def test_the_analysis_agrees_with_pandas_and_scipy(made):
    stats = pytest.importorskip("scipy.stats")
    sample = analysis.Sample(made, 200)
    for domain in analysis.DOMAINS:
        own = made[made["domain"] == domain]
        assert np.isclose(sample.measured("accepted", domain=domain)[0], own["accepted"].mean())
        assert np.isclose(sample.length(domain=domain)[0], own.groupby(["prompt", "step"])["accepted"].sum().mean())
    every = sample.where()
    rho = stats.spearmanr(made["target_entropy"], made["accepted"]).statistic
    assert np.isclose(sample.correlation("target_entropy", "accepted", every)[0], rho)
    r = stats.pearsonr(made["target_entropy"], made["accepted"]).statistic
    assert np.isclose(sample.correlation("target_entropy", "accepted", every, ranks=False)[0], r)
    means = made.groupby("domain")["accepted"].transform("mean")
    eta = ((means - made["accepted"].mean()) ** 2).sum() / ((made["accepted"] - made["accepted"].mean()) ** 2).sum()
    assert np.isclose(sample.explained("accepted", "domain", every)[0], eta)
    assert np.isclose(sample.correlation("target_entropy", "overlap", every)[0], -1)
    assert np.allclose(sample.paper_length(), 0.5 + 0.25)


def test_intervals_are_of_prompts(made):
    """Ten copies of every node teach nothing new, and must not shorten an interval."""
    import pandas

    once = analysis.interval(analysis.Sample(made, 400).measured("accepted"))
    copies = analysis.interval(analysis.Sample(pandas.concat([made] * 10), 400).measured("accepted"))
    assert once == pytest.approx(copies)
    assert once["low"] < once["value"] < once["high"]


def test_break_even():
    costs = {"step_gpu_us": 100.0, "tree_gpu_us": 150.0, "guess_gpu_us": 80.0}
    assert analysis.break_even(costs) == pytest.approx({"paper": 0.8, "real": 1.3})


def test_claims_cover_what_the_paper_reports():
    claims = analysis.all_claims()
    assert len({claim.name for claim in claims}) == len(claims) == 10
    with (data.data_dir() / "speculation" / "paper.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(analysis.paper()) == 10
