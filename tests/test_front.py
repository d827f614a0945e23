"""`launch.quick` in C++, on the CPU: a C function in the driver's place writes down what would have been started."""

import contextlib
import ctypes
import functools
import math
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_cases import inputs
from launch_cases import compiled
from test_concurrency import at_once, restless, tiles_of  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ragged import launch
from ragged.kernels import front

TYPES = ["*fp16"] * 5 + ["*i32"] * 2 + ["fp32", "i32", "i32", "i32"]
LETTERS = [ctypes.c_uint64] * 7 + [ctypes.c_float] + [ctypes.c_int] * 3 + [ctypes.c_uint64] * 2
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p,
                          ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)  # fmt: skip
HALF = torch.float16


@pytest.fixture(scope="session")
def module(once):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    if shutil.which("ninja") is None:
        pytest.importorskip("ninja")
    folder = once("front", compile_in)
    return compile_in(folder)


def compile_in(folder):
    """Compiled, or loaded, in a folder of its own, and not in that of the user's other extensions."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        return front.compile_source()


@pytest.fixture
def started(module, monkeypatch):
    """What was started: a list that a stand-in for cuLaunchKernel fills, and `started.error`, what it answers."""
    log = SimpleNamespace(calls=[], error=0)

    @LAUNCH
    def cu_launch_kernel(function, x, y, z, threads, one, two, shared, stream, arguments, extra):
        read = [kind.from_address(arguments[i]).value for i, kind in enumerate(LETTERS)]
        log.calls.append((function, (x, y, z), (threads, one, two), shared, stream, read, extra))
        return log.error

    monkeypatch.setattr(launch, "current_device", lambda: -1)
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)
    monkeypatch.setattr(launch, "cu_launch_kernel", lambda *_: log.calls.append("Python"))
    front.use(module, ctypes.cast(cu_launch_kernel, ctypes.c_void_p).value, lambda device: 0)
    yield log
    front.leave()


def known(lengths=(3, 5), heads=2, dim=16, dtype=HALF, lengths_k=None, function=77):
    """A call that was made before, in both ways."""
    q, k, v, cu_q, cu_k, longest, longest_k = inputs([*lengths], heads, dim, dtype, lengths_k=lengths_k)
    tiles = tiles_of(q, k, cu_q, longest)
    launch.remember(q, k, v, cu_q, cu_k, tiles, launch.direct(compiled(TYPES, function=function), ()))
    call = [q, k, v, cu_q, cu_k, longest, longest_k, None, "triton"]
    assert launch.quick(*call) is not None  # Python finds the grid, and tells C++
    return call


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("separate", [False, True])
def test_a_known_call_is_started_as_python_would(started, separate, scale):
    call = known(lengths_k=[3, 5] if separate else None)
    assert started.calls == ["Python"]
    call[7] = scale
    out = launch.quick(*call)
    q, k, v, cu_q, cu_k = call[:5]
    assert out.shape == q.shape and out.is_contiguous() and out.dtype == q.dtype and not out.requires_grad
    function, grid, threads, shared, stream, read, extra = started.calls[1]
    assert (function, threads, shared, stream, extra) == (77, (128, 1, 1), 512, None, None)
    (plan,) = launch._plans[cu_k is cu_q]
    assert grid == (*plan.ways[5, 5, 2, False, "triton"][1:], 1)
    assert read[:7] == [x.data_ptr() for x in (q, k, v, out, out, cu_q, cu_k)]
    assert read[8:] == [8, 5, 5, 0, 0]
    assert math.isclose(read[7], (scale or 0.25) * launch.LOG2_E, rel_tol=1e-6)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return function(*arguments, **(named or {}))


class Mine(torch.Tensor):
    pass


def other_calls():
    """What must not be taken for the known call: name -> (place, what comes instead)."""
    room = torch.zeros(8 * 2 * 16 + 1, dtype=HALF)[1:].view(8, 2, 16)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    return {
        "dtype": (0, torch.zeros(8, 2, 16, dtype=torch.bfloat16)), "heads": (1, torch.zeros(8, 3, 16, dtype=HALF)),
        "headdim": (2, torch.zeros(8, 2, 32, dtype=HALF)), "address": (1, room), "dimensions": (0, room[:, 0]),
        "strides": (0, torch.zeros(8, 4, 16, dtype=HALF)[:, ::2]), "device": (0, room.to("meta")),
        "keys": (1, torch.zeros(9, 2, 16, dtype=HALF)), "values": (2, torch.zeros(7, 2, 16, dtype=HALF)),
        "tokens": (0, torch.zeros(0, 2, 16, dtype=HALF)), "a class of its own": (0, room.clone().as_subclass(Mine)),
        "no tensor": (0, None), "a number": (3, 7), "offsets": (3, cu.long()), "offsets apart": (4, cu.clone()),
        "max 0": (5, 0), "max -1": (5, -1), "max True": (5, True), "max float": (6, 5.0), "max NumPy": (6, np.int64(5)),
        "max tensor": (6, torch.tensor(5)), "max 2**31": (5, 2**31), "max 2**70": (5, 2**70), "another max": (5, 300),
        "scale 0": (7, 0.0), "scale -1": (7, -1.0), "scale nan": (7, math.nan), "scale inf": (7, math.inf),
        "scale int": (7, 1), "scale tensor": (7, torch.tensor(0.5)), "backend": (8, "auto"), "no backend": (8, None),
    }  # fmt: skip


@pytest.mark.parametrize("name", other_calls())
def test_another_call_goes_the_long_way(started, name):
    call = known()
    place, other = other_calls()[name]
    call[place] = other
    assert launch.front.attend(*call) is None and started.calls == ["Python"]


@pytest.mark.parametrize("mode", [lambda: Watching(), lambda: FakeTensorMode(allow_non_fake_inputs=True)])
def test_who_watches_operators_is_not_passed_by(started, mode):
    call = known()
    with mode():
        assert launch.front.attend(*call) is None
    assert launch.front.attend(*call) is not None


def test_transforms_and_gradients_go_the_long_way(started):
    call = known()

    def inside(q):
        assert launch.front.attend(q, *call[1:]) is None
        return q

    torch.vmap(inside)(call[0][None])
    grown = call[0].clone().requires_grad_()
    with torch.enable_grad():
        assert launch.front.attend(grown, *call[1:]) is None
    assert launch.front.attend(*call) is not None


def test_an_error_of_the_driver_is_raised_and_forgotten_calls_are_none(started):
    call = known()
    started.error = 719
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed with error 719"):
        launch.quick(*call)
    launch.forget()
    assert launch.front.attend(*call) is None


def test_a_kernel_with_other_parameters_is_left_to_python(started):
    q, k, v, cu, _, longest, _ = inputs([3, 5], 2, 16, HALF)
    kernel = compiled([*TYPES, "i32"])
    launch.remember(q, k, v, cu, cu, tiles_of(q, k, cu, longest), launch.direct(kernel, ()))
    for _ in range(2):
        launch.quick(q, k, v, cu, cu, longest, longest, None, "triton")
    assert started.calls == ["Python"] * 2


def test_threads_share_the_compiled_records(started, restless):  # noqa: F811
    """As in test_concurrency: calls of several kinds while records are dropped; none gets another one's kernel."""
    kinds = [(1, 16, HALF), (2, 16, HALF), (2, 32, HALF), (3, 16, torch.float32), (3, 64, torch.bfloat16)]

    def worker(number, heads, dim, dtype):
        q, k, v, cu, _, longest, _ = inputs([3, 5], heads, dim, dtype)
        launcher = launch.direct(compiled(TYPES, function=100 + number), ())
        for _ in range(300):
            launch.remember(q, k, v, cu, cu, tiles_of(q, k, cu, longest), launcher)
            for _ in range(2):
                out = launch.quick(q, k, v, cu, cu, longest, longest, None, "triton")
                assert out is None or (out.shape == q.shape and out.dtype == q.dtype)
            pointers[q.data_ptr()] = 100 + number
            alive.append(q)

    def forgetter():
        for _ in range(300):
            launch.forget()

    pointers, alive = {}, []
    at_once(*[functools.partial(worker, i, *kind) for i, kind in enumerate(kinds)], forgetter)
    seen = [call for call in started.calls if call != "Python"]
    assert all(pointers[call[5][0]] == call[0] for call in seen)
    assert len({call[0] for call in seen}) == len(kinds), "every kind was started from C++ at some time"


def test_what_the_compiler_says_is_passed_on(monkeypatch, tmp_path):
    monkeypatch.setattr(front, "__file__", str(tmp_path / "front.py"))  # there is no front.cpp beside it
    with pytest.raises(RuntimeError, match="front.cpp was not compiled; it needs a C.. compiler and ninja"):
        front.compile_source()


def test_a_session_that_half_forgot_distutils_can_compile(module, monkeypatch):
    """setuptools takes the rest for its own and stops; here it runs elsewhere."""
    monkeypatch.delitem(sys.modules, "distutils", raising=False)
    monkeypatch.setitem(sys.modules, "distutils.core", SimpleNamespace(__file__="elsewhere"))
    folder = os.path.dirname(os.path.dirname(module.__file__))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", folder)
    assert front.compile_source().__file__ == module.__file__


def test_without_a_driver_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match="no CUDA driver"):
        front.build()
    assert launch.front is None
