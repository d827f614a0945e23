"""Every Triton kernel compiles for every chip of the last years, and fits into its shared memory. No GPU is needed.

The package's own launching code runs with a recorder in place of the launcher, so what is compiled here is what would
run: the same constants, tile shapes and compiler options, for whatever kernels `ragged/kernels/` holds, and that of
trees of guesses.
"""

import importlib
import itertools
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import ragged
from ragged import launch
from ragged import rows as row_ops
from ragged.kernels import attention as kernels
from ragged.kernels import backward as backward_kernels
from ragged.kernels import flow, patches
from ragged.pruners import Predictor
from ragged.rows import scores as score_ops

triton = pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
pytestmark = pytest.mark.skipif(launch.INTERPRET, reason="under TRITON_INTERPRET=1 nothing is compiled")

# Shared memory one program may ask for, in bytes. A chip keeps 1 KiB of each block's for itself.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED = {chip: kib * 1024 for chip, kib in SHARED.items()}
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1",
}  # fmt: skip
LENGTHS = (1, 16, 17, 32, 33, 64, 65, 99, 128, 129, 197, 256, 257, 577, 1024, 1025, 4096)
HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16


class Recorder:
    """Stands in for every kernel and for `launch.start`; keeps what was asked for as (kernel, arguments, constants,
    options)."""

    def __init__(self, monkeypatch):
        self.asked, self.kernels, self.monkeypatch = {}, {}, monkeypatch
        monkeypatch.setattr(launch, "usable", lambda device: True)
        monkeypatch.setattr(launch, "start", self.start)
        for info in pkgutil.iter_modules(ragged.kernels.__path__, "ragged.kernels."):
            if info.name == "ragged.kernels.hopper":
                continue  # written in Gluon: tests/test_gluon.py
            self.replace(importlib.import_module(info.name), monkeypatch)
        self.replace(importlib.import_module("ragged.speculation.kernel"), monkeypatch)

    def replace(self, module, monkeypatch):
        for name, fn in list(vars(module).items()):
            if isinstance(fn, triton.runtime.JITFunction) and name.endswith("_kernel"):
                self.kernels[name] = fn
                monkeypatch.setattr(module, name, Through(fn, self))

    def start(self, kernel, key, grid, tensors, numbers, constants, options):
        self.note(kernel.fn, (*tensors, *numbers), constants, options)

    def note(self, fn, arguments, constants, options):
        kinds = tuple(f"*{TYPES[x.dtype]}" if isinstance(x, torch.Tensor) else type(x) for x in arguments)
        key = (fn.__name__, kinds, tuple(constants.items()), tuple(options.items()))
        self.asked.setdefault(key, (fn, kinds, dict(constants), dict(options)))

    def __iter__(self):
        return iter(self.asked.values())


class Through:
    """`kernel[grid](...)`, written down instead of run."""

    def __init__(self, fn, recorder):
        self.fn, self.recorder = fn, recorder

    def __getitem__(self, grid):
        def call(*arguments, **constants):
            options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in constants}
            self.recorder.note(self.fn, arguments, constants, options)

        return call


def attend(dim, dtype, want_lse, longest, images, spare, heads=12):
    """One call as a model makes it: q, k and v are views of one projection. spare: rows fewer than equal lengths would
    fill, so that the images cannot all be equally long. On the meta device nothing is allocated."""
    q, k, v = torch.empty(images * longest - spare, 3, heads, dim, dtype=dtype, device="meta").unbind(1)
    cu = torch.empty(images + 1, dtype=torch.int32, device="meta")
    kernels.attend(q, k, v, cu, cu, longest, longest, dim**-0.5, want_lse)


def attend_backward(dim, dtype, has_dlse, longest, images, heads=12):
    """One backward pass as a model makes it."""
    q, k, v = torch.empty(images * longest, 3, heads, dim, dtype=dtype, device="meta").unbind(1)
    out, lse = torch.empty(q.shape, dtype=dtype, device="meta"), torch.empty(heads, len(q), device="meta")
    cu = torch.empty(images + 1, dtype=torch.int32, device="meta")
    dlse = torch.empty_like(lse) if has_dlse else None
    backward_kernels.attend_backward(out, dlse, q, k, v, out, lse, cu, cu, longest, longest, dim**-0.5, True)


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


def record_attention(recorder, cases, lengths=LENGTHS, batches=(1, 8, 256)):
    for dim, dtype, want_lse in cases:
        for longest, images, spare in itertools.product(lengths, batches, (0, 1)):
            if images * longest > spare:
                attend(dim, dtype, want_lse, longest, images, spare)
    return list(recorder)


def record_backward(recorder, cases, lengths=LENGTHS, batches=(1, 8, 256), chip=90):
    before = set(recorder.asked)
    recorder.monkeypatch.setattr(backward_kernels, "_shared_memory", lambda device: SHARED[chip])
    for dim, dtype, has_dlse in cases:
        for longest, images in itertools.product(lengths, batches):
            attend_backward(dim, dtype, has_dlse, longest, images)
    return [one for key, one in recorder.asked.items() if key not in before]


