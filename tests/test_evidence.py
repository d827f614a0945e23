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


def in_figure(figure):
    """Names of marked things: rings, and labels with an asterisk."""
    rings = sum(len(t.x) for t in figure.data if t.name == "disturbed")
    labels = [text for t in figure.data for text in (t.text if isinstance(t.text, tuple) else ()) if "*" in str(text)]
    return rings, labels


@pytest.mark.parametrize("metric, share", [("gpu_us", 0.0), ("host_us", 0.6)])
def test_figures_mark_them_and_say_so(metric, share):
    pytest.importorskip("plotly")
    from ragged import plots

    rows = [dict(suite="attention", model="deit_base", backend=b, mode="eager", dtype="float16", tokens="39", keep=1.0,
                 batch=32.0, metric=m, value=us, q20=us, q80=us * (1 + share * (b == "triton" and m == metric)))
            for b, us in (("triton", 10.0), ("flash_attn", 45.0)) for m in ("host_us", "gpu_us")]  # fmt: skip
    both = plots.two_clocks(frames.rows(rows), cases=[(32, 39)], backend=["triton", "flash_attn"])
    for figure in (plots.host_against_gpu(frames.rows(rows)), both):
        rings, labels = in_figure(figure)
        notes = [note.text for note in figure.layout.annotations if "*" in note.text]
        assert bool(rings or labels or notes) == (share > 0)
        assert ("disturbed" in figure.layout.title.subtitle.text) == (share > 0)
    bars = [t for t in plots.host_against_gpu(frames.rows(rows)).data if t.error_x.array is not None]
    assert {len(t.error_x.array) for t in bars} == {2}


def test_a_line_has_a_ring_where_its_row_or_what_it_is_divided_by_is_disturbed():
    pytest.importorskip("plotly")
    from ragged import plots

    rows = [dict(suite="model", model="deit_base", backend=b, mode="eager", dtype="float16", batch=batch, keep=0.5,
                 tokens="197" if b == "unpruned" else "99", metric="images_per_s", value=v, q20=v, q80=v)
            for b, v in (("unpruned", 100.0), ("triton", 150.0)) for batch in (1.0, 4.0)]  # fmt: skip
    assert in_figure(plots.speedup_by_batch(frames.rows(rows)))[0] == 0
    for at in (0, 2):  # the unpruned model at batch 1, the pruned one at batch 1
        changed = [dict(r, q80=2 * r["q80"]) if i == at else r for i, r in enumerate(rows)]
        assert in_figure(plots.speedup_by_batch(frames.rows(changed)))[0] == 1


def test_padding_inside_and_outside_the_call_are_two_bars():
    pytest.importorskip("plotly")
    from ragged import plots

    rows = data.results("attention", "NVIDIA H200")
    bars = {t.name: t.y[0] for t in plots.padded_waste(rows).data}
    inside, outside = (bars[f"measured, {how}"] for how in ("padding inside the call", "padded before it"))
    assert inside > outside > 1
    few = plots.padded_waste(rows[rows["backend"] != "sdpa_padded:attention"])
    assert [t.name for t in few.data if t.name.startswith("measured")] == ["measured, padding inside the call"]


QUOTED = re.compile(r"(\d[\d,]*\.\d+|\d[\d,]*\d{3}|\d{3,})\s*(?:µs|us\b|images/s)")


def prose():
    """Every paragraph of the READMEs and lessons, by where it stands; tables that a command writes are left out."""
    import notebook_files

    for path in ("README.md", "data/README.md", "notebooks/README.md", "CONTRIBUTING.md"):
        text = (notebook_files.ROOT / path).read_text(encoding="utf-8")
        yield path, "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    for path in sorted((notebook_files.ROOT / "notebooks").glob("*.ipynb")):
        for cell in notebook_files.read(path)["cells"]:
            if cell["cell_type"] == "markdown":
                yield f"{path.name} {cell['id']}", "".join(cell["source"])


def test_no_prose_quotes_a_disturbed_row():
    rows = data.results()
    rows = rows[rows["status"] == "ok"]
    values = rows.loc[data.disturbed(rows), "value"].tolist()
    quoted = [(where, number) for where, text in prose() for number in QUOTED.findall(text)]
    for where, number in quoted:
        digits = len(number.partition(".")[2])
        assert not any(f"{v:.{digits}f}" == number.replace(",", "") for v in values), f"{where} quotes {number}"


def test_a_quotation_would_be_found():
    assert QUOTED.findall("it takes 57.7 µs, not 45 µs, and 3,529 images/s") == ["57.7", "3,529"]
    assert QUOTED.findall("at 1234 images/s and 0.98 µs") == ["1234", "0.98"]
