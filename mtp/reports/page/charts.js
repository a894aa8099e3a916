"use strict";
// Plots, drawn by Plotly when they come into view. Each has its numbers below it as a table.

const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8A8A8A"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const SYMBOLS = { slow: "square", fast: "circle", verified: "diamond" };
const MANY = 14; // series from which a legend would be larger than the plot

/** A mode's marker; open where the colours begin again. */
const symbol = (mode, i) => SYMBOLS[mode] + (i >= COLOURS.length ? "-open" : "");

const colour = (i) => COLOURS[i % COLOURS.length];
const inPercent = (values) => values.map((v) => (v === null || v === undefined ? null : 100 * v));
const STEPS = "optimizer steps, all stages";

/** Asymmetric error bars from ends of intervals. */
function errors(points, scale = 100) {
  if (!points.some((p) => p.low !== null && p.low !== undefined)) return undefined;
  const side = (end, sign) =>
    points.map((p) => (p[end] === null ? 0 : sign * scale * (p[end] - p.accuracy)));
  return {
    type: "data",
    symmetric: false,
    array: side("high", 1),
    arrayminus: side("low", -1),
    thickness: 1,
    width: 3,
  };
}

/** A logarithmic axis with ticks at round numbers around some values. */
function logTicks(values) {
  const known = values.filter((v) => v > 0);
  const [low, high] = [Math.min(...known) / 1.3, Math.max(...known) * 1.3];
  const ticks = [];
  for (let power = -6; power < 10; power++) {
    for (const lead of [1, 1.5, 2, 3, 5, 7]) {
      const tick = lead * 10 ** power;
      if (tick >= low && tick <= high) ticks.push(Number(tick.toPrecision(2)));
    }
  }
  return { type: "log", tickvals: ticks, range: [Math.log10(low), Math.log10(high)] };
}

/** Points that no other point beats: more accuracy in as many passes or fewer. */
function paretoFront(points) {
  const sorted = [...points].sort((a, b) => a.passes - b.passes || b.accuracy - a.accuracy);
  let best = -1;
  return sorted.filter((p) => p.accuracy > best && (best = p.accuracy, true));
}

const GROUPS = [...new Set(DATA.runs.map((run) => run.group))];
const isGrouped = DATA.groups.length > 0;

/** Colour and legend of a run: runs that differ by seed alone share theirs. `seen` names traces. */
function looks(run, number, name, seen) {
  const label = isGrouped ? run.group + name.slice(run.name.length) : name;
  const index = isGrouped ? GROUPS.indexOf(run.group) : number;
  const isFirst = !seen.has(label);
  seen.add(label);
  return { index, legend: { name: label, legendgroup: label, showlegend: isFirst } };
}

function frontierFigure() {
  const traces = [];
  const seen = new Set();
  const all = [];
  DATA.runs.forEach((run, number) => {
    const stage = run.stages.at(-1)?.name;
    const points = several ? run.finals.filter((p) => p.stage === stage) : run.finals;
    all.push(...points);
    const { index, legend } = looks(run, number, run.name, seen);
    const groups = several ? [[run.name, points, index]] : [];
    if (!several) {
      run.stages.forEach((stage, i) => {
        groups.push([stage.name, points.filter((p) => p.stage === stage.name), i]);
      });
    }
    for (const [name, mine, i] of groups) {
      if (!mine.length) continue;
      traces.push({
        name,
        ...(several ? legend : {}),
        x: mine.map((p) => p.passes),
        y: inPercent(mine.map((p) => p.accuracy)),
        error_y: errors(mine),
        text: mine.map((p) => `${name}, ${p.mode}`),
        mode: "markers",
        marker: { color: colour(i), size: 9, symbol: mine.map((p) => symbol(p.mode, i)) },
        hovertemplate: "%{text}<br>%{x:.1f} passes, %{y:.1f} %<extra></extra>",
      });
    }
  });
  if (!all.length) return null;
  const front = paretoFront(all);
  traces.push({
    name: "Pareto front",
    x: front.map((p) => p.passes),
    y: inPercent(front.map((p) => p.accuracy)),
    mode: "lines",
    line: { shape: "hv", dash: "dot", width: 1.5, color: COLOURS[6] },
    hoverinfo: "skip",
  });
  return {
    key: "frontier",
    title: "Accuracy against passes",
    note: "square: slow, circle: fast, diamond: verified; bars: 95 % intervals",
    x: { title: "passes per problem (log scale)", ...logTicks(all.map((p) => p.passes)) },
    y: { title: "held-out accuracy (%)", range: [-3, 103] },
    traces,
  };
}

