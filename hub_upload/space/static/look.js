// The large view: a picture with what is known of it.
import { LANGUAGE, element, find, number, say } from "./common.js";
import * as pictures from "./pictures.js";

const viewer = find("viewer");
const state = { list: [], place: 0, actions: {}, source: "" };

/** Opens a picture of a list; `actions` has `similar(picture)` and `forget(picture)`. */
export function look(list, place, actions) {
  Object.assign(state, { list, place, actions });
  show();
  if (!viewer.open) viewer.showModal();
}

const picture = () => state.list[state.place];

function step(by) {
  const place = state.place + by;
  if (place < 0 || place >= state.list.length) return;
  state.place = place;
  show();
}

function show() {
  const shown = picture();
  const file = pictures.original(shown.key);
  find("viewer-title").textContent = shown.name;
  find("viewer-path").textContent = shown.path === shown.name ? "" : shown.path;
  find("viewer-said").textContent = file ? "" : say("only_thumbnail");
  find("before").disabled = state.place === 0;
  find("after").disabled = state.place === state.list.length - 1;
  find("viewer-facts").replaceChildren(...facts(shown).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  const image = find("viewer-picture");
  image.alt = shown.name;
  image.style.maxWidth = `${2 * shown.width}px`; // a small picture is not blown up to the whole window
  image.style.maxHeight = `${2 * shown.height}px`;
  URL.revokeObjectURL(state.source);
  state.source = file ? URL.createObjectURL(file) : "";
  image.onerror = () => (image.src = shown.source); // the file has gone, or has changed, since it was chosen
  image.src = state.source || shown.source;
}

function facts(shown) {
  const date = new Date(shown.modified).toLocaleString(LANGUAGE, { dateStyle: "long", timeStyle: "short" });
  return [
    [say("modified"), date],
    [say("dimensions"), say("pixels", { width: shown.width, height: shown.height })],
    [say("bytes"), shown.size < 1e6 ? `${number(shown.size / 1e3)} kB` : `${number(shown.size / 1e6, 1)} MB`],
    ...(shown.score == null ? [] : [[say("score_short"), number(shown.score, 3)]]),
  ];
}

find("before").addEventListener("click", () => step(-1));
find("after").addEventListener("click", () => step(1));
find("close").addEventListener("click", () => viewer.close());
find("similar").addEventListener("click", () => (viewer.close(), state.actions.similar(picture())));
find("forget-one").addEventListener("click", () => (viewer.close(), state.actions.forget(picture())));
viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
viewer.addEventListener("close", () => {
  const tiles = [...document.querySelectorAll(".tile")].filter((tile) => tile.dataset.path === picture().path);
  (tiles.find((tile) => tile === document.activeElement) ?? tiles[0])?.focus();
});
document.addEventListener("keydown", (event) => {
  if (!viewer.open) return; // on the document: a button that is disabled loses the focus to it
  if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else return;
  event.preventDefault();
});
