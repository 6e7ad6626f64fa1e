// What all parts of the page share: words in its language, questions to the server, elements, tiles.
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

/** A question as it stands between quotes: its beginning, without quotes of its own around it. */
export const unquoted = (text) => text.slice(0, 80).replace(/^["“”«»']+|["“”«»']+$/g, "");

/** What went wrong, in words. */
export const reason = (error) => say(error.code ?? "failed", error.values, WORDS.errors);

/** Shows what went wrong until the next question; nothing where there is no error. */
export function notice(error) {
  const said = find("notice");
  said.hidden = !error;
  said.textContent = error ? reason(error) : "";
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
export const address = (kind, picture) => `${kind}?${new URLSearchParams({ path: picture.path, v: picture.v })}`;

/** A picture as a button, which opens it large. `text` is its name for screen readers. */
export function tile(picture, text, open) {
  const made = element(
    "button",
    { type: "button", class: "tile", title: picture.name, "data-path": picture.path, "aria-label": text, click: open },
    element("img", { src: picture.source ?? address("thumbnail", picture), alt: "", loading: "lazy", decoding: "async" }),
    element("span", { class: "caption", "aria-hidden": "true" }, element("span", {}, picture.name)),
  );
  made.style.setProperty("--ratio", Math.min(Math.max(picture.width / picture.height, 0.6), 2.4));
  return made;
}

/** Pictures as a list of tiles; `searched`: the score beside each and its place, after `from`; `open(i)` shows one large. */
export function gallery(pictures, searched, open, from = 0) {
  const tiles = pictures.map((picture, i) => {
    const name = searched ? say("place_of", { rank: from + i + 1, name: picture.name }) : picture.name;
    if (!searched) return element("li", {}, tile(picture, name, () => open(i)));
    const shown = score(picture.score, 2);
    const made = tile(picture, `${name}, ${say("score", { score: shown })}`, () => open(i));
    made.querySelector(".caption").append(element("span", { class: "score" }, shown));
    return element("li", {}, made);
  });
  return element("ol", { class: "gallery", start: from + 1 }, ...tiles);
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

/** A picture of the visitor, made smaller where it is large: the model sees a few hundred pixels a side of it. */
export async function shrunk(file) {
  if (file.size < 600_000) return file;
  try {
    const image = await createImageBitmap(file);
    const canvas = drawn(image, Math.min(1, 1024 / Math.max(image.width, image.height)));
    return await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  } catch {
    return file; // a format that this browser does not know; the server may
  }
}

/** Takes files dropped on `area`, chosen in `input` or, with `paste`, pasted anywhere. */
export function takeFiles(area, input, take, paste = () => false) {
  input.addEventListener("change", () => {
    if (input.files[0]) take(input.files[0]);
    input.value = ""; // the same file may be chosen again
  });
  area.addEventListener("dragover", (event) => (event.preventDefault(), area.classList.add("over")));
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData.files[0];
    if (file && paste()) take(file);
  });
}

/** A picture that was given, small, with a button that takes it away. */
export function given(source, remove) {
  const button = element(
    "button",
    { type: "button", "aria-label": say("picture_remove"), click: (event) => (event.preventDefault(), remove()) },
    "×",
  );
  return element("span", { class: "given" }, element("img", { src: source, alt: say("picture_given") }), button);
}
