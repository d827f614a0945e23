"""All figures in one place: a data frame of recorded rows, an image or a list of lengths goes in, a plotly figure out.

The frames have the columns of `ragged.data.RESULT_COLUMNS`, as `ragged.data.results(...)` reads them. Every function
says which rows it needs, names what is missing, refuses rows that would be drawn over each other, and puts the device
and the date into the subtitle. Times are medians in µs; bars of uncertainty span the 20 % and 80 % quantiles. A backend
has the same colour everywhere (`LOOKS`).
"""

from .call import call_anatomy, host_against_gpu, kernel_grid, padded_waste, roofline
from .kernel import error_budget, program_schedule, softmax_steps, tile_cover, tile_waste, touched_rows
from .launch import (
    capacity_steps,
    clock_hypotheses,
    floor_and_slope,
    forward_clocks,
    host_or_gpu,
    launch_paths,
    timeline,
    two_clocks,
)
from .machine import machine
from .mixed import mixed_sizes
from .model import forecast, resolution_speedup, sparsity_speedup, speedup_by_batch, throughput_by_batch
from .outside import decoding_ceiling, scaling
from .paper import best_choice, claims, expectation, ladder, measured_lines, paper_beside
from .pictures import batch_lengths, image_patches, kept_patches, pipeline
from .pruning import (
    length_strips,
    pack_picture,
    packing_ways,
    sampling_staircase,
    score_maps,
    score_profiles,
    token_schedules,
)
from .quality import PRUNER_LOOKS, accuracy, count_distribution, counts_against_size, logit_differences, rounding
from .rivals import fidelity, seeds
from .speculation import (
    acceptance_by_domain,
    acceptance_by_entropy,
    by_depth_and_rank,
    tree_of_guesses,
    verification,
    who_sees_whom,
)
from .stages import stages
from .style import LOOKS, alt_text
from .training import backward_speed, gradient_map, recovery, training_step

__all__ = [
    "LOOKS", "PRUNER_LOOKS", "acceptance_by_domain", "acceptance_by_entropy", "accuracy", "alt_text", "backward_speed",
    "batch_lengths", "best_choice", "by_depth_and_rank", "call_anatomy", "capacity_steps", "claims",
    "clock_hypotheses", "count_distribution", "counts_against_size", "decoding_ceiling", "error_budget", "expectation",
    "fidelity", "floor_and_slope", "forecast", "forward_clocks", "gradient_map", "host_against_gpu", "host_or_gpu",
    "image_patches", "kept_patches", "kernel_grid", "ladder", "launch_paths", "length_strips", "logit_differences",
    "machine", "measured_lines", "mixed_sizes", "pack_picture", "packing_ways", "padded_waste", "paper_beside",
    "pipeline", "program_schedule", "recovery", "resolution_speedup", "roofline", "rounding", "sampling_staircase",
    "scaling", "score_maps", "score_profiles", "seeds", "softmax_steps", "sparsity_speedup", "speedup_by_batch",
    "stages", "throughput_by_batch", "tile_cover", "tile_waste", "timeline", "token_schedules", "touched_rows",
    "training_step", "tree_of_guesses", "two_clocks", "verification", "who_sees_whom",
]  # fmt: skip
