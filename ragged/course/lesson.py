"""What the notebooks need beside the package: a set-up line, sliders that survive a static view, feedback on exercises.

Nothing here is needed to use the package. plotly and ipywidgets are imported only where they are used.
"""

from __future__ import annotations

import platform
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec

import numpy as np
import torch

from .. import data, launch
from ..attention import pick_backend
from ..backends import BACKENDS
from .exercises import Exercise, check_exercise, unlike
from .output import figure_bundle, saving, use_small_pictures
from .tables import Table, table

HEAD_DIM = 64  # of every DeiT


@dataclass(frozen=True)
class Here:
    """The machine a notebook runs on, and sizes that keep its cells short there."""

    device: str  # "cuda" or "cpu"
    device_name: str
    dtype: torch.dtype
    model: str  # a name for load_deit
    batch: int
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        """Whether there is a CUDA device."""
        return self.device == "cuda"


def setup(seed: int = 0, quiet: bool = False, gradients: bool = False) -> Here:
    """Seed everything with `seed`, turn gradients off for the whole session, choose light defaults for this machine,
    and print (unless quiet) versions, device and whether gradients are on.

    gradients: True turns them on, for a lesson that trains; off, nothing can be trained until
    `torch.set_grad_enabled(True)`. On a GPU: float16 and DeiT-S; without: float32, DeiT-Ti and a small batch. Figures
    get the course's template.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_grad_enabled(gradients)  # most lessons only run networks forward
    use_small_pictures()
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    here = Here(
        "cuda" if gpu else "cpu", name, torch.float16 if gpu else torch.float32, "deit_small" if gpu else "deit_tiny",
        64 if gpu else 8, versions(),
    )  # fmt: skip
    if not quiet:
        print(" · ".join(f"{package} {version}" for package, version in here.versions.items()))
        print(f"{here.device_name} · {str(here.dtype).removeprefix('torch.')} · {here.model} · batch {here.batch} "
              f"· gradients {'on' if gradients else 'off'}")  # fmt: skip
    return here


def versions() -> dict[str, str]:
    """Versions of what the course stands on; "missing" where something is not installed."""
    own = sys.modules["ragged"].__version__
    found = {"python": platform.python_version(), "ragged-vit": own, "torch": torch.__version__}
    for package in ("triton", "timm", "flash-attn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # not installed; a bare folder on the path still counts
            found[package] = "present" if find_spec(package.replace("-", "_")) else "missing"
    return found


def backends_table(here: Here, head_dim: int = HEAD_DIM) -> Table:
    """Every backend and whether it runs `here` with head_dim numbers per head, a row each; the reason where not."""
    picked = pick_backend(here.device, here.dtype, head_dim)
    rows = []
    for name, backend in BACKENDS.items():
        reason = backend.why_not(here.device, here.dtype, head_dim)
        sign = "->" if name == picked else "ok" if reason is None else "no"
        rows.append({"": sign, "backend": name, "what it is, or why not": backend.about if reason is None else reason})
    notes = [f"->  is what backend='auto' takes here ({here.device}, {here.dtype})"]
    notes += [f"!!  launches go through Triton's wrapper, which costs more: {why}" for why in launch.fallbacks]
    notes += ["++  known calls of the Triton kernel start in C++ (kernels.front)"] if launch.front is not None else []
    return table(rows, note="\n".join(notes))


# ---- recorded results ----


def recorded(suite: str, draw: Callable, gpu: str | None = "NVIDIA H200", **options: object) -> object | None:
    """The figure `draw(rows, **options)` of what `gpu` recorded for a suite; without rows a line and None.

    What a notebook shows on a machine without a GPU: the subtitle names the device and the date of the recording.
    gpu: None for the rows of every GPU, for what does not depend on it.
    """
    rows, where = data.results(suite, gpu), gpu or "any GPU"
    if rows.empty:
        print(f"Nothing recorded yet for {where}, suite {suite!r}: `python -m ragged.bench {suite}` measures it.")
        return None
    try:
        return draw(rows, **options)
    except ValueError as error:  # a recording may be partial; the lesson goes on without the figure
        print(f"The recording of {where} does not hold what this figure needs: {error}")
        return None


def steps(items: Sequence, label: str) -> Iterable:
    """The items one by one, under a bar that is gone at the end; without one where the notebook is being saved.

    items: what a cell that takes longer than a few seconds works through. label: beside the bar.
    """
    from ..bench.commandline import bar

    return bar(items, desc=label, leave=False, disable=saving())


# ---- sliders ----


def slider(render: Callable, values: Sequence, start: object = None, label: str = "value") -> object | None:
    """A live slider: shows `render(value)` and, on a running kernel, a slider that draws it again.

    render: value -> a plotly figure, a table or text, and nothing else: it neither prints nor keeps state, so it can be
    tested and drawn without a slider. values: the stops.  start: the one shown first.  label: beside the slider.
    Returns the widget (None in a notebook that runs to be saved: widget state does not survive a static view, so the
    pictures of all stops are saved for the site, see `frames`).
    """
    from IPython.display import display

    values = list(values)
    start = values[0] if start is None else start
    if start not in values:
        raise ValueError(f"start: expected one of {values}, got {start!r}")
    if saving():
        from .frames import FRAMES, computed

        print(f"{label} = {start}   (run this cell to get a slider over {values[0]} … {values[-1]})")
        display(_shown(render(start)) | {FRAMES: computed(render, values, start, label)}, raw=True)
        return None
    import ipywidgets

    stops = [(str(value), value) for value in values]
    widget = ipywidgets.SelectionSlider(options=stops, value=start, description=label, continuous_update=False)
    display(widget)
    picture = display(_shown(render(start)), raw=True, display_id=True)

    def redraw(change):
        new = _shown(render(change["new"]))
        # JupyterLab's plotly renderer keeps the figure it has and ignores an update; other content in between makes it
        # start afresh
        picture.update({"text/plain": " "}, raw=True)
        picture.update(new, raw=True)

    widget.observe(redraw, names="value")
    return widget


def _shown(result) -> dict:
    """A MIME bundle of text, a table or a figure: a display handle takes it in every front end."""
    if isinstance(result, Table) and result.style is not None:
        return {"text/plain": str(result), "text/html": result._repr_html_()}
    return {"text/plain": str(result)} if isinstance(result, str) else figure_bundle(result)


# ---- exercises ----


def check(spec: object, yours: object, *inputs: object, atol: float = 1e-5, rtol: float = 1e-4) -> bool:
    """Compare your answer with what was asked and say where they differ. Returns whether they agree.

    spec: the name of an exercise, "lesson/number", whose cases are then tried one by one (`exercises.check_exercise`);
    or a tensor, array, number, list, or function to compare with.  yours: the same, or a function; functions are called
    with `inputs`.  atol, rtol: as in `torch.allclose`. An exercise that is not begun (None or NotImplementedError) is
    said to be so.
    """
    if isinstance(spec, str):
        return check_exercise(spec, yours)
    exercise = Exercise(spec if callable(spec) else lambda *_: spec, {"": inputs}, atol=atol, rtol=rtol)
    if callable(yours):
        return check_exercise("", yours, exercise)
    if yours is None:
        print("Not begun: there is no value yet.")
        return False
    verdict = difference(spec(*inputs) if callable(spec) else spec, yours, atol, rtol)
    print(verdict or "Correct.")
    return verdict is None


def difference(spec: object, yours: object, atol: float = 1e-5, rtol: float = 1e-4) -> str | None:
    """What is wrong with `yours` beside `spec`, or None within atol and rtol: shape, kind of numbers, NaN, the rows
    that differ and the first bad value. Lists, tuples and dicts are compared part by part."""
    found = unlike(spec, yours, atol, rtol)
    return found and found[0].upper() + found[1:]
