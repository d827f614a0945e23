"""`python -m ragged.bench report`: the paper, the recorded H200 and this machine side by side, as markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import data
from ..data import slug
from .runner import machine

RECORDED_GPU = "NVIDIA H200"
BEGIN, END = "<!-- measured: python -m ragged.bench report --readme README.md -->", "<!-- end measured -->"


def report(out: Path) -> str:
    """Markdown, readable in a terminal. out: folder of this machine's rows; left out where it has none of its own."""
    places = [(RECORDED_GPU, data.data_dir() / "results" / slug(RECORDED_GPU))]
    own = Path(out) / slug(machine()["gpu"])
    if own.resolve() != places[0][1].resolve():
        places.append((f"this machine, {machine()['gpu']}", own))
    sources = [(name, frame) for name, folder in places if (frame := read(folder)) is not None]
    if not sources:
        sources = [("nothing recorded yet", None)]
    parts = ["# Paper and measurement, side by side", _about(sources)]
    for section in (attention_call, floors, throughput, peaks, speedups, differences):
        parts.append(section(sources))
    return "\n\n".join(parts) + "\n"


def summary() -> str:
    """The recorded H200 in one small table: host and GPU time of one call, batch 32, 12 heads of 64, float16."""
    frame = read(data.data_dir() / "results" / slug(RECORDED_GPU))
    names = ("flash_attn", "paper_triton", "dense", "triton")
    header = ["tokens", *(f"{clock}, {name}" for clock in ("host", "GPU") for name in names)]
    rows = []
    for tokens in ("39", "99", "197"):
        where = {"suite": "attention", "batch": 32, "tokens": tokens, "dtype": "float16", "mode": "eager"}
        values = [pick(frame, metric, backend=b, **where) for metric in ("host_us", "gpu_us") for b in names]
        rows.append([tokens, *values])
    return table("", header, rows, _about([(RECORDED_GPU, frame)]).splitlines()[-1] + " Medians in µs.").strip()


