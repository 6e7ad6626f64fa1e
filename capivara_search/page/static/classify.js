// Classification of a picture with labels of the visitor.
import { ask } from "./source.js";
import { element, find, notice, number, say, takeFiles } from "./common.js";

let [file, runs] = [null, 0];

async function run() {
  const question = { labels: find("labels").value.split(/[\n,;]/), template: find("template").value };
  find("classify-said").textContent = say("classifying");
  const mine = ++runs;
  const answer = await ask("classify", question, file).catch((error) => ({ error }));
  if (mine !== runs) return;
  notice(answer.error);
  find("classify-said").textContent = "";
  find("classified").replaceChildren(...(answer.error ? [] : shares(answer)));
  find("classified").scrollIntoView({ block: "nearest" }); // on a narrow screen it lies below the form
}

/** What fits best, and the shares of the labels for the picture. */
function shares({ label, shares }) {
  const lines = shares.map(([name, share]) => {
    const bar = element("progress", { value: share, "aria-hidden": "true" });
    return element("li", {}, element("span", {}, name), bar, element("data", {}, `${number(100 * share, 1)} %`));
  });
  const best = label === null ? [element("h2", {}, say("no_label")), element("p", {}, say("no_label_long"))] : [element("h2", {}, say("label_is", { label }))];
  return [...best, element("ol", { class: label === null ? "none" : false }, ...lines)];
}

takeFiles(find("classify"), [find("classify-file")], ([picture]) => {
  file = picture;
  find("classify-picture").src = URL.createObjectURL(file);
  run();
});
find("labels-form").addEventListener("submit", (event) => (event.preventDefault(), run()));
