"""Suite `dispatch`: the anatomy of one call at batch 32 and 39 tokens. Every layer is called directly and timed alone.

A row's backend is `<provider>` for the public Python function and `<provider>:<layer>` for what lies below it:

    triton       compiled (the public function with `kernels.front` built: C++ in the place of quick),
                 custom_op (what torch.compile calls), quick (arguments of a known kind), guard (how it is told),
                 checked (other arguments, after their checks), argument_packing, output_allocation,
                 cached_launch (launch.start), direct_launch (the launcher it keeps), compiled_run (Triton's
                 CompiledKernel.run), cuLaunchKernel (the driver through ctypes), cuda_bindings (the driver through the
                 package cuda-bindings);
                 beside them jit_launch, Triton's own kernel[grid](...), which is not taken
    flash_attn   custom_op (torch.ops.flash_attn), binding (the C++ function), aten (the same kernel inside PyTorch)
    torch_varlen custom_op (torch.ops.torch_attn), aten
    paper_triton contiguous_copies, output_allocation, jit_launch
    torch        empty, empty_like, new_empty: ways to allocate the output; nothing: an empty Python function

Layers have host_us only. The public functions also have the other clocks, and a profiler trace each.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
from collections.abc import Callable
from pathlib import Path

import torch

from ... import launch
from ...attention import varlen_attention
from ..rounds import CALL_CLOCKS, Subject
from ..runner import Candidate, Case, Options, Skip
from ..timing import wait
from .attention import HEADDIM, HEADS, Inputs, attention_subject, varlen

BATCH, TOKENS = 32, "39"
PUBLIC = ("triton", "flash_attn", "torch_varlen", "paper_triton")
SCALE = HEADDIM**-0.5


class Started:
    """Our kernel's arguments as `launch.start` gets them, and the compiled kernel."""

    def __init__(self, x: Inputs):
        from ...kernels import attention as kernels

        q, k, v = x.sets[0]
        arguments = (q, k, v, x.cu, x.cu, x.longest, x.longest, SCALE, False)
        self.attend = functools.partial(kernels.attend, *arguments)
        self.arguments = kernels.prepare(*arguments)
        kernel, _, self.grid, self.tensors, self.numbers, constants, options = self.arguments
        self.jit = lambda: kernel[self.grid](*self.tensors, *self.numbers, **constants, **options)
        self.compiled, self.constants = self.jit(), tuple(constants.values())
        self.pointers = [t.data_ptr() for t in self.tensors]
        self.stream = torch.cuda.current_stream().cuda_stream

    def pack(self) -> int:
        """The pointers of all tensors, and whether they are aligned."""
        return functools.reduce(operator.or_, [t.data_ptr() for t in self.tensors]) & 15

    def direct_launch(self) -> Callable[[], object]:
        return functools.partial(
            launch.direct(self.compiled, self.constants), *self.grid, self.stream, *self.pointers, *self.numbers
        )

    def compiled_run(self) -> Callable[[], object]:
        c, arguments = self.compiled, (*self.pointers, *self.numbers, *self.constants)
        front = (*self.grid, 1, self.stream, c.function, c.packed_metadata, None, None, None)
        return functools.partial(c.run, *front, *arguments)

    def driver_launch(self) -> Callable[[], object]:
        """cuLaunchKernel through ctypes, its argument array made once."""
        values = [ctypes.c_uint64(p) for p in self.pointers]
        values += [ctypes.c_float(n) if isinstance(n, float) else ctypes.c_int32(n) for n in self.numbers]
        values += [ctypes.c_uint64(0)] * 2  # Triton's two scratch buffers, unused
        array = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        run, meta = ctypes.CDLL("libcuda.so.1").cuLaunchKernel, self.compiled.metadata
        shape = (*self.grid, 1, meta.num_warps * 32, 1, 1, meta.shared)
        function, stream = ctypes.c_void_p(self.compiled.function), ctypes.c_void_p(self.stream)

        def call() -> None:
            if run(function, *shape, stream, array, None):
                raise RuntimeError("cuLaunchKernel failed")

        call.alive = values  # the array only points into them
        return call

    def bindings_launch(self) -> Callable[[], object]:
        """cuLaunchKernel through the package cuda-bindings, which packs the arguments in every call."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise Skip(f"cuda-bindings: {error}") from None
        values = (*self.pointers, *self.numbers, 0, 0)
        kinds = tuple(ctypes.c_float if isinstance(n, float) else ctypes.c_int32 for n in self.numbers)
        types = (ctypes.c_void_p,) * len(self.pointers) + kinds + (ctypes.c_void_p,) * 2
        meta = self.compiled.metadata
        shape = (*self.grid, 1, meta.num_warps * 32, 1, 1, meta.shared)
        function, stream = driver.CUfunction(self.compiled.function), driver.CUstream(self.stream)

        def call() -> None:
            if driver.cuLaunchKernel(function, *shape, stream, (values, types), 0)[0]:
                raise RuntimeError("cuLaunchKernel failed")

        return call


def triton_layers(x: Inputs) -> dict[str, Callable[[], Callable]]:
    q, k, v = x.sets[0]
    places, started = (x.cu, x.cu, x.longest, x.longest), functools.cache(lambda: Started(x))

    def quick() -> Callable:
        varlen_attention(q, k, v, *places, backend="triton")
        call = functools.partial(launch.quick, q, k, v, *places, SCALE)
        if call() is None:
            raise Skip("this kind of call takes the long way")
        return call

    def guard() -> Callable:
        quick()
        same = launch.plan_of(q, k, v, x.cu, x.cu).same
        return lambda: same(q, k, v, x.cu)

    return {
        "custom_op": lambda: lambda: torch.ops.ragged.varlen_attention(q, k, v, *places, SCALE, False, "triton"),
        "quick": quick,
        "checked": lambda: started().attend,
        "guard": guard,
        "argument_packing": lambda: started().pack,
        "output_allocation": lambda: lambda: launch.new_output(q, *q.shape),
        "cached_launch": lambda: functools.partial(launch.start, *started().arguments),
        "direct_launch": lambda: started().direct_launch(),
        "compiled_run": lambda: started().compiled_run(),
        "cuLaunchKernel": lambda: started().driver_launch(),
        "cuda_bindings": lambda: started().bindings_launch(),
        "jit_launch": lambda: started().jit,
    }


def paper_layers(x: Inputs) -> dict[str, Callable[[], Callable]]:
    q, k, v = x.sets[0]

    def jit() -> Callable:
        from ...kernels.attention import paper_kernel

        args = [t.contiguous() for t in (q, k, v)]
        out = torch.empty_like(args[0])
        constants = {"HEADS": HEADS, "D": HEADDIM, "BLOCK_D": HEADDIM, "M": 64, "N": 64, "PRECISION": "tf32"}
        grid, scale = (x.batch, HEADS), SCALE * launch.LOG2_E
        return lambda: paper_kernel[grid](*args, out, x.cu, scale, **constants)

    return {
        "contiguous_copies": lambda: lambda: (q.contiguous(), k.contiguous(), v.contiguous()),
        "output_allocation": lambda: lambda: torch.empty_like(q),
        "jit_launch": jit,
    }


def aten(x: Inputs) -> Callable:
    q, k, v = x.sets[0]
    run, places = torch.ops.aten._flash_attention_forward, (x.cu, x.cu, x.longest, x.longest)
    return lambda: run(q, k, v, *places, 0.0, False, False, scale=SCALE)


def library_layers(x: Inputs) -> dict[str, dict[str, Callable[[], Callable]]]:
    q, k, v = x.sets[0]
    places = (x.cu, x.cu, x.longest, x.longest)

    def flash_op() -> Callable:
        import flash_attn  # noqa: F401  registers the operator

        run = torch.ops.flash_attn._flash_attn_varlen_forward
        return lambda: run(q, k, v, *places, 0.0, SCALE, False)

    def flash_binding() -> Callable:
        import flash_attn_2_cuda

        run, none = flash_attn_2_cuda.varlen_fwd, (None,) * 4
        rest = (0.0, SCALE, False, False, -1, -1, 0.0, False, None)
        return lambda: run(q, k, v, None, x.cu, x.cu, *none, x.longest, x.longest, *rest)

    def torch_op() -> Callable:
        import torch.nn.attention.varlen  # noqa: F401  registers the operator

        run = torch.ops.torch_attn._varlen_attn
        return lambda: run(q, k, v, *places, False, SCALE, [-1, -1])

    shape, kind = tuple(q.shape), {"device": q.device, "dtype": q.dtype}
    return {
        "flash_attn": {"custom_op": flash_op, "binding": flash_binding, "aten": lambda: aten(x)},
        "torch_varlen": {"custom_op": torch_op, "aten": lambda: aten(x)},
        "torch": {
            "empty": lambda: lambda: torch.empty(shape, **kind), "empty_like": lambda: lambda: torch.empty_like(q),
            "new_empty": lambda: lambda: q.new_empty(shape), "nothing": lambda: lambda: None,
        },
    }  # fmt: skip


def compiled_call(x: Callable[[], Inputs], options: Options) -> Subject:
    """The public function on its compiled way; all others keep Python's."""
    if options.device != "cuda":
        raise Skip("the compiled way starts kernels on CUDA only")
    from ...kernels import front

    inputs = x()
    call = varlen("triton", inputs, inputs.sets[0])
    try:
        front.build()
    except RuntimeError as error:
        raise Skip(str(error)) from error
    built, launch.front = launch.front, None

    @contextlib.contextmanager
    def around():
        launch.front = built
        try:
            with torch.no_grad():
                yield
        finally:
            launch.front = None

    with around():
        launch.forget()
        call(), call()  # the long way, then Python's, which tells C++
        q, k, v = inputs.sets[0]
        if built.attend(q, k, v, inputs.cu, inputs.cu, inputs.longest, inputs.longest, None, "triton") is None:
            raise Skip("this kind of call takes the long way")
    wait()
    return Subject([call], around=around, clocks=("host_us",))


