"""Counting right answers: the tally, the settings, and a folder of images from its first file to its rows."""

import hashlib
import json

import pytest
import torch
from PIL import Image

import ragged
from ragged import data
from ragged.bench import __main__ as bench
from ragged.bench import accuracy
from ragged.bench.accuracy import Folder, Setting, Tally, count, settings

NAMES = ["threshold_l2", "threshold_l2_tau", "evit", "ats", "random", "random_adaptive"]
CHOSEN = [
    Setting("none", "unpruned", 1.0, lambda: None),
    Setting("ats", "published", None, lambda: ragged.PRUNERS["ats"](samples=49), "samples=49"),
    Setting("evit", "single cut", 0.5, lambda: ragged.PRUNERS["evit"](keep=0.5, at=(3,), where="after")),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of two classes, stored the way DynamicViT publishes: under "model", with the predictors beside."""
    path = tmp_path_factory.mktemp("weights") / "published.pth"
    vit, pruner = ragged.load_deit("deit_tiny", num_classes=2), ragged.PRUNERS["dynamicvit"](keep=0.7)
    ragged.RaggedViT(vit, pruner)
    extra = {f"score_predictor.{name}": x for name, x in pruner.score_predictor.state_dict().items()}
    assert len(extra) == 30
    torch.save({"model": vit.state_dict() | extra}, path)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "val"
    for name, colour in (("n01", (200, 40, 40)), ("n02", (40, 40, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (60 + 40 * i, 80), tuple(c + 10 * i for c in colour)).save(folder / name / f"{i}.jpg")
    return folder


def job(images, checkpoint, **options):
    return Folder(images, "deit_tiny", str(checkpoint), batch=2, workers=0, device="cpu", **options)


def test_a_tally_counts():
    tally = Tally(196, 1, seen=10, right=7, counts=[0] * 10 + [5, 0, 0, 0, 5])
    values = tally.values()
    assert values["top1"] == 0.7
    assert tuple(values["kept_tokens"]) == (12, 10, 14)
    assert tally.keep() == 0.06
    assert Tally(196, 5, seen=2, right=0, counts=[0] * 5 + [2]).keep() == 0.0  # registers are no patches


@pytest.mark.parametrize("schedule", accuracy.SCHEDULES)
@pytest.mark.parametrize("keep", accuracy.KEEPS)
def test_settings_are_pruners(schedule, keep):
    found = settings(schedule, keep, data.checkpoint_path("deit_tiny_digits_dynamicvit"))
    assert [s.pruner for s in found] == [*NAMES, "dynamicvit"]
    for setting in found:
        pruner = setting.make()
        assert pruner.adaptive == (setting.keep is None)
        assert schedule == "published" or (pruner.at, pruner.where) == ((3,), "after")
    assert found[-1].make().trained
    assert [s.pruner for s in settings(schedule, keep, None)] == NAMES


def test_a_folder_is_counted_as_by_hand(images, checkpoint, tmp_path):
    found = dict((s.pruner, t) for s, t in count(job(images, checkpoint), tmp_path / "state.json", chosen=CHOSEN))
    vit = ragged.load_deit("deit_tiny", weights=checkpoint)
    loader = accuracy.image_folder(images, vit, 6, 0)
    ((pixels, labels),) = loader
    assert pixels.shape == (6, 3, 224, 224) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        assert found["none"].right == (vit(pixels).argmax(1) == labels).sum().item()
    assert all(t.seen == 6 for t in found.values())
    assert found["none"].values()["kept_tokens"].median == 197
    assert found["evit"].values()["kept_tokens"].median == 1 + 98 + 1


def test_an_interrupted_count_goes_on(images, checkpoint, tmp_path):
    state, seen = tmp_path / "state.json", []

    def stop(batches, total):
        for i, batch in enumerate(batches):
            if i == 2:
                raise KeyboardInterrupt
            yield batch

    def watch(batches, total):
        for batch in batches:
            seen.append(total)
            yield batch

    whole = count(job(images, checkpoint), tmp_path / "other.json", chosen=CHOSEN)
    with pytest.raises(KeyboardInterrupt):
        count(job(images, checkpoint), state, every=1, show=stop, chosen=CHOSEN)
    rest = count(job(images, checkpoint), state, every=1, show=watch, chosen=CHOSEN)
    assert seen == [1] and not state.exists()
    for (_, one), (_, other) in zip(whole, rest):
        assert (one.seen, one.right, one.counts.tolist()) == (other.seen, other.right, other.counts.tolist())


def interrupted(images, checkpoint, state):
    """Leave the state of a count that was stopped after its second batch."""

    def stop(batches, total):
        for i, batch in enumerate(batches):
            if i == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        count(job(images, checkpoint), state, every=1, show=stop, chosen=CHOSEN[:1])


@pytest.mark.parametrize("what", ["weights", "images", "one image", "predictors", "settings"])
def test_another_job_does_not_go_on_with_this_state(images, checkpoint, tmp_path, what):
    state, chosen, other = tmp_path / "state.json", CHOSEN[:1], job(images, checkpoint)
    interrupted(images, checkpoint, state)
    if what == "weights":
        torch.save({"model": ragged.load_deit("deit_tiny", num_classes=2, seed=1).state_dict()}, tmp_path / "new.pth")
        other = job(images, tmp_path / "new.pth")
    elif what == "images":
        (images / "n01" / "2.jpg").rename(images / "n01" / "3.jpg")
    elif what == "one image":
        Image.new("RGB", (9, 9)).save(images / "n01" / "2.jpg")
    elif what == "predictors":
        other = job(images, checkpoint, predictors=checkpoint)
    else:
        chosen = CHOSEN[1:2]
    with pytest.raises(ValueError, match=f"the .*{what.removeprefix('one ')}.* differ.*--redo"):
        count(other, state, chosen=chosen)
    assert state.exists()  # what was counted is not thrown away
    ((_, tally),) = count(other, state, chosen=chosen, anew=True)
    assert tally.seen == 6 and not state.exists()


def test_a_damaged_state_is_named(images, checkpoint, tmp_path):
    state = tmp_path / "state.json"
    state.write_text("{")
    with pytest.raises(ValueError, match="damaged.*--redo"):
        count(job(images, checkpoint), state, chosen=CHOSEN[:1])
    interrupted(images, checkpoint, tmp_path / "other.json")
    kept = json.loads((tmp_path / "other.json").read_text())
    kept["found"][CHOSEN[0].name][2] = [1] * 1000  # more counts than this network has rows
    state.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="damaged"):
        count(job(images, checkpoint), state, chosen=CHOSEN[:1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(images, checkpoint, tmp_path, workers):
    (images / "n02" / "1.jpg").write_bytes(b"no image at all")
    broken = Folder(images, "deit_tiny", str(checkpoint), batch=2, workers=workers, device="cpu")
    with pytest.raises(ValueError, match=r"1\.jpg is not an image") as caught:
        count(broken, tmp_path / "state.json", chosen=CHOSEN[:1])
    assert "Traceback" not in str(caught.value)


def test_folders_that_do_not_fit(images, checkpoint, tmp_path):
    state = tmp_path / "state.json"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        count(job(tmp_path / "nowhere", checkpoint), state, chosen=CHOSEN)
    (images / "n03").mkdir()
    with pytest.raises(ValueError, match="3 class folders, the model 2"):
        count(job(images, checkpoint), state, chosen=CHOSEN)
    (images / "n02").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="n03 is empty"):
        count(job(images, checkpoint), state, chosen=CHOSEN)
    (images / "n03" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="n03"):
        count(job(images, checkpoint), state, chosen=CHOSEN)


def test_checkpoints_that_do_not_fit(images, checkpoint, tmp_path):
    state = tmp_path / "state.json"
    with pytest.raises(ValueError, match="SHA-256"):
        count(job(images, checkpoint, sha256="0" * 64), state, chosen=CHOSEN)
    with pytest.raises(ValueError, match="SHA-256"):
        count(job(images, checkpoint, predictors=checkpoint, predictors_sha256="0" * 64), state)
    found = ragged.loading.load_state(checkpoint)
    del found["score_predictor.1.out_conv.4.weight"]
    torch.save({"model": found}, tmp_path / "lacks.pth")
    whole = Setting("dynamicvit", "published", 0.7, lambda: ragged.PRUNERS["dynamicvit"](
        keep=0.7, predictors=tmp_path / "lacks.pth"))  # fmt: skip
    with pytest.raises(ValueError, match=r"lacks\.pth lacks score_predictor\.1\.out_conv\.4\.weight"):
        count(job(images, checkpoint), state, chosen=[whole])
    del found["blocks.3.attn.qkv.weight"]
    torch.save({"model": found}, tmp_path / "lacks.pth")
    with pytest.raises(ValueError, match=r"lacks\.pth .*blocks\.3\.attn\.qkv\.weight"):
        count(job(images, tmp_path / "lacks.pth"), state, chosen=CHOSEN)


def test_the_command_writes_rows(images, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "KEEPS", (0.5,))
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    arguments = ["accuracy", "--imagenet", str(images), "--model", "deit_tiny", "--weights", str(checkpoint),
                 "--sha256", digest, "--predictors", str(checkpoint), "--predictors-sha256", digest, "--batch", "3",
                 "--workers", "1", "--device", "cpu", "--out", str(tmp_path / "rows")]  # fmt: skip
    assert bench.main(arguments) == 0
    (path,) = (tmp_path / "rows").glob("*/accuracy.csv")
    rows = data._read_csv(path) if hasattr(data, "_read_csv") else data.read_csv(path)
    assert {row["pruner"] for row in rows} == {"none", *NAMES, "dynamicvit"}
    assert {row["metric"] for row in rows} == {"top1", "images", "kept_tokens"}
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["tokens"] for row in rows} == {"unpruned", "published", "single cut"}
    assert "top-1" in capsys.readouterr().err
