"""What the GPU tests share: printing, waits of the host, kernels that were compiled, the eager twin of a graph."""

import re
import sys
import warnings
from contextlib import contextmanager

import torch

CONSTANT = re.compile(r"\('constexpr', (.*?)\)")


@contextmanager
def uncaptured(request):
    """What is printed in here reaches the terminal, whatever pytest captures otherwise."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        yield


@contextmanager
def waits():
    """Collects a warning for every operation that makes the host wait for the device."""
    seen = []
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield seen
        seen += [w for w in caught if "synchroniz" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode(before)


def compiled_kernels():
    """The kernels of the package that the JIT holds, each as its name, its arguments' types and its constants."""
    from triton.runtime import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("ragged.kernels")]
    functions = {fn for module in modules for fn in vars(module).values() if isinstance(fn, JITFunction)}
    keys = {(fn.__name__, str(key)) for fn in functions for cache in fn.device_caches.values() for key in cache[0]}
    return {name + " " + CONSTANT.sub(r"\1", key) for name, key in keys}


@torch.no_grad()
def eager(model, captured, images):
    """The same kernels as the graph's, on the same sizes, started one by one."""
    result = model.begin(images)
    while not (isinstance(result, torch.Tensor) or captured.waits):
        result = result.resume(images.shape[0] * result.width, result.width)
    if isinstance(result, torch.Tensor):
        return result
    rows = int(result.counts.max() if captured.padded else result.counts.sum())
    size = next(size for size in captured.sizes if size >= rows)
    return result.resume(*((images.shape[0] * size, size) if captured.padded else (size, result.width)))
