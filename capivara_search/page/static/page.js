// The search: as one types, by a picture, or by one of the results; its state is the page's address.
import { WORDS, element, find, notice, say, takeFiles } from "./common.js";
import { onFolder, showFolder } from "./folders.js";
import { gallery, leave, tile } from "./pictures.js";
import { address, ask, start } from "./source.js";

const PAGE = 48; // pictures at first, and with each "more"
const TYPING_MS = 250; // without a key, then a search begins
const [OWN_POLL_MS, POLL_MS] = [2000, 10_000]; // of one's own page, of others
const STATE = ["text", "like", "folder", "since", "until", "more", "less"]; // what the address has
const PULLS = ["more", "less"]; // paths of pictures that steer the search
const asked = { k: PAGE, file: null };
let facts = { version: null };
let searches = 0;

// --- Questions -------------------------------------------------------------------------------------------------------

/** Asks and shows the answer. `keep`: how the address changes, "push", "replace" or not at all. */
async function search(keep) {
  const mine = ++searches;
  remember(keep);
  find("results").ariaBusy = "true";
  const slow = setTimeout(() => mine === searches && (find("said").textContent = say("searching")), 400);
  const { file, ...question } = asked;
  const answer = await ask("search", question, file).catch((error) => ({ error })).finally(() => clearTimeout(slow));
  if (mine !== searches) return;
  find("results").ariaBusy = "false";
  notice(answer.error);
  if (!answer.error) return showAnswer(answer);
  find("said").textContent = "";
  if (["no_picture", "too_many_pixels", "too_large"].includes(answer.error.code)) {
    asked.file = null; // the next word shall not fail because of it
    showAsked();
  }
}

/** Begins a search of another kind; the fields and the place on the page follow. */
function begin(changes, focused = find("results")) {
  Object.assign(asked, changes, { k: PAGE });
  showAsked();
  scrollTo({ top: 0 });
  search("push");
  focused?.focus({ preventScroll: true });
}

function remember(keep) {
  const address = new URL(location.href);
  for (const key of STATE) {
    address.searchParams.delete(key);
    for (const value of [asked[key]].flat()) if (value) address.searchParams.append(key, value);
  }
  if (keep && address.href !== location.href) history[`${keep}State`](null, "", address);
  address.searchParams.set("lang", WORDS.other);
  document.querySelector(".language").search = address.search; // the same search, in the other language
}

function recall() {
  const saved = new URL(location.href).searchParams;
  for (const key of STATE) asked[key] = PULLS.includes(key) ? saved.getAll(key) : saved.get(key) ?? "";
  Object.assign(asked, { k: PAGE, file: null });
  showAsked();
  search(null);
}

/** What the index holds by now; the answers follow where it has changed, and nobody is deep in them. */
async function refresh() {
  const before = facts.version;
  const found = await ask("status", { language: WORDS.tag }).catch(() => null);
  if (!found) return; // the next question says so
  facts = found;
  showFacts();
  if (before === null || before === facts.version) return;
  const isDeep = document.querySelector("#results .copy, dialog[open]") || find("results").getBoundingClientRect().top <= 0;
  if (isDeep || asked.file) find("said").textContent = say("changed", { n: facts.count });
  else search(null);
}

// --- What is shown ---------------------------------------------------------------------------------------------------

function showAnswer({ hits, count, version, cut }) {
  if (version !== facts.version && facts.version !== null) refresh((facts.version = version));
  find("said").textContent = `${hits.length ? found() : say(count ? "nothing" : "empty")}${cut ? ` ${say("cut")}` : ""}`;
  const focused = document.activeElement.closest("#results li")?.firstChild.dataset.path;
  find("results").replaceChildren(gallery(hits));
  document.querySelectorAll("#results .tile").forEach((tile, i) => {
    if (hits[i].copies) stack(tile.parentElement, hits[i]);
    if (hits[i].path === focused) tile.focus({ preventScroll: true });
  });
  find("more").hidden = hits.length < asked.k || asked.k >= 240;
}

/** What is found, in words. */
function found() {
  const [text, image] = [asked.text.trim().slice(0, 80), asked.like || asked.file];
  const kind = text ? (image ? "found_both" : "found_text") : image || asked.more.length ? "found_picture" : asked.less.length ? "farthest" : "newest";
  const pulls = PULLS.flatMap((way) => asked[way].map((path) => pulled(way, path)));
  return `${[say(kind, { text }), ...pulls].join(", ")}.`;
}

