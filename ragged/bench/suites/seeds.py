"""Suite `seeds`: whether another seed of training gives another answer, counted over the scenes of `accuracy`.

model   the network and the seed that it was trained with, such as "deit_tiny_digits_labels seed 1"
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ...loading import BUNDLED, load_deit
from ..accuracy import SCHEDULES, UNPRUNED, Setting, settings
from ..rounds import Subject
from ..runner import Candidate, Case, Options
from .accuracy import COUNT_BATCH, COUNTED, FOLLOWS, HELD_OUT, counted, distinct, held_out

HEADLINE = (0.7, 0.5, 0.3)  # the places of the curve that every seed is counted at, beside the unpruned network


def seeds(options: Options) -> list[Case]:
    """Every network in the folders of `--networks`, as the training leaves them. DynamicViT where predictors lie beside
    a network."""
    scenes = functools.cache(functools.partial(held_out, 40 if options.quick else HELD_OUT))
    cases, names = [], {}
    for path in (path for folder in options.networks for path in networks_in(Path(folder))):
        name = f"{path.stem} seed {seed_of(path)}"
        if names.setdefault(name, path) is not path:
            raise ValueError(f"--networks: {names[name]} and {path} are both {name}")
        vit = functools.cache(functools.partial(_network, path, options))
        predictors = path.with_name(f"{path.stem}_dynamicvit.safetensors")
        columns = {"suite": "seeds", "model": name, "batch": COUNT_BATCH, "mode": "eager", "backend": "auto",
                   "dtype": str(options.dtype).removeprefix("torch.")}  # fmt: skip
        cases.append(Case(columns | {"tokens": "unpruned"}, [_candidate(vit, UNPRUNED, scenes)]))
        for schedule in SCHEDULES:
            trained = predictors if predictors.is_file() else None
            found = [setting for keep in HEADLINE for setting in settings(schedule, keep, trained)]
            every = [_candidate(vit, setting, scenes) for setting in found]
            cases.append(Case(columns | {"tokens": schedule}, every, distinct))
    return cases


def networks_in(folder: Path) -> list[Path]:
    """The finished networks in a folder of `python -m ragged.train`. FileNotFoundError where there are none."""
    found = [path for ending in BUNDLED.values() for path in sorted(folder.glob(f"deit_*{ending}.safetensors"))]
    if not found:
        raise FileNotFoundError(f"--networks: there is no deit_*_digits*.safetensors in {folder}")
    return found


def seed_of(path: Path) -> int:
    """The seed that the network `path` was trained with, by the .json beside it. ValueError where that does not say."""
    try:
        return int(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["settings"]["seed"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        why = f"--networks: {path.with_suffix('.json')} does not say by which seed {path.name} was trained"
        raise ValueError(why) from error


def _network(path: Path, options: Options) -> nn.Module:
    return load_deit(path.name.partition("_digits")[0], weights=path).to(options.device, options.dtype)


def _candidate(vit: Callable[[], nn.Module], setting: Setting, scenes: Callable) -> Candidate:
    adaptive, own = setting.keep is None, {}

    def build() -> Subject:
        share, found = counted(vit(), setting, "auto", scenes())
        own["keep"] = share
        return Subject([], clocks=(), found=found)

    columns = {"pruner": setting.pruner, "keep": setting.keep}
    metrics = COUNTED + (FOLLOWS if adaptive else ())
    return Candidate(columns, build, metrics, found_columns=lambda: own if adaptive else {})
