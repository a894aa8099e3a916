"use strict";
// One rollout as text: tokens coloured by who wrote them, passes in boxes, steps checked.

const CHUNK = 200; // tokens of a long phase that the browser lays out as one part
const AT_ONCE = 600; // tokens that are made at once; the others follow after the paint

const emitterOf = (rollout, at) => {
  const slot = (rollout.slots ?? [])[at] ?? 0;
  if (slot === -2) return "forced";
  if (slot > 0) return "head";
  return ((rollout.accepted ?? [])[at] ?? 0) > 0 ? "accepted" : "main";
};

function writer(rollout, at) {
  const slot = (rollout.slots ?? [])[at] ?? 0;
  if (slot === -2) return "written in the model's place, to close a phase";
  if (slot > 0) return `head, slot ${slot}`;
  const draft = (rollout.accepted ?? [])[at] ?? 0;
  return draft > 0 ? `head's draft in slot ${draft}, accepted by main` : "main";
}

/** Index of the last start that is at or before a token. */
function placeIn(starts, at) {
  let low = 0;
  let high = starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= at) low = middle;
    else high = middle - 1;
  }
  return low;
}

const passOf = (rollout, at) => placeIn(rollout.passes, at);
const phaseOf = (rollout, at) => rollout.phases[placeIn(rollout.phases.map((p) => p[0]), at)];
const stepOf = (rollout, at) => rollout.steps.find(([from, to]) => from <= at && at < to);

/** Where the rollout went wrong, in a sentence. */
function mistakeText(rollout) {
  const wrong = rollout.mistake;
  const at = wrong.token;
  const pass = `pass ${passOf(rollout, at) + 1} of ${rollout.passes.length}`;
  const token = el("code", {}, visible(rollout.tokens[at]));
  const short = (text) => el("code", {}, text.length > 90 ? `${text.slice(0, 90)}…` : text);
  if (wrong.kind === "missing") {
    const limit = rollout.segments.at(-1).ended_by === "limit" ? " The limit cut it." : "";
    return el("span", {}, `No final answer after ${rollout.passes.length} passes.${limit}`);
  }
  const parts = ["Went wrong in ", el("b", {}, pass), ": ", el("b", {}, writer(rollout, at))];
  parts.push(" wrote ", token);
  parts.push(wrong.kind === "step" ? " in the step " : " in the answer ", short(wrong.written));
  if (wrong.expected) parts.push("; correct is ", short(wrong.expected));
  if (wrong.kind === "answer") parts.push(". No step before it is known to be false.");
  return el("span", {}, ...parts);
}

function fact(name, value) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value));
}

/** The whole pane of a rollout. `label` says which checkpoint wrote it. */
function rolloutPane(rollout, label, onToken) {
  const verdict = { true: "right", false: "wrong", null: "not verified" }[String(rollout.right)];
  const tokens = el("div", {
    class: "tokens",
    tabindex: "0",
    role: "group",
    "aria-label": "Tokens. Left and right: next token. Up and down: next pass. M: the mistake.",
  });
  const pane = el(
    "article",
    { class: "rollout" },
    el("h3", {}, label, " · ", el("span", { class: `verdict ${verdict}` }, verdict)),
    el(
      "dl",
      {},
      fact("prompt", el("code", {}, rollout.prompt)),
      fact("answer", el("code", {}, rollout.given ?? "none")),
      fact("correct", el("code", {}, rollout.answer)),
      fact("passes", String(rollout.passes.length)),
      fact("tokens/pass", (rollout.tokens.length / Math.max(1, rollout.passes.length)).toFixed(1)),
    ),
  );
  if (rollout.mistake) {
    const show = el("button", { click: () => select(rollout.mistake.token, true) }, "Show the token");
    pane.append(el("p", { class: "wrong-at" }, mistakeText(rollout), " ", show));
  }
  pane.append(tokens);
  const filling = new Filling(tokens, rollout);
  const { spans } = filling;
  const last = rollout.tokens.length - 1;
  let current = -1;

  function select(at, focus) {
    spans[current]?.classList.remove("current");
    current = Math.max(0, Math.min(at, last));
    filling.until(current + 1);
    spans[current].classList.add("current");
    if (focus) {
      tokens.focus({ preventScroll: true });
      spans[current].scrollIntoView({ block: "nearest" });
    }
    onToken(rollout, current, label);
  }
  const tokenOf = (event) => event.target.closest?.(".t");
  tokens.addEventListener("mouseover", (event) => {
    const span = tokenOf(event);
    if (span) onToken(rollout, Number(span.dataset.at), label);
  });
  tokens.addEventListener("click", (event) => {
    const span = tokenOf(event);
    if (span) select(Number(span.dataset.at), true);
  });
  tokens.addEventListener("focus", () => {
    if (current < 0) select(rollout.mistake?.token ?? 0, false);
  });
  tokens.addEventListener("keydown", (event) => {
    const pass = passOf(rollout, Math.max(0, current));
    const target = {
      ArrowRight: current + 1,
      ArrowLeft: current - 1,
      ArrowDown: rollout.passes[Math.min(pass + 1, rollout.passes.length - 1)],
      ArrowUp: rollout.passes[Math.max(pass - 1, 0)],
      Home: 0,
      End: last,
      m: rollout.mistake?.token,
    }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    select(target, true);
  });
  pane.colour = (name) => filling.colour(name);
  filling.begin();
  return pane;
}

