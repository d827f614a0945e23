"""Random batches for minutes: does memory stay flat, is anything compiled again, does every result stay right?

    python tests/soak.py --batches 20000 --seconds 480 --model deit_tiny

Not collected; tests/test_soak.py runs short ones. Of twenty batches about ten are single attention calls (1 to 256
images, lengths from 0 to a whole image), five go through eager models (every pruner, published and single cuts, a new
keep rate each time), four through recorded graphs (a handful of pruners and batch sizes; counts that only the GPU
knows), one through a model whose pieces went through torch.compile. Every twentieth batch is compared with the float64
reference, given the tokens that the run itself selected (a recorded batch of more than 16 images with padded attention
instead). Prints one JSON object; the exit status is 1 if anything was wrong.

--device cpu leaves the graphs out, for want of any, and is for trying the script.
"""

import argparse
import collections
import itertools
import json
import random
import signal
import sys
import time

import torch
from gpu_tools import compiled_kernels

import ragged
from ragged import launch
from ragged.bench.pipelines import Replay, noted_pass
from ragged.pruners import GivenLengths
from ragged.tiles import choose_tiles, pipe_tiles, prefers_gluon

KINDS = ["attention"] * 10 + ["eager"] * 5 + ["captured"] * 4 + ["compiled"]
MOST = 256  # images in a batch
CHECK_EVERY, CHECK_IMAGES = 20, 16
FLAT_MB = 16  # tensors alive between two batches may differ by this much, and not in one direction
GROWTH = 1.25  # of what the allocator holds, from half time to the end
HOST_MB = 128  # growth of the process in the second half

RECORDED = [  # given_lengths keeps what a tensor on the GPU says: any total through one recording
    ("given_lengths", 64, "auto"), ("evit", 256, "auto"), ("tau", 32, "auto"), ("dynamicvit", 128, "auto"),
    ("given_lengths", 8, "auto"), ("threshold_l2", 16, "auto"), ("ats", 24, "auto"), ("tau", 16, "sdpa_padded"),
    ("given_lengths", 1, "auto"),
]  # fmt: skip


