"""Figures of launching: they build from rows, show what the rows say, and name what is missing."""

import pytest

pytest.importorskip("plotly")

import figure_frames as frames

from ragged import data, plots

CALLS = frames.attention_frame()
EVENTS = CALLS[CALLS["metric"] == "wall_us"].assign(metric="event_us")
WITH_EVENTS = frames.pandas.concat([CALLS, EVENTS], ignore_index=True)


def forward_frame():
    records = []
    for backend, tokens in (("unpruned", "197"), ("triton", "99")):
        for mode in ("eager", "compile+graph"):
            for batch in (1.0, 64.0):
                for metric, value in (("host_us", 3000.0), ("gpu_us", 60 * batch)):
                    records.append(dict(suite="model", model="deit_base", backend=backend, mode=mode, batch=batch,
                                        tokens=tokens, metric=metric, value=value))  # fmt: skip
    return frames.rows(records)


FIGURES = {
    "two_clocks": lambda: plots.two_clocks(CALLS, cases=[(1, 39), (256, 197)]),
    "host_or_gpu": lambda: plots.host_or_gpu(CALLS),
    "clock_hypotheses": lambda: plots.clock_hypotheses(WITH_EVENTS),
    "forward_clocks": lambda: plots.forward_clocks(forward_frame()),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_of_recorded_rows(draw):
    figure = draw()
    assert figure.data and "NVIDIA H200 · 2026-11-03" in figure.layout.title.subtitle.text
    assert figure.layout.xaxis.title.text and len(figure.to_json()) < 40_000
    assert figure.layout.title.text in plots.alt_text(figure)


def test_a_panel_says_which_takes_longer():
    said = [note.text for note in plots.two_clocks(CALLS, cases=[(256, 197)]).layout.annotations]
    ours = CALLS.query("backend == 'triton' and batch == 256 and tokens == '197'").set_index("metric")["value"]
    assert ours["gpu_us"] > ours["host_us"]
    assert any(text.startswith("GPU takes longer: host 12, GPU") for text in said)
    said = [note.text for note in plots.two_clocks(CALLS, cases=[(1, 39)]).layout.annotations]
    assert all(text.startswith("host takes") for text in said if "longer:" in text)


def test_panels_of_different_cases_share_one_axis():
    few, many = (plots.two_clocks(CALLS, cases=[case]).layout.xaxis.range for case in ((1, 39), (256, 197)))
    assert few == many


def test_the_map_is_blank_where_nothing_was_recorded():
    hole = CALLS[~((CALLS["batch"] == 4) & (CALLS["tokens"] == "39"))]
    figure = plots.host_or_gpu(hole, backend=["triton"])
    cells = dict(zip(figure.data[0].y, figure.data[0].text, strict=True))
    assert cells["4"][0] == "" and cells["1"][0] == "12<br>3"


def test_the_right_hypothesis_misses_by_nothing():
    values = WITH_EVENTS.set_index(["backend", "batch", "tokens", "metric"])["value"]
    made = [values.get((*key[:3], "host_us"), 0) + values.get((*key[:3], "gpu_us"), 0) if key[3] == "event_us" else v
            for key, v in values.items()]  # fmt: skip
    titles = [note.text for note in plots.clock_hypotheses(WITH_EVENTS.assign(value=made)).layout.annotations]
    assert any(title.startswith("their sum") and title.endswith("off by 0%") for title in titles)
    assert not any(title.startswith("the GPU alone") and title.endswith("off by 0%") for title in titles)


def test_a_forward_pass_has_a_host_and_a_gpu_line_per_pipeline():
    figure = FIGURES["forward_clocks"]()
    lines = {trace.name: list(trace.y) for trace in figure.data}
    assert lines["unpruned: GPU"] == [0.06, 3.84] and lines["ours (Triton): host"] == [3.0, 3.0]


def test_a_timeline_has_two_lanes_for_every_scenario():
    figure = plots.timeline({"alone": [("host", 0, 40), ("GPU", 40, 54)], "late": [("host", 5, 9)]}, title="t")
    host, gpu = figure.data
    assert (host.name, list(host.base), list(host.x)) == ("host", [0, 5], [40, 4])
    assert (gpu.name, list(gpu.base), list(gpu.x)) == ("GPU", [40], [14])


def test_drawings_that_need_no_rows():
    figure = plots.floor_and_slope([1, 10], [3, 4], 2.0, 0.5, title="t", below="b", item="numbers")
    total = next(trace for trace in figure.data if trace.name == "their sum")
    assert list(total.y) == [2.5, 7.0]
    figure = plots.launch_paths({"fast": 1.0, "slow": 9.0}, title="t", below="b", floor=0.5)
    assert list(figure.data[0].y) == ["fast", "slow"] and figure.layout.shapes[0].x0 == 0.5
    figure = plots.capacity_steps([100, 200], [110, 200], title="t", below="b")
    assert figure.data[0].y == pytest.approx([10, 0]) and "mean 5 %" in figure.layout.annotations[0].text


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: plots.two_clocks(CALLS, cases=[(7, 39)]), "no rows with batch 7 and 39 tokens"),
        (lambda: plots.two_clocks(CALLS[CALLS["metric"] != "gpu_us"], cases=[(1, 39)]), "no call has rows of all"),
        (lambda: plots.clock_hypotheses(CALLS), "no call has rows of all of host_us, gpu_us, event_us"),
        (lambda: plots.host_or_gpu(CALLS, backend=["fa5"]), "backend = fa5"),
        (lambda: plots.forward_clocks(forward_frame(), model="deit_tiny"), "model = deit_tiny"),
        (lambda: plots.host_or_gpu(data.results("attention", "no such GPU")), "no rows at all"),
    ],
)
def test_what_is_missing_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# ---- the anatomy of a call, and recorded timelines ----


