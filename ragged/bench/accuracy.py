"""How often a pruned model is right: the settings that are compared, and the count over images of a folder.

`python -m ragged.bench accuracy` counts on digit scenes; with `--imagenet DIR` over an ordinary validation folder
(one folder of images per class), in one pass for all settings, since reading the images takes longest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import verify_sha256
from ..data.tables import only_one
from ..loading import load_deit
from ..model import RaggedViT
from ..pruners import PRUNERS, Pruner
from .folder import Listing, find, image_folder
from .processes import ALONE, Group
from .runner import machine
from .suites.model import SINGLE_CUT
from .timing import Stats

KEEPS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
# The knobs of the adaptive pruners for the same places of the curve; their keep column is what they then kept.
TAUS = dict(zip(KEEPS, (0.5, 0.75, 0.9, 0.96, 1.0, 1.2)))
SAMPLES = dict(zip(KEEPS, (100_000, 12_544, 3136, 784, 196, 49)))
SCHEDULES = {"published": {}, "single cut": SINGLE_CUT}  # and a pruner's arguments for it


@dataclass(frozen=True)
class Setting:
    """A pruner at one place of its curve. keep: its ratio, or None where it is only known afterwards.  schedule:
    "published" or "single cut".  make: the pruner, new each time, or None for the unpruned model."""

    pruner: str
    schedule: str
    keep: float | None
    make: Callable[[], Pruner | None]
    knob: str = ""

    @property
    def name(self) -> str:
        return f"{self.pruner} {self.schedule} {self.keep if self.keep is not None else self.knob}"


UNPRUNED = Setting("none", "unpruned", 1.0, lambda: None)


def settings(schedule: str, keep: float, predictors: Path | None) -> list[Setting]:
    """The pruners at one place of their curves. predictors: a file of trained ones; without it DynamicViT is left out.

    Threshold-L2 is published as a single cut, so both schedules hold the same four for it. The random rival has no
    schedule of its own: where others are published with several cuts, it cuts before blocks 3, 6 and 9.
    """
    how, make = SCHEDULES[schedule], functools.partial
    tau, samples = TAUS[keep], SAMPLES[keep]
    found = [
        Setting("threshold_l2", schedule, keep, make(PRUNERS["threshold_l2"], keep=keep)),
        Setting("threshold_l2_tau", schedule, None, make(PRUNERS["threshold_l2"], tau=tau), f"tau={tau}"),
        Setting("evit", schedule, keep, make(PRUNERS["evit"], keep=keep, **how)),
        Setting("ats", schedule, None, make(PRUNERS["ats"], samples=samples, **how), f"samples={samples}"),
        Setting("random", schedule, keep, make(PRUNERS["random"], keep=keep, **how)),
        Setting("random_adaptive", schedule, None, make(PRUNERS["random"], keep=keep, adaptive=True, **how),
                f"share={keep}"),
    ]  # fmt: skip
    if predictors is not None:
        # a single cut has one predictor: the first of the trained ones
        found.append(Setting("dynamicvit", schedule, keep, make(PRUNERS["dynamicvit"], keep=keep,
                                                                 predictors=predictors, **how)))  # fmt: skip
    return found


class Tally:
    """How many images, how many right, and how often each number of rows stayed after the last cut."""

    def __init__(self, patches: int, prefix: int, seen: int = 0, right: int = 0, counts: Sequence[int] = ()):
        self.patches, self.prefix, self.seen, self.right = patches, prefix, seen, right
        self.counts = torch.zeros(patches + prefix + 2, dtype=torch.int64)
        self.counts[: len(counts)] = torch.tensor(counts, dtype=torch.int64)

    @torch.no_grad()
    def add(self, model: RaggedViT, images: Tensor, labels: Tensor) -> list[int]:
        """Run a batch, images (n, 3, H, W) and labels (n,), and count. Returns the rows that stayed in each image."""
        logits, stages = model.trace(images)
        self.seen += len(labels)
        self.right += (logits.argmax(1) == labels.to(logits.device)).sum().item()
        kept = stages[-1].counts if stages else [self.patches + self.prefix] * len(labels)
        self.counts += torch.bincount(torch.tensor(kept), minlength=len(self.counts))
        return kept

    def values(self) -> dict[str, float | Stats]:
        """top1, a share; images, how many it is a share of; kept_tokens, mean with 20 % and 80 % quantiles, CLS
        included."""
        rows, total = torch.arange(len(self.counts)), max(1, int(self.counts.sum()))
        below = self.counts.cumsum(0)
        q20, q80 = (int((below < share * total).sum()) for share in (0.2, 0.8))
        mean = (rows * self.counts).sum().item() / total
        top1 = self.right / max(1, self.seen)
        return {"top1": top1, "images": self.seen, "kept_tokens": Stats(mean, q20, q80)}

    def keep(self) -> float:
        """The mean share of patches that stayed, two decimals."""
        return round((self.values()["kept_tokens"].median - self.prefix) / self.patches, 2)


# ---- a folder of images ----


@dataclass(frozen=True)
class Folder:
    """What `--imagenet` counts: a folder, a model with its weights, and optional DynamicViT predictors. class_map: a
    file that says which class folder is which class."""

    folder: Path
    model: str = "deit_small"
    weights: str = "imagenet"
    sha256: str | None = None
    predictors: Path | None = None
    predictors_sha256: str | None = None
    batch: int = 128
    workers: int = 8
    device: str = "cuda"
    class_map: Path | None = None

    def settings(self) -> list[Setting]:
        """Everything that is counted: the unpruned model, then each schedule at each place of the curve."""
        if self.predictors is not None and self.predictors_sha256 is not None:
            verify_sha256(self.predictors, self.predictors_sha256)
        found = [UNPRUNED]
        for schedule in SCHEDULES:
            for keep in KEEPS:
                found += settings(schedule, keep, self.predictors)
        return found

    def network(self) -> nn.Module:
        """The model, on its device, in half precision on a GPU."""
        vit = load_deit(self.model, weights=self.weights, sha256=self.sha256)
        return vit.to(self.device, torch.float16 if self.device == "cuda" else torch.float32)


def count(job: Folder, state: Path, every: int = 20, show: Callable[[Iterable, int], Iterable] | None = None,
          chosen: list[Setting] | None = None, anew: bool = False,
          group: Group = ALONE) -> list[tuple[Setting, Tally]]:  # fmt: skip
    """One pass over the folder for all settings. state: a file to go on from, written every so many batches and
    removed at the end.  show: wraps the batches, for a progress bar.  chosen: instead of all settings.  anew: forget
    the state.  group: processes that share the work, batch by batch, so that a batch holds what it holds for one
    process; the first writes, and the others may be more or fewer when a count goes on. ValueError if the state is of
    other weights, other images or another version, if the folder changes meanwhile, and if processes see different
    things; OSError if another run counts with the same state. What the classes are is printed on stderr."""
    from timm.data.distributed_sampler import OrderedDistributedSampler

    with only_one(state.with_name(f".{state.stem}.lock"), 0) if group.first else contextlib.nullcontext():
        if anew and group.first:
            state.unlink(missing_ok=True)
        vit = job.network()
        every_setting = job.settings() if chosen is None else chosen
        loader = image_folder(job.folder, vit, job.batch, job.workers, job.class_map)
        listing = loader.dataset.listing
        if group.first:
            print(listing.summary(), file=sys.stderr)
        identity = _identity(job, vit, listing, every_setting)
        dtype, sizes = vit.patch_embed.proj.weight.dtype, (vit.patch_embed.num_patches, vit.num_prefix_tokens)
        models = [RaggedViT(vit, setting.make()).to(job.device, dtype) for setting in every_setting]
        group.agree(identity | {"GPU": machine()["gpu"], "version of PyTorch": torch.__version__})
        if len(listing.samples) < group.size:
            raise ValueError(f"--imagenet: {job.folder} holds {len(listing.samples)} images, fewer than the "
                             f"{group.size} processes; start fewer")  # fmt: skip
        done, tallies = _resume(state, identity, every_setting, sizes) if group.first else (0, [])
        done = group.of_first(done)
        tallies = tallies or [Tally(*sizes) for _ in every_setting]
        mine = OrderedDistributedSampler(range(done, len(loader)), group.size, group.rank)
        valid = len(range(done + group.rank, len(loader), group.size))  # the rest repeats batches, to make ranks even
        batches: Iterable = _from(loader, [done + i for i in mine])
        for number, (images, labels) in enumerate(show(batches, len(mine)) if show and group.first else batches, 1):
            images = images.to(job.device, dtype)
            for model, tally in zip(models, tallies) if number <= valid else ():
                tally.add(model, images, labels)
            if number % every == 0 and number < len(mine):
                found = _sum(tallies, sizes, group)
                if group.first:
                    _note(state, identity, done + number * group.size, every_setting, found)
        found = _sum(tallies, sizes, group)
        if group.first:
            _same_folder(job, vit, identity)
            state.unlink(missing_ok=True)
    return list(zip(every_setting, found))


def _sum(tallies: list[Tally], sizes: tuple[int, int], group: Group) -> list[Tally]:
    """The tallies of all processes as one each."""
    if group.size == 1:
        return tallies
    whole = group.total(torch.stack([torch.cat((torch.tensor([t.seen, t.right]), t.counts)) for t in tallies]))
    return [Tally(*sizes, int(row[0]), int(row[1]), row[2:].tolist()) for row in whole]


def _same_folder(job: Folder, vit: nn.Module, identity: dict) -> None:
    """ValueError if the folder is not any more what was counted."""
    if find(job.folder, vit.num_classes, job.class_map).fingerprint() != identity["images"]:
        raise ValueError(f"--imagenet: {job.folder} changed while it was counted, and nobody can say of which images "
                         "the result is; count again when it is left alone, with --redo")  # fmt: skip


def _from(loader: torch.utils.data.DataLoader, numbers: list[int]) -> Iterator:
    """The batches with these numbers, without reading others."""
    size, images = loader.batch_size, len(loader.dataset)
    which = [list(range(number * size, min(images, (number + 1) * size))) for number in numbers]
    try:
        yield from torch.utils.data.DataLoader(loader.dataset, batch_sampler=which, num_workers=loader.num_workers)
    except (OSError, ValueError) as error:  # from another process it comes wrapped in that process's traceback
        why = str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        raise type(error)(re.sub(r"^\[Errno \d+\] (.+): '(.+)'$", r"\2: \1", why)) from None


def _note(state: Path, identity: dict, done: int, every_setting: list[Setting], tallies: list[Tally]) -> None:
    found = {s.name: [t.seen, t.right, t.counts.tolist()] for s, t in zip(every_setting, tallies)}
    draft = state.with_suffix(".draft")
    draft.write_text(json.dumps({"job": identity, "done": done, "found": found}), encoding="utf-8")
    draft.replace(state)


def _resume(state: Path, identity: dict, every_setting: list[Setting],
            sizes: tuple[int, int]) -> tuple[int, list[Tally]]:  # fmt: skip
    if not state.is_file():
        return 0, [Tally(*sizes) for _ in every_setting]
    try:
        kept = json.loads(state.read_text(encoding="utf-8"))
        changed = [what for what in identity if kept["job"].get(what) != identity[what]]
        if not changed:
            return kept["done"], [Tally(*sizes, *kept["found"][s.name]) for s in every_setting]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{state} is damaged ({error!r}); count from the beginning with --redo") from error
    raise ValueError(
        f"{state} is of an interrupted count of something else: the {' and the '.join(changed)} differ. Two halves of "
        "different counts make no whole: go on with what it was begun with, or count from the beginning with --redo"
    )


def _identity(job: Folder, vit: nn.Module, listing: Listing, every_setting: list[Setting]) -> dict[str, object]:
    """What the first and the second half of an interrupted count must have in common, under the name of each part."""
    predictors = None if job.predictors is None else hashlib.sha256(Path(job.predictors).read_bytes()).hexdigest()
    return {
        "model": job.model, "weights": weights_hash(vit), "predictors": predictors, "images": listing.fingerprint(),
        "number of images": len(listing.samples), "settings": [setting.name for setting in every_setting],
        "batch size": job.batch, "device": job.device, "version of ragged": machine()["version"],
    }  # fmt: skip


def weights_hash(vit: nn.Module) -> str:
    """SHA-256 of all weights: it sees a changed file, and a changed download too."""
    found = hashlib.sha256()
    for name, x in sorted(vit.state_dict().items()):
        found.update(f"{name} {tuple(x.shape)} {x.dtype}\n".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
