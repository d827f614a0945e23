"""Pictures: an image cut into patches, the patches a pruner kept, the lengths of a batch, the pipeline in one view.

Images are arrays (3, H, W) in [0, 1] (numpy, or anything numpy can read, such as a CPU tensor); ids are the row numbers
that `RaggedViT.trace` reports: 0 is CLS, 1 ... n the patches in reading order, -1 a fused token.
"""

from __future__ import annotations

import base64
import io

import numpy as np

from .style import INK, fitted, new_figure

PADDING = "#d9d9d9"
SEQUENCE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")


def image_patches(image, *, patch=16, title="", width=400):
    """The image cut into its patches by white lines; they are numbered row by row, starting at 1."""
    pixels = _pixels(image, patch)
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    below = f"{rows} × {columns} = {rows * columns} patches of {patch} × {patch} pixels"
    side = (width - 32) / columns
    figure = new_figure(title or "An image becomes a sequence", below, width, round(side * rows) + 92)
    figure.update_layout(margin=dict(l=16, r=16, t=76, b=16))
    _place(figure, pixels, 0, 0, columns, rows)
    lines = [f"M{c},0V{rows}" for c in range(1, columns)] + [f"M0,{r}H{columns}" for r in range(1, rows)]
    figure.add_shape(type="path", path="".join(lines), line=dict(color="white", width=max(2, round(side / 6))))
    return _bare(figure, columns, rows)


