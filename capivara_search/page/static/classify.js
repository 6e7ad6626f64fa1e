// Classification of a picture with labels of the visitor.
import { ask } from "./source.js";
import { drawn, element, find, notice, number, say, showGiven, takeFiles } from "./common.js";

let file = null;

/** Makes the form work. */
export function classify() {
  takeFiles(document.querySelector("#classify .drop"), [find("classify-file")], ([picture]) => (take(picture), run()));
  find("labels-form").addEventListener("submit", (event) => (event.preventDefault(), run()));
}

/** A picture of the visitor, made smaller where it is large: the model sees a few hundred pixels a side of it. */
export async function shrunk(picture) {
  if (picture.size < 600_000) return picture;
  try {
    const image = await createImageBitmap(picture);
    const canvas = drawn(image, Math.min(1, 1024 / Math.max(image.width, image.height)));
    return await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  } catch {
    return picture; // a format that this browser does not know; the server may
  }
}

function take(picture) {
  file = picture;
  showGiven(find("classify-picture"), file, () => take(null));
}

async function run() {
  const button = find("labels-form").querySelector("[type=submit]");
  const labels = find("labels").value.split(/[\n,;]/);
  button.disabled = true;
  find("classify-said").textContent = say("classifying");
  try {
    const answer = await ask("classify", { labels, template: find("template").value }, file && (await shrunk(file)));
    notice();
    find("classified").replaceChildren(shares(answer));
    find("classified").scrollIntoView({ block: "nearest" }); // on a narrow screen it lies below the form
  } catch (error) {
    notice(error);
    find("classified").replaceChildren();
  }
  find("classify-said").textContent = "";
  button.disabled = false;
}

/** The shares of the labels for the picture. */
function shares({ label, shares }) {
  const best = label === null ? say("no_label") : say("label_is", { label });
  const lines = shares.map(([name, share]) => {
    const bar = element("i");
    bar.style.setProperty("width", `${100 * share}%`);
    return element("li", {}, element("span", {}, name), element("span", { class: "bar", "aria-hidden": "true" }, bar), element("data", {}, `${number(100 * share, 1)} %`));
  });
  const why = label === null ? element("p", { class: "hint" }, say("no_label_long")) : null;
  return element("div", { class: label === null ? "shares none" : "shares" }, element("h3", {}, best), why, element("ol", {}, ...lines));
}
