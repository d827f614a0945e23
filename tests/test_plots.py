"""Figures build from recorded rows and from the paper's, look alike, and say what is missing."""

import io

import numpy as np
import pytest

pytest.importorskip("plotly")

import figure_frames as frames
from PIL import Image

from ragged import data, plots
from ragged.plots import style

ATTENTION, MODEL, SPARSITY = frames.attention_frame(), frames.model_frame(), frames.sparsity_frame()
PRUNED = [b for b in plots.LOOKS if b != "dense"]
RECORDED = {
    "call_anatomy": lambda: plots.call_anatomy(frames.dispatch_frame()),
    "host_against_gpu": lambda: plots.host_against_gpu(ATTENTION),
    "kernel_grid": lambda: plots.kernel_grid(ATTENTION),
    "roofline": lambda: plots.roofline(ATTENTION),
    "padded_waste": lambda: plots.padded_waste(ATTENTION),
    "padded_waste of a model": lambda: plots.padded_waste(MODEL, metric="images_per_s", mode="graph"),
    "throughput_by_batch": lambda: plots.throughput_by_batch(MODEL, tokens="U(30,168)", backend=PRUNED),
    "sparsity_speedup": lambda: plots.sparsity_speedup(SPARSITY),
}
IMAGE = np.linspace(0, 1, 3 * 64 * 96, dtype=np.float32).reshape(3, 64, 96)  # 4 x 6 patches


@pytest.mark.parametrize("draw", RECORDED.values(), ids=RECORDED)
def test_a_figure_of_recorded_rows(draw):
    figure = draw()
    assert figure.data
    assert "NVIDIA H200 · 2026-11-03" in figure.layout.title.subtitle.text
    assert figure.layout.xaxis.title.text and len(figure.to_json()) < 40_000
    assert figure.layout.title.text in plots.alt_text(figure)


def test_a_backend_has_one_colour_in_all_figures():
    seen = {}
    for draw in RECORDED.values():
        for trace in draw().data:
            if trace.type == "scatter" and trace.legendgroup in plots.LOOKS:
                seen.setdefault(trace.legendgroup, set()).add((trace.line.color, trace.line.dash, trace.marker.symbol))
    assert {"triton", "flash_attn", "paper_padded", "unpruned"} <= set(seen)
    assert all(len(looks) == 1 for looks in seen.values()), seen


def test_no_two_backends_look_the_same():
    looks = [(look.colour, look.dash, look.symbol) for look in plots.LOOKS.values()]
    assert len(set(looks)) == len(looks)
    assert len({look.label for look in plots.LOOKS.values()}) == len(looks)


def test_modes_of_a_backend_share_its_colour_and_nothing_else():
    names = [f"{b}, {mode}" for b in ("unpruned", "dense", "triton", "sdpa_padded") for mode in ("graph", "eager")]
    looks = {name: style.look(name) for name in names}
    assert len({(look.colour, look.dash, look.symbol) for look in looks.values()}) == len(names)
    assert all(look.colour == plots.LOOKS[name.partition(",")[0]].colour for name, look in looks.items())
    assert looks["triton, graph"].label == "ours (Triton), graph"
    assert style.look("mine, eager").label == "mine, eager" and style.in_order(reversed(names)) == [
        f"{b}, {mode}" for b in ("unpruned", "dense", "sdpa_padded", "triton") for mode in ("eager", "graph")
    ]


def test_the_ceiling_is_the_flops_ratio():
    figure = plots.sparsity_speedup(SPARSITY)
    ceiling = next(t for t in figure.data if t.legendgroup == "ceiling")
    assert ceiling.y[0] == pytest.approx(1.0) and ceiling.y[-1] == pytest.approx(12 / 4.8)
    ours = next(t for t in figure.data if t.legendgroup == "triton")
    assert all(y <= c + 1e-9 for y, c in zip(ours.y, ceiling.y))


def test_the_roofline_counts_what_attention_needs():
    figure = plots.roofline(ATTENTION, backend="triton")
    line = next(t for t in figure.data if t.legendgroup == "triton")
    row = ATTENTION.query("backend == 'triton' and batch == 256 and tokens == '39' and metric == 'gpu_us'").iloc[0]
    flops, moved = 4 * 256 * 12 * 39 * 39 * 64, 4 * 256 * 12 * 39 * 64 * 2
    assert line.x[0] == pytest.approx(flops / moved)
    assert line.y[0] == pytest.approx(flops / (row["value"] * 1e-6) / 1e12)


