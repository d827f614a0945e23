"""The paper beside recorded rows: the right counterpart is found, and a claim's ratios follow the rows."""

import math

import figure_frames as frames
import pytest

from ragged import data
from ragged.bench.claims import ahead, all_claims, call_claims
from ragged.bench.paper import KERNEL, LOOK_UP, Rows, beside, said


def invented():
    """Rows in which every ratio is easy to check: FA2 costs 60 µs, the kernel 30 + tokens / 10, wall = host."""
    records = []
    for batch in (1, 4, 16, 32, 64):
        for tokens in ("39", "99", "197"):
            n = int(tokens)
            times = {"flash_attn": 60.0, KERNEL: 30.0 + n / 10, "paper_padded": 3000.0, "sdpa_padded:attention": 45.0,
                     "paper_nested": 6000.0, "nested": 600.0, "torch_varlen": 70.0}  # fmt: skip
            for backend, value in times.items():
                for mode, clock, part in (("eager", "wall_us", 1), ("eager", "event_us", 1), ("eager", "host_us", 0.8),
                                          ("eager", "gpu_us", 0.2), ("graph", "wall_us", 0.5)):  # fmt: skip
                    records.append(dict(suite="attention", backend=backend, batch=float(batch), tokens=tokens,
                                        mode=mode, metric=clock, value=part * value))  # fmt: skip
        for model, factor in (("deit_tiny", 4), ("deit_small", 2), ("deit_base", 1)):
            for backend, value in (("unpruned", 1000.0), ("paper_triton", 1300.0), ("paper_padded", 600.0),
                                   ("flash_attn", 1250.0), ("sdpa_padded", 1350.0)):  # fmt: skip
                for mode in ("eager", "compile+graph"):
                    records.append(dict(suite="model", model=model, backend=backend, batch=float(batch), mode=mode,
                                        tokens="197" if backend == "unpruned" else "99", metric="images_per_s",
                                        value=factor * value))  # fmt: skip
    return Rows(frames.rows(records))


@pytest.fixture(scope="module")
def record():
    return invented()


def row(table, **wanted):
    frame = data.paper(table)
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return next(frame.itertuples())


def test_every_table_is_looked_up_or_a_protocol():
    assert {t.partition("_")[2] for t in data.paper_tables()} == {*LOOK_UP, "protocol"}


@pytest.mark.parametrize(
    "table, which, expected",
    [
        ("v1_attention_call", dict(backend="paper_triton", batch=32, tokens=197), 0.0497),
        ("v2_attention_call", dict(backend="flash_attn", batch=64, tokens=40), 0.060),  # 39 stands for 40
        ("v1_dispatch_floor", dict(backend="paper_triton"), 33.9),
        ("v1_dispatch_floor", dict(metric="slowdown"), 100.0),
        ("v2_dispatch_floor", dict(metric="speedup"), 60 / 33.9),
        ("v1_overhead_share", dict(backend="paper_triton", tokens=197), 100 * 33.9 / 49.7),
        ("v1_end_to_end_speedup", dict(baseline="paper_padded", batch=512), 1300 / 600),  # the nearest batch
        ("v2_end_to_end_throughput", dict(backend="flash_attn", batch=64), 1250),
        ("v1_peak_throughput", dict(backend="dense", model="deit_tiny"), 4000),
    ],
)
def test_the_counterpart_of_a_row(record, table, which, expected):
    assert LOOK_UP[table.partition("_")[2]](record, row(table, **which)) == pytest.approx(expected)


def test_what_is_not_recorded_is_nan(record):
    nothing = Rows(frames.rows([dict(suite="x", metric="y", value=1.0)]))
    for table in data.paper_tables():
        found = beside(table, {"here": record, "nothing": nothing})
        assert len(found) == len(data.paper(table)) and found["nothing"].isna().all(), table
    assert math.isnan(LOOK_UP["high_resolution_speedup"](record, row("v2_high_resolution_speedup")))


def test_a_claimed_ratio_is_the_paper_s():
    assert said("v1_dispatch_floor", "dispatch_floor_us", "paper_triton", backend="flash_attn") == 62 / 40
    assert said("v2_speedup_over_unpruned", "speedup", pruned=0.9) == 2.87


def test_the_ratios_of_a_claim(record):
    found = {c.claim: c for c in call_claims()}
    floor = found["floor: FA2 / kernel, v1"]
    assert floor.paper_setup(record) == pytest.approx(60 / 33.9) == floor.fair(record)
    padded = found["padded / kernel call, 80 % pruned"]
    assert padded.paper_setup(record) == pytest.approx(3000 / 33.9) and padded.fair(record) == pytest.approx(45 / 33.9)
    assert ahead("paper_triton", "paper_padded", 512)(record) == pytest.approx(1300 / 600)
    assert ahead("paper_triton", "sdpa_padded", 32, "compile+graph")(record) == pytest.approx(1300 / 1350)


def test_all_claims_answer_with_numbers(record):
    claims = all_claims()
    assert len({c.claim for c in claims}) == len(claims) > 30
    for c in claims:
        assert c.claimed > 0 and c.kind in ("gain", "equal", "bound", "least")
        for ratio in (c.paper_setup(record), c.fair(record)):
            assert math.isnan(ratio) or ratio > 0, c.claim
    peaks = {c.claim: c.fair(record) for c in claims if c.claim.startswith("peak over unpruned")}
    assert list(peaks.values()) == pytest.approx([1.3] * 3)


def test_the_best_of_small_batches_is_no_peak(record):
    assert record.peak("paper_triton") > 0
    assert math.isnan(Rows(record.rows[record.rows["batch"] < 64]).peak("paper_triton"))


def test_the_recording_answers_the_claims_on_calls():
    ours = Rows(data.results(gpu="NVIDIA H200"))
    assert all(c.fair(ours) > 0 for c in call_claims())


def test_what_stands_in_is_said_in_the_case(record):
    cases = beside("v1_end_to_end_speedup", {"here": record})["case"]
    assert any("batch 512 (here 64)" in case for case in cases) and any("batch 4," in case for case in cases)
    assert all("batch 8 (here 16)" in case for case in beside("v2_stages", {"here": record})["case"])
    assert any("40 tokens (here 39)" in case for case in beside("v2_attention_call", {"here": record})["case"])
