// The page without a server: pictures that a visitor chooses, found by words in his own browser.
import { element, find, given, notice, number, say, tile, unquoted } from "./common.js";
import { collect, hideWork, showModel, stop } from "./collect.js";
import { work } from "./engine.js";
import { look } from "./look.js";
import * as pictures from "./pictures.js";

const PAGE = 48; // pictures at first, and with each "more"
const TYPING_MS = 300; // without a key, then a search begins
const LEAN_GB = 2; // of memory, as far as the browser says it: of so little only one half of the model is held at a time
const asked = { text: "", like: "", k: PAGE };
let facts = null; // of the model, and of how it runs here
let latest = 0; // number of the search that was asked for last
let typing = 0;

// --- Searching -------------------------------------------------------------------------------------------------------

async function search() {
  clearTimeout(typing);
  const mine = ++latest;
  const { text, like, k } = { ...asked, text: asked.text.trim() };
  if (!text && !like) return showAnswer(pictures.newest(k), pictures.count() ? say("newest") : say("empty"));
  if (!pictures.count()) return showAnswer([], say("first"));
  find("results").classList.add("waiting");
  try {
    const found = text ? await work("text", { text }, showModel) : { vector: null, cut: false };
    if (mine !== latest) return;
    notice();
    if (text) showFacts(found.how);
    const given = like && pictures.get(like)?.vector;
    const vector = found.vector && given ? halfway(found.vector, given) : found.vector ?? given;
    const said = say(text ? (like ? "found_both" : "found_text") : "found_picture", { text: unquoted(text) });
    showAnswer(pictures.nearest(vector, k, like), `${said}.${found.cut ? ` ${say("cut")}` : ""}`);
  } catch (error) {
    if (mine === latest) notice(error);
  } finally {
    hideWork();
    if (mine === latest) find("results").classList.remove("waiting");
  }
}

/** The unit vector between two. */
function halfway(one, other) {
  const sum = one.map((value, i) => value + other[i]);
  const length = Math.sqrt(sum.reduce((total, value) => total + value * value, 0));
  return sum.map((value) => value / length);
}

function showAnswer(found, said) {
  find("said").textContent = said;
  const tiles = found.map((picture, i) => {
    const scored = picture.score !== undefined;
    const score = scored ? say("score", { score: number(picture.score, 2) }) : null;
    const name = scored ? say("place_of", { rank: i + 1, name: picture.name }) : picture.name;
    const made = tile(picture, [name, score].filter(Boolean).join(", "), () => look(found, i, actions));
    if (scored) made.querySelector(".caption").append(element("span", { class: "score" }, number(picture.score, 2)));
    return element("li", {}, made);
  });
  find("results").replaceChildren(...(tiles.length ? [element("ol", { class: "gallery" }, ...tiles)] : []));
  find("more").hidden = found.length < asked.k || found.length === pictures.count();
}

const actions = {
  similar: ({ key }) => {
    Object.assign(asked, { text: "", like: key, k: PAGE });
    find("text").value = "";
    scrollTo({ top: 0 });
    showGiven();
    search();
  },
  forget: ({ key }) => pictures.forget(key).then(() => changed(), notice),
};

function showGiven() {
  const picture = asked.like && pictures.get(asked.like);
  const remove = () => {
    asked.like = "";
    showGiven();
    search();
    find("text").focus();
  };
  find("search-picture").replaceChildren(...(picture ? [given(picture.source, remove)] : []));
}

// --- What is here ----------------------------------------------------------------------------------------------------

/** Shows what has come or gone; a search by words stands until the next one. */
function changed(how = {}) {
  showFacts(how);
  const n = pictures.count();
  find("invitation").textContent = n ? say("invitation_more", { n }) : say("invitation");
  find("collect").classList.toggle("empty", !n);
  find("files").parentElement.classList.toggle("main", !n);
  find("forget").hidden = !n && facts.missing > 0;
  if (asked.like && !pictures.get(asked.like)) {
    asked.like = "";
    showGiven();
  }
  if (asked.text.trim() || asked.like) return search();
  const said = find("said").textContent;
  search();
  if (n && said) find("said").textContent = said; // what was said of the files stays
}

/** How the model runs here, which is known better after its first answer. */
function showFacts(how) {
  Object.assign(facts, how);
  const where = facts.provider === "webgpu" ? say("on_gpu") : say(facts.faulty ? "gpu_faulty" : "on_cpu", { n: facts.threads });
  find("facts").textContent = [`${say("model", { name: facts.name })}, ${where}`, facts.lean && say("lean")].filter(Boolean).join("; ");
  const promised = !facts.kept ? "promise_again" : pictures.count() ? "promise_rest" : "promise";
  const promise = say(promised, { megabytes: Math.round(facts.missing / 1e6) });
  find("promise").textContent = facts.missing ? promise : "";
}

async function take(files) {
  if (!facts) return;
  await collect(files, changed);
}

async function forget(all) {
  find("sure").close();
  try {
    await pictures.forgetAll();
    changed(all ? (await work("forget")).how : {});
    find("said").textContent = say(all ? "forgotten_all" : "forgotten");
  } catch (error) {
    notice(error);
  }
}

// --- What the visitor does -------------------------------------------------------------------------------------------

for (const id of ["files", "folder"])
  find(id).addEventListener("change", () => {
    const files = [...find(id).files];
    find(id).value = ""; // the same files may be chosen again
    take(files);
  });
find("folder").parentElement.hidden = !("webkitdirectory" in HTMLInputElement.prototype);
find("stop").addEventListener("click", stop);
find("text").addEventListener("input", () => {
  Object.assign(asked, { text: find("text").value, k: PAGE });
  clearTimeout(typing);
  typing = setTimeout(search, TYPING_MS);
});
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
find("more").addEventListener("click", async () => {
  const shown = document.querySelectorAll("#results .tile").length;
  asked.k += PAGE;
  await search();
  document.querySelectorAll("#results .tile")[shown]?.focus({ preventScroll: true });
});
find("forget").addEventListener("click", () => {
  find("sure-what").textContent = say("forget_what", { n: pictures.count() });
  find("sure").showModal();
});
find("forget-pictures").addEventListener("click", () => forget(false));
find("forget-all").addEventListener("click", () => forget(true));
find("keep").addEventListener("click", () => find("sure").close());
for (const [event, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
  document.addEventListener(event, (it) => {
    it.preventDefault();
    find("search").classList.toggle("over", over);
    if (event === "drop") take(it.dataTransfer.files);
  });
document.addEventListener("paste", (event) => event.clipboardData.files.length && take(event.clipboardData.files));
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest("input, dialog")) return;
  event.preventDefault();
  find("text").select();
});

async function start() {
  try {
    facts = await work("open", { lean: (navigator.deviceMemory ?? Infinity) <= LEAN_GB });
  } catch (error) {
    find("said").textContent = "";
    return notice(error);
  }
  await pictures.load(facts.digest, changed).catch(notice);
  find("collect").hidden = false;
  find("said").textContent = "";
  changed();
}
start();
