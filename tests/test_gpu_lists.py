"""On a GPU: graphs for lists of images, for packed tokens and for pruners that decide many times. Against eager bit for
bit, and against timm image by image. Prints a table."""

import functools

import pytest
import torch
from gpu_tools import eager, eager_list, print_table, waits

import ragged
from ragged.bench.quadtree import quadtree_tokens
from ragged.bench.suites.mixed import sides
from ragged.data import normalise, photographs

pytestmark = pytest.mark.gpu
LIMIT = 0.02  # of any logit in float16, from the eager model: its sums run in another order, and near ties may tip
LARGEST = (448, 448)
PRUNERS = {
    "none": None, "evit": ("evit", {"keep": 0.7}), "dynamicvit": ("dynamicvit", {"keep": 0.7}),
    "l2": ("threshold_l2", {"keep": 0.6, "at": (2, 5, 8)}), "tau": ("threshold_l2", {"tau": 1.0, "at": (2, 5, 8)}),
    "ats": ("ats", {}),
}  # fmt: skip
ADAPTIVE = ("tau", "ats")  # what stays may hang on the last digit of a score
TABLE = []


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    print_table(request, "fp16 logits of graphs against the eager model, DeiT-Ti, random weights", TABLE)


def pruner(name):
    if PRUNERS[name] is None:
        return None
    kind, arguments = PRUNERS[name]
    return ragged.PRUNERS[kind](**arguments)


@functools.cache
def vit(dtype=torch.float16, **more):
    return ragged.load_deit("deit_tiny", weights="random", seed=0, **more).to("cuda", dtype)


def model(name, backend="triton"):
    return ragged.RaggedViT(vit(), pruner(name), backend)


