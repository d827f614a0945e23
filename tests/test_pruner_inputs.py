"""Pruners: bad arguments, predictor files, and what holds whatever the numbers are."""

import copy

import pytest
import torch
from pruner_cases import (
    ALL,
    BATCH,
    DEPTH,
    DIM,
    PATCHES,
    PUBLISHED,
    RATES,
    SIDE,
    STAGES,
    VARIANTS,
    assert_logits,
    build,
    check,
    pictures,
    predictor_weights,
    save_predictors,
    small_vit,
)
from safetensors.torch import save_file

import ragged
from ragged import pruners


@pytest.fixture(scope="session")
def predictor_file(tmp_path_factory):
    return save_predictors(tmp_path_factory.mktemp("predictors"))


# --- bad arguments


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["threshold_l2", "dynamicvit", "evit"])
def test_keep_out_of_range(name, keep):
    with pytest.raises(ValueError, match="keep"):
        ragged.PRUNERS[name](keep=keep)


@pytest.mark.parametrize("kwargs", [{"keep": 0.5, "tau": 1.0}, {"tau": -1.0}, {"tau": float("nan")}], ids=str)
def test_bad_tau(kwargs):
    with pytest.raises(ValueError, match="tau"):
        ragged.PRUNERS["threshold_l2"](**kwargs)


@pytest.mark.parametrize("samples", [0, -3, 2.5])
def test_bad_samples(samples):
    with pytest.raises((ValueError, TypeError), match="samples"):
        ragged.PRUNERS["ats"](samples=samples)


@pytest.mark.parametrize("name", ragged.PRUNERS)
def test_unknown_where(name):
    with pytest.raises(ValueError, match="where"):
        ragged.PRUNERS[name](where="beside")


@pytest.mark.parametrize("at", [(DEPTH,), (1, DEPTH + 3), (-1,), (2, 2), ()], ids=str)
@pytest.mark.parametrize("name", ragged.PRUNERS)
def test_bad_stage(name, at):
    """The depth is known when the model is, at the latest."""
    with pytest.raises((ValueError, IndexError), match=r"\bat\b"):
        ragged.RaggedViT(small_vit(), ragged.PRUNERS[name](at=at))


@pytest.mark.parametrize("name", ["evit", "ats"])
def test_no_attention_before_the_first_block(name):
    with pytest.raises(ValueError, match="before"):
        ragged.RaggedViT(small_vit(), ragged.PRUNERS[name](at=(0,), where="before"))(pictures())


def test_unknown_backend():
    with pytest.raises((ValueError, KeyError), match="backend"):
        ragged.RaggedViT(small_vit(), None, backend="fastest")


WRONG_IMAGES = {"side": (2, 3, 96, 96), "channels": (2, 1, SIDE, SIDE), "rank": (3, SIDE, SIDE), "flat": (2, 50, DIM)}


@pytest.mark.parametrize("shape", WRONG_IMAGES.values(), ids=WRONG_IMAGES.keys())
@pytest.mark.parametrize("pruner", [None, "threshold_l2"])
def test_wrong_images(shape, pruner):
    model = ragged.RaggedViT(small_vit(), pruner and ragged.PRUNERS[pruner]())
    for call in (model, model.trace):
        with pytest.raises((ValueError, AssertionError), match="image|img|Input"):
            call(torch.zeros(shape))


# --- predictor files


def use(path, at=STAGES):
    """Load and run: a pruner may read its file late."""
    pruner = ragged.PRUNERS["dynamicvit"](keep=0.7, at=at, predictors=str(path))
    return ragged.RaggedViT(small_vit(), pruner)(pictures())


def test_both_formats_give_the_same(predictor_file, tmp_path):
    torch.save({"model": predictor_weights()}, tmp_path / "stages.pth")
    assert torch.equal(use(tmp_path / "stages.pth"), use(predictor_file))


def test_missing_keys_are_named(tmp_path):
    weights = dict(predictor_weights())
    gone = "score_predictor.1.out_conv.2.weight"
    del weights[gone]
    save_file(weights, str(tmp_path / "hole.safetensors"))
    with pytest.raises((ValueError, KeyError, RuntimeError), match=gone.replace(".", r"\.").split("r.1.")[-1]):
        use(tmp_path / "hole.safetensors")


def test_too_few_predictors(predictor_file):
    with pytest.raises((ValueError, KeyError), match="predictor"):
        use(predictor_file, at=(0, 1, 2, 3))


def test_predictors_of_another_width(tmp_path):
    save_file(predictor_weights(64), str(tmp_path / "wide.safetensors"))
    with pytest.raises((ValueError, RuntimeError), match="predictor"):
        use(tmp_path / "wide.safetensors")


def test_no_such_predictor_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        use(tmp_path / "nowhere.pth")


def test_untrained_predictors_are_repeatable():
    run = lambda: ragged.RaggedViT(small_vit(), ragged.PRUNERS["dynamicvit"](keep=0.7, at=STAGES))(pictures())  # noqa: E731
    assert torch.equal(run(), run())


