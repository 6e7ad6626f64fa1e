// Answers and pictures from the server. The page without a server replaces this file by another one with the same exports.
import { drawScaled } from "./common.js";

/** Posts a question, a line of JSON and perhaps a picture, and returns the answer. Errors have the code of their text. */
export async function ask(name, question = {}, picture = null) {
  const body = new Blob([JSON.stringify(question), "\n", ...(picture ? [await shrinkImage(picture)] : [])]);
  let response, values;
  try {
    response = await fetch(`api/${name}`, { method: "POST", body });
    values = await response.json();
  } catch {
    throw Object.assign(new Error(name), { code: response ? "failed" : "connection" });
  }
  if (!response.ok) throw Object.assign(new Error(name), { code: values.error, values: values.values });
  return values;
}

/** Returns a smaller version of a large picture: the model sees only a few hundred pixels of each side. */
async function shrinkImage(picture) {
  if (picture.size < 600_000) return picture;
  try {
    const image = await createImageBitmap(picture);
    const canvas = drawScaled(image, Math.min(1, 1024 / Math.max(image.width, image.height)));
    return await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  } catch {
    return picture; // the browser can't decode this format, but the server may
  }
}

/** Returns the address of a picture of the index. It changes with the file, so that browsers may cache the response. */
export const imageUrl = (kind, picture) => `${kind}?${new URLSearchParams({ path: picture.path, v: picture.v ?? 0 })}`;

/** Returns the large view of a picture as a file, or null if the server has only its thumbnail. */
export async function fetchLargeView(picture) {
  const data = await (await fetch(imageUrl("picture", picture))).blob();
  return data.type === "image/jpeg" ? data : null;
}

/** Starts work beside the search, which calls `refresh` after changes. With a server there is none. */
export function startBackgroundWork(refresh) {}