/** Fills an element with the tokens of a rollout, the first ones at once. */
class Filling {
  constructor(parent, rollout) {
    this.parent = parent;
    this.rollout = rollout;
    this.phases = new Map(rollout.phases.map((phase) => [phase[0], phase]));
    this.segments = new Map(rollout.segments.map((segment) => [segment.start, segment]));
    this.passes = new Map(rollout.passes.map((start, number) => [start, number]));
    this.marks = stepMarks(rollout);
    this.spans = [];
    this.memory = "";
    this.home = this.phase = this.pass = parent;
    this.filled = 0;
    this.shade = null;
  }

  begin() {
    this.until(AT_ONCE);
    const next = () => {
      if (this.spans.length === this.rollout.tokens.length || !this.parent.isConnected) return;
      this.until(this.spans.length + AT_ONCE);
      setTimeout(next, 0);
    };
    requestAnimationFrame(() => setTimeout(next, 0));
  }

  /** Make the elements of the tokens before `end`. */
  until(end) {
    const count = this.rollout.tokens.length;
    const from = this.spans.length;
    for (let at = from; at < Math.min(end, count); at++) this.add(at);
    if (this.shade) this.colourFrom(from);
    const isComplete = from < count && this.spans.length === count;
    if (isComplete && this.rollout.segments.length > 1) {
      this.parent.append(memoryBox(this.rollout, this.memory));
    }
  }

  add(at) {
    const { rollout, parent } = this;
    if (this.segments.has(at)) {
      const segment = this.segments.get(at);
      if (rollout.segments.length > 1) parent.append(segmentHead(rollout, segment, this.memory));
      this.memory = segment.memory;
    }
    if (this.phases.has(at)) {
      const [, name, mode] = this.phases.get(at);
      const head = el("span", { class: "name" }, `${name}, ${mode}`);
      this.phase = el("div", { class: `phase ${mode}` }, head);
      this.isSlow = mode === "slow";
      parent.append(this.phase);
      this.home = this.phase;
      this.filled = 0;
    }
    if (this.passes.has(at)) {
      const isLong = rollout.tokens.length > 2 * CHUNK;
      if (isLong && (this.home === this.phase || this.filled >= CHUNK)) {
        this.home = el("div", { class: "chunk" });
        this.filled = 0;
        this.phase.append(this.home);
      }
      this.pass = document.createElement("span");
      this.pass.className = "pass";
      if (!this.isSlow) this.pass.dataset.n = this.passes.get(at) + 1;
      this.home.append(this.pass);
    }
    const token = rollout.tokens[at];
    const span = document.createElement("span");
    span.className = `t ${emitterOf(rollout, at)}${this.marks[at] ?? ""}`;
    span.dataset.at = at;
    span.textContent = token === "" ? "·" : token.replaceAll("\n", "⏎\n");
    this.pass.append(span);
    this.spans.push(span);
    this.filled += 1;
  }

  colour(name) {
    this.name = name;
    this.shade = SHADES[name];
    this.parent.classList.toggle("by-value", Boolean(this.shade));
    if (this.shade) this.colourFrom(0);
  }

  colourFrom(from) {
    const values = this.rollout[this.name] ?? [];
    for (let at = from; at < this.spans.length; at++) {
      const value = values[at];
      const isKnown = value !== null && value !== undefined;
      const shade = isKnown ? (0.75 * this.shade(value)).toFixed(2) : "0";
      this.spans[at].style.setProperty("--v", shade);
    }
  }
}

