"""Every pruner against the dense one-image-at-a-time programs in dense_reference.py, fp32 on the CPU."""

import functools

import dense_reference as dense
import pytest
import torch
from pruner_cases import (
    ADAPTIVE,
    ALL,
    CPU_BACKENDS,
    DEPTH,
    MODELS,
    PUBLISHED,
    RATES,
    STAGES,
    assert_logits,
    assert_same,
    build,
    check,
    expected,
    pictures,
    predictor_weights,
    save_predictors,
    small_vit,
    with_variance,
)

import ragged
from ragged import rules as selection


@pytest.fixture(scope="session")
def predictor_file(tmp_path_factory):
    return save_predictors(tmp_path_factory.mktemp("predictors"))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ALL)
def test_published_schedule(name, rate, backend, predictor_file):
    where = PUBLISHED.get(name, "after")
    check("plain", name, rate, predictor_file, backend, at=STAGES, where=where)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ALL)
def test_single_cut(name, rate, backend, predictor_file):
    check("plain", name, rate, predictor_file, backend, at=(3,), where="after")


@pytest.mark.parametrize("at", [(2,), (1, 2, 5), tuple(range(1, DEPTH))], ids=str)
@pytest.mark.parametrize("where", ["before", "inside", "after"])
@pytest.mark.parametrize("name", ["threshold_l2", "tau", "evit", "ats", "random", "random_adaptive"])
def test_every_place(name, where, at, predictor_file):
    check("plain", name, 0.7, predictor_file, at=at, where=where)


@pytest.mark.parametrize("where", ["inside", "after"])
def test_dynamicvit_elsewhere(where, predictor_file):
    check("plain", "dynamicvit", 0.7, predictor_file, at=(0, 2, 5), where=where)


@pytest.mark.parametrize("name", ["tau", "threshold_l2", "dynamicvit", "random", "random_adaptive"])
def test_token_scores_need_no_attention(name, predictor_file):
    check("plain", name, 0.5, predictor_file, at=(0,), where="before")


@pytest.mark.parametrize("fuse", [True, False])
def test_evit_fuse(fuse):
    pruner = ragged.PRUNERS["evit"](keep=0.6, at=STAGES, fuse=fuse)
    trace = ragged.RaggedViT(small_vit(), pruner).trace(pictures())
    assert_same(trace, dense.evit(small_vit(), pictures(), 0.6, at=STAGES, fuse=fuse), "inside")
    assert all((ids[-1] == dense.FUSED) == fuse for stage in trace.stages for ids in stage.ids)


OTHERS = [name for name, b in ragged.BACKENDS.items() if not b.why_not(torch.device("cpu"), torch.float32, 16)]


@pytest.mark.parametrize("backend", [name for name in OTHERS if name not in CPU_BACKENDS])
@pytest.mark.parametrize("name", ALL)
def test_other_backends(name, backend, predictor_file):
    """Whatever else runs here. "dense" is for equal counts, and says so."""
    if backend == "dense" and name in ADAPTIVE:
        with pytest.raises(ValueError, match="dense"):
            check("plain", name, 0.5, predictor_file, backend, at=STAGES, where="inside")
        return
    for where in ("inside", "after"):
        check("plain", name, 0.5, predictor_file, backend, at=STAGES, where=where)


@pytest.mark.parametrize("vit_name", [name for name in MODELS if name != "plain"])
@pytest.mark.parametrize("name", ALL)
def test_model_kinds(name, vit_name, predictor_file):
    where = PUBLISHED.get(name, "after")
    for backend in CPU_BACKENDS:
        check(vit_name, name, 0.5, predictor_file, backend, at=STAGES, where=where)
        check(vit_name, name, 0.5, predictor_file, backend, at=(3,), where="after")


