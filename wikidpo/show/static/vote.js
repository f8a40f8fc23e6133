// Two answers, no names, no scores: one key, one vote.

const KEYS = { "1": "first", ArrowLeft: "first", "2": "second", ArrowRight: "second", "0": "tie", ArrowDown: "tie" };

function render({ model, el }) {
  const root = mount(model, el, "Blind vote"), texts = {};
  const vote = choice => model.get("question").prompt !== undefined && model.send({ vote: choice, number: model.get("question").number });
  const buttons = [["first", "1: left is better"], ["tie", "0: no difference"], ["second", "2: right is better"]].map(([choice, label]) => h("button", { onclick: () => vote(choice) }, label));
  const prompt = h("p", { class: "text", tabindex: 0, "aria-live": "polite" }), votes = h("b", { "data-readout": "votes" }), agreement = h("b", { "data-readout": "kappa" }), where = h("div");
  for (const side of ["first", "second"]) texts[side] = h("p", { class: "text", dir: "auto", "data-side": side, tabindex: 0 });

  put(root, { tabindex: 0, onkeydown: e => {
    if (!(e.key in KEYS) || scrolls(e) || e.ctrlKey || e.metaKey || e.altKey || e.repeat) return;
    e.preventDefault();
    vote(KEYS[e.key]);
  } }, [
    prompt,
    h("div", { class: "sides" }, ...Object.entries({ first: "left", second: "right" }).map(([side, label]) => h("div", {}, h("h4", {}, label), texts[side]))),
    h("div", { class: "row" }, ...buttons, h("span", { class: "quiet" }, "keys: 1 2 0 or ← → ↓")),
    h("div", { class: "row", role: "status" }, votes, agreement), where]);

  function ask() {
    const { prompt: text, first, second } = model.get("question");
    for (const button of buttons) button.disabled = text === undefined;
    prompt.replaceChildren(...text === undefined ? ["every question has a vote"] : [h("b", {}, "prompt: "), h("bdi", {}, visible(text))]);
    texts.first.textContent = visible(first ?? "");
    texts.second.textContent = visible(second ?? "");
  }
  function tally() {
    const { votes: n, needed, kappa, low, high, agree, differences, names } = model.get("result");
    votes.textContent = `${count(n)} ${n == 1 ? "vote" : "votes"}`;
    agreement.textContent = n < needed ? `agreement with the teacher after ${needed - n} more` : `same verdict as the teacher ${fixed(100 * agree, 0)} %, Cohen's kappa ${fixed(kappa)} (${fixed(low)} to ${fixed(high)})`;
    where.replaceChildren(...differences.length ? [h("h4", {}, "where you and the teacher differ, latest first"), h("table", { class: "list" },
      h("tr", {}, ...["number", "prompt", "you", "teacher"].map(c => h("th", { scope: "col" }, c))),
      ...differences.map(([i, text, mine, theirs]) => h("tr", {}, h("td", {}, `${i}`), h("td", { dir: "auto" }, visible(text)), h("td", {}, visible(names[mine])), h("td", {}, visible(names[theirs])))))] : []);
  }
  model.on("change:question", ask);
  model.on("change:result", tally);
  ask();
  tally();
}
export default { render };
