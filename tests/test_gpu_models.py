"""On a GPU: whole models. Ragged against padded on the same masks, graphs against eager, waits. Prints a table."""

import functools
import gc

import pytest
import timm
import torch
from gpu_tools import eager, print_table, waits
from pruner_cases import VARIANTS

import ragged
from ragged.graph.parts import Recorder
from ragged.packing import Padded
from ragged.pruners import GivenLengths, Pruner
from ragged.rules import View

pytestmark = pytest.mark.gpu
LIMIT = 0.007  # largest difference of any logit, ragged against padded, in float16
CLEAR = 1e-3  # a top-1 closer than this to the second is a coin toss in float16
BATCH = 16
TABLE = []

PUBLISHED = {
    "threshold_l2": {"keep": 0.5}, "dynamicvit": {"keep": 0.7}, "evit": {"keep": 0.7}, "ats": {"samples": 196},
    "tau": {"tau": 1.0}, "random": {"keep": 0.7}, "random_adaptive": {"keep": 0.7, "adaptive": True},
}  # fmt: skip
SINGLE_CUT = {"at": (3,), "where": "after"}
SCHEDULES = [(name, single) for name in PUBLISHED for single in (False, True)]
BACKENDS = ("triton", "flash_attn", "torch_varlen", "nested", "paper_triton", "paper_padded")


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    print_table(request, "fp16 logits against sdpa_padded on the same masks, DeiT-S, 16 images, random weights", TABLE)


def build(name, single=False, **more):
    arguments = PUBLISHED[name] | (SINGLE_CUT if single else {}) | more
    return ragged.PRUNERS[VARIANTS.get(name, name)](**arguments)


@functools.cache
def vit(name="deit_small", dtype=torch.float16):
    return ragged.load_deit(name, weights="random", seed=0).to("cuda", dtype)


@functools.cache
def pictures(seed=0, batch=BATCH, dtype=torch.float16):
    """Noise whose contrast differs from place to place and from image to image."""
    g = torch.Generator().manual_seed(seed)
    contrast = torch.rand(batch, 1, 14, 14, generator=g).mul(torch.rand(batch, 1, 1, 1, generator=g) * 3).exp()
    x = torch.randn(batch, 3, 224, 224, generator=g) * contrast.repeat_interleave(16, 2).repeat_interleave(16, 3)
    return x.to("cuda", dtype)


class Copycat(Pruner):
    """Another pruner's decisions: written down on the first pass, repeated on every later one.

    Scores of two layouts differ in the last digits, so that near ties may fall either way; with the selections
    repeated both layouts keep the same tokens, and what remains is the arithmetic.
    """

    def __init__(self, pruner):
        super().__init__(pruner.name, pruner.at, pruner.where)
        self.pruner, self.memory = pruner, {}
        self.needs, self.adaptive = pruner.needs, pruner.adaptive

    def bind(self, dim, depth):
        self.pruner.bind(dim, depth)

    def select(self, view):
        if view.stage not in self.memory:
            self.memory[view.stage] = self.pruner.select(view)
        return self.memory[view.stage]


def kept(trace):
    return [[sorted(ids.tolist()) for ids in stage.ids] for stage in trace.stages]


