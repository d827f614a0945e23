"""Invented rows with the columns of recorded results: they test figures, and are never shown or stored as results."""

import numpy as np
import pandas

from ragged.data import RESULT_COLUMNS

SPEED = {  # invented: host time, GPU time per million multiply-adds, smallest GPU time, in µs
    "flash_attn": (38, 0.9, 13), "torch_varlen": (41, 0.9, 14), "triton": (12, 0.75, 3), "paper_triton": (20, 1.1, 4),
    "nested": (160, 0.95, 14), "sdpa_padded": (60, 1.5, 20), "paper_padded": (900, 9.0, 60), "dense": (20, 0.7, 10),
}  # fmt: skip
MEAN = {"39": 39, "99": 99, "197": 197, "U(20,197)": 120, "U(30,168)": 99}


def rows(records):
    frame = pandas.DataFrame(records)
    blank = dict.fromkeys(RESULT_COLUMNS, "")
    defaults = blank | dict(q20=np.nan, q80=np.nan, keep=np.nan, dtype="float16", status="ok", gpu="NVIDIA H200",
                            date="2026-11-03", mode="eager", torch="2.11.0")  # fmt: skip
    for column, value in defaults.items():
        if column not in frame:
            frame[column] = value
    return frame[list(RESULT_COLUMNS)]


def attention_frame():
    records = []
    for backend, (host, per_work, least) in SPEED.items():
        for batch in (1, 4, 16, 32, 64, 256):
            for tokens, n in MEAN.items():
                if tokens == "U(30,168)" or (tokens[0] == "U" and (batch < 64 or backend == "dense")):
                    continue
                padded = 1.9 if tokens[0] == "U" and "padded" in backend else 1.0
                gpu = max(least, per_work * padded * batch * 12 * 64 * n * n / 1e6)
                for metric, value in (("host_us", host), ("gpu_us", gpu), ("wall_us", max(host, gpu) + 9)):
                    records.append(dict(suite="attention", model="deit_base", backend=backend, batch=float(batch),
                                        tokens=tokens, metric=metric, value=value, q20=value * 0.97, q80=value * 1.05,
                                        unit="us"))  # fmt: skip
    return rows(records)


def model_frame():
    records = []
    peaks = {"unpruned": 10e3, "dense": 15e3, "sdpa_padded": 10.3e3, "flash_attn": 13.5e3, "triton": 14.3e3,
             "paper_triton": 13e3, "paper_padded": 4e3}  # fmt: skip
    for backend, peak in peaks.items():
        for mode, host_s in (("eager", 2.8e-3), ("graph", 0.6e-3), ("compile+graph", 0.45e-3)):
            for batch in (1, 4, 16, 64, 256):
                tokens = {"unpruned": "197", "dense": "99"}.get(backend, "U(30,168)")
                seconds = max(host_s, batch / peak)
                shared = dict(suite="model", model="deit_base", backend=backend, mode=mode, batch=float(batch),
                              tokens=tokens, keep=1.0 if backend == "unpruned" else 0.5)  # fmt: skip
                records.append(shared | dict(metric="images_per_s", value=batch / seconds, unit="images/s"))
                records.append(shared | dict(metric="peak_mb", value=180 + batch * 3.1 * MEAN[tokens] / 99, unit="MB"))
    return rows(records)


def sparsity_frame():
    shared = dict(suite="sparsity", model="deit_base", batch=64.0, mode="compile+graph")
    unpruned = dict(pruner="none", backend="unpruned", keep=1.0, tokens="197", metric="images_per_s", value=1e4)
    records = [shared | unpruned]
    for p, pruner in enumerate(("threshold_l2", "dynamicvit", "evit", "ats")):
        for keep in np.linspace(0.1, 1, 10):
            ceiling = 12 / (4 + 8 * keep)
            here = shared | dict(pruner=pruner, keep=keep)
            records.append(here | dict(backend="triton", metric="flops_ratio", value=ceiling, batch=64.0))
            for backend, share in (("triton", 0.95 - 0.03 * p), ("sdpa_padded", 0.8 - 0.1 * keep)):
                value = 1e4 * ceiling * share
                records.append(here | dict(backend=backend, metric="images_per_s", value=value, q20=0.98 * value,
                                           q80=1.02 * value))  # fmt: skip
    return rows(records)


