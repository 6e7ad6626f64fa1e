// Classification of an uploaded picture with labels that the user writes.
import { ask } from "./source.js";
import { byId, element, formatNumber, message, onFiles, showError } from "./common.js";

let [file, lastRequest] = [null, 0];

async function classify() {
  const question = { labels: byId("labels").value.split(/[\n,;]/), template: byId("template").value };
  byId("classify-said").textContent = message("classifying");
  const request = ++lastRequest;
  const answer = await ask("classify", question, file).catch((error) => ({ error }));
  if (request !== lastRequest) return; // a later request was sent, and its result will be shown
  showError(answer.error);
  byId("classify-said").textContent = "";
  byId("classified").replaceChildren(...(answer.error ? [] : resultElements(answer)));
  byId("classified").scrollIntoView({ block: "nearest" }); // on a narrow screen the result is below the form
}

/** Creates the elements that show a result: the best label, and a bar with the probability of each label. */
function resultElements({ label, shares }) {
  const rows = shares.map(([name, share]) => {
    const bar = element("progress", { value: share, "aria-hidden": "true" });
    return element("li", {}, element("span", {}, name), bar, element("data", {}, `${formatNumber(100 * share, 1)} %`));
  });
  const noLabel = [element("h2", {}, message("no_label")), element("p", {}, message("no_label_long"))];
  const best = label === null ? noLabel : [element("h2", {}, message("label_is", { label }))];
  return [...best, element("ol", { class: label === null ? "none" : false }, ...rows)];
}

onFiles(byId("classify"), [byId("classify-file")], ([picture]) => {
  file = picture;
  byId("classify-picture").src = URL.createObjectURL(file);
  classify();
});
byId("labels-form").addEventListener("submit", (event) => (event.preventDefault(), classify()));
