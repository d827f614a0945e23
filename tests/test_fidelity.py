"""The suites without labels or clocks: fidelity over folders of pictures, seeds over folders of networks; intervals."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ragged
from ragged import data
from ragged.bench import __main__ as bench
from ragged.bench.networks import NETWORKS, predictors_of, weights_of
from ragged.bench.suites import accuracy, fidelity, seeds
from ragged.data.intervals import rank_correlation, wilson


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "pictures"
    (where / "inside").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "inside/c.png", ".hidden.png"):
        Image.fromarray(generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(where / name)
    (where / "notes.txt").write_text("no picture")
    return where


def rows_of(tmp_path, suite):
    (path,) = (tmp_path / "rows").glob(f"*/{suite}.csv")
    return data.read_csv(path)


def test_names_say_whose_weights():
    assert weights_of("deit_tiny_digits") == ("deit_tiny", "digits")
    assert weights_of("deit_tiny_digits_labels") == ("deit_tiny", "digits-labels")
    assert weights_of("deit_small") == ("deit_small", "random")
    assert weights_of("deit_small", "imagenet") == ("deit_small", "imagenet")
    assert predictors_of("deit_small") is None and NETWORKS[0] == "deit_tiny_digits"


def test_pictures_of_a_folder(folder, tmp_path):
    assert [path.name for path in fidelity.pictures_in(folder)] == ["a.jpg", "b.png", "c.png"]
    with pytest.raises(FileNotFoundError, match="--images"):
        fidelity.pictures_in(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        fidelity.pictures_in(tmp_path / "empty")


def test_fidelity_of_any_weights_over_any_folder(folder, tmp_path):
    """Random weights, as a stand-in for a file: what is written, and that it is what two plain passes give."""
    weights = tmp_path / "net.pth"
    vit = ragged.load_deit("deit_tiny", num_classes=7, seed=3)
    torch.save(vit.state_dict(), weights)
    asked = ["fidelity", "--images", str(folder), "--model", "deit_tiny", "--weights", str(weights), "--device", "cpu",
             "--quick", "--out", str(tmp_path / "rows")]  # fmt: skip
    assert bench.main(asked) == 0
    rows = rows_of(tmp_path, "fidelity")
    assert {row["model"] for row in rows} == {"deit_tiny on pictures"} and {row["status"] for row in rows} == {"ok"}
    assert {row["metric"] for row in rows} == {*fidelity.METRICS} and {"random", "dynamicvit:untrained"} <= {
        row["pruner"] for row in rows}  # fmt: skip
    evit = [row for row in rows if (row["pruner"], row["tokens"]) == ("evit", "published")]
    found = {row["metric"]: float(row["value"]) for row in evit}
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(vit), is_training=False)
    x = torch.stack([transform(data.read_picture(path)) for path in fidelity.pictures_in(folder)])
    model = ragged.RaggedViT(vit, ragged.PRUNERS["evit"](keep=0.5), "sdpa_padded")
    with torch.no_grad():
        want, got = vit.forward_features(x)[:, 0], model.forward_features(x)[:, 0]
        near = torch.nn.functional.cosine_similarity(want, got).mean().item()
        same = (vit(x).argmax(1) == model(x).argmax(1)).float().mean()
    assert found["feature_cosine"] == pytest.approx(near, abs=1e-4)
    assert found["top1_agreement"] == pytest.approx(same.item(), abs=1e-6) and found["images"] == 3


def test_fidelity_needs_no_classes(folder, tmp_path):
    weights = tmp_path / "features.pth"
    torch.save(ragged.load_deit("deit_tiny", num_classes=0).state_dict(), weights)
    asked = ["fidelity", "--images", str(folder), "--model", "deit_tiny", "--weights", str(weights), "--device", "cpu",
             "--quick", "--out", str(tmp_path / "rows")]  # fmt: skip
    assert bench.main(asked) == 0
    assert "top1_agreement" not in {row["metric"] for row in rows_of(tmp_path, "fidelity")}


@pytest.mark.parametrize("words, message", [
    (["fidelity", "--counts"], "--counts: is for the suite accuracy"),
    (["accuracy", "--images", "x"], "--images: is for the suite fidelity"),
    (["accuracy", "--networks", "x"], "--networks: is for the suite seeds"),
    (["seeds"], "--networks: the suite seeds"),
    (["fidelity", "--weights", "x.pth"], "--weights: name the one network"),
    (["fidelity", "--workers", "2"], "--workers: is for --imagenet"),
])  # fmt: skip
def test_options_that_belong_to_another_suite(words, message):
    with pytest.raises(ValueError, match=message):
        bench.main([*words, "--device", "cpu"])


@pytest.fixture
def trained(tmp_path):
    """The bundled network under another seed's name."""
    where = tmp_path / "seed1"
    where.mkdir()
    for path in (data.data_dir() / "checkpoints").glob("deit_tiny_digits.*"):
        shutil.copy(path, where)
    how = where / "deit_tiny_digits.json"
    made = json.loads(how.read_text())
    made["settings"]["seed"] = 1
    how.write_text(json.dumps(made))
    return where


