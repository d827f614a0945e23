"""How figures reach a notebook: as plotly JSON; beside it as a small PNG, for viewers that do not draw plotly
(nbconvert's pages, a JupyterLab without plotly's extension); and as one sentence of text for readers who cannot see
them. Where no PNG can be drawn, as HTML that asks the network for nothing."""

from __future__ import annotations

import base64
import os
import sys
import warnings

from ..plots.pictures import photo_png, small_png
from ..plots.style import alt_text

SAVING = "plotly_mimetype+png"  # PLOTLY_RENDERER while notebooks are run in order to be saved
LIVE = "plotly_mimetype+ragged_picture"  # what a session gets that asked for nothing
FIGURE, PNG = "application/vnd.plotly.v1+json", "image/png"
PHOTO_SCALE = 2  # pixels of a PNG for one of the figure's, where it holds photographs
PLOTLY_DEFAULTS = ("plotly_mimetype", "plotly_mimetype+notebook")  # of its versions, in a Jupyter kernel


def saving() -> bool:
    """Whether this notebook runs in order to be saved with its outputs."""
    return os.environ.get("PLOTLY_RENDERER") == SAVING


def use_small_pictures() -> None:
    """Choose the renderer. While saving: JSON, a PNG reduced to a palette (a third of its size; photographs keep their
    colours and get twice the pixels), and the figure's sentence as text/plain, where every viewer looks for what it can
    show. In a session in Jupyter the same, and HTML
    in place of a PNG where none can be drawn (see `_Picture`). Colab and others keep what plotly found out, and a
    PLOTLY_RENDERER in the environment is taken at its word: `plotly_mimetype` is JSON alone, and the quickest. Without
    plotly nothing happens."""
    try:
        import plotly.io as pio
    except ImportError:
        return
    if saving():
        pio.renderers["png"] = _renderer("SmallPng", lambda fig_dict: {PNG: _png(fig_dict)})
        pio.renderers.default = SAVING
        _show_in_half_size()
    elif "PLOTLY_RENDERER" not in os.environ and pio.renderers.default in PLOTLY_DEFAULTS:
        pio.renderers["ragged_picture"] = _renderer("Picture", _Picture())
        pio.renderers.default = LIVE
        _show_in_half_size()


def figure_bundle(figure) -> dict:
    """The MIME bundle of a plotly figure for the current renderer, to be displayed or updated raw.

    `display(figure)` would go past display handles: plotly shows figures on its own.
    """
    bundle = figure._repr_mimebundle_()
    return bundle[0] if isinstance(bundle, tuple) else bundle


def _renderer(name: str, picture):
    """A plotly renderer whose bundle is what `picture` makes of a figure's dict, and the figure's sentence."""
    import plotly.graph_objects as go
    from plotly.io.base_renderers import MimetypeRenderer

    def to_mimebundle(self, fig_dict):
        return picture(fig_dict) | {"text/plain": alt_text(go.Figure(fig_dict))}

    return type(name, (MimetypeRenderer,), {"to_mimebundle": to_mimebundle})()


def _png(fig_dict: dict) -> str:
    """The figure as a small PNG, in base64. Raises what plotly and kaleido raise, for want of a browser above all."""
    import plotly.io as pio

    photo = holds_photographs(fig_dict)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The kopts argument")  # plotly gives it, kaleido's server needs none
        data = pio.to_image(fig_dict, format="png", scale=PHOTO_SCALE if photo else 1, validate=False)
    return base64.b64encode(photo_png(data) if photo else small_png(data)).decode()


def holds_photographs(fig_dict: dict) -> bool:
    """Whether the dict of a plotly figure has images in its layout."""
    return bool(fig_dict.get("layout", {}).get("images"))


# ---- twice the pixels, and the same size ----

_hooked = False


def _show_in_half_size() -> None:
    """Have the kernel say how wide a PNG of twice the pixels is to be shown: a bundle of data cannot."""
    global _hooked
    try:
        from IPython import get_ipython
    except ImportError:
        return
    register = getattr(getattr(get_ipython(), "display_pub", None), "register_hook", None)
    if register is not None and not _hooked:
        register(with_size)
        _hooked = True


def with_size(message: dict) -> dict:
    """A message of the kernel that shows a figure with photographs says how large its PNG is to be shown: as the figure
    is. Others stay as they are."""
    content = message.get("content", {})
    data = content.get("data", {})
    figure = data.get(FIGURE)
    if PNG in data and isinstance(figure, dict) and holds_photographs(figure):
        size = {side: figure["layout"][side] for side in ("width", "height") if side in figure["layout"]}
        content["metadata"] = {**content.get("metadata", {}), **({PNG: size} if len(size) == 2 else {})}
    return message


class _Picture:
    """A PNG, or, from the first time on that none can be drawn, HTML with scripts. plotly.js is 5 MB: it stands once
    in the notebook, before the first such figure, and every page made of the notebook carries it along."""

    def __init__(self):
        self.scripts = self.warm = False

    def __call__(self, fig_dict: dict) -> dict:
        if not self.scripts:
            try:
                found = {PNG: _png(fig_dict)}
            except Exception as error:  # no kaleido, no browser, or one that does not start: each says so in its way
                self.begin_html(str(error).strip().partition("\n")[0] or type(error).__name__)
            else:
                self.keep_browser()
                return found
        import plotly.io as pio

        parts = {"include_plotlyjs": False, "include_mathjax": False, "full_html": False}
        return {"text/html": pio.to_html(fig_dict, validate=False, **parts)}

    def keep_browser(self) -> None:
        """Leave the browser running until the kernel ends: starting one takes seconds, a picture a fifth of one."""
        import kaleido

        if not self.warm and hasattr(kaleido, "start_sync_server"):  # older ones keep theirs anyway
            kaleido.start_sync_server(silence_warnings=True)
        self.warm = True

    def begin_html(self, why: str) -> None:
        from IPython.display import display
        from plotly.offline import get_plotlyjs

        self.scripts = True
        print(f"Figures are kept as HTML (5 MB once), since no PNG could be drawn: {why}", file=sys.stderr)
        # a page may have a module loader, which plotly.js would go to; here it shall define window.Plotly
        script = f"(function(define, module, exports) {{{get_plotlyjs()}\n}}).call(window);"
        display({"text/html": f"<script>{script}</script>", "text/plain": ""}, raw=True)
