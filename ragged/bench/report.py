"""`python -m ragged.bench report`: the paper, the recorded GPUs and this machine side by side, as markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import data
from ..data import slug
from .paper import ALL_MODES, Rows, own_name, said
from .runner import machine

RECORDED_GPU, _ = RECORDED = ("NVIDIA H200", "NVIDIA H100")  # whose rows come with the package
BEGIN, END = "<!-- measured: python -m ragged.bench report --readme README.md -->", "<!-- end measured -->"


def report(out: Path) -> str:
    """Markdown, readable in a terminal. out: folder of this machine's rows; left out where it has none of its own."""
    bundled, gpu = data.data_dir() / "results", machine()["gpu"]
    frames = {name: data.results(gpu=name) for name in RECORDED}
    if Path(out).resolve() != bundled.resolve() or slug(gpu) not in map(slug, RECORDED):
        frames[f"this machine, {gpu}"] = data.results(gpu=gpu, folder=out)
    sources = [(name, Rows(frame)) for name, frame in frames.items() if len(frame)]
    parts = ["# Paper and measurement, side by side", _about(sources)]
    for section in (attention_call, floors, throughput, peaks, speedups, differences):
        parts.append(section(sources))
    return "\n\n".join(parts) + "\n"


def summary() -> str:
    """The recorded H200 in one small table: host and GPU time of one call, batch 32, 12 heads of 64, float16."""
    own = Rows(data.results("attention", RECORDED_GPU))  # other suites may be of another version
    names = ("flash_attn", "paper_triton", "dense", "triton")
    header = ["tokens", *(f"{clock}, {name}" for clock in ("host", "GPU") for name in names)]
    rows = []
    for tokens in ("39", "99", "197"):
        values = [own.call(name, tokens, clock=clock) for clock in ("host_us", "gpu_us") for name in names]
        rows.append([tokens, *values])
    return table("", header, rows, _about([(RECORDED_GPU, own)]).splitlines()[-1] + " Medians in µs.").strip()


