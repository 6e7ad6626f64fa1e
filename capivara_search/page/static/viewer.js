// The large view: a picture with what is known of it, and what can be done with it.
import { LANGUAGE, address, ask, element, find, number, reason, say } from "./common.js";

const viewer = find("viewer");
const state = { pictures: [], place: 0, actions: {}, left: false };

/**
 * Opens a picture of a list. `actions` has what other parts do: `similar(picture)` and `folder(path)`; `local`, whether
 * the visitor sits at this machine; and `folders`, those of the index.
 */
export function open(pictures, place, actions) {
  Object.assign(state, { pictures, place, actions, left: false });
  show();
  if (!viewer.open) viewer.showModal();
}

const picture = () => state.pictures[state.place];

function step(by) {
  const place = state.place + by;
  if (place < 0 || place >= state.pictures.length) return;
  state.place = place;
  show();
}

function show() {
  const shown = picture();
  find("viewer-title").textContent = shown.name;
  find("viewer-said").textContent = "";
  find("before").disabled = state.place === 0;
  find("after").disabled = state.place === state.pictures.length - 1;
  find("viewer-path").replaceChildren(...pathParts(shown));
  find("viewer-facts").replaceChildren(...facts(shown).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  find("download").href = address("download", shown);
  find("show").hidden = !state.actions.local;
  const image = find("viewer-picture");
  image.alt = shown.name;
  image.style.maxWidth = `${2 * shown.width}px`; // a small picture is not blown up to the whole window
  image.style.maxHeight = `${2 * shown.height}px`;
  image.src = address("thumbnail", shown); // at once, until the large one is there
  const large = new Image();
  large.onload = () => shown === picture() && (image.src = address("picture", shown));
  large.src = address("picture", shown);
  ask("about", { like: shown.path }).then(
    ({ original }) => {
      if (shown !== picture()) return;
      for (const id of ["download", "show"]) find(id).hidden = !original || (id === "show" && !state.actions.local);
      if (!original) say_here(say("gone_original"));
    },
    (error) => shown === picture() && fault(error),
  );
}

/** The folders of a path, each of which narrows the search to itself, and the name of the file. */
function pathParts(shown) {
  const slash = shown.path.startsWith("/") ? "/" : "\\";
  const parts = shown.path.split(slash);
  const name = parts.pop();
  const nodes = [];
  parts.forEach((part, i) => {
    const folder = parts.slice(0, i + 1).join(slash);
    const narrow = () => leave(() => state.actions.folder(folder));
    if (state.actions.folders.some((root) => `${folder}${slash}`.startsWith(`${root}${slash}`)))
      nodes.push(element("button", { type: "button", title: say("in_folder", { name: part }), click: narrow }, part));
    else nodes.push(part);
    nodes.push(slash, element("wbr"));
  });
  return [...nodes, element("b", {}, name)];
}

function facts(shown) {
  const date = (text) => new Date(text).toLocaleString(LANGUAGE, { dateStyle: "long", timeStyle: "short" });
  const degrees = (value, [plus, minus]) => `${number(Math.abs(value), 5)}° ${value < 0 ? minus : plus}`;
  const east = LANGUAGE === "en" ? "EW" : "LO";
  return [
    shown.taken && [say("taken"), date(shown.taken)],
    !shown.taken && shown.modified && [say("modified"), date(shown.modified)],
    [say("dimensions"), say("pixels", { width: shown.width, height: shown.height })],
    shown.size && [say("bytes"), shown.size < 1e6 ? `${number(shown.size / 1e3)} kB` : `${number(shown.size / 1e6, 1)} MB`],
    shown.latitude != null && [say("place"), `${degrees(shown.latitude, "NS")}, ${degrees(shown.longitude, east)}`],
    shown.score != null && [say("score_short"), number(shown.score, 3)],
  ].filter(Boolean);
}

/** Closes the view for another search, which has the focus then. */
function leave(action) {
  state.left = true;
  viewer.close();
  action();
}

const say_here = (text) => (find("viewer-said").textContent = text);
const fault = (error) => say_here(reason(error));

async function copy() {
  try {
    await navigator.clipboard.writeText(picture().path);
    say_here(say("copied"));
  } catch {
    say_here(say("not_copied"));
  }
}

find("before").addEventListener("click", () => step(-1));
find("after").addEventListener("click", () => step(1));
find("close").addEventListener("click", () => viewer.close());
find("copy").addEventListener("click", copy);
find("show").addEventListener("click", () => ask("show", { like: picture().path }).then(() => say_here(say("shown")), fault));
find("similar").addEventListener("click", () => leave(() => state.actions.similar(picture())));
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
