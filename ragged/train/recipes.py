"""How a network is fine-tuned under each pruner, with the schedule its authors publish.

EViT        the share kept falls along a cosine from 1 to its target, between 1/30 and 1/3 of the steps (epochs 10 to
            100 of 300); gradients reach attention through the fused tokens' weights too.
Threshold-L2, ATS   straight: the network trains under the cut that it will run with.
DynamicViT  under frozen predictors, straight; or "soft", as published: every token stays, a Gumbel mask per stage hides
            the dropped ones, and the losses of `dynamicvit_loss` teach predictors (at the learning rate, along a
            cosine) and network (not for the first sixth, then at a hundredth of it) together.

All but the last compute only what is kept. A loss is a mean over images, however many tokens each of them has left, so
that the gradients of several processes are to be averaged as they are.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..loading import load_predictors
from ..model import RaggedViT
from ..pruners import PRUNERS, Pruner
from .losses import Masked, dynamicvit_loss, label_loss
from .run import groups_of

ANNEAL = (1 / 30, 1 / 3)  # shares of the steps between which EViT's share falls
FIRST = 5 / 30  # share of the steps in which DynamicViT's network stands still
SLOWER = 0.01  # than the predictors, afterwards
GRAIN = 196  # EViT's share changes in steps of one patch of an ordinary image


@dataclass
class Recipe:
    """What is trained and how. module: is called with images.  parameters: of it.  loss: (network, images, labels,
    boxes) -> a mean over images, where network is the module as it is called.  before: as in `Run.train`.  groups:
    too.  predictors: those that were trained beside the network, if any."""

    module: nn.Module
    parameters: list[nn.Parameter]
    loss: Callable[..., Tensor]
    before: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None
    groups: list[dict] | None = None
    predictors: nn.Module | None = None


def pruner_of(name: str, keep: float, predictors: Path | None = None) -> Pruner:
    """The pruner `name` with its published schedule. keep: its share; of ats, sample points per patch of 196.
    predictors: DynamicViT's."""
    if name == "ats":
        return PRUNERS["ats"](samples=max(1, round(196 * keep)))
    if name == "dynamicvit":
        return PRUNERS["dynamicvit"](keep=keep, predictors=predictors)
    return PRUNERS[name](keep=keep)


def annealed(step: int, steps: int, keep: float) -> float:
    """EViT's share at a step of so many: 1 up to the first of ANNEAL, `keep` from the second on, a cosine between, in
    steps of 1 / GRAIN rounded up."""
    begin, end = (share * steps for share in ANNEAL)
    if step < begin:
        return 1.0
    if step >= end:
        return keep
    share = keep + (1 - keep) * (1 + math.cos(math.pi * (step - begin) / (end - begin))) / 2
    return min(1.0, math.ceil(share * GRAIN) / GRAIN)


def straight(asked: argparse.Namespace, vit: nn.Module, predictors: Path | None) -> Recipe:
    """Train under the cut, and only what it keeps."""
    model = RaggedViT(vit, pruner_of(asked.pruner, asked.keep, predictors)).to(asked.device)
    for p in model.pruner.parameters():
        p.requires_grad_(False)
    if getattr(asked, "compile", False):
        model.compile(dynamic=True)
    return Recipe(model, list(vit.parameters()), _labels)


def evit(asked: argparse.Namespace, vit: nn.Module, predictors: Path | None) -> Recipe:
    """`straight`, and the share falls from 1 to its target."""
    recipe = straight(asked, vit, predictors)
    model = recipe.module

    def before(step: int, optimizer: torch.optim.Optimizer) -> None:
        share = annealed(step, asked.steps, asked.keep)
        if share != model.pruner.keep:
            model.pruner = PRUNERS["evit"](keep=share)

    recipe.before = before
    return recipe


def soft(asked: argparse.Namespace, vit: nn.Module, predictors: Path | None) -> Recipe:
    """DynamicViT as published: masks, so that what is dropped teaches the predictors; as dense as no pruning at all."""
    teacher = copy.deepcopy(vit).requires_grad_(False).eval()
    module = Masked(vit).to(asked.device)
    if predictors is not None:
        load_predictors(module.score_predictor, predictors)
    scorers, network = list(module.score_predictor.parameters()), list(vit.parameters())

    def loss(network: Callable, images: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = teacher.forward_features(images)
            taught = teacher.forward_head(tokens), tokens
        return dynamicvit_loss(network(images), taught, labels, asked.keep)

    def before(step: int, optimizer: torch.optim.Optimizer) -> None:
        rate = asked.lr * (1 + math.cos(math.pi * step / asked.steps)) / 2
        slow = 0.0 if step < FIRST * asked.steps else min(SLOWER * asked.lr, rate)
        for group, own in zip(optimizer.param_groups, (rate, rate, slow, slow), strict=True):
            group["lr"] = own

    groups = [*groups_of(scorers), *groups_of(network)]
    return Recipe(module, [*scorers, *network], loss, before, groups, module.score_predictor)


def _labels(network: Callable, images: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
    return label_loss(network(images), labels)


RECIPES = {"evit": evit, "threshold_l2": straight, "ats": straight, "dynamicvit": straight, "dynamicvit_soft": soft}
