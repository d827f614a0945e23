"""How `pytest --nbval-lax` treats these notebooks.

A cell tagged `gpu` is skipped where there is no CUDA device. A skipped cell is never sent to the kernel, so the cells
after it see the state that the cells before it left: no cell may need a name that only a `gpu` cell defines.

A notebook shall take a minute of CPU time, its kernel and the programs that the kernel starts together. The cell fails
during which twice that is passed. The time by the clock is reported and limits nothing: on a busy machine it says
nothing about the notebook. Where there is a GPU nothing is limited, for waiting for it looks like work.

Solutions are run by tests/test_exercises.py, which says at the same time that they pass the lessons' checks.

In a cell tagged `slider` the slider's callback is tried at both ends (tests/slider_ends.py).
"""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # beside other workers: one core, here and in the kernels
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Kernels inherit it: these runs look at no picture, and drawing PNGs would start a browser for each notebook.
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
os.environ.setdefault("RAGGED_PROGRESS", "off")  # nothing that tests solve is anybody's progress

MOST_CPU_SECONDS = 120 * torch.get_num_threads()  # a thread that waits for another one uses its core, too
collect_ignore_glob = ["solutions/*"]
TESTS = Path(__file__).resolve().parents[1] / "tests"
TRY_BOTH_ENDS = f"import sys; sys.path.append({str(TESTS)!r}); import slider_ends; slider_ends.watch()\n"
spent = {}  # notebook -> [CPU seconds of its kernel, seconds by the clock, the start of the kernel included]


def pytest_configure(config):
    spread = config.getoption("numprocesses", None) and config.option.dist not in ("loadfile", "loadscope")
    if spread and config.getoption("nbval_lax", False):
        raise pytest.UsageError("the cells of a notebook follow one another in one kernel: add --dist loadfile")


def pytest_runtest_setup(item):
    cell = getattr(item, "cell", None)  # nbval's items carry the notebook cell
    if cell is None:
        return
    item.output_timeout = item.config.option.nbval_cell_timeout  # on a busy machine outputs come long after the reply
    tags = cell.metadata.get("tags", [])
    if "gpu" in tags and not torch.cuda.is_available():
        pytest.skip("cell tagged gpu: needs a CUDA device")
    if "slider" in tags:
        cell.source = TRY_BOTH_ENDS + cell.source


def cpu_seconds(kernel):
    """What a notebook's kernel has used, with the programs it started and has waited for; nan once it is gone."""
    import psutil  # ipykernel needs it

    try:
        times = psutil.Process(kernel.km.provisioner.pid).cpu_times()
    except (AttributeError, psutil.Error):
        return float("nan")
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail the cell during which its notebook takes too long, once."""
    report = yield
    if getattr(item, "cell", None) is None:
        return report
    notebook = item.parent
    report.cpu_seconds = cpu_seconds(notebook.kernel)
    too_long = report.cpu_seconds > MOST_CPU_SECONDS and not torch.cuda.is_available()
    if call.when == "call" and too_long and not hasattr(notebook, "late"):
        notebook.late = True
        if report.passed:
            report.outcome = "failed"
            report.longrepr = f"{notebook.name} takes more than {MOST_CPU_SECONDS} s of CPU time"
    return report


def pytest_runtest_logreport(report):
    if hasattr(report, "cpu_seconds"):
        most, wall = spent.get(report.fspath, (0.0, 0.0))
        spent[report.fspath] = max(most, report.cpu_seconds), wall + report.duration


def pytest_terminal_summary(terminalreporter):
    if spent:
        terminalreporter.section("seconds per notebook: CPU time, by the clock")
        for name, (cpu, wall) in sorted(spent.items()):
            terminalreporter.line(f"{cpu:6.1f} {wall:6.1f}  {name}")
        cpu, wall = map(sum, zip(*spent.values()))
        terminalreporter.line(f"{cpu:6.1f} {wall:6.1f}  together")
