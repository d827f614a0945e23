"""Recorded rows as the tables of lessons 07, 08 and 10, and the contestants of lesson 09."""

import math

import figure_frames as frames
import pandas
import pytest
import torch

from ragged import PRUNERS, course, data, load_deit
from ragged.bench.paper import Rows
from ragged.course import paper_tables, records
from ragged.course.trial import Entrant, Trial

NETWORK = "deit_tiny_digits_labels"


def seeds(**shares):
    """Rows of suite seeds: shares[pruner] holds a share for every seed, at keep 0.5."""
    rows = []
    for pruner, values in shares.items():
        for seed, share in enumerate(values):
            own = dict(suite="seeds", model=f"{NETWORK} seed {seed}", pruner=pruner, backend="auto", mode="eager",
                       batch=250.0, tokens="unpruned" if pruner == "none" else "single cut",
                       keep=1.0 if pruner == "none" else 0.5)  # fmt: skip
            rows += [own | dict(metric="top1", value=share), own | dict(metric="images", value=2000.0)]
    return frames.rows(rows)


def test_seeds_are_held_against_their_own_random_choice():
    rows = seeds(none=[0.9, 0.4], evit=[0.6, 0.1], random=[0.5, 0.3], threshold_l2=[0.8, 0.35])
    found = records.seeds_of(rows, NETWORK)
    lines = records.beside_random(found, keeps=(0.5,))
    assert lines == [{"pruner": "threshold_l2", "keep 0.5": "+ +"}, {"pruner": "evit", "keep 0.5": "+ −"}]
    said = records.agreed(lines)
    assert "above random choice with every seed: threshold_l2 at 0.5" in said and "disagree: evit at 0.5" in said
    assert "below" not in said


def test_what_cannot_be_told_apart_is_not_ranked():
    found = records.seeds_of(seeds(evit=[0.505, 0.495], random=[0.5, 0.5]), NETWORK)
    (line,) = records.beside_random(found, keeps=(0.5, 0.7))
    assert line == {"pruner": "evit", "keep 0.5": "· ·"}, "and a rate without rows has no column"
    assert records.agreed([line]) == "not told apart from it with any seed: evit at 0.5"


def test_rows_of_the_bundled_network_are_seed_0():
    rows = seeds(evit=[0.5], random=[0.4])
    accuracy = rows.assign(suite="accuracy", model=NETWORK)
    found = records.seeds_of(pandas.concat([accuracy, rows.assign(model=f"{NETWORK} seed 3")]), NETWORK)
    assert sorted(set(found["seed"])) == [0, 3]


def test_the_recorded_rows_fill_the_tables():
    rows, networks = data.results("accuracy"), {"labels": NETWORK}
    assert {line["pruner"] for line in records.top1(rows, networks)} == set(records.FIXED)
    assert all(line["taught"] == "labels" for line in records.size_correlations(
        rows[rows["model"] == NETWORK], networks))  # fmt: skip
    assert all("(" in line["after"] for line in records.finetuned(data.results("finetune")))


def backward_rows():
    rows = []
    for backend, us in (("triton", 30.0), ("torch_varlen", 60.0), ("sdpa_padded", 90.0)):
        for mode, value in (("backward", us), ("eager", us + 10.0)):
            rows.append(dict(suite="backward", model="deit_base", backend=backend, mode=mode, tokens="197", batch=64.0,
                             metric="gpu_us", value=value, q20=value, q80=value, dtype="float16"))  # fmt: skip
    for name, us in (("triton", 40.0), ("torch_varlen", 100.0)):
        rows.append(dict(rows[1], backend=f"{name}:projection", mode="eager", value=us, q20=us, q80=us))
    return frames.rows(rows)


def test_the_backward_pass_beside_the_forward_pass_and_its_rivals():
    rows = backward_rows()
    us = records.clocks(rows.assign(disturbed=data.disturbed(rows)))
    (line,) = records.backward(us, {"torch_varlen": "FA2", "flash_attn": "other"})
    assert line["over forward"] == 3.0 and line["FA2 / ours"] == 2.0 and math.isnan(line["other / ours"])
    (line,) = records.projection(us)
    assert line["ours: adds"] == 0 and line["FlashAttention-2: adds"] == 30
    assert records.backward({}, {}) == records.projection({}) == []


def training_rows():
    rows = []
    for tokens, backend, speed, flops in (("197", "unpruned", 100.0, 1.0), ("99", "triton", 150.0, 1.5),
                                          ("99", "dense", 120.0, 1.5)):  # fmt: skip
        own = dict(suite="training", model="deit_base", backend=backend, mode="eager", batch=256.0, tokens=tokens,
                   dtype="bfloat16")  # fmt: skip
        rows += [own | dict(metric=m, value=v, q20=v, q80=v)
                 for m, v in (("images_per_s", speed), ("peak_mb", 1024 * speed), ("flops_ratio", flops))]  # fmt: skip
    return frames.rows(rows)


