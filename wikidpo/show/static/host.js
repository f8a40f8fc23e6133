// Widgets without a kernel: anywidget's model for the files beside this one, which are used as they are.
// The page holds the parts of the modules and each widget's state as text; see wikidpo.show.embed.

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

class Model {
  constructor(state) {
    this.state = state;
    this.handlers = {}; // event -> functions
    this.unsaved = new Set();
    this.answers = {};
  }
  get(name) { return this.state[name]; }
  set(name, value) {
    if (!same(this.state[name], value)) this.unsaved.add(name);
    this.put({ [name]: value });
  }
  put(values) { // all are there before anyone hears of one
    const changed = Object.keys(values).filter(name => !same(this.state[name], values[name]));
    Object.assign(this.state, values);
    for (const name of changed) this.tell(`change:${name}`, this.state[name]);
    if (changed.length) this.tell("change");
  }
  on(events, handler) {
    for (const event of events.split(" ")) (this.handlers[event] ??= []).push(handler);
  }
  off(events, handler) { // no handler: all of them; no event: of every event
    for (const event of events?.split(" ") ?? Object.keys(this.handlers)) {
      this.handlers[event] = (this.handlers[event] ?? []).filter(known => handler && known !== handler);
    }
  }
  tell(event, ...what) {
    for (const handler of [...this.handlers[event] ?? []]) handler(this, ...what);
  }
  save_changes() {
    const names = [...this.unsaved];
    this.unsaved.clear();
    if (names.length) this.ask("changed", names);
  }
  send(message) { this.ask("said", message); }
  ask(kind, what) { // what would go to Python; what goes wrong is shown in the widget, as there
    if (!this.answers[kind]) return;
    this.put({ error: "" });
    try {
      this.put(this.answers[kind](what) ?? {});
    } catch (error) {
      this.put({ error: error.message });
    }
  }
}

const bytes = base64 => new DataView(Uint8Array.from(atob(base64), c => c.charCodeAt(0)).buffer);

const part = name => document.querySelector(`script[data-wikidpo="${name}"]`).textContent;
const modules = {};
const load = name => { // the same text that Jupyter is sent; from a Blob, because a page on disk may import no file
  const text = ["common", "losses", name].map(part).join("\n");
  return modules[name] ??= import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
};

const element = (tag, properties) => Object.assign(document.createElement(tag), properties);

const download = (name, rows) => {
  const lines = rows.map(row => `${JSON.stringify(row)}\n`);
  const link = element("a", { download: name, href: URL.createObjectURL(new Blob(lines, { type: "application/jsonl" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
};

// What answers.js offers beside the widget: a row with a note and buttons
const offer = ({ note, buttons }) => {
  const row = element("div", { className: "row" });
  row.append(element("span", { className: "quiet", textContent: note }));
  for (const [textContent, onclick] of Object.entries(buttons)) row.append(element("button", { textContent, onclick }));
  return row;
};

const show = async place => { // what stood in the place, a picture or a sentence, goes once the widget is there
  const stood = [...place.childNodes];
  try {
    const { state, bytes: encoded, data } = JSON.parse(place.querySelector("script").textContent);
    for (const [name, base64] of Object.entries(encoded)) state[name] = bytes(base64);
    const model = new Model(state);
    model.answers = ANSWERS[place.dataset.widget]?.(model, data) ?? {};
    Object.assign(model.state, model.answers.start?.());
    const { default: widget } = await load(place.dataset.widget);
    widget.render({ model, el: place });
    if (model.answers.offered) place.lastElementChild.append(offer(model.answers.offered));
    stood.forEach(node => node.remove());
    place.model = model; // for whoever wants to look
  } catch (error) {
    place.append(element("p", { textContent: `This widget could not start: ${error.message}` }));
    throw error;
  }
};

for (const place of document.querySelectorAll(".wikidpo-page")) show(place);