function accuracyFigure() {
  const traces = [];
  const seen = new Set();
  const modes = ["slow", "fast"].filter((mode) =>
    DATA.runs.some((run) => run.points.some((p) => p.mode === mode)),
  );
  DATA.runs.forEach((run, number) => {
    modes.forEach((mode, i) => {
      const points = run.points.filter((p) => p.mode === mode);
      if (!points.length) return;
      const { index, legend } = looks(run, number, `${run.name}, ${mode}`, seen);
      traces.push({
        ...(several ? legend : { name: mode }),
        x: points.map((p) => p.step),
        y: inPercent(points.map((p) => p.accuracy)),
        error_y: several ? undefined : errors(points),
        mode: "lines+markers",
        marker: { symbol: symbol(mode, several ? index : 0), size: 6 },
        line: { color: colour(several ? index : i), dash: DASHES[several ? i : 0] },
      });
    });
  });
  return traces.length && {
    key: "accuracy",
    title: "Accuracy over training",
    note: several ? "" : "bars: 95 % intervals",
    x: { title: STEPS },
    y: { title: "held-out accuracy (%)", range: [-3, 103] },
    shapes: stageLines(0),
    annotations: stageNames(),
    traces,
  };
}

/** Where the stages of a single run end. */
function stageEnds() {
  if (several) return [];
  const ends = new Map();
  for (const point of DATA.runs[0].points) ends.set(point.stage, point.step);
  return [...ends];
}

/** A line where each stage ends, in a plot that begins at some step. */
const stageLines = (from) =>
  stageEnds().filter(([, step]) => step >= from).map(([, step]) => ({
    type: "line", x0: step, x1: step, y0: 0, y1: 1, yref: "paper",
    line: { width: 1, dash: "dot", color: COLOURS[6] },
  }));

const stageNames = () =>
  stageEnds().map(([name, step]) => ({
    x: step, y: 1, yref: "paper", text: name, showarrow: false, xanchor: "right", yanchor: "bottom",
    font: { size: 11 },
  }));

function curveFigure(chart) {
  const traces = [];
  const seen = new Set();
  DATA.runs.forEach((run, number) => {
    chart.metrics.forEach((name, i) => {
      const curve = run.curves[name];
      if (!curve) return;
      const label = name.replace("eval/", "held-out ").replaceAll("_", " ");
      const few = name.startsWith("eval/") || curve[0].length < 3;
      const { index, legend } = looks(run, number, `${run.name}, ${label}`, seen);
      traces.push({
        ...(several ? legend : { name: label }),
        x: curve[0],
        y: chart.share ? inPercent(curve[1]) : curve[1],
        mode: few ? "lines+markers" : "lines",
        line: { color: colour(several ? index : i), dash: DASHES[i % DASHES.length], width: 1.7 },
      });
    });
  });
  return traces.length && {
    key: chart.key,
    title: chart.title,
    x: { title: STEPS },
    y: { title: chart.unit, type: chart.log ? "log" : "linear", range: chart.share ? [-3, 103] : undefined },
    shapes: stageLines(Math.min(...traces.map((trace) => trace.x[0]))),
    traces,
  };
}

const SLOT_FIGURES = [
  ["message", "Use of the channel by slot", "nats lost with another pass's message", false],
  ["entropy", "Entropy by slot", "entropy (nats)", false],
  ["agreement", "Tokens that main would accept, by slot", "share of tokens (%)", true],
  ["reference", "The reference's view by slot", "negative log-likelihood (nats)", false],
];

