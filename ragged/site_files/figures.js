// Draws every figure of a page from the JSON beside it. plotly.js is loaded before this file; nothing else is fetched.
"use strict";

function fit(spec, box) {
  // Never wider than the page. The height stays, so that the text does not jump.
  const layout = structuredClone(spec.layout);
  layout.width = Math.min(layout.width || 700, box.clientWidth || 700); // 0 while nothing is laid out
  return layout;
}

for (const figure of document.querySelectorAll("figure")) {
  const box = figure.querySelector(".drawing");
  const spec = JSON.parse(figure.querySelector("script").textContent);
  box.style.maxWidth = (spec.layout.width || 700) + "px";
  const options = { displaylogo: false, responsive: false, showLink: false };
  Plotly.newPlot(box, spec.data, fit(spec, box), options)
    .then(() => {
      figure.dataset.drawn = "yes";
      new ResizeObserver(() => {
        const width = fit(spec, box).width;
        if (width !== box.layout.width) Plotly.relayout(box, { width });
      }).observe(box);
    })
    .catch((error) => { figure.dataset.drawn = "no"; console.error(error); });
}
