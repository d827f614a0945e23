"""Fine-tuning under a cut: the schedules as published, gradients averaged over images, a run that is interrupted."""

import argparse
import copy
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pruner_cases import build, pictures, predictor_weights, small_vit, with_variance
from timm.models.vision_transformer import VisionTransformer

import ragged
from ragged import data
from ragged.train import finetune, recipes
from ragged.train import run as runs
from ragged.train.losses import label_loss

ROOT = Path(__file__).resolve().parents[1]
TINY = ["deit_tiny", *"--steps 2 --batch 2 --pool 4 --fresh 2 --held-out 4 --device cpu".split()]


def network():
    """Twelve narrow blocks: room for every published schedule."""
    kind = VisionTransformer(img_size=112, embed_dim=48, depth=12, num_heads=3, num_classes=10)
    return with_variance(kind)


def asked(**more):
    return argparse.Namespace(**({"pruner": "evit", "keep": 0.5, "steps": 90, "device": "cpu", "lr": 1e-3} | more))


@pytest.mark.parametrize("keep", [0.7, 0.5, 0.3, 1.0])
def test_evit_s_share_falls_along_a_cosine(keep):
    shares = [recipes.annealed(step, 900, keep) for step in range(900)]
    assert shares[:30] == [1.0] * 30 and set(shares[300:]) == {keep}  # epochs 10 to 100 of 300
    assert shares == sorted(shares, reverse=True)
    for step in (60, 165, 240):
        along = (step - 30) / 270
        assert 0 <= shares[step] - (keep + (1 - keep) * (1 + math.cos(math.pi * along)) / 2) < 1 / 196
    assert len(set(shares)) <= 2 + round(196 * (1 - keep))


def test_evit_s_pruner_changes_with_its_share():
    vit = network()
    recipe = recipes.RECIPES["evit"](asked(), vit, None)
    recipe.module.train()
    counts = []
    for step in (0, 16, 89):
        recipe.before(step, None)
        counts.append(recipe.module.trace(pictures()[:1]).stages[-1].counts[0])
    assert recipe.module.pruner.keep == 0.5 and recipe.module.training and vit.training
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("name", ["evit", "threshold_l2", "ats"])
def test_a_step_of_each_recipe_lowers_the_loss_of_its_images(name):
    vit, images, labels = network(), pictures(), torch.tensor([1, 2, 3, 4])
    recipe = recipes.straight(asked(pruner=name), vit, None)
    with torch.enable_grad():
        first = recipe.loss(recipe.module.train(), images, labels, None)
        first.backward()
        optimizer = torch.optim.SGD(recipe.parameters, lr=1e-3)
        optimizer.step()
        assert recipe.loss(recipe.module, images, labels, None) < first


