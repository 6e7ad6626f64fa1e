// Shared by all scripts of the page, with and without a server: texts, errors, elements and files of the visitor.
export const MESSAGES = JSON.parse(document.getElementById("words").textContent);
export const LANGUAGE = MESSAGES.tag;
const PLURAL = new Intl.PluralRules(LANGUAGE);

export const byId = (id) => document.getElementById(id);
export const formatNumber = (value, digits = 0) =>
  new Intl.NumberFormat(LANGUAGE, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);

/** Formats a score with `digits` decimals, or a very small probability of SigLIP with two significant digits. */
export const formatScore = (value, digits) =>
  formatNumber(value, value > 1e-12 && value < 0.01 ? 1 - Math.floor(Math.log10(value)) : digits);

/** Returns a text with each `{name}` replaced by `values.name`; `values.n` selects the singular or the plural. */
export function message(key, values = {}, messages = MESSAGES) {
  const pluralKey = "n" in values ? `${key}_${PLURAL.select(values.n) === "one" ? "one" : "other"}` : key;
  const text = messages[pluralKey] ?? messages[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => (typeof values[name] === "number" ? formatNumber(values[name]) : values[name] ?? ""));
}

/** Returns the text of an error by its code. */
export const errorMessage = (error) => message(error.code ?? "failed", error.values, MESSAGES.errors);

/** Shows the text of an error until the next question; hides it if there is no error. */
export const showError = (error) => (byId("notice").textContent = error ? errorMessage(error) : "");

/** Creates an element. A function as attribute is an event listener, false leaves the attribute out; texts are children. */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** Draws an image on a white canvas whose sides are `scale` times as long. */
export function drawScaled(image, scale) {
  const sides = [image.width, image.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(...sides);
  const context = canvas.getContext("2d", { alpha: false });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, ...sides);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, ...sides);
  return canvas;
}

/** Calls `receive(files)` when files are chosen in one of `inputs`, or dropped or pasted while `area` is visible. */
export function onFiles(area, inputs, receive) {
  const pass = (files) => files.length && area.checkVisibility() && receive([...files]);
  for (const input of inputs)
    input.addEventListener("change", () => {
      pass(input.files);
      input.value = ""; // so that choosing the same file again is a change
    });
  document.addEventListener("dragover", (event) => event.preventDefault()); // or the browser would open the dropped file
  document.addEventListener("drop", (event) => (event.preventDefault(), pass(event.dataTransfer.files)));
  document.addEventListener("paste", (event) => pass(event.clipboardData.files));
}