def noise(high, wide, g, dtype):
    """Noise (3, high, wide) whose contrast differs from patch to patch."""
    contrast = torch.rand(1, high // 16, wide // 16, generator=g).mul(3 * torch.rand(1, generator=g)).exp()
    contrast = contrast.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return (torch.randn(3, high, wide, generator=g) * contrast).to("cuda", dtype)


@functools.cache
def images(batch, seed, dtype=torch.float16, spread="U(112,448) px"):
    g = torch.Generator().manual_seed(seed)
    return [noise(side, side, g, dtype) for side in sides(spread, batch, seed)]


def tokens_in(given):
    return sum(1 + image.shape[1] * image.shape[2] // 256 for image in given)


@pytest.mark.parametrize("name", ["none", "evit"])
def test_a_captured_list_is_timm_image_by_image(name):
    """In float32; pruned, each image alone through the padded pipeline of a model that takes any size."""
    dynamic = vit(torch.float32, dynamic_img_size=True)
    given = images(12, 5, torch.float32)
    g = torch.Generator().manual_seed(0)
    given = [*given, noise(160, 304, g, torch.float32), noise(112, 16, g, torch.float32)]
    alone = dynamic if name == "none" else ragged.RaggedViT(dynamic, pruner(name), "sdpa_padded")
    want = torch.cat([alone(image[None]) for image in given])
    captured = ragged.RaggedViT(vit(torch.float32), pruner(name), "triton").capture(16, tokens=6000, longest=LARGEST)
    error = (captured(given) - want).abs().max().item()
    TABLE.append(f"list, {name}, float32, against {'timm' if name == 'none' else 'padded'} image by image: {error:.2g}")
    assert error < (1e-4 if name == "none" else 1e-3)


@pytest.mark.parametrize("name, backend", [*((name, "triton") for name in PRUNERS), ("evit", "sdpa_padded")])
def test_a_captured_list_equals_eager(name, backend):
    calls = [images(16, 0), images(16, 1), images(9, 2), images(1, 3)]
    totals, plain = [tokens_in(call) for call in calls], model(name, backend)
    pads = ragged.BACKENDS[backend].pads
    between = (700, 785) if pads else (totals[0] // 4, max(totals)) if name in ADAPTIVE else None
    least = int(0.9 * min(totals[:2]))
    captured = plain.capture(16, tokens=(least, int(1.02 * max(totals))), longest=LARGEST, between=between)
    assert captured.waits == (name in ADAPTIVE)
    worst = 0.0
    for call in calls[:2] if pads else calls:
        got = captured(call)
        assert got.isfinite().all() and torch.equal(got, eager_list(captured, call))
        worst = max(worst, (got - plain(call)).abs().max().item())
    with waits() as seen:
        captured(calls[0])
    assert not seen
    TABLE.append(
        f"list, {name}, {backend}: max {worst:.5f}, {len(captured.fronts)} fronts, {len(captured.sizes)} "
        f"rests, surplus {captured.token_waste:.1%} before and {captured.capacity_waste:.1%} after the cuts"
    )
    assert worst < LIMIT or name in ADAPTIVE


def test_lists_on_side_streams_and_odd_memory():
    plain = model("evit")
    captured = plain.capture(8, tokens=(1000, 3200), longest=LARGEST)
    calls = [images(8, seed) for seed in range(10, 20)]
    calls = [call for call in calls if tokens_in(call) <= 3200][:4]
    want = [captured(call) for call in calls]
    torch.cuda.synchronize()
    got = []
    for call in calls:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            got.append(captured([image.mul(1.0) for image in call]))  # freed at once
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    turned = [image.transpose(1, 2).contiguous().transpose(1, 2) for image in calls[0]]
    assert torch.equal(captured(turned), want[0])


def test_positions_that_were_loaded_later_are_taken():
    network = ragged.load_deit("deit_tiny", weights="random", seed=0).to("cuda", torch.float16)
    plain = ragged.RaggedViT(network, pruner("evit"), "triton")
    captured, given = plain.capture(8, tokens=6000, longest=LARGEST), images(8, 10)
    before = captured(given)
    network.pos_embed.mul_(2.0)
    after = captured(given)
    assert not torch.equal(before, after) and (after - plain(given)).abs().max() < LIMIT


def test_what_a_captured_list_refuses():
    captured = model("evit").capture(8, tokens=3200, longest=LARGEST)
    given = images(4, 0)
    for bad, text in (
        ([*given, *given, *given], "up to 8 images, got 12"),
        (images(1, 0, spread="U(464,464) px"), "up to 785 tokens an image"),
        (images(8, 0, spread="U(432,448) px"), "up to 3200 tokens in all"),
        ([image.float() for image in given], "float16"),
        ([image.cpu() for image in given], "cpu"),
        ([], "empty|at least one|one image"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            captured(bad)
    with pytest.raises(TypeError, match="list"):
        captured(torch.zeros(1, 3, 224, 224, device="cuda", dtype=torch.float16))


@pytest.mark.parametrize("name", ["none", "evit", "tau"])
def test_captured_tokens_equal_eager(name):
    plain = model(name)
    given = quadtree_tokens(vit(), normalise(photographs()[0]).to("cuda", torch.float16), 0.5)
    tokens, cu_seqlens, lengths = given
    between = None if name != "tau" else (0, len(tokens))
    captured = plain.capture(len(lengths), tokens=(len(tokens), len(tokens) + 200), longest=197, embedded=True,
                             between=between)  # fmt: skip
    got = captured(tokens, cu_seqlens, lengths=lengths)
    assert torch.equal(got, eager_list(captured, tokens, lengths))
    assert torch.equal(got, captured(tokens, cu_seqlens))  # told nothing, it reads the offsets
    want = plain.forward_tokens(tokens, cu_seqlens, lengths=lengths)
    assert (got - want).abs().max() < LIMIT or name == "tau"


@pytest.mark.parametrize("backend", ["triton", "sdpa_padded"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_many_adaptive_cuts_in_one_graph(name, backend):
    """ATS decides nine times; one wait, after the first cut, bounds all that follow."""
    plain = model(name, backend)
    captured = plain.capture(16)
    used = set()
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        given = torch.stack([noise(224, 224, g, torch.float16) for _ in range(16)])
        got = captured(given)
        assert got.isfinite().all() and torch.equal(got, eager(plain, captured, given))
        used.add(captured.rest.size)
    with waits() as seen:
        captured(given)
    assert captured.waits == 1 and not seen
    TABLE.append(
        f"{len(plain.pruner.at)} cuts, {name}, {backend}: {len(captured.sizes)} rests, {len(used)} used, "
        f"surplus {captured.capacity_waste:.1%}"
    )