function slotFigure([name, title, unit, share]) {
  const traces = [];
  let rollouts = 0;
  DATA.runs.forEach((run, number) => {
    const stages = several ? run.slots.slice(-1) : run.slots;
    stages.forEach((slots, i) => {
      const series = [[name, slots[name], 0]];
      if (name === "agreement") {
        series.push(["accepted", slots.accepted && [null, ...slots.accepted], 1]);
      }
      for (const [what, values, style] of series) {
        if (!values?.some((v) => v !== null)) continue;
        rollouts += style === 0 ? slots.rollouts : 0;
        const label = several ? run.name : slots.stage;
        traces.push({
          name: what === "accepted" ? `${label}, verified mode` : label,
          x: values.map((_, slot) => slot),
          y: share ? inPercent(values) : values,
          mode: "lines+markers",
          line: { color: colour(several ? number : i), dash: DASHES[style] },
        });
      }
    });
  });
  return traces.length && {
    key: `slots-${name}`,
    title,
    note: `means over ${rollouts} kept rollouts, fast phases; slot 0 is main's`,
    x: { title: "slot", dtick: 1 },
    y: { title: unit, range: share ? [-3, 103] : undefined, rangemode: share ? undefined : "tozero" },
    traces,
  };
}

/** A line for each result of a measure; `points` gives its {x, accuracy, low, high} or nothing. */
function measureTraces(measure, points, scale) {
  const traces = [];
  DATA.runs.forEach((run) => {
    for (const result of run.measures.filter((m) => m.measure === measure)) {
      const mine = points(result);
      if (!mine?.length) continue;
      traces.push({
        name: several ? `${run.name}, ${result.stage}` : result.stage,
        x: mine.map((p) => p.x),
        y: mine.map((p) => (p.accuracy === null ? null : scale * p.accuracy)),
        error_y: errors(mine, scale),
        mode: "lines+markers",
        line: { color: colour(traces.length) },
      });
    }
  });
  return traces;
}

function bitsFigure(metric) {
  const points = (result) => {
    const values = result[`${metric.name}_by_slot`];
    const ends = result.intervals[`${metric.name}_by_slot`];
    // Measures of the head's tokens begin at slot 1, those of all tokens at slot 0.
    const first = result.block_entropy_bits_by_slot.length - values?.length;
    return values?.map((accuracy, i) => ({
      x: first + i, accuracy, low: ends[i]?.[0] ?? null, high: ends[i]?.[1] ?? null,
    }));
  };
  const traces = measureTraces("channel", points, 1);
  return traces.length && {
    key: `measure-${metric.name}`,
    title: `By slot: ${metric.title}`,
    note: "mtp evaluate --measure channel; bars: 95 % intervals over problems",
    x: { title: "slot", dtick: 1 },
    y: { title: "bits per token", rangemode: "tozero" },
    traces,
  };
}

function thoughtFigure({ curve, value, title }) {
  const points = (result) =>
    result.curves[curve]
      ?.filter((p) => p[value] !== undefined)
      .map((p) => ({
        x: 100 * p.at, accuracy: p[value], low: p.intervals[value][0], high: p.intervals[value][1],
      }));
  const traces = measureTraces("thought", points, 100);
  return traces.length && {
    key: `measure-${curve}-${value}`,
    title,
    note: "mtp evaluate --measure thought; bars: 95 % intervals",
    x: { title: "place in the thought (% of its length)", range: [-3, 103] },
    y: { title: "share of problems (%)", range: [-3, 103] },
    traces,
  };
}

