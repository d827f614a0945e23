"""What the GPU tests share: printing, waits of the host, kernels that were compiled, the eager twin of a graph."""

import math
import re
import sys
import warnings
from contextlib import contextmanager

import torch

from ragged.graph.parts import to_the_end

CONSTANT = re.compile(r"\('constexpr', (.*?)\)")


@contextmanager
def uncaptured(request):
    """What is printed in here reaches the terminal, whatever pytest captures otherwise."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        yield


def print_table(request, title, lines):
    """A table under the dots of the tests."""
    with uncaptured(request):
        print(f"\n\n{title}")
        for line in lines:
            print(f"  {line}")


def share_line(item):
    """A line for a backend and dtype: the worst of its shares of the error budget, or why there are none."""
    (backend, dtype), cells = item
    if isinstance(cells, list):
        cells = f"worst {max(cells, default=math.nan):.2f} of 1 over {len(cells)} cases"
    return f"{backend:18}{dtype:6}{cells}"


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
    result, cuts = model.begin(images), []
    if isinstance(result, torch.Tensor) or not captured.waits:
        return to_the_end(result, None, cuts)
    return the_rest(captured.rest, result.ahead() if captured.rest.front.last else result)


@torch.no_grad()
def eager_list(captured, *given):
    """The same for what was captured for lists, of images or of packed tokens with their lengths."""
    size = captured.fill(*given)
    images = len(given[-1])
    if captured.rest is None:
        return captured.work(size, False)[:images]
    captured.work(size, True)
    return the_rest(captured.rest, captured._handed)[:images]


def the_rest(rest, pending):
    """What follows the first adaptive cut, with the capacity that the rows there need."""
    rows = int(pending.counts.max() if rest.padded else pending.counts.sum())
    size = rest.capacity_for(rows)
    cuts = rest.cuts[size]
    try:
        return rest.work(pending, size, None)
    finally:
        rest.cuts[size] = cuts  # the graph's own
