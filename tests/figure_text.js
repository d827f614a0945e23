// What stands in a drawn figure as text: [] if every text can be read, else what is wrong, in words. Boxes may be turned.
(box) => {
  const area = box.querySelector(".main-svg").getBoundingClientRect();

  function corners(text) {
    const found = text.getBBox(), matrix = text.getScreenCTM(), size = parseFloat(getComputedStyle(text).fontSize);
    const over = size * 0.17; // a line's box is higher than its letters
    const left = found.x + 1, right = found.x + found.width - 1, top = found.y + over, foot = found.y + found.height - over;
    return [[left, top], [right, top], [right, foot], [left, foot]].map(([x, y]) => {
      const point = new DOMPoint(x, y).matrixTransform(matrix);
      return [point.x, point.y];
    });
  }

  function apart(one, other) { // along a side of one of the two
    return [one, other].some((shape) => [0, 1].some((side) => {
      const [a, b] = [shape[side], shape[side + 1]];
      const along = ([x, y]) => x * (b[0] - a[0]) + y * (b[1] - a[1]);
      const [p, q] = [one.map(along), other.map(along)];
      return Math.max(...p) <= Math.min(...q) || Math.max(...q) <= Math.min(...p);
    }));
  }

  function window_of(text) { // the part of the page outside of which the text is not drawn
    for (let above = text.parentElement; above && above !== box; above = above.parentElement) {
      const name = /#([^"')]+)/.exec(above.getAttribute?.("clip-path") ?? "");
      const rect = name && document.getElementById(name[1])?.querySelector("rect");
      if (!rect) continue;
      const matrix = above.getScreenCTM(), [x, y] = [rect.x.baseVal.value, rect.y.baseVal.value];
      const from = new DOMPoint(x, y).matrixTransform(matrix);
      const to = new DOMPoint(x + rect.width.baseVal.value, y + rect.height.baseVal.value).matrixTransform(matrix);
      return { left: from.x, top: from.y, right: to.x, bottom: to.y };
    }
    return area;
  }

  function visible(text) {
    for (let one = text; one && one !== box; one = one.parentElement) {
      const style = getComputedStyle(one);
      if (style.display === "none" || style.visibility === "hidden" || style.opacity === "0" || style.fillOpacity === "0") return false;
    }
    return text.textContent.trim() !== "" && !/,\s*0\)$/.test(getComputedStyle(text).fill);
  }

  const texts = [...box.querySelectorAll(".main-svg text")].filter(visible);
  const shapes = texts.map(corners), names = texts.map((text) => `"${text.textContent.trim().slice(0, 60)}"`);
  const wrong = [];
  shapes.forEach((shape, i) => {
    const seen = window_of(texts[i]);
    const out = shape.some(([x, y]) => x < seen.left - 1 || x > seen.right + 1 || y < seen.top - 1 || y > seen.bottom + 1);
    if (out) wrong.push(`${names[i]} is cut off`);
    for (let j = 0; j < i; j++) {
      const twice = names[i] === names[j] && Math.hypot(shape[0][0] - shapes[j][0][0], shape[0][1] - shapes[j][0][1]) < 1;
      if (!twice && !apart(shape, shapes[j])) wrong.push(`${names[i]} stands over ${names[j]}`);
    }
  });
  return wrong;
}
