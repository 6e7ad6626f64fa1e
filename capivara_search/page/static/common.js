// Functions that all scripts of the page use, with and without a server: texts, errors, HTML elements and files that
// the user chooses.
export const MESSAGES = JSON.parse(document.getElementById("words").textContent);
export const LANGUAGE = MESSAGES.tag;
const PLURAL = new Intl.PluralRules(LANGUAGE);

export const byId = (id) => document.getElementById(id);
export const formatNumber = (value, digits = 0) =>
  new Intl.NumberFormat(LANGUAGE, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);

/**
 * Formats a score with `digits` decimals. Scores between 1e-12 and 0.01 get two significant digits, because the
 * probabilities of SigLIP models are often very small.
 */
export const formatScore = (value, digits) =>
  formatNumber(value, value > 1e-12 && value < 0.01 ? 1 - Math.floor(Math.log10(value)) : digits);

/**
 * Returns a text in the language of the page, with each placeholder `{name}` replaced by `values.name`.
 * @param key Key of the text. If `values` has a number `n`, the text is `key_one` (singular) or `key_other` (plural).
 */
export function message(key, values = {}, messages = MESSAGES) {
  const pluralKey = "n" in values ? `${key}_${PLURAL.select(values.n) === "one" ? "one" : "other"}` : key;
  const text = messages[pluralKey] ?? messages[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => (typeof values[name] === "number" ? formatNumber(values[name]) : values[name] ?? ""));
}

/** Returns the text of an error. `error.code` is its key, and `error.values` replace its placeholders. */
export const errorMessage = (error) => message(error.code ?? "failed", error.values, MESSAGES.errors);

/** Shows the text of an error until the next request. If `error` is undefined or null, hides the previous text. */
export const showError = (error) => (byId("notice").textContent = error ? errorMessage(error) : "");

/**
 * Creates an HTML element.
 * @param name Name of the element, such as "button".
 * @param attributes Attributes by name. A function is added as a listener of the event with this name. An attribute with
 *     the value false, null or undefined is left out, and true stands for an empty value.
 * @param children Elements or texts; null is left out.
 */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** Resizes an image by the factor `scale`, draws it on a white canvas and returns the canvas. */
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

/**
 * Calls `receive(files)` when the user chooses files in one of the elements `inputs`, or drops or pastes files while the
 * element `area` is visible.
 */
export function onFiles(area, inputs, receive) {
  const pass = (files) => files.length && area.checkVisibility() && receive([...files]);
  for (const input of inputs)
    input.addEventListener("change", () => {
      pass(input.files);
      input.value = ""; // so that a "change" event is also sent if the user chooses the same file again
    });
  document.addEventListener("dragover", (event) => event.preventDefault()); // otherwise the browser would open the dropped file
  document.addEventListener("drop", (event) => (event.preventDefault(), pass(event.dataTransfer.files)));
  document.addEventListener("paste", (event) => pass(event.clipboardData.files));
}
