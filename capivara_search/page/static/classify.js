// Classification: a picture, or a folder of the index, with labels of the visitor.
import { ask, element, find, given, notice, number, say, shrunk, takeFiles, tile } from "./common.js";
import { folderChoice } from "./folders.js";
import { open } from "./viewer.js";

let file = null;
let folder = "";
let showFolder = null;
let actions = () => ({});

/** Makes the form work; `act` gives what the large view can do. */
export function classify(act) {
  actions = act;
  takeFiles(document.querySelector("#classify .drop"), find("classify-file"), take, () => !find("classify").hidden);
  showFolder = folderChoice(find("classify-folder"), say("choose_folder"), (path) => (take(null), showFolder((folder = path))));
  find("labels-form").addEventListener("submit", (event) => (event.preventDefault(), run()));
}

function take(picture) {
  file = picture;
  if (file) showFolder((folder = ""));
  const shown = find("classify-picture");
  shown.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
  shown.replaceChildren(...(file ? [given(URL.createObjectURL(file), () => take(null))] : []));
  if (file) run();
}

async function run() {
  const button = find("labels-form").querySelector("[type=submit]");
  const labels = find("labels").value.split(/[\n,;]/);
  const question = { labels, template: find("template").value, folder };
  button.disabled = true;
  find("classify-said").textContent = say("classifying");
  try {
    const answer = await ask("classify", question, file && (await shrunk(file)));
    notice();
    find("classify-said").textContent = "";
    find("classified").replaceChildren(answer.groups ? groups(answer.groups) : shares(answer));
    find("classified").scrollIntoView({ block: "nearest" }); // on a narrow screen it lies below the form
  } catch (error) {
    notice(error);
    find("classify-said").textContent = "";
    find("classified").replaceChildren();
  } finally {
    button.disabled = false;
  }
}

/** The shares of the labels for one picture. */
function shares({ label, shares }) {
  const best = label === null ? say("no_label") : say("label_is", { label });
  const lines = shares.map(([name, share]) => {
    const bar = element("i");
    bar.style.setProperty("width", `${100 * share}%`);
    const percent = `${number(100 * share, 1)} %`;
    return element("li", {}, element("span", {}, name), element("span", { class: "bar", "aria-hidden": "true" }, bar), element("data", {}, percent));
  });
  const why = label === null ? element("p", { class: "hint" }, say("no_label_long")) : null;
  return element("div", { class: label === null ? "shares none" : "shares" }, element("h3", {}, best), why, element("ol", {}, ...lines));
}

/** The pictures of a folder by their labels. */
function groups(found) {
  const sections = found.map(({ label, n, hits }) => {
    const name = label ?? say("no_label");
    const tiles = hits.map((hit, i) => {
      const text = `${hit.name}, ${name} ${number(100 * hit.share)} %`;
      return element("li", {}, tile(hit, text, () => open(hits, i, actions())));
    });
    const counted = say("of_n", { n }) + (n > hits.length ? ` · ${say("shown_of", { shown: hits.length, n: number(n) })}` : "");
    const head = element("h3", {}, name, element("small", {}, counted));
    return element("section", { class: label === null ? "group none" : "group" }, head, element("ol", { class: "gallery" }, ...tiles));
  });
  return element("div", {}, ...sections);
}
