"""Digit scenes are deterministic, honest about their boxes, and differ in how much there is to prune."""

import sys

import numpy as np
import pytest
import torch

from ragged import data
from ragged.data import scenes


@pytest.fixture(scope="module")
def some():
    return data.digit_scenes(60, "train", seed=5)


def luma(images):
    return torch.einsum("nchw,c->nhw", images, torch.tensor([0.299, 0.587, 0.114]))


def test_scene_shapes_and_ranges(some):
    assert some.images.shape == (60, 3, 224, 224) and some.images.dtype == torch.float32
    assert 0 <= some.images.min() and some.images.max() <= 1
    assert some.labels.dtype == some.boxes.dtype == some.digit_index.dtype == torch.int64
    assert set(some.labels.tolist()) == set(range(10))


def test_a_scene_depends_only_on_seed_split_and_number(some):
    again = data.digit_scenes(3, "train", seed=5, first=20)
    for whole, part in zip(some, again):
        assert torch.equal(whole[20:23], part)
    for other in (data.digit_scenes(3, "train", seed=6, first=20), data.digit_scenes(3, "test", seed=5, first=20)):
        assert not torch.equal(other.images, again.images)


def test_the_same_scene_at_another_size(some):
    small = data.digit_scenes(8, "train", seed=5, size=112)
    assert torch.equal(small.labels, some.labels[:8])
    shrunk = torch.nn.functional.avg_pool2d(some.images[:8], 2)
    assert (shrunk - small.images).abs().mean() < 0.02
    assert (small.boxes * 2 - some.boxes[:8]).abs().max() <= 4


def test_labels_are_those_of_the_digits(some):
    from sklearn.datasets import load_digits

    assert some.labels.tolist() == load_digits().target[some.digit_index.numpy()].tolist()


def test_splits_share_no_digit_and_hold_every_class():
    from sklearn.datasets import load_digits

    rows = {split: data.digit_split(split) for split in ("train", "test")}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(1797))
    assert 0.18 < len(rows["test"]) / 1797 < 0.22
    assert np.bincount(load_digits().target[rows["test"]], minlength=10).min() >= 25
    drawn = data.digit_scenes(40, "test", size=32).digit_index
    assert np.isin(drawn, rows["test"]).all()


def test_boxes_hold_all_the_ink_and_nothing_outside_is_as_dark_or_bright(some):
    for bright, (x0, y0, x1, y1) in zip(luma(some.images), some.boxes.tolist()):
        outside = torch.ones_like(bright, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        low, high = bright[outside].min(), bright[outside].max()
        ink = (bright < low - 0.2) | (bright > high + 0.2)
        assert ink[y0:y1, x0:x1].float().mean() > 0.1
        rows, columns = ink.nonzero().unbind(1)  # the ink touches all four sides of its box, up to soft edges
        slack = 2 + 0.06 * max(x1 - x0, y1 - y0)
        assert max(columns.min() - x0, rows.min() - y0, x1 - 1 - columns.max(), y1 - 1 - rows.max()) <= slack


def test_scales_fill_the_range(some):
    x0, y0, x1, y1 = some.boxes.unbind(1)
    assert (some.boxes >= 0).all() and (some.boxes <= 224).all()
    longer = torch.maximum(x1 - x0, y1 - y0) / 224
    low, high = scenes.SCALE_RANGE
    assert longer.min() > low - 0.005 and longer.max() < high + 0.005
    assert longer.min() < 0.2 and longer.max() > 0.55


def test_backgrounds_differ_in_how_busy_they_are(some):
    bright = luma(some.images)
    patches = torch.nn.functional.unfold(bright[:, None], 16, stride=16).std(1)  # (60, 196)
    busy = (patches > 0.02).float().mean(1)
    assert busy.min() < 0.25 and busy.max() > 0.75


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"n": -1}, "n: expected"),
        ({"n": 1.5}, "n: expected"),
        ({"n": 1, "split": "valid"}, "split: expected"),
        ({"n": 1, "size": 8}, "size: expected"),
        ({"n": 1, "seed": -1}, "seed: expected"),
    ],
)
def test_bad_scene_arguments(arguments, name):
    with pytest.raises(ValueError, match=name):
        data.digit_scenes(**arguments)


def test_without_scikit_learn_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    scenes._digits.cache_clear()
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        data.digit_scenes(1)