def test_a_step_beside_the_unpruned_one_and_its_prediction():
    rows = training_rows()
    lines = records.training(rows.assign(disturbed=data.disturbed(rows)))
    ours = next(line for line in lines if line["backend"] == "triton")
    assert ours["speed-up"] == ours["predicted"] == 1.5 and ours["peak GB"] == 150 and ours["of unpruned"] == 1.5
    said = records.told(lines)
    assert "1.50 times the unpruned step, 1.50 predicted" in said and "a dense gather makes 0.80" in said
    assert "padding" not in said and records.told([]) == ""


def test_what_autograd_keeps_grows_with_the_rows_and_leaves_out_weights():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())
    with torch.enable_grad():
        small, large = (records.kept_mb(layer, torch.ones(n, 64)) for n in (100, 1000))
        alone = records.kept_mb(torch.nn.Linear(64, 64), torch.ones(1000, 64))
    assert large == pytest.approx(10 * small) and alone == pytest.approx(1000 * 64 * 4 / 2**20)


def test_figures_of_training_show_what_is_there():
    pytest.importorskip("plotly")
    from ragged import plots

    bars = {t.name: t for t in plots.backward_speed(backward_rows()).data}
    ours = bars["ours (Triton)"]
    assert len(bars) == 3 and list(ours.y) == [30.0] and list(ours.x) == ["197<br>× 64"]
    figure = plots.training_step(training_rows())
    speed, memory = [t for t in figure.data if t.legendgroup == "triton"]
    assert list(speed.x) == ["99"] and list(speed.y) == [150.0] and list(memory.y) == [150.0]
    with pytest.raises(ValueError, match="no rows with"):
        plots.training_step(training_rows(), batch=64)
    drawn = plots.gradient_map({"query": [1.0, 0.0], "key": [2.0, 1.0]}, [True, False])
    assert list(drawn.data[0].text[1]) == ["0", "0.50"] and "dropped" in drawn.data[0].y[1]
    curve = [dict(steps=0, right=0.5, images=96), dict(steps=8, right=0.8, images=96)]
    line, whole = plots.recovery(curve, 0.9).data
    assert list(line.y) == [50.0, 80.0] and list(whole.y) == [90.0, 90.0] and min(line.error_y.array) > 5


# ---- 08 ----


def test_a_table_of_the_paper_beside_recorded_rows():
    ours = {"NVIDIA H200": Rows(data.results(gpu="NVIDIA H200"))}
    text = paper_tables.beside_table("v1_attention_call", ours)
    assert text.startswith("v1_attention_call [wall_ms] [ms]\n") and "NVIDIA H200" in text and text.style is not None
    assert "H200" not in paper_tables.beside_table("v1_attention_call", {"NVIDIA H200": Rows(data.results()[:0])})
    pairs, unit = paper_tables.points("v1_attention_call", ours)
    assert unit == "wall ms, ms" and set(pairs["source"]) == {"paper", "NVIDIA H200"}
    kernels, _ = paper_tables.points("v1_speedup_over_unpruned", ours)
    assert "triton" in set(kernels[kernels["source"] != "paper"]["backend"])
    assert "triton" not in set(kernels[kernels["source"] == "paper"]["backend"])


# ---- 09 ----


def test_contestants_are_recorded_and_raced(tmp_path):
    vit = load_deit("deit_tiny", weights="random")
    trial = Trial("deit_tiny", vit, [torch.randn(1, 3, 224, 224)], tmp_path, repeats=1)
    half = Entrant("threshold_l2", lambda: PRUNERS["threshold_l2"](keep=0.5), "keep=0.5", 0.5, "reference")
    with pytest.raises(LookupError, match="call record"):
        trial.value("wall_us", half)
    entrants = {"unpruned": Entrant("none", None, "all", 1.0, "unpruned"), "half": half}
    rows = trial.record(entrants)
    assert set(rows["suite"]) == {"your_turn"} and "disturbed" in rows
    assert set(rows["pruner"]) == {"none", "threshold_l2"}
    assert trial.value("kept_tokens", half) < trial.value("kept_tokens", entrants["unpruned"])
    wall = rows[(rows["metric"] == "wall_us") & (rows["pruner"] == "threshold_l2")]["value"].iloc[0]
    assert float(trial.value("wall_us", half)) == pytest.approx(wall / 1e3)
    with pytest.raises(LookupError, match="no row of wall_us for threshold_l2"):
        trial.value("wall_us", half._replace(tokens="keep=0.1"))
    assert {name: len(own) for name, own in trial.race(entrants, 3).items()} == {"unpruned": 3, "half": 3}
    assert "keep=0.5" in course.table(rows[["tokens", "metric"]])
