"use strict";
// Start of the page: theme, what is shown first, refreshing until a run has ended.

const STORE = `mtp-report ${location.pathname}`;

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORE)) ?? {};
  } catch {
    return {}; // storage may be closed to files, or hold what another version wrote
  }
}

function store() {
  const state = { ...Viewer.state(), scroll: scrollY, theme: byId("theme").value };
  try {
    sessionStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // Without storage a reload begins anew.
  }
}

function setTheme(name) {
  byId("theme").value = name;
  if (name === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = name;
  document.dispatchEvent(new Event("theme"));
}

/** Paper is white: a page with the dark theme is printed with the light one. */
function printInLight() {
  let theme = null;
  addEventListener("beforeprint", () => {
    theme = byId("theme").value;
    setTheme("light");
  });
  addEventListener("afterprint", () => theme && setTheme(theme));
}

/** Read the file again every few seconds, but not while somebody uses the page. */
function startRefreshing(seconds) {
  let used = 0;
  for (const name of ["pointermove", "keydown", "wheel", "touchstart"]) {
    addEventListener(name, () => (used = Date.now()), { passive: true });
  }
  byId("refresh").hidden = false;
  setInterval(() => {
    const rests = Date.now() - used > 1000 * seconds;
    if (rests && byId("refreshing").checked && !document.hidden) {
      store();
      location.reload();
    }
  }, 1000 * seconds);
}

(() => {
  const state = stored();
  const count = (status) => DATA.runs.filter((run) => run.status === status).length;
  const parts = ["ended", "unfinished", "failed"].filter(count).map((s) => `${count(s)} ${s}`);
  const [run] = DATA.runs;
  byId("about").textContent = several
    ? parts.join(", ")
    : `${run.status}${run.seed ? `, seed ${run.seed}` : ""}`;
  showTables();
  Viewer.start(state);
  showCallout();
  setTheme(state.theme ?? "auto");
  byId("theme").addEventListener("input", () => setTheme(byId("theme").value));
  printInLight();
  addEventListener("pagehide", () => Viewer.rows.length && store());
  if (DATA.refresh) startRefreshing(DATA.refresh);
  if (state.scroll) addEventListener("load", () => scrollTo(0, state.scroll));
})();
