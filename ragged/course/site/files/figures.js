// Draws every figure of a page from the JSON beside it. plotly.js is loaded before this file; nothing else is fetched.
"use strict";

const LEAST = 600; // px: narrower, and legends and labels leave nothing of a plot; it is scrolled sideways instead

function fit(spec, box) {
  // No wider than the page. The height stays, so that the text does not jump.
  const layout = structuredClone(spec.layout);
  const wanted = layout.width || 700;
  const room = box.parentElement.clientWidth - 16; // without the paddings
  layout.width = Math.min(wanted, Math.max(room, LEAST));
  return layout;
}

for (const figure of document.querySelectorAll("figure")) {
  const box = figure.querySelector(".drawing");
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const options = { displaylogo: false, responsive: false, showLink: false };
  Plotly.newPlot(box, spec.data, fit(spec, box), options)
    .then(() => {
      figure.dataset.drawn = "yes";
      new ResizeObserver(() => {
        const width = fit(spec, box).width;
        if (width !== box.layout.width) Plotly.relayout(box, { width });
      }).observe(figure);
    })
    .catch((error) => { figure.dataset.drawn = "no"; console.error(error); });
}
