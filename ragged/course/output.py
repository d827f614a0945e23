"""How figures reach a notebook: as plotly JSON; beside it, while outputs are being saved, as a small PNG and as one
sentence of text for readers who cannot see them."""

from __future__ import annotations

import base64
import os

from ..plots.pictures import small_png
from ..plots.style import alt_text

SAVING = "plotly_mimetype+png"  # PLOTLY_RENDERER while notebooks are run in order to be saved


def saving() -> bool:
    """Whether this notebook runs in order to be saved with its outputs."""
    return os.environ.get("PLOTLY_RENDERER") == SAVING


def use_small_pictures() -> None:
    """Choose the renderer: JSON alone in JupyterLab (plotly's default adds megabytes of JavaScript), whatever plotly
    found out in Colab and elsewhere. While saving, PNGs are reduced to a palette, a third of their size, and the
    figure's sentence goes along as text/plain, where every viewer looks for what it can show. Without plotly nothing
    happens."""
    try:
        import plotly.graph_objects as go
        import plotly.io as pio
        from plotly.io.base_renderers import PngRenderer
    except ImportError:
        return

    class SmallPng(PngRenderer):
        def to_mimebundle(self, fig_dict):
            bundle = super().to_mimebundle(fig_dict)
            small = {kind: small_png(base64.b64decode(text)) for kind, text in bundle.items()}
            pictures = {kind: base64.b64encode(png).decode() for kind, png in small.items()}
            return pictures | {"text/plain": alt_text(go.Figure(fig_dict))}

    if saving():
        pio.renderers["png"] = SmallPng()
        pio.renderers.default = SAVING
    elif "notebook" in pio.renderers.default:
        pio.renderers.default = "plotly_mimetype"


def figure_bundle(figure) -> dict:
    """The MIME bundle of a plotly figure for the current renderer, to be displayed or updated raw.

    `display(figure)` would go past display handles: plotly shows figures on its own.
    """
    bundle = figure._repr_mimebundle_()
    return bundle[0] if isinstance(bundle, tuple) else bundle
