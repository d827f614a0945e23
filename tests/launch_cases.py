"""Stand-ins for what Triton compiles and for the driver that starts it, as far as `ragged.launch` looks at either."""

import struct
from collections import namedtuple
from types import SimpleNamespace

METADATA = {"num_warps": 4, "shared": 512, "num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0,
            "launch_pdl": False, "launch_cooperative_grid": False, "tensordesc_meta": None}  # fmt: skip
PTX_TYPES = {"*": ".u64 .ptr .global .align 1", "i32": ".u32", "i64": ".u64", "fp32": ".f32"}


def compiled(types, function=1, scratch=2, run=None, **metadata):
    """A kernel as Triton returns it, with parameters of these types ("*fp16", "i32", "fp32", "constexpr") and so many
    pointers to scratch memory behind them."""
    facts = METADATA | metadata
    kinds = [PTX_TYPES[kind[:1] if kind[:1] == "*" else kind] for kind in types if kind != "constexpr"]
    lines = ",\n".join(f"\t.param {kind} k_param_{i}" for i, kind in enumerate(kinds + [PTX_TYPES["*"]] * scratch))
    signature = {f"a{i}": kind for i, kind in enumerate(types)}
    return SimpleNamespace(
        function=function, run=run, packed_metadata=(1,), metadata=namedtuple("Metadata", facts)(**facts),
        src=SimpleNamespace(signature=signature), asm={"ptx": f".visible .entry k(\n{lines}\n)\n.reqntid 128\n{{ }}"},
    )  # fmt: skip


LETTERS = {"O": "<Q", "i": "<i", "l": "<q", "f": "<f"}


class Driver:
    """`launch.cu_launch_kernel`: packs the arguments as the C function does, notes what was started, and returns the
    numbers as the kernel would read them."""

    def __init__(self):
        self.log = []

    def __call__(self, function, x, y, z, warps, shared, kinds, arguments, stream):
        assert isinstance(arguments, tuple) and len(arguments) == len(kinds), (kinds, arguments)
        block = [struct.pack(LETTERS[kind], value) for kind, value in zip(kinds, arguments)]
        read = tuple(struct.unpack(LETTERS[kind], part)[0] for kind, part in zip(kinds, block))
        self.log.append(SimpleNamespace(function=function, grid=(x, y, z), warps=warps, shared=shared, stream=stream,
                                        read=read, sizes=[8 * len(part) for part in block]))  # fmt: skip
