"""Training on several processes: one gradient of all shares, the same loss as one process, a state for any number."""

import argparse
import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ragged
from ragged.bench.processes import ALONE, Group
from ragged.train import several

ROOT = Path(__file__).resolve().parents[1]
TINY = ["deit_tiny", "--batch", "6", "--pool", "12", "--fresh", "6", "--held-out", "4", "--no-compile",
        "--device", "cpu"]  # fmt: skip
# A state after every step; with DIES, a process that ends when the state of the second step is kept.
PROGRAM = """
import os, sys, time
from pathlib import Path
from ragged.train import __main__ as train, run, several
run.STATE_EVERY = 1
asks = several.interrupted
def dies(asked, step, group):
    if os.environ.get("DIES") == str(group.rank) and step == 3:
        os._exit(7)
    return asks(asked, step, group)
several.interrupted = dies
sys.exit(train.main())
"""


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@pytest.fixture
def start(tmp_path):
    """start(n, steps, out, ...): n processes that train so many steps; how they ended, and the losses."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(n, steps, out, **more):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", "--standalone", str(program),
                   *TINY, "--steps", str(steps), "--out", str(tmp_path / out)]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, env=environment(**more), cwd=tmp_path)
        log = tmp_path / out / "deit_tiny_digits.csv"
        losses = [float(row["loss"]) for row in csv.DictReader(log.open())] if log.exists() else []
        return result, losses

    return run


@pytest.mark.slow
def test_one_two_and_three_processes_lose_alike(start, tmp_path):
    found = []
    for n in (1, 2, 3):
        result, losses = start(n, 4, str(n))
        assert result.returncode == 0, result.stderr[-3000:]
        assert len(losses) == 1 and result.stdout.count("backgrounds drawn") == 1
        assert (tmp_path / str(n) / "deit_tiny_digits.safetensors").is_file()
        found.append(losses[0])
    assert max(found) < 1.25 * min(found), found  # other pictures, so not the same number


@pytest.mark.slow
def test_a_state_goes_on_with_another_number_of_processes(start, tmp_path):
    result, losses = start(2, 4, "run", DIES="1")
    assert result.returncode != 0 and not losses and "exitcode  : 7" in result.stderr
    state = tmp_path / "run" / "deit_tiny_digits.state.pt"
    assert torch.load(state, weights_only=True)["step"] >= 2
    result, losses = start(3, 4, "run")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "going on after step" in result.stdout and len(losses) == 1 and not state.exists()


@pytest.mark.slow
def test_numbers_that_do_not_divide_are_refused(start):
    result, _ = start(4, 1, "run")
    assert result.returncode != 0 and "of 4: --batch: expected a multiple of the 4 processes, got 6" in result.stderr


GRADIENTS = """
import sys, torch
from torch._dynamo.backends.debugging import aot_eager
from ragged.bench.processes import joined
from ragged.train.several import Network
with joined("cpu") as group:
    torch.manual_seed(group.rank)  # the first one's weights count
    module, pieces = torch.nn.Linear(5, 3), []
    if sys.argv[2] == "large":  # than the first bucket of gradients
        module = torch.nn.Sequential(torch.nn.Linear(5, 700), torch.nn.Linear(700, 700), torch.nn.Linear(700, 3))
    def backend(graph, inputs):
        pieces.append(graph)
        return aot_eager(graph, inputs)
    options = None if sys.argv[2] == "plain" else {"backend": backend}
    network, found = Network(module, options), torch.load(sys.argv[1])
    network.share(group)
    mine = slice(group.rank * 4, group.rank * 4 + 4)
    torch.nn.functional.cross_entropy(network(found["x"][mine]), found["labels"][mine]).backward()
    gradients = [p.grad for p in module.parameters()]
    torch.save({"weights": module.state_dict(), "gradients": gradients, "pieces": len(pieces)},
               f"{sys.argv[1]}.{group.rank}")
"""


@pytest.mark.parametrize("how", ["plain", "compiled", "large"])
def test_gradients_are_those_of_the_whole_batch(how, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    batch, path = {"x": torch.randn(8, 5), "labels": torch.randint(3, (8,))}, tmp_path / "batch.pt"
    torch.save(batch, path)
    both = [subprocess.Popen([sys.executable, "-c", GRADIENTS, str(path), how], env=environment(
        RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)) for rank in "01"]  # fmt: skip
    assert [process.wait() for process in both] == [0, 0]
    first, second = (torch.load(f"{path}.{rank}") for rank in "01")
    assert first["pieces"] == (how != "plain")  # PyTorch would cut the large one in two
    module = torch.nn.Linear(5, 3)
    if how == "large":
        module = torch.nn.Sequential(torch.nn.Linear(5, 700), torch.nn.Linear(700, 700), torch.nn.Linear(700, 3))
    module.load_state_dict(first["weights"])
    with torch.enable_grad():
        torch.nn.functional.cross_entropy(module(batch["x"]), batch["labels"]).backward()
    for one, other, whole in zip(first["gradients"], second["gradients"], module.parameters()):
        torch.testing.assert_close(one, whole.grad)
        assert torch.equal(one, other)


def test_one_process_shares_nothing():
    several.check(argparse.Namespace(), ALONE)
    vit = ragged.load_deit("deit_tiny", num_classes=2)
    assert several.Network(vit, None).call is vit
    assert several.interrupted(True, 7, ALONE) and not several.interrupted(True, 7, Group(1, 2))
