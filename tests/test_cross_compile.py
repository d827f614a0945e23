"""Every Triton kernel compiles for every chip of the last years, and fits into its shared memory. No GPU is needed.

The package's own launching code runs with a recorder in place of the launcher, so what is compiled here is what would
run: the same constants, tile shapes and compiler options, for whatever kernels `ragged/kernel.py` holds.
"""

import pytest
import torch

import ragged
from ragged import copying, fused, launch

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
    """Stands in for a kernel and for `launch.start`; keeps what was asked for as (kernel, arguments, constants,
    options)."""

    def __init__(self, monkeypatch):
        from ragged import kernel

        self.asked, self.kernels = {}, {}
        monkeypatch.setattr(launch, "usable", lambda device: True)
        monkeypatch.setattr(launch, "start", self.start)
        for name, fn in vars(kernel).items():
            if isinstance(fn, triton.runtime.JITFunction) and not name.startswith("_"):
                self.kernels[name] = fn
        for name, fn in self.kernels.items():
            monkeypatch.setattr(kernel, name, Through(fn, self))

    def start(self, kernel, key, grid, tensors, numbers, constants, options):
        self.note(getattr(kernel, "fn", kernel), (*tensors, *numbers), constants, options)

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


def attend(dim, dtype, want_lse, longest, heads=12):
    """One call as a model makes it: q, k and v are views of one projection."""
    q, k, v = torch.empty(16, 3, heads, dim, dtype=dtype).unbind(1)
    cu = torch.tensor([0, 16], dtype=torch.int32)
    fused.attend(q, k, v, cu, cu, longest, longest, dim**-0.5, want_lse)


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


def record_attention(recorder, cases, lengths=LENGTHS):
    for dim, dtype, want_lse in cases:
        for longest in lengths:
            attend(dim, dtype, want_lse, longest)
    return list(recorder)


def record_the_others(recorder, dims, dtypes):
    cu = torch.tensor([0, 16], dtype=torch.int32)
    for dtype in dtypes:
        x, ids, keep = torch.empty(16, 768, dtype=dtype), torch.arange(16), torch.ones(16, dtype=torch.bool)
        copying.copy_rows(x, ids, ids)
        copying.scatter_rows(x, ids, keep, keep.cumsum(0, dtype=torch.int32), 16)
        for dim in dims:
            q, k, v = torch.empty(16, 3, 6, dim, dtype=dtype).unbind(1)
            fused.cls_attention(q, k, cu[:-1], cu[1:], 16, 0.1)
            fused.paper_attend(q, k, v, cu, 16, 0.1)
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
    assert {fn.__name__ for fn, *_ in recorder} == set(recorder.kernels)


def test_numbers_are_not_specialised_on(recorder):
    """A kernel that was compiled for a total of 1, or for a multiple of 16, must not be started with another."""
    record_attention(recorder, [(64, HALF, True)])
    record_the_others(recorder, [64], [HALF])
    for fn, kinds, *_ in recorder:
        for param, kind in zip(fn.params, kinds):
            assert kind is not int or param.do_not_specialize, f"{fn.__name__}: {param.name}"


def test_lengths_and_batches_choose_among_few_kernels(recorder):
    """What is compiled depends on the model and, in few steps, on the longest image; never on totals."""
    assert len(record_attention(recorder, [(64, HALF, False)], range(1, 1025))) <= 6
    assert len(record_attention(recorder, [(64, HALF, False)], range(1025, 1100))) <= 6


# The subset for every day: all choices of the default head dimension in half precision on the tightest chips and the
# newest, and the most demanding choice everywhere.
@pytest.mark.parametrize("chip", [86, 90, 120])
def test_attention_of_a_deit(recorder, chip):
    for one in record_attention(recorder, [(64, HALF, False)]):
        assert_fits(chip, one)


@pytest.mark.parametrize("chip", SHARED)
def test_attention_with_wide_heads(recorder, chip):
    for one in record_attention(recorder, [(128, HALF, True)], [197]):
        assert_fits(chip, one)


@pytest.mark.parametrize("chip", [80, 89, 100])
def test_attention_in_single_precision(recorder, chip):
    for one in record_attention(recorder, [(128 if chip == 89 else 32, SINGLE, False)], [577]):
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
    most = max(assert_fits(chip, one) for one in recorder)
    print(f"compute capability {chip / 10}, {dtype}: at most {most} of {SHARED[chip]} bytes")


def test_a_kernel_too_large_is_noticed(recorder):
    """The check itself: 99 KiB hold no tiles of 256 rows and 128 columns in many stages."""
    one = record_attention(recorder, [(128, HALF, False)], [577])[0]
    fn, kinds, constants, options = one
    tiles = {name: 128 for name in ("M", "N") if name in constants}
    if not tiles or constants["BLOCK_D"] != 128:
        pytest.skip("the kernel names its tiles differently")
    huge = (fn, kinds, constants | tiles, options | {"num_stages": 4})
    with pytest.raises(AssertionError, match="needs"):
        assert_fits(86, huge)


def test_the_package_is_left_as_it_was():
    assert not launch.usable(torch.device("cpu")) and ragged.pick_backend("cpu", HALF, 64) == "sdpa_padded"
