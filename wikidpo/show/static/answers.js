// What Python answers where there is a kernel. Each takes the model and what Python prepared for it, and returns
// `start` (state to begin with), `changed` (some state was set), `said` (a message), each giving the state that follows.

const keep = { // in this browser, where it allows that
  read: key => {
    try { return JSON.parse(localStorage.getItem(key)); } catch { return null; }
  },
  write: (key, value) => {
    try { localStorage.setItem(key, JSON.stringify(value)); } catch { return false; }
    return true;
  },
};

// --- the pair inspector: filters, sorts and pages; the orders and the marked differences are prepared

const PAGE = 8; // pairs in the list
const SCORES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
const ends = ["chosen", "rejected"];

const scoreCounts = scores => SCORES.map(s => scores.filter(x => Math.round(x) === s).length);

const temperatureCounts = (chosen, rejected) => {
  if ([...chosen, ...rejected].some(Number.isNaN)) return { temperatures: [], counts: [] };
  const temperatures = [...new Set([...chosen, ...rejected])].sort((a, b) => a - b);
  const both = (a, b) => chosen.filter((t, i) => t === a && rejected[i] === b).length;
  return { temperatures, counts: temperatures.map(a => temperatures.map(b => both(a, b))) };
};

const inspector = (model, { columns, orders, pairs, rows, file }) => {
  const textOf = (pair, side) => pair[side].map(([piece]) => piece).join("");
  const promptOf = pair => pair.asked ?? pair.prompt; // without the turns before it
  const texts = pairs.map(pair => [promptOf(pair), ...ends.map(side => textOf(pair, side))].join("\n").toLowerCase());
  const cols = {};
  for (const [name, values] of Object.entries(columns)) cols[name] = values.map(x => x ?? NaN); // NaN passes no limit
  let selection;

  const passes = i => {
    const inside = ([name, [low, high]]) => (low === null || cols[name][i] >= low) && (high === null || cols[name][i] <= high);
    return texts[i].includes(model.get("query").toLowerCase()) && Object.entries(model.get("limits")).every(inside);
  };
  const select = () => { selection = orders[model.get("order")].filter(passes); };
  const of = name => selection.map(i => cols[name][i]);
  const describe = () => {
    const longer = of("longer");
    const scores = { chosen: scoreCounts(of("score_chosen")), rejected: scoreCounts(of("score_rejected")) };
    return {
      longer: longer.length ? longer.reduce((a, b) => a + b, 0) / longer.length : null,
      scores,
      ...temperatureCounts(of("temp_chosen"), of("temp_rejected")),
    };
  };
  const line = i => {
    const numbers = ["score_chosen", "score_rejected", "longer"].map(name => columns[name][i]);
    return [i, [...promptOf(pairs[i])].slice(0, 200).join(""), ...numbers];
  };
  const show = position => {
    const kept = selection.length;
    if (!(position >= 0 && position < Math.max(1, kept))) {
      throw new Error(`position ${position}: there are ${kept} pairs in the selection`);
    }
    const first = Math.floor(position / PAGE) * PAGE;
    const view = {
      kept, total: model.get("view").total, unit: model.get("view").unit, first,
      rows: selection.slice(first, first + PAGE).map(line),
      ...describe(),
    };
    const { asked, ...pair } = pairs[selection[position]] ?? {};
    return { position, view, pair };
  };
  select();
  return {
    start: () => show(model.get("position")),
    changed: names => {
      if (names.every(name => name === "position")) return show(model.get("position"));
      select();
      return show(0);
    },
    said: () => {
      if (!rows) throw new Error("this page has excerpts alone: the pairs themselves are in pairs.jsonl of the run");
      if (!selection.length) throw new Error("no pair passes these filters: nothing was written");
      const whole = i => ({ ...rows[i], chosen: textOf(pairs[i], "chosen"), rejected: textOf(pairs[i], "rejected") });
      download(file, [...selection].sort((a, b) => a - b).map(whole));
      return { saved: `${selection.length.toLocaleString("en")} pairs written to ${file}` };
    },
  };
};

// --- the token view: a table, looked up

const tokens = (model, { known }) => { // checkpoint -> one object a pair
  const total = Object.values(known)[0].length;
  return {
    start: () => ({ total }),
    changed: () => {
      const [position, checkpoint] = ["position", "checkpoint"].map(name => model.get(name));
      if (!(position >= 0 && position < total)) throw new Error(`pair ${position + 1}: there are ${total}`);
      return { data: known[checkpoint][position] };
    },
  };
};

// --- the blind vote: the questions in their order; votes stay in the browser

