"""`launch.quick`, compiled: what Python does in front of every launch, as one call into C++ (`front.cpp`).

It is made on request, `build()`, because it needs a C++ compiler and half a minute: PyTorch keeps the result for the
next process. The rules stay in `launch`, which says what kinds of calls there are; C++ only compares, allocates and
starts.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import launch

LETTERS = "OOOOOOOfiii"  # of the attention kernels: seven pointers, the scale, three lengths
MOST_UNUSED = 4  # pointers to scratch memory that a version of Triton may append


def build(verbose: bool = False) -> None:
    """Compile `front.cpp`, or load what an earlier process compiled, and use it from the next call on.

    verbose: show the compiler's commands.  RuntimeError where there is no compiler, no ninja or no CUDA driver.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"front.build: there is no CUDA driver here, so nothing to launch with: {error}") from error
    use(compile_source(verbose), ctypes.cast(driver, ctypes.c_void_p).value, launch.current_stream)


COMPILE = """
import sys
from torch.utils import cpp_extension
name, source, verbose = sys.argv[1:]
made = cpp_extension.load(name, [source], extra_cflags=["-O2"], with_cuda=False, verbose=verbose == "True")
print(made.__file__)
"""


def compile_source(verbose: bool = False) -> Any:
    """`front.cpp` as an imported module, compiled once for each version of PyTorch, in a process of its own:
    setuptools, which compiles, is particular about what was imported before it. `verbose`, errors: as in `build`."""
    name = "ragged_front_" + "".join(c if c.isalnum() else "_" for c in torch.__version__)
    path = os.environ.get("PATH", "")
    if launch.installed("ninja"):  # where a Python is called by its path, its scripts are not on PATH
        path = os.pathsep.join([path, import_module("ninja").BIN_DIR])
    command = [sys.executable, "-c", COMPILE, name, str(Path(__file__).with_name("front.cpp")), str(verbose)]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    if done.returncode:
        need = "it needs a C++ compiler and ninja (pip install 'ragged-vit[compiled]')"
        raise RuntimeError(f"front.build: front.cpp was not compiled; {need}: {done.stderr.strip()[-2000:]}")
    *said, file = done.stdout.splitlines()
    if verbose:
        print("\n".join(said))
    spec = spec_from_file_location(name, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(module: Any, address: int, stream: Any) -> None:
    """Put a compiled `front.cpp` before `launch.quick`.

    module: as it was imported.  address: of the C function cuLaunchKernel.  stream: device -> its stream as an integer.
    """
    module.connect(address, stream)
    launch.front = Front(module)
    launch.forget()


def leave() -> None:
    """Take Python's way again."""
    launch.forget()
    launch.front = None


class Front:
    """What `launch` knows of the compiled module: `attend` answers or says None, the rest keeps its records."""

    def __init__(self, module: Any):
        self.attend, self.forget, self._plan, self._way = module.attend, module.forget, module.plan, module.way

    def plan(self, tensors: tuple[Tensor, ...], shared: bool, scale: float) -> int | None:
        """The number under which C++ keeps this kind of call."""
        return self._plan(tensors, shared, scale)

    def way(self, plan: int | None, lengths: tuple[int, int, int, bool, str], launcher: Any, x: int, y: int) -> None:
        """Note which kernel and grid compute a kind of call at these lengths, if its parameters are as expected."""
        driver = getattr(launcher, "driver", None)
        if plan is None or driver is None:
            return
        function, warps, shared, kinds = driver
        unused = kinds.removeprefix(LETTERS)
        if kinds.startswith(LETTERS) and set(unused) <= {"O"} and len(unused) <= MOST_UNUSED:
            self._way(plan, *lengths, function, x, y, 32 * warps, shared)

