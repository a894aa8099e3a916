"use strict";
// Tables: stages of a run, several runs, means over seeds, pairs. Columns sort by a click.

/** columns: {head, title, cell(row) -> text or element, sort(row) -> number or text, text} */
function sortableTable(caption, columns, rows) {
  const body = el("tbody");
  const fill = (ordered) =>
    body.replaceChildren(
      ...ordered.map((row) =>
        el("tr", {}, ...columns.map((c) => el("td", { class: c.text && "text-cell" }, c.cell(row)))),
      ),
    );
  const heads = columns.map((column) => {
    const head = el("th", { scope: "col", title: column.title, class: column.text && "text-cell" });
    const sort = () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      fill([...rows].sort((a, b) => (up ? 1 : -1) * ordered(column.sort(a), column.sort(b))));
    };
    head.append(rows.length > 1 ? el("button", { click: sort }, column.head) : column.head);
    return head;
  });
  fill(rows);
  const table = el("table", {}, el("caption", {}, caption));
  table.append(el("thead", {}, el("tr", {}, ...heads)), body);
  return el("div", { class: "scroll", tabindex: "0" }, table);
}

/** Missing values come first in rising order; numbers in texts are compared as numbers. */
function ordered(a, b) {
  const none = (value) => value === null || value === undefined;
  if (none(a) || none(b)) return Number(none(b)) - Number(none(a));
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

const first = (value) => (Array.isArray(value) ? value[0] : value);

function metricColumns(rowOf, metrics = DATA.metrics) {
  return metrics.map((metric) => ({
    head: metric.head,
    title: metric.meaning,
    sort: (row) => first((rowOf(row) ?? {})[metric.name]),
    cell: (row) => {
      const values = rowOf(row) ?? {};
      const ends = (values.intervals ?? {})[metric.name];
      const text = cell(metric, values[metric.name]);
      if (!ends) return text;
      const shown = el("small", {}, `${number(metric, ends[0])} to ${cell(metric, ends[1])}`);
      return el("span", {}, text, shown);
    },
  }));
}

function stageTable(run) {
  const columns = [
    { head: "stage", text: true, sort: (s) => s.name, cell: (s) => s.name + (s.ended ? "" : " …") },
    { head: "steps", sort: (s) => s.steps, cell: (s) => String(s.steps ?? "-") },
    ...metricColumns((stage) => stage),
  ];
  const problems = run.stages.length ? run.stages.at(-1).num_problems : null;
  const what = problems ? `${problems} held-out problems` : "held-out problems";
  return sortableTable(`Evaluations at the end of each stage: ${what}, greedy`, columns, run.stages);
}

const lastStage = (run) => run.stages.at(-1);

function runsTable() {
  const keys = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.overrides)))];
  const columns = [
    { head: "run", text: true, sort: (r) => r.name, cell: (r) => r.name },
    ...keys.map((key) => ({
      head: key,
      sort: (r) => r.overrides[key],
      cell: (r) => r.overrides[key] ?? "-",
    })),
    {
      head: "status",
      text: true,
      sort: (r) => r.status,
      cell: (r) => (r.error ? el("span", { title: r.error }, r.status) : r.status),
    },
    { head: "stage", text: true, sort: (r) => lastStage(r)?.name, cell: (r) => lastStage(r)?.name },
    ...metricColumns(lastStage),
  ];
  return sortableTable("The last stage of each run; a click on a head sorts", columns, DATA.runs);
}

function groupsTable() {
  const names = DATA.metrics.filter((m) => DATA.groups.some((g) => g.metrics[m.name]));
  const columns = [
    { head: "runs", text: true, sort: (g) => g.name, cell: (g) => g.name },
    { head: "stage", text: true, sort: (g) => g.stage, cell: (g) => g.stage },
    { head: "seeds", sort: (g) => g.seeds.length, cell: (g) => String(g.seeds.length) },
    ...names.map((metric) => ({
      head: metric.head,
      title: metric.meaning,
      sort: (g) => first(g.metrics[metric.name]),
      cell: (g) => {
        const found = g.metrics[metric.name];
        if (!found) return "-";
        const [mean, low, high] = found;
        const ends = `${number(metric, low)} to ${number(metric, high)}`;
        return el("span", {}, cell(metric, mean), el("small", {}, ends));
      },
    })),
  ];
  return sortableTable("Means over seeds with their 95 % intervals", columns, DATA.groups);
}

function pairsTable() {
  const name = ([run, stage, mode]) =>
    (several ? `${DATA.runs[run].name}, ` : "") + `${stage}, ${mode}`;
  const points = (share) => `${share > 0 ? "+" : ""}${(100 * share).toFixed(1)}`;
  const columns = [
    { head: "first", text: true, sort: (p) => name(p.first), cell: (p) => name(p.first) },
    { head: "second", text: true, sort: (p) => name(p.second), cell: (p) => name(p.second) },
    { head: "problems", sort: (p) => p.total, cell: (p) => String(p.total) },
    { head: "both right", sort: (p) => p.both, cell: (p) => String(p.both) },
    { head: "only first right", sort: (p) => p.only_first, cell: (p) => String(p.only_first) },
    { head: "only second right", sort: (p) => p.only_second, cell: (p) => String(p.only_second) },
    {
      head: "second minus first (percentage points)",
      sort: (p) => p.difference.center,
      cell: (p) => {
        const { center, low, high } = p.difference;
        return el("span", {}, points(center), el("small", {}, `${points(low)} to ${points(high)}`));
      },
    },
    {
      head: "p",
      sort: (p) => p.p_value,
      cell: (p) => (p.p_value < 0.001 ? "< 0.001" : p.p_value.toFixed(3)),
    },
  ];
  return sortableTable("Accuracy of two evaluations, problem by problem", columns, DATA.pairs);
}

const MEASURES = {
  channel: "What the channel carries, per pass",
  gradient: "Main's policy gradient: its own tokens and the head's",
  thought: "Does the answer come from the thought?",
};

function measureTable({ measure, metrics }) {
  const rows = DATA.runs.flatMap((run) =>
    run.measures.filter((m) => m.measure === measure).map((m) => ({ ...m, run: run.name })),
  );
  const columns = [
    ...(several ? [{ head: "run", text: true, sort: (r) => r.run, cell: (r) => r.run }] : []),
    { head: "stage", text: true, sort: (r) => r.stage, cell: (r) => r.stage },
    { head: "problems", sort: (r) => r.num_problems, cell: (r) => String(r.num_problems) },
    ...metricColumns((row) => row, metrics),
  ];
  return sortableTable(MEASURES[measure], columns, rows);
}

function showTables() {
  const parts = [];
  if (several) {
    parts.push(runsTable());
    if (DATA.groups.length) parts.push(el("h3", {}, "Means over seeds"), groupsTable());
  } else {
    const [run] = DATA.runs;
    parts.push(run.stages.length ? stageTable(run) : el("p", {}, "No evaluation has ended yet."));
  }
  byId("tables").replaceChildren(...parts);
  byId("measured").replaceChildren(
    ...(DATA.measures.length
      ? DATA.measures.map(measureTable)
      : [el("p", { class: "note" }, "None yet: mtp evaluate RUN --measure channel|gradient|thought")]),
  );
  byId("compared").replaceChildren(
    DATA.pairs.length
      ? pairsTable()
      : el("p", { class: "note" }, "No two evaluations of the same problems are recorded."),
  );
}