const OUTCOMES = ["a", "b", "tie"];

const uniform = seed => () => { // mulberry32: the same votes have the same interval each time
  seed = (seed + 0x6d2b79f5) | 0;
  let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
};

const gamma = (shape, random) => { // Marsaglia and Tsang 2000; a shape below 1 by way of the next
  if (shape < 1) return gamma(shape + 1, random) * (1 - random()) ** (1 / shape);
  const d = shape - 1 / 3;
  const c = 1 / Math.sqrt(9 * d);
  while (true) {
    const x = Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
    const v = (1 + c * x) ** 3;
    if (v > 0 && Math.log(1 - random()) < x * x / 2 + d - d * v + d * Math.log(v)) return d * v;
  }
};

const sum = values => values.reduce((a, b) => a + b, 0);

const kappaOf = shares => { // (3, 3); null where chance alone agrees always
  const agree = sum(shares.map((row, i) => row[i]));
  const chance = sum(shares.map((row, i) => sum(row) * sum(shares.map(other => other[i]))));
  return chance < 1 ? (agree - chance) / (1 - chance) : null;
};

const quantile = (sorted, q) => {
  const at = q * (sorted.length - 1);
  const below = Math.floor(at);
  return sorted[below] + (at - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
};

// The posterior of wikidpo.show.vote.kappa; the draws are the browser's own, so the ends differ by a hundredth or so
const kappaInterval = (table, draws = 4000) => {
  const random = uniform(0);
  const draw = () => {
    const weights = table.map(row => row.map(n => gamma(n + 1 / 9, random)));
    const whole = sum(weights.flat());
    return kappaOf(weights.map(row => row.map(w => w / whole)));
  };
  const drawn = Array.from({ length: draws }, draw).filter(x => x !== null).sort((a, b) => a - b);
  return [quantile(drawn, .025), quantile(drawn, .975)];
};

const vote = (model, { key, questions, cast }) => {
  const byId = new Map(questions.map(q => [q.id, q]));
  const { needed, names } = model.get("result");
  const stored = keep.read(key) ?? cast;
  let votes = new Map(stored.filter(([id]) => byId.has(id))); // prompt_id -> a, b or tie
  const current = () => questions.find(q => !votes.has(q.id));

  const question = () => {
    const q = current();
    return q ? { number: votes.size, prompt: q.prompt, first: q.first, second: q.second } : {};
  };
  const differences = () => {
    const all = [...votes].reverse().map(([id, mine]) => [id, byId.get(id).prompt, mine, byId.get(id).verdict]);
    return all.filter(([, , mine, theirs]) => mine !== theirs).slice(0, 10);
  };
  const result = () => {
    const n = votes.size;
    if (n < needed) return { votes: n, needed, names, differences: [] };
    const table = OUTCOMES.map(() => [0, 0, 0]);
    for (const [id, mine] of votes) table[OUTCOMES.indexOf(mine)][OUTCOMES.indexOf(byId.get(id).verdict)] += 1;
    const [low, high] = kappaInterval(table);
    const agree = sum(table.map((row, i) => row[i])) / n;
    return {
      votes: n, needed, names, agree, low, high,
      kappa: kappaOf(table.map(row => row.map(k => k / n))),
      differences: differences(),
    };
  };
  const both = () => ({ question: question(), result: result() });
  const other = { a: "b", b: "a" };
  const rows = () => [...votes].map(([id, mine]) => {
    const { shown_first, answers } = byId.get(id);
    return { prompt_id: id, vote: mine, shown_first, answers };
  });
  const again = () => {
    votes = new Map();
    keep.write(key, []);
    model.put(both());
  };
  return {
    start: both,
    said: ({ vote: choice, number }) => {
      const q = current();
      if (!q || number !== votes.size) return {};
      const side = { first: q.shown_first, second: other[q.shown_first], tie: "tie" };
      votes.set(q.id, side[choice]);
      keep.write(key, [...votes]);
      return both();
    },
    offered: {
      note: keep.write(key, [...votes]) ? "Your votes stay in this browser." : "This browser keeps no votes: download them before you leave.",
      buttons: { "download your votes": () => download("votes.jsonl", rows()), "start again": again },
    },
  };
};

// --- the prediction: the answer stays in the browser

const predict = (model, { key }) => ({
  start: () => ({ answer: model.get("options").includes(keep.read(key)) ? keep.read(key) : model.get("answer") }),
  changed: () => { keep.write(key, model.get("answer")); },
});

const ANSWERS = { inspector, tokens, vote, predict };