@pytest.mark.parametrize("name, single", SCHEDULES)
def test_ragged_against_padded_on_the_same_masks(name, single):
    copycat = Copycat(build(name, single))
    want = ragged.RaggedViT(vit(), copycat, backend="sdpa_padded").trace(pictures())
    rows = [f"{min(stage.counts)}-{max(stage.counts)}" for stage in want.stages]
    TABLE.append(f"{name}, {'single cut' if single else 'published'}: rows kept {' '.join(rows)}")
    top = want.logits.float().topk(2).values
    clear = top[:, 0] - top[:, 1] > CLEAR
    assert clear.float().mean() > 0.8 and want.logits.isfinite().all()
    for backend in BACKENDS:
        if ragged.BACKENDS[backend].why_not("cuda", torch.float16, 64):
            continue
        got = ragged.RaggedViT(vit(), copycat, backend=backend).trace(pictures())
        assert kept(got) == kept(want)
        difference = (got.logits.float() - want.logits.float()).abs()
        agree = got.logits.argmax(1) == want.logits.argmax(1)
        worst, mean = difference.max().item(), difference.mean().item()
        TABLE.append(f"    {backend:13} max {worst:.5f}  mean {mean:.6f}  same top-1 {int(agree.sum())} of {BATCH}")
        assert worst < LIMIT and agree[clear].all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_decisions_agree_with_the_cpu(name):
    """In float32 on small images' worth of layers nothing is close: GPU and CPU keep the same tokens."""
    model = ragged.RaggedViT(vit("deit_tiny", torch.float32), build(name))
    images = pictures(batch=4, dtype=torch.float32)
    on_gpu = model.trace(images)
    on_cpu = ragged.RaggedViT(ragged.load_deit("deit_tiny", weights="random", seed=0), build(name)).trace(images.cpu())
    same = [a == b for a, b in zip(kept(on_gpu)[0], kept(on_cpu)[0])]
    assert sum(same) >= 3, "the first cut sees the same numbers but for the last digits"
    if kept(on_gpu) == kept(on_cpu):
        torch.testing.assert_close(on_gpu.logits.cpu(), on_cpu.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_keeping_everything_is_the_plain_model(dtype):
    want = vit(dtype=dtype)(pictures(dtype=dtype))
    for name in ("threshold_l2", "dynamicvit", "evit"):
        got = ragged.RaggedViT(vit(dtype=dtype), build(name, keep=1.0))(pictures(dtype=dtype))
        assert (got - want).abs().max() < LIMIT * (8 if dtype == torch.bfloat16 else 1)


# --- waits

WAITS = {"threshold_l2": 0, "dynamicvit": 0, "evit": 0, "tau": 1, "ats": 9, "random": 0, "random_adaptive": 3}


@pytest.mark.parametrize("backend", ["triton", "sdpa_padded"])
@pytest.mark.parametrize("name", WAITS)
def test_how_often_the_host_waits(name, backend):
    """Never with fixed counts, once for every cut that decides on the GPU."""
    model = ragged.RaggedViT(vit(), build(name), backend=backend)
    for _ in range(2):
        model(pictures())
    with waits() as seen:
        model(pictures())
    assert len(seen) == WAITS[name], [str(w.message) for w in seen]


# --- graphs


@pytest.mark.parametrize("backend", ["triton", "sdpa_padded", "flash_attn", "torch_varlen"])
@pytest.mark.parametrize("name, single", SCHEDULES)
def test_a_graph_equals_eager(name, single, backend):
    if ragged.BACKENDS[backend].why_not("cuda", torch.float16, 64):
        pytest.skip("not here")
    model = ragged.RaggedViT(vit("deit_tiny"), build(name, single), backend=backend)
    captured = model.capture(8)
    assert captured.waits == (1 if model.pruner.adaptive else 0)
    results = []
    for seed in (0, 1, 2, 0):
        images = pictures(seed, 8)
        results.append(captured(images))
        assert torch.equal(results[-1], eager(model, captured, images))
        if single or name != "ats":  # nine decisions in float16: some fall the other way in buffers of another size
            assert (results[-1] - model(images)).abs().max() < LIMIT
        assert 0 <= captured.capacity_waste
    assert torch.equal(results[0], results[3]) and not torch.equal(results[0], results[1]), "results are copies"


def test_a_graph_outlives_the_variables_it_was_made_from():
    """A graph remembers addresses: were the pruner's tensors freed, others would be written over them."""
    vit, images = ragged.load_deit("deit_tiny").to("cuda", torch.float16), torch.randn(8, 3, 224, 224).cuda().half()
    for make in (lambda: GivenLengths([30, 60, 90, 120, 150, 50, 70, 100]), lambda: ragged.PRUNERS["dynamicvit"]()):
        want = ragged.RaggedViT(vit, make())(images)
        fast = ragged.RaggedViT(vit, make()).capture(8)
        junk = [torch.full((n,), 2**30, dtype=torch.int32, device="cuda") for n in range(8, 4096, 8)]
        assert torch.equal(fast(images), want), len(junk)


@pytest.mark.filterwarnings("ignore:torch.compile. a RaggedViT:RuntimeWarning")
@pytest.mark.parametrize("name", [None, "evit", "dynamicvit", "ats"])
def test_the_whole_model_may_be_compiled(name):
    """By its user, from outside, with the usual compiler; a batch, and a list of images of different sizes."""
    network = timm.create_model("deit_tiny_patch16_224", depth=2).eval().to("cuda", torch.float16)
    model = ragged.RaggedViT(network, name and build(name, at=(1,)))
    torch._dynamo.reset()
    compiled = torch.compile(model)
    for images in (pictures(batch=4), [pictures()[0], pictures()[1, :, :192, :160]]):
        assert (compiled(images) - model(images)).abs().max() < LIMIT


def test_a_graph_for_every_total():
    """Lengths from the smallest to the largest bucket: each call takes the tightest graph there is."""
    images, used = pictures(batch=4), set()
    pruner = GivenLengths([197] * 4, at=(3,))
    model = ragged.RaggedViT(vit("deit_tiny"), pruner, backend="triton").to("cuda")
    captured = model.capture(4)
    for lengths in ([197] * 4, [1] * 4, [100, 1, 197, 30], [50] * 4, [197, 197, 197, 196], [2, 1, 1, 1]):
        pruner.counts.copy_(torch.tensor(lengths))
        got, want = captured(images), eager(model, captured, images)
        assert torch.equal(got, want) and got.isfinite().all()
        assert (got - model(images)).abs().max() < LIMIT
        used.add(round(sum(lengths) * (1 + captured.capacity_waste)))
    assert len(used) >= 4


@pytest.mark.parametrize("backend", ["triton", "sdpa_padded"])
@pytest.mark.parametrize("name, single", [("tau", True), ("ats", True), ("ats", False)])
def test_a_graph_that_never_waits(name, single, backend):
    """With room for all rows nobody has to ask, however often counts are decided."""
    model = ragged.RaggedViT(vit("deit_tiny"), build(name, single), backend=backend)
    captured = model.capture(4, wait=False)
    assert captured.waits == 0 and not captured.buckets
    for seed in (0, 1):
        images = pictures(seed, 4)
        got = captured(images)
        assert torch.equal(got, eager(model, captured, images))
        assert not single or (got - model(images)).abs().max() < LIMIT
        assert captured.capacity_waste >= 0
        with waits() as seen:
            captured(images)
        assert not seen


def test_few_rows_are_not_worth_a_wait():
    model = ragged.RaggedViT(vit("deit_tiny"), build("tau"))
    assert [model.capture(batch).waits for batch in (1, 2, 4)] == [0, 0, 1]
    assert model.capture(1, wait=True, between=(20, 197)).waits == 1
    with pytest.raises(TypeError, match="wait"):
        model.capture(1, wait=1)


def test_a_graph_on_side_streams():
    model = ragged.RaggedViT(vit("deit_tiny"), build("tau"), backend="triton")
    captured = model.capture(8)
    batches = [pictures(seed, 8) for seed in range(4)]
    want = [captured(x) for x in batches]
    torch.cuda.synchronize()
    got = []
    for x in batches:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            got.append(captured(x))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_what_a_graph_refuses():
    model = ragged.RaggedViT(vit("deit_tiny"), build("evit"))
    captured = model.capture(8)
    for bad in (pictures(batch=4), pictures(batch=8).float(), pictures(batch=8).cpu()):
        with pytest.raises(ValueError, match="images"):
            captured(bad)
    for pruner, backend in (("evit", "paper_padded"), ("evit", "reference"), ("evit", "nested")):
        with pytest.raises(NotImplementedError, match="capture"):
            ragged.RaggedViT(vit("deit_tiny"), build(pruner), backend=backend).capture(8)
    with pytest.raises(ValueError, match="batch_size"):
        model.capture(0)


# --- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evit", "tau"])
def test_compiled_equals_eager(name):
    copycat = Copycat(build(name))
    plain = ragged.RaggedViT(vit("deit_tiny"), copycat, backend="triton")
    compiled = ragged.RaggedViT(vit("deit_tiny"), copycat, backend="triton").compile()
    for seed in (0, 1):
        copycat.memory.clear()
        want = plain(pictures(seed, 8))
        difference = (compiled(pictures(seed, 8)) - want).abs().max().item()
        TABLE.append(f"{name}, compiled against eager: max {difference:.5f}")
        assert difference < LIMIT


@pytest.mark.slow
def test_a_graph_of_compiled_blocks():
    model = ragged.RaggedViT(vit("deit_tiny"), build("tau"), backend="triton").compile()
    captured = model.capture(8, between=(8 * 80, 8 * 120))
    for seed in (0, 1):
        images = pictures(seed, 8)
        difference = (captured(images) - eager(model, captured, images)).abs().max().item()
        assert difference < LIMIT


@pytest.mark.slow
def test_a_recording_outlives_what_torch_compile_does_with_cublas_s_memory():
    """`mode="reduce-overhead"` gives back the memory in which cuBLAS works. Where it came from a trial run, somebody
    else got it while the graphs still wrote there."""
    images = pictures(batch=64)
    captured = ragged.RaggedViT(vit(), build("evit")).capture(64)
    want = captured(images)
    other = torch.compile(vit("deit_tiny"), mode="reduce-overhead", dynamic=False)
    for _ in range(4):
        other(images)
    torch.cuda.empty_cache()
    held = [torch.zeros(1 << 24, dtype=torch.uint8, device="cuda") for _ in range(64)]
    for _ in range(3):
        torch.testing.assert_close(captured(images), want, rtol=0, atol=0)
    assert not any(x.any() for x in held)


def test_a_recording_does_not_work_in_the_memory_of_another():
    """Streams are used again in the end: the last recording is made on the stream of one that is gone by then."""
    a, b = (torch.randn(shape, device="cuda").half() for shape in ((128, 16384), (16384, 128)))
    seen, last = [], None
    while len(seen) == len(set(seen)):
        recorder = Recorder(None)
        recorder.try_out(lambda _: a @ b)
        seen.append(recorder.stream.cuda_stream)
        last = recorder.record(lambda _: a @ b)
    assert len(seen) > 10, "not before it has to be"
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # as torch.compile(mode="reduce-overhead") does
    torch.cuda.empty_cache()
    held = [torch.zeros(1 << 24, dtype=torch.uint8, device="cuda") for _ in range(64)]
    for _ in range(3):
        last.replay()
        torch.testing.assert_close(last.result, a @ b, rtol=1e-2, atol=1e-2)
    assert not any(x.any() for x in held)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_predictor_s_kernels_agree_with_its_modules(batch):
    pruner = build("dynamicvit")
    ragged.RaggedViT(vit(), pruner)
    tokens = torch.randn(batch, 197, 384, device="cuda", dtype=torch.float16)
    ids = torch.arange(197, device="cuda").expand(batch, 197)
    for predictor in pruner.score_predictor:
        found = predictor.scores(View(Padded(tokens, ids, 197, count=197), 1, 0))
        want = predictor.float()(tokens[:, 1:].float())[..., 0]
        assert found is not None
        torch.testing.assert_close(found, want, rtol=5e-3, atol=5e-3)
