"""The calculator: exact where times follow its rule, honest about its error where they do not, refused elsewhere."""

import math

import numpy as np
import pytest

pytest.importorskip("pandas")

import figure_frames as frames
import pandas

from ragged import data
from ragged.bench import forecast as f

FIXED, SLOPE, HOST = 400.0, 2.0, {"eager": 3000.0, "compile+graph": 50.0}
TOKENS = {"threshold_l2": "99", f.RAGGED: "U(30,168)", "none": "197", "evit": "100", "ats": "samples=98"}
PIPES = [("none", "unpruned"), ("threshold_l2", "dense"), *((p, b) for p in ("threshold_l2", f.RAGGED)
                                                           for b in ("sdpa_padded", "triton"))]  # fmt: skip


def invented(slower=1.0, model="deit_small", batches=(1, 16, 64), suite="model", pipes=PIPES, waits=0.0):
    """Rows whose times follow the calculator's own rule; packed ragged passes take `slower` times as long."""
    records = []
    for (pruner, backend), mode, batch in ((p, m, b) for p in pipes for m in f.MODES for b in batches):
        kind = "threshold_l2" if pruner in ("none", f.RAGGED) else pruner
        counts = f.counts_after(0.5, 0.7 if pruner == f.RAGGED else 0, batch, kind)
        counts = [197] * batch if pruner == "none" else counts
        counts = [max(counts)] * batch if backend == "sdpa_padded" else counts
        host = HOST[mode] + 10 * (backend != "unpruned") + 200 * (pruner == "evit")
        gpu = FIXED + SLOPE * f.model_flops(counts, f.WIDTHS[model]) / 1e9
        us = max(host, gpu) * (slower if (pruner, backend) == (f.RAGGED, "triton") else 1)
        values = {"host_us": host, "gpu_us": gpu, "images_per_s": 1e6 * batch / us, "syncs": waits}
        records += [dict(suite=suite, model=model, pruner=pruner, backend=backend, mode=mode, batch=float(batch),
                         tokens=TOKENS[pruner], keep=1.0 if pruner == "none" else 0.5, metric=metric, value=value,
                         q20=value, q80=value) for metric, value in values.items()]  # fmt: skip
    return frames.rows(records)


def test_times_that_follow_the_rule_are_forecast_exactly():
    rows = invented()
    assert f.constants(rows, "deit_small", "eager") == pytest.approx((FIXED, SLOPE))
    cells = f.misses(rows)
    assert len(cells) == 5 * 2 * 3 and np.allclose(cells["recorded"], cells["expected"])
    for spread, pipelines in ((0, list(f.PIPELINES)), (0.7, ["sdpa_padded", "triton"])):
        answer = f.forecast(rows, "deit_small", 64, 0.5, spread)
        assert list(answer["backend"]) == 2 * pipelines and (answer["cells"] == 3).all()
        for column in ("low", "high", "recorded"):
            assert np.allclose(answer[column], answer["expected"]), column
        assert (answer["expected"] <= answer["ceiling"] + 1e-9).all()


def test_the_error_is_that_of_the_pipeline_and_the_lengths():
    answer = f.forecast(invented(slower=1.25), "deit_small", 64, 0.5, 0.3).set_index(["backend", "mode"])
    assert answer.loc[("triton", "eager"), "low"] == pytest.approx(0.8 * answer.loc[("triton", "eager"), "expected"])
    padded = answer.loc[("sdpa_padded", "eager")]
    assert padded["low"] == pytest.approx(padded["expected"]), "another pipeline's error is not pooled with it"
    assert answer["recorded"].isna().all(), "a spread of 0.3 is not recorded"
    equal = f.forecast(invented(slower=1.25), "deit_small", 64, 0.5, 0)
    assert np.allclose(equal["low"], equal["expected"])


def test_a_pruner_of_another_network_brings_its_launches():
    """EViT's host time is recorded with DeiT-B alone: its distance to Threshold-L2 is added to DeiT-S's floor."""
    other = invented(model="deit_base", suite="sparsity", batches=(64,), pipes=[
        ("none", "unpruned"), ("threshold_l2", "triton"), ("evit", "triton")])  # fmt: skip
    rows = pandas.concat([invented(), invented(model="deit_base"), other], ignore_index=True)
    assert f.host_floor(rows, "deit_small", 4, "eager", "triton", "evit") == pytest.approx(HOST["eager"] + 210)
    answer = f.forecast(rows, "deit_small", 1, 0.5, 0.7, "evit")
    assert (answer["spread"] == 0).all() and (answer[answer["backend"] != "triton"]["cells"] == 0).all()
    assert answer[answer["backend"] != "triton"][["low", "high"]].isna().all(axis=None)


