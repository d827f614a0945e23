"""Training: the pictures and their targets, the losses' parts against plain ones, and two short runs."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ragged
from ragged import data
from ragged.data import scene_pool
from ragged.data.scenes import CONTRAST, digit_fields
from ragged.pruners import Predictor
from ragged.train import __main__ as train
from ragged.train import memory
from ragged.train import run as runs
from ragged.train.losses import (
    CLASSES,
    Masked,
    Taught,
    dynamicvit_loss,
    masked_attention,
    masked_scores,
    patch_targets,
    taught_loss,
)

ROOT = Path(__file__).resolve().parents[1]
LUMA = torch.tensor((0.299, 0.587, 0.114))
TINY = ["deit_tiny", "--steps", "2", "--batch", "2", "--pool", "8", "--fresh", "4", "--held-out", "4", "--no-compile",
        "--device", "cpu"]  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn():
    fields, extents, _ = digit_fields("train")
    which = torch.arange(24) * 40
    theta, edge, boxes = scene_pool.places(torch.from_numpy(extents)[which], generator())
    return scene_pool.covered(torch.from_numpy(fields)[which], theta, edge), boxes


def test_a_digit_is_drawn_whole_inside_its_box(drawn):
    cover, boxes = drawn
    assert cover.shape == (24, 1, 224, 224) and cover.min() >= 0 and cover.max() <= 1
    assert (boxes >= -1e-4).all() and (boxes <= 1 + 1e-4).all()
    places = (torch.arange(224) + 0.5) / 224
    for picture, (x0, y0, x1, y1) in zip(cover[:, 0], boxes):
        ink = picture > 0.5
        assert ink.any()
        columns, rows = places[ink.any(0)], places[ink.any(1)]
        slack = 2 / 224
        assert columns.min() >= x0 - slack and columns.max() <= x1 + slack
        assert rows.min() >= y0 - slack and rows.max() <= y1 + slack


def test_digits_come_small_and_large(drawn):
    boxes = drawn[1]
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    assert sides.min() > 0.14 and sides.max() < 0.71 and sides.max() > 2 * sides.min()


def test_ink_stands_out_from_its_background():
    low = torch.rand(500, generator=generator()) * 0.5
    luma = torch.stack((low, low + 0.15), 1)
    ink = scene_pool.colours(luma, generator(1))
    assert ink.min() >= -1e-5 and ink.max() <= 1 + 1e-5
    found = ink @ LUMA
    assert torch.minimum((found - luma[:, 0]).abs(), (found - luma[:, 1]).abs()).min() > CONTRAST - 1e-4


def test_patch_targets_are_shares_of_the_box():
    labels = torch.tensor([3, 7])
    boxes = torch.tensor([[0.0, 0.0, 1 / 14, 2 / 14], [0.5 / 14, 0, 1.5 / 14, 1 / 14]])
    target = patch_targets(labels, boxes)
    torch.testing.assert_close(target.sum(-1), torch.ones(2, 196))
    share = 1 - target[..., CLASSES]
    torch.testing.assert_close(share.sum(1), torch.tensor([2.0, 1.0]))
    assert target[0, 0, 3] == 1 and target[0, 14, 3] == 1  # one below the other
    torch.testing.assert_close(target[1, :2, 7], torch.tensor([0.5, 0.5]))


def test_the_same_seed_draws_the_same_pictures():
    first, again = (scene_pool.Pool("cpu", 4, 4, 1, 5).step(3) for _ in range(2))
    for one, other in zip(first, again):
        assert torch.equal(one, other)


def test_masked_attention_without_and_with_a_mask():
    attn = ragged.load_deit("deit_tiny").blocks[0].attn
    x = torch.randn(2, 9, 192, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(masked_attention(attn, x, torch.ones(2, 9)), attn(x), atol=1e-5, rtol=1e-4)
        policy = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0]] * 2)
        kept = policy[0].bool()
        masked = masked_attention(attn, x, policy.float())
        torch.testing.assert_close(masked[:, kept], attn(x[:, kept]), atol=1e-5, rtol=1e-4)


def test_masked_attention_stays_finite_where_a_dropped_token_drew_all_eyes():
    attn = ragged.load_deit("deit_tiny").blocks[0].attn
    x = torch.randn(1, 5, 192, generator=generator())
    policy = torch.tensor([[1.0, 0, 1, 1, 1]], requires_grad=True)
    with torch.enable_grad():
        attn.qkv.weight.data *= 40  # scores thousands apart, as labels alone may teach
        out = masked_attention(attn, x, policy)
        kept = policy[0].detach().bool()
        torch.testing.assert_close(out[:, kept], attn(x[:, kept]), atol=1e-3, rtol=1e-3)
        out.sum().backward()
    assert out.isfinite().all() and policy.grad.isfinite().all()


def test_masked_scores_look_at_kept_tokens_only():
    predictor, x = Predictor(32), torch.randn(2, 6, 32, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(masked_scores(predictor, x, torch.ones(2, 6, 1)), predictor(x))
        keep = torch.tensor([1.0, 1, 1, 1, 0, 0]).view(1, 6, 1).expand(2, -1, -1)
        torch.testing.assert_close(masked_scores(predictor, x, keep)[:, :4], predictor(x[:, :4]))


def test_the_taught_network_is_the_network(drawn):
    """What is trained is timm's own forward pass, or the checkpoint would not be one of timm's."""
    vit = ragged.load_deit("deit_tiny", num_classes=CLASSES)
    images = torch.randn(2, 3, 224, 224, generator=generator())
    with torch.no_grad():
        taught = Taught(vit)(images)
        torch.testing.assert_close(taught[0], vit(images), atol=1e-4, rtol=1e-4)
    assert [tuple(part.shape) for part in taught[1:]] == [(2, 196, 11), (2, 9, 196), (2, 196)]
    assert taught_loss(taught, torch.tensor([1, 2]), drawn[1][:2]).isfinite()


def test_gradients_reach_the_predictors():
    vit = ragged.load_deit("deit_tiny", num_classes=CLASSES).requires_grad_(False)
    module, images = Masked(vit), torch.randn(2, 3, 224, 224, generator=generator())
    with torch.enable_grad():
        tokens = vit.forward_features(images)
        loss = dynamicvit_loss(module(images), (vit.forward_head(tokens), tokens), torch.tensor([1, 2]), 0.7)
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.score_predictor.parameters())
    assert any(p.grad.abs().sum() > 0 for p in module.score_predictor[0].parameters())


@pytest.mark.slow
def test_both_stages_and_an_interrupted_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "STATE_EVERY", 1)
    whole = train.Run.keep_state

    def stop(self, *arguments):
        whole(self, *arguments)
        raise KeyboardInterrupt

    with torch.enable_grad():
        with monkeypatch.context() as patch:
            patch.setattr(train.Run, "keep_state", stop)
            assert train.main([*TINY, "--out", str(tmp_path)]) == 130
        said = capsys.readouterr().err
        assert str(tmp_path / "deit_tiny_digits.state.pt") in said and "to go on: python -m ragged.train deit_" in said
        assert (tmp_path / "deit_tiny_digits.state.pt").is_file()
        assert not (tmp_path / "deit_tiny_digits.safetensors").exists()
        assert train.main([*TINY, "--out", str(tmp_path), "--lr", "0.5", "--seed", "7"]) == 1  # another run's state
        assert "of another run (--lr 0.001, --seed 0)" in capsys.readouterr().err
        assert train.main([*TINY, "--out", str(tmp_path)]) == 0
        assert "going on after step 1" in capsys.readouterr().out
        assert train.main([*TINY, "--stage", "dynamicvit", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("*.pt"))
    for name in ("deit_tiny_digits", "deit_tiny_digits_dynamicvit"):
        path = tmp_path / f"{name}.safetensors"
        data.verify_sha256(path)
        assert json.loads(path.with_suffix(".json").read_text())["command"].startswith("python -m ragged.train deit_")
        assert path.with_suffix(".csv").read_text().startswith("step,loss,images_per_s,lr\n")
    pruner = ragged.PRUNERS["dynamicvit"](predictors=tmp_path / "deit_tiny_digits_dynamicvit.safetensors")
    vit = ragged.load_deit("deit_tiny", weights=tmp_path / "deit_tiny_digits.safetensors")
    assert pruner.trained and ragged.RaggedViT(vit, pruner)(torch.randn(1, 3, 224, 224)).shape == (1, CLASSES)


def test_training_goes_on_from_a_finished_network(tmp_path, capsys):
    labels, first = [*TINY, "--teach", "labels"], tmp_path / "first"
    begun = first / "deit_tiny_digits_labels.safetensors"
    again = [*labels, "--out", str(tmp_path / "then"), "--from", str(begun)]
    assert train.main(again) == 1 and "found no" in capsys.readouterr().err
    with torch.enable_grad():
        assert train.main([*labels, "--out", str(first)]) == 0
        assert train.main([*again, "--lr", "1e-9"]) == 0
        assert train.main([*TINY, *again[len(labels) :]]) == 1  # boxes from labels
    assert "deit_tiny taught with boxes" in capsys.readouterr().err
    before, after = (json.loads((tmp_path / f / "deit_tiny_digits_labels.json").read_text()) for f in ("first", "then"))
    assert after["before"] == [{name: before[name] for name in ("command", "top1", "sha256")}]
    assert f"--from {begun}" in after["command"] and "start" not in before["settings"]
    old, new = (ragged.load_deit("deit_tiny", weights=tmp_path / f / begun.name) for f in ("first", "then"))
    torch.testing.assert_close(new.pos_embed, old.pos_embed, atol=1e-4, rtol=1e-3)  # begun there, and hardly moved
    assert train.main([*again, "--stage", "dynamicvit"]) == 1 and "--from: expected" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C of a POSIX terminal")
def test_ctrl_c_keeps_what_was_trained_and_says_how_to_go_on(tmp_path):
    """As in a terminal, where Ctrl-C reaches the processes that draw backgrounds too."""
    command = [sys.executable, "-m", "ragged.train", *TINY, "--steps", "500", "--out", "here"]
    options = {"cwd": tmp_path, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(command, env=environment, start_new_session=True, **options)
    assert "backgrounds drawn" in running.stdout.readline()
    os.killpg(running.pid, signal.SIGINT)
    out, said = running.communicate()
    assert running.returncode == 130 and "Traceback" not in said, said
    step = int(re.search(r"stopped after step (\d+) of 500", said)[1])
    again = re.search(r"the state is in (\S+); to go on: python (-m ragged.train deit_tiny .*)", said)
    assert torch.load(tmp_path / again[1], weights_only=True)["step"] == step >= 1
    assert {"--steps 500", "--batch 2", "--device cpu", "--out here"} <= set(re.findall(r"--\S+ [^-\s]\S*", again[2]))
    asked = train.parser().parse_args(again[2].split()[2:])
    train.fill_in(asked)
    assert runs.settings_of(asked) == torch.load(tmp_path / again[1], weights_only=True)["settings"]


def no_work(monkeypatch):
    monkeypatch.setattr(runs, "Pool", lambda *a: pytest.fail("drew backgrounds"))
    monkeypatch.setattr(train, "load_deit", lambda *a, **k: pytest.fail("made a network"))


def test_a_finished_network_is_not_replaced_unasked(tmp_path, monkeypatch, capsys):
    no_work(monkeypatch)
    (tmp_path / "trained").mkdir()
    mine = tmp_path / "trained" / "deit_tiny_digits.safetensors"
    mine.write_bytes(b"weeks of work")
    monkeypatch.chdir(tmp_path)
    assert train.main(TINY) == 1
    assert "trained/deit_tiny_digits.safetensors is there already; --replace" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in (data.data_dir() / "checkpoints").iterdir()}
    assert train.main([*TINY, "--bundle"]) == 1
    assert "checkpoints/deit_tiny_digits.safetensors is there already; --replace" in capsys.readouterr().err
    assert mine.read_bytes() == b"weeks of work"
    assert before == {path: path.read_bytes() for path in (data.data_dir() / "checkpoints").iterdir()}


def test_the_default_folder_is_not_the_package_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(train, "dense", lambda run: made.append(run.path))
    assert train.main(TINY) == 0 and made[0].resolve() == tmp_path / "trained" / "deit_tiny_digits.safetensors"
    assert train.main([*TINY, "--bundle", "--replace"]) == 0
    assert made[1] == data.data_dir() / "checkpoints" / "deit_tiny_digits.safetensors"


def test_an_unwritable_place_is_noticed_before_the_work(tmp_path, monkeypatch, capsys):
    no_work(monkeypatch)
    (tmp_path / "file").touch()
    assert train.main([*TINY, "--out", str(tmp_path / "file" / "inside")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err

    def locked(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmp123")

    monkeypatch.setattr(train.commandline.tempfile, "TemporaryFile", locked)
    assert train.main([*TINY, "--out", str(tmp_path / "new")]) == 1
    assert f"{tmp_path / 'new'}: Permission denied" in capsys.readouterr().err


def test_a_cpu_is_sized_for_and_warned(tmp_path, monkeypatch, capsys):
    asked = train.parser().parse_args(["deit_tiny", "--device", "cpu"])
    train.fill_in(asked)
    large = train.USUAL["cuda"]
    assert all(getattr(asked, name) < large[name] for name in ("steps", "batch", "pool", "held_out"))
    assert asked.compile is False
    monkeypatch.setattr(runs, "Pool", lambda *a: pytest.fail("drew backgrounds"))
    monkeypatch.setattr(memory, "available", lambda: 8e9)
    assert train.main(["deit_tiny", "--device", "cpu", "--batch", "1024", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert re.search(r"on the CPU, 100 steps of 1024 pictures.*about \d\d\.\d GB of memory, 8\.0 GB are free", said)
    assert "--batch 1024, --pool 256: they need about" in said


def test_memory_is_counted_by_the_picture():
    vit = ragged.load_deit("deit_tiny", num_classes=CLASSES)
    module = Taught(vit)
    parameters = list(module.parameters())
    loss_of = lambda x, labels, boxes: taught_loss(module(x), labels, boxes)  # noqa: E731
    need = [memory.estimate(argparse.Namespace(batch=b, pool=8), parameters, loss_of) for b in (1, 2, 3)]
    assert need[2] - need[1] == pytest.approx(need[1] - need[0])
    # 12 blocks of 197 rows of 192 numbers, each some thirty times over, in 2 or 4 bytes
    assert 12 * 197 * 192 * 30 < need[1] - need[0] < 12 * 197 * 192 * 600


@pytest.mark.parametrize("content", [{"a": 1}, {"step": 1, "settings": None}, [1]])
def test_a_state_that_is_none_is_named(content, tmp_path, capsys):
    torch.save(content, tmp_path / "deit_tiny_digits.state.pt")
    assert train.main([*TINY, "--out", str(tmp_path)]) == 1
    assert "deit_tiny_digits.state.pt cannot be read" in capsys.readouterr().err


def test_the_second_stage_needs_the_first(tmp_path, capsys):
    assert train.main([*TINY, "--stage", "dynamicvit", "--out", str(tmp_path)]) != 0
    assert "deit_tiny_digits.safetensors" in capsys.readouterr().err


# ---- what is bundled ----


@pytest.mark.parametrize("weights, least", [("digits", 0.9), ("digits-labels", 0.85)])
def test_the_bundled_networks_read_digits(weights, least):
    """64 of the held-out scenes, so that it stays quick; the whole count is in the recorded suite `accuracy`."""
    vit, scenes = ragged.load_deit("deit_tiny", weights=weights), data.digit_scenes(64, "test")
    with torch.no_grad():
        right = (vit(data.normalise(scenes.images)).argmax(1) == scenes.labels).float().mean().item()
    assert right > least


@pytest.mark.parametrize("name", ["deit_tiny_digits", "deit_tiny_digits_labels", "deit_tiny_digits_dynamicvit"])
def test_bundled_checkpoints_say_how_they_were_made(name):
    path = data.checkpoint_path(name)
    assert path.stat().st_size < 12_000_000
    how = json.loads(path.with_suffix(".json").read_text())
    assert how["sha256"] in path.with_name(path.name + ".sha256").read_text()
    assert how["command"].startswith("python -m ragged.train deit_tiny") and how["made_with"]["gpu"]
    assert path.with_suffix(".csv").is_file()
