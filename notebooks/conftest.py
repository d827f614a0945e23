"""How `pytest --nbval-lax` treats these notebooks: a cell tagged `gpu` is skipped where there is no CUDA device.

A skipped cell is never sent to the kernel, so the cells after it see the state that the cells before it left:
no cell may need a name that only a `gpu` cell defines.
"""

import pytest
import torch


def pytest_runtest_setup(item):
    cell = getattr(item, "cell", None)  # nbval's items carry the notebook cell
    if cell is not None and "gpu" in cell.metadata.get("tags", []) and not torch.cuda.is_available():
        pytest.skip("cell tagged gpu: needs a CUDA device")
