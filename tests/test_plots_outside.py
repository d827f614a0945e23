"""The figures of decoding and of several GPUs, from recorded rows."""

import pytest

pytest.importorskip("plotly")

import pandas

from ragged import data, plots
from ragged.plots.outside import gpus_of, kind_of


def frame(rows):
    shared = {"batch": 256.0, "dtype": "float16", "status": "ok", "date": "2026-11-03", "gpu": "NVIDIA H200"}
    return pandas.DataFrame([shared | row for row in rows])


def ceiling():
    """Decoding gives 300 images/s a process; the GPU 1000, or 2000 with EViT."""
    rows = []
    for n in (1, 4, 16):
        for pruner, gpu in (("none", 1000.0), ("evit", 2000.0)):
            values = {"decode": 300.0 * n, "gpu": gpu, "end_to_end": min(300.0 * n, gpu)}
            rows += [{"model": "deit_tiny", "pruner": pruner, "mode": f"graph, torchvision x{n}",
                      "metric": f"{part}_images_per_s", "value": value} for part, value in values.items()]  # fmt: skip
    return frame(rows)


def test_a_gain_vanishes_behind_decoding():
    figure = plots.decoding_ceiling(ceiling())
    lines = {line.name: line for line in figure.data}
    assert set(lines) == {"decoding alone", "GPU alone, unpruned", "end to end, unpruned", "GPU alone, EViT",
                          "end to end, EViT"}  # fmt: skip
    assert list(lines["decoding alone"].x) == [1, 4, 16] and list(lines["decoding alone"].y) == [300, 1200, 4800]
    assert list(lines["end to end, unpruned"].y) == [300, 1000, 1000]
    assert list(lines["end to end, EViT"].y) == [300, 1200, 2000]
    assert "NVIDIA H200 · 2026-11-03 · DeiT-Ti · batch 256" in figure.layout.title.subtitle.text


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="decoded by pillow on two numbers"):
        plots.decoding_ceiling(ceiling(), way="pillow")
    with pytest.raises(ValueError, match="no rows at all"):
        plots.decoding_ceiling(data.results("ceiling", "no such GPU"))
    one = several()
    with pytest.raises(ValueError, match="one GPU and of several of its kind; there are: .'NVIDIA H200'."):
        plots.scaling(one[one["gpu"] == "NVIDIA H200"])
    other = one.assign(gpu=one["gpu"].str.replace("H200", "H100 80GB HBM3"))
    both = pandas.concat([one, other], ignore_index=True)
    with pytest.raises(ValueError, match="mix kind"):
        plots.scaling(both)
    assert "H100 80GB HBM3 x8" in plots.scaling(both, kind="NVIDIA H100 80GB HBM3").layout.title.subtitle.text
    with pytest.raises(ValueError, match="mix batch"):
        plots.scaling(pandas.concat([one, one.assign(batch=64.0)], ignore_index=True))


def several():
    rows = []
    for gpu, times in (("NVIDIA H200", 1), ("NVIDIA H200 x2", 1.9), ("NVIDIA H200 x8", 7.5)):
        for mode, pruner in (("evaluation", "none"), ("evaluation", "evit"), ("training", "none")):
            rows.append({"model": "deit_small", "pruner": pruner, "mode": f"{mode}, x", "gpu": gpu,
                         "value": 100 * times, "metric": "images_per_s"})  # fmt: skip
    return frame(rows)


def test_every_network_stands_beside_as_many_times_as_gpus():
    figure = plots.scaling(several())
    panels = [note.text for note in figure.layout.annotations]
    assert panels == ["evaluation", "training"] and len(figure.data) == 6
    for ideal, line in zip(figure.data[::2], figure.data[1::2]):
        assert list(line.x) == [1, 2, 8] and list(line.y) == [100, 190, 750]
        assert list(ideal.y) == [100, 200, 800] and ideal.line.dash == "dot"
        assert ideal.line.color == line.line.color and list(line.text) == [f"{t:.2f} times 1" for t in (1, 1.9, 7.5)]
    assert {line.name for line in figure.data[1::2]} == {"DeiT-S, unpruned", "DeiT-S, EViT"}


def test_whatever_rows_there_are():
    """Without one GPU the line begins at the fewest; what is recorded on one number of GPUs alone is left out."""
    rows = several()
    figure = plots.scaling(rows[rows["gpu"] != "NVIDIA H200"])
    assert list(figure.data[0].x) == [2, 8] and list(figure.data[0].y) == pytest.approx([190, 760])
    figure = plots.scaling(rows[(rows["gpu"] != "NVIDIA H200 x8") | rows["mode"].str.startswith("evaluation")])
    assert [len(line.x) for line in figure.data[1::2]] == [3, 3, 2]
    lone = rows[rows["mode"].str.startswith("evaluation") | (rows["gpu"] == "NVIDIA H200")]
    assert [note.text for note in plots.scaling(lone).layout.annotations] == ["evaluation"]


@pytest.mark.parametrize("name, n", [("NVIDIA H200", 1), ("NVIDIA H200 x2", 2), ("cpu x16", 16),
                                     ("2x NVIDIA H200", 2), ("4x NVIDIA H100 80GB HBM3", 4)])  # fmt: skip
def test_gpus_are_counted_by_the_name(name, n):
    assert gpus_of(name) == n and kind_of(name) in ("NVIDIA H200", "cpu", "NVIDIA H100 80GB HBM3")
