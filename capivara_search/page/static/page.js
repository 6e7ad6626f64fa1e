// The search by text (while the user types), by an uploaded picture, or by one of the results. The query is also stored in
// the address of the page, so that a search can be bookmarked.
import { MESSAGES, byId, element, message, onFiles, showError } from "./common.js";
import { onFolder, showFolder } from "./folders.js";
import { closeViewer, gallery, tile } from "./pictures.js";
import { ask, imageUrl, startBackgroundWork } from "./source.js";

const PAGE_SIZE = 48; // number of pictures that are shown at first, and that each click on "Show more" adds
const TYPING_MS = 250; // milliseconds from the last key until the search begins
// Milliseconds between two requests of the index status. LOCAL_POLL_MS is used if only this machine can open the page.
const [LOCAL_POLL_MS, POLL_MS] = [2000, 10_000];
const STATE_KEYS = ["text", "like", "folder", "since", "until", "more", "less"]; // values stored in the address
const FEEDBACK_KEYS = ["more", "less"]; // lists of pictures that the search is moved towards or away from
const query = { k: PAGE_SIZE, file: null };
let indexStatus = { version: null };
let lastRequest = 0;

// --- Requests --------------------------------------------------------------------------------------------------------

/**
 * Sends the query to the server and shows the results.
 * @param historyMode How the address of the page changes: "push" adds a history entry, "replace" changes the current
 *     entry, and null keeps the address.
 */
async function search(historyMode) {
  const request = ++lastRequest;
  saveState(historyMode);
  byId("results").ariaBusy = "true";
  const slow = setTimeout(() => request === lastRequest && (byId("said").textContent = message("searching")), 400);
  const { file, ...question } = query;
  const answer = await ask("search", question, file).catch((error) => ({ error })).finally(() => clearTimeout(slow));
  if (request !== lastRequest) return; // a later search has begun, and its results will be shown
  byId("results").ariaBusy = "false";
  showError(answer.error);
  if (!answer.error) return showAnswer(answer);
  byId("said").textContent = "";
  if (["no_picture", "too_many_pixels", "too_large"].includes(answer.error.code)) {
    query.file = null; // so that the next search by words does not fail because of this picture
    showQuery();
  }
}

/**
 * Changes the query, shows it in the fields of the form, scrolls to the top and begins a new search.
 * @param changes New values of `query`.
 * @param focused Element that gets the keyboard focus; null keeps the focus.
 */
function startSearch(changes, focused = byId("results")) {
  Object.assign(query, changes, { k: PAGE_SIZE });
  showQuery();
  scrollTo({ top: 0 });
  search("push");
  focused?.focus({ preventScroll: true });
}

/** Stores the query in the page address (`search` explains `historyMode`) and in the link to the other language. */
function saveState(historyMode) {
  const url = new URL(location.href);
  for (const key of STATE_KEYS) {
    url.searchParams.delete(key);
    for (const value of [query[key]].flat()) if (value) url.searchParams.append(key, value);
  }
  if (historyMode && url.href !== location.href) history[`${historyMode}State`](null, "", url);
  url.searchParams.set("lang", MESSAGES.other);
  document.querySelector(".language").search = url.search;
}

/** Reads the query from the address of the page and searches. */
function restoreState() {
  const saved = new URL(location.href).searchParams;
  for (const key of STATE_KEYS) query[key] = FEEDBACK_KEYS.includes(key) ? saved.getAll(key) : saved.get(key) ?? "";
  Object.assign(query, { k: PAGE_SIZE, file: null });
  showQuery();
  search(null);
}

/**
 * Requests and shows the status of the index. If the index has changed, repeats the search. If the user is looking at
 * results or has uploaded a picture, shows a notice instead.
 */
async function refresh() {
  const previousVersion = indexStatus.version;
  const answer = await ask("status", { language: MESSAGES.tag }).catch(() => null);
  if (!answer) return; // the next search will show the error
  indexStatus = answer;
  showStatus();
  if (previousVersion === null || previousVersion === indexStatus.version) return;
  const isBrowsing = document.querySelector("#results .copy, dialog[open]") || byId("results").getBoundingClientRect().top <= 0;
  if (isBrowsing || query.file) byId("said").textContent = message("changed", { n: indexStatus.count });
  else search(null);
}

// --- What is shown ---------------------------------------------------------------------------------------------------

function showAnswer({ hits, count, version, cut }) {
  if (version !== indexStatus.version && indexStatus.version !== null) refresh((indexStatus.version = version));
  const summary = hits.length ? describeAnswer() : message(count ? "nothing" : "empty");
  byId("said").textContent = `${summary}${cut ? ` ${message("cut")}` : ""}`;
  const focused = document.activeElement.closest("#results li")?.firstChild.dataset.path;
  byId("results").replaceChildren(gallery(hits));
  document.querySelectorAll("#results .tile").forEach((tile, i) => {
    if (hits[i].copies) addCopiesButton(tile.parentElement, hits[i]);
    if (hits[i].path === focused) tile.focus({ preventScroll: true });
  });
  byId("more").hidden = hits.length < query.k || query.k >= 240;
}

/** Returns a sentence that describes the order of the results, such as "Closest to “sea” first, less of city." */
function describeAnswer() {
  const [text, image] = [query.text.trim().slice(0, 80), query.like || query.file];
  let key = "newest";
  if (text) key = image ? "found_both" : "found_text";
  else if (image || query.more.length) key = "found_picture";
  else if (query.less.length) key = "found_least";
  const feedback = FEEDBACK_KEYS.flatMap((way) => query[way].map((path) => feedbackText(way, path)));
  return `${[message(key, { text }), ...feedback].join(", ")}.`;
}

