"""How `pytest --nbval-lax` treats these notebooks.

A cell tagged `gpu` is skipped where there is no CUDA device. A skipped cell is never sent to the kernel, so the cells
after it see the state that the cells before it left: no cell may need a name that only a `gpu` cell defines.

A notebook shall take a minute on two cores. Machines that run tests are often busy, so the cell fails during which
twice that is passed; the summary says what every notebook took.
"""

import os

import pytest
import torch

# Kernels inherit it: these runs look at no picture, and drawing PNGs would start a browser for each notebook.
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")

MOST_SECONDS = 120
seconds = {}  # of every notebook, its cells and the start of its kernel together


def notebook_name(nodeid):
    return nodeid.partition("::")[0] if ".ipynb::" in nodeid else None


def pytest_runtest_setup(item):
    cell = getattr(item, "cell", None)  # nbval's items carry the notebook cell
    if cell is not None and "gpu" in cell.metadata.get("tags", []) and not torch.cuda.is_available():
        pytest.skip("cell tagged gpu: needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail the cell during which its notebook takes too long, once."""
    report = yield
    if getattr(item, "cell", None) is None:
        return report
    notebook = item.parent
    notebook.spent = getattr(notebook, "spent", 0.0) + call.duration
    if call.when == "call" and notebook.spent > MOST_SECONDS and not hasattr(notebook, "late"):
        notebook.late = True
        if report.passed:
            report.outcome = "failed"
            report.longrepr = f"{notebook.name} takes more than {MOST_SECONDS} s"
    return report


def pytest_runtest_logreport(report):
    if name := notebook_name(report.nodeid):
        seconds[name] = seconds.get(name, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter):
    if seconds:
        terminalreporter.section("seconds per notebook")
        for name, spent in sorted(seconds.items()):
            terminalreporter.line(f"{spent:6.1f}  {name}")
        terminalreporter.line(f"{sum(seconds.values()):6.1f}  together")
