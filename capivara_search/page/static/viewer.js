// What is known of the picture that is shown large, and what can be done with it.
import { LANGUAGE, address, ask, element, find, number, score, reason, say } from "./common.js";
import { bytes, leave, openDialog, picture, sayHere, showFacts } from "./dialog.js";

let actions = {};
const fault = (error) => sayHere(reason(error));

/**
 * Opens a picture of a list. `actions` has what other parts do: `similar(picture)`, `pull(way, path)` and `folder(path)`;
 * `local`, whether the visitor sits at this machine; and `folders`, those of the index.
 */
export function open(pictures, place, given) {
  actions = given;
  openDialog(pictures, place, draw);
}

function draw(shown, image) {
  find("viewer-path").replaceChildren(...pathParts(shown));
  showFacts(facts(shown));
  find("download").href = address("download", shown);
  find("show").hidden = !actions.local;
  image.src = address("thumbnail", shown); // at once, until the large one is there
  const large = new Image();
  large.onload = () => shown === picture() && (image.src = address("picture", shown));
  large.src = address("picture", shown);
  ask("about", { like: shown.path }).then(
    ({ original }) => {
      if (shown !== picture()) return;
      for (const id of ["download", "show"]) find(id).hidden = !original || (id === "show" && !actions.local);
      if (!original) sayHere(say("gone_original"));
    },
    (error) => shown === picture() && fault(error),
  );
}

/** The folders of a path, each of which narrows the search to itself, and the name of the file. */
function pathParts(shown) {
  const slash = shown.path.startsWith("/") ? "/" : "\\";
  const parts = shown.path.split(slash);
  const name = parts.pop();
  const nodes = parts.flatMap((part, i) => {
    const folder = parts.slice(0, i + 1).join(slash);
    const isKnown = actions.folders.some((root) => `${folder}${slash}`.startsWith(`${root}${slash}`));
    const narrow = { type: "button", title: say("in_folder", { name: part }), click: () => leave(() => actions.folder(folder)) };
    return [isKnown ? element("button", narrow, part) : part, slash, element("wbr")];
  });
  return [...nodes, element("b", {}, name)];
}

function facts(shown) {
  const date = (text) => new Date(text).toLocaleString(LANGUAGE, { dateStyle: "long", timeStyle: "short" });
  const degrees = (value, [plus, minus]) => `${number(Math.abs(value), 5)}° ${value < 0 ? minus : plus}`;
  const east = LANGUAGE === "en" ? "EW" : "LO";
  return [
    shown.date && [say("date"), date(shown.date) + (shown.date_source === "file" ? say("of_file") : "")],
    [say("dimensions"), say("pixels", { width: shown.width, height: shown.height })],
    shown.size && [say("bytes"), bytes(shown.size)],
    shown.latitude != null && [say("place"), `${degrees(shown.latitude, "NS")}, ${degrees(shown.longitude, east)}`],
    shown.score != null && [say("score_short"), score(shown.score, 3)],
  ].filter(Boolean);
}

find("show").addEventListener("click", () => ask("show", { like: picture().path }).then(() => sayHere(say("shown")), fault));
find("copy").addEventListener("click", async () => {
  const copied = await navigator.clipboard?.writeText(picture().path).then(() => true, () => false); // there by https alone
  sayHere(say(copied ? "copied" : "not_copied"));
});
find("similar").addEventListener("click", () => leave(() => actions.similar(picture())));
for (const way of ["more", "less"]) find(`pull-${way}`).addEventListener("click", () => leave(() => actions.pull(way, picture().path)));
