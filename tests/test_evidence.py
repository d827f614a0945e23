"""Which rows are disturbed, and that tables and figures say so."""

import re

import figure_frames as frames
import pytest

from ragged import course, data
from ragged.bench.paper import Rows
from ragged.bench.report import table

SERIES = [("39", 32.0, 10.0), ("99", 32.0, 10.5), ("197", 32.0, 11.0), ("39", 64.0, 10.2)]


def recorded(*changes, metric="host_us", **columns):
    """Quiet host times of one backend, with the row of every (place, values) changed."""
    rows = [dict(suite="attention", backend="triton", mode="eager", tokens=tokens, batch=batch, metric=metric,
                 value=us, q20=0.95 * us, q80=1.05 * us) | columns for tokens, batch, us in SERIES]  # fmt: skip
    for at, change in changes:
        rows[at] |= change
    return frames.rows(rows)


@pytest.mark.parametrize(
    "rows, expected",
    [
        (recorded(), []),
        (recorded((1, dict(q80=10.5 * 1.4))), [1]),  # wide
        (recorded((1, dict(q20=9.0, q80=11.2))), []),
        (recorded((0, dict(value=14.0, q20=13.9, q80=14.1))), [0]),  # narrow, and above all larger problems
        (recorded((2, dict(value=100.0, q20=99.0, q80=101.0))), []),  # the largest may be as slow as it likes
        (recorded((0, dict(value=3.0, q20=3.0, q80=3.0))), []),  # less work that takes less
        (recorded((0, dict(value=14.0, q20=13.9, q80=14.1, mode="graph"))), []),  # no neighbour in its series
        (recorded((1, dict(q20=float("nan"), q80=float("nan")))), []),
        (recorded((1, dict(q80=99.0)), metric="flops_ratio"), []),  # nothing that a clock read
        (recorded((0, dict(tokens="U(20,197)", value=14.0, q20=13.9, q80=14.1))), []),
    ],
)
def test_a_row_is_disturbed_if_it_is_wide_or_out_of_line(rows, expected):
    found = data.disturbed(rows)
    assert found.dtype == bool and list(found.index) == list(rows.index)
    assert [at for at, bad in enumerate(found) if bad] == expected


def test_images_per_s_are_compared_as_times():
    rows = [dict(suite="model", backend="triton", mode="eager", tokens="99", batch=batch, metric="images_per_s",
                 value=value, q20=value, q80=value) for batch, value in ((1.0, 90.0), (4.0, 400.0), (16.0, 1600.0))]
    assert not data.disturbed(frames.rows(rows)).any()
    rows[1] |= dict(value=200.0, q20=200.0, q80=200.0)  # 20 ms, and four times the images take 10
    assert data.disturbed(frames.rows(rows)).tolist() == [False, True, False]


def test_a_frame_that_cannot_be_judged_is_named():
    with pytest.raises(ValueError, match="'q80'"):
        data.disturbed(recorded().drop(columns="q80"))


def test_the_known_rows_are_found():
    rows = data.results("attention", "NVIDIA H200")
    rows = rows[rows["status"] == "ok"].assign(bad=data.disturbed)
    rows = rows[(rows["metric"] == "host_us") & (rows["mode"] == "eager") & (rows["dtype"] == "float16")]
    bad = rows.set_index(["backend", "batch", "tokens"])["bad"].sort_index()
    assert bad["paper_triton", 32, "39"] and bad["flash_attn", 64, "197"]
    assert not bad["flash_attn", 32, "197"] and not bad["paper_triton", 32, "197"]


def test_tables_mark_them_and_say_what_the_mark_means():
    quiet, shaky = data.noted(45.0, False), data.noted(57.7, True)
    for text in (course.table([dict(a=quiet, b=shaky)]), table("", ["a", "b"], [[quiet, shaky]])):
        assert re.search(r"57\.7\*", text) and not re.search(r"45(\.0)?\*", text) and "disturbed" in text
    for text in (course.table([dict(a=quiet)]), table("", ["a"], [[quiet]])):
        assert "*" not in text
    assert type(quiet) is float and shaky + 1 == 58.7


def test_what_is_asked_of_rows_knows_it():
    rows = Rows(recorded((0, dict(q80=20.0))))
    assert isinstance(rows.call("triton", "39", 32, clock="host_us"), data.Disturbed) and rows.touched
    rows.touched = False
    assert not isinstance(rows.call("triton", "99", 32, clock="host_us"), data.Disturbed) and not rows.touched