def predictor_parts(width, dtype):
    parts = [*(predictor := Predictor(width).to(dtype)).in_conv, *predictor.out_conv]
    return parts[0], parts[1::2]


def record_the_others(recorder, dims, dtypes):
    cu = torch.tensor([0, 16], dtype=torch.int32)
    for dtype in dtypes:
        x, ids, keep = torch.empty(16, 768, dtype=dtype), torch.arange(16), torch.ones(16, dtype=torch.bool)
        for more, blend in itertools.product((None, torch.empty_like(x)), (None, torch.empty(1, 16))):
            row_ops.move_rows(x, ids, cu[:-1], ids[None], blend, more)
        row_ops.kept_rows(keep, cu, 16, prefix=1)
        row_ops.grid_rows(x, cu, 16, 0.0)
        row_ops.first_rows(x, cu[:-1], 1)
        for more in (None, torch.empty_like(x)):
            row_ops.take_rows(x, ids, cu[:-1], ids[None], cu[1:], 16, 16, more)
            norm = torch.nn.LayerNorm(768, dtype=dtype)
            row_ops.take_normed_rows(x, ids, cu[:-1], ids[None], cu[1:], 16, 16, more, norm)
        flow._returned(x, ids)
        flow._returned(x, ids, torch.zeros(16), ids)
        table = torch.zeros(3, patches.COLUMNS, dtype=torch.int64)
        patches.pixel_rows(table, x, 16, 1, (16, 16))
        patches.place_rows(table, x, x[:1], 16, True)
        for n in (17, 197, 577, 1025):
            score_ops.best_rows(torch.empty(1, n, 6), 1, n // 2, rest=True)
            score_ops.sampled_rows(torch.empty(1, n), 1, 8, n)
            score_ops.best_rows(torch.empty(1, n, dtype=dtype), 1, n // 2, in_place=n % 2 == 1, rest=n % 2 == 0)
        for width in (192, 384) if dtype != torch.float32 else ():
            norm, layers = predictor_parts(width, dtype)
            x = torch.empty(32, width, dtype=dtype)
            score_ops.patch_scores(x, None, 16, 1, 15, norm, layers)
            score_ops.patch_scores(x, cu[:-1], cu[1:], 1, 15, norm, layers)
        for dim in dims:
            q, k, v = torch.empty(16, 3, 6, dim, dtype=dtype).unbind(1)
            for n in (16, 197):
                score_ops.cls_attention(q, k, cu[:-1], cu[1:], n, 0.1)
                parts = score_ops.importance(q, k, v, cu[:-1], cu[1:], n, 0.1)
                score_ops.sampled_rows(parts, 1, 8, cu[1:])
            flow._looked_kernel(q, k, torch.zeros(16, 6), torch.zeros(16, 6), cu[:-1], cu[1:], 0, 0.1)
            kernels.paper_attend(q, k, v, cu, 16, 0.1)
            for keys, parts in ((5, 1), (5, 4), (64, 1)):  # a tree, whole and in pieces, and a prompt that is read
                branch, which = torch.zeros(16, keys, dtype=torch.int32), torch.zeros(48, parts, dtype=torch.int32)
                join = importlib.import_module("ragged.speculation.kernel").join
                join(q, k[:, :2], v[:, :2], q[:, :2], torch.empty(2, 16), branch, which, 0.1)
    return list(recorder)


def compile_for(chip, fn, kinds, constants, options):
    """Compile one recorded launch. Tensors are taken as aligned to 16 bytes, as the launcher makes sure."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict(zip((p.name for p in fn.params), kinds))
    kinds = {name: {int: "i32", float: "fp32"}.get(kind, kind) for name, kind in kinds.items()}
    signature = {p.name: kinds.get(p.name, "constexpr") for p in fn.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    places = {(fn.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=fn, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def assert_fits(chip, launch_):
    compiled = compile_for(chip, *launch_)
    fn, _, constants, options = launch_
    assert len(compiled.asm["cubin"]) > 0
    shared, limit = compiled.metadata.shared, SHARED[chip]
    assert shared <= limit, f"{fn.__name__} needs {shared} of {limit} bytes on {chip}: {constants} {options}"
    return shared


def test_every_kernel_is_recorded(recorder):
    record_attention(recorder, [(64, HALF, False)])
    record_the_others(recorder, [64], [HALF])
    record_backward(recorder, [(64, HALF, False)])
    assert {fn.__name__ for fn, *_ in recorder} == set(recorder.kernels)
    sources = "\n".join(path.read_text("utf-8") for path in Path(ragged.__file__).parent.rglob("*.py"))
    defined = re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", sources, re.M)
    assert sorted(recorder.kernels) == sorted(defined), "every kernel of the package is looked at, wherever it stands"


def test_numbers_are_not_specialised_on(recorder):
    """A kernel that was compiled for a total of 1, or for a multiple of 16, must not be started with another."""
    record_attention(recorder, [(64, HALF, True)])
    record_the_others(recorder, [64], [HALF])
    record_backward(recorder, [(64, HALF, True)])
    for fn, kinds, *_ in recorder:
        for param, kind in zip(fn.params, kinds):
            assert kind is not int or param.do_not_specialize, f"{fn.__name__}: {param.name}"


def test_lengths_and_batches_choose_among_few_kernels(recorder):
    """What is compiled depends on the model and, in steps, on the longest image and the batch; never on totals."""
    assert len(record_attention(recorder, [(64, HALF, False)], range(1, 1025), range(1, 100, 9))) <= 48
    few = len(recorder.asked)
    record_attention(recorder, [(64, HALF, False)], range(1, 1025), (3, 77, 1000))
    assert len(recorder.asked) <= few + 4


# For every day: what a DeiT compiles at its usual lengths on three chips, each kernel's largest tiles on all.
@pytest.mark.parametrize("chip, lengths", [(86, [39, 99]), (90, [197, 577]), (120, [197])])
def test_attention_of_a_deit(recorder, chip, lengths):
    for one in record_attention(recorder, [(64, HALF, False)], lengths, [64]):
        assert_fits(chip, one)


def rows_held(one):
    """How much a launch may keep in shared memory, roughly: the larger its tiles, the deeper its pipeline, the more."""
    _, _, constants, options = one
    tiles = sum(constants.get(name, 0) for name in ("M", "N", "A", "B", "TAIL"))
    return tiles * constants["BLOCK_D"] * max(1, options.get("num_stages", 1))


@pytest.mark.parametrize("chip", SHARED)
def test_attention_at_its_largest(recorder, chip):
    everything = record_attention(recorder, [(64, HALF, True), (128, HALF, True)])
    for name in {fn.__name__ for fn, *_ in everything}:
        assert_fits(chip, max((one for one in everything if one[0].__name__ == name), key=rows_held))


@pytest.mark.parametrize("chip", SHARED)
def test_gradients_of_a_deit(recorder, chip):
    for one in record_backward(recorder, [(64, HALF, False)], [39, 99, 197, 577], [1, 64], chip):
        assert_fits(chip, one)


@pytest.mark.parametrize("chip", [80, 86, 90])
def test_gradients_at_their_largest(recorder, chip):
    for one in record_backward(recorder, [(128, HALF, True), (128, SINGLE, False)], [197, 577], [8], chip):
        assert_fits(chip, one)


def test_gradients_choose_among_few_kernels(recorder):
    assert len(record_backward(recorder, [(64, HALF, False)], range(1, 1025, 3), range(1, 100, 9))) <= 24


@pytest.mark.parametrize("chip", [80, 89, 100])
def test_attention_in_single_precision(recorder, chip):
    for one in record_attention(recorder, [(128 if chip == 89 else 32, SINGLE, False)], [577], [8]):
        assert_fits(chip, one)


@pytest.mark.parametrize("chip", SHARED)
def test_the_other_kernels(recorder, chip):
    for one in record_the_others(recorder, [64], [HALF]):
        assert_fits(chip, one)


@pytest.mark.slow
@pytest.mark.parametrize("chip", SHARED)
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
def test_the_whole_matrix(recorder, dtype, chip, request):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("takes minutes: ask for it with -m slow")
    dims = (32, 64, 80, 128)
    record_attention(recorder, [(dim, dtype, lse) for dim in dims for lse in (False, True)])
    record_the_others(recorder, dims, [dtype])
    record_backward(recorder, [(dim, dtype, False) for dim in dims], chip=chip)
    most = max(assert_fits(chip, one) for one in recorder)
    print(f"compute capability {chip / 10}, {dtype}: at most {most} of {SHARED[chip]} bytes")


def test_a_kernel_too_large_is_noticed(recorder):
    """The check itself: 99 KiB hold no tiles of 256 rows and 128 columns in many stages."""
    fn, kinds, constants, options = record_attention(recorder, [(128, HALF, False)], [577])[0]
    tiles = {name: number for name, number in {"M": 128, "N": 128, "STAGES": 4}.items() if name in constants}
    if not tiles or constants["BLOCK_D"] != 128:
        pytest.skip("the kernel names its tiles differently")
    huge = (fn, kinds, constants | tiles, options | {"num_stages": 4})
    with pytest.raises(AssertionError, match="needs"):
        assert_fits(86, huge)


def test_the_package_is_left_as_it_was():
    assert not launch.usable(torch.device("cpu")) and ragged.pick_backend("cpu", HALF, 64) == "sdpa_padded"
