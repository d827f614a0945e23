"""Verdicts: each can turn, every claim has a family, and an objection is judged on every batch."""

import math

import pytest

from ragged import data
from ragged.bench.claims import Claim, all_claims
from ragged.bench.paper import NAN, Rows
from ragged.bench.verdicts import (
    BASELINE,
    EVERYWHERE,
    GROUPS,
    IN_KIND,
    NOT_HERE,
    NOWHERE,
    SETUP,
    SOMEWHERE,
    STANDS,
    UNTESTED,
    VERDICTS,
    Objection,
    by_family,
    judged,
    objections,
    settle,
    verdict,
)


@pytest.fixture(scope="module")
def ours():
    return Rows(data.results(gpu="NVIDIA H200"))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("gain", 2.0, 1.9, 1.6), STANDS),
        (("gain", 2.0, 1.9, 1.6, "baseline", 1.5), IN_KIND),  # more was claimed than the arithmetic allows
        (("gain", 2.0, 1.9, 1.3, "baseline", 1.5), IN_KIND),  # and is held against what it allows
        (("gain", 2.0, 1.9, 1.2, "mode", 1.5), SETUP),
        (("gain", 2.0, 1.2, 1.2, "mode", 1.5), NOT_HERE),
        (("gain", 2.0, 1.9, NAN, "mode", 1.5), UNTESTED),
        (("gain", 1.5, 1.9, 1.6, "baseline", 1.5), STANDS),
        (("gain", 2.0, 1.9, 1.1), BASELINE),
        (("gain", 2.0, 1.9, 1.1, "mode"), SETUP),  # no baseline was changed, so none is to blame
        (("gain", 2.0, 1.1, 1.1), NOT_HERE),
        (("gain", 0.6, 1.1, 1.3), NOT_HERE),
        (("gain", 0.6, 0.6, 0.7), STANDS),
        (("gain", 2.0, NAN, 1.1), NOT_HERE),
        (("gain", 2.0, 1.9, NAN), UNTESTED),
        (("equal", 1.0, 1.2, 1.04), STANDS),
        (("equal", 1.0, 1.0, 1.06, "clock"), SETUP),
        (("bound", 0.01, 0.009, 0.02, "networks"), SETUP),
        (("least", 1.0, 0.99, 0.99, "networks"), NOT_HERE),
        (("least", 1.0, 0.99, 1.0, "networks"), STANDS),
    ],
)
def test_each_verdict_can_turn(arguments, expected):
    assert verdict(*arguments) == expected


def test_every_claim_has_a_family_and_is_counted_once(ours):
    claims = all_claims()
    assert {c.group for c in claims} == {*GROUPS}
    frame = judged(claims, ours)
    assert by_family(frame).to_numpy().sum() == len(claims) and set(frame["verdict"]) <= {*VERDICTS}


def test_a_claim_above_the_arithmetic_stands_in_kind_alone(ours):
    frame = judged(all_claims(), ours).set_index("claim")
    over = frame[frame["claimed"] > 1.05 * frame["ceiling"]]
    assert set(over.index) == {"v2 over unpruned, 50% pruned", "v2 over unpruned, 90% pruned"}
    assert set(over["verdict"]) == {IN_KIND}
    assert (frame["verdict"] == BASELINE)[frame["family"] == "shares of overhead"].sum() == 0


def test_a_claim_says_whether_it_rests_on_a_disturbed_row(ours):
    frame = judged(all_claims(), ours).set_index("claim")["disturbed"]
    assert frame["FA2 / kernel call, 80 % pruned"] and not frame["packing: loop / kernel, v2"]
    assert not frame["evit over unpruned, 50% pruned"] and frame.dtype == bool


def test_logits_and_classes_are_of_the_same_networks():
    asked = []

    class Asked(Rows):
        def __init__(self):
            pass

        def values(self, metric, **columns):
            asked.append(columns["model"])
            return []

    for claim in all_claims():
        if claim.group in ("logits", "same class"):
            assert math.isnan(claim.paper_setup(Asked())) and math.isnan(claim.fair(Asked()))
    assert asked[:2] == asked[2:] and len(asked) == 4


def test_a_batch_that_stands_in_is_marked(ours):
    one = Claim("x", "gain", 2.0, lambda r: 2.0, lambda r: 2.0, "over FA2", asked=512)
    assert one.substituted(ours) == ours.near(512) != 512
    assert one._replace(asked=32, at=64).substituted(ours) == 64
    named = {c.claim: c.substituted(ours) for c in all_claims()}
    assert named["v2 over unpruned, 90% pruned"] == 64 and named["model over padded, batch 512"] == 256
    assert named["packing: loop / kernel, v2"] == 16 and math.isnan(named["evit over unpruned, 50% pruned"])
    for asked in (64.0, NAN):
        assert math.isnan(one._replace(asked=asked).substituted(ours))


