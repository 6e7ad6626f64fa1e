// What all parts of the page share, with a server or without: words, errors, elements, files of the visitor.
export const WORDS = JSON.parse(document.getElementById("words").textContent);
export const LANGUAGE = WORDS.tag;
export const PAGE = 48; // pictures at first, and with each "more"
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

/** A question as it stands between quotes: its beginning, without quotes of its own around it. */
export const unquoted = (text) => text.slice(0, 80).replace(/^["“”«»']+|["“”«»']+$/g, "");

/** What went wrong, in words. */
export const reason = (error) => say(error.code ?? "failed", error.values, WORDS.errors);

/** Shows what went wrong until the next question; nothing where there is no error. */
export function notice(error) {
  find("notice").hidden = !error;
  find("notice").textContent = error ? reason(error) : "";
}

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

/** Calls `take(files)` for those dropped on `area`, chosen in one of `inputs`, or pasted while `area` is in sight. */
export function takeFiles(area, inputs, take) {
  const given = (files) => files.length && take([...files]);
  for (const input of inputs)
    input.addEventListener("change", () => {
      given(input.files);
      input.value = ""; // the same file may be chosen again
    });
  for (const event of ["dragover", "dragleave", "drop"])
    area.addEventListener(event, (it) => {
      it.preventDefault();
      area.classList.toggle("over", event === "dragover");
      if (event === "drop") given(it.dataTransfer.files);
    });
  document.addEventListener("paste", (event) => area.checkVisibility() && given(event.clipboardData.files));
}

/** Shows a picture that was given, a file or an address, small, with a button that takes it away; or none. */
export function showGiven(place, source, remove) {
  if (!source) return place.replaceChildren();
  const image = element("img", { src: source instanceof Blob ? URL.createObjectURL(source) : source, alt: say("picture_given") });
  const take = (event) => (event.preventDefault(), remove());
  place.replaceChildren(element("span", { class: "given" }, image, element("button", { type: "button", "aria-label": say("picture_remove"), click: take }, "×")));
}
