// Draws every figure of a page from the JSON beside it, and moves its slider if it has one. plotly.js is loaded before
// this file; the pictures of a slider are loaded when it is first moved.
"use strict";

const LEAST = 700; // px: narrower, and legends and labels leave nothing of a plot; it is scrolled sideways instead
const OPTIONS = { displaylogo: false, responsive: false, showLink: false };
const darkness = matchMedia("(prefers-color-scheme: dark)");
const PAPER = [31, 36, 42]; // of a figure in the dark, --raised in style.css

// ---- figures in the dark: greys turn over, colours stay ----

const GREY = /^#([0-9a-f]{3}|[0-9a-f]{6})$|^rgba?\(\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*(?:,\s*([\d.]+)\s*)?\)$/i;
const NAMED = { white: "#ffffff", black: "#000000", gray: "#808080", grey: "#808080", lightgray: "#d3d3d3", lightgrey: "#d3d3d3" };

function turned(text) {
  const match = GREY.exec(NAMED[text.toLowerCase()] ?? text);
  if (!match) return text;
  const hex = match[1] && (match[1].length === 3 ? [...match[1]].map((c) => c + c).join("") : match[1]);
  const rgb = hex ? [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)) : match.slice(2, 5).map(Number);
  if (Math.max(...rgb) - Math.min(...rgb) > 14) return text; // a colour
  const light = (rgb[0] + rgb[1] + rgb[2]) / 765; // white becomes paper, black nearly white
  const out = PAPER.map((dark) => Math.round(dark + (1 - light) * (236 - dark)));
  return `rgba(${out.join(",")},${match[5] ?? 1})`;
}

function inDark(value, key = "") {
  if (typeof value === "string") return /color|bgcolor|fill/i.test(key) || key === "scale" ? turned(value) : value;
  if (Array.isArray(value)) {
    if (/color/i.test(key) && !/scale|axis/i.test(key) && value.some((v) => typeof v === "number")) return value;
    return value.map((part) => inDark(part, /colorscale/i.test(key) ? "scale" : key));
  }
  if (value === null || typeof value !== "object" || value.bdata) return value;
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, inDark(part, name)]));
}

function prepared(spec, template) {
  const whole = { data: spec.data, layout: { ...spec.layout, template: spec.layout.template ?? template } };
  return darkness.matches ? inDark(structuredClone(whole)) : structuredClone(whole);
}

// ---- drawing ----

function fit(layout, box) {
  // No wider than the page. The height stays, so that the text does not jump.
  const room = box.parentElement.clientWidth - 16; // without the paddings
  return { ...layout, width: Math.min(layout.width || 700, Math.max(room, LEAST)) };
}

class Figure {
  constructor(figure) {
    this.figure = figure;
    this.box = figure.querySelector(".drawing");
    this.spec = JSON.parse(figure.querySelector("script").textContent);
    this.template = this.spec.layout.template;
    darkness.addEventListener("change", () => this.draw());
    this.draw().then(() => new ResizeObserver(() => this.resize()).observe(figure));
  }

  async draw() {
    const { data, layout } = prepared(this.spec, this.template);
    try {
      await Plotly.react(this.box, data, fit(layout, this.box), OPTIONS);
      this.figure.dataset.drawn = "yes";
    } catch (error) {
      this.figure.dataset.drawn = "no";
      console.error(error);
    }
  }

  resize() {
    const width = fit(this.spec.layout, this.box).width;
    if (width !== this.box.layout?.width) Plotly.relayout(this.box, { width });
  }

  show(frame) {
    this.spec = frame;
    this.box.style.height = `${frame.layout.height || 420}px`;
    return this.draw();
  }
}

class Words {
  constructor(figure) { this.box = figure.querySelector(".shown"); }

  show(frame) {
    if (typeof frame === "string") {
      const text = document.createElement("pre");
      Object.assign(text, { textContent: frame, tabIndex: 0 });
      this.box.replaceChildren(text);
    } else {
      this.box.innerHTML = frame.html; // a table, as ragged/course/site/tables.py lets it through
    }
  }
}

// ---- sliders ----

const HOME = document.querySelector("script[data-home]").dataset.home;
const loading = new Map();

function frames(place) {
  if (!loading.has(place)) {
    loading.set(place, new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = `${HOME}/${place}`;
      script.onload = () => done(window.FRAMES[place]);
      script.onerror = () => { loading.delete(place); failed(new Error(`${place} is missing`)); };
      document.head.append(script);
    }));
  }
  return loading.get(place);
}

function slide(figure, drawn) {
  const control = figure.querySelector(".slider");
  const input = control.querySelector("input"), said = control.querySelector("output");
  const stops = JSON.parse(input.dataset.stops);
  control.hidden = false;
  const name = () => { said.textContent = stops[input.value]; input.setAttribute("aria-valuetext", stops[input.value]); };
  name();
  input.addEventListener("input", async () => {
    name();
    const wanted = input.value;
    try {
      const all = await frames(figure.dataset.frames);
      if (wanted !== input.value) return; // moved on meanwhile
      await drawn.show(all[wanted]);
      figure.dataset.stop = wanted;
    } catch (error) {
      said.textContent = error.message;
    }
  });
}

for (const figure of document.querySelectorAll("figure")) {
  const drawn = figure.querySelector(".drawing") ? new Figure(figure) : new Words(figure);
  if (figure.dataset.frames) slide(figure, drawn);
}
