// What all widgets share. Each module that Jupyter loads is this file followed by the widget's own.
// Text from models and data sets enters the page as text nodes and attribute values only, never as HTML.

const SVG = "http://www.w3.org/2000/svg";
const HIDDEN = /[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e0fff}]/gu;

// What cannot be seen as its code point, such as ‹U+001B›; the report's `visible` in other words
export const visible = text => String(text).replaceAll("\r\n", "\n")
  .replace(HIDDEN, c => `‹U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);

// An error belongs in the widget, where its reader is, and not only in the console.
const report = (node, error) => {
  const alert = node.closest(".wikidpo").querySelector("[role=alert]");
  alert.textContent = visible(error.message ?? error);
  alert.hidden = false;
};

// Lab takes keys such as the arrows away from whatever has the focus, unless that element itself objects.
const FOCUSABLE = ["button", "input", "select", "summary"];

const put = (node, attributes, children) => {
  if (FOCUSABLE.includes(node.localName) || "tabindex" in attributes) node.setAttribute("data-lm-suppress-shortcuts", "true");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), event => { try { value(event); } catch (e) { report(node, e); } });
    else if (typeof value == "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat());
  return node;
};
const h = (tag, attributes = {}, ...children) => put(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => put(document.createElementNS(SVG, tag), attributes, children);

// A kernel that is restarted cuts the model's channel, one that dies changes its status, one that is shut down is disposed of.
const whenGone = (model, tell) => {
  model.on("comm_live_update", tell);
  const kernel = model.widget_manager?.kernel;
  kernel?.statusChanged?.connect((_, status) => { if (["dead", "terminating", "restarting", "autorestarting"].includes(status)) tell(); });
  kernel?.disposed?.connect(tell);
};

// The widget's frame: a labelled section with a place for errors
const mount = (model, el, label) => {
  const alert = h("p", { role: "alert", class: "error", hidden: true });
  const root = h("section", { class: "wikidpo", "aria-label": label }, alert);
  const show = () => { alert.textContent = visible(model.get("error")); alert.hidden = !model.get("error"); };
  model.on("change:error", show);
  el.append(root);
  whenGone(model, () => {
    root.querySelector(".gone") ?? root.prepend(h("p", { role: "status", class: "gone" }, "The kernel has stopped. This is the widget's last state: what is drawn here in the browser still moves, the rest does not. Run its cell again to go on."));
  });
  show();
  return root;
};

// Whether a key scrolls the long text that has the focus
const SCROLLING = ["ArrowDown", "ArrowUp", "PageDown", "PageUp", "Home", "End"];
const scrolls = e => SCROLLING.includes(e.key) && e.target.closest(".text") !== null;

const send = (model, values) => { for (const [name, value] of Object.entries(values)) model.set(name, value); model.save_changes(); };
const fixed = (x, digits = 2) => Number.isFinite(x) ? (Math.abs(x) < .5 * 10 ** -digits ? 0 : x).toFixed(digits).replace("-", "−") : "–";
const minus = x => String(x).replace("-", "−");
const tick = t => minus(t && Math.abs(t) < 1e-3 ? (+t.toPrecision(4)).toExponential() : +t.toPrecision(4));
const count = n => n.toLocaleString("en");
// Float32 as base64: not every front end passes bytes on, and a page without a kernel has text only.
const floats = text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);

// --- charts

const scale = (d0, d1, r0, r1) => x => r0 + (x - d0) / (d1 - d0 || 1) * (r1 - r0);
const ticks = (lo, hi, n = 5) => {
  const raw = (hi - lo) / n || 1, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find(m => m * power >= raw) * power;
  return Array.from({ length: Math.floor(hi / step + 1e-9) - Math.ceil(lo / step - 1e-9) + 1 }, (_, i) => (Math.ceil(lo / step - 1e-9) + i) * step);
};
const padded = values => { const lo = Math.min(...values), hi = Math.max(...values), pad = .05 * (hi - lo || Math.abs(hi) || 1); return [lo - pad, hi + pad]; };
const path = (xs, ys) => { // breaks where a value is missing
  let d = "", pen = "M";
  for (let i = 0; i < xs.length; i++) {
    if (!Number.isFinite(ys[i])) { pen = "M"; continue; }
    d += `${pen}${xs[i].toFixed(1)} ${Math.max(-1e4, Math.min(1e4, ys[i])).toFixed(1)}`;
    pen = "L";
  }
  return d;
};
let serial = Math.floor(1e9 * Math.random()); // the modules of one page may load in the same millisecond

// A plot area in an SVG: its scales, a clipped group to draw in, its axes and its title. What stands under and beside the
// area keeps its distance in em, for text is larger where the SVG is drawn small (style.css).
const plot = (box, xr, yr, { title = "", xlabel = "" } = {}) => {
  const [left, top, width, height] = box, id = `wikidpo-clip-${Date.now()}-${serial++}`;
  const x = scale(...xr, left, left + width), axis = s("g", { class: "axis" }), inner = s("g", { "clip-path": `url(#${id})` });
  const area = { x, inner, node: s("g", {}, s("clipPath", { id }, s("rect", { x: left, y: top, width, height })), axis, inner) };
  area.setY = (lo, hi) => {
    area.y = scale(lo, hi, top + height, top);
    axis.replaceChildren(
      s("text", { x: left, y: top - 6, class: "title" }, title),
      s("text", { x: left + width, y: top + height, dy: "2.55em", "text-anchor": "end" }, xlabel),
      s("path", { d: `M${left} ${top}v${height}h${width}` }),
      ...ticks(lo, hi, Math.max(2, Math.round(height / 40))).map(t => s("text", { x: left - 5, y: area.y(t), dy: ".36em", "text-anchor": "end" }, tick(t))),
      ...(xlabel ? ticks(...xr, Math.round(width / 80)).map(t => s("text", { x: x(t), y: top + height, dy: "1.27em", "text-anchor": "middle" }, tick(t))) : []));
  };
  area.setY(...yr);
  return area;
};
