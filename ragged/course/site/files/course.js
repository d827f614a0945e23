// Search over all sections of the course, without a server. The words are loaded when somebody first looks for something.
"use strict";

const home = document.currentScript.dataset.home;
const form = document.querySelector("form[role=search]");
const found = document.getElementById("found");
const MOST = 12;

function load(src) {
  return new Promise((done, failed) => {
    const script = document.createElement("script");
    Object.assign(script, { src, onload: done, onerror: () => failed(new Error(`${src} is missing`)) });
    document.head.append(script);
  });
}

function plain(text) {
  return text.toLowerCase().normalize("NFKD").replace(/[\u0300-\u036f]/g, "");
}

function look(words) {
  // Every word has to be somewhere in a section; words in its heading count most, early ones in the text a little.
  const terms = plain(words).split(/\s+/).filter(Boolean);
  if (!terms.length) return [];
  const scored = [];
  for (const section of window.SECTIONS) {
    const title = plain(section.title), text = plain(section.text), lesson = plain(section.lesson);
    let score = 0;
    for (const term of terms) {
      const at = text.indexOf(term);
      if (title.includes(term)) score += 20;
      else if (lesson.includes(term)) score += 4;
      else if (at < 0) { score = -1; break; }
      if (at >= 0) score += 3 - Math.min(2, at / 500) + Math.min(3, text.split(term).length - 2);
    }
    if (score > 0) scored.push({ section, score: section.page.startsWith("solutions/") ? score - 8 : score, terms });
  }
  return scored.sort((a, b) => b.score - a.score).slice(0, MOST);
}

function around(text, term) {
  const at = Math.max(0, plain(text).indexOf(term));
  const from = Math.max(0, at - 50);
  return (from ? "… " : "") + text.slice(from, at + 110) + (at + 110 < text.length ? " …" : "");
}

function show(results, words) {
  found.replaceChildren();
  found.hidden = !words.trim();
  if (found.hidden) return;
  if (!results.length) found.append(`Nothing is called “${words.trim()}” here.`);
  const list = document.createElement("ol");
  for (const { section, terms } of results) {
    const item = document.createElement("li"), link = document.createElement("a"), text = document.createElement("span");
    link.href = `${home}/${section.page}${section.anchor ? "#" + section.anchor : ""}`;
    link.textContent = section.title === section.lesson ? section.lesson : `${section.lesson} › ${section.title}`;
    text.textContent = around(section.text, terms[0]);
    item.append(link, text);
    list.append(item);
  }
  if (results.length) found.append(list);
}

if (form) {
  const input = form.querySelector("input");
  form.hidden = false;
  let words = null; // the promise of the sections
  const search = async () => {
    words ??= load(`${home}/assets/search.js`);
    try {
      await words;
      show(look(input.value), input.value);
    } catch (error) {
      words = null;
      found.hidden = false;
      found.textContent = `The search does not work: ${error.message}.`;
    }
  };
  input.addEventListener("input", search);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    found.querySelector("a")?.click();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { input.value = ""; show([], ""); input.blur(); }
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
    if (event.key === "/" && !typing) { event.preventDefault(); input.focus(); }
  });
  found.addEventListener("click", (event) => { if (event.target.closest("a")) found.hidden = true; });
}

// On a narrow page the contents stand above the text, closed.
const contents = document.querySelector(".contents");
if (contents && matchMedia("(max-width: 75rem)").matches) contents.open = false;
// The section that is read is marked in the contents: the last whose heading is in the upper third or above, and at the
// end of the page the last of all.
if (contents) {
  const links = [...contents.querySelectorAll("a")];
  const headings = links.map((link) => document.getElementById(decodeURIComponent(link.hash.slice(1))));
  let waiting = false;
  const mark = () => {
    waiting = false;
    const end = scrollY > 0 && scrollY + innerHeight >= document.documentElement.scrollHeight - 2;
    const line = end ? innerHeight : innerHeight / 3;
    const now = headings.findLastIndex((heading) => heading && heading.getBoundingClientRect().top < line);
    links.forEach((link, at) => at === now ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));
    const list = contents.parentElement, link = links[now];
    if (link && list.scrollHeight > list.clientHeight) { // a long list follows; the page itself is left where it is
      const top = link.offsetTop - list.offsetTop;
      if (top < list.scrollTop || top > list.scrollTop + list.clientHeight - 40) list.scrollTop = top - list.clientHeight / 2;
    }
  };
  const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(mark); } };
  addEventListener("scroll", later, { passive: true });
  addEventListener("resize", later);
  mark();
}