/** Gives the place of a picture that stands for others, nearly the same, their number, which shows them after it. */
function stack(place, picture) {
  const { folder, since, until } = asked;
  const same = say("same", { n: picture.copies + 1 });
  let copies = [];
  const turn = async () => {
    button.disabled = true; // a second click would ask again
    copies.forEach((one) => one.remove());
    const question = { folder, since, until, like: picture.path };
    const { hits } = copies.length ? { hits: [] } : await ask("copies", question).catch((error) => (notice(error), { hits: [] }));
    copies = hits.map((hit, i) => tile(hits, i, say("same_as", { name: hit.name, other: picture.name })));
    copies.forEach((one) => (one.className = "copy"));
    place.after(...copies);
    Object.assign(button, { disabled: false, ariaExpanded: String(copies.length > 0) }).focus();
  };
  const button = element("button", { type: "button", class: "same", "aria-expanded": "false", "aria-label": `${same}: ${picture.name}`, title: say("same_title", picture), click: turn }, same);
  place.append(button);
}

/** Steers the search towards a picture, `way` "more", or away from it, "less"; once more takes the picture out again. */
function pull(way, path) {
  const others = (one) => asked[one].filter((other) => other !== path);
  begin({ more: others("more"), less: others("less"), ...(asked[way].includes(path) ? {} : { [way]: [...others(way), path] }) });
}

const pulled = (way, path) => say(way === "more" ? "more_of" : "less_of", { name: path.split(/[\\/]/).pop().replace(/\.[^.]*$/, "") });

/** The fields say what is asked; of pictures, each has a button that takes it out. */
function showAsked() {
  find("text").value = asked.text;
  showFolder(asked.folder);
  for (const id of ["since", "until"]) find(id).value = asked[id];
  find("clear").hidden = !asked.folder && !asked.since && !asked.until;
  const chip = (src, text, click) =>
    element("li", { title: text }, element("img", { src, alt: "" }), element("span", {}, text), element("button", { type: "button", "aria-label": say("pull_remove", { pull: text }), click }, "×"));
  const given = asked.file ? URL.createObjectURL(asked.file) : asked.like && address("thumbnail", { path: asked.like });
  const chips = given ? [chip(given, say("picture_given"), () => begin({ like: "", file: null }, find("text")))] : [];
  for (const way of PULLS) chips.push(...asked[way].map((path) => chip(address("thumbnail", { path }), pulled(way, path), () => pull(way, path))));
  find("pulls").replaceChildren(...chips);
}

function showFacts() {
  const videos = facts.videos ? [say("videos", { n: facts.videos })] : [];
  find("facts").textContent = [say("of_n", { n: facts.count }), ...videos, say("model", { name: facts.model })].join(", ");
  find("note").textContent = facts.note ?? "";
  find("work").hidden = !facts.progress; // of an indexing, in any process of the server's machine, or a download of the model
  if (!facts.progress) return;
  const { what = "indexing", done, total, left_s } = facts.progress;
  const [key, n] = left_s < 60 ? ["left_moment"] : left_s < 7200 ? ["left", Math.round(left_s / 60)] : ["left_hours", left_s / 3600];
  Object.assign(find("progress"), { value: done, max: total });
  find("progress-said").textContent = [say(what, { done, total }), ...(left_s === null ? [] : [say(key, n ? { n } : {})])].join(", ");
}

// --- What the visitor does -------------------------------------------------------------------------------------------

let typing = 0;
find("text").addEventListener("input", () => {
  Object.assign(asked, { text: find("text").value, k: PAGE });
  clearTimeout(typing);
  typing = setTimeout(search, TYPING_MS, "replace");
});
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  search("push");
});
find("more").addEventListener("click", async () => {
  const tiles = () => document.querySelectorAll("#results li:not(.copy) .tile");
  const shown = tiles().length;
  asked.k += PAGE;
  await search(null);
  tiles()[shown]?.focus({ preventScroll: true });
});
for (const id of ["since", "until"]) find(id).addEventListener("change", () => begin({ [id]: find(id).value }, null));
find("clear").addEventListener("click", () => begin({ folder: "", since: "", until: "" }));
onFolder((folder) => begin({ folder }));
find("similar").addEventListener("click", () => leave(({ path }) => begin({ text: "", like: path, more: [], less: [], file: null })));
for (const way of PULLS) find(`pull-${way}`).addEventListener("click", () => leave(({ path }) => pull(way, path)));
addEventListener("popstate", recall);
if (find("search-file")) takeFiles(find("search"), [find("search-file")], ([file]) => begin({ file, like: "" }, null));
start(refresh);
recall();
refresh();
(function poll() {
  setTimeout(() => (document.hidden ? Promise.resolve() : refresh()).finally(poll), facts.local ? OWN_POLL_MS : POLL_MS);
})();
