"""Suite `accuracy`: how often a pruned network is right, and how fast it is in the same setting.

tokens  the schedule: published, or the paper's single cut
keep    the ratio asked for; for adaptive pruners (threshold_l2_tau, ats) the mean share of patches that stayed

top1 and kept_tokens are counted over held-out digit scenes, images_per_s is timed on two batches of them.
dynamicvit has trained predictors, dynamicvit:untrained random ones.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import torch
from torch import Tensor

from ... import data
from ...data import slug, write_results
from ...data.scene_pool import Scenes, batches
from ...pruners import PRUNERS
from .. import commandline, processes
from ..accuracy import KEEPS, SCHEDULES, UNPRUNED, Folder, Setting, Tally, count, settings
from ..pipelines import Pipeline, Workbench, need
from ..rounds import Subject
from ..runner import Candidate, Case, Options, Recorder

MODEL = "deit_tiny_digits"
HELD_OUT = 2000  # test scenes, made of digits that training never shows
COUNTED = ("top1", "kept_tokens")
SPEED_BATCH = 256


def accuracy(options: Options) -> list[Case]:
    """The four pruners, threshold_l2 also with a true threshold, at six places of their curves, in both schedules;
    ours, padded to the longest, and the unpruned network."""
    for name in options.models:
        if name != MODEL:
            raise ValueError(f"--model {name}: accuracy needs trained weights: {MODEL}, or --imagenet DIR with it")
    scenes = functools.cache(functools.partial(held_out, 40 if options.quick else HELD_OUT))
    batch = options.batches_or((8,) if options.quick else (SPEED_BATCH,))[0]
    bench = functools.cache(functools.partial(SceneBench, batch, options, scenes))
    predictors = data.checkpoint_path(f"{MODEL}_dynamicvit")
    columns = {"suite": "accuracy", "model": MODEL, "batch": batch, "dtype": str(options.dtype).removeprefix("torch.")}
    shares: dict[str, float] = {}
    cases = [Case(columns | {"tokens": "unpruned"}, _candidates(bench, scenes, UNPRUNED, ("unpruned",), shares))]
    for schedule, how in SCHEDULES.items():
        for keep in KEEPS if not options.quick else (0.5,):
            found = settings(schedule, keep, predictors)
            untrained = functools.partial(PRUNERS["dynamicvit"], keep=keep, **how)
            candidates = [c for s in found for c in _candidates(bench, scenes, s, ("triton", "sdpa_padded"), shares)]
            setting = Setting("dynamicvit:untrained", schedule, keep, untrained)
            candidates += _candidates(bench, scenes, setting, ("triton",), shares)[:1]
            cases.append(Case(columns | {"tokens": schedule}, candidates))
    return cases


@functools.cache
def held_out(scenes: int) -> list[tuple[Tensor, Tensor]]:
    """Held-out scenes in batches of at most 250: uint8 images, labels."""
    return [tuple(part) for part in batches(Scenes(scenes, "test", 0), min(250, scenes))]


class SceneBench(Workbench):
    """The trained network, and two batches of held-out scenes in place of noise."""

    def __init__(self, batch: int, options: Options, scenes):
        super().__init__(MODEL, batch, options.dtype, options.device, sets=0)
        pixels = torch.cat([images for images, _ in scenes()])
        sets = [pixels[:batch], pixels[batch : 2 * batch]]
        self.images = [self.prepare(images) for images in sets if len(images) == batch]

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 scenes as the network takes them."""
        return data.normalise(images.to(self.device).float() / 255).to(self.dtype)


def _candidates(bench, scenes, setting: Setting, backends: tuple[str, ...],
                shares: dict[str, float]) -> list[Candidate]:  # fmt: skip
    """Per backend: the count, eager; and the speed, compiled and captured, and eager too. shares: what adaptive
    pruners were found to keep, by the setting's name; the first count decides, so that the rows of a setting belong
    together."""
    found = []
    for backend in backends:
        columns = {"pruner": setting.pruner, "backend": backend, "keep": setting.keep}
        found.append(_counted(bench, scenes, setting, columns | {"mode": "eager"}, shares))
        found.append(_timed(bench, setting, columns | {"mode": "compile+graph"}, shares))
    if setting.pruner == "ats" and setting.schedule == "published":  # many decisions on the GPU: eager only
        for backend in backends:
            columns = {"pruner": setting.pruner, "backend": backend, "keep": None, "mode": "eager"}
            found.append(_timed(bench, setting, columns, shares))
    return found


def _share(setting: Setting, shares: dict[str, float]) -> dict:
    """The keep column of an adaptive pruner, once it was counted."""
    return {"keep": shares.get(setting.name, "")} if setting.keep is None else {}


def _counted(bench, scenes, setting: Setting, columns: dict, shares: dict[str, float]) -> Candidate:
    def build() -> Subject:
        b, backend = bench(), "auto" if columns["backend"] == "unpruned" else columns["backend"]
        need(b.vit, backend)
        model = b.model(setting.make(), backend)
        tally = Tally(b.vit.patch_embed.num_patches, b.vit.num_prefix_tokens)
        for images, labels in scenes():
            tally.add(model, b.prepare(images), labels)
        shares.setdefault(setting.name, tally.keep())
        return Subject([], clocks=(), found=tally.values())

    return Candidate(columns, build, COUNTED, found_columns=functools.partial(_share, setting, shares))


def _timed(bench, setting: Setting, columns: dict, shares: dict[str, float]) -> Candidate:
    pipeline = Pipeline(bench, setting.make if setting.pruner != "none" else None, columns["backend"], columns["mode"])

    def build() -> Subject:
        return replace(pipeline.build(), clocks=("stream_us",), replay=None)

    return Candidate(columns, build, ("images_per_s",), found_columns=functools.partial(_share, setting, shares))


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