@pytest.mark.parametrize("vit_name", MODELS)
@pytest.mark.parametrize("name", ["none", "threshold_l2", "dynamicvit", "evit", "random", "random_adaptive"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@torch.no_grad()
def test_keep_all_is_the_dense_model(name, vit_name, backend, predictor_file):
    pruner = None if name == "none" else build(name, 1.0, predictor_file, at=STAGES)
    model = ragged.RaggedViT(small_vit(vit_name), pruner, backend=backend)
    assert_logits(model(pictures()), small_vit(vit_name)(pictures()))


@functools.cache
def deit():
    return with_variance(ragged.load_deit("deit_tiny", weights="random", img_size=224, num_classes=10))


# Rows after each stage, CLS and the fused row counted, of the published schedules at 224 px and r = 0.7.
KNOWN_COUNTS = {
    "dynamicvit": ({"keep": 0.7}, [138, 97, 68]),
    "evit": ({"keep": 0.7}, [140, 100, 72]),
    "evit_unfused": ({"keep": 0.7, "fuse": False}, [139, 98, 69]),
    "threshold_l2": ({"keep": 0.5}, [99]),
    "tau": ({"tau": 1.0}, None),
    "ats": ({"samples": 50}, None),
    "random": ({"keep": 0.7}, [138, 96, 67]),
}


@pytest.mark.parametrize("kind", KNOWN_COUNTS)
def test_deit_tiny_as_published(kind, tmp_path):
    """All defaults left alone: twelve blocks, 196 patches, blocks 3, 6, 9 (3 to 11 for ATS, 3 for Threshold-L2)."""
    kwargs, counts = KNOWN_COUNTS[kind]
    name = {"tau": "threshold_l2", "evit_unfused": "evit"}.get(kind, kind)
    mine, images = dict(kwargs), pictures(2, 224)
    if name == "dynamicvit":
        weights = predictor_weights(192)
        torch.save({"model": deit().state_dict() | weights, "epoch": 3}, tmp_path / "official.pth")
        kwargs = kwargs | {"predictors": str(tmp_path / "official.pth")}
        mine["predictors"] = dense.load_predictors(weights, 192)
    trace = ragged.RaggedViT(deit(), ragged.PRUNERS[name](**kwargs)).trace(images)
    want = getattr(dense, name)(deit(), images, **mine)
    assert_same(trace, want, PUBLISHED[name])
    if counts:
        assert [stage.counts for stage in trace.stages] == [[n, n] for n in counts]


def test_the_dense_programs_themselves():
    """Known counts, and keep = 1 against timm's own forward."""
    images = pictures(1, 224)
    predictors = dense.load_predictors(predictor_weights(192), 192)
    with torch.no_grad():
        logits = deit()(images)
    for result in (
        dense.threshold_l2(deit(), images, keep=1.0),
        dense.dynamicvit(deit(), images, 1.0, predictors),
        dense.evit(deit(), images, 1.0),
    ):
        assert (result.logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    counts = lambda result: [stage.counts[0] for stage in result.stages]  # noqa: E731
    assert counts(dense.dynamicvit(deit(), images, 0.7, predictors)) == [1 + 137, 1 + 96, 1 + 67]
    assert counts(dense.evit(deit(), images, 0.7)) == [140, 100, 72]
    assert counts(dense.evit(deit(), images, 0.7, fuse=False)) == [139, 98, 69]
    assert counts(dense.threshold_l2(deit(), images, keep=0.5)) == [99]


@pytest.mark.parametrize("name", ["tau", "ats"])
def test_these_two_are_ragged(name):
    """Otherwise every comparison above would be one of equal lengths."""
    want = expected("plain", name, 0.5, at=STAGES, where=PUBLISHED.get(name, "after"))
    assert all(len(set(stage.counts)) > 1 for stage in want.stages)


# ---- the random rival ----


def kept_by(pruner, images):
    return [stage.ids for stage in ragged.RaggedViT(small_vit(), pruner).trace(images).stages]


@torch.no_grad()
def test_a_random_pruner_looks_at_no_pixel_and_repeats_itself():
    for adaptive in (False, True):
        make = functools.partial(ragged.PRUNERS["random"], 0.5, adaptive, at=STAGES)
        first, again, other = (kept_by(make(), pictures(seed=seed)) for seed in (1, 1, 2))
        assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))
        assert all(torch.equal(a, b) for a, b in zip(first[0], other[0]))
        reseeded = kept_by(make(seed=1), pictures())
        assert not all(torch.equal(a, b) for a, b in zip(first[0], reseeded[0]))


@torch.no_grad()
def test_chance_is_even_and_independent():
    """Over many numbers: the mean, the variance, and what neighbours have to do with each other."""
    x = selection.chance(500, 200, (7, 0, 0), torch.device("cpu")).double()
    assert 0 <= x.min() and x.max() < 1 and len(x.unique()) > 0.98 * x.numel()
    assert abs(x.mean() - 1 / 2) < 0.005 and abs(x.var() - 1 / 12) < 0.001
    for along in (x[:, 1:] * x[:, :-1], x[1:] * x[:-1], x * selection.chance(500, 200, (7, 1, 0), x.device)):
        assert abs(along.mean() - 1 / 4) < 0.005
    counts = torch.histc(x, 20, 0, 1)
    assert (counts / counts.mean() - 1).abs().max() < 0.06


@torch.no_grad()
def test_adaptive_shares_are_spread_around_keep():
    pictures_of = pictures(64)
    for keep, low, high in ((0.5, 0.0, 1.0), (0.8, 0.6, 1.0), (0.3, 0.0, 0.6)):
        pruner = ragged.PRUNERS["random"](keep, adaptive=True, at=(1,))
        shares = torch.tensor(ragged.RaggedViT(small_vit(), pruner).trace(pictures_of).stages[0].counts) - 1
        shares = shares / 49
        assert abs(shares.mean() - keep) < 0.12 and shares.std() > 0.6 * (high - low) / 12**0.5
        assert low - 0.2 <= shares.min() and shares.max() <= high + 0.2


def test_a_random_pruner_refuses_what_it_cannot_mean():
    for bad in ({"keep": 0.0}, {"keep": 1.5}, {"seed": -1}, {"keep": (0.5, 0.5)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ragged.PRUNERS["random"](**bad)
