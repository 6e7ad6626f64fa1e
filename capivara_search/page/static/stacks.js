// Pictures that are nearly the same stand as one tile; its count opens the others beside it.
import { ask, element, notice, say, tile } from "./common.js";

/** Gives the tiles of `pictures` that stand for others a button with their number; `where`: folder and days; `open(list, i)`. */
export function stack(pictures, where, open) {
  const tiles = new Map([...document.querySelectorAll("#results .tile")].map((one) => [one.dataset.path, one]));
  for (const picture of pictures) {
    const found = tiles.get(picture.path);
    if (!picture.copies || !found) continue;
    const same = say("same", { n: picture.copies + 1 });
    const button = element("button", { type: "button", class: "same", "aria-expanded": "false", "aria-label": `${same}: ${picture.name}`, click: () => turn(button, picture, where, open) }, same);
    const place = found.parentElement;
    place.className = "stack";
    place.style.setProperty("--ratio", found.style.getPropertyValue("--ratio"));
    place.append(button);
  }
}

/** Shows the copies of a picture after it, or takes them away. */
async function turn(button, picture, where, open) {
  const place = button.parentElement;
  if (button.ariaExpanded === "true") {
    while (place.nextElementSibling?.className === "copy") place.nextElementSibling.remove();
    button.ariaExpanded = "false";
    return;
  }
  button.disabled = true;
  try {
    const { hits } = await ask("copies", { ...where, like: picture.path });
    place.after(...hits.map((hit, i) => element("li", { class: "copy" }, tile(hit, say("same_as", { name: hit.name, other: picture.name }), () => open(hits, i)))));
    button.ariaExpanded = "true";
  } catch (error) {
    notice(error);
  }
  button.disabled = false;
  button.focus();
}
