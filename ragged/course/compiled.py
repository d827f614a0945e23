"""What the compiler makes of kernels, wherever Triton is; of the one in Gluon, `python -m ragged.course.compiled 197`.

Compiling for a GPU needs none. It does need a process in which Triton is not interpreting, so lessons ask for `facts`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from .. import launch
from ..tiles import pipe_tiles

PROCESSORS = 132  # multiprocessors of an H100 or H200
HEADS = 6


def compiled(n: int, headdim: int = 64, programs: int = 3000, dtype: str = "fp16", want_lse: bool = False) -> object:
    """Triton's compiled kernel for compute capability 9.0, as a model's views of one projection would start it.

    n: tokens of an image.  headdim: numbers per head.  programs: heads times images.  dtype: "fp16" or "bf16".
    want_lse: with the log-sum-exp.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from ..kernels import hopper

    fn, strides = hopper.hopper_kernel, ((3 * HEADS * headdim, headdim, 1),) * 3
    tiles = pipe_tiles(n, headdim, programs, PROCESSORS)
    constants, options = hopper._constants(tiles, strides, HEADS, headdim, want_lse)
    kinds = dict.fromkeys(("Q", "K", "V", "Out"), f"*{dtype}") | {"Lse": "*fp32" if want_lse else f"*{dtype}"}
    kinds |= {"CuQ": "*i32", "CuK": "*i32", "scale_log2": "fp32", "total_q": "i32", "max_q": "i32", "max_k": "i32"}
    signature = {p.name: kinds.get(p.name, "constexpr") for p in fn.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    places = {(fn.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(fn, signature, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def row_mover(aligned: bool) -> object:
    """Triton's compiled kernel that moves kept rows, for compute capability 9.0.

    aligned: whether its pointers are said to be multiples of 16 bytes. RuntimeError where Triton is missing, or is
    interpreting.
    """
    if not launch.installed("triton") or launch.INTERPRET:
        raise RuntimeError("compiling needs Triton, and no TRITON_INTERPRET")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..kernels.rows import move_kernel as kernel

    others = {"Ids": "*i64", "OutIds": "*i64", "Index": "*i64", "Starts": "*i32", "Cu": "*i32"}
    constants = {"SUM": 0, "DIM": 64, "ROWS": 16, "BLOCK": 64, "BLOCKS": 1, "FUSED": 0, "NARROW": 32, "CHUNK": 64}
    arguments = [name for name in kernel.arg_names if name not in constants]
    kinds = {name: others.get(name, "*fp16" if name[0].isupper() else "i32") for name in arguments}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    pointers = [i for i, kind in enumerate(kinds.values()) if kind.startswith("*")]
    promise = {(i,): [["tt.divisibility", 16]] for i in pointers} if aligned else {}
    source = ASTSource(kernel, {**kinds, **dict.fromkeys(constants, "constexpr")}, places, promise)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


def look(n: int) -> dict:
    """Counts from the program that an H100 would run for images of n tokens, by name."""
    kernel, tiles = compiled(n), dict(pipe_tiles(n, 64, 3000, PROCESSORS).shape)
    ptx = kernel.asm["ptx"]
    pieces = " + ".join(str(tiles[name]) for name in ("A", "B", "TAIL") if tiles[name])
    return {
        "key tiles": pieces, "stages": tiles["STAGES"], "warps": kernel.metadata.num_warps,
        "KiB of tiles": kernel.metadata.shared / 1024, "16-byte copies": ptx.count("cp.async.cg"),
        "tensor-core products": ptx.count("wgmma.mma_async"), "barriers": ptx.count("mbarrier.init"),
    }  # fmt: skip


def facts(*tokens: int) -> list[dict] | str:
    """`look` at each of `tokens` in a process of its own, or a sentence that says why there is nothing to see."""
    if not launch.installed("triton.experimental.gluon.language.nvidia.hopper"):
        return "Triton with Gluon is not installed here."
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ragged.course.compiled", *map(str, tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"This Triton does not compile it: {done.stderr.strip().splitlines()[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Command line: `look` at each number of tokens, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m ragged.course.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("tokens", nargs="+", type=int, help="of every image")
    print(json.dumps([{"tokens": n} | look(n) for n in parser.parse_args(arguments).tokens]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
