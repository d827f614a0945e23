"""Several processes of one count: the same numbers as one, and trouble that names the process and its cause."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ragged
from ragged import data
from ragged.bench import __main__ as bench
from ragged.bench import accuracy, commandline, processes

ROOT = Path(__file__).resolve().parents[1]
# Four of the settings, and a state kept after every round; the process DIES in its second.
PROGRAM = """
import os, sys, time
from pathlib import Path
from ragged.bench import __main__ as bench, accuracy, commandline
from ragged.bench.suites import accuracy as suite
count, rank = accuracy.count, os.environ["RANK"]
chosen = [s for s in accuracy.settings("published", 0.5, None) if s.pruner in ("threshold_l2_tau", "evit", "ats")]
suite.count = lambda job, state, **more: count(job, state, every=1, chosen=[accuracy.UNPRUNED, *chosen], **more)
resume = accuracy._resume
def removes(*given):
    Path(os.environ["REMOVES"]).unlink()
    return resume(*given)
if "REMOVES" in os.environ:  # when all have seen the folder, and before anybody reads
    accuracy._resume = removes
add = accuracy.Tally.add
def slow(self, *rest):
    if os.environ.get("DIES") == rank and self.seen >= 2:
        while not list(Path("rows").glob("*/*.state.json")):  # until the first process has kept the first round
            time.sleep(0.05)
        os.kill(os.getpid(), 9)
    return add(self, *rest)
accuracy.Tally.add = slow
sys.exit(commandline.run(bench.main, "python -m ragged.bench"))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images of two classes: batches of two leave one over, and three processes too."""
    folder = tmp_path_factory.mktemp("several") / "val"
    for i in range(11):
        place = folder / ("n01" if i % 3 else "n02")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (60 + i, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "two.pth"
    torch.save({"model": ragged.load_deit("deit_tiny", num_classes=2).state_dict()}, path)
    return path


@pytest.fixture
def start(tmp_path, images, checkpoint):
    """start(n, ...): the count with n processes of torchrun; what it left."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(n, folder=images, out="rows", **environment):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", "--standalone", str(program),
                   "accuracy", "--imagenet", str(folder), "--model", "deit_tiny", "--weights", str(checkpoint),
                   "--batch", "2", "--workers", "1", "--device", "cpu", "--out", str(tmp_path / out)]  # fmt: skip
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    return run


def values(folder):
    (path,) = folder.glob("*/accuracy.csv")
    own = ("date",)
    return [{k: v for k, v in row.items() if k not in own} for row in data.read_csv(path)]


