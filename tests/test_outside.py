"""What lies around the GPU: speed from JPEG files, and on several processes. No test asks how fast."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ragged
from ragged import data
from ragged.bench import folder
from ragged.bench.processes import ALONE
from ragged.predict import Read, ceiling
from ragged.train import scaling

ROOT = Path(__file__).resolve().parents[1]


def test_both_decoders_see_the_same_pictures(tmp_path):
    vit = ragged.load_deit("deit_tiny")
    config, read = folder.picture_config(vit), Read(vit)
    paths = ceiling.photographs(tmp_path, 9)
    assert len({data.read_picture(path).size for path in paths}) == 4  # as on the web, not all of one size
    pillow, torchvision = (ceiling.Decoded(paths, way, read, config) for way in ("pillow", "torchvision"))
    for i in range(9):
        one, other = pillow[i], torchvision[i]
        assert one.shape == other.shape == (3, 224, 224) and one.dtype == other.dtype == torch.uint8
        assert (one.float() - other.float()).abs().mean() < 2  # two resizers, which round differently
    assert torch.equal(pillow[9], pillow[0])


def test_rates_stand_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceiling, "PRUNED", {"evit": ceiling.PRUNED["evit"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = ["--out", str(tmp_path), "--model", "deit_tiny", "--processes", "1", "--batch", "2", "--seconds", "0.05"]
    assert ceiling.main(line) == 0
    (path,) = tmp_path.glob("*/ceiling.csv")
    rows = {(row["mode"], row["metric"]): row for row in data.read_csv(path, data.RESULT_COLUMNS)}
    assert len(rows) == 12 and {metric for _, metric in rows} == set(ceiling.METRICS)
    for (mode, _), row in rows.items():
        assert row["unit"] == "images/s"
        assert row["status"] == ("nvJPEG needs a CUDA device" if "nvjpeg" in mode else "ok"), mode
        assert "nvjpeg" in mode or float(row["value"]) > 0
    capsys.readouterr()
    assert ceiling.main(line) == 0 and capsys.readouterr().out.count("nvjpeg") == 0  # all is recorded already


@pytest.mark.gpu
@pytest.mark.parametrize("way", ceiling.ON_GPU)
def test_nvjpeg_sees_the_same_pictures(way, tmp_path):
    if way.endswith("torchcodec"):
        pytest.importorskip("torchcodec", reason="torchcodec is not installed")
    vit = ragged.load_deit("deit_tiny")
    config, read, paths = folder.picture_config(vit), Read(vit), ceiling.photographs(tmp_path, 4)
    on_gpu = next(ceiling.batches(ceiling.Decoded(paths, way, read, config), 4, 0, "cuda"))
    host = next(ceiling.batches(ceiling.Decoded(paths, "torchvision", read, config), 4, 0, "cpu"))
    assert (on_gpu.cpu().float() - host.float()).abs().mean() < 3


def test_a_gain_is_a_quotient_of_like_rows():
    found = scaling.Stats(100.0, 99.0, 101.0)
    row = scaling.row("deit_tiny", "evit", "evaluation, graph", 256, "float16", found, ALONE)
    faster, other = row | {"value": 190.0}, row | {"mode": "training, compile"}
    assert scaling.gains([faster, other], [row]) == ["deit_tiny evit evaluation, graph 256 float16: 1.900 times one"]


@pytest.mark.slow
def test_two_processes_are_recorded_as_two(tmp_path):
    line = ["--out", str(tmp_path), "--model", "deit_tiny", "--batch", "1", "--seconds", "0.05", "--device", "cpu"]
    assert scaling.main(line) == 0  # one, to compare with
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "ragged.train.scaling", *line]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.count("times one") == 3, result.stderr[-3000:]
    rows = data.read_csv(tmp_path / "cpu_x2" / "scaling.csv", data.RESULT_COLUMNS)
    assert {row["gpu"] for row in rows} == {"cpu x2"} and all(float(row["value"]) > 0 for row in rows)
    assert {row["mode"] for row in rows} == {"evaluation, eager", "training, eager"} and len(rows) == 3