/**
 * Adds a button to the tile of a picture that has near-duplicates. Its label is the number of near-duplicates, and a click
 * shows or hides them.
 */
function addCopiesButton(item, picture) {
  const { folder, since, until } = query;
  const label = message("duplicates", { n: picture.copies + 1 });
  let copies = [];
  const toggle = async () => {
    button.disabled = true; // otherwise a second click would send the request again
    copies.forEach((copy) => copy.remove());
    const question = { folder, since, until, like: picture.path };
    const { hits } = copies.length ? { hits: [] } : await ask("copies", question).catch((error) => (showError(error), { hits: [] }));
    copies = hits.map((hit, i) => tile(hits, i, message("duplicate_of", { name: hit.name, other: picture.name })));
    copies.forEach((copy) => (copy.className = "copy"));
    item.after(...copies);
    Object.assign(button, { disabled: false, ariaExpanded: String(copies.length > 0) }).focus();
  };
  const button = element("button", { type: "button", class: "same", "aria-expanded": "false", "aria-label": `${label}: ${picture.name}`, title: message("duplicates_title", picture), click: toggle }, label);
  item.append(button);
}

/** Moves the search towards a picture (`way` is "more") or away from it ("less"). A second call undoes the first call. */
function toggleFeedback(way, path) {
  const others = (key) => query[key].filter((other) => other !== path);
  startSearch({ more: others("more"), less: others("less"), ...(query[way].includes(path) ? {} : { [way]: [...others(way), path] }) });
}

const feedbackText = (way, path) => message(way === "more" ? "more_of" : "less_of", { name: path.split(/[\\/]/).pop().replace(/\.[^.]*$/, "") });

/** Shows the query in the fields of the form. Each picture of the query gets a button that removes it from the query. */
function showQuery() {
  byId("text").value = query.text;
  showFolder(query.folder);
  for (const id of ["since", "until"]) byId(id).value = query[id];
  byId("clear").hidden = !query.folder && !query.since && !query.until;
  const chip = (src, text, click) =>
    element("li", { title: text }, element("img", { src, alt: "" }), element("span", {}, text), element("button", { type: "button", "aria-label": message("feedback_remove", { feedback: text }), click }, "×"));
  const pictureUrl = query.file ? URL.createObjectURL(query.file) : query.like && imageUrl("thumbnail", { path: query.like });
  const chips = pictureUrl ? [chip(pictureUrl, message("picture_given"), () => startSearch({ like: "", file: null }, byId("text")))] : [];
  for (const way of FEEDBACK_KEYS)
    chips.push(...query[way].map((path) => chip(imageUrl("thumbnail", { path }), feedbackText(way, path), () => toggleFeedback(way, path))));
  byId("feedback").replaceChildren(...chips);
}

function showStatus() {
  const videos = indexStatus.videos ? [message("videos", { n: indexStatus.videos })] : [];
  byId("facts").textContent = [message("of_n", { n: indexStatus.count }), ...videos, message("model", { name: indexStatus.model })].join(", ");
  byId("note").textContent = indexStatus.note ?? "";
  // `progress` describes an update of the index (by any process on the server's machine) or, on the page without a
  // server, a download of the model.
  byId("work").hidden = !indexStatus.progress;
  if (!indexStatus.progress) return;
  const { what = "indexing", done, total, left_s } = indexStatus.progress;
  const [key, n] = left_s < 60 ? ["left_moment"] : left_s < 7200 ? ["left", Math.round(left_s / 60)] : ["left_hours", left_s / 3600];
  Object.assign(byId("progress"), { value: done, max: total });
  byId("progress-said").textContent = [message(what, { done, total }), ...(left_s === null ? [] : [message(key, n ? { n } : {})])].join(", ");
}

// --- Events of the user ----------------------------------------------------------------------------------------------

let typing = 0;
byId("text").addEventListener("input", () => {
  Object.assign(query, { text: byId("text").value, k: PAGE_SIZE });
  clearTimeout(typing);
  typing = setTimeout(search, TYPING_MS, "replace");
});
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  search("push");
});
byId("more").addEventListener("click", async () => {
  const tiles = () => document.querySelectorAll("#results li:not(.copy) .tile");
  const shown = tiles().length;
  query.k += PAGE_SIZE;
  await search(null);
  tiles()[shown]?.focus({ preventScroll: true });
});
for (const id of ["since", "until"]) byId(id).addEventListener("change", () => startSearch({ [id]: byId(id).value }, null));
byId("clear").addEventListener("click", () => startSearch({ folder: "", since: "", until: "" }));
onFolder((folder) => startSearch({ folder }));
byId("similar").addEventListener("click", () => closeViewer(({ path }) => startSearch({ text: "", like: path, more: [], less: [], file: null })));
for (const way of FEEDBACK_KEYS) byId(`feedback-${way}`).addEventListener("click", () => closeViewer(({ path }) => toggleFeedback(way, path)));
addEventListener("popstate", restoreState);
if (byId("search-file")) onFiles(byId("search"), [byId("search-file")], ([file]) => startSearch({ file, like: "" }, null));
startBackgroundWork(refresh);
restoreState();
refresh();
(function poll() {
  setTimeout(() => (document.hidden ? Promise.resolve() : refresh()).finally(poll), indexStatus.local ? LOCAL_POLL_MS : POLL_MS);
})();
