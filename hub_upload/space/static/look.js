// What is known of the picture that is shown large, and what can be done with it.
import { LANGUAGE, element, find, number, say } from "./common.js";
import { bytes, leave, openDialog, picture, sayHere, showFacts } from "./dialog.js";
import * as pictures from "./pictures.js";

let actions = {};
let source = "";

/** Opens a picture of a list; `actions` has `similar(picture)` and `forget(picture)`. */
export function look(list, place, given) {
  actions = given;
  openDialog(list, place, draw);
}

function draw(shown, image) {
  const file = pictures.original(shown.key);
  find("viewer-path").textContent = shown.path === shown.name ? "" : shown.path;
  if (!file) sayHere(say("only_thumbnail"));
  showFacts([
    [say("modified"), new Date(shown.modified).toLocaleString(LANGUAGE, { dateStyle: "long", timeStyle: "short" })],
    [say("dimensions"), say("pixels", { width: shown.width, height: shown.height })],
    [say("bytes"), bytes(shown.size)],
    ...(shown.score == null ? [] : [[say("score_short"), number(shown.score, 3)]]),
  ]);
  URL.revokeObjectURL(source);
  source = file ? URL.createObjectURL(file) : "";
  image.onerror = () => (image.src = shown.source); // the file has gone, or has changed, since it was chosen
  image.src = source || shown.source;
}

find("viewer-actions").append(
  element("button", { type: "button", id: "forget-one", click: () => leave(() => actions.forget(picture())) }, say("forget_one")),
);
find("similar").addEventListener("click", () => leave(() => actions.similar(picture())));
