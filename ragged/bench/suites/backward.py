"""Suite `backward`: one layer's attention with its gradients, by every provider that has some.

The shapes and the providers are those of suite `attention`, each through its own public function and its own autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from ...attention import varlen_attention_ref
from ...backends import BACKENDS
from ...gradients import split_projection
from ...rows import offsets
from ..rounds import CALL_CLOCKS, Subject
from ..runner import Candidate, Case, Options, Skip, Wrong
from ..timing import as_graph, host_us, in_turn, stats, wait
from .attention import HEADDIM, HEADS, Inputs, dense, kernel_context, shapes, varlen

TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 2e-4}  # of each gradient, ‖dx - ref‖ / ‖ref‖
CALLS = 10  # that are enqueued at once
VARLEN = ("triton", "flash_attn", "torch_varlen", "efficient_varlen", "sdpa_padded")


class GradientInputs(Inputs):
    """`Inputs`, and a random gradient of the output for each set."""

    def __init__(self, tokens: str, batch: int, dtype: torch.dtype, device: str):
        super().__init__(tokens, batch, dtype, device)
        generator = torch.Generator(device).manual_seed(1)
        like = self.sets[0][0]
        self.douts = [torch.randn(like.shape, device=device, dtype=dtype, generator=generator) for _ in self.sets]

    @functools.cached_property
    def true_gradients(self) -> tuple[Tensor, ...]:
        *qkv, dout = (t[self.judged].detach() for t in (*self.sets[0], self.douts[0]))
        cu = offsets(torch.tensor([self.lengths[i] for i in self.judges], device=dout.device))
        with torch.enable_grad():
            leaves = [t.requires_grad_() for t in qkv]
            out = varlen_attention_ref(*leaves, cu, cu, self.longest, self.longest)
            return torch.autograd.grad(out, leaves, dout.to(out))

    def check_gradients(self, found: Sequence[Tensor]) -> None:
        """Raise `Wrong` where one of dq, dk, dv is another."""
        for name, got, want in zip("qkv", found, self.true_gradients, strict=True):
            judged, allowed = got.reshape(self.total, HEADS, HEADDIM)[self.judged], TOLERANCE[got.dtype]
            error = ((judged.double() - want.double()).norm() / want.double().norm()).item()
            if not error < allowed:
                raise Wrong(f"d{name}: relative error {error:.2g}, allowed {allowed:.0e}")


def efficient(x: Inputs, qkv: tuple) -> Callable[[], Tensor]:
    """PyTorch's operator has gradients only with the log-sum-exp."""
    q, k, v = qkv
    if why := BACKENDS["efficient_varlen"].why_not(q.device, q.dtype, HEADDIM):
        raise Skip(why)
    run = BACKENDS["efficient_varlen"].run
    return lambda: run(q, k, v, x.cu, x.cu, x.longest, x.longest, HEADDIM**-0.5, True)[0]


class Differentiated:
    """A provider on one set of inputs. split: how q, k and v come from a projection whose gradient is wanted, or None
    for those of q, k and v themselves."""

    def __init__(self, make: Callable, x: GradientInputs, index: int, split: Callable | None):
        q, k, v = (t.detach() for t in x.sets[index])
        if split is None:
            self.leaves = [t.requires_grad_() for t in (q, k, v)]
            self.forward = make(x, tuple(self.leaves))
        else:
            self.leaves = [torch.stack((q, k, v), 1).requires_grad_()]
            self.forward = lambda: make(x, split(self.leaves[0]))()
        self.dout = x.douts[index]

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients."""
        return self.back(self.forward(), False)

    def back(self, out: Tensor, keep: bool) -> tuple[Tensor, ...]:
        """Backward from an output; keep: its graph serves again."""
        return torch.autograd.grad(out, self.leaves, self.dout.reshape(out.shape), retain_graph=keep)


@contextmanager
def recording(around: Callable):
    """Gradients are recorded, in the context of a provider."""
    with ExitStack() as stack:
        stack.enter_context(around())
        stack.enter_context(torch.enable_grad())
        yield


def backward_subject(inputs: Callable[[], GradientInputs], make: Callable, mode: str, around: Callable,
                     split: Callable | None) -> Subject:  # fmt: skip
    """The checked call of one provider: eager, as a CUDA graph, or its backward pass alone."""
    x, around = inputs(), functools.partial(recording, around)
    with around():
        ways = [Differentiated(make, x, i, split) for i in range(len(x.sets))]
        found = ways[0].both()
        x.check_gradients(found if split is None else found[0].unbind(1))
        calls = [way.both for way in ways]
        if mode == "backward":
            calls = [functools.partial(way.back, way.forward(), True) for way in ways]
        for call in calls:
            call()
        if not x.cu.is_cuda:
            if mode == "graph":
                raise Skip("CUDA graphs need a CUDA device")
            return Subject(calls, around=around, clocks=CALL_CLOCKS)
        if mode == "graph":
            return Subject([as_graph([call], 1) for call in calls], as_graph(calls), 20, clocks=CALL_CLOCKS)
        wait()
        host = stats(host_us(calls, 5)).median
        return Subject(calls, lambda: [call() for call in in_turn(calls, CALLS)], CALLS, around, CALL_CLOCKS,
                       sleep_us=300 + 2 * CALLS * host)  # fmt: skip


def backward(options: Options) -> list[Case]:
    """Forward and backward in one call (mode eager; graph: that call alone in a CUDA graph), and the backward pass
    alone (mode backward). gpu_us is taken of ten calls that were enqueued while the GPU slept; of a graph, of 20 calls
    in one; where a provider waits for the GPU, its waits count. Only ours is captured: what others do in autograd may
    break a capture, and with it the process. q, k and v want a gradient each; with `:projection` behind the provider it
    is their projection that wants one, made by `split_projection` for ours and by `unbind` for the other."""
    found = []
    for batch, tokens, dtype in shapes(options):
        columns = {"suite": "backward", "model": "deit_base", "pruner": "none", "batch": batch, "tokens": tokens,
                   "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
        inputs = functools.cache(functools.partial(GradientInputs, tokens, batch, dtype, options.device))
        found.append(Case(columns, _providers(inputs, tokens)))
    return found


def _providers(inputs: Callable[[], GradientInputs], tokens: str) -> list[Candidate]:
    makes: dict[str, tuple] = {name: (functools.partial(varlen, name), nullcontext, None) for name in VARLEN}
    makes["efficient_varlen"] = (efficient, nullcontext, None)
    if tokens.isdigit():  # equal counts
        makes |= {name: (dense, kernel_context(name), None) for name in ("dense_flash", "dense_cudnn")}
    for name in ("triton", "torch_varlen"):
        split = split_projection if name == "triton" else lambda qkv: qkv.unbind(1)
        makes[f"{name}:projection"] = (functools.partial(varlen, name), nullcontext, split)
    found = []
    for name, (make, around, split) in makes.items():
        modes = ["eager"] if split else ["eager", "backward"]
        for mode in modes + ["graph"] * name.startswith("triton"):
            build = functools.partial(backward_subject, inputs, make, mode, around, split)
            found.append(Candidate({"backend": name, "mode": mode}, build, CALL_CLOCKS))
    return found
