"""What the GPU tests share: counting the waits of the host and the kernels that were compiled."""

import sys
import warnings
from contextlib import contextmanager

import torch


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
    """How many kernels the JIT holds, over all kernels of the package."""
    from triton.runtime import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("ragged.kernel")]
    functions = {fn for module in modules for fn in vars(module).values() if isinstance(fn, JITFunction)}
    return sum(len(cache[0]) for fn in functions for cache in fn.device_caches.values())
