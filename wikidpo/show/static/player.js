// Scrub through a finished run: its curves with a cursor, and some of its pairs as points that slide along the loss.

const [W, H] = [236, 122]; // of a panel, in viewBox units

function render({ model, el }) {
  const root = mount(model, el, "Run player"), run = model.get("run");
  const { steps, panels, margin_steps: logged } = run;
  const lossOf = z => loss(z, run.beta, run.loss_type, run.label_smoothing);
  const isRetired = z => hasRetired(z, run.beta, run.loss_type, run.label_smoothing);
  const z = floats(model.get("margins")), pairs = logged.length ? z.length / logged.length : 0;
  const slider = h("input", { type: "range", min: 0, max: steps.length - 1, step: 1, "aria-label": "step",
    oninput: () => draw(+slider.value), onchange: () => send(model, { step: steps[slider.value] }) });
  const button = h("button", { onclick: play }, "play");
  const [stepOut, retiredOut] = ["step", "retired"].map(name => h("b", { "data-readout": name }));
  let timer = null;

  const curves = h("div", { class: "panels", role: "img", "aria-label": "curves of the run" });
  const numeral = x => x !== 0 && Math.abs(x) < .001 ? x.toExponential(1) : fixed(x ?? NaN, 3);
  const valueAt = (values, i) => numeral(values.slice(0, i + 1).findLast(v => v !== null)); // the last one measured
  const cursors = panels.map(({ title, lines, rule }) => {
    const values = [...lines.flatMap(l => l.values), ...rule === null ? [] : [rule]].filter(Number.isFinite);
    const [x0, y0, width, height] = [44, 22, W - 56, H - 46];
    const area = plot([x0, y0, width, height], [steps[0], steps.at(-1)], padded(values), { title });
    if (rule !== null) {
      area.inner.append(s("path", { class: "rule", d: `M${x0} ${area.y(rule)}h${width}`, "stroke-dasharray": "2 3" }));
    }
    lines.forEach(({ values }, i) => {
      // held-out pairs are measured now and then
      const known = steps.map((_, k) => k).filter(k => values[k] !== null);
      const d = path(known.map(k => area.x(steps[k])), known.map(k => area.y(values[k])));
      const dot = known.length == 1 ? "h0" : ""; // with round ends, a line without length is a point
      area.inner.append(s("path", { class: `line ${i ? "red dashed" : "blue"}`, d: d + dot, "stroke-linecap": dot ? "round" : "butt" }));
    });
    const cursor = s("path", { class: "cursor" }), now = s("text", { x: 8, y: y0 + height, dy: "1.27em", class: "note" });
    area.inner.append(cursor);
    curves.append(s("svg", { viewBox: `0 0 ${W} ${H}` }, area.node, now));
    return i => {
      cursor.setAttribute("d", `M${area.x(steps[i])} ${y0}v${height}`);
      now.textContent = lines.map(l => `${l.label} ${valueAt(l.values, i)}`).join(", ");
    };
  });

  const points = s("svg", { viewBox: "0 0 720 226", role: "img", "aria-label": "pairs on the loss curve" }), dots = [];
  let field;
  if (pairs) {
    const reach = z.reduce(([lo, hi], v) => [Math.min(lo, v), Math.max(hi, v)], [-5, 5]);
    const grid = Array.from({ length: 121 }, (_, i) => reach[0] + (reach[1] - reach[0]) * i / 120), losses = grid.map(lossOf);
    field = plot([48, 24, 660, 158], reach, padded(losses),
      { title: `${pairs} pairs on the loss; a retired one is drawn hollow`, xlabel: "margin z (nats)" });
    field.inner.append(s("path", { class: "line blue", d: path(grid.map(field.x), losses.map(field.y)) }));
    for (let i = 0; i < pairs; i++) dots.push(s("circle", { class: "dot", r: 4 }));
    field.inner.append(...dots);
    points.append(field.node);
  }
  const marginAt = (i, step) => { // on the straight line between the two logged steps around this one
    const after = logged.findIndex(x => x >= step), hi = after < 0 ? logged.length - 1 : after, lo = Math.max(0, hi - 1);
    const t = hi == lo ? 0 : Math.min(1, Math.max(0, (step - logged[lo]) / (logged[hi] - logged[lo])));
    return z[lo * pairs + i] * (1 - t) + z[hi * pairs + i] * t;
  };
  function draw(i) {
    slider.value = i;
    cursors.forEach(move => move(i));
    let retired = 0;
    dots.forEach((dot, k) => {
      const v = marginAt(k, steps[i]), out = isRetired(v);
      dot.setAttribute("cx", field.x(v));
      dot.setAttribute("cy", field.y(lossOf(v)));
      dot.classList.toggle("retired", out);
      retired += out;
    });
    stepOut.textContent = `${steps[i]} of ${steps.at(-1)}`;
    slider.setAttribute("aria-valuetext", `step ${stepOut.textContent}`);
    retiredOut.textContent = pairs ? `${retired} of ${pairs}` : "no margins logged";
  }
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  function play() {
    if (timer) { stop(); return send(model, { step: steps[slider.value] }); }
    if (+slider.value == steps.length - 1) draw(0);
    button.textContent = "pause";
    timer = setInterval(() => {
      if (!root.isConnected || +slider.value == steps.length - 1) { stop(); send(model, { step: steps[slider.value] }); }
      else draw(+slider.value + 1);
    }, Math.max(30, 6000 / steps.length));
  }
  const read = () => draw(Math.max(0, steps.indexOf(model.get("step"))));
  root.append(
    h("div", { class: "row" }, button, h("label", { class: "wide" }, "step ", slider), stepOut,
      h("span", {}, "retired pairs ", retiredOut)),
    curves, ...pairs ? [points] : []);
  model.on("change:step", read);
  read();
  return stop;
}
export default { render };
