// The dialog in which a picture of a list is large: steps, keys and focus. What else is shown of a picture, and what can
// be done with it, the page adds.
import { element, find, number } from "./common.js";

const viewer = find("viewer");
const state = { list: [], place: 0, draw: null };

/** Opens a picture of a list; `draw(picture, image)` shows it in the element `image`, now and after each step. */
export function openDialog(list, place, draw) {
  Object.assign(state, { list, place, draw });
  step(0);
  viewer.showModal();
}

/** The picture that is shown. */
export const picture = () => state.list[state.place];

/** Closes the dialog for another search, which has the focus then. */
export function leave(action) {
  viewer.close("left");
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
  state.place = Math.min(Math.max(state.place + by, 0), state.list.length - 1);
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
viewer.addEventListener("close", () => {
  if (viewer.returnValue === "left") return (viewer.returnValue = "");
  // to the picture that was seen last, which may be another one, or drawn anew meanwhile
  const tiles = [...document.querySelectorAll(".tile")].filter((tile) => tile.dataset.path === picture().path);
  (tiles.find((tile) => tile === document.activeElement) ?? tiles.find((tile) => tile.offsetParent))?.focus();
});
document.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || !viewer.open) return; // on the document: a button that is disabled loses the focus to it
  event.preventDefault();
  step(by);
});