function timesFigure() {
  const rows = DATA.runs.flatMap((run) =>
    (several ? run.times.slice(-1) : run.times).map((t) => ({ ...t, name: several ? run.name : t.stage })),
  );
  if (!rows.length) return null;
  const part = (key, name, i) => ({
    name, type: "bar", orientation: "h", y: rows.map((r) => r.name), x: rows.map((r) => r[key]),
    marker: { color: colour(i) },
  });
  return {
    key: "times",
    title: "Where a step's time goes",
    note: "mean of the logged steps of each stage",
    x: { title: "seconds per step" },
    y: { autorange: "reversed", automargin: true },
    barmode: "stack",
    traces: [part("sampling", "sampling rollouts", 0), part("update", "update and the rest", 1)],
  };
}

/** Rows of the legend below a plot of some width. */
function legendRows(figure, width) {
  const names = figure.traces.filter((t) => t.showlegend !== false).map((t) => t.name.length);
  if (names.length < 2 || names.length > MANY) return 0;
  return Math.ceil(names.length / Math.max(1, Math.floor(width / (6.5 * Math.max(...names) + 60))));
}

const INNER_HEIGHT = 240;

function layoutOf(figure, width) {
  const rows = legendRows(figure, width);
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim();
  const line = style.getPropertyValue("--line").trim();
  const axis = (given) => ({
    gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true,
    exponentformat: "power", ...given, title: { text: given.title, standoff: 8 },
  });
  return {
    font: { color: ink, size: 12, family: "system-ui, sans-serif" },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    height: INNER_HEIGHT + 20 + 52 + 21 * rows,
    margin: { l: 56, r: 12, t: 20, b: 52 + 21 * rows },
    xaxis: axis(figure.x),
    yaxis: axis(figure.y),
    showlegend: rows > 0,
    legend: { orientation: "h", y: -50 / INNER_HEIGHT, yanchor: "top", font: { size: 11 } },
    hovermode: "closest",
    barmode: figure.barmode,
    shapes: figure.shapes,
    annotations: figure.annotations,
  };
}

function draw(box) {
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  Plotly.react(box, box.figure.traces, layoutOf(box.figure, box.clientWidth - 70), options);
  box.drawn = true;
}

/** The numbers of a plot, for readers who do not see it. */
function numbersOf(figure) {
  const details = el("details", {}, el("summary", {}, "Numbers"));
  const round = (v) => (typeof v === "number" ? String(Number(v.toPrecision(5))) : String(v ?? "-"));
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    const body = el("tbody");
    for (const trace of figure.traces) {
      trace.x.forEach((x, i) => {
        const cells = [trace.name, round(x), round(trace.y[i])].map((text) => el("td", {}, text));
        body.append(el("tr", {}, ...cells));
      });
    }
    const heads = ["series", figure.x.title ?? "x", figure.y.title ?? "y"];
    const head = el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text)));
    details.append(el("table", {}, el("thead", {}, head), body));
  });
  return details;
}

(() => {
  const figures = [
    frontierFigure(),
    accuracyFigure(),
    ...DATA.charts.map(curveFigure),
    ...SLOT_FIGURES.map(slotFigure),
    ...DATA.measures.flatMap((m) => m.by_slot.map(bitsFigure)),
    ...DATA.measure_curves.map(thoughtFigure),
    timesFigure(),
  ].filter(Boolean);
  const boxes = figures.map((figure) => {
    const box = el("div", { class: "plot", role: "img", "aria-label": figure.title });
    box.figure = figure;
    const parts = [el("figcaption", {}, figure.title)];
    if (figure.note) parts.push(el("p", { class: "note" }, figure.note));
    byId("figures").append(
      el("figure", { id: `figure-${figure.key}` }, ...parts, box, numbersOf(figure)),
    );
    return box;
  });
  if (!boxes.length) byId("figures").append(el("p", { class: "note" }, "Nothing is logged yet."));
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting && !entry.target.drawn) draw(entry.target);
      }
    },
    { rootMargin: "400px" },
  );
  boxes.forEach((box) => seen.observe(box));
  const again = () => boxes.filter((box) => box.drawn).forEach(draw);
  document.addEventListener("theme", again);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("beforeprint", () => boxes.forEach(draw));
})();
