"""The kernels that lesson 02 has its students write, with the solution's functions: compiled, interpreted, and run on a
GPU before and after a check, which interprets. Needs neither plotly nor a notebook's kernel."""

import linecache

import notebook_files
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import ragged
from ragged import launch
from ragged.course import exercises
from ragged.kernels.attention import number


def defined(source, known, name):
    """Run a cell among `known`, so that Triton can read it."""
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    exec(compile(source, name, "exec"), known)


def solved_kernels():
    """The names that the lesson's kernel and the solution's functions define, as in a notebook."""
    lesson, solution = (notebook_files.read(folder[2]) for folder in (notebook_files.LESSONS, notebook_files.SOLUTIONS))
    known = {"__name__": "__main__", "triton": triton, "tl": tl, "number": number}
    cells = [cell for _, cell in sorted(notebook_files.tagged(solution, "exercise").items())]
    cells += [cell for cell in notebook_files.code(lesson) if "def my_kernel(" in cell["source"]]
    for cell in (cell for cell in cells if "@triton.jit" in cell["source"]):
        defined(cell["source"], known, f"lesson 02 {cell['id']}")
    return known


@pytest.mark.skipif(launch.INTERPRET, reason="under TRITON_INTERPRET=1 nothing is compiled")
@pytest.mark.parametrize("name", ["my_kernel", "kernel_lse"])
def test_the_lesson_s_kernels_compile_for_a_gpu(name):
    """With the solution's functions, as a student on a GPU runs them; the checks themselves interpret."""
    kernel = solved_kernels()[name]
    types = {"Lse": "*fp32", "Cu": "*i32", "scale_log2": "fp32", "ROWS": "i32"}
    types |= dict.fromkeys(("Q", "K", "V", "Out"), "*fp16")
    signature = {parameter.name: types.get(parameter.name, "constexpr") for parameter in kernel.params}
    constants = {(kernel.arg_names.index(name),): value for name, value in (("HEADS", 2), ("D", 64), ("TILE", 64))}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert "wgmma" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"]


def right_on(device, dtype, dim, known):
    """Both kernels on a ragged batch, against float64; tiles of 16 and of 64 rows."""
    lengths, heads = [65, 1, 0, 40, 197], 2
    total, longest, cu = sum(lengths), max(lengths), torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v = torch.randn(3, total, heads, dim, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    want, want_lse = ragged.varlen_attention_ref(q, k, v, cu, cu, longest, longest, return_lse=True)
    for tile in (16, 64):
        out, out_lse, lse = torch.empty_like(q), torch.empty_like(q), torch.empty(heads, total, device=device)
        options = {"HEADS": heads, "D": dim, "TILE": tile}
        scale = dim**-0.5 * launch.LOG2_E
        known["my_kernel"][len(lengths), heads](q, k, v, out, cu, scale, **options)
        grid = len(lengths), heads, -(-longest // tile)
        known["kernel_lse"][grid](q, k, v, out_lse, lse, cu, scale, total, **options)
        for got in (out, out_lse):
            torch.testing.assert_close(got.cpu().double(), want.cpu().double(), rtol=0, atol=4e-3)
        torch.testing.assert_close(lse.cpu().double(), want_lse.cpu().double(), rtol=1e-4, atol=2e-3)


@pytest.mark.gpu
def test_the_lesson_s_kernels_run_compiled_before_and_after_a_check():
    """A check interprets, in a session that compiles: what is compiled afterwards must not notice."""
    known = solved_kernels()
    right_on("cuda", torch.float16, 64, known)
    for which, name in ((2, "tile_at"), (3, "row_mask"), (4, "mask_scores"), (5, "fold"), (7, "kernel_lse")):
        exercise = exercises.find(f"02/{which}")
        for words, (options,) in exercise.cases.items():
            assert exercise.judge(exercise.run(known[name], options), options) is None, (name, words)
    right_on("cuda", torch.float16, 32, known)  # other constants: compiled again
    right_on("cuda", torch.float16, 64, solved_kernels())


def test_the_lesson_s_kernel_is_right_interpreted():
    from ragged.course import lab, touched

    run, kernel = lab.batch((5, 17, 0, 40)), solved_kernels()["my_kernel"]
    tensors = run.q, run.k, run.v, run.out, run.cu
    touched.trace(kernel, (4, run.heads), *tensors, run.scale_log2, run.heads, run.dim, run.tile)
    torch.testing.assert_close(run.out.double(), run.want, rtol=0, atol=1e-5)