@pytest.mark.slow
def test_seeds_are_counted(trained, tmp_path):
    asked = ["seeds", "--networks", str(trained), "--device", "cpu", "--quick", "--out", str(tmp_path / "rows")]
    assert bench.main(asked) == 0
    rows = rows_of(tmp_path, "seeds")
    assert {row["model"] for row in rows} == {"deit_tiny_digits seed 1"}
    whole = {row["metric"]: row["value"] for row in rows if row["pruner"] == "none"}
    assert float(whole["top1"]) > 0.9 and whole["images"] == "40"
    assert {row["keep"] for row in rows if row["pruner"] == "evit"} == {"0.3", "0.5", "0.7"}


def test_seeds_refuse_what_they_cannot_name(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="--networks"):
        seeds.networks_in(tmp_path)
    twice = tmp_path / "again"
    shutil.copytree(trained, twice)
    with pytest.raises(ValueError, match="are both deit_tiny_digits seed 1"):
        bench.main(["seeds", "--networks", str(trained), str(twice), "--device", "cpu", "--out", str(tmp_path / "r")])
    (trained / "deit_tiny_digits.json").unlink()
    with pytest.raises(ValueError, match="does not say by which seed"):
        seeds.seed_of(trained / "deit_tiny_digits.safetensors")


def test_places_of_a_curve_that_coincide_are_one():
    row = {"pruner": "ats", "backend": "triton", "mode": "eager", "keep": 0.95, "metric": "top1"}
    found = accuracy.distinct([row | {"value": 1}, row | {"value": 2}, row | {"keep": 0.9, "value": 3}])
    assert [one["value"] for one in found] == [1, 3]


# ---- intervals ----


@pytest.mark.parametrize("share, n, low, high", [  # from R's binom.confint(method = "wilson")
    (0.5, 10, 0.2366, 0.7634), (0.0, 20, 0.0, 0.1611), (1.0, 20, 0.8389, 1.0), (0.9855, 2000, 0.97926, 0.98989),
])  # fmt: skip
def test_wilson(share, n, low, high):
    assert wilson(share, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_covers_what_it_says():
    """Of many samples, about 95 % have an interval around the truth."""
    rng, truth, n = np.random.default_rng(0), 0.9, 200
    intervals = [wilson(right / n, n) for right in rng.binomial(n, truth, 2000)]
    assert 0.93 < np.mean([low <= truth <= high for low, high in intervals]) < 0.97


def test_wilson_refuses():
    for share, n in ((1.1, 10), (-0.1, 10), (0.5, 0)):
        with pytest.raises(ValueError):
            wilson(share, n)


def test_rank_correlation():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    x = rng.integers(0, 20, 300)
    y = x + rng.integers(0, 20, 300)
    value, drawn = rank_correlation(x, y, resamples=300)
    assert value == pytest.approx(spearmanr(x, y).statistic, abs=1e-12) and len(drawn) == 300
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert low < value < high and (drawn[1:] >= drawn[:-1]).all()
    bonett_wright = math.sqrt((1 + value**2 / 2) / 297) * (1 - value**2)
    assert high - low == pytest.approx(2 * 1.96 * bonett_wright, rel=0.3)
    constant, none = rank_correlation(x, [5] * 300, resamples=10)
    assert math.isnan(constant) and len(none) == 0
    with pytest.raises(ValueError, match="equally long"):
        rank_correlation([1, 2, 3], [1, 2])
