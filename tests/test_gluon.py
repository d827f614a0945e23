"""The kernel in Gluon without a GPU: which calls it takes, and that the installed Triton compiles it for Hopper."""

import itertools

import pytest
import torch
from attention_cases import inputs

import ragged
from ragged import attention, backends, launch, tiles
from ragged.course.compiled import PROCESSORS, compiled, facts
from ragged.tiles import GLUON_HEADDIMS, GLUON_LENGTHS, pipe_tiles, prefers_gluon, takes_gluon

HALF, BRAIN = torch.float16, torch.bfloat16
MOST_SHARED = 227 * 1024  # bytes a program may have on a Hopper
# Its place in Triton: a version without it is told apart by `launch.no_gluon`.
gluon = pytest.mark.skipif(
    launch.INTERPRET or not launch.installed("triton.experimental.gluon.language.nvidia.hopper"),
    reason="needs Triton's compiler, with Gluon for Hopper",
)
CASES = list(itertools.product(GLUON_LENGTHS, GLUON_HEADDIMS, (1, 396, 397, 10**5)))


@pytest.mark.parametrize("dim", GLUON_HEADDIMS)
def test_tiles_cover_every_query_and_key_once(dim):
    for n, _, programs in (case for case in CASES if case[1] == dim):
        found = pipe_tiles(n, dim, programs, PROCESSORS)
        s = dict(found.shape)
        assert s["A"] + s["B"] <= n <= s["A"] + s["B"] + s["TAIL"], "only the last piece is masked"
        rows = 64 * s["TILES"] * s["PARTS"]
        assert n <= rows < n + 64 and found.split == s["PARTS"]
        assert n >= rows - 64, "only the last tile of a part is masked, and others must be full"
        assert s["TILES"] >= 2, "both groups empty every stage"
        bytes_held = s["STAGES"] * (64 * s["TILES"] + 2 * (s["A"] + s["B"] + s["TAIL"])) * dim * 2
        assert s["STAGES"] == 2 and bytes_held < MOST_SHARED
        assert all(s[x] in (0, 16, 32, 64, 128) for x in ("A", "B", "TAIL"))


def test_lengths_choose_among_few_kernels():
    assert len({pipe_tiles(n, dim, programs, PROCESSORS) for n, dim, programs in CASES if dim == 64}) <= 16


def test_the_grid_is_the_multiprocessors_or_the_items():
    few, many = (pipe_tiles(197, 64, programs, PROCESSORS) for programs in (12, 3000))
    assert few.split == 2 and tiles.grid_of(few, 197, 12, 1, PROCESSORS) == (24, 1)
    assert many.split == 1 and tiles.grid_of(many, 197, 12, 250, PROCESSORS) == (PROCESSORS, 1)


REFUSED = [(64, 64, 64, True, 2), (209, 209, 64, True, 2), (99, 98, 64, True, 2), (99, 99, 64, False, 2),
           (99, 99, 128, True, 2), (99, 99, 64, True, 4)]  # fmt: skip


@pytest.mark.parametrize("max_q, max_k, dim, equal, itemsize", REFUSED)
def test_other_calls_are_not_taken(max_q, max_k, dim, equal, itemsize):
    assert not takes_gluon(max_q, max_k, dim, 100, equal, itemsize)
    assert not prefers_gluon(max_q, max_k, dim, 100, equal, itemsize)


def test_auto_prefers_it_only_where_it_runs():
    for n, programs, equal in itertools.product(range(1, 300), (1, 48, 200, 800, 5000), (False, True)):
        kind = (n, n, 64, programs, equal, 2)
        assert takes_gluon(*kind) or not prefers_gluon(*kind)


def test_auto_takes_it_where_it_gains():
    """Heads times images: with few of them the kernels in Triton fill the GPU better."""
    cells = itertools.product((65, 99, 140, 170, 197), (48, 192, 768, 3072))
    taken = {(n, programs) for n, programs in cells if prefers_gluon(n, n, 64, programs, True, 2)}
    assert taken == {(65, 768), (99, 768), (99, 3072), (140, 768), *itertools.product((170, 197), (192, 768, 3072))}
    assert not any(prefers_gluon(n, n, 32, 768, True, 2) for n in GLUON_LENGTHS), "measured with 64 alone"