def kept_patches(images, ids, names, *, patch=16, columns=None, side=200, title="Kept patches", below=""):
    """A strip of images in which dropped patches are washed out, each with its name and its number of kept patches.

    images: one image for all, or one for each.  ids: for each panel the kept row numbers.  names: a line of text each.
    side: of a panel in pixels; more where the text above it is longer.
    """
    count = len(ids)
    if len(names) != count or count == 0:
        raise ValueError(f"ids and names: expected one name per list of ids, got {count} lists, {len(names)} names")
    one = not isinstance(images, list | tuple) and np.ndim(images) == 3
    images = [images] * count if one else list(images)
    if len(images) != count:
        raise ValueError(f"images: expected one, or one for each of {count} lists of ids, got {len(images)}")
    columns = min(count, columns or count)
    rows = -(-count // columns)
    fused = any(np.any(np.asarray(kept) == -1) for kept in ids)
    side = max(side, 8 * max(map(len, names)), 140 if fused else 112)  # letters of 12 px, the name in bold
    figure = new_figure(title, below, columns * (side + 12) + 20, rows * (side + 46) + (76 if below else 56))
    figure.update_layout(margin=dict(l=16, r=16, t=72 if below else 52, b=12))
    step_x, step_y = (side + 12) / side, (side + 46) / side
    for i, (image, kept, name) in enumerate(zip(images, ids, names)):
        x, y = (i % columns) * step_x, (rows - 1 - i // columns) * step_y
        pixels, real = _washed(image, kept, patch)
        _place(figure, pixels, x, y, 1, 1, drawn=side)
        total = (pixels.shape[0] // patch) * (pixels.shape[1] // patch)
        fused = " + 1 fused" if np.any(np.asarray(kept) == -1) else ""
        text = f"<b>{name}</b><br>{real} of {total}{fused or ' patches'}"
        figure.add_annotation(x=x, y=y + 1.01, text=text, showarrow=False, xanchor="left", yanchor="bottom",
                              align="left", font=dict(size=12))  # fmt: skip
    return _bare(figure, columns * step_x - 12 / side, rows * step_y)


def batch_lengths(lengths, *, seqlen=197, names=None, title="The lengths of a batch", below=""):
    """One bar per image: the tokens it keeps, and the padding up to the longest image.

    lengths: tokens kept per image, CLS included.  seqlen: tokens before pruning, drawn as a line.  names: x labels.
    """
    lengths = [int(n) for n in lengths]
    if not lengths or min(lengths) < 0 or max(lengths) > seqlen:
        raise ValueError(f"lengths: expected numbers from 0 to seqlen={seqlen}, got {lengths}")
    longest, total = max(lengths), sum(lengths)
    waste = 1 - total / (longest * len(lengths)) if longest else 0.0
    said = f"{total:,} tokens kept, {longest * len(lengths):,} rows when padded to the longest: {waste:.0%} of the rows"
    figure = new_figure(title, f"{below + ' · ' if below else ''}{said} are padding", height=380)
    x = list(range(len(lengths))) if names is None else list(names)
    padding = [longest - n for n in lengths]
    figure.add_bar(x=x, y=lengths, name="kept tokens", marker=dict(color="#d55e00"))
    figure.add_bar(x=x, y=padding, name="padding to the longest", marker=dict(color=PADDING))
    figure.add_hline(y=seqlen, line=dict(color=INK, width=1, dash="dash"))
    figure.add_annotation(x=1, xref="paper", xanchor="right", y=seqlen, yanchor="bottom", showarrow=False,
                          text=f"before pruning: {seqlen}", font=dict(size=11))  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.15)
    figure.update_xaxes(title_text="image of the batch" if names is None else None, showgrid=False, tickangle=-45)
    named = 62 if names is None else 24 + 5 * max(map(len, x))  # names are turned by 45 degrees
    return fitted(figure.update_yaxes(title_text="tokens", range=[0, seqlen * 1.1]), plot=200, axis=named)


def pipeline(images, ids, *, patch=16, width=900):
    """The whole idea in one picture: images, their kept patches, and one flat buffer that holds nothing else.

    images: one to six arrays (3, H, W).  ids: kept row numbers of each, CLS (0) included.
    """
    count = len(images)
    if count != len(ids) or not 1 <= count <= len(SEQUENCE_COLOURS):
        raise ValueError(f"images and ids: expected 1 to {len(SEQUENCE_COLOURS)} of each, got {count} and {len(ids)}")
    cell = width / count
    side = min(160, cell / 2 - 22)
    height = side + 222
    figure = new_figure("", "", width, round(height)).update_layout(margin=dict(l=0, r=0, t=0, b=0), title=None)
    top = height - side - 32  # the coordinates are pixels, counted from below
    for i, (image, kept) in enumerate(zip(images, ids)):
        left, colour = i * cell + 12, SEQUENCE_COLOURS[i]
        washed, real = _washed(image, kept, patch)
        _place(figure, _pixels(image, patch), left, top, side, side)
        _place(figure, washed, left + side + 14, top, side, side)
        _say(figure, left, height - 18, f"<b>image {i}</b>", colour, "left")
        _say(figure, left + side + 14, height - 18, f"keeps {real} of {_count(image, patch)}", colour, "left")
    _packed_bar(figure, [len(kept) for kept in ids], 12, width - 24, top - 66)
    _bare(figure, width, height)
    return figure


def _packed_bar(figure, counts, left, width, bottom):
    """The flat buffer as one bar of coloured stretches over its cu_seqlens, and under it what padding would take."""
    total, longest = sum(counts), max(counts)
    scale, start = width / (longest * len(counts)), 0
    what = "<b>packed</b>: the later blocks run on the kept tokens of all images, CLS included, end to end"
    _say(figure, left, bottom + 46, what, INK, "left")
    for i, n in enumerate(counts):
        x = left + start * scale
        _box(figure, x, x + n * scale, bottom, SEQUENCE_COLOURS[i])
        _say(figure, x + n * scale / 2, bottom + 15, str(n), "white", "center")
        _say(figure, x, bottom - 12, str(start), "#666666", "center" if start else "left")
        start += n
    _say(figure, left + start * scale - 12, bottom - 12, f"{start}   = cu_seqlens", "#666666", "left")
    share = longest * len(counts) / total
    _say(figure, left, bottom - 52, f"<b>padded</b> to the longest: {share:.2f} times as many rows", INK, "left")
    for i, n in enumerate(counts):
        x = left + i * longest * scale
        _box(figure, x, x + n * scale, bottom - 98, SEQUENCE_COLOURS[i])
        _box(figure, x + n * scale, x + longest * scale, bottom - 98, PADDING)


def _box(figure, left, right, bottom, colour):
    figure.add_shape(type="rect", x0=left, x1=right, y0=bottom, y1=bottom + 30, fillcolor=colour,
                     line=dict(color="white", width=1))  # fmt: skip


def _say(figure, x, y, text, colour, anchor):
    figure.add_annotation(x=x, y=y, text=text, showarrow=False, xanchor=anchor, yanchor="middle",
                          font=dict(size=13, color=colour))  # fmt: skip


def readme_picture(path, names=("astronaut", "cat", "rocket")):
    """Draw the pipeline for three of the photographs and save it as a PNG; needs kaleido and a browser.

    What stays is decided by a stand-in for a pruner that everybody can see through: patches of more than average
    contrast (the standard deviation of their grey values).
    """
    from ..data import photographs

    images, attributions = photographs()
    chosen = [images[[of["name"] for of in attributions].index(name)].numpy() for name in names]
    ids = []
    for image in chosen:
        grey = image.mean(0).reshape(14, 16, 14, 16).std(axis=(1, 3)).ravel()
        ids.append(np.r_[0, 1 + np.flatnonzero(grey >= grey.mean())])
    with open(path, "wb") as file:
        file.write(small_png(pipeline(chosen, ids).to_image("png", scale=1.5), 192))


def small_png(data: bytes, colours: int = 64) -> bytes:
    """A PNG with a palette in place of full colours: a third of the size or less. The palette covers the whole range of
    colours; one of averages would draw two thin lines of similar colours in one."""
    from PIL import Image

    image, file = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    image.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def photo_png(data: bytes, most: int = 38_000) -> bytes:
    """A PNG with its colours rounded to 64 values a channel, which nobody sees; where that is more than `most` bytes,
    with a palette of 256 of the picture's own colours."""
    from PIL import Image

    def saved(image) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        return file.getvalue()

    image = Image.open(io.BytesIO(data)).convert("RGB")
    small = saved(image.point([255 if value > 251 else min(252, (value + 2) // 4 * 4) for value in range(256)] * 3))
    return small if len(small) <= most else saved(image.quantize(256, Image.Quantize.MEDIANCUT))


# ---- pixels ----


def _pixels(image, patch: int):
    """uint8 (H, W, 3) of an image (3, H, W) in [0, 1] whose sides are multiples of `patch`."""
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[0] != 3 or array.shape[1] % patch or array.shape[2] % patch:
        raise ValueError(f"image: expected (3, H, W) with sides that are multiples of {patch}, got {array.shape}")
    if array.dtype.kind != "f" or array.min() < -1e-3 or array.max() > 1.001:
        raise ValueError(f"image: expected floats in [0, 1], before normalising, got {array.dtype} from "
                         f"{array.min():.3g} to {array.max():.3g}")  # fmt: skip
    return (array.clip(0, 1).transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)


def _count(image, patch: int) -> int:
    _, height, width = np.shape(image)
    return (height // patch) * (width // patch)


def _washed(image, kept, patch: int):
    """The pixels with dropped patches nearly white, and how many patches stayed."""
    pixels, kept = _pixels(image, patch).astype(np.float32), np.asarray(kept)
    total, columns = _count(image, patch), pixels.shape[1] // patch
    if kept.ndim != 1 or (kept.size and not (-1 <= kept.min() and kept.max() <= total)):
        raise ValueError(f"ids: expected row numbers from -1 to {total}, got {kept.tolist()[:8]}...")
    stay = np.zeros(total, bool)
    stay[kept[kept > 0] - 1] = True
    mask = stay.reshape(-1, columns).repeat(patch, 0).repeat(patch, 1)[..., None]
    grey = pixels.mean(2, keepdims=True)
    return np.where(mask, pixels, 225 + 0.1 * grey).astype(np.uint8), int(stay.sum())


def _place(figure, pixels, x, y, width, height, drawn=None):
    """Lay pixels (H, W, 3) into the figure with the lower left corner at (x, y). A saved figure stays small: the image
    travels as JPEG, halved where a screen of two pixels for one of the figure's `drawn` would still show less. (Other
    factors would tear the edges of the patches off the 8-pixel grid of JPEG and cost more than they save; so would
    enlarging again what was halved, in the PNG beside.)"""
    from PIL import Image

    file, image = io.BytesIO(), Image.fromarray(pixels)
    if drawn is not None and drawn <= 0.35 * image.width:
        image = image.reduce(2)
    image.save(file, "JPEG", quality=74)
    source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    figure.add_layout_image(source=source, x=x, y=y, sizex=width, sizey=height, xref="x", yref="y", xanchor="left",
                            yanchor="bottom", sizing="stretch", layer="below")  # fmt: skip


def _bare(figure, right, top):
    """No axes: a picture, its coordinates from 0 to (right, top)."""
    figure.update_xaxes(visible=False, range=[0, right])
    return figure.update_yaxes(visible=False, range=[0, top], scaleanchor=None)


if __name__ == "__main__":  # python -m ragged.plots.pictures data/figures/pipeline.png
    import argparse

    parser = argparse.ArgumentParser("python -m ragged.plots.pictures", description="Draw the picture of the README.")
    parser.add_argument("file", help="a PNG file, such as data/figures/pipeline.png")
    readme_picture(parser.parse_args().file)