def test_padded_waste_predicts_from_the_lengths():
    figure = plots.padded_waste(ATTENTION)
    lengths = data.lengths("U(20,197)", 64)
    assert figure.data[0].y[0] == pytest.approx(64 * max(lengths) / sum(lengths))


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: plots.roofline(ATTENTION.drop(columns=["mode", "date"])), r"lacks the columns .*date"),
        (lambda: plots.roofline(ATTENTION, batch=7), "batch = 7; there are: .*'32.0'"),
        (lambda: plots.host_against_gpu(ATTENTION[ATTENTION["metric"] != "gpu_us"]), "metric = gpu_us"),
        (lambda: plots.kernel_grid(ATTENTION, baseline="fa5"), "backend = fa5; there are: .*flash_attn"),
        (lambda: plots.roofline(ATTENTION.assign(gpu="GPU X")), "no peak for 'GPU X'"),
        (lambda: plots.padded_waste(ATTENTION, tokens="39"), "no rows with lengths such as U"),
        (lambda: plots.throughput_by_batch(MODEL), "mix tokens = 99, U.30,168.; choose one"),
        (lambda: plots.sparsity_speedup(SPARSITY[SPARSITY["backend"] != "unpruned"]), "backend = unpruned"),
        (lambda: plots.resolution_speedup(MODEL[:0]), "no rows at all"),
        (lambda: plots.call_anatomy(ATTENTION[:0]), "no rows at all"),
    ],
)
def test_what_is_missing_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_rows_that_failed_are_not_drawn():
    failed = ATTENTION.copy()
    failed.loc[failed["backend"] == "nested", "status"] = "device is too small"
    assert "nested" not in {trace.legendgroup for trace in plots.roofline(failed).data}


def test_two_gpus_are_not_drawn_over_each_other():
    import pandas

    both = pandas.concat([ATTENTION, ATTENTION.assign(gpu="Tesla T4")])
    with pytest.raises(ValueError, match="mix gpu"):
        plots.roofline(both, peak=(1e15, 1e12))
    assert "Tesla T4" in plots.roofline(both, gpu="Tesla T4").layout.title.subtitle.text


# ---- pictures ----


def test_an_image_taken_apart():
    figure = plots.image_patches(IMAGE)
    assert "4 × 6 = 24 patches" in figure.layout.title.subtitle.text
    assert figure.layout.images[0].source.startswith("data:image/jpeg;base64,")


def test_kept_patches_are_counted_without_cls_and_fused():
    figure = plots.kept_patches(IMAGE, [[0, 1, 24], np.array([0, 5, -1])], ["one", "two"])
    texts = [note.text for note in figure.layout.annotations]
    assert texts == ["<b>one</b><br>2 of 24 patches", "<b>two</b><br>1 of 24 + 1 fused"]
    assert len(figure.layout.images) == 2


def test_dropped_patches_are_washed_out():
    from ragged.plots.pictures import _washed

    pixels, real = _washed(IMAGE, [0, 24], 16)
    assert real == 1 and pixels[:48].min() >= 225
    assert np.array_equal(pixels[48:, 80:], (IMAGE.transpose(1, 2, 0)[48:, 80:] * 255 + 0.5).astype(np.uint8))


def test_the_lengths_of_a_batch():
    figure = plots.batch_lengths([50, 100, 30], names=["a", "b", "c"])
    assert list(figure.data[1].y) == [50, 0, 70]
    below = figure.layout.title.subtitle.text
    assert "180 tokens kept, 300 rows" in below and "40%" in below


def test_the_pipeline_shows_cu_seqlens():
    figure = plots.pipeline([IMAGE, IMAGE], [[0, 1, 2], [0, 3]])
    texts = " ".join(note.text for note in figure.layout.annotations)
    assert "5   = cu_seqlens" in texts and "1.20 times as many rows" in texts


def test_the_diagram_lights_the_parts_that_are_named():
    parts = ("images", "blocks", "pruner", "pack", "attend", "classify")
    for lit in ((), parts, ("pack",), "pruner"):
        figure = plots.stages(lit=lit, title="A title")
        coloured = [shape for shape in figure.layout.shapes if shape.type == "rect" and shape.line.color == "#d55e00"]
        assert len(coloured) == (1 if lit in (("pack",), "pruner") else 6)
        assert figure.layout.title.text == "A title" and len(figure.to_json()) < 20_000
    said = plots.alt_text(plots.stages())
    assert all(name in said for name in parts) and "cu_seqlens says where each image begins" in said
    assert "<br>" not in said


def test_the_machine_lights_the_parts_that_are_named():
    parts = ("host", "queue", "multiprocessor", "registers", "shared", "l2", "memory")
    for lit, coloured in (((), 9), (parts, 9), (("registers", "shared"), 2), ("multiprocessor", 3)):
        figure = plots.machine(lit=lit, title="A title")
        shapes = [shape for shape in figure.layout.shapes if shape.line.color == "#d55e00"]
        assert len(shapes) == coloured and figure.layout.title.text == "A title"
    said = plots.alt_text(plots.machine())
    assert all(word in said for word in ("host", "queue", "registers", "shared memory", "L2 cache"))
    assert "<" not in said


LETTER, LINE = 6.6, 15  # px: about the width of a letter and the height of a line, of DejaVu at 12 px


