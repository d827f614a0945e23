"""The kernels' own code without a GPU: these files under TRITON_INTERPRET=1, each in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# What is drawn or checked for whole models says no more about a kernel, and would take minutes.
FILES = {"interpreted.py": "", "test_properties.py": "not model", "test_numbers.py": "not model"}


needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (it exists for Linux only)"
)


def interpreted(*command):
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *command]
    result = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"\n{result.stdout[-8000:]}\n{result.stderr[-2000:]}"
    return result.stdout


@needs_triton
@pytest.mark.parametrize("name", FILES)
def test_the_kernels_in_triton_s_interpreter(name):
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", FILES[name])
    said = interpreted(*options, str(HERE / name))
    assert " passed" in said and " skipped" not in said, said[-500:]


@needs_triton
def test_some_of_the_tile_choices():
    """tests/sanitize.py is for a GPU; here it shows that it still runs, and that its results are right."""
    assert "cases right" in interpreted(str(HERE / "sanitize.py"), "--device", "cpu", "--part", "5/24")
