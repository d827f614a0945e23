"""Every pruner against the dense one-image-at-a-time programs in dense_reference.py, fp32 on the CPU."""

import functools

import dense_reference as dense
import pytest
import torch
from pruner_cases import (
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
@pytest.mark.parametrize("name", ["threshold_l2", "tau", "evit", "ats"])
def test_every_place(name, where, at, predictor_file):
    check("plain", name, 0.7, predictor_file, at=at, where=where)


@pytest.mark.parametrize("where", ["inside", "after"])
def test_dynamicvit_elsewhere(where, predictor_file):
    check("plain", "dynamicvit", 0.7, predictor_file, at=(0, 2, 5), where=where)


@pytest.mark.parametrize("name", ["tau", "threshold_l2", "dynamicvit"])
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
    if backend == "dense" and name in ("tau", "ats"):
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
@pytest.mark.parametrize("name", ["none", "threshold_l2", "dynamicvit", "evit"])
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
