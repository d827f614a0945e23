"""The kernels' own code without a GPU: these files under TRITON_INTERPRET=1, together in a process of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FILES = ("interpreted.py", "test_properties.py", "test_numbers.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it exists for Linux only)")
def test_the_kernels_in_triton_s_interpreter():
    """Of the two files that run without the interpreter, too, the tests of whole models and pictures are left out: they
    would say no more about a kernel, and take minutes."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    chosen = ("-m", "not gpu", "-k", "interpreted or not (model or picture)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    command += [str(HERE / name) for name in FILES]
    result = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, f"\n{result.stdout[-8000:]}\n{result.stderr[-2000:]}"
    assert " passed" in result.stdout and " skipped" not in result.stdout, result.stdout[-500:]
