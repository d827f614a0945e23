"""Bad input gets a clear error, nothing else: the right kind of exception, naming the argument at fault."""

import math

import pytest
import torch
from attention_cases import SHORT, inputs, offsets
from pruner_cases import SIDE, pictures, small_vit

import ragged

KNOWN = {"backend": list(ragged.BACKENDS), "pruner": list(ragged.PRUNERS)}
NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def refused(call, kinds, *words):
    with pytest.raises(kinds) as refusal:
        call()
    text = str(refusal.value)
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


def attention(function=ragged.varlen_attention, **changes):
    """A good call with some arguments changed; a change may be a function of the good value."""
    arguments = dict(zip(NAMES, inputs(SHORT)))
    options = {key: changes.pop(key) for key in set(changes) - set(NAMES)}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return function(*arguments.values(), **options)


def test_the_unchanged_call_is_fine():
    assert attention().shape == attention(ragged.varlen_attention_ref).shape


def test_dense_refuses_lengths_that_only_add_up_to_equal_ones():
    q = torch.randn(6, 2, 16)
    cu = torch.tensor([0, 1, 3], dtype=torch.int32)  # and three rows that nobody owns
    refused(lambda: ragged.varlen_attention(q, q, q, cu, cu, 3, 3, backend="dense"), ValueError, "equal length")


@pytest.mark.parametrize("shape", [(6, 0, 16), (6, 2, 0), (0, 0, 16)])
def test_no_heads_or_no_numbers(shape):
    x, cu = torch.randn(shape), torch.tensor([0, shape[0]], dtype=torch.int32)
    for backend in ("auto", "reference", "dense"):
        refused(lambda b=backend: ragged.varlen_attention(x, x, x, cu, cu, 6, 6, backend=b), ValueError, "q:", "nheads")


both = pytest.mark.parametrize(
    "function", [ragged.varlen_attention, ragged.varlen_attention_ref], ids=lambda f: f.__name__
)
BAD_TENSORS = {
    "rank_2": lambda x: x[:, 0],
    "rank_4": lambda x: x[None],
    "rank_0": lambda x: x.sum(),
    "list": lambda x: x.tolist(),
    "none": lambda x: None,
    "int": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "half_only": lambda x: x.half(),
    "meta": lambda x: x.to("meta"),
}


@both
@pytest.mark.parametrize("change", BAD_TENSORS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_bad_tokens(name, change, function):
    # Where q is the odd one out, k is the first that differs from it.
    named = "k" if name == "q" and change in ("half_only", "meta") else name
    refused(lambda: attention(function, **{name: BAD_TENSORS[change]}), (TypeError, ValueError), f"{named}:")


@both
@pytest.mark.parametrize("name", ["k", "v"])
def test_mismatched_heads_rows_and_width(name, function):
    refused(lambda: attention(function, **{name: lambda x: x[:, :1]}), ValueError, f"{name}:", "nheads", "(2, 16)")
    refused(lambda: attention(function, **{name: lambda x: x[..., :8]}), ValueError, f"{name}:", "(2, 8)")
    refused(lambda: attention(function, **{name: lambda x: x[:-1]}), ValueError, "rows")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dtypes_that_no_backend_computes_in(dtype):
    change = dict.fromkeys("qkv", lambda x: x.to(dtype))
    refused(lambda: attention(**change), (TypeError, ValueError), str(dtype))


def test_a_head_dimension_of_nothing():
    refused(lambda: attention(**dict.fromkeys("qkv", lambda x: x[..., :0])), ValueError, "q:")


BAD_OFFSETS = {
    "int64": (lambda x: x.long(), (TypeError,), "torch.int32"),
    "float": (lambda x: x.float(), (TypeError,), "torch.int32"),
    "list": (lambda x: x.tolist(), (TypeError, ValueError), "tensor"),
    "rank_2": (lambda x: x[None], (ValueError,), "shape"),
    "one_entry": (lambda x: x[:1], (ValueError,), "shape"),
    "strided": (lambda x: torch.stack((x, x), 1)[:, 0], (ValueError,), "contiguous"),
    "meta": (lambda x: x.to("meta"), (ValueError,), "meta"),
    "not_from_zero": (lambda x: x + 1, (ValueError,), "from 0"),
    "falling": (lambda x: offsets([3, 10, -9, 18, 7]), (ValueError,), "rising"),
    "past_the_end": (lambda x: offsets([3, 0, 1, 18, 8]), (ValueError,), "29"),
}


@both
@pytest.mark.parametrize("change", BAD_OFFSETS)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_bad_offsets(name, change, function):
    bad, kinds, word = BAD_OFFSETS[change]
    refused(lambda: attention(function, **{name: bad}), kinds, f"{name}:", word)


@both
def test_another_batch_of_keys(function):
    refused(lambda: attention(function, cu_seqlens_k=offsets([29])), ValueError, "cu_seqlens_k:", "6")


@both
@pytest.mark.parametrize("value", [0, -1, 17, 2.0, None, "18", True, torch.tensor(18)], ids=str)
@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_bad_maximum(name, value, function):
    refused(lambda: attention(function, **{name: value}), (TypeError, ValueError), f"{name}:")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "x"], ids=str)
def test_bad_scale(value):
    refused(lambda: attention(softmax_scale=value), (TypeError, ValueError), "softmax_scale:")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_no_gradient_is_lost_in_silence(name):
    """A backend without a backward pass says so, and why, whichever argument wants a gradient."""
    wanted = {name: lambda x: x.clone().requires_grad_()}
    with torch.enable_grad():
        refused(lambda: attention(backend="paper_padded", **wanted), ValueError, "no backward", "baseline", "reference")
        assert attention(**wanted).requires_grad
    with torch.no_grad():
        assert not attention(backend="paper_padded", **wanted).requires_grad