def write_summary(readme: Path) -> None:
    """Put `summary` between the two marks in the README."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: the table goes between the lines {BEGIN} and {END}, which are not both there once")
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{summary()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def read(folder: Path):
    """All recorded suites of one machine as a data frame, or None."""
    import pandas

    rows = [row for f in sorted(folder.glob("*.csv")) for row in data.read_csv(f, data.RESULT_COLUMNS)]
    if not rows:
        return None
    frame = pandas.DataFrame(rows)
    numbers = {c: pandas.to_numeric(frame[c], errors="coerce") for c in ("batch", "keep", "value", "q20", "q80")}
    return frame.assign(**numbers)


def _about(sources) -> str:
    lines = ["The paper: arXiv 2604.15408, v1 on an A100-SXM4-40GB, v2 on an RTX 4000 Ada. Times in µs."]
    for name, frame in sources:
        if frame is None:
            lines.append(name)
            continue
        last = frame.loc[frame["date"].idxmax() if frame["date"].nunique() == 1 else frame["date"].argmax()]
        lines.append(f"{name}: torch {last.torch}, triton {last.triton}, flash-attn {last.flash_attn or 'absent'}, "
                     f"driver {last.driver or 'none'}, ragged {last.version}, {last.date}.")  # fmt: skip
    return "\n".join(lines)


def pick(frame, metric: str, **columns) -> float:
    """The one value with these columns, NaN where there is none."""
    if frame is None:
        return math.nan
    chosen = frame["metric"] == metric
    for column, value in columns.items():
        chosen &= frame[column] == value
    found = frame.loc[chosen, "value"].dropna()
    return float(found.iloc[0]) if len(found) else math.nan


def table(title: str, header: Sequence[str], rows: Iterable[Sequence], note: str = "") -> str:
    """A markdown table with aligned columns. Numbers are shown with three digits, NaN as a dash; rows in which every
    number is missing are left out."""
    lines = [list(header)]
    for row in rows:
        numbers = [cell for cell in row if isinstance(cell, float)]
        if not numbers or not all(math.isnan(n) for n in numbers):
            lines.append([_shown(cell) for cell in row])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n\n".join(part for part in (title and f"## {title}", note, "\n".join(text)) if part)


def _shown(cell) -> str:
    if not isinstance(cell, float):
        return str(cell)
    if math.isnan(cell):
        return "–"
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"


def _paper(name: str, **columns) -> float:
    """A figure of the paper, NaN where it states none."""
    frame = data.paper(name)
    for column, value in columns.items():
        frame = frame[frame[column] == value]
    return float(frame["value"].iloc[0]) if len(frame) else math.nan


def attention_call(sources) -> str:
    providers = ("paper_padded", "sdpa_padded:attention", "flash_attn", "dense", "paper_triton", "triton")
    rows = []
    for batch, tokens in ((4, 197), (4, 39), (16, 197), (16, 39), (32, 197), (32, 99), (32, 39), (64, 197), (64, 99),
                          (64, 39)):  # fmt: skip
        of = {"batch": batch, "tokens": tokens}
        v1 = [1e3 * _paper("v1_attention_call", backend=name, **of) for name in providers]
        v2 = [1e3 * _paper("v2_attention_call", backend=name, **of) for name in providers]
        rows += [_call_row(batch, tokens, "v1, A100", "wall", v1), _call_row(batch, tokens, "v2, Ada", "event", v2)]
        for name, frame in sources:
            for clock in ("wall", "host", "gpu"):
                key = {"suite": "attention", "batch": batch, "tokens": str(tokens), "mode": "eager",
                       "dtype": "float32" if name.endswith("cpu") else "float16"}  # fmt: skip
                own = [p if p != "paper_triton" else "paper_triton:contiguous" for p in providers]  # as in its table
                values = [pick(frame, f"{clock}_us", backend=provider, **key) for provider in own]
                rows.append(_call_row(batch, tokens, name, clock, values))
    names = [name.removesuffix(":attention") for name in providers]
    header = ("batch", "tokens", "machine", "clock", *names, "FA2 / paper's", "FA2 / ours")
    return table("One attention call, 12 heads of 64, µs", header, rows)


def _call_row(batch, tokens, name, clock, values) -> list:
    flash, paper, ours = values[2], values[4], values[5]
    row = [str(batch), str(tokens), name, clock, *values, flash / paper, flash / ours]
    return row


def floors(sources) -> str:
    providers = ("flash_attn", "torch_varlen", "paper_triton", "triton")
    rows = []
    for name, version, clock in (("v1, A100", "v1", "wall"), ("v2, Ada", "v2", "event")):
        stated = [_paper(f"{version}_dispatch_floor", backend=b, metric="dispatch_floor_us") for b in providers]
        rows.append([name, clock, *stated])
    for name, frame in sources:
        for clock in ("wall_us", "event_us", "host_us", "gpu_us", "syncs"):
            found = [pick(frame, clock, suite="dispatch", backend=b, mode="eager") for b in providers]
            rows.append([name, clock.removesuffix("_us"), *found])
    note = "Batch 32, 39 tokens: the GPU has next to nothing to do."
    return table("The dispatch floor, µs", ("machine", "clock", *providers), rows, note)


def throughput(sources) -> str:
    pipelines = ("unpruned", "paper_padded", "sdpa_padded", "flash_attn", "paper_triton", "triton")
    rows = []
    for batch in (1, 4, 8, 16, 32, 64, 128, 256):
        stated = [_paper("v2_end_to_end_throughput", batch=batch, backend=name) for name in pipelines]
        rows.append([str(batch), "v2, Ada", "eager", *stated, math.nan])
        for name, frame in sources:
            for mode in ("eager", "compile+graph"):
                key = {"suite": "model", "model": "deit_base", "batch": batch, "mode": mode}
                values = [pick(frame, "images_per_s", backend="unpruned", **key)]
                values += [pick(frame, "images_per_s", backend=b, tokens="U(30,168)", **key) for b in pipelines[1:]]
                rows.append([str(batch), name, mode, *values, values[-1] / values[0]])
    note = "Half of the patches stay. On our side truly ragged lengths U(30,168); the paper's counts are equal."
    return table("Images per second, DeiT-B", ("batch", "machine", "mode", *pipelines, "ours / unpruned"), rows, note)


def peaks(sources) -> str:
    rows = []
    for model in ("deit_tiny", "deit_small", "deit_base"):
        for version, where in (("v1", "v1, A100"), ("v2", "v2, Ada")):
            stated = [_paper(f"{version}_peak_throughput", model=model, backend=b) for b in
                      ("dense", "paper_padded", "paper_triton")]  # fmt: skip
            rows.append([model, where, *stated, math.nan, stated[2] / stated[0]])
        for name, frame in sources:
            best = [_peak(frame, model, "unpruned", "197")]
            best += [_peak(frame, model, backend, "99") for backend in ("paper_padded", "paper_triton", "triton")]
            rows.append([model, name, *best, best[3] / best[0]])
    header = ("model", "machine", "unpruned", "paper's padded", "paper's ragged", "ours", "ragged / unpruned")
    return table("Peak images per second over batch sizes and modes, half of the patches", header, rows)


def _peak(frame, model: str, backend: str, tokens: str) -> float:
    if frame is None:
        return math.nan
    of = {"suite": "model", "model": model, "backend": backend, "tokens": tokens, "metric": "images_per_s"}
    for column, value in of.items():
        frame = frame[frame[column] == value]
    return float(frame["value"].max()) if len(frame) else math.nan


def speedups(sources) -> str:
    rows = []
    for pruner in ("threshold_l2", "dynamicvit", "evit", "ats"):
        for pruned in (0.5, 0.9):
            stated = [_paper("v1_speedup_over_unpruned", pruner=pruner, backend=b, pruned=pruned, batch=64) for b in
                      ("paper_padded", "paper_triton")]  # fmt: skip
            rows.append([pruner, f"{pruned:.0%}", "v1, A100", "eager", *stated, math.nan])
            for name, frame in sources:
                for mode in ("eager", "compile+graph"):
                    key = {"suite": "sparsity", "model": "deit_base", "batch": 64, "mode": mode}
                    base = pick(frame, "images_per_s", backend="unpruned", **key)
                    key |= {"pruner": pruner} | _knob(pruner, round(1 - pruned, 1))
                    found = [pick(frame, "images_per_s", backend=b, **key) / base for b in ("sdpa_padded", "triton")]
                    ceiling = pick(frame, "flops_ratio", backend="triton", **key)
                    rows.append([pruner, f"{pruned:.0%}", name, mode, *found, ceiling])
    note = "The paper's padded pipeline pads to the original length; ours, sdpa_padded, to the longest kept."
    header = ("pruner", "pruned", "machine", "mode", "padded", "ragged", "FLOPs ratio")
    return table("Speedup over the unpruned network, DeiT-B, batch 64, single cut", header, rows, note)


def _knob(pruner: str, keep: float) -> dict:
    return {"tokens": f"samples={round(196 * keep)}"} if pruner == "ats" else {"keep": keep}


def differences(sources) -> str:
    rows = []
    for pruner in ("threshold_l2", "dynamicvit", "evit", "ats"):
        stated = [
            _paper("v1_equivalence", pruner=pruner, metric=m) for m in ("max_abs_logit_diff", "mean_abs_logit_diff")
        ]
        rows.append([pruner, "v1, A100", "", "", *stated, math.nan])
        for name, frame in sources:
            for model in ("deit_small", "deit_tiny_digits", "deit_tiny"):
                for dtype in ("float16", "bfloat16", "float32"):
                    key = {
                        "suite": "equivalence",
                        "pruner": pruner,
                        "backend": "triton",
                        "model": model,
                        "dtype": dtype,
                    }
                    values = [pick(frame, m, **key) for m in
                              ("max_abs_logit_diff", "mean_abs_logit_diff", "top1_agreement")]  # fmt: skip
                    rows.append([pruner, name, model, dtype, *values])
    header = ("pruner", "machine", "network", "dtype", "max |Δ logit|", "mean |Δ logit|", "same first class")
    return table("Ragged against padded on the same masks", header, rows)
