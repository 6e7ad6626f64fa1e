// What all parts of the page share, and the page without a server, too: words, questions, elements, tiles, the form.
export const WORDS = JSON.parse(document.getElementById("words").textContent);
export const LANGUAGE = WORDS.tag;
export const PAGE = 48; // pictures at first, and with each "more"
const TYPING_MS = 250; // without a key, then a search begins
const TILES = "#results li:not(.copy) .tile"; // without the copies that are open
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

/** The answer to a question, a line of JSON and perhaps a picture; an error has the code of its words. */
export async function ask(name, question = {}, picture = null, signal = undefined) {
  const body = new Blob([JSON.stringify(question), "\n", ...(picture ? [picture] : [])]);
  let answer, values;
  try {
    answer = await fetch(`api/${name}`, { method: "POST", body, signal });
    values = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error(name), { code: answer ? "failed" : "connection", values: {} });
  }
  if (!answer.ok) throw Object.assign(new Error(name), { code: values.error, values: values.values ?? {} });
  return values;
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

/** Address of a picture of the index; it changes with the file, so that browsers may keep the answer. */
export const address = (kind, picture) => `${kind}?${new URLSearchParams({ path: picture.path, v: picture.v ?? 0 })}`;

/** A picture of a list as a button, which opens it large. `text` is its name for screen readers; `more` is in its caption. */
export function tile(picture, text, open, more = null) {
  const image = element("img", { src: picture.source ?? address("thumbnail", picture), alt: "", loading: "lazy", decoding: "async" });
  const caption = element("span", { class: "caption", "aria-hidden": "true" }, element("span", {}, picture.name), more);
  const named = { title: picture.name, "data-path": picture.path, "aria-label": text };
  const made = element("li", {}, element("button", { type: "button", class: "tile", ...named, click: open }, image, caption));
  made.style.setProperty("--ratio", Math.min(Math.max(picture.width / picture.height, 0.6), 2.4));
  return made;
}

/** Pictures as a list of tiles; `searched`: the score beside each and its place, after `from`; `open(i)` shows one large. */
export function gallery(pictures, searched, open, from = 0) {
  const tiles = pictures.map((picture, i) => {
    if (!searched) return tile(picture, picture.name, () => open(i));
    const shown = score(picture.score, 2);
    const text = `${say("place_of", { rank: from + i + 1, name: picture.name })}, ${say("score", { score: shown })}`;
    return tile(picture, text, () => open(i), element("span", { class: "score" }, shown));
  });
  return element("ol", { class: "gallery", start: from + 1 }, ...tiles);
}

/** Calls `search(keep)` as one types, with Enter ("push") and for more of `asked.k` (null); "/" leads to the field. */
export function searchForm(asked, search) {
  const field = find("text");
  let typing = 0;
  field.addEventListener("input", () => {
    Object.assign(asked, { text: field.value, k: PAGE });
    clearTimeout(typing);
    typing = setTimeout(search, TYPING_MS, "replace");
  });
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typing);
    search("push");
  });
  find("more").addEventListener("click", async () => {
    const shown = document.querySelectorAll(TILES).length;
    asked.k += PAGE;
    await search(null);
    document.querySelectorAll(TILES)[shown]?.focus({ preventScroll: true });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest("input, textarea, dialog")) return;
    event.preventDefault();
    document.querySelector("[data-part=search]")?.click();
    field.select();
  });
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
  for (const image of place.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  if (!source) return place.replaceChildren();
  const image = element("img", { src: source instanceof Blob ? URL.createObjectURL(source) : source, alt: say("picture_given") });
  const take = (event) => (event.preventDefault(), remove());
  place.replaceChildren(element("span", { class: "given" }, image, element("button", { type: "button", "aria-label": say("picture_remove"), click: take }, "×")));
}