def dispatch_rows(**changed):
    values = {"triton": 12.0, "triton:quick": 11.0, "triton:guard": 1.0, "triton:output_allocation": 2.0,
              "triton:direct_launch": 5.0, "triton:jit_launch": 30.0, "flash_attn": 40.0, "flash_attn:custom_op": 25.0,
              "flash_attn:binding": 10.0}  # fmt: skip
    shared = dict(suite="dispatch", model="deit_base", batch=32.0, tokens="39", metric="host_us")
    found = {**values, **changed}
    return frames.rows([shared | dict(backend=b, value=v) for b, v in found.items() if v is not None])


def check_that_parts_add_up(figure):
    """The layers below a bar begin where it begins, follow one another, and the last one ends where it ends."""
    drawn = figure.data[0]
    assert len(drawn.x) == len(drawn.base) == len(drawn.y)
    bars = [(float(b), float(b) + float(x)) for b, x in zip(drawn.base, drawn.x)]
    depths = depths_of(bars, figure.layout.yaxis.ticktext)
    for i, (start, end) in enumerate(bars):
        inside = []
        for bar, depth in zip(bars[i + 1 :], depths[i + 1 :]):
            if depth <= depths[i]:
                break
            inside += [bar] if depth == depths[i] + 1 else []
        if inside:
            assert inside[0][0] == start and inside[-1][1] == pytest.approx(end)
            assert all(a[1] == pytest.approx(b[0]) for a, b in zip(inside, inside[1:]))
            assert sum(b - a for a, b in inside) == pytest.approx(end - start)
    return bars, depths


def depths_of(bars, labels):
    """How many of the bars above, since the last whole call, each lies in."""
    depths, above = [], []
    for (start, end), label in zip(bars, labels):
        if label.startswith("<b>"):
            above = []
        while above and not (above[-1][0] <= start + 1e-9 and end <= above[-1][1] + 1e-9):
            above.pop()
        depths.append(len(above))
        above.append((start, end))
    return depths


