"use strict";
// The list of rollouts with its filters, and the panes of the chosen one. Only the rows on the
// screen are elements, and a rollout is read when it is opened.

const ROW_HEIGHT = 46;
const opened = new Map();

function rolloutAt(index) {
  if (!opened.has(index)) {
    if (opened.size > 50) opened.clear();
    opened.set(index, JSON.parse(byId(`rollout-${index}`).textContent));
  }
  return opened.get(index);
}

const keyOf = (row) => `${row.run}/${row.stage}/${row.global_step}/${row.ends_stage ? "end" : ""}`;

function labelOf(row) {
  const when = row.ends_stage ? "end of the stage" : "within the stage";
  const where = `${row.stage}, ${when}, step ${row.global_step}, ${row.mode}`;
  return several ? `${DATA.runs[row.run].name}: ${where}` : where;
}

const Viewer = {
  rows: DATA.rollouts.map((row, index) => ({ ...row, index })),
  shown: [],
  chosen: null,

  start(state) {
    byId("no-thoughts").hidden = this.rows.length > 0;
    byId("viewer").hidden = this.rows.length === 0;
    if (!this.rows.length) return;
    this.checkpoints = new Map(this.rows.map((row) => [keyOf(row), row]));
    const options = () =>
      [...this.checkpoints].map(([key, row]) => el("option", { value: key }, labelOf(row)));
    byId("checkpoint").append(el("option", { value: "" }, "all"), ...options());
    byId("beside").append(el("option", { value: "" }, "nothing"), ...options());
    const ends = [...this.checkpoints].filter(([, row]) => row.ends_stage);
    byId("checkpoint").value = state.checkpoint ?? (ends.at(-1) ?? [""])[0];
    byId("beside").value = state.beside ?? "";
    byId("query").value = state.query ?? "";
    byId("colour").value = state.colour ?? "emitter";
    const has = (row) => keyOf(row) === byId("checkpoint").value && row.right === false;
    byId("show").value = state.show ?? (this.rows.some(has) ? "wrong" : "all");
    for (const id of ["checkpoint", "show", "query"]) {
      byId(id).addEventListener("input", () => this.filter());
    }
    byId("beside").addEventListener("input", () => this.open(this.chosen));
    byId("colour").addEventListener("input", () => this.colour());
    const list = byId("list");
    list.addEventListener("scroll", () => this.drawRows());
    list.addEventListener("keydown", (event) => this.move(event));
    list.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.open(Number(row.dataset.index));
    });
    this.filter(state.chosen);
    this.colour();
  },

  state() {
    const value = (id) => byId(id).value;
    return {
      checkpoint: value("checkpoint"),
      beside: value("beside"),
      show: value("show"),
      query: value("query"),
      colour: value("colour"),
      chosen: this.chosen,
    };
  },

  filter(chosen = null) {
    const checkpoint = byId("checkpoint").value;
    const show = byId("show").value;
    const query = byId("query").value.trim();
    const wanted = {
      all: () => true,
      wrong: (row) => row.right === false,
      right: (row) => row.right === true,
      false: (row) => row.false_steps > 0,
    }[show];
    this.shown = this.rows
      .filter((row) => !checkpoint || keyOf(row) === checkpoint)
      .filter((row) => wanted(row) && row.prompt.includes(query))
      .sort((a, b) => a.run - b.run || a.global_step - b.global_step || a.problem - b.problem);
    const total = this.rows.filter((row) => !checkpoint || keyOf(row) === checkpoint).length;
    byId("count").textContent = `${this.shown.length} of ${total} kept rollouts`;
    byId("list").scrollTop = 0;
    const kept = this.shown.some((row) => row.index === chosen);
    this.open(kept ? chosen : (this.shown[0]?.index ?? null));
    this.reveal();
  },

  drawRows() {
    const list = byId("list");
    const from = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 4);
    const to = from + Math.ceil(list.clientHeight / ROW_HEIGHT) + 8;
    const spacer = el("div", { style: `height:${this.shown.length * ROW_HEIGHT}px` });
    const rows = this.shown.slice(from, to).map((row, offset) => {
      const verdict = { true: "right", false: "wrong", null: "" }[String(row.right)];
      const steps = row.false_steps ? `, ${row.false_steps} of ${row.steps} steps false` : "";
      return el(
        "div",
        {
          class: "row",
          role: "option",
          id: `row-${row.index}`,
          "data-index": String(row.index),
          "aria-selected": String(row.index === this.chosen),
          style: `top:${(from + offset) * ROW_HEIGHT}px`,
        },
        el("b", {}, row.prompt),
        el(
          "small",
          {},
          el("span", { class: `verdict ${verdict}` }, verdict),
          ` ${row.passes} passes, ${row.tokens} tokens${steps}`,
        ),
      );
    });
    list.replaceChildren(spacer, ...rows);
    list.setAttribute("aria-activedescendant", this.chosen === null ? "" : `row-${this.chosen}`);
  },

  move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
    if (!step || !this.shown.length) return;
    event.preventDefault();
    const at = this.shown.findIndex((row) => row.index === this.chosen);
    const next = Math.max(0, Math.min(this.shown.length - 1, at + step));
    this.open(this.shown[next].index);
    this.reveal();
  },

  reveal() {
    const at = this.shown.findIndex((row) => row.index === this.chosen);
    const list = byId("list");
    const top = at * ROW_HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) {
      list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
    }
    this.drawRows();
  },

  open(index) {
    this.chosen = index;
    this.drawRows();
    const panes = byId("panes");
    byId("details").replaceChildren();
    if (index === null) {
      panes.replaceChildren(el("p", { class: "note" }, "No rollout fits these filters."));
      return;
    }
    const onToken = (rollout, at, label) =>
      byId("details").replaceChildren(...tokenDetails(rollout, at, label));
    const row = this.rows[index];
    const found = [rolloutPane(rolloutAt(index), labelOf(row), onToken)];
    const beside = byId("beside").value;
    if (beside && beside !== keyOf(row)) found.push(this.besidePane(row, beside, onToken));
    panes.classList.toggle("two", found.length > 1);
    panes.replaceChildren(...found);
    this.colour();
  },

  besidePane(row, key, onToken) {
    const prompt = rolloutAt(row.index).prompt;
    const other = this.rows.find(
      (one) =>
        keyOf(one) === key &&
        one.problem === row.problem &&
        one.prompt === row.prompt &&
        rolloutAt(one.index).prompt === prompt,
    );
    const label = labelOf(this.checkpoints.get(key));
    if (!other) {
      const none = "This checkpoint's rollout of the problem is not kept.";
      return el("article", { class: "rollout" }, el("h3", {}, label), el("p", { class: "note" }, none));
    }
    return rolloutPane(rolloutAt(other.index), label, onToken);
  },

  colour() {
    const name = byId("colour").value;
    for (const pane of byId("panes").children) pane.colour?.(name);
    const sample = (kind, text) => el("span", {}, el("span", { class: `t ${kind}` }, "abc"), ` ${text}`);
    const meanings = {
      logprob: "darker: less probable under the model that wrote the token",
      entropy: "darker: the model that wrote the token was less sure",
      message: "darker: less probable with another pass's message (the head's tokens)",
      main: "darker: main gives the head's token less probability",
      reference: "darker: the reference gives the token less probability",
    };
    byId("legend").replaceChildren(
      ...(meanings[name]
        ? [meanings[name]]
        : [
            sample("main", "main"),
            sample("head", "head"),
            sample("accepted", "head's draft, accepted by main"),
            sample("forced", "forced"),
          ]),
      el("span", {}, "box: tokens of one pass, with its number"),
      el("span", {}, el("span", { class: "t false ends-false" }, "abc"), " false step"),
      el("span", {}, el("span", { class: "t mistake" }, "a"), " first mistake"),
    );
  },
};

/** The number of wrong answers after the last stage, with the way to the first. */
function showCallout() {
  const ends = Viewer.rows.filter((row) => row.ends_stage);
  if (!ends.length) return;
  const last = ends.filter((row) => keyOf(row) === keyOf(ends.at(-1)));
  const wrong = last.filter((row) => row.right === false);
  const open = () => {
    byId("checkpoint").value = keyOf(last[0]);
    byId("show").value = "wrong";
    byId("query").value = "";
    Viewer.filter();
    // On a narrow screen the text is below the filters and the list.
    const isNarrow = matchMedia("(max-width: 760px)").matches;
    byId(isNarrow ? "panes" : "thoughts").scrollIntoView();
    byId("panes").querySelector(".tokens")?.focus({ preventScroll: true });
  };
  const text = `${labelOf(last[0])}: ${wrong.length} of ${last.length} kept rollouts are wrong.`;
  const button = wrong.length ? el("button", { click: open }, "Show the first wrong answer") : null;
  byId("callout").replaceChildren(el("div", { class: "callout" }, text, button));
}