/** Classes of the tokens of steps: false ones, their ends, the first mistake. */
function stepMarks(rollout) {
  const marks = {};
  const mark = (at, name) => (marks[at] = `${marks[at] ?? ""} ${name}`);
  for (const [from, to, isTrue, expected] of rollout.steps) {
    const written = rollout.tokens.slice(from, to).join("").replace(/[;\n]+$/, "");
    const isOther = isTrue && expected !== null && expected !== written;
    if (!isTrue) for (let at = from; at < to; at++) mark(at, "false");
    mark(to - 1, isTrue ? (isOther ? "ends-other" : "ends-true") : "ends-false");
  }
  if (rollout.mistake) mark(rollout.mistake.token, "mistake");
  return marks;
}

function segmentHead(rollout, segment, before) {
  const number = rollout.segments.indexOf(segment) + 1;
  const box = el("div", {});
  if (number > 1) box.append(memoryBox(rollout, before, number - 2));
  box.append(el("b", {}, `segment ${number}`));
  const context = el("details", { class: "memory" }, el("summary", {}, "context that it continues"));
  context.append(el("div", {}, segment.context));
  box.append(context);
  return box;
}

/** The memory file after a segment, with the lines that it changed. */
function memoryBox(rollout, memory, number = rollout.segments.length - 1) {
  const lines = (text) => (text ? text.split("\n") : []);
  const before = number > 0 ? lines(rollout.segments[number - 1].memory) : [];
  const after = lines(memory);
  const ended = rollout.segments[number].ended_by;
  const box = el("div", { class: "memory" }, `memory after segment ${number + 1} (ended by ${ended})`);
  for (const line of before) {
    if (!after.includes(line)) box.append(el("div", { class: "removed" }, line));
  }
  for (const line of after) {
    box.append(el("div", { class: before.includes(line) ? "" : "added" }, line));
  }
  if (!after.length) box.append(el("div", {}, "(empty)"));
  return box;
}

/** How dark each value is shown: 0 to 1 over the range that is of interest, in nats. */
const SHADES = {
  logprob: (v) => Math.min(1, -v / 3),
  entropy: (v) => Math.min(1, v / 2),
  message: (v) => Math.min(1, Math.max(0, v) / 5),
  main: (v) => Math.min(1, -v / 5),
  reference: (v) => Math.min(1, -v / 5),
};

/** What is known of a token. */
function tokenDetails(rollout, at, label) {
  const value = (name) => (rollout[name] ?? [])[at] ?? null;
  const chance = (logprob) => `${percent(Math.exp(logprob))} (${logprob.toFixed(2)} nats)`;
  const item = (name, ...content) => el("span", {}, `${name} `, el("b", {}, ...content));
  const [, phase, mode] = phaseOf(rollout, at);
  const facts = [
    item("token", el("code", {}, visible(rollout.tokens[at]))),
    item("written by", writer(rollout, at)),
    item("pass", `${passOf(rollout, at) + 1} of ${rollout.passes.length}`),
    item("phase", `${phase}, ${mode}`),
  ];
  if (value("logprob") !== null) facts.push(item("probability", chance(value("logprob"))));
  if (value("entropy") !== null) facts.push(item("entropy", `${value("entropy").toFixed(2)} nats`));
  if (value("main") !== null) {
    facts.push(item("main gives it", chance(value("main"))));
    const other = value("main_likeliest");
    if (other !== rollout.tokens[at]) {
      facts.push(item("main would write", el("code", {}, visible(other ?? ""))));
    }
  }
  if (value("message") !== null) {
    facts.push(item("with another pass's message", `${(-value("message")).toFixed(2)} nats`));
  }
  if (value("reference") !== null) {
    facts.push(item("the reference gives it", chance(value("reference"))));
    const other = value("reference_likeliest");
    if (other !== rollout.tokens[at]) {
      facts.push(item("the reference would write", el("code", {}, visible(other ?? ""))));
    }
  }
  const step = stepOf(rollout, at);
  if (step) {
    const [, , isTrue, expected] = step;
    const text = isTrue ? "true" : "false";
    facts.push(item("step", text, ...(expected ? [", correct: ", el("code", {}, expected)] : [])));
  }
  const likely = (value("alternatives") ?? []).map(([text, logprob]) =>
    el(
      "span",
      { class: "likely" },
      el("code", {}, visible(text)),
      el("meter", { min: "0", max: "1", value: String(Math.exp(logprob)) }),
      percent(Math.exp(logprob)),
    ),
  );
  return [
    el("div", { class: "facts" }, ...facts),
    el("div", {}, likely.length ? "likeliest here: " : "", ...likely),
    ...(byId("panes").classList.contains("two") ? [el("div", { class: "note" }, label)] : []),
  ];
}