def test_the_parts_of_a_call_add_up_to_it():
    figure = plots.call_anatomy(dispatch_rows())
    bars, depths = check_that_parts_add_up(figure)
    labels = list(figure.layout.yaxis.ticktext)
    assert labels == ["<b>FlashAttention-2</b>", "custom operator", "C++ function", "rest of custom operator",
                      "rest of the call", "<b>ours (Triton)</b>", "short way", "guard", "memory for the output",
                      "direct launch", "rest of short way", "rest of the call"]  # fmt: skip
    assert depths == [0, 1, 2, 2, 1, 0, 1, 2, 2, 2, 2, 1]
    assert bars[labels.index("rest of short way")] == (8.0, 11.0)


def test_the_recorded_parts_add_up():
    rows = data.results("dispatch", "NVIDIA H200")
    figure = plots.call_anatomy(rows)
    bars, depths = check_that_parts_add_up(figure)
    public = rows.query("metric == 'host_us'").set_index("backend")["value"]
    wholes = [end for (_, end), depth in zip(bars, depths) if depth == 0]
    assert wholes == [public[b] for b in ("flash_attn", "paper_triton", "triton")]
    assert {0, 1, 2} == set(depths)


def test_a_layer_that_was_not_recorded_leaves_its_time_to_the_rest():
    figure = plots.call_anatomy(dispatch_rows(**{"triton:quick": None, "triton:guard": None}), providers=["triton"])
    check_that_parts_add_up(figure)
    assert list(figure.layout.yaxis.ticktext)[1:] == ["memory for the output", "direct launch", "rest of the call"]
    assert list(figure.data[0].x) == [12.0, 2.0, 5.0, 5.0]


def test_parts_longer_than_the_whole_are_refused():
    with pytest.raises(ValueError, match="flash_attn, public: its parts took longer than it, by 2 µs"):
        plots.call_anatomy(dispatch_rows(**{"flash_attn:custom_op": 42.0}))


def test_a_disturbed_part_marks_what_is_left():
    rows = dispatch_rows()
    rows = rows.assign(q20=rows["value"], q80=rows["value"] * (1 + 0.5 * (rows["backend"] == "triton:guard")))
    figure = plots.call_anatomy(rows, providers=["triton"])
    said = dict(zip(figure.layout.yaxis.ticktext, figure.data[1].text))
    assert said["guard"] == "1*" and said["rest of short way"] == "3*" and said["rest of the call"] == "1"
    assert list(figure.data[0].error_x.array)[-1] is None, "what was computed has no whiskers"


@pytest.mark.parametrize("backend", ["flash_attn", "paper_triton", "torch_varlen", "triton"])
def test_a_recorded_trace_is_calls_launches_and_kernels(backend):
    spans = data.trace_spans(backend, calls=2)
    calls, launches, kernels = ([s[1:] for s in spans if s[0] == who] for who in ("host", "launch", "GPU"))
    assert len(calls) == 2 and calls[0][0] == 0 and len(launches) == len(kernels) > 0
    for launch, kernel in zip(launches, kernels):
        assert launch[0] < kernel[0] and any(a <= launch[0] and launch[1] <= b for a, b in calls)
    figure = plots.timeline({backend: spans}, title="t")
    assert [trace.name for trace in figure.data] == ["host", "launch", "GPU"]


def test_a_trace_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match="no trace of 'dense' for NVIDIA H200; there are flash_attn, paper_triton"):
        data.trace_spans("dense")
    with pytest.raises(ValueError, match="there are none"):
        data.trace_spans("triton", folder=tmp_path)
    with pytest.raises(ValueError, match="expected 1 to 5, which triton.json.gz holds, got 9"):
        data.trace_spans("triton", calls=9)
    (tmp_path / "triton.json.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a trace of PyTorch's profiler"):
        data.trace_spans("triton", folder=tmp_path)
