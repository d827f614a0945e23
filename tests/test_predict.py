"""Labels for files: which files, their pixels, the rows, resumption, bad input, and the command."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ragged
from ragged import data
from ragged.bench import commandline, folder
from ragged.predict import Classify, Read, find, reading
from ragged.predict import __main__ as predict
from ragged.predict.rows import Journal, journal_of
from ragged.predict.throughput import PARTS, throughput

DIGITS = ["--model", "deit_tiny", "--weights", "digits", "--device", "cpu", "--workers", "1"]


@pytest.fixture(scope="module")
def vit():
    return ragged.load_deit("deit_tiny", weights="digits")


@pytest.fixture
def photos(tmp_path):
    """Five pictures, one of them in a folder inside, and one file that is none."""
    place = tmp_path / "photos"
    (place / "inside").mkdir(parents=True)
    for i, name in enumerate(("a.jpg", "b.png", "c.jpeg", "inside/d.jpg", "e.JPG")):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 30 * i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / name)
    (place / "broken.jpg").write_bytes((place / "a.jpg").read_bytes()[:300])
    (place / "notes.txt").write_text("no picture")
    (place / ".hidden.jpg").write_bytes(b"")
    return place


def names(paths):
    return [os.path.basename(path) for path in paths]


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- which files ----


def test_folders_and_files_are_found_once(photos, tmp_path):
    (photos / "inside" / "up").symlink_to(photos)
    found = find([photos / "c.jpeg", photos, photos / "notes.txt", photos])
    assert names(found) == ["c.jpeg", "a.jpg", "b.png", "broken.jpg", "e.JPG", "d.jpg", "notes.txt"]
    with pytest.raises(FileNotFoundError, match="no file or folder .*nowhere"):
        find([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        find([tmp_path / "empty"])


# ---- pixels ----


def test_pixels_are_those_of_the_accuracy_count(vit, photos):
    """To the last bit: bytes that are normalised on the device, and floats that are made on the host."""
    from timm.data import create_transform

    whole = create_transform(**folder.picture_config(vit), is_training=False)
    paths = [p for p in find([photos]) if "broken" not in p]
    images = torch.stack([Read(vit).one(path)[0] for path in paths])
    assert images.dtype == torch.uint8 and images.shape == (5, 3, 224, 224)
    classify = Classify(ragged.RaggedViT(vit), device="cpu")
    assert torch.equal(classify.prepare(images), torch.stack([whole(data.read_picture(path)) for path in paths]))


def test_what_cannot_be_read_has_a_reason(vit, photos):
    read = Read(vit)
    Image.new("L", (60_000, 2)).save(photos / "narrow.png")
    reasons = {"broken.jpg": "is not an image", "notes.txt": "is not an image", "gone.jpg": "No such file",
               "inside": "Is a directory", "narrow.png": "too narrow"}  # fmt: skip
    for name, why in reasons.items():
        image, status = read.one(str(photos / name))
        assert why in status and name in status and "\n" not in status
        assert image.shape == (3, 224, 224) and not image.any()


def test_a_network_for_grey_pictures_is_refused():
    grey = ragged.load_deit("deit_tiny", num_classes=2, in_chans=1)
    with pytest.raises(ValueError, match="3 channels, this one takes 1"):
        Read(grey)


def test_a_reading_process_that_is_killed_is_named(vit, photos, monkeypatch):
    monkeypatch.setattr(Read, "one", lambda self, path: os.kill(os.getpid(), 9))
    with pytest.raises(OSError, match="fewer --workers"):
        list(reading.ahead(find([photos]), Read(vit), 2, 1, False))


# ---- labels ----

PRUNED = {
    "unpruned": lambda: None,
    "evit": lambda: ragged.PRUNERS["evit"](keep=0.7),
    "ats": lambda: ragged.PRUNERS["ats"](samples=49),
    "tau": lambda: ragged.PRUNERS["threshold_l2"](tau=1.0),
    "everything": lambda: ragged.PRUNERS["threshold_l2"](keep=1.0),
}


@pytest.mark.parametrize("name", PRUNED)
def test_rows_are_what_the_model_says(vit, photos, name):
    model = ragged.RaggedViT(vit, PRUNED[name]())
    classify, read = Classify(model, batch=2, device="cpu"), Read(vit)
    batch = reading.together([(path, *read.one(path)) for path in find([photos])])
    frame = classify.table(*batch)
    assert list(frame.columns) == classify.columns
    bad = [s != "ok" for s in batch.status]
    assert sum(bad) == 1 and frame.loc[bad].iloc[:, 1:-1].isna().all(axis=None)
    for path, row in zip(batch.paths, frame.to_dict("records")):
        if row["status"] != "ok":
            continue
        logits, stages = model.trace(classify.prepare(read.one(path)[0][None]))
        assert row["class"] == logits.argmax().item()
        assert row["probability"] == pytest.approx(logits.softmax(1).max().item(), abs=1e-5)
        last, counts = 197, {stage.block: stage.counts[0] for stage in stages}
        for block in classify.cuts:
            last = counts.get(block, last)
            assert row[f"tokens_block_{block}"] == last


def test_no_images_no_rows(vit):
    classify = Classify(ragged.RaggedViT(vit, ragged.PRUNERS["evit"]()), device="cpu")
    assert [len(column) for column in classify.run(torch.zeros(0, 3, 224, 224, dtype=torch.uint8))] == [0, 0, 0]


def test_arguments_that_do_not_fit(vit):
    with pytest.raises(TypeError, match="a RaggedViT or a function"):
        Classify(vit, device="cpu")
    with pytest.raises(ValueError, match="names: expected 10"):
        Classify(ragged.RaggedViT(vit), device="cpu", names=["zero"])
    with pytest.raises(ValueError, match="no classifier"):
        Classify(ragged.RaggedViT(ragged.load_deit("deit_tiny", num_classes=0)), device="cpu")
    with pytest.raises(ValueError, match=r"expected torch.uint8 \(n, 3, 224, 224\)"):
        Classify(ragged.RaggedViT(vit), device="cpu").run(torch.zeros(1, 3, 224, 224))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRUNED)
def test_a_captured_last_batch_is_like_a_whole_one(vit, photos, name):
    model = ragged.RaggedViT(ragged.load_deit("deit_tiny", weights="digits"), PRUNED[name]())
    classify, read = Classify(model, batch=4), Read(vit)
    assert bool(classify.eager) == (name == "ats")
    images = torch.stack([read.one(path)[0] for path in find([photos])])
    classes, probabilities, tokens = classify.run(images)
    logits, stages = model.trace(classify.prepare(images))
    assert torch.equal(classes, logits.argmax(1).cpu()) and torch.equal(tokens, classify.counts(stages, len(images)))
    torch.testing.assert_close(probabilities, logits.float().softmax(1).amax(1).cpu(), atol=5e-3, rtol=5e-3)


# ---- the command ----


def test_the_command_writes_a_table(photos, tmp_path, capsys):
    out, classes = tmp_path / "out.csv", tmp_path / "classes.txt"
    classes.write_text("".join(f"digit {i}\n" for i in range(10)))
    line = [str(photos), "--out", str(out), *DIGITS, "--batch", "4", "--pruner", "evit", "--keep", "0.5"]
    assert predict.main([*line, "--classes", str(classes)]) == 0
    rows = rows_of(out)
    assert names(row["path"] for row in rows) == names(find([photos]))
    good = [row for row in rows if row["status"] == "ok"]
    assert len(good) == 5 and all(row["name"] == f"digit {row['class']}" for row in good)
    assert {row["tokens_block_3"] for row in good} == {str(1 + 98 + 1)}  # CLS, half of the patches, the fused one
    (bad,) = [row for row in rows if row["status"] != "ok"]
    assert "broken.jpg is not an image" in bad["status"] and bad["class"] == bad["tokens_block_3"] == ""
    assert "6 images, 1 of them could not be read" in capsys.readouterr().err and not journal_of(out).exists()
    with pytest.raises(ValueError, match="is there already; --replace"):
        predict.main(line)
    assert predict.main([*line, "--replace"]) == 0 and "name" not in rows_of(out)[0]


def test_an_interrupted_run_goes_on(photos, tmp_path, monkeypatch, capsys):
    out, line = tmp_path / "out.csv", [str(photos), *DIGITS, "--batch", "2"]
    assert predict.main([*line, "--out", str(tmp_path / "whole.csv")]) == 0
    table, seen = Classify.table, []

    def stop(self, paths, *rest):
        seen.extend(paths)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return table(self, paths, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Classify, "table", stop)
        with pytest.raises(KeyboardInterrupt):
            predict.main([*line, "--out", str(out)])
    assert "the same command goes on" in capsys.readouterr().err and not out.exists()
    with journal_of(out).open("a") as file:
        file.write('["half a li')  # as if it had been killed while it wrote
    with pytest.raises(ValueError, match="interrupted run of something else: the pruner differ"):
        predict.main([*line, "--out", str(out), "--pruner", "evit"])
    assert predict.main([*line, "--out", str(out)]) == 0
    assert "going on after 2 of 6 images" in capsys.readouterr().err
    assert rows_of(out) == rows_of(tmp_path / "whole.csv")


def test_journals_that_are_none(tmp_path):
    out = tmp_path / "out.csv"
    journal_of(out).write_text("[]\n")
    with pytest.raises(ValueError, match="damaged; begin anew with --replace"):
        Journal(out, ["path", "status"], {})
    Journal(out, ["path", "status"], {"a": 1}, anew=True).close()
    assert json.loads(journal_of(out).read_text()) == {"job": {"a": 1}, "columns": ["path", "status"]}
    journal_of(out).write_text('{"job": {')  # killed at the first line: nothing was done
    assert not Journal(out, ["path", "status"], {}).done


def test_parquet_holds_the_same(photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow, which is not installed")
    (photos / os.fsdecode(b"caf\xe9.jpg")).write_bytes((photos / "a.jpg").read_bytes())
    for name in ("out.csv", "out.parquet"):
        assert predict.main([str(photos), "--out", str(tmp_path / name), *DIGITS, "--pruner", "evit"]) == 0
    found = parquet.read_table(tmp_path / "out.parquet")
    assert str(found.schema.field("class").type) == "int32" and found.num_rows == 7
    as_text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in found.to_pylist()]
    for row, other in zip(as_text, rows_of(tmp_path / "out.csv")):
        assert {**row, "probability": ""} == {**other, "probability": ""}
    assert any(r"caf\udce9.jpg" in row["path"] for row in as_text)


REFUSED = {
    "--out out.txt": "expected a file that ends in .parquet or .csv",
    "": "--out: expected a file for the rows, or --throughput",
    "--out o.csv --keep 0.5": "--keep: is for --pruner NAME",
    "--out o.csv --pruner evit --samples 9": "--samples: evit takes --keep, --at, --where",
    "--out o.csv --pruner dynamicvit": "needs trained predictors, --predictors FILE",
    "--out o.csv --pruner evit --keep 2": "keep",
    "--out o.csv --seconds 0": "--seconds: expected a positive number",
    "--out o.csv --weights nowhere.pth": "nowhere.pth",
    "--out o.csv --classes short.txt": "--classes: expected 10 names, one a line",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_is_said_in_a_sentence(line, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("zero\n")
    arguments = [str(photos), *DIGITS, *line.split()]
    assert commandline.run(lambda: predict.main(arguments), "python -m ragged.predict") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and REFUSED[line] in error, error
    assert not Path("o.csv").exists()


def test_parquet_without_pyarrow_is_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow, or write a file that ends in .csv"):
        predict.main([str(photos), *DIGITS, "--out", str(tmp_path / "out.parquet")])


def test_throughput_is_side_by_side(vit, photos, capsys):
    line = [str(photos), *DIGITS, "--batch", "2", "--throughput", "--seconds", "0.2"]
    assert predict.main(line) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("decode", "transfer none", "model on the CPU", "end to end"))
    found = throughput(Classify(ragged.RaggedViT(vit), 2, "cpu"), Read(vit), find([photos]), 1, 0.2)
    assert list(found) == list(PARTS) and all(found[part] > 0 for part in PARTS if part != "transfer")


# ---- Ray ----


def example():
    """The code in the README, with a folder, a network and two actors that this machine has."""
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    return text.partition("<!-- ray -->\n```python\n")[2].partition("```")[0]


def test_the_example_is_short():
    assert 5 < len(example().splitlines()) <= 15


@pytest.fixture
def ray_alone():
    """What Ray is told by its environment: a folder of its own, whose path is short enough for a socket, no word to
    anybody outside, and to kill nothing where others fill the memory."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0",
               "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def test_ci_has_what_the_examples_need():
    """A skipped example would go unnoticed: `make test`, which CI runs, installs both packages."""
    if os.environ.get("CI", "").lower() not in ("1", "true"):
        pytest.skip("on a desk, what is not installed is skipped")
    assert importlib.util.find_spec("pyarrow") is not None
    assert importlib.util.find_spec("ray") is not None or sys.version_info >= (3, 15)