@pytest.mark.slow
def test_one_two_and_three_processes_count_the_same(start, tmp_path):
    found = {}
    for n in (1, 2, 3):
        result = start(n, out=f"rows{n}")
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stderr.count("11 images in 2 class folders") == 1 and result.stderr.count("top-1") == 4
        found[n] = values(tmp_path / f"rows{n}")
    assert len(found[1]) >= 8 and found[1] == found[2] == found[3]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_the_next_goes_on_with_fewer(start, tmp_path):
    result = start(3, DIES="1")
    assert result.returncode != 0 and "SIGKILL" in result.stderr
    (state,) = (tmp_path / "rows").glob("*/*.state.json")
    kept = json.loads(state.read_text())
    assert kept["done"] == 3 and {seen for seen, *_ in kept["found"].values()} == {6}
    assert not list((tmp_path / "rows").glob("*/accuracy.csv"))
    result = start(2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert start(1, out="alone").returncode == 0
    assert values(tmp_path / "rows") == values(tmp_path / "alone") and not state.exists()


@pytest.mark.slow
def test_a_broken_image_is_named_with_its_rank(start, images, tmp_path):
    import shutil

    shutil.copytree(images, tmp_path / "val")
    victim = sorted((tmp_path / "val" / "n01").iterdir())[2]  # in the second batch, which is rank 1's
    victim.write_bytes(b"no image at all")
    result = start(2, folder=tmp_path / "val")
    assert result.returncode != 0
    assert f"error: rank 1 of 2: {victim} is not an image" in result.stderr


@pytest.mark.slow
def test_an_image_that_goes_while_others_are_counted_is_named(start, images, tmp_path):
    """It is there when the folder is listed, and gone when its turn comes; what was counted stays."""
    import shutil

    shutil.copytree(images, tmp_path / "val")
    victim = sorted((tmp_path / "val" / "n02").iterdir())[-1]  # in the last batch
    result = start(2, folder=tmp_path / "val", REMOVES=str(victim))
    assert result.returncode != 0
    assert f"error: rank 1 of 2: {victim}: No such file" in result.stderr, result.stderr[-3000:]
    (state,) = (tmp_path / "rows").glob("*/*.state.json")
    assert json.loads(state.read_text())["done"] == 4 and not list((tmp_path / "rows").glob("*/accuracy.csv"))


@pytest.mark.slow
def test_fewer_images_than_processes_are_refused(start, images, tmp_path):
    for name in ("n01", "n02"):
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.new("RGB", (60, 60)).save(tmp_path / "two" / name / "0.png")
    result = start(3, folder=tmp_path / "two")
    assert result.returncode != 0 and "holds 2 images, fewer than the 3 processes" in result.stderr


def test_a_folder_that_changes_under_the_count(images, checkpoint, tmp_path):
    import shutil

    shutil.copytree(images, tmp_path / "val")
    job = accuracy.Folder(tmp_path / "val", "deit_tiny", str(checkpoint), batch=4, workers=1, device="cpu")

    def change(batches, total):
        yield from batches
        Image.new("RGB", (9, 9)).save(tmp_path / "val" / "n01" / "new.png")

    with pytest.raises(ValueError, match="changed while it was counted.*--redo"):
        accuracy.count(job, tmp_path / "state.json", every=1, show=change, chosen=[accuracy.UNPRUNED])
    assert (tmp_path / "state.json").exists()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def alone_of_two(rank, monkeypatch):
    """What torchrun tells one of two processes, of which the other never comes."""
    told = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in told.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def second_of_two(monkeypatch):
    alone_of_two("1", monkeypatch)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_group_that_does_not_come_up(rank, monkeypatch):
    alone_of_two(rank, monkeypatch)
    monkeypatch.setattr(processes, "START_SECONDS", 1)
    said = rf"^rank {rank} of 2: the 2 processes did not find each other at 127.*torchrun"
    with pytest.raises(ValueError, match=said):
        with processes.joined("cpu"):
            pytest.fail("it came up")


def test_more_processes_than_gpus(second_of_two, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="rank 1 of 2: there are 1 GPUs here.*--nproc-per-node=1"):
        processes.take_gpu("cuda")


def test_no_gpu_at_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for rank in (None, "1"):
        if rank:
            alone_of_two(rank, monkeypatch)
        with pytest.raises(ValueError, match="--device cuda: PyTorch finds no CUDA device here"):
            processes.take_gpu("cuda")


def test_only_the_count_is_shared(second_of_two, capsys):
    for line in ("pack --quick", "accuracy", "accuracy report --imagenet DIR"):
        assert commandline.run(lambda line=line: bench.main([*line.split(), "--device", "cpu"]), "bench") == 2
        assert "only accuracy --imagenet DIR is shared" in capsys.readouterr().err


def several(n, code):
    """n processes of one group, and what they say."""
    code = "import sys, os, torch\nfrom ragged.bench.processes import joined\nwith joined('cpu') as group:\n    " + code
    port, found = free_port(), []
    for rank in range(n):
        env = os.environ | {"PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_PORT": port,
                            "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        found.append(subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True))
    return [process.communicate()[1] for process in found]


@pytest.mark.parametrize("n", [2, 3])
def test_unequal_processes_are_named(n):
    for said in several(n, f"group.agree({{'images': 5, 'GPU': 'A100' if group.rank == {n - 1} else 'H100'}})"):
        assert f"the GPU of rank {n - 1} and of rank 0 differ: 'A100' and 'H100'" in said


@pytest.mark.parametrize("n", [2, 3])
def test_whoever_waits_for_one_that_ended_says_so(n):
    *left, gone = several(n, f"group.rank == {n - 1} and os._exit(1); group.total(torch.ones(1))")
    for rank, said in enumerate(left):
        assert f"rank {rank} of {n}: another process ended or does not answer" in said
    assert "Error" not in gone


def test_want_of_memory_names_the_rank():
    first, second = several(2, "if group.rank: raise torch.OutOfMemoryError('CUDA out of memory. Tried')")
    assert "rank 1 of 2: its GPU has too little memory left" in second and "--batch" in second and "Error" not in first


def test_one_process_needs_no_group():
    with processes.joined("cpu") as group:
        assert (group.rank, group.size, group.first) == (0, 1, True)
        numbers = torch.ones(3)
        assert group.total(numbers) is numbers and group.of_first("x") == "x"
        group.agree({"anything": 1})


def test_one_process_waits_for_its_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    for device, times in (("cpu", 0), ("cuda", 1)):
        with processes.joined(device) as group:
            group.wait()
        assert len(waited) == times