def test_a_wait_for_the_gpu_is_no_floor():
    waiting = invented(suite="sparsity", batches=(64,), pipes=[("none", "unpruned"), ("threshold_l2", "triton"),
                                                               ("ats", "triton")], waits=1.0)  # fmt: skip
    rows = pandas.concat([invented(), invented(model="deit_base"), waiting], ignore_index=True)
    assert f.host_floor(rows, "deit_small", 64, "eager", "triton", "ats") == pytest.approx(HOST["eager"] + 10)
    for model, batch in (("deit_small", 16), ("deit_base", 64)):
        with pytest.raises(ValueError, match="waits for the GPU in mid-pass"):
            f.host_floor(rows, model, batch, "eager", "triton", "ats")


@pytest.mark.parametrize("setting, said", [
    (dict(keep=0), "keep: expected a share above 0"), (dict(keep=math.nan), "keep: expected"),
    (dict(spread=1.5), "spread: expected a share"), (dict(batch=0), "batch"),
    (dict(pruner="none"), "pruner: expected one of threshold_l2"), (dict(model="vit"), "model: expected one of"),
    (dict(model="deit_tiny"), "at two batches at least; there are 0"), (dict(pruner="evit"), "no host_us of dense"),
])  # fmt: skip
def test_what_cannot_be_calculated_is_refused(setting, said):
    asked = dict(model="deit_small", batch=4, keep=0.5) | setting
    with pytest.raises(ValueError, match=said):
        f.forecast(invented(), **asked)


@pytest.mark.parametrize("pruner, keep, rows", [
    ("threshold_l2", 0.5, 99), ("threshold_l2", 1.0, 197), ("dynamicvit", 0.3, 59), ("evit", 0.5, 100),
    ("evit", 1.0, 197), ("evit", 0.3, 61),
])  # fmt: skip
def test_counts_are_those_of_the_rules(pruner, keep, rows):
    assert f.counts_after(keep, 0, 3, pruner) == [rows] * 3


def test_the_recorded_distribution_is_one_of_them():
    assert f.counts_after(0.5, 0.7, 8) == data.lengths("U(30,168)", 8)
    assert len(set(f.counts_after(0.5, 0.7, 8, "evit"))) == 1


RECORDED = [gpu for gpu in ("NVIDIA H200", "NVIDIA H100") if len(data.results("model", gpu))]


@pytest.mark.parametrize("gpu", RECORDED)
def test_the_ceiling_is_the_one_that_was_recorded(gpu):
    rows = data.results("sparsity", gpu)
    rows = rows[(rows["metric"] == "flops_ratio") & (rows["status"] == "ok") & rows["pruner"].isin(f.PRUNERS[:3])]
    for c in rows.itertuples():
        counts, dim = f.counts_after(c.keep, 0, 1, c.pruner), f.WIDTHS[c.model]
        assert f.model_flops([197], dim) / f.model_flops(counts, dim) == pytest.approx(c.value, rel=2e-3)


@pytest.mark.parametrize("gpu", RECORDED)
def test_every_setting_has_an_answer_or_a_reason(gpu):
    """Of all that the lesson's menus offer."""
    plots = pytest.importorskip("ragged.plots")
    rows = pandas.concat([data.results(suite, gpu) for suite in ("model", "sparsity")], ignore_index=True)
    drawn = 0
    for model, pruner, spread in ((m, p, s) for m in f.WIDTHS for p in f.PRUNERS for s in (0, 0.7)):
        try:
            answer = f.forecast(rows, model, 64, 0.5, spread, pruner)
        except ValueError as error:
            assert str(error).startswith("rows: ")
            continue
        assert (answer["expected"] > 0).all() and gpu in plots.forecast(answer).layout.title.subtitle.text
        drawn += 1
    assert drawn


def test_the_figure_shows_error_ceiling_and_what_was_recorded():
    plots = pytest.importorskip("ragged.plots")
    figure = plots.forecast(f.forecast(invented(slower=1.25), "deit_small", 64, 0.5, 0.7))
    expected, recorded, ceiling = figure.data
    assert recorded.name == "recorded, this very setting" and len(recorded.x) == 4
    assert expected.error_x.arrayminus[0] > 0.1 > expected.error_x.array[0], "the packed one was slower than forecast"
    assert "spread 0.7" in figure.layout.title.subtitle.text and "DeiT-S, batch 64" in figure.layout.title.text
    assert any(s.x0 == pytest.approx(1.4, abs=0.2) and s.line.dash == "dot" for s in figure.layout.shapes)
    assert len(plots.forecast(f.forecast(invented(), "deit_small", 16, 0.3)).data) == 2, "nothing recorded, no diamond"
    with pytest.raises(ValueError, match="lacks the columns"):
        plots.forecast(invented())
