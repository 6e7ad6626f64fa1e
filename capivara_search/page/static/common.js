// What all parts of the page share, with a server or without: words, errors, elements, files of the visitor.
export const WORDS = JSON.parse(document.getElementById("words").textContent);
export const LANGUAGE = WORDS.tag;
const PLURAL = new Intl.PluralRules(LANGUAGE);

export const find = (id) => document.getElementById(id);
export const number = (value, digits = 0) =>
  new Intl.NumberFormat(LANGUAGE, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);

/** A score; one near 0, as SigLIP's probabilities are, with its first two digits. */
export const score = (value, digits) => number(value, value > 1e-12 && value < 0.01 ? 1 - Math.floor(Math.log10(value)) : digits);

/** A text of the page with its values, `{name}` by `{name}`; a number `n` chooses singular or plural where there are both. */
export function say(key, values = {}, words = WORDS) {
  const forms = "n" in values ? `${key}_${PLURAL.select(values.n) === "one" ? "one" : "other"}` : key;
  const text = words[forms] ?? words[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => (typeof values[name] === "number" ? number(values[name]) : values[name] ?? ""));
}

/** What went wrong, in words. */
export const reason = (error) => say(error.code ?? "failed", error.values, WORDS.errors);

/** Shows what went wrong until the next question; nothing where there is no error. */
export const notice = (error) => (find("notice").textContent = error ? reason(error) : "");

/** An element with attributes (a function is a listener, false none) and children, texts among them as texts. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

/** A picture on white whose sides are `scale` times as long. */
export function drawn(image, scale) {
  const sides = [image.width, image.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(...sides);
  const context = canvas.getContext("2d", { alpha: false });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, ...sides);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, ...sides);
  return canvas;
}

/** Calls `take(files)` for those chosen in one of `inputs`, and for those dropped or pasted while `area` is in sight. */
export function takeFiles(area, inputs, take) {
  const given = (files) => files.length && area.checkVisibility() && take([...files]);
  for (const input of inputs)
    input.addEventListener("change", () => {
      given(input.files);
      input.value = ""; // the same file may be chosen again
    });
  document.addEventListener("dragover", (event) => event.preventDefault()); // or the browser leaves the page for the file
  document.addEventListener("drop", (event) => (event.preventDefault(), given(event.dataTransfer.files)));
  document.addEventListener("paste", (event) => given(event.clipboardData.files));
}