def test_predictors_are_frozen_or_trained(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "predictors.safetensors"
    save_file(predictor_weights(), path)
    vit = network()
    frozen = recipes.straight(asked(pruner="dynamicvit"), vit, path)
    assert not any(p.requires_grad for p in frozen.module.pruner.parameters()) and frozen.predictors is None
    soft = recipes.soft(asked(pruner="dynamicvit_soft", steps=60), vit, path)
    optimizer = torch.optim.AdamW(soft.groups, lr=1e-3)
    rates = []
    for step in (0, 9, 10, 59):
        soft.before(step, optimizer)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert [r[2] for r in rates[:3]] == [0, 0, 1e-5] and rates[3][2] <= 1e-5  # not for the first sixth, then slowly
    assert rates[0][0] == 1e-3 and rates[3][0] < 1e-5
    finetune.write_half(finetune.scorers(soft.predictors), tmp_path / "again.safetensors")
    again = ragged.PRUNERS["dynamicvit"](keep=0.5, predictors=tmp_path / "again.safetensors")
    assert ragged.RaggedViT(vit, again)(pictures()).shape == (4, 10)


# Two processes, whose images keep very different numbers of tokens: the mean is over images.
GRADIENTS = """
import copy, sys, torch
from pruner_cases import build, pictures, small_vit
import ragged
from ragged.bench.processes import joined
from ragged.train.losses import label_loss
from ragged.train.several import Network
with joined("cpu") as group:
    vit = copy.deepcopy(small_vit())
    network = Network(ragged.RaggedViT(vit, build("tau", 0.3, at=(1,)), "sdpa_padded").train(), None)
    network.share(group)
    mine = slice(group.rank * 2, group.rank * 2 + 2)
    images = pictures() * torch.tensor([1.0, 0.01, 3.0, 1.0])[:, None, None, None]
    with torch.enable_grad():
        label_loss(network(images[mine]), torch.tensor([1, 2, 3, 4])[mine]).backward()
    torch.save([p.grad for p in vit.parameters()], f"{sys.argv[1]}.{group.rank}")
"""


def test_gradients_are_averaged_over_images_and_not_over_tokens(tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    command = [sys.executable, "-c", GRADIENTS, str(tmp_path / "found")]
    both = [subprocess.Popen(command, env=environment | {"RANK": rank}) for rank in "01"]
    assert [process.wait() for process in both] == [0, 0]
    vit = copy.deepcopy(small_vit())
    model = ragged.RaggedViT(vit, build("tau", 0.3, at=(1,)), "sdpa_padded").train()
    images = pictures() * torch.tensor([1.0, 0.01, 3.0, 1.0])[:, None, None, None]
    counts = model.trace(images).stages[0].counts
    assert sum(counts[:2]) != sum(counts[2:])
    with torch.enable_grad():
        label_loss(model(images), torch.tensor([1, 2, 3, 4])).backward()
    for rank in range(2):
        for got, p in zip(torch.load(tmp_path / f"found.{rank}"), vit.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-9)


# ---- the command


@pytest.mark.parametrize("options, words", [
    (["--keep", "1.5"], "--keep: expected a share in (0, 1], got 1.5"),
    (["--lr", "0"], "--lr: expected a positive number"),
    (["--pool", "5", "--fresh", "2"], "--pool: expected a multiple of --fresh"),
    (["--predictors", "x"], "--predictors: are for --pruner dynamicvit"),
    (["--pruner", "dynamicvit", "--from", "x.safetensors"], "--predictors: FILE is needed"),
    (["--from", "none.safetensors"], "none.safetensors"),
])  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(options, words, tmp_path):
    with pytest.raises((ValueError, OSError)) as refusal:
        finetune.main([*TINY, "--out", str(tmp_path), *options])
    assert words in str(refusal.value)


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on_and_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "STATE_EVERY", 1)
    command = [*TINY, "--keep", "0.5", "--out", str(tmp_path), "--record", str(tmp_path / "r")]
    whole = runs.Run.keep_state

    def stop(self, *arguments):
        whole(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "keep_state", stop)
        assert finetune.main(command) == 130
    assert "to go on: python -m ragged.train.finetune deit_tiny" in capsys.readouterr().err
    assert finetune.main(command) == 0 and "going on after step 1" in capsys.readouterr().out
    path = tmp_path / "deit_tiny_digits_evit_0.5.safetensors"
    data.verify_sha256(path)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["pruner"] == "evit" and facts["after"]["low"] <= facts["after"]["top1"] <= facts["after"]["high"]
    assert facts["before"]["kept_tokens"] == facts["after"]["kept_tokens"] < facts["unpruned"]["kept_tokens"] == 197
    assert ragged.load_deit("deit_tiny", weights=path).head.weight.shape[0] == 10
    rows = data.results("finetune", folder=tmp_path / "r")
    assert set(rows.tokens) == {"unpruned", "before", "after"} and {"top1", "top1_low", "top1_high"} <= set(rows.metric)
    with pytest.raises(ValueError, match="is there already"):
        finetune.main(command)