def text_box(note):
    """Where an annotation of a diagram stands, in its own pixels: left, right, bottom, top."""
    lines = note.text.replace("<b>", "").replace("</b>", "").split("<br>")
    wide, high = LETTER * max(map(len, lines)), LINE * len(lines)
    left = note.x - {"left": 0, "right": wide}.get(note.xanchor, wide / 2)
    bottom = note.y - {"bottom": 0, "top": high}.get(note.yanchor, high / 2)
    return left, left + wide, bottom, bottom + high


def test_no_words_of_the_machine_stand_over_others_or_over_an_edge():
    figure = plots.machine()
    notes = [note for note in figure.layout.annotations if note.text]
    boxes = [text_box(note) for note in notes]
    assert len(notes) >= 10
    for i, (left, right, bottom, top) in enumerate(boxes):
        for a, b, c, d in boxes[i + 1 :]:
            assert b <= left or right <= a or d <= bottom or top <= c, (notes[i].text, (a, b, c, d))
        for shape in figure.layout.shapes:
            for edge in (shape.x0, shape.x1):
                if shape.y0 < top and bottom < shape.y1:
                    assert not left < edge < right, f"{notes[i].text!r} runs over the side of a box"


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: plots.stages(lit=("pack", "unpack")), "lit: expected names of .*; got 'unpack'"),
        (lambda: plots.machine(lit="L3"), "lit: expected names of .*; got 'L3'"),
        (lambda: plots.image_patches(IMAGE[0]), r"image: expected \(3, H, W\)"),
        (lambda: plots.image_patches(IMAGE[:, :60]), "multiples of 16"),
        (lambda: plots.image_patches(IMAGE * 4 - 2), r"floats in \[0, 1\]"),
        (lambda: plots.kept_patches(IMAGE, [[0, 25]], ["one"]), "row numbers from -1 to 24"),
        (lambda: plots.kept_patches(IMAGE, [[0]], []), "one name per list of ids"),
        (lambda: plots.kept_patches([IMAGE], [[0], [0]], ["a", "b"]), "images: expected one"),
        (lambda: plots.batch_lengths([]), "lengths: expected"),
        (lambda: plots.batch_lengths([198]), "0 to seqlen=197"),
        (lambda: plots.pipeline([IMAGE], []), "images and ids"),
    ],
)
def test_bad_pictures_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_png_shrinks_and_keeps_its_size():
    from ragged.plots.pictures import small_png

    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    small = small_png(file.getvalue())
    assert Image.open(io.BytesIO(small)).size == (80, 60) and len(small) < len(file.getvalue()) / 2


def test_a_photograph_keeps_its_colours():
    """Rounded by less than anybody sees; a large one gets a palette of its own, which is nearer than one of 64."""
    from ragged.plots.pictures import photo_png, small_png

    pixels = (data.photographs()[0][0].numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((448, 448), Image.Resampling.BILINEAR).save(file, "PNG", optimize=True)
    full = file.getvalue()

    def off(png):
        mine, there = (np.asarray(Image.open(io.BytesIO(x)).convert("RGB"), dtype=int) for x in (png, full))
        return abs(mine - there)

    rounded = photo_png(full, most=10**6)
    assert off(rounded).max() <= 3 and len(rounded) < 0.7 * len(full)
    small = photo_png(full, most=len(rounded) - 1)
    assert len(small) < len(full) / 2 and np.median(off(small)) < np.median(off(small_png(full))) / 2
    white = io.BytesIO()
    Image.new("RGB", (20, 20), "white").save(white, "PNG")
    assert np.asarray(Image.open(io.BytesIO(photo_png(white.getvalue())))).min() == 255


def test_a_small_png_keeps_similar_colours_apart():
    """Thin lines in the figures' colours, beside all the shades of soft edges."""
    from ragged.plots.pictures import small_png

    colours = [(213, 94, 0), (230, 159, 0), (0, 114, 178), (86, 180, 233)]
    pixels = np.full((300, 400, 3), 255)
    for row, colour in enumerate([*colours, (0, 0, 0), (0, 158, 115), (204, 121, 167)]):
        soft = np.linspace(0, 1, 400)[:, None]  # edges of letters and lines: all shades between a colour and white
        pixels[40 * row + 10 : 40 * row + 16] = soft * 255 + (1 - soft) * colour
        pixels[40 * row + 20, :60] = colour
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    small = np.asarray(Image.open(io.BytesIO(small_png(file.getvalue()))).convert("RGB")).astype(int)
    for row, colour in enumerate(colours):
        assert abs(small[40 * row + 20, :60] - colour).max() < 10, colour


def test_a_recording_that_is_given_twice_is_said():
    rows = data.results("model", "NVIDIA H100")
    with pytest.raises(ValueError, match="unpruned model stands there more than once for batch 1"):
        plots.speedup_by_batch(rows.loc[rows.index.repeat(2)])
