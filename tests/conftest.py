"""Tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # beside other workers: one core, here and in the programs started from here
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

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
