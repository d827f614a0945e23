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


def test_a_panel_says_who_rules():
    said = [note.text for note in plots.two_clocks(CALLS, cases=[(256, 197)]).layout.annotations]
    ours = CALLS.query("backend == 'triton' and batch == 256 and tokens == '197'").set_index("metric")["value"]
    assert ours["gpu_us"] > ours["host_us"]
    assert any(text.startswith("GPU rules: host 12, GPU") for text in said)
    said = [note.text for note in plots.two_clocks(CALLS, cases=[(1, 39)]).layout.annotations]
    assert all(text.startswith("host rules") for text in said if "rules:" in text)


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