# --- invariants


def count_after(name, rate, stage, rows, prefix):
    """Rows a stage leaves of `rows`, or None where that depends on the image."""
    if name == "threshold_l2":
        return prefix + int((rows - prefix) * rate)
    if name == "dynamicvit":
        return prefix + int(PATCHES * rate ** (stage + 1))
    if name == "evit":
        kept = -int(-(rate * (rows - prefix)) // 1)
        return rows if kept == rows - prefix else prefix + kept + 1
    return None


@pytest.mark.parametrize("vit_name", ["plain", "registers"])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ALL)
def test_what_a_trace_always_holds(name, rate, vit_name, predictor_file):
    vit = small_vit(vit_name)
    pruner = build(name, rate, predictor_file, at=STAGES)
    model = ragged.RaggedViT(vit, pruner)
    trace, rows, prefix = model.trace(pictures()), vit.num_prefix_tokens + PATCHES, vit.num_prefix_tokens
    before = [set(range(rows)) | {-1}] * BATCH
    for stage, got in enumerate(trace.stages):
        rows = count_after(name, rate, stage, rows, prefix)
        assert rows is None or got.counts == [rows] * BATCH
        for b, ids in enumerate(got.ids):
            real = [i for i in ids.tolist() if i >= 0]
            assert ids.dtype == torch.int64 and len(ids) == got.counts[b]
            assert real[:prefix] == list(range(prefix)), "CLS and the other prefix rows stay in front"
            assert len(set(real)) == len(real) and set(real) <= before[b], "a dropped row never comes back"
            before[b] = set(real)
    assert torch.equal(model(pictures()), trace.logits) or (model(pictures()) - trace.logits).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["auto", "sdpa_padded"])
@pytest.mark.parametrize("name", [name for name in ALL if VARIANTS.get(name, name) != "random"])
def test_images_do_not_see_each_other(name, backend, predictor_file):
    """Permuting the batch permutes the results; an image alone gives what it gives in company. Chance, which looks at
    no image, goes by its place in the batch."""
    model = ragged.RaggedViT(small_vit(), build(name, 0.5, predictor_file, at=STAGES), backend=backend)
    order = torch.tensor([2, 0, 3, 1])
    straight, permuted = model.trace(pictures()), model.trace(pictures()[order])
    assert_logits(permuted.logits, straight.logits[order])
    for a, b in zip(straight.stages, permuted.stages, strict=True):
        assert [sorted(b.ids[i].tolist()) for i in range(BATCH)] == [sorted(a.ids[j].tolist()) for j in order]
    alone = torch.cat([model(image[None]) for image in pictures()])
    assert_logits(alone, straight.logits)


@pytest.mark.parametrize("name", ["threshold_l2", "dynamicvit"])
def test_down_to_cls_alone(name, predictor_file):
    """int(49 * 0.1 ** 2) is 0: the image goes on with its CLS row only, and stays well defined."""
    trace = check("plain", name, 0.1, predictor_file, at=STAGES, where=PUBLISHED[name])
    assert trace.stages[-1].counts == [1] * BATCH and trace.logits.isfinite().all()


def test_ats_down_to_one_patch():
    """Two sample points leave two patches at most, then one; one patch stays for good."""
    trace = check("plain", "ats", 0.01, None, at=tuple(range(1, DEPTH)), where="inside")
    assert [stage.counts for stage in trace.stages] == [[3] * BATCH] + [[2] * BATCH] * (DEPTH - 2)


def test_prescribed_lengths():
    lengths = [50, 7, 1, 23]
    model = ragged.RaggedViT(small_vit(), pruners.GivenLengths(lengths, at=3))
    (stage,) = model.trace(pictures()).stages
    assert stage.counts == lengths
    for ids in stage.ids:
        assert ids[0] == 0 and len(set(ids.tolist())) == len(ids)


@pytest.mark.parametrize("lengths", [[51, 7, 1, 23], [300] * 4, [0] * 4, [-1, 5, 5, 5], [2.5] * 4, [9] * 3], ids=str)
def test_impossible_lengths(lengths):
    """50 rows are there; and a batch of four has four lengths."""
    with pytest.raises((ValueError, TypeError), match="lengths"):
        ragged.RaggedViT(small_vit(), pruners.GivenLengths(lengths, at=3))(pictures())


@pytest.mark.parametrize("name", ALL)
def test_double_precision(name, predictor_file):
    """Learned parts of a pruner follow the model they are put into."""
    vit = copy.deepcopy(small_vit()).double()
    model = ragged.RaggedViT(vit, build(name, 0.5, predictor_file, at=STAGES))
    single = ragged.RaggedViT(small_vit(), build(name, 0.5, predictor_file, at=STAGES))
    logits = model(pictures().double())
    assert logits.dtype == torch.float64
    assert_logits(logits.float(), single(pictures()))