@pytest.mark.slow
def test_the_example_for_ray_runs(ray_alone, photos, tmp_path):
    """In Ray's local mode, two actors on the CPU, each without a GPU."""
    code = example()
    small = {"num_gpus=1": "num_gpus=0", "batch_size=256": "batch_size=2", "batch_size=64": "batch_size=2",
             '"deit_small", weights="imagenet"': '"deit_tiny", weights="digits"',
             '["photos"]': repr([str(photos)]), '"labels"': repr(str(tmp_path / "labels"))}  # fmt: skip
    for there, here in small.items():
        assert there in code
        code = code.replace(there, here)
    start = ("import ray\nray.init(num_cpus=3, num_gpus=0, object_store_memory=100_000_000, include_dashboard=False, "
             "log_to_driver=False)\n")  # fmt: skip
    paths = os.pathsep.join([str(Path(ragged.__file__).parents[1]), *sys.path[1:]])
    result = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, cwd=tmp_path,
                            env=os.environ | ray_alone | {"PYTHONPATH": paths}, timeout=1800)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyarrow.parquet

        found = pyarrow.parquet.read_table(tmp_path / "labels").to_pylist()
    line = [str(photos), "--out", str(tmp_path / "out.csv"), *DIGITS, "--pruner", "evit", "--keep", "0.7"]
    assert predict.main(line) == 0
    alone = {row["path"]: row for row in rows_of(tmp_path / "out.csv")}
    assert len(found) == len(alone) == 6
    for row in found:
        other = alone[row["path"]]
        assert row["status"] == other["status"]
        assert ("" if row["class"] is None else str(row["class"])) == other["class"]