def _layer(x: Callable[[], Inputs], provider: str, layer: str, options: Options) -> Subject:
    if options.device != "cuda":
        raise Skip("the layers below the public function exist on CUDA only")
    if (provider, layer) == ("triton", "compiled"):
        return compiled_call(x, options)
    inputs = x()
    layers = {"triton": triton_layers(inputs), "paper_triton": paper_layers(inputs), **library_layers(inputs)}
    call = layers[provider][layer]()
    with torch.no_grad():
        call()
    wait()
    return Subject([call], around=torch.no_grad, clocks=("host_us",))


LAYERS = {
    "triton": ("compiled", "custom_op", "quick", "guard", "checked", "argument_packing", "output_allocation",
               "cached_launch", "direct_launch", "compiled_run", "cuLaunchKernel", "cuda_bindings", "jit_launch"),
    "flash_attn": ("custom_op", "binding", "aten"), "torch_varlen": ("custom_op", "aten"),
    "paper_triton": ("contiguous_copies", "output_allocation", "jit_launch"),
    "torch": ("empty", "empty_like", "new_empty", "nothing"),
}  # fmt: skip


def dispatch(options: Options) -> list[Case]:
    """One case: all layers of all providers, and the public functions with every clock."""
    columns = {"suite": "dispatch", "model": "deit_base", "pruner": "none", "batch": BATCH, "tokens": TOKENS,
               "dtype": str(options.dtype).removeprefix("torch.")}  # fmt: skip
    x = functools.cache(functools.partial(Inputs, TOKENS, BATCH, options.dtype, options.device))
    candidates = []
    for name in PUBLIC:
        build = functools.partial(attention_subject, x, functools.partial(varlen, name), "eager")
        candidates.append(Candidate({"backend": name, "mode": "eager"}, build, CALL_CLOCKS))
    for provider, layers in LAYERS.items():
        for layer in layers:
            build = functools.partial(_layer, x, provider, layer, options)
            candidates.append(Candidate({"backend": f"{provider}:{layer}", "mode": "eager"}, build, ("host_us",)))
    return [Case(columns, candidates)]


def write_traces(folder: Path, options: Options) -> list[Path]:
    """A Chrome trace of five calls of every public function that runs here, as <backend>.json.gz, to open in Perfetto
    (ui.perfetto.dev)."""
    from torch.profiler import ProfilerActivity, profile

    x = Inputs(TOKENS, BATCH, options.dtype, options.device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    written = []
    for name in PUBLIC:
        try:
            call = varlen(name, x, x.sets[0])
        except Skip:
            continue
        for _ in range(10):
            call()
        wait()
        with profile(activities=activities) as profiler:
            for _ in range(5):
                with torch.profiler.record_function(f"{name}: one call"):
                    call()
            wait()
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{name}.json.gz")
        profiler.export_chrome_trace(str(written[-1]))
    return written
