// Pairs side by side. Python filters, sorts and compares; here is what shows it and what the keys do.

const STEPS = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity };
const SIDES = ["chosen", "rejected"];

function render({ model, el }) {
  const root = mount(model, el, "Pair inspector"), limits = () => ({ ...model.get("limits") });
  const limit = (name, end, value) => { // end 0: at least, 1: at most; an empty field is no limit
    const now = [...limits()[name] ?? [null, null]];
    now[end] = value === "" ? null : +value;
    send(model, { limits: { ...limits(), [name]: now } });
  };

  // controls
  const search = h("input", { type: "search", placeholder: "search prompts and answers", "aria-label": "search", oninput: () => send(model, { query: search.value }) });
  const order = h("select", { "aria-label": "sort by", onchange: () => send(model, { order: order.value }) }, ...model.get("orders").map(o => h("option", { value: o }, o)));
  const slider = (name, label, max) => {
    const out = h("b"), input = h("input", { type: "range", min: 0, max, step: 1, "aria-label": label, oninput: () => limit(name, 0, +input.value ? input.value : "") });
    const read = () => {
      const least = limits()[name]?.[0] ?? 0;
      input.value = least;
      out.textContent = `${label} ≥ ${minus(least)}`;
    };
    model.on("change:limits", read);
    read();
    return h("label", { class: "wide" }, out, input);
  };
  const bounds = Object.entries(model.get("fields")).map(([name, label]) => {
    const ends = [0, 1].map(end => h("input", { type: "number", step: "any", "aria-label": `${label}, ${end ? "at most" : "at least"}`, oninput: e => limit(name, end, e.target.value) }));
    const read = () => ends.forEach((input, end) => { if (input != document.activeElement) input.value = limits()[name]?.[end] ?? ""; }); // nobody is typing there
    model.on("change:limits", read);
    read();
    return h("label", {}, `${label} `, ends[0], " to ", ends[1]);
  });
  const kept = h("b", { "data-readout": "kept" }), longer = h("b", { "data-readout": "longer" }), saved = h("span", { role: "status" });
  const save = h("button", { onclick: () => model.send({ export: true }) }, "export these pairs");

  // the list, the pair, the figures
  const body = h("tbody"), side = {}, prompt = h("p", { class: "text", tabindex: 0 }), where = h("b", { "data-readout": "position", role: "status" });
  const list = h("table", { class: "list", tabindex: 0, role: "grid", "aria-label": "pairs; arrow keys move" },
    h("thead", {}, h("tr", {}, ...["pair", "prompt", "chosen", "rejected", "longer by"].map(c => h("th", { scope: "col" }, c)))), body);
  for (const name of SIDES) side[name] = { facts: h("p", { class: "quiet" }), text: h("p", { class: "text", dir: "auto", "data-side": name, tabindex: 0 }) };
  const chart = h("div", { class: "small" }), table = h("div");
  const go = by => send(model, { position: Math.max(0, Math.min(model.get("view").kept - 1, model.get("position") + by)) });
  const [back, next] = [["previous", -1], ["next", 1]].map(([name, by]) => h("button", { onclick: () => go(by) }, name));

  put(root, { onkeydown: e => {
    if (e.target.matches("input, select") || !(e.key in STEPS) || scrolls(e) || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    go(STEPS[e.key]);
  } }, [
    h("div", { class: "row" }, search, h("label", {}, "sort by ", order), kept, save, saved),
    h("div", { class: "row" }, slider("gap", "gap", 9), slider("score_chosen", "best", 10), h("span", {}, "chosen answers are ", longer)),
    h("details", {}, h("summary", {}, "more filters"), h("div", { class: "row" }, ...bounds)),
    h("div", { class: "row" }, chart, table),
    list,
    h("div", { class: "row" }, back, next, where, h("span", { class: "quiet" }, "keys: ↓ ↑ or j k, Page, Home, End")),
    prompt, h("div", { class: "sides" }, ...SIDES.map(name => h("div", {}, h("h4", {}, name), side[name].facts, side[name].text)))]);

  function showView() {
    const { kept: n, total, unit, first, rows, longer: mean, scores, temperatures, counts } = model.get("view");
    kept.textContent = `${count(n)} of ${count(total)} ${unit} (${fixed(100 * n / (total || 1), 1)} %)`;
    longer.textContent = mean === null ? "–" : `${fixed(Math.abs(mean), 1)} characters ${mean < 0 ? "shorter" : "longer"} on average`;
    body.replaceChildren(...rows.map(([id, text, ...numbers], i) => h("tr", { "aria-selected": `${first + i == model.get("position")}`, onclick: () => send(model, { position: first + i }) },
      h("td", {}, `${id}`), h("td", { dir: "auto" }, visible(text)), ...numbers.map(x => h("td", {}, x === null ? "–" : fixed(x, 0))))));
    save.disabled = back.disabled = next.disabled = !n;
    drawScores(scores);
    table.replaceChildren(...temperatures.length ? [h("table", { "aria-label": "pairs by temperature" },
      h("caption", {}, "pairs, chosen temperature (down) by rejected"),
      h("tr", {}, h("td"), ...temperatures.map(t => h("th", { scope: "col" }, t))),
      ...counts.map((row, i) => h("tr", {}, h("th", { scope: "row" }, temperatures[i]),
        ...row.map(c => h("td", { style: `background: color-mix(in srgb, var(--blue) ${Math.round(45 * c / Math.max(1, ...counts.flat()))}%, transparent)` }, count(c))))))] : []);
  }
  function drawScores({ chosen, rejected }) {
    const area = plot([40, 20, 350, 90], [.4, 10.6], [0, Math.max(1, ...chosen, ...rejected)], { title: "scores: chosen (filled), rejected (outlined)", xlabel: "score" });
    const bar = (n, x, style) => s("rect", { class: style, x: area.x(x), width: 14, y: area.y(n), height: area.y(0) - area.y(n) });
    chosen.forEach((n, i) => n && area.inner.append(bar(n, i + .58, "filled")));
    rejected.forEach((n, i) => n && area.inner.append(bar(n, i + 1.02, "outlined")));
    chart.replaceChildren(s("svg", { viewBox: "0 0 400 140", role: "img", "aria-label": `scores 1 to 10: chosen ${chosen.join(", ")}; rejected ${rejected.join(", ")}` }, area.node));
  }
  function showPair() {
    const pair = model.get("pair"), n = model.get("view").kept;
    where.textContent = n ? `${count(model.get("position") + 1)} of ${count(n)}` : "no pair passes these filters";
    prompt.replaceChildren(...n ? [h("b", {}, "prompt: "), h("bdi", {}, visible(pair.prompt))] : []);
    for (const name of SIDES) {
      side[name].facts.textContent = n ? pair.facts[name] : "";
      side[name].text.replaceChildren(...n ? pair[name].map(([text, differs]) => differs ? h("mark", {}, visible(text)) : visible(text)) : []);
    }
  }
  model.on("change:view change:position", showView);
  model.on("change:view change:pair", showPair);
  model.on("change:saved", () => { saved.textContent = visible(model.get("saved")); });
  for (const [control, name] of [[search, "query"], [order, "order"]]) {
    const read = () => { control.value = model.get(name); };
    model.on(`change:${name}`, read);
    read();
  }
  showView();
  showPair();
}
export default { render };
