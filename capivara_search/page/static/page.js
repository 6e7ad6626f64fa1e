// The search: as one types, by a picture, or by one of the results; its state is the page's address.
import { LANGUAGE, WORDS, address, ask, element, find, gallery, given, notice, say, shrunk, takeFiles, unquoted } from "./common.js";
import { classify } from "./classify.js";
import { folderChoice } from "./folders.js";
import { stack } from "./stacks.js";
import { open } from "./viewer.js";

const PAGE = 48; // pictures at first, and with each "more"
const TYPING_MS = 250; // without a key, then a search begins
const POLL_MS = 10_000; // the index may grow
const TILES = "#results li:not(.copy) .tile"; // without the copies that are open
const OWN_POLL_MS = 3000; // of a page of this machine alone
const WORK_POLL_MS = 1500; // while pictures are read
const STATE = ["text", "like", "folder", "since", "until"];
const PULLS = ["more", "less"]; // paths of pictures that steer the search

const asked = { text: "", like: "", folder: "", since: "", until: "", more: [], less: [], k: PAGE, file: null };
let facts = { version: null, count: 0, model: "", folders: {}, suggestions: [], local: false };
let running = null; // the search whose answer is awaited
let typing = 0;
const showFolder = folderChoice(find("folder"), say("all_folders"), (folder) => {
  asked.folder = folder;
  start("push");
});

// --- Questions -------------------------------------------------------------------------------------------------------

/** Asks the server and shows the answer. `keep`: how the address changes, "push", "replace" or not at all. */
async function search(keep = "replace") {
  clearTimeout(typing);
  running?.abort();
  const mine = (running = new AbortController());
  remember(keep);
  const slow = setTimeout(() => {
    find("results").classList.add("waiting");
    find("said").textContent = say("searching");
  }, 400);
  try {
    const { file, ...question } = asked;
    const answer = await ask("search", question, file && (await shrunk(file)), mine.signal);
    notice();
    showAnswer(answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    notice(error);
    if (["no_picture", "too_many_pixels", "too_large"].includes(error.code)) {
      asked.file = null; // the next word shall not fail because of it
      showPicture();
    }
  } finally {
    clearTimeout(slow);
    if (running === mine) find("results").classList.remove("waiting");
  }
}

function remember(keep) {
  const address = new URL(location.href);
  for (const key of STATE) asked[key] ? address.searchParams.set(key, asked[key]) : address.searchParams.delete(key);
  for (const key of PULLS) address.searchParams.delete(key);
  for (const key of PULLS) asked[key].forEach((path) => address.searchParams.append(key, path));
  if (keep && address.href !== location.href) history[`${keep}State`](null, "", address);
  address.searchParams.set("lang", WORDS.other);
  document.querySelector(".language").href = address.search; // the same search, in the other language
}

function recall() {
  const saved = new URL(location.href).searchParams;
  for (const key of STATE) asked[key] = saved.get(key) ?? "";
  for (const key of PULLS) asked[key] = saved.getAll(key);
  Object.assign(asked, { k: PAGE, file: null });
  find("text").value = asked.text;
  showFilters();
  showPicture();
  showPulls();
}

/** What the index holds by now; the first pictures follow where it has changed and nothing is searched for. */
async function refresh() {
  const before = facts.version;
  try {
    facts = await ask("status", { language: LANGUAGE });
  } catch (error) {
    if (before === null) notice(error);
    return;
  }
  showFacts();
  if (before !== null && before !== facts.version) {
    find("said").textContent = say("changed", { n: facts.count });
    if (!asked.text && !asked.like && !asked.file && find("results").getBoundingClientRect().top > 0) search(null);
  }
}

// --- What is shown ---------------------------------------------------------------------------------------------------

function showAnswer({ hits, count, version, cut }) {
  if (version !== facts.version && facts.version !== null) refresh();
  const [text, image] = [asked.text.trim(), asked.like || asked.file];
  const found = text ? (image ? "found_both" : "found_text") : image || asked.more.length ? "found_picture" : "newest";
  const pulls = found === "newest" ? [] : PULLS.flatMap((way) => asked[way].map((path) => pulled(way, path)));
  const said = hits.length ? `${[say(found, { text: unquoted(text) }), ...pulls].join(", ")}.` : say(count ? "nothing" : "empty");
  find("said").textContent = cut ? `${said} ${say("cut")}` : said;
  const line = hits.findIndex((hit) => hit.fits === false); // those below are no better than the background
  const part = (from, to) => from < to && gallery(hits.slice(from, to), hits[0].score !== null, (i) => open(hits, from + i, actions()), from);
  const above = line < 0 ? hits.length : line;
  const drawn = line >= 0 && element("p", { class: "line" }, say(line ? "line" : "line_first"));
  find("results").replaceChildren(...[part(0, above), drawn, part(above, hits.length)].filter(Boolean));
  for (const tile of document.querySelectorAll("#results .tile")) tile.setAttribute("aria-keyshortcuts", "Plus -");
  const { folder, since, until } = asked;
  stack(hits, { folder, since, until }, (copies, i) => open(copies, i, actions()));
  find("more").hidden = hits.length < asked.k || asked.k >= 240;
}

const actions = () => ({
  local: facts.local,
  folders: Object.keys(facts.folders),
  similar: (picture) => {
    Object.assign(asked, { text: "", like: picture.path, more: [], less: [], file: null, k: PAGE });
    find("text").value = "";
    start("push");
    find("results").focus({ preventScroll: true });
  },
  folder: (folder) => {
    asked.folder = folder;
    start("push");
    find("results").focus({ preventScroll: true });
  },
  pull,
});

/** Steers the search towards a picture, `way` "more", or away from it, "less"; once more takes the picture out again. */
function pull(way, path) {
  const had = asked[way].includes(path);
  for (const one of PULLS) asked[one] = asked[one].filter((other) => other !== path);
  if (!had) asked[way].push(path);
  start("push");
  find("results").focus({ preventScroll: true });
}

const pulled = (way, path) => say(way === "more" ? "more_of" : "less_of", { name: path.split(/[\\/]/).pop().replace(/\.[^.]*$/, "") });

function showPulls() {
  const chip = (way) => (path) => {
    const remove = element("button", { type: "button", "aria-label": say("pull_remove", { pull: pulled(way, path) }), click: () => pull(way, path) }, "×");
    const image = element("img", { src: address("thumbnail", { path, v: 0 }), alt: "" });
    return element("li", { title: path }, image, element("span", {}, pulled(way, path)), remove);
  };
  find("pulls").replaceChildren(...PULLS.flatMap((way) => asked[way].map(chip(way))));
}

/** Begins a search of another kind: the part, the picture and the filters on the page follow. */
function start(keep) {
  choosePart("search");
  asked.k = PAGE;
  showFilters();
  showPicture();
  showPulls();
  scrollTo({ top: 0 });
  search(keep);
}

function showPicture() {
  const shown = find("search-picture");
  shown.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
  const source = asked.file ? URL.createObjectURL(asked.file) : asked.like && address("thumbnail", { path: asked.like, v: 0 });
  const remove = () => {
    Object.assign(asked, { like: "", file: null });
    start("push");
    find("text").focus();
  };
  shown.replaceChildren(...(source ? [given(source, remove)] : []));
}

function showFilters() {
  showFolder(asked.folder);
  for (const id of ["since", "until"]) find(id).value = asked[id];
  find("clear").hidden = !asked.folder && !asked.since && !asked.until;
}

function showFacts() {
  find("facts").textContent = `${say("of_n", { n: facts.count })}, ${say("model", { name: facts.model })}`;
  find("note").textContent = facts.note ?? "";
  find("note").hidden = !facts.note;
  showProgress(facts.progress);
  showFilters();
  const chip = (word) => {
    const take = () => {
      Object.assign(asked, { text: word, like: "", more: [], less: [], file: null });
      find("text").value = word;
      start("push");
    };
    return element("li", {}, element("button", { type: "button", click: take }, word));
  };
  find("suggestions").replaceChildren(...facts.suggestions.map(chip));
  if (!facts.suggestions.length && facts.suggesting) setTimeout(refresh, 700); // the words are being embedded
}

/** How far an indexing is that goes on, in any process of the server's machine. */
function showProgress(progress) {
  find("work").hidden = !progress;
  if (!progress) return;
  const { done, total, left_s } = progress;
  const [key, n] = left_s < 60 ? ["left_moment"] : left_s < 7200 ? ["left", Math.round(left_s / 60)] : ["left_hours", left_s / 3600];
  Object.assign(find("progress"), { value: done, max: total });
  find("progress-said").textContent = [say("indexing", { done, total }), ...(left_s === null ? [] : [say(key, n ? { n } : {})])].join(", ");
}

// --- What the visitor does -------------------------------------------------------------------------------------------

function choosePart(name) {
  for (const part of ["search", "classify"]) find(part).hidden = part !== name;
  for (const button of document.querySelectorAll("[data-part]")) button.setAttribute("aria-pressed", button.dataset.part === name);
  notice();
}

for (const button of document.querySelectorAll("[data-part]")) button.addEventListener("click", () => choosePart(button.dataset.part));
find("text").addEventListener("input", () => {
  asked.text = find("text").value;
  asked.k = PAGE;
  clearTimeout(typing);
  typing = setTimeout(() => search(), TYPING_MS);
});
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  search("push");
});
for (const id of ["since", "until"])
  find(id).addEventListener("change", () => {
    asked[id] = find(id).value;
    start("push");
  });
