"use strict";
// Elements and numbers. Text becomes text nodes only, so HTML in it is shown and never read.

const DATA = JSON.parse(document.getElementById("data").textContent);

const byId = (id) => document.getElementById(id);

/** An element with attributes (functions are listeners) and children (elements or texts). */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

/** A metric's value as the tables of mtp show it. */
function cell(metric, value) {
  if (value === null || value === undefined) return "-";
  if (Array.isArray(value)) return value.map((one) => number(metric, one)).join(" ");
  return number(metric, value) + (metric.unit === "%" ? " %" : "");
}

const number = (metric, value) =>
  (metric.unit === "%" ? 100 * value : value).toFixed(metric.digits);

/** Text with its white space made visible. */
const visible = (text) =>
  text === "" ? "·" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

const several = DATA.runs.length > 1;
