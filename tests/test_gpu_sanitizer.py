"""On a GPU, where compute-sanitizer is installed: no kernel reads or writes outside, races, or reads what nobody wrote.

tests/sanitize.py runs in several processes at a time: once without a tool, which compiles the kernels and proves the
results right, then under each tool.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_tools import uncaptured

HERE = Path(__file__).resolve().parent
TOOL = shutil.which("compute-sanitizer") or next(
    iter(sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))), None
)
PARTS = 6
ENVIRONMENT = os.environ | {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # every tensor its own allocation: the tool knows where it ends
    "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))),
    "OMP_NUM_THREADS": "2",
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed (it comes with the CUDA toolkit)"),
]


def start(tool, *arguments):
    """tests/sanitize.py, under a tool or without."""
    script = [sys.executable, str(HERE / "sanitize.py"), *arguments]
    if tool is not None:
        script = [TOOL, "--tool", tool, "--target-processes", "application-only", *script]
    return subprocess.Popen(script, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outputs(processes, timeout=3600):
    """(exit status, output) of each; none is left behind."""
    results = []
    try:
        for process in processes:
            text = process.communicate(timeout=timeout)[0]
            results.append((process.returncode, text))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return results


def errors(text):
    """Errors a tool counted; a run that ended without its summary proves nothing."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error", text)
    assert found, f"no summary:\n{text[-3000:]}"
    return sum(int(a or b) for a, b in found) - handovers(text)


def handovers(text):
    """Reports that are no errors: how Triton hands work to specialised warps, through a word in shared memory and a
    barrier that racecheck does not follow. It says the same of a kernel that does nothing but specialise. Both ends of
    such a report lie in the kernel's first line or in `gl.warp_specialize`; of tiles, none does."""
    lines = (HERE.parent / "ragged" / "kernels" / "hopper.py").read_text("utf-8").splitlines()
    (kernel,) = (i for i, line in enumerate(lines) if line.startswith("def hopper_kernel"))
    (split,) = (i for i, line in enumerate(lines) if "gl.warp_specialize(" in line)
    harmless = {str(i + 1) for i in (kernel - 1, kernel, split)}
    places = [re.findall(r"(?:Read|Write) access at \S+ in (\S+):(\d+)", report) for report in
              re.split(r"Error: Race reported between ", text)[1:]]  # fmt: skip
    return sum({file for file, _ in ends} == {"hopper.py"} and {n for _, n in ends} <= harmless for ends in places)


@pytest.fixture(scope="module")
def compiled():
    for status, text in outputs([start(None, "--part", f"{i}/{PARTS}") for i in range(PARTS)]):
        assert status == 0 and "cases right" in text, text[-3000:]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_no_error_is_reported(compiled, tool, request):
    results = outputs([start(tool, "--part", f"{i}/{PARTS}") for i in range(PARTS)])
    with uncaptured(request):
        said = [line for _, text in results for line in text.splitlines() if "SUMMARY" in line or "cases right" in line]
        print(f"\n{tool}:", *said, sep="\n  ")
    for part, (status, text) in enumerate(results):
        assert errors(text) == 0, f"{tool}, part {part}:\n{text[:6000]}"
        assert status == 0 and "cases right" in text, f"{tool}, part {part}:\n{text[-3000:]}"


def test_a_race_between_tiles_would_count():
    first = "Error: Race reported between Read access at hopper_kernel+0x160 in hopper.py:"
    lines = (HERE.parent / "ragged" / "kernels" / "hopper.py").read_text("utf-8").splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("def hopper_kernel"))
    text = f"{first}{head}\n and Write access at hopper_kernel+0x54e0 in hopper.py:{head} [4 hazards]\n"
    assert handovers(text) == 1 and handovers(text + text) == 2
    elsewhere = (text.replace(f":{head} [", f":{head - 99} ["), text.replace("hopper.py", "rows.py"))
    assert not any(map(handovers, elsewhere))


@pytest.mark.parametrize("tool", ["memcheck", "initcheck"])
def test_the_tools_would_say_so(compiled, tool):
    """A row number far outside, and a buffer that nobody filled."""
    ((_, text),) = outputs([start(tool, "--wrong")])
    assert errors(text) > 0, text[-3000:]
    assert ("Invalid __global__ read" if tool == "memcheck" else "Uninitialized __global__ memory read") in text
