"""All figures in one place: a data frame of recorded rows, an image or a list of lengths goes in, a plotly figure out.

The frames have the columns of `ragged.data.RESULT_COLUMNS`: `ragged.data.results(...)`, or `paper_rows` of a table of
the paper. Every function says which rows it needs, names what is missing, refuses rows that would be drawn over each
other, and puts the device and the date into the subtitle. Times are medians in µs; bars of uncertainty span the 20 %
and 80 % quantiles. A backend has the same colour everywhere (`LOOKS`). Nothing here needs torch.
"""

from .plots_call import call_anatomy, dispatch_floor, host_against_gpu, kernel_grid, padded_waste, roofline
from .plots_model import memory, sparsity_speedup, throughput_by_batch
from .plots_pictures import batch_lengths, image_patches, kept_patches, pipeline
from .style import LOOKS, alt_text, paper_rows

__all__ = [
    "LOOKS", "alt_text", "batch_lengths", "call_anatomy", "dispatch_floor", "host_against_gpu", "image_patches",
    "kept_patches", "kernel_grid", "memory", "padded_waste", "paper_rows", "pipeline", "roofline", "sparsity_speedup",
    "throughput_by_batch",
]  # fmt: skip
