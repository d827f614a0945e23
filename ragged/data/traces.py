"""Profiler traces of single calls, as `python -m ragged.bench dispatch` writes them, turned into intervals."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from . import files
from .tables import slug

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx")  # as the profiler names them


def trace_spans(backend: str, gpu: str = "NVIDIA H200", calls: int = 3,
                folder: Path | None = None) -> list[tuple[str, float, float]]:  # fmt: skip
    """The last calls of a recorded profiler trace: who worked, from when to when, in µs from the first of them on.

    backend: whose public function was called.  gpu: "NVIDIA H200" and "nvidia_h200" name the same folder.  calls: how
    many; the first ones of a trace contain the profiler's own start.  folder: where the traces lie, instead of the
    bundled ones. Returns ("host", start, end) for every call, ("launch", …) for what the driver took of it, and
    ("GPU", …) for every kernel. ValueError where there is no such trace, or fewer calls in it.
    """
    place = files.data_dir() / "results" / slug(gpu) / "traces" if folder is None else Path(folder)
    path = place / f"{backend}.json.gz"
    if not path.is_file():
        found = sorted(file.name.removesuffix(".json.gz") for file in place.glob("*.json.gz"))
        raise ValueError(f"backend: no trace of {backend!r} for {gpu}; there are {', '.join(found) or 'none'}")
    try:
        events = [e for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if e.get("ph") == "X"]
        whole = sorted(_span("host", e) for e in events if e.get("cat") == "user_annotation")
        launches = [_span("launch", e) for e in events if e.get("name") in LAUNCHES]
        kernels = [_span("GPU", e) for e in events if e.get("cat") == "kernel"]
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: not a trace of PyTorch's profiler ({error!r})") from None
    if not 1 <= calls <= len(whole):
        raise ValueError(f"calls: expected 1 to {len(whole)}, which {path.name} holds, got {calls!r}")
    start = whole[-calls][1]
    spans = [*whole[-calls:], *sorted(s for s in launches + kernels if s[1] >= start)]
    return [(who, round(a - start, 3), round(b - start, 3)) for who, a, b in spans]


def _span(who: str, event: dict) -> tuple[str, float, float]:
    return who, float(event["ts"]), float(event["ts"]) + float(event["dur"])
