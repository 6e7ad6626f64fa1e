// Pictures of an answer: as tiles, and large in a dialog, with what is known of each, steps, keys and focus.
import { LANGUAGE, element, find, number, say, score } from "./common.js";
import { address, large } from "./source.js";

const viewer = find("viewer");
let [list, place, source] = [[], 0, ""];

/** A picture of a list as a button, which opens it large. `text` is its name for screen readers; `more` is in its caption. */
export function tile(pictures, i, text, more = null) {
  const picture = pictures[i];
  const image = element("img", { src: address("thumbnail", picture), alt: "", loading: "lazy", decoding: "async" });
  const caption = element("span", { class: "caption", "aria-hidden": "true" }, element("span", {}, picture.name), more);
  const named = { title: picture.name, "data-path": picture.path, "aria-label": text };
  const made = element("li", {}, element("button", { type: "button", class: "tile", ...named, click: () => open(pictures, i) }, image, caption));
  made.style.setProperty("--ratio", Math.min(Math.max(picture.width / picture.height, 0.6), 2.4));
  return made;
}

/** Pictures as a list of tiles, with place and score where there are scores; a line stands before those that hardly fit. */
export function gallery(pictures) {
  const tiles = pictures.map((picture, i) => {
    if (picture.score === null) return tile(pictures, i, picture.name);
    const shown = score(picture.score, 2);
    const text = `${say("place_of", { rank: i + 1, name: picture.name })}, ${say("score", { score: shown })}`;
    return tile(pictures, i, text, element("span", { class: "score" }, shown));
  });
  const line = pictures.findIndex(({ fits }) => fits === false); // no better than the background
  if (line >= 0) tiles.splice(line, 0, element("li", { class: "line" }, say(line ? "line" : "line_first")));
  return element("ol", { class: "gallery" }, ...tiles);
}

function open(pictures, i) {
  [list, place] = [pictures, i];
  step(0);
  viewer.showModal();
}

/** Closes the dialog for another search, begun by `action(picture)`, which has the focus then. */
export function leave(action) {
  viewer.close();
  action(list[place]);
}

function step(by) {
  place = Math.min(Math.max(place + by, 0), list.length - 1);
  const [shown, image] = [list[place], find("viewer-picture")];
  find("viewer-title").textContent = shown.name;
  find("viewer-path").textContent = shown.path;
  find("viewer-facts").replaceChildren(...facts(shown).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  find("viewer-said").textContent = "";
  find("before").disabled = place === 0;
  find("after").disabled = place === list.length - 1;
  find("download").hidden = true;
  find("download").href = address("download", shown);
  const sides = { width: 2 * shown.width, height: 2 * shown.height }; // a small picture is not blown up to the whole window
  Object.assign(image, { alt: shown.name, ...sides, src: address("thumbnail", shown) }); // until the large one is there
  URL.revokeObjectURL(source);
  large(shown).catch(() => null).then((file) => {
    if (shown !== list[place]) return;
    if (!file) return (find("viewer-said").textContent = say("gone_original"));
    find("download").hidden = file === shown.file; // chosen by the visitor
    image.src = source = URL.createObjectURL(file);
  });
}

function facts(shown) {
  const date = (text) => new Date(text).toLocaleString(LANGUAGE, { dateStyle: "long", timeStyle: "short" });
  const bytes = (size) => (size < 1e6 ? `${number(size / 1e3)} kB` : `${number(size / 1e6, 1)} MB`);
  const degrees = (value, [plus, minus]) => `${number(Math.abs(value), 5)}° ${value < 0 ? minus : plus}`;
  return [
    shown.date && [say("date"), date(shown.date) + (shown.date_source === "file" ? say("of_file") : "")],
    [say("dimensions"), say("pixels", { width: shown.width, height: shown.height })],
    shown.size && [say("bytes"), bytes(shown.size)],
    shown.latitude != null && [say("place"), `${degrees(shown.latitude, "NS")}, ${degrees(shown.longitude, LANGUAGE === "en" ? "EW" : "LO")}`],
    shown.score != null && [say("score_short"), score(shown.score, 3)],
  ].filter(Boolean);
}

find("before").addEventListener("click", () => step(-1));
find("after").addEventListener("click", () => step(1));
find("copy").addEventListener("click", async () => {
  getSelection().selectAllChildren(find("viewer-path")); // for Ctrl+C, where a page without https may not copy
  const copied = await navigator.clipboard?.writeText(list[place].path).then(() => true, () => false);
  if (copied) find("viewer-said").textContent = say("copied");
});
document.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by && viewer.open) step(by); // on the document: a button that is disabled loses the focus to it
});
