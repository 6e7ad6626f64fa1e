// Requests to the server: searches and pictures. The page that works without a server has another file with the same name
// and exports.
import { drawScaled } from "./common.js";

/**
 * Sends a POST request and returns the values of the response.
 * @param name Name of the request in the path `api/NAME`, such as "search".
 * @param question Values that are sent as a line of JSON.
 * @param picture File that is sent after the line of JSON, or null.
 * @throws Error whose `code` is the key of its text in `MESSAGES.errors`.
 */
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

/** Reduces a large picture before the upload, because the model uses only a few hundred pixels of its width and height. */
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

/**
 * Returns the URL of a picture of the index. `kind` is "thumbnail", "picture" (large view) or "download". The URL changes
 * when the file changes, so that browsers may cache the response.
 */
export const imageUrl = (kind, picture) => `${kind}?${new URLSearchParams({ path: picture.path, v: picture.v ?? 0 })}`;

/** Returns the large view of a picture as a Blob, or null if the server has only the thumbnail of the picture. */
export async function fetchLargeView(picture) {
  const data = await (await fetch(imageUrl("picture", picture))).blob();
  return data.type === "image/jpeg" ? data : null;
}

/**
 * Does nothing, because the server does all background work. On the page that works without a server, the function of
 * this name lets the user add pictures and then calls `refresh`.
 */
export function startBackgroundWork(refresh) {}