find("clear").addEventListener("click", () => {
  Object.assign(asked, { folder: "", since: "", until: "" });
  start("push");
});
find("more").addEventListener("click", async () => {
  const shown = document.querySelectorAll(TILES).length;
  asked.k += PAGE;
  await search(null);
  document.querySelectorAll(TILES)[shown]?.focus({ preventScroll: true });
});
takeFiles(
  find("search"),
  find("search-file"),
  (file) => {
    Object.assign(asked, { file, like: "" });
    start("push");
  },
  () => !find("search").hidden,
);
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest("input, textarea, select, dialog")) return;
  event.preventDefault();
  choosePart("search");
  find("text").select();
});
document.addEventListener("keydown", (event) => {
  const way = { "+": "more", "-": "less" }[event.key];
  if (!way || event.ctrlKey || event.metaKey || event.target.closest("input, textarea, select")) return;
  if (find("viewer").open) find(`pull-${way}`).click();
  else if (event.target.closest("#results .tile")) pull(way, event.target.dataset.path);
});
for (const event of ["dragover", "drop"]) document.addEventListener(event, (it) => it.preventDefault()); // beside the page
addEventListener("popstate", () => (recall(), search(null)));
classify(actions);
recall();
search(null);
refresh();
(function poll() {
  const wait = facts.progress ? WORK_POLL_MS : facts.local ? OWN_POLL_MS : POLL_MS;
  setTimeout(() => (document.hidden ? Promise.resolve() : refresh()).finally(poll), wait);
})();