def test_everything_on_a_device_without_numbers():
    to_meta = dict.fromkeys(("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"), lambda x: x.to("meta"))
    refused(lambda: attention(**to_meta), ValueError, "meta")


# --- names


@pytest.mark.parametrize("name", ["fastest", "", "Triton", None, 3])
def test_unknown_backend(name):
    refused(lambda: attention(backend=name), ValueError, "backend", repr(name), *KNOWN["backend"])
    refused(lambda: ragged.RaggedViT(small_vit(), None, backend=name), ValueError, "backend", *KNOWN["backend"])


def test_unknown_names_in_the_registries():
    refused(lambda: ragged.PRUNERS["tome"], (KeyError, ValueError), "tome", *KNOWN["pruner"])
    refused(lambda: ragged.BACKENDS["fastest"], (KeyError, ValueError), "fastest", *KNOWN["backend"])


def test_unknown_names_are_still_absent():
    assert "tome" not in ragged.PRUNERS and ragged.PRUNERS.get("tome") is None


@pytest.mark.parametrize("pruner", ["evit", ragged.PRUNERS["evit"], 0.5], ids=str)
def test_a_pruner_is_an_object(pruner):
    refused(lambda: ragged.RaggedViT(small_vit(), pruner), TypeError, "pruner")


def test_dense_needs_equal_counts():
    for pruner in (ragged.PRUNERS["ats"](), ragged.PRUNERS["threshold_l2"](tau=1.0)):
        refused(lambda p=pruner: ragged.RaggedViT(small_vit(), p, backend="dense"), ValueError, "dense", pruner.name)


@pytest.mark.parametrize("keep", ["0.5", None, True, torch.tensor(0.5)], ids=str)
def test_keep_is_a_number(keep):
    refused(lambda: ragged.PRUNERS["evit"](keep=keep), (TypeError, ValueError), "keep:")


@pytest.mark.parametrize("at", ["3", 3.5, (1.5,), None], ids=str)
def test_stages_are_block_numbers(at):
    refused(lambda: ragged.PRUNERS["evit"](at=at), (TypeError, ValueError), "at:")


# --- images


@pytest.mark.parametrize("change", ["half", "int", "list", "empty", "meta"])
def test_images_of_the_wrong_kind(change):
    bad = {
        "half": lambda x: x.half(), "int": lambda x: x.int(), "list": lambda x: x.tolist(), "empty": lambda x: x[:0],
        "meta": lambda x: x.to("meta"),
    }[change]  # fmt: skip
    refused(lambda: ragged.RaggedViT(small_vit())(bad(pictures())), (TypeError, ValueError), "images:")


def test_images_of_the_wrong_shape_are_told_the_right_one():
    for shape in ((3, SIDE, SIDE), (2, 3, SIDE, SIDE + 16), (2, 4, SIDE, SIDE), (2, 1, 3, SIDE, SIDE)):
        call = lambda shape=shape: ragged.RaggedViT(small_vit())(torch.zeros(shape))  # noqa: E731
        refused(call, ValueError, "images:", f"3, {SIDE}, {SIDE}", str(shape))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_graph_needs_a_gpu():
    refused(lambda: ragged.RaggedViT(small_vit()).capture(2), ValueError, "GPU")


# --- pack, repack, unpack


X, KEEP = torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
BAD_PACKS = {
    "x_rank": (X[0], KEEP, {}, "x:"), "x_int": (X.int(), KEEP, {}, "x:"), "x_list": (X.tolist(), KEEP, {}, "x:"),
    "keep_rank": (X, KEEP[0], {}, "keep:"), "keep_shape": (X, KEEP[:, :5], {}, "keep:"),
    "keep_float": (X, KEEP.float(), {}, "keep:"), "keep_int32": (X, KEEP.int(), {}, "keep:"),
    "keep_device": (X, KEEP.to("meta"), {}, "keep:"), "keep_list": (X, KEEP.tolist(), {}, "keep:"),
    "index_batch": (X, torch.zeros(3, 2, dtype=torch.int64), {}, "keep:"),
    "index_high": (X, torch.full((2, 2), 6), {}, "keep:"), "index_negative": (X, torch.full((2, 2), -1), {}, "keep:"),
    "counts_number": (X, KEEP, {"counts": [6]}, "counts:"), "counts_wrong": (X, KEEP, {"counts": [6, 5]}, "counts:"),
    "counts_int": (X, KEEP, {"counts": 12}, "counts:"), "counts_float": (X, KEEP, {"counts": [6.0, 6.0]}, "counts:"),
    "counts_of_an_index": (X, torch.zeros(2, 2, dtype=torch.int64), {"counts": [1, 1]}, "counts:"),
    "no_images": (X[:0], KEEP[:0], {}, "x:"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PACKS)
def test_bad_packing(case):
    x, keep, options, word = BAD_PACKS[case]
    refused(lambda: ragged.pack(x, keep, **options), (TypeError, ValueError), word)


def test_bad_repacking():
    packed = ragged.pack(X, KEEP)
    for keep in (KEEP, KEEP.flatten()[:-1], KEEP.flatten().long(), [True] * 12, KEEP.flatten().to("meta")):
        refused(lambda keep=keep: ragged.repack(packed, keep), (TypeError, ValueError), "keep:")
    refused(lambda: ragged.repack(packed, KEEP.flatten(), counts=[6, 7]), ValueError, "counts:")
    refused(lambda: ragged.repack(X, KEEP.flatten()), TypeError, "packed:")
    refused(lambda: ragged.unpack(X), TypeError, "packed:")
