// Pictures in search results: thumbnails in a gallery, and a dialog that shows a large view and metadata of a picture.
import { LANGUAGE, byId, element, formatNumber, formatScore, message } from "./common.js";
import { fetchLargeView, imageUrl } from "./source.js";

const viewer = byId("viewer");
// State of the dialog: pictures that it can show, index of the picture that it shows, and URL of the large view of this
// picture.
let [viewed, position, objectUrl] = [[], 0, ""];

/**
 * Creates a tile: a list item with a button that shows a thumbnail and opens the dialog.
 * @param pictures Pictures that the dialog can show.
 * @param i Index of the picture in `pictures`.
 * @param label Text for screen readers.
 * @param extra Element that is added to the caption, or null.
 */
export function tile(pictures, i, label, extra = null) {
  const picture = pictures[i];
  const image = element("img", { src: imageUrl("thumbnail", picture), alt: "", loading: "lazy", decoding: "async" });
  const caption = element("span", { class: "caption", "aria-hidden": "true" }, element("span", {}, picture.name), extra);
  const attributes = { title: picture.name, "data-path": picture.path, "aria-label": label };
  const node = element("li", {}, element("button", { type: "button", class: "tile", ...attributes, click: () => open(pictures, i) }, image, caption));
  node.style.setProperty("--ratio", Math.min(Math.max(picture.width / picture.height, 0.6), 2.4));
  return node;
}

/** Creates a list of tiles with ranks and scores, and with a line before the pictures below the relevance threshold. */
export function gallery(pictures) {
  const tiles = pictures.map((picture, i) => {
    if (picture.score === null) return tile(pictures, i, picture.name);
    const score = formatScore(picture.score, 2);
    const label = `${message("place_of", { rank: i + 1, name: picture.name })}, ${message("score", { score })}`;
    return tile(pictures, i, label, element("span", { class: "score" }, score));
  });
  // `above_threshold` is null if the model has no relevance threshold.
  const firstBelow = pictures.findIndex(({ above_threshold }) => above_threshold === false);
  if (firstBelow >= 0) tiles.splice(firstBelow, 0, element("li", { class: "threshold" }, message(firstBelow ? "threshold" : "threshold_first")));
  return element("ol", { class: "gallery" }, ...tiles);
}

function open(pictures, i) {
  [viewed, position] = [pictures, i];
  showNeighbor(0);
  viewer.showModal();
}

/** Closes the dialog and calls `action` with the picture that it has shown, for example to begin another search. */
export function closeViewer(action) {
  viewer.close();
  action(viewed[position]);
}

/** Shows another picture of the list in the dialog: `offset` is 1 for the next, -1 for the previous, 0 for the current. */
function showNeighbor(offset) {
  position = Math.min(Math.max(position + offset, 0), viewed.length - 1);
  const [picture, image] = [viewed[position], byId("viewer-picture")];
  byId("viewer-title").textContent = picture.name;
  byId("viewer-path").textContent = picture.path;
  byId("viewer-facts").replaceChildren(...metadataRows(picture).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  byId("viewer-said").textContent = "";
  byId("before").disabled = position === 0;
  byId("after").disabled = position === viewed.length - 1;
  byId("download").hidden = true;
  byId("download").href = imageUrl("download", picture);
  const sides = { width: 2 * picture.width, height: 2 * picture.height }; // a small picture is enlarged at most twofold
  // The thumbnail is shown until the large view is loaded.
  Object.assign(image, { alt: picture.name, ...sides, src: imageUrl("thumbnail", picture) });
  URL.revokeObjectURL(objectUrl);
  fetchLargeView(picture).catch(() => null).then((file) => {
    if (picture !== viewed[position]) return; // the user has opened another picture meanwhile
    if (!file) return (byId("viewer-said").textContent = message("gone_original"));
    // If the user has chosen this file on the page, there is nothing to download.
    byId("download").hidden = file === picture.file;
    image.src = objectUrl = URL.createObjectURL(file);
  });
}

/** Returns pairs of a name and a text for the known metadata of a picture: date, dimensions, size, place and score. */
function metadataRows(picture) {
  const date = (text) => new Date(text).toLocaleString(LANGUAGE, { dateStyle: "long", timeStyle: "short" });
  const bytes = (size) => (size < 1e6 ? `${formatNumber(size / 1e3)} kB` : `${formatNumber(size / 1e6, 1)} MB`);
  const degrees = (value, [plus, minus]) => `${formatNumber(Math.abs(value), 5)}° ${value < 0 ? minus : plus}`;
  return [
    picture.date && [message("date"), date(picture.date) + (picture.date_source === "file" ? message("of_file") : "")],
    [message("dimensions"), message("pixels", { width: picture.width, height: picture.height })],
    picture.size && [message("bytes"), bytes(picture.size)],
    picture.latitude != null && [message("place"), `${degrees(picture.latitude, "NS")}, ${degrees(picture.longitude, LANGUAGE === "en" ? "EW" : "LO")}`],
    picture.score != null && [message("score_short"), formatScore(picture.score, 3)],
  ].filter(Boolean);
}

byId("before").addEventListener("click", () => showNeighbor(-1));
byId("after").addEventListener("click", () => showNeighbor(1));
byId("copy").addEventListener("click", async () => {
  // Select the path, so that Ctrl+C copies it: browsers let only pages with https write to the clipboard.
  getSelection().selectAllChildren(byId("viewer-path"));
  const isCopied = await navigator.clipboard?.writeText(viewed[position].path).then(() => true, () => false);
  if (isCopied) byId("viewer-said").textContent = message("copied");
});
document.addEventListener("keydown", (event) => {
  const offset = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (offset && viewer.open) showNeighbor(offset); // listens on the document, because a disabled button loses the focus
});
