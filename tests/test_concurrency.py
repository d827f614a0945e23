"""Several threads, streams and devices at once, and too little memory. The launcher's bookkeeping is tried on the CPU,
with a launcher that only writes down how it was called; the rest needs a GPU, some of it two."""

import contextlib
import copy
import functools
import sys
import threading

import pytest
import torch
from attention_cases import assert_in_budget, inputs, offsets
from launch_cases import Driver, compiled

import ragged
from ragged import launch
from ragged.pruners import GivenLengths
from ragged.tiles import choose_tiles

gpu = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
HALF = torch.float16


def at_once(*jobs):
    """All jobs in threads of their own, started together; the first error of any of them is raised."""
    errors, gate = [], threading.Barrier(len(jobs))

    def run(job):
        try:
            gate.wait()
            with torch.no_grad():  # every thread begins with gradients
                job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=1200)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.fixture
def restless():
    """Threads change places as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def cpu_as_device(monkeypatch):
    """The launcher takes CPU tensors for tensors of the current device; nothing is really started."""
    launch.forget()
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "current_device", lambda: -1)
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)
    yield
    launch.forget()


# --- the launcher's bookkeeping


def kinds_of_calls():
    """Calls that differ in what a plan compares: heads, head dimension, dtype, one cu_seqlens or two."""
    for heads, dim, dtype, separate in (
        (1, 16, HALF, False), (2, 16, HALF, False), (2, 32, HALF, True), (3, 16, torch.float32, False),
        (3, 64, torch.bfloat16, True), (5, 16, HALF, True),
    ):  # fmt: skip
        yield inputs([3, 5], heads, dim, dtype, lengths_k=[3, 5] if separate else None), (heads, dim, dtype, separate)


def tiles_of(q, k, cu, longest):
    images = len(cu) - 1
    equal = len(q) == images * longest and len(k) == images * longest
    return choose_tiles(longest, longest, q.shape[2], images * q.shape[1], equal, q.element_size())


@pytest.mark.skipif(launch.TensorGuards is None, reason="no TensorGuards in this PyTorch: calls take the long way")
def test_threads_share_the_remembered_calls(cpu_as_device, restless):
    """While calls of six kinds are remembered, used and forgotten, none is ever started with another one's kernel, or
    with other tensors than its own."""
    used = []

    def worker(arguments, kind):
        q, k, v, cu_q, cu_k, longest, _ = arguments
        tiles = tiles_of(q, k, cu_q, longest)
        mine = {x.data_ptr() for x in (q, k, v, cu_q, cu_k)}

        def launcher(x, y, stream, *pointers):
            assert mine <= set(pointers), "another call's tensors"
            used.append(kind)

        for _ in range(2000):
            launch.remember(q, k, v, cu_q, cu_k, tiles, launcher)
            out = launch.quick(q, k, v, cu_q, cu_k, longest, longest, 0.25)
            assert out is None or (out.shape == q.shape and out.dtype == q.dtype)
        # both lists are bounded, whatever threads add at the same moment
        assert all(len(plans) <= launch.MOST_PLANS + 8 for plans in launch._plans.values())

    def forgetter():
        for _ in range(2000):
            launch.forget()

    at_once(*[functools.partial(worker, *call) for call in kinds_of_calls()], forgetter)
    assert len({*used}) == 6, "every kind was started the short way at some time"


class Kernel:
    """Stands for a JIT function: compiles for whoever asks, and counts."""

    def __init__(self, log):
        self.compilations, self.log = 0, log

    def __getitem__(self, grid):
        def start(*arguments, **constants):
            self.compilations += 1
            pointers = [a.data_ptr() if torch.is_tensor(a) else a for a in arguments]
            self.log.append((*constants.values(), *pointers))
            return compiled(["*fp32", "i32", "i32", "constexpr"], function=constants["N"])

        return start


def test_threads_share_the_launchers(cpu_as_device, restless, monkeypatch):
    """Two threads may both compile a kernel that neither has found yet; every launch still gets its own arguments."""
    log, kernels, driver = [], [], Driver()
    monkeypatch.setattr(launch, "cu_launch_kernel", driver)
    kernels += [Kernel(log) for _ in range(3)]
    calls = 300

    def worker(number):
        room = torch.empty(64 * calls, dtype=torch.float32)
        first = -(room.data_ptr() // 4) % 4  # the first element on a multiple of 16 bytes
        for i in range(calls):
            x, kernel = room[first + 4 * i :], kernels[i % 3]
            launch.start(kernel, (i % 3,), (1, 1), (x,), (number, i), {"N": i % 3}, {})

    def forgetter():
        for _ in range(10):
            launch.forget()

    at_once(*[functools.partial(worker, n) for n in range(4)], forgetter)
    log += [(started.function, *started.read[:3]) for started in driver.log]
    assert sorted(row[2:] for row in log) == sorted((n, i) for n in range(4) for i in range(calls))
    assert all(row[0] == row[3] % 3 for row in log), "the constants of another kernel"
    assert sum(kernel.compilations for kernel in kernels) < 4 * calls / 2, "most launches went the short way"


def test_forgetting_leaves_nothing(cpu_as_device):
    for (q, k, v, cu_q, cu_k, longest, _), _ in kinds_of_calls():
        launch.remember(q, k, v, cu_q, cu_k, tiles_of(q, k, cu_q, longest), lambda *_: None)
    launch._launchers["key"] = None
    assert any(launch._plans.values()) or launch.TensorGuards is None
    launch.forget()
    assert not launch._launchers and not any(launch._plans.values())


def test_threads_use_one_model():
    """The eager model keeps nothing between or during calls."""
    from pruner_cases import pictures, small_vit

    model = ragged.RaggedViT(small_vit(), ragged.PRUNERS["ats"](samples=20, at=(1, 3)))
    batches = [pictures(4, 112, seed) for seed in range(3)]
    want = [model(x) for x in batches]

    def worker(x, logits):
        for _ in range(5):
            torch.testing.assert_close(model(x), logits, rtol=1e-5, atol=1e-5)

    at_once(*[functools.partial(worker, *pair) for pair in zip(batches, want)])


# --- threads and streams on a GPU


@functools.cache
def network(device="cuda"):
    return ragged.load_deit("deit_tiny", weights="random").to(device, HALF)


def images(seed, batch=8, device="cuda"):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 224, 224, generator=g).to(device, HALF) * (1 + seed)


@gpu
def test_two_threads_on_two_streams():
    """Attention, an eager model and one recording, shared: the same bits as one behind the other."""
    launch.forget()
    eager = ragged.RaggedViT(network(), ragged.PRUNERS["threshold_l2"](tau=1.0))
    captured = ragged.RaggedViT(network(), ragged.PRUNERS["threshold_l2"](tau=1.0)).capture(8)
    calls = [inputs(lengths, 3, 64, HALF, "cuda") for lengths in ([197] * 9, [3, 100, 0, 64, 197, 65])]
    batches = [images(seed) for seed in range(2)]
    want = [(ragged.varlen_attention(*call), eager(x), captured(x)) for call, x in zip(calls, batches)]
    torch.cuda.synchronize()

    def worker(call, x, expected):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(100):
                if i % 25 == 0:
                    launch.forget()
                assert torch.equal(ragged.varlen_attention(*call), expected[0])
                if i % 5 == 0:
                    assert (eager(x) - expected[1]).abs().max() < 0.007
                    assert torch.equal(captured(x), expected[2])
            torch.cuda.current_stream().synchronize()

    at_once(*[functools.partial(worker, *job) for job in zip(calls, batches, want)])


@gpu
def test_two_streams_from_one_thread():
    """Enqueued one behind the other without waiting, on streams that run side by side."""
    captured = ragged.RaggedViT(network(), GivenLengths([60] * 8)).to("cuda").capture(8)
    batches = [images(seed) for seed in range(6)]
    want = [captured(x) for x in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(10):
        got = []
        for i, x in enumerate(batches):
            with torch.cuda.stream(streams[i % 2]):
                got.append(captured(x))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@gpu
@two_gpus
def test_two_devices_at_once():
    """One thread each: attention, packing, eager models and recordings, while the current device is the first."""
    launch.forget()
    pruner = ragged.PRUNERS["threshold_l2"](tau=1.0)
    models = {d: ragged.RaggedViT(copy.deepcopy(network()).to(d), copy.deepcopy(pruner)) for d in ("cuda:0", "cuda:1")}
    recorded = {d: model.capture(8) for d, model in models.items()}
    x = images(0)
    want = {d: recorded[d](x.to(d)).cpu() for d in models}
    assert (want["cuda:0"] - want["cuda:1"]).abs().max() < 0.007

    def worker(device):
        call, mine = inputs([197, 3, 0, 64, 120], 3, 64, HALF, device), x.to(device)
        keep = torch.rand(8, 197, device=device) < 0.5
        tokens = torch.randn(8, 197, 192, device=device, dtype=HALF)
        for i in range(60):
            assert_in_budget(ragged.varlen_attention(*call), call)
            assert torch.equal(recorded[device](mine).cpu(), want[device])
            packed = ragged.pack(tokens, keep)
            assert torch.equal(packed.tokens, tokens[keep]) and packed.tokens.device == torch.device(device)
            if i % 10 == 0:
                assert (models[device](mine).cpu() - want[device]).abs().max() < 0.007
        torch.cuda.synchronize(device)

    at_once(*[functools.partial(worker, device) for device in models])


# --- too little memory


@contextlib.contextmanager
def little_memory():
    """PyTorch may hold what it holds now and 600 MB more."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600e6) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@gpu
def test_out_of_memory_is_said_and_survived():
    """Eager and recorded: the error names memory, and the next batch that fits gives what it gave before."""
    model = ragged.RaggedViT(network(), ragged.PRUNERS["evit"]())
    small, recorded = images(0), model.capture(8)
    want = model(small), recorded(small)
    call = inputs([50, 60], 3, 64, HALF, "cuda")
    before = ragged.varlen_attention(*call)
    huge = torch.zeros(1, 3, 224, 224, device="cuda", dtype=HALF).expand(4096, -1, -1, -1)  # no memory of its own
    many = torch.zeros(1, 3, 64, device="cuda", dtype=HALF).expand(4_000_000, -1, -1)
    cu = offsets([4_000_000 // 20_000] * 20_000, "cuda")
    long_call = (many, many, many, cu, cu, 200, 200)
    with little_memory():
        for refused in (
            lambda: model(huge), lambda: model.capture(4096), lambda: ragged.varlen_attention(*long_call)
        ):  # fmt: skip
            with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
                refused()
            assert torch.equal(model(small), want[0]) and torch.equal(recorded(small), want[1])
            assert torch.equal(ragged.varlen_attention(*call), before)
    assert torch.equal(model.capture(8)(small), want[1]), "and it can be recorded again"