def test_auto_takes_it_on_gpus_on_which_it_is_proven(monkeypatch):
    monkeypatch.setattr(launch, "no_gluon", lambda *_: None)
    monkeypatch.setattr(launch, "GLUON_PROVEN", {"NVIDIA H100"})
    for name, may in (("NVIDIA H100", True), ("NVIDIA H200", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert launch.auto_gluon.__wrapped__(torch.device("cuda"), HALF, 64) == may


def test_unequal_lengths_are_refused_in_a_sentence():
    for lengths in ([70, 71], [64, 64], [209], [3]):
        q, k, v, *sizes = inputs(lengths, dim=64)
        with pytest.raises(ValueError, match="backend 'gluon': expected .* equal length, 65 to 208 .* use 'triton' or"):
            backends._gluon(q.half(), k.half(), v.half(), *sizes, 0.125, False)


def test_why_not():
    why = launch.no_gluon
    assert "not 9.0" in why(torch.device("cpu"), HALF, 64) or launch.INTERPRET
    reason = ragged.BACKENDS["gluon"].why_not("cpu", HALF, 64)
    assert reason and (launch.INTERPRET or "CUDA" in reason or "Triton" in reason)
    facts = ragged.BACKENDS["gluon"]
    assert facts.equal_only and facts.packs_first and facts.recordable and facts.has_lse and not facts.auto


@pytest.mark.parametrize("capability, dtype, dim, says", [
    ((9, 0), HALF, 64, None), ((9, 0), BRAIN, 32, None), ((8, 0), HALF, 64, "8.0 is not 9.0"),
    ((10, 0), HALF, 64, "10.0 is not 9.0"), ((9, 0), torch.float32, 64, "float32"), ((9, 0), HALF, 128, "128"),
])  # fmt: skip
@gluon
def test_reasons_of_gpus(monkeypatch, capability, dtype, dim, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = launch.no_gluon.__wrapped__(torch.device("cuda"), dtype, dim)
    assert reason is None if says is None else says in reason


def test_without_gluon_and_interpreted(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "installed", lambda name: "gluon" not in name)
    assert "no Gluon" in launch.no_gluon.__wrapped__(torch.device("cuda"), HALF, 64)
    monkeypatch.setattr(launch, "INTERPRET", True)
    assert "interpreter" in launch.no_gluon.__wrapped__(torch.device("cuda"), HALF, 64)


def test_auto_asks_the_table_for_every_call(monkeypatch):
    """On a GPU that can run both kernels: the same kind of call, by shape."""
    ran = []
    monkeypatch.setattr(backends, "_gluon", lambda *a: ran.append("gluon"))
    monkeypatch.setattr(backends, "_triton", lambda *a: ran.append("triton"))
    monkeypatch.setattr(backends, "prefers_gluon", lambda n, *kind: n == 99 and kind[3])
    for lengths in ([99] * 2, [99, 98], [70] * 2):
        backends.gluon_or_triton(*inputs(lengths, dim=64), 0.125, False)
    assert ran == ["gluon", "triton", "triton"] and attention.gluon_or_triton is backends.gluon_or_triton


# ---- compiled ----


def assert_sound(kernel):
    assert kernel.metadata.shared <= MOST_SHARED and kernel.metadata.num_warps == 12
    ptx = kernel.asm["ptx"]
    assert "sm_90a" in ptx and "wgmma.mma_async" in ptx and "setmaxnreg" in ptx
    copies = [line for line in ptx.splitlines() if "cp.async.cg" in line or "cp.async.ca" in line]
    assert copies and all("0x10" in line for line in copies), "16 bytes at a time"
    assert "cp.async.mbarrier.arrive.noinc" in ptx


@gluon
@pytest.mark.parametrize("n, options", [
    (197, {}), (65, {"dtype": "bf16", "want_lse": True}), (99, {"headdim": 32}), (140, {"want_lse": True}),
    (197, {"programs": 12, "dtype": "bf16"}),
], ids=str)  # fmt: skip
def test_it_compiles_for_hopper(n, options):
    assert_sound(compiled(n, **options))


@gluon
@pytest.mark.slow
@pytest.mark.parametrize("dim", GLUON_HEADDIMS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_choice_of_tiles_compiles(dim, dtype, request):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("takes minutes: ask for it with -m slow")
    seen = set()
    for n, programs, lse in itertools.product(GLUON_LENGTHS, (12, 3000), (False, True)):
        key = (pipe_tiles(n, dim, programs, PROCESSORS), lse)
        if key not in seen:
            seen.add(key)
            assert_sound(compiled(n, dim, programs, dtype, lse))


@gluon
def test_the_launcher_reads_its_parameters(monkeypatch):
    """Eleven arguments, as `launch.quick` hands them over for every kernel of attention."""
    monkeypatch.setattr(launch, "cu_launch_kernel", print)
    letters, unused = launch.parameters(compiled(197))
    assert letters == "OOOOOOOfiii" + "O" * len(unused)


@gluon
def test_a_lesson_can_look_at_what_is_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as in a notebook without a GPU
    (found,) = facts(99)
    assert found["tokens"] == 99 and found["key tiles"] == "64 + 32 + 16" and found["warps"] == 12
    assert found["tensor-core products"] > 20 and found["16-byte copies"] > 20
    assert found["barriers"] == 6 * found["stages"]
    assert "does not compile it" in facts(3)
    monkeypatch.setattr(launch, "installed", lambda name: False)
    assert "not installed" in facts(99)
