"""How a compiled kernel is started: the parameters of the installed Triton, and what happens where they are unknown."""

import warnings

import pytest
import torch
from launch_cases import Driver, compiled

from ragged import course, launch

TYPES = ["*fp16", "*i64", "fp32", "i32", "constexpr", "i32"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(launch, "cu_launch_kernel", Driver())
    launch.forget()
    yield
    launch.forget()


def test_letters_follow_the_parameters():
    assert launch.parameters(compiled(TYPES)) == ("OOfiiOO", (0, 0))


def test_a_launch_hands_the_driver_what_the_kernel_reads():
    kernel = compiled(TYPES, function=77)
    start = launch.direct(kernel, (64,), "kept")
    start(3, 2, 9, 4096, 8192, 0.5, 7, -1)
    (call,) = launch.cu_launch_kernel.log
    assert (call.function, call.grid, call.stream, call.warps, call.shared) == (77, (3, 2, 1), 9, 4, 512)
    assert call.read == (4096, 8192, 0.5, 7, -1, 0, 0) and call.sizes == [64, 64, 32, 32, 32, 64, 64]
    assert start.keep == (kernel, "kept") and not launch.fallbacks


UNKNOWN = [
    ({"scratch": 1}, "parameters of"), ({"scratch": 3}, "parameters of"), ({"global_scratch_size": 64}, "global_scr"),
    ({"profile_scratch_size": 8}, "profile_scratch"), ({"launch_pdl": True}, "launch_pdl"),
    ({"num_ctas": 2}, "num_ctas"), ({"launch_cooperative_grid": True}, "cooperative"),
    ({"tensordesc_meta": [1]}, "tensordesc"),
]  # fmt: skip


@pytest.mark.parametrize("words, says", UNKNOWN, ids=str)
def test_what_is_unknown_is_refused_and_goes_through_the_wrapper_loudly(words, says):
    ran = []
    kernel = compiled(TYPES, run=lambda *arguments: ran.append(arguments), **words)
    with pytest.raises(NotImplementedError, match=says):
        launch.parameters(kernel)
    with pytest.warns(RuntimeWarning, match=says):
        start = launch.direct(kernel, (64,))
    start(3, 2, 9, 4096, 8192, 0.5, 7, -1)
    assert ran == [(3, 2, 1, 9, 1, (1,), None, None, None, 4096, 8192, 0.5, 7, -1, 64)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch.direct(kernel, (64,))  # said once
    assert len(launch.fallbacks) == 1 and not launch.cu_launch_kernel.log
    assert launch.fallbacks[0] in course.backends_table(course.setup(seed=0))


def test_a_pytorch_without_the_entry_is_named(monkeypatch):
    monkeypatch.setattr(launch, "cu_launch_kernel", None)
    with pytest.warns(RuntimeWarning, match="_StaticCudaLauncher"):
        launch.direct(compiled(TYPES, run=print), ())


@pytest.mark.skipif(not launch.installed("triton") or launch.INTERPRET, reason="needs Triton's compiler")
@pytest.mark.parametrize("arch", [75, 80, 90, 100])
def test_the_installed_triton_lists_its_parameters_as_expected(arch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ragged.kernels.rows import keep_kernel

    kinds = {"Keep": "*i1", "Cu": "*i32", "Index": "*i64", "Counts": "*i32", "width": "i32"}
    constants = {"PREFIX": 1, "CHUNK": 256}
    places = {(keep_kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(keep_kernel, {**kinds, **dict.fromkeys(constants, "constexpr")}, places)
    letters, unused = launch.parameters(compile(source, target=GPUTarget("cuda", arch, 32)))
    assert letters == "OOOOi" + "O" * len(unused) and set(unused) <= {0}


def test_this_pytorch_has_the_entry():
    """CUDA builds since 2.8 do; without it every call would take the dearer way."""
    if torch.version.cuda is None:
        pytest.skip("a PyTorch without CUDA")
    assert callable(getattr(torch._C._StaticCudaLauncher, "_launch_kernel", None))