class Soak:
    def __init__(self, options):
        self.options, self.device = options, options.device
        self.cuda = options.device != "cpu"
        self.dtype = torch.float16 if self.cuda else torch.float32
        self.rng = random.Random(options.seed)
        self.failures, self.done = [], collections.Counter()
        self.worst, self.checks, self.missed = 0.0, 0, 0
        self.buckets = collections.defaultdict(set)
        self.vit = network(options.model).to(self.device, self.dtype)
        self.tokens = self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens
        self.heads = self.vit.blocks[0].attn.num_heads
        self.headdim = self.vit.embed_dim // self.heads
        self.most = options.images
        g = torch.Generator().manual_seed(options.seed)
        shape = (self.most + 64, 3, *self.vit.patch_embed.img_size)
        contrast = torch.rand(shape[0], 1, shape[2] // 16, shape[3] // 16, generator=g).mul(2).exp()
        pool = torch.randn(shape, generator=g) * contrast.repeat_interleave(16, 2).repeat_interleave(16, 3)
        self.pool = pool.to(self.device, self.dtype)
        rows = self.most * self.tokens
        self.qkv = torch.randn(rows, 3, self.heads, self.headdim, generator=g).to(self.device, self.dtype)

    # --- what is run

    def build(self):
        """The pipelines: all are made and run once before anything is counted."""
        options, last = self.options, len(self.vit.blocks) - 1
        single = {"at": (min(3, last),), "where": "after"}
        make = ragged.PRUNERS
        self.kinds = kinds = {
            "threshold_l2": lambda **own: make["threshold_l2"](**({"keep": 0.5} | single | own)),
            "tau": lambda **own: make["threshold_l2"](**({"tau": 1.0} | single | own)),
            "dynamicvit": lambda **own: make["dynamicvit"](**({"keep": 0.7} | own)),
            "evit": lambda **own: make["evit"](**({"keep": 0.7} | own)),
            "ats": lambda **own: make["ats"](**({"samples": self.tokens - 1} | own)),
        }
        stages = {"at": tuple(i for i in (3, 6, 9) if i <= last)}
        self.places = {}
        for name in kinds:
            several = {"at": range(min(3, last), last + 1)} if name == "ats" else stages
            self.places |= {name: (name, several), f"{name}, one cut": (name, single)}
        compiled = ragged.RaggedViT(self.vit, kinds["tau"](), options.backend)
        self.compiled_model = compiled.compile(dynamic=True, backend=options.compile_backend)
        self.recorded = {}
        if not self.cuda:
            return
        for name, batch, backend in RECORDED[: options.captured]:
            batch = min(batch, self.most)
            every = [self.tokens] * batch
            pruner = GivenLengths(every, **single) if name == "given_lengths" else kinds[name](**single)
            model = ragged.RaggedViT(self.vit, pruner, backend).to(self.device)
            self.recorded[f"{name} {batch} {backend}"] = model, model.capture(batch)

    def warm(self):
        self.build()
        if self.cuda:
            self.warm_tiles()
        for batch in (self.most, 1, 2, 3, self.most // 2, self.most):
            images = self.images(batch)
            for kind, place in self.places.values():
                self.eager_model(kind, **place)(images)
                if kind != "tau":  # few rows are scored by other tiles
                    few = {"samples": 40} if kind == "ats" else {"keep": 0.2}
                    self.eager_model(kind, **place, **few)(images)
            for contrast in (0.0, 1.0, 3.0):
                self.compiled_model(images * contrast)
        for kind in ["attention", "eager", "compiled", *["captured"] * bool(self.recorded)] * 3:
            self.one(kind, check=True)
        self.sync()

    def warm_tiles(self):
        """Every tile choice that a length and a batch can lead to, for views of a projection as models have them."""
        seen, processors = set(), launch.processors(torch.cuda.current_device())
        every = itertools.product(range(1, self.most + 1), (False, True), range(1, self.tokens + 1))
        for images, equal, longest in every:
            kind = (longest, longest, self.headdim, images * self.heads, equal, 2)
            in_gluon = prefers_gluon(*kind) and pipe_tiles(longest, *kind[2:4], processors)
            tiles = choose_tiles.__wrapped__(*kind), in_gluon
            rows = images * longest - (not equal)  # of a single one PyTorch makes up the stride
            if tiles not in seen and (equal or images > 1) and rows > 1:
                seen.add(tiles)
                self.warm_call(longest, images, equal)

    def warm_call(self, longest, images, equal):
        counts = [longest] * images
        counts[-1] -= not equal
        q, k, v = self.qkv[: sum(counts)].unbind(1)
        cu = self.offsets(counts)
        for name in ("auto", "triton"):  # which a model asks for where it does not know whether counts are equal
            ragged.varlen_attention(q, k, v, cu, cu, longest, longest, backend=name)

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def offsets(self, counts):
        return torch.tensor([0, *counts]).cumsum(0).int().to(self.device)

    def images(self, batch):
        start = self.rng.randrange(self.pool.shape[0] - batch + 1)
        return self.pool[start : start + batch] * self.rng.uniform(0.2, 2.0)

    def lengths(self, batch):
        """Of one of four shapes: all equal, anything, about a keep rate, a few long ones among short ones."""
        n, shape = self.tokens, self.rng.randrange(4)
        keep = self.rng.uniform(0.05, 1.0)
        if shape == 0:
            return [max(1, int(keep * n))] * batch
        if shape == 1:
            return [self.rng.randint(0, n) for _ in range(batch)]
        if shape == 2:
            return [min(n, max(0, round(self.rng.gauss(keep * n, 0.1 * n)))) for _ in range(batch)]
        return [n if self.rng.random() < 0.1 else self.rng.randint(0, 20) for _ in range(batch)]

    # --- one batch

    def one(self, kind, check=False):
        batch = self.rng.randint(1, CHECK_IMAGES if check else self.most)
        getattr(self, kind)(min(batch, self.most), check)

    def attention(self, batch, check):
        counts = self.lengths(batch)
        cu, longest = self.offsets(counts), max(1, *counts)
        arguments = (*self.qkv[: sum(counts)].unbind(1), cu, cu, longest, longest)
        out = ragged.varlen_attention(*arguments)
        if check:
            self.compare("attention", out, ragged.varlen_attention_ref(*arguments))

    def eager(self, batch, check):
        if self.rng.random() < 0.1:
            name, counts = "given_lengths", [max(1, n) for n in self.lengths(batch)]
            at = (min(3, len(self.vit.blocks) - 1),)
            model = ragged.RaggedViT(self.vit, GivenLengths(counts, at=at)).to(self.device)
        else:
            name, (kind, place) = self.rng.choice(list(self.places.items()))
            model = self.eager_model(kind, **place, **self.setting(kind))
        self.through(f"eager {name}", model, model, self.images(batch), check)

    def eager_model(self, kind, **settings):
        return ragged.RaggedViT(self.vit, self.kinds[kind](**settings), self.options.backend).to(self.device)

    def setting(self, kind):
        """A new keep rate: nothing but a number, as in a sweep."""
        if kind == "ats":
            return {"samples": self.rng.randint(1, self.tokens)}
        return {"tau": self.rng.uniform(0.5, 1.3)} if kind == "tau" else {"keep": self.rng.uniform(0.05, 1.0)}

    def captured(self, batch, check):
        name, (model, run) = self.rng.choice(list(self.recorded.items()))
        batch = run.images.shape[0]
        if name.startswith("given_lengths"):
            model.pruner.counts.copy_(torch.tensor([max(1, n) for n in self.lengths(batch)], dtype=torch.int32))
        try:
            self.through(f"captured {name}", model, run, self.images(batch), check)
        except ValueError as error:  # no bucket large enough
            self.missed += 1
            self.failures.append(f"captured {name}: {error}")
            return
        if run.waits:
            self.note_bucket(name, run, batch)

    def note_bucket(self, name, run, batch):
        """The bucket that the call took must be the tightest there is."""
        total, longest = int(run.counts.sum()), int(run.counts.max())
        rows = longest if run.padded else total
        took = round((1 + run.capacity_waste) * total / (batch if run.padded else 1))
        self.buckets[name].add(took)
        if took != min(size for size in run.sizes if size >= rows):
            self.missed += 1
            self.failures.append(f"captured {name}: {rows} rows went through the bucket of {took}")

    def compiled(self, batch, check):
        self.through("compiled tau", self.compiled_model, self.compiled_model, self.images(batch), check)

    def through(self, name, model, run, images, check):
        logits = run(images)
        if not check:
            return
        if not logits.isfinite().all():
            self.failures.append(f"{name}: logits are not finite")
        again, taken = noted_pass(model, images)
        backend = "reference" if len(images) <= CHECK_IMAGES else "sdpa_padded"
        want = ragged.RaggedViT(self.vit, Replay(model.pruner, taken), backend)(images)
        for got in (logits, again):
            self.compare(name, got, want)

    def compare(self, name, got, want):
        error = float((got.double().cpu() - want.double().cpu()).abs().max()) if got.numel() else 0.0
        allowed = (1e-2 if self.cuda else 1e-4) * max(1.0, float(want.abs().max()) if got.numel() else 0.0)
        self.checks += 1
        self.worst = max(self.worst, error / allowed)
        if not error <= allowed:
            self.failures.append(f"{name}: off by {error:.3g}, allowed {allowed:.3g}")

    # --- all batches

    def stop(self, *_):
        """End after the batch that is under way, and report."""
        self.options.seconds = -1.0

    def run(self):
        signal.signal(signal.SIGTERM, self.stop)  # a time limit from outside loses nothing
        started = time.monotonic()
        self.warm()
        warmed = time.monotonic()
        before, halfway, self.warmed = self.state(), None, compiled_kernels()
        flat = []
        for i in range(self.options.batches):
            if time.monotonic() - warmed > self.options.seconds:
                break
            kind = self.rng.choice(KINDS)
            kind = kind if self.recorded or kind != "captured" else "eager"
            self.one(kind, check=i % CHECK_EVERY == 0)
            self.done[kind] += 1
            if i % max(1, self.options.batches // 40) == 0:
                flat.append(self.state())
            if halfway is None and (2 * i >= self.options.batches):
                halfway = self.state()
        self.sync()
        after = self.state()
        self.judge(before, halfway or before, after, flat)
        return self.summary(before, halfway or before, after, flat, warmed - started, time.monotonic() - warmed)

    def state(self):
        from torch._dynamo.utils import counters

        state = {"graphs": counters["stats"]["unique_graphs"], "kernels": len(compiled_kernels())}
        state |= {"plans": sum(map(len, launch._plans.values())), "host_mb": host_mb()}
        if self.cuda:
            state["allocated_mb"] = torch.cuda.memory_allocated() / 1e6
            state["reserved_mb"] = torch.cuda.memory_reserved() / 1e6
        return state

    def judge(self, before, halfway, after, flat):
        """Everything that must not have changed since the warm-up."""
        late = sorted(compiled_kernels() - self.warmed)
        self.failures += [f"compiled after the warm-up: {kernel}" for kernel in late]
        if after["graphs"] != before["graphs"]:
            self.failures.append(f"{after['graphs'] - before['graphs']} graphs compiled after the warm-up")
        if after["plans"] > 2 * launch.MOST_PLANS:
            self.failures.append(f"{after['plans']} kinds of calls are remembered")
        if after["host_mb"] > halfway["host_mb"] + HOST_MB:
            self.failures.append(f"the process grew by {after['host_mb'] - halfway['host_mb']:.0f} MB")
        if not self.cuda:
            return
        allocated = [state["allocated_mb"] for state in (*flat[len(flat) // 4 :], after)]
        if max(allocated) - min(allocated) > FLAT_MB:
            self.failures.append(f"tensors alive between batches: {min(allocated):.0f} to {max(allocated):.0f} MB")
        if after["reserved_mb"] > GROWTH * halfway["reserved_mb"]:
            self.failures.append(f"reserved {halfway['reserved_mb']:.0f}, then {after['reserved_mb']:.0f} MB")

    def summary(self, before, halfway, after, flat, warm_s, run_s):
        recorded = {
            name: {"buckets": len(run.sizes), "used": len(self.buckets[name])} if run.waits else {"buckets": 0}
            for name, (_, run) in self.recorded.items()
        }
        return {
            "ok": not self.failures,
            "failures": self.failures[:20],
            "batches": dict(self.done) | {"all": sum(self.done.values()), "asked": self.options.batches},
            "seconds": {"warm_up": round(warm_s, 1), "run": round(run_s, 1)},
            "checks": {"compared": self.checks, "worst_share_of_allowed": round(self.worst, 4)},
            "compiled": {"kernels": before["kernels"], "kernels_after_warm_up": after["kernels"] - before["kernels"],
                         "graphs": before["graphs"], "graphs_after_warm_up": after["graphs"] - before["graphs"]},
            "buckets_missed": self.missed,
            "recorded": recorded,
            "memory": {"before": before, "halfway": halfway, "after": after},
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
        }  # fmt: skip


def network(name):
    if name == "small":  # six narrow blocks on 50 tokens: for trying the script
        from pruner_cases import small_vit

        return small_vit()
    return ragged.load_deit(name, weights="random", seed=0)


def host_mb():
    """Memory of this process that is in RAM."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 1e6
    except OSError:  # not Linux
        return 0.0


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=480, help="stop then, warm-up not counted")
    parser.add_argument("--model", default="deit_tiny", help="deit_tiny, ..., or small")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto", help="of the models that are not recorded")
    parser.add_argument("--images", type=int, default=MOST, help="images in the largest batch")
    parser.add_argument("--captured", type=int, default=9, help="how many recorded pipelines")
    parser.add_argument("--compile-backend", default="eager", help="what torch.compile hands its graphs to")
    parser.add_argument("--seed", type=int, default=0)
    with torch.no_grad():
        return Soak(parser.parse_args(arguments)).run()


if __name__ == "__main__":
    result = main()
    print(json.dumps(result, indent=1))
    sys.exit(not result["ok"])
