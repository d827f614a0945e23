"""Tests marked `gpu` are skipped, with the reason, where there is no CUDA device; and what takes long is made once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # beside other workers: one core, here and in the programs started from here
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("RAGGED_PROGRESS", "off")  # nothing that tests solve is anybody's progress

import torch
from filelock import FileLock  # PyTorch needs it

ROOT = Path(__file__).resolve().parents[1]

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a bare GPU machine may have pytest alone; tests/test_gpu*.py need no more
    pass
else:
    # A shared two-core machine has no steady clock: a slow example is not a wrong one.
    settings.register_profile("ragged", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("ragged")


@pytest.fixture(autouse=True)
def inference(request):
    """Networks are only run forward, as a user would under no_grad; tests of gradients say torch.enable_grad()."""
    with torch.no_grad():
        yield


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


# ---- made once, whichever worker asks first, and only read after that ----


@pytest.fixture(scope="session")
def once(tmp_path_factory, request):
    """once(name, make): a folder of that name that `make(folder)` has filled."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if hasattr(request.config, "workerinput") else base  # the workers' folders stand side by side

    def filled(name, make):
        folder, made = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                made.touch()
        return folder

    return filled


@pytest.fixture(scope="session")
def installed(once):
    """A folder with the package as pip installs it from the checkout, a copy and not editable."""
    pytest.importorskip("hatchling")
    pytest.importorskip("pip")

    def install(folder):
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(ROOT)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]

    return once("installed", install)


@pytest.fixture(scope="session")
def built_site(once):
    """The course as web pages."""
    site = pytest.importorskip("ragged.course.site.__main__")
    return once("site", lambda folder: site.build(folder, ROOT))