def dispatch_frame():
    layers = {
        "triton": (12, "checked 10", "output_allocation 3.5", "cuLaunchKernel 6.1"),
        "flash_attn": (38, "binding 17"), "torch_varlen": (41, "custom_op 33", "aten 17"), "torch": (0.1, "empty 6.3"),
    }  # fmt: skip
    shared = dict(suite="dispatch", model="deit_base", pruner="none", batch=32.0, tokens="39", metric="host_us")
    records = []
    for provider, (public, *below) in layers.items():
        records.append(shared | dict(backend=provider, value=float(public)))
        for layer, value in (text.split() for text in below):
            records.append(shared | dict(backend=f"{provider}:{layer}", value=float(value)))
    return rows(records)


def mixed_frame():
    shared = dict(suite="mixed", model="deit_small", pruner="none", mode="compile+graph", keep=1.0)
    shared |= dict(metric="images_per_s", unit="images/s")
    records = [shared | dict(backend="triton", tokens="quadtree 16/32 px", batch=64.0, value=2e4)]
    for batch in (1, 16, 64):
        for low, high in ((224, 224), (192, 256), (160, 320), (112, 448)):
            if batch == 1 and low != 112:
                continue
            for k, backend in enumerate(("triton", "sdpa_padded", "grouped", "resized", "one_by_one"), 1):
                value = 400 * batch / k * (1 - (high - low) / 400 * (k > 1))
                records.append(shared | dict(backend=backend, batch=float(batch), tokens=f"U({low},{high}) px",
                                             value=value, q20=0.98 * value, q80=1.02 * value))  # fmt: skip
    return rows(records)


def verification_frame():
    records = []
    for model, share in (("smollm2_135m", 1), ("llama_2_7b", 10)):
        for backend, factor in (("triton", 1.0), ("torch_varlen", 2.8), ("sdpa_padded", 1.6), ("flex", 7.0)):
            for batch in (1, 4, 16, 64, 256):
                if backend == "flex" and batch < 16:
                    continue
                gpu = factor * (12 + share * batch / 3)
                for metric, value in (("gpu_us", gpu), ("host_us", 90 * factor)):
                    records.append(dict(suite="speculation", model=model, backend=backend, batch=float(batch),
                                        tokens="U(64,1024)", metric=metric, value=value, q20=value * 0.97,
                                        q80=value * 1.05, unit="us"))  # fmt: skip
    return rows(records)


def tree_frame():
    """One tree of 14 guesses: the second branch lives, down to its leaf."""
    parents, found = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], []
    depth, live = {0: 0}, {0, 2, 5, 12}
    for node, parent in enumerate(parents, 1):
        depth[node] = depth[parent] + 1
        found.append(dict(node=node, parent=parent, depth=depth[node], word=f"word{node}", target_prob=0.5 / node,
                          reached=int(parent in live), accepted=int(node in live)))  # fmt: skip
    return pandas.DataFrame(found)


def domain_frame():
    return pandas.DataFrame([
        dict(draft=draft, domain=domain, measure=measure, value=v, low=v - 0.02, high=v + 0.03)
        for d, draft in enumerate(("distilled", "skip", "lookup"))
        for k, domain in enumerate(("code", "math", "logic", "chat"))
        for measure, v in (("paper", 0.5 + 0.02 * k), ("accepted", 0.45 - 0.1 * d + 0.03 * k), ("length", 1.5))
    ])  # fmt: skip


def profile_frame():
    return pandas.DataFrame([
        dict(by=by, at=at, measure=measure, value=v / at, low=v / at - 0.02, high=v / at + 0.02)
        for by, most in (("depth", 3), ("rank", 2)) for at in range(1, most + 1)
        for measure, v in (("paper", 0.6), ("accepted", 0.5))
    ])  # fmt: skip


def entropy_frame():
    return pandas.DataFrame([
        dict(entropy=h, rank=rank, measure=measure, value=v / (1 + rank * h))
        for h in (0.1, 0.5, 1.5, 3.0) for rank in (1, 2) for measure, v in (("paper", 0.9), ("accepted", 0.8))
    ])  # fmt: skip
