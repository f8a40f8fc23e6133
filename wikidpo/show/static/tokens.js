// Every token of an answer with the reward it earns, and the running sum. Python computes; each change is one request.

const SIDES = ["chosen", "rejected"];

function render({ model, el }) {
  const root = mount(model, el, "Token view"), lists = {}, sums = {};
  const total = () => model.get("total"), go = by => send(model, { position: Math.max(0, Math.min(total() - 1, model.get("position") + by)) });
  const checkpoint = h("select", { "aria-label": "checkpoint", onchange: () => send(model, { checkpoint: checkpoint.value }) },
    ...model.get("checkpoints").map(name => h("option", { value: name }, visible(name))));
  const number = h("input", { type: "number", min: 1, max: total(), "aria-label": "pair", onchange: () => go(Math.round(number.value) - 1 - model.get("position")) });
  const margin = h("b", { "data-readout": "margin" }), prompt = h("p", { class: "text" }), chart = h("div");
  for (const side of SIDES) { lists[side] = h("ol", { class: "tokens", "aria-label": `${side}, tokens with rewards`, "data-side": side }); sums[side] = h("b", { "data-readout": side }); }

  root.append(
    h("div", { class: "row" }, h("label", {}, "checkpoint ", checkpoint), h("button", { onclick: () => go(-1) }, "previous"), h("label", {}, "pair ", number, ` of ${count(total())}`),
      h("button", { onclick: () => go(1) }, "next"), h("span", {}, "margin β z = ", margin)),
    prompt,
    h("div", { class: "sides" }, ...SIDES.map(side => h("div", {}, h("h4", {}, `${side}: reward `, sums[side]), lists[side]))),
    chart);

  function show() {
    const data = model.get("data");
    number.value = model.get("position") + 1;
    checkpoint.value = model.get("checkpoint");
    prompt.replaceChildren(h("b", {}, "prompt: "), h("bdi", {}, visible(data.prompt)));
    const reach = Math.max(1e-6, ...SIDES.flatMap(side => data[side].rewards.map(Math.abs))), runs = {};
    for (const side of SIDES) {
      const { tokens, rewards } = data[side];
      lists[side].replaceChildren(...tokens.map((token, i) => {
        const r = rewards[i], share = Math.round(60 * Math.abs(r) / reach);
        return h("li", { title: `running sum ${fixed(rewards.slice(0, i + 1).reduce((a, b) => a + b, 0), 3)}`, style: `background: color-mix(in srgb, var(${r < 0 ? "--red" : "--blue"}) ${share}%, transparent)` },
          h("b", {}, visible(token)), h("small", {}, (r >= .005 ? "+" : "") + fixed(r)));
      }));
      let sum = 0;
      runs[side] = [0, ...rewards.map(r => sum += r)];
      sums[side].textContent = fixed(sum, 3);
    }
    margin.textContent = fixed(runs.chosen.at(-1) - runs.rejected.at(-1), 3);
    const all = [...runs.chosen, ...runs.rejected], n = Math.max(runs.chosen.length, runs.rejected.length) - 1;
    const area = plot([48, 22, 650, 110], [0, n], padded(all), { title: "reward so far: chosen solid, rejected dashed", xlabel: "tokens" });
    area.inner.append(s("path", { class: "rule", d: `M48 ${area.y(0)}h650` }));
    for (const [side, style] of [["chosen", "blue"], ["rejected", "red dashed"]]) area.inner.append(s("path", { class: `line ${style}`, d: path(runs[side].map((_, i) => area.x(i)), runs[side].map(area.y)) }));
    chart.replaceChildren(s("svg", { viewBox: "0 0 720 166", role: "img", "aria-label": `running sums end at ${sums.chosen.textContent} (chosen) and ${sums.rejected.textContent} (rejected)` }, area.node));
  }
  model.on("change:data", show);
  show();
}
export default { render };
