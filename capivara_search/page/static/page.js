// The search: as one types, by a picture, or by one of the results; its state is the page's address.
import { PAGE, WORDS, element, find, notice, say, showGiven, takeFiles, unquoted } from "./common.js";
import { classify, shrunk } from "./classify.js";
import { onFolder, showFolder } from "./folders.js";
import { gallery, leave, tile } from "./pictures.js";
import { address, ask, start } from "./source.js";

const TYPING_MS = 250; // without a key, then a search begins
const [WORK_POLL_MS, OWN_POLL_MS, POLL_MS] = [1500, 3000, 10_000]; // while pictures are read, of one's own page, of others
const STATE = ["text", "like", "folder", "since", "until", "more", "less"]; // what the address has
const PULLS = ["more", "less"]; // paths of pictures that steer the search
const asked = { k: PAGE, file: null };
let facts = { version: null, count: 0, model: "", local: false };
let running = null; // the search whose answer is awaited

// --- Questions -------------------------------------------------------------------------------------------------------

/** Asks and shows the answer. `keep`: how the address changes, "push", "replace" or not at all. */
async function search(keep) {
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
    if (running !== mine) return;
    notice();
    showAnswer(answer);
  } catch (error) {
    if (running !== mine) return;
    notice(error);
    if (["no_picture", "too_many_pixels", "too_large"].includes(error.code)) {
      asked.file = null; // the next word shall not fail because of it
      showAsked();
    }
  } finally {
    clearTimeout(slow);
    if (running === mine) find("results").classList.remove("waiting");
  }
}

/** Begins a search of another kind; the part, the fields and the place on the page follow. */
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
  try {
    facts = await ask("status", { language: WORDS.tag });
  } catch (error) {
    if (before === null) notice(error);
    return;
  }
  showFacts();
  if (before === null || before === facts.version) return;
  const isDeep = document.querySelector("#results .copy") || find("results").getBoundingClientRect().top <= 0;
  if (isDeep || asked.file) find("said").textContent = say("changed", { n: facts.count });
  else search(null);
}

// --- What is shown ---------------------------------------------------------------------------------------------------

function showAnswer({ hits, count, version, cut }) {
  if (version !== facts.version && facts.version !== null) refresh((facts.version = version));
  find("said").textContent = `${hits.length ? found() : say(count ? "nothing" : "empty")}${cut ? ` ${say("cut")}` : ""}`;
  const line = hits.findIndex((hit) => hit.fits === false); // those below are no better than the background
  const above = line < 0 ? hits.length : line;
  const drawn = line >= 0 && element("p", { class: "line" }, say(line ? "line" : "line_first"));
  const focused = document.activeElement.closest("#results li")?.firstChild.dataset.path;
  const parts = [above > 0 && gallery(hits, 0, above), drawn, above < hits.length && gallery(hits, above, hits.length)];
  find("results").replaceChildren(...parts.filter(Boolean));
  document.querySelectorAll("#results .tile").forEach((tile, i) => {
    if (hits[i].copies) stack(tile.parentElement, hits[i]);
    if (hits[i].path === focused) tile.focus({ preventScroll: true });
  });
  find("more").hidden = hits.length < asked.k || asked.k >= 240;
}

/** What is found, in words. */
function found() {
  const [text, image] = [asked.text.trim(), asked.like || asked.file];
  const kind = text ? (image ? "found_both" : "found_text") : image || asked.more.length ? "found_picture" : asked.less.length ? "farthest" : "newest";
  const pulls = PULLS.flatMap((way) => asked[way].map((path) => pulled(way, path)));
  return `${[say(kind, { text: unquoted(text) }), ...pulls].join(", ")}.`;
}

/** Gives the place of a picture that stands for others, nearly the same, their number, which shows them after it. */
function stack(place, picture) {
  const { folder, since, until } = asked;
  const same = say("same", { n: picture.copies + 1 });
  let copies = [];
  const turn = async () => {
    button.disabled = true;
    const asks = () => ask("copies", { folder, since, until, like: picture.path }).catch((error) => (notice(error), { hits: [] }));
    const { hits } = copies.length ? { hits: [] } : await asks();
    copies.forEach((one) => one.remove());
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

/** The fields say what is asked. */
function showAsked() {
  find("text").value = asked.text;
  showFolder(asked.folder);
  for (const id of ["since", "until"]) find(id).value = asked[id];
  find("clear").hidden = !asked.folder && !asked.since && !asked.until;
  const given = asked.file ?? (asked.like && address("thumbnail", { path: asked.like }));
  showGiven(find("search-picture"), given, () => begin({ like: "", file: null }, find("text")));
  const chip = (way) => (path) => {
    const remove = element("button", { type: "button", "aria-label": say("pull_remove", { pull: pulled(way, path) }), click: () => pull(way, path) }, "×");
    return element("li", { title: path }, element("img", { src: address("thumbnail", { path }), alt: "" }), element("span", {}, pulled(way, path)), remove);
  };
  find("pulls").replaceChildren(...PULLS.flatMap((way) => asked[way].map(chip(way))));
}

function showFacts() {
  const videos = facts.videos ? [say("videos", { n: facts.videos })] : [];
  find("facts").textContent = [say("of_n", { n: facts.count }), ...videos, say("model", { name: facts.model })].join(", ");
  find("note").textContent = facts.note ?? "";
  find("note").hidden = !facts.note;
  showProgress(facts.progress);
}

/** How far an indexing is that goes on, in any process of the server's machine, or a download of the model. */
function showProgress(progress) {
  find("work").hidden = !progress;
  if (!progress) return;
  const { what = "indexing", done, total, left_s } = progress;
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
for (const button of document.querySelectorAll("[data-part]"))
  button.addEventListener("click", () => {
    for (const one of document.querySelectorAll("[data-part]")) {
      one.setAttribute("aria-pressed", one === button);
      find(one.dataset.part).hidden = one !== button;
    }
    notice();
  });
for (const event of ["dragover", "drop"]) document.addEventListener(event, (it) => it.preventDefault()); // beside the page
addEventListener("popstate", recall);
if (find("classify")) {
  takeFiles(find("search"), [find("search-file")], ([file]) => begin({ file, like: "" }, null));
  classify();
}
start(refresh);
recall();
refresh();
(function poll() {
  const wait = facts.progress ? WORK_POLL_MS : facts.local ? OWN_POLL_MS : POLL_MS;
  setTimeout(() => (document.hidden ? Promise.resolve() : refresh()).finally(poll), wait);
})();
