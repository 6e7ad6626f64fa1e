// The dialog in which a picture of a list is large: steps, keys and focus. What else is shown of a picture, and what can
// be done with it, the page adds.
import { element, find, number } from "./common.js";

const viewer = find("viewer");
const state = { list: [], place: 0, draw: null, left: false };

/** Opens a picture of a list; `draw(picture, image)` shows it in the element `image`, now and after each step. */
export function openDialog(list, place, draw) {
  Object.assign(state, { list, place, draw, left: false });
  show();
  if (!viewer.open) viewer.showModal();
}

/** The picture that is shown. */
export const picture = () => state.list[state.place];

/** Closes the dialog for another search, which has the focus then. */
export function leave(action) {
  state.left = true;
  viewer.close();
  action();
}

/** A line under the buttons. */
export const sayHere = (text) => (find("viewer-said").textContent = text);

/** Names and values under the picture. */
export const showFacts = (facts) =>
  find("viewer-facts").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));

/** Bytes, in words. */
export const bytes = (size) => (size < 1e6 ? `${number(size / 1e3)} kB` : `${number(size / 1e6, 1)} MB`);

function step(by) {
  const place = state.place + by;
  if (place < 0 || place >= state.list.length) return;
  state.place = place;
  show();
}

function show() {
  const shown = picture();
  find("viewer-title").textContent = shown.name;
  sayHere("");
  find("before").disabled = state.place === 0;
  find("after").disabled = state.place === state.list.length - 1;
  const image = find("viewer-picture");
  image.alt = shown.name;
  image.style.maxWidth = `${2 * shown.width}px`; // a small picture is not blown up to the whole window
  image.style.maxHeight = `${2 * shown.height}px`;
  state.draw(shown, image);
}

find("before").addEventListener("click", () => step(-1));
find("after").addEventListener("click", () => step(1));
find("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => {
  if (state.left) return;
  // to the picture that was seen last, which may be another one, or drawn anew meanwhile
  const tiles = [...document.querySelectorAll(".tile")].filter((tile) => tile.dataset.path === picture().path);
  (tiles.find((tile) => tile === document.activeElement) ?? tiles.find((tile) => tile.offsetParent))?.focus();
});
viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
document.addEventListener("keydown", (event) => {
  if (!viewer.open) return; // on the document: a button that is disabled loses the focus to it
  if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else return;
  event.preventDefault();
});
