// The loss, its slope and the gradient weight over the margins of real pairs, redrawn in the browser while beta moves.

const LOSSES = { dpo: "DPO", cdpo: "cDPO", robust: "robust", ipo: "IPO", hinge: "hinge" };
const SMOOTHED = ["cdpo", "robust"];
const [LEFT, WIDTH, CURVE] = [48, 660, 221]; // viewBox units, points of a curve
const LOW = Math.log10(.01), HIGH = Math.log10(10);

function render({ model, el }) {
  const root = mount(model, el, "The loss and the leash: beta slider"), zs = floats(model.get("margins"));
  const reach = zs.reduce(([lo, hi], z) => [Math.min(lo, z), Math.max(hi, z)], [-20, 40]);
  const range = [Math.floor(reach[0] / 10) * 10, Math.ceil(reach[1] / 10) * 10];
  const grid = Array.from({ length: CURVE }, (_, i) => range[0] + (range[1] - range[0]) * i / (CURVE - 1));

  // controls
  const rangeInput = (label, min, max, more) =>
    h("input", { type: "range", min, max, step: .01, "aria-label": label, oninput: drag, onchange: commit, ...more });
  const beta = rangeInput("beta", LOW, HIGH);
  const smoothing = rangeInput("smoothing", .01, .49, { value: .1 });
  const moved = new Set(); // sliders, since Python last said where they stand
  for (const slider of [beta, smoothing]) {
    for (const event of ["input", "change"]) slider.addEventListener(event, () => { moved.add(slider); }, true);
  }
  const smoothed = h("label", {}, "smoothing ε ", smoothing);
  const group = `wikidpo-loss-${Date.now()}-${serial++}`;
  const types = Object.entries(LOSSES).map(([value, name]) =>
    h("label", {}, h("input", { type: "radio", name: group, value, onchange: commit }), name));
  const [betaOut, retiredOut, meanOut] = ["beta", "retired", "mean"].map(name => h("b", { "data-readout": name }));

  // drawing: what does not depend on beta is drawn once
  const top = plot([LEFT, 24, WIDTH, 170], range, [0, 3], { title: "loss of a pair" });
  const data = plot([LEFT, 220, WIDTH, 60], range, [0, 1]);
  const low = plot([LEFT, 322, WIDTH, 120], range, [-1, 1],
    { title: "gradient weight (solid) and slope of the loss (dashed)", xlabel: "margin z (nats)" });
  const bins = new Uint32Array(60), columns = new Set();
  for (const z of zs) {
    bins[Math.min(59, Math.floor((z - range[0]) / (range[1] - range[0]) * 60))]++;
    columns.add(Math.round(data.x(z)));
  }
  const tallest = Math.max(1, ...bins);
  data.setY(0, tallest);
  const bar = (n, i) =>
    s("rect", { class: "bar", x: LEFT + i * WIDTH / 60, width: WIDTH / 60 - 1, y: data.y(n), height: data.y(0) - data.y(n) });
  bins.forEach((n, i) => n && data.inner.append(bar(n, i)));
  const rug = s("path", { class: "rug", d: [...columns].map(c => `M${c} 281v8`).join("") });
  const zone = s("rect", { class: "zone", y: 24, height: 418 });
  const zoneText = s("text", { class: "note", y: 36, "text-anchor": "end" }, "retired");
  const [lossLine, pullLine, slopeLine] = ["blue", "red", "blue dashed"].map(style => s("path", { class: `line ${style}` }));
  top.inner.append(lossLine);
  low.inner.append(s("path", { class: "rule", d: `M${LEFT} ${low.y(0)}h${WIDTH}` }), slopeLine, pullLine);
  const svg = s("svg", { viewBox: "0 0 720 476", role: "img", "aria-label": "Loss, slope and gradient weight against the margin" },
    zone, zoneText, top.node, data.node, low.node, rug,
    s("text", { class: "title", x: LEFT, y: 214 }, `${count(zs.length)} pairs`));

  root.append(
    h("div", { class: "row" }, h("label", { class: "wide" }, "β ", beta), h("span", {}, "β = ", betaOut),
      h("span", {}, "retired pairs ", retiredOut), h("span", {}, "mean gradient weight ", meanOut)),
    h("div", { class: "row", role: "radiogroup", "aria-label": "loss" }, ...types, smoothed),
    svg);

  function state() { // what the controls say, in the terms of wikidpo.core.loss
    const name = root.querySelector(":checked").value;
    return {
      beta: moved.has(beta) ? +(10 ** beta.value).toPrecision(3) : model.get("beta"), // a slider knows only steps
      loss_type: name == "cdpo" ? "dpo" : name,
      label_smoothing: SMOOTHED.includes(name) ? !moved.has(smoothing) && model.get("label_smoothing") || +smoothing.value : 0,
    };
  }
  function draw({ beta: b, loss_type, label_smoothing }) {
    const losses = grid.map(z => loss(z, b, loss_type, label_smoothing));
    const pulls = grid.map(z => pull(z, b, loss_type, label_smoothing)), xs = grid.map(top.x);
    if (loss_type == "ipo") top.setY(0, losses[0]);
    else if (draw.loss_type != loss_type) top.setY(loss_type == "robust" ? -1 : 0, 3); // robust falls below 0
    draw.loss_type = loss_type;
    lossLine.setAttribute("d", path(xs, losses.map(top.y)));
    pullLine.setAttribute("d", path(xs, pulls.map(low.y)));
    slopeLine.setAttribute("d", path(xs, grid.map(z => low.y(slope(z, b, loss_type, label_smoothing)))));
    const inside = xs.filter((_, i) => hasRetired(grid[i], b, loss_type, label_smoothing)), x0 = inside[0] ?? LEFT, x1 = inside.at(-1) ?? LEFT;
    zone.setAttribute("x", x0);
    zone.setAttribute("width", Math.max(0, x1 - x0));
    zoneText.setAttribute("x", x1 - 4);
    zoneText.setAttribute("visibility", x1 - x0 > 50 ? "visible" : "hidden");
    const { retired, mean } = summary(zs, b, loss_type, label_smoothing);
    betaOut.textContent = `${+b.toPrecision(3)}`;
    retiredOut.textContent = `${count(retired)} of ${count(zs.length)}`;
    meanOut.textContent = fixed(mean, 3);
    beta.setAttribute("aria-valuetext",
      `beta ${betaOut.textContent}, ${retiredOut.textContent} pairs retired, mean gradient weight ${meanOut.textContent}`);
    smoothed.hidden = !(label_smoothing > 0);
  }
  function drag() { draw(state()); }
  function commit() { drag(); send(model, state()); }
  function read() { // what Python says
    const [b, loss_type, label_smoothing] = ["beta", "loss_type", "label_smoothing"].map(name => model.get(name));
    beta.value = Math.log10(b);
    moved.clear();
    if (label_smoothing) smoothing.value = label_smoothing;
    const checked = loss_type == "dpo" && label_smoothing ? "cdpo" : loss_type;
    for (const radio of root.querySelectorAll("[type=radio]")) radio.checked = radio.value == checked;
    draw({ beta: b, loss_type, label_smoothing });
  }
  model.on("change:beta change:loss_type change:label_smoothing", read);
  read();
}
export default { render };