def write_summary(readme: Path) -> None:
    """Put `summary` between the two marks in the README."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: the table goes between the lines {BEGIN} and {END}, which are not both there once")
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{summary()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _about(sources) -> str:
    lines = ["The paper: arXiv 2604.15408, v1 on an A100-SXM4-40GB, v2 on an RTX 4000 Ada. Times in µs."]
    for name, own in sources:
        last = own.rows[own.rows["date"] == own.rows["date"].max()].iloc[0]
        lines.append(f"{name}: torch {last.torch}, triton {last.triton}, flash-attn {last.flash_attn or 'absent'}, "
                     f"driver {last.driver or 'none'}, ragged {last.version}, {last.date}.")  # fmt: skip
    if not sources:
        lines.append("Nothing recorded yet.")
    return "\n".join(lines)


def table(title: str, header: Sequence[str], rows: Iterable[Sequence], note: str = "") -> str:
    """A markdown table with aligned columns. Numbers are shown with three digits, NaN as a dash, disturbed ones with a
    mark that a line below explains; rows in which every number is missing are left out."""
    lines, rows = [list(header)], list(rows)
    for row in rows:
        numbers = [cell for cell in row if isinstance(cell, float)]
        if not numbers or not all(math.isnan(n) for n in numbers):
            lines.append([_shown(cell) for cell in row])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    shaky = any(isinstance(cell, data.Disturbed) for row in rows for cell in row)
    marks = data.NOTE.replace("*", "\\*") + "." if shaky else ""  # an asterisk, not the start of italics
    return "\n\n".join(part for part in (title and f"## {title}", note, "\n".join(text), marks) if part)


def _shown(cell) -> str:
    if not isinstance(cell, float):
        return str(cell)
    if math.isnan(cell):
        return "–"
    text = f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return text + data.MARK * isinstance(cell, data.Disturbed)


def attention_call(sources) -> str:
    providers = ("paper_padded", "sdpa_padded:attention", "flash_attn", "dense", "paper_triton", "triton")
    rows = []
    for batch, tokens in ((4, 197), (4, 39), (16, 197), (16, 39), (32, 197), (32, 99), (32, 39), (64, 197), (64, 99),
                          (64, 39)):  # fmt: skip
        of = {"batch": batch, "tokens": tokens}
        v1 = [1e3 * said("v1_attention_call", "wall_ms", backend=name, **of) for name in providers]
        v2 = [1e3 * said("v2_attention_call", "event_ms", backend=name, **of) for name in providers]
        rows += [_call_row(batch, tokens, "v1, A100", "wall", v1), _call_row(batch, tokens, "v2, Ada", "event", v2)]
        for name, own in sources:
            for clock in ("wall", "host", "gpu"):
                values = [own.call(own_name(b), str(tokens), batch, clock=f"{clock}_us") for b in providers]
                rows.append(_call_row(batch, tokens, name, clock, values))
    names = [name.removesuffix(":attention") for name in providers]
    header = ("batch", "tokens", "machine", "clock", *names, "FA2 / paper's", "FA2 / ours")
    return table("One attention call, 12 heads of 64, µs", header, rows)


def _call_row(batch, tokens, name, clock, values) -> list:
    flash, paper, ours = values[2], values[4], values[5]
    return [str(batch), str(tokens), name, clock, *values, flash / paper, flash / ours]


def floors(sources) -> str:
    providers = ("flash_attn", "torch_varlen", "paper_triton", "triton")
    rows = []
    for name, version, clock in (("v1, A100", "v1", "wall"), ("v2, Ada", "v2", "event")):
        stated = [said(f"{version}_dispatch_floor", "dispatch_floor_us", backend=b) for b in providers]
        rows.append([name, clock, *stated])
    for name, own in sources:
        for clock in ("wall_us", "event_us", "host_us", "gpu_us", "syncs"):
            found = [own.value(clock, suite="dispatch", backend=b, mode="eager") for b in providers]
            rows.append([name, clock.removesuffix("_us"), *found])
    note = "Batch 32, 39 tokens: the GPU has next to nothing to do."
    return table("The dispatch floor, µs", ("machine", "clock", *providers), rows, note)


def throughput(sources) -> str:
    pipelines = ("unpruned", "paper_padded", "sdpa_padded", "flash_attn", "paper_triton", "triton")
    rows = []
    for batch in (1, 4, 8, 16, 32, 64, 128, 256):
        stated = [said("v2_end_to_end_throughput", "images_per_s", batch=batch, backend=name) for name in pipelines]
        rows.append([str(batch), "v2, Ada", "eager", *stated, math.nan])
        for name, own in sources:
            for mode in ("eager", "compile+graph"):
                values = [own.speed(backend, batch, mode, tokens="U(30,168)") for backend in pipelines]
                rows.append([str(batch), name, mode, *values, values[-1] / values[0]])
    note = "Half of the patches stay. On our side truly ragged lengths U(30,168); the paper's counts are equal."
    return table("Images per second, DeiT-B", ("batch", "machine", "mode", *pipelines, "ours / unpruned"), rows, note)


def peaks(sources) -> str:
    rows = []
    for model in ("deit_tiny", "deit_small", "deit_base"):
        for version, where in (("v1", "v1, A100"), ("v2", "v2, Ada")):
            stated = [said(f"{version}_peak_throughput", "images_per_s", model=model, backend=b) for b in
                      ("dense", "paper_padded", "paper_triton")]  # fmt: skip
            rows.append([model, where, *stated, math.nan, stated[2] / stated[0]])
        for name, own in sources:
            contestants = ("unpruned", "paper_padded", "paper_triton", "triton")
            best = [own.peak(backend, model, ALL_MODES) for backend in contestants]
            rows.append([model, name, *best, best[3] / best[0]])
    header = ("model", "machine", "unpruned", "paper's padded", "paper's ragged", "ours", "ragged / unpruned")
    return table("Peak images per second over batch sizes and modes, half of the patches", header, rows)


def speedups(sources) -> str:
    rows = []
    for pruner in ("threshold_l2", "dynamicvit", "evit", "ats"):
        for pruned in (0.5, 0.9):
            at = dict(table="v1_speedup_over_unpruned", metric="speedup", pruner=pruner, pruned=pruned, batch=64)
            stated = [said(**at, backend=backend) for backend in ("paper_padded", "paper_triton")]
            rows.append([pruner, f"{pruned:.0%}", "v1, A100", "eager", *stated, math.nan])
            for name, own in sources:
                for mode in ("eager", "compile+graph"):
                    keep = round(1 - pruned, 1)
                    found = [own.cut(pruner, keep, mode, backend) for backend in ("sdpa_padded", "triton")]
                    ceiling = own.sparse("flops_ratio", pruner, keep, mode)
                    rows.append([pruner, f"{pruned:.0%}", name, mode, *found, ceiling])
    note = "The paper's padded pipeline pads to the original length; ours, sdpa_padded, to the longest kept."
    header = ("pruner", "pruned", "machine", "mode", "padded", "ragged", "FLOPs ratio")
    return table("Speedup over the unpruned network, DeiT-B, batch 64, single cut", header, rows, note)


def differences(sources) -> str:
    rows = []
    for pruner in ("threshold_l2", "dynamicvit", "evit", "ats"):
        stated = [said("v1_equivalence", f"{which}_abs_logit_diff", pruner=pruner) for which in ("max", "mean")]
        rows.append([pruner, "v1, A100", "", "", *stated, math.nan])
        for name, own in sources:
            for model in ("deit_small", "deit_tiny_digits", "deit_tiny"):
                for dtype in ("float16", "bfloat16", "float32"):
                    key = dict(suite="equivalence", pruner=pruner, backend="triton", model=model, dtype=dtype)
                    values = [own.value(m, **key) for m in
                              ("max_abs_logit_diff", "mean_abs_logit_diff", "top1_agreement")]  # fmt: skip
                    rows.append([pruner, name, model, dtype, *values])
    header = ("pruner", "machine", "network", "dtype", "max |Δ logit|", "mean |Δ logit|", "same first class")
    return table("Ragged against padded on the same masks", header, rows)
