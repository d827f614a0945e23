"""Suite `accuracy`: how often a pruned network is right, and how fast it is in the same setting.

tokens  the schedule: published, or the paper's single cut
keep    the ratio asked for; for adaptive pruners (threshold_l2_tau, ats, random_adaptive) the mean share of patches
        that stayed

top1, images and kept_tokens are counted over held-out digit scenes, images_per_s is timed on two batches of them.
size_correlation is the rank correlation, over scenes, of the tokens kept and the longer side of the digit, with the
bootstrap's 95 % interval in size_correlation_low and _high. dynamicvit has trained predictors, dynamicvit:untrained
random ones.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ... import data
from ...data import slug, write_results
from ...data.intervals import rank_correlation
from ...data.scene_pool import Scenes, batches
from ...model import RaggedViT
from ...pruners import PRUNERS
from .. import commandline, processes
from ..accuracy import KEEPS, SCHEDULES, UNPRUNED, Folder, Setting, Tally, count, settings
from ..networks import NETWORKS, network, predictors_of
from ..pipelines import Pipeline, Workbench, need
from ..rounds import Subject
from ..runner import Candidate, Case, Options, Recorder
from ..timing import Stats

HELD_OUT = 2000  # test scenes, made of digits that training never shows
COUNTED = ("top1", "images", "kept_tokens")
FOLLOWS = ("size_correlation", "size_correlation_low", "size_correlation_high")
SPEED_BATCH, COUNT_BATCH = 256, 250
Counted = list[tuple[Tensor, Tensor, Tensor]]


def accuracy(options: Options) -> list[Case]:
    """The pruners and their random rival, threshold_l2 also with a true threshold, at six places of their curves, in
    both schedules; ours, padded to the longest, and the unpruned network. Both networks; all counts come first."""
    for name in options.models:
        if name not in NETWORKS:
            known = ", ".join(NETWORKS)
            raise ValueError(f"--model {name}: accuracy needs trained weights: {known}, or --imagenet DIR with it")
    scenes = functools.cache(functools.partial(held_out, 40 if options.quick else HELD_OUT))
    studies = [Study(name, options, scenes) for name in options.models_or(NETWORKS)]
    keeps = KEEPS if not options.quick else (0.5,)
    counts = [study.counts(backend, keeps) for backend in ("triton", "sdpa_padded") for study in studies]
    timings = [study.timings(schedule, keep) for study in studies for schedule in SCHEDULES for keep in keeps]
    return sum(counts, []) + ([] if options.counts else timings)


@functools.cache
def held_out(scenes: int) -> Counted:
    """Held-out scenes in batches of at most 250: uint8 images, labels, longer sides of the digits in pixels."""
    return [tuple(part) for part in batches(Scenes(scenes, "test", 0), min(COUNT_BATCH, scenes))]


class SceneBench(Workbench):
    """A trained network, and two batches of held-out scenes in place of noise."""

    def __init__(self, name: str, batch: int, options: Options, scenes: Callable[[], Counted]):
        dtype, device = options.dtype, options.device
        self.name, self.batch, self.dtype, self.device = name, batch, dtype, device
        self.vit, self.exact = network(name, 224, dtype, device), network(name, 224, torch.float32, device)
        self._answers: list = []
        pixels = torch.cat([images for images, *_ in scenes()])
        sets = [pixels[:batch], pixels[batch : 2 * batch]]
        self.images = [prepared(images, self.vit) for images in sets if len(images) == batch]


def prepared(images: Tensor, vit: nn.Module) -> Tensor:
    """uint8 scenes as the network takes them."""
    weight = vit.patch_embed.proj.weight
    return data.normalise(images.to(weight.device).float() / 255).to(weight.dtype)


def counted(vit: nn.Module, setting: Setting, backend: str, scenes: Counted) -> tuple[float, dict]:
    """One pass over the scenes: the mean share of patches that stayed, and the metrics COUNTED, for an adaptive pruner
    FOLLOWS too."""
    weight = vit.patch_embed.proj.weight
    model = RaggedViT(vit, setting.make(), backend).to(weight.device, weight.dtype)
    tally, kept, sides = Tally(vit.patch_embed.num_patches, vit.num_prefix_tokens), [], []
    for images, labels, side in scenes:
        kept += tally.add(model, prepared(images, vit), labels)
        sides += side.tolist()
    return tally.keep(), tally.values() | (follows(kept, sides) if setting.keep is None else {})


def follows(kept: list[int], sides: list[int]) -> dict[str, float | Stats]:
    """The metrics FOLLOWS; blank where every scene keeps the same."""
    value, drawn = rank_correlation(sides, kept, resamples=500)
    if not len(drawn):
        return dict.fromkeys(FOLLOWS, float("nan"))
    low, q20, q80, high = np.quantile(drawn, (0.025, 0.2, 0.8, 0.975)).tolist()
    return dict(zip(FOLLOWS, (Stats(value, q20, q80), low, high)))


def distinct(rows: list[dict]) -> list[dict]:
    """One row for each place of the curves: adaptive pruners may keep the same share under two settings."""
    key = ("pruner", "backend", "mode", "keep", "metric")
    return list({tuple(row[column] for column in key): row for row in reversed(rows)}.values())[::-1]


class Study:
    """The cases of one network of NETWORKS. shares: what adaptive pruners were found to keep, by the setting's name;
    the first count decides, so that the rows of a setting belong together."""

    def __init__(self, name: str, options: Options, scenes: Callable[[], Counted]):
        self.scenes, self.batch = scenes, options.batches_or((8,) if options.quick else (SPEED_BATCH,))[0]
        self.bench = functools.cache(functools.partial(SceneBench, name, self.batch, options, scenes))
        dtype = str(options.dtype).removeprefix("torch.")
        self.columns = {"suite": "accuracy", "model": name, "batch": self.batch, "dtype": dtype}
        self.shares: dict[str, float] = {}
        self.predictors, self.timed = predictors_of(name), not options.counts

    def counts(self, backend: str, keeps: tuple[float, ...]) -> list[Case]:
        """A case for each schedule, and one of the unpruned network, which has a backend of its own."""
        cases = []
        if backend == "triton":
            whole = [self._counted(UNPRUNED, "unpruned"), self._timed(UNPRUNED, "unpruned")]
            cases.append(Case(self.columns | {"tokens": "unpruned"}, whole if self.timed else whole[:1]))
        for schedule in SCHEDULES:
            found = [setting for keep in keeps for setting in self.settings(schedule, keep)]
            if backend != "triton":
                found = [setting for setting in found if setting.pruner != "dynamicvit:untrained"]
            every = [self._counted(setting, backend) for setting in found]
            cases.append(Case(self.columns | {"tokens": schedule}, every, distinct))
        return cases

    def timings(self, schedule: str, keep: float) -> Case:
        """Compiled and captured; ats, whose many decisions fall on the GPU, eager too."""
        found = []
        for setting in self.settings(schedule, keep):
            if setting.pruner == "dynamicvit:untrained":  # as fast as the trained one
                continue
            also = ("eager",) if setting.pruner == "ats" and schedule == "published" else ()
            for backend in ("triton", "sdpa_padded"):
                found += [self._timed(setting, backend, mode) for mode in ("compile+graph", *also)]
        return Case(self.columns | {"tokens": schedule}, found, distinct)

    def settings(self, schedule: str, keep: float) -> list[Setting]:
        """What is compared at one place of the curves."""
        untrained = functools.partial(PRUNERS["dynamicvit"], keep=keep, **SCHEDULES[schedule])
        own = Setting("dynamicvit:untrained", schedule, keep, untrained)
        return [*settings(schedule, keep, self.predictors), own]

    def _counted(self, setting: Setting, backend: str) -> Candidate:
        name = "auto" if backend == "unpruned" else backend

        def build() -> Subject:
            vit = self.bench().vit
            need(vit, name)
            share, found = counted(vit, setting, name, self.scenes())
            self.shares.setdefault(setting.name, share)
            return Subject([], clocks=(), found=found)

        columns = {"pruner": setting.pruner, "backend": backend, "keep": setting.keep, "mode": "eager"}
        metrics = COUNTED + (FOLLOWS if setting.keep is None else ())
        return Candidate(columns, build, metrics, found_columns=functools.partial(self._share, setting))

    def _timed(self, setting: Setting, backend: str, mode: str = "compile+graph") -> Candidate:
        pipeline = Pipeline(self.bench, setting.make if setting.pruner != "none" else None, backend, mode)

        def build() -> Subject:
            return replace(pipeline.build(), clocks=("stream_us",), replay=None)

        columns = {"pruner": setting.pruner, "backend": backend, "keep": setting.keep, "mode": mode}
        return Candidate(columns, build, ("images_per_s",), found_columns=functools.partial(self._share, setting))

    def _share(self, setting: Setting) -> dict:
        """The keep column of an adaptive pruner, once it was counted."""
        return {"keep": self.shares.get(setting.name, "")} if setting.keep is None else {}


# ---- --imagenet DIR ----


def imagenet(job: Folder, recorder: Recorder) -> list[dict]:
    """Count everything over a folder of images and write the rows. Goes on where an interrupted count stopped. Under
    torchrun all processes count, and the first writes."""
    with processes.joined(job.device) as group:
        return _imagenet(job, recorder, group)


def _imagenet(job: Folder, recorder: Recorder, group: processes.Group) -> list[dict]:
    state = recorder.folder() / f"accuracy_imagenet_{slug(job.model)}.state.json"
    options = {"desc": "imagenet", "unit": "batch", "mininterval": 1.0}
    show = lambda batches, total: commandline.bar(batches, total=total, **options)  # noqa: E731
    found = count(job, state, show=show, anew=recorder.redo, group=group)
    if not group.first:
        return []
    shared = {"suite": "accuracy", "model": f"{job.model}_imagenet", "mode": "eager", "batch": job.batch,
              "dtype": "float16" if job.device == "cuda" else "float32"}  # fmt: skip
    rows = []
    for setting, tally in found:
        keep = setting.keep if setting.keep is not None else tally.keep()
        columns = {"pruner": setting.pruner, "backend": "auto", "tokens": setting.schedule, "keep": keep}
        candidate = Candidate(columns, lambda: Subject([]), COUNTED)
        for metric, value in tally.values().items():
            rows.append(recorder.row(Case(shared, []), candidate, metric, value))
    unique = {tuple(row[c] for c in ("pruner", "tokens", "keep", "metric")): row for row in rows}
    write_results(list(unique.values()), recorder.out)
    for setting, tally in found:
        print(f"{setting.name:<36} top-1 {tally.right / tally.seen:.4f}", file=sys.stderr)
    return rows