@pytest.mark.parametrize(
    "ratios, alike, expected",
    [
        ({4: 1.5, 64: 1.2}, False, EVERYWHERE), ({4: 1.5, 64: 1.02}, False, SOMEWHERE),
        ({4: 1.0, 64: 0.9}, False, NOWHERE), ({4: 1.0, 64: 1.05}, True, EVERYWHERE),
        ({4: 1.0, 64: 1.2}, True, SOMEWHERE), ({4: 1.2, 64: NAN}, True, NOWHERE),
        ({4: NAN}, False, UNTESTED),
    ],
)  # fmt: skip
def test_an_objection_is_judged_on_every_batch(ours, ratios, alike, expected):
    found, seen = settle(Objection("x", "y", lambda r, b: ratios.get(b, NAN), (4, 64), alike), ours)
    assert found == expected and len(seen) == sum(ratio == ratio for ratio in ratios.values())


def test_the_eager_baseline_matters_at_small_batches_only(ours):
    by_number = {objection.text[0]: settle(objection, ours) for objection in objections()}
    assert set(by_number) == set("123456") and all(outcome != UNTESTED for outcome, _ in by_number.values())
    assert by_number["4"][0] == SOMEWHERE


def altered(where, factor):
    """Rows of the H200 in which what `where` selects is multiplied."""
    frame = data.results(gpu="NVIDIA H200")
    chosen = where(frame)
    scaled = {column: frame[column].where(~chosen, frame[column] * factor) for column in ("value", "q20", "q80")}
    return Rows(frame.assign(**scaled))


@pytest.fixture(scope="module")
def worlds(ours):
    """Recordings as they might have been: the kernel, or its rivals, so many times slower or faster, other answers."""
    found = {"recorded": ours}
    times = lambda f: f["metric"].str.endswith("_us") & ~f["backend"].str.startswith("paper_padded")  # noqa: E731
    ragged_models = lambda f: f["backend"].isin(["paper_triton", "triton"]) & (f["metric"] == "images_per_s")  # noqa: E731
    gpu, fa2 = (lambda f: f["metric"] == "gpu_us"), (lambda f: f["backend"] == "flash_attn")
    kernel = lambda f: f["backend"].str.startswith("paper_triton")  # noqa: E731
    cases = {
        (0.05, 5.0): lambda f: times(f) & kernel(f), (0.04, 1.2): lambda f: gpu(f) & kernel(f),
        (0.05,): lambda f: gpu(f) & fa2(f), (5.0,): lambda f: gpu(f) & fa2(f) & (f["tokens"] == "99"),
        (4.0,): lambda f: f["metric"].isin(["host_us", "wall_us"]) & fa2(f) & (f["tokens"] == "39"),
        (6.0,): lambda f: times(f) & (f["backend"] == "nested"),
        (0.2, 1.1, 5.1): lambda f: ragged_models(f) & (f["mode"] != "eager"),
        (0.3, 1.1, 5.2): lambda f: ragged_models(f) & (f["mode"] == "eager"),
        (0.25,): lambda f: ragged_models(f),
        (0.15,): lambda f: (f["backend"] == "sdpa_padded") & (f["metric"] == "images_per_s"),
        (7.0,): lambda f: (f["suite"] == "pack") & (f["backend"] == "mask_indexing"),
        (0.1, 8.0): lambda f: f["metric"] == "max_abs_logit_diff",
    }  # fmt: skip
    for factors, where in cases.items():
        for factor in factors:
            found[factors, factor] = altered(where, factor)
    agreed = lambda f: (f["metric"] == "top1_agreement") & (f["value"] < 1)  # noqa: E731
    frame = data.results(gpu="NVIDIA H200")
    found["all agree"] = Rows(frame.assign(value=frame["value"].where(~agreed(frame), 1.0)))
    found["nothing"] = Rows(frame[:0])
    return found


@pytest.mark.slow
def test_the_verdict_on_every_claim_can_turn(worlds):
    """Another recording would have got another verdict: none follows from how the claim is written down."""
    claims = [claim for claim in all_claims() if claim.group != "accuracy"]  # which nothing recorded answers
    frames = {name: judged(claims, rows).set_index("claim")["verdict"] for name, rows in worlds.items()}
    assert set(frames.pop("nothing")) == {UNTESTED}
    for claim in claims:
        seen = {frame[claim.claim] for frame in frames.values()}
        assert len(seen) >= 2, f"{claim.claim}: {seen} whatever is recorded"
    assert {*VERDICTS} - {UNTESTED} <= {verdict for frame in frames.values() for verdict in frame}


@pytest.mark.slow
def test_the_outcome_of_every_objection_can_turn(worlds):
    for objection in objections()[:3]:
        seen = {settle(objection, rows)[0] for rows in worlds.values()}
        assert UNTESTED in seen and len(seen) >= 3, f"{objection.text}: {seen}"
