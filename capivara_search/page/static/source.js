// Where answers and pictures come from: here the server. The page without one has another file of this name.
import { drawn } from "./common.js";

/** The answer to a question, a line of JSON and perhaps a picture; an error has the code of its words. */
export async function ask(name, question = {}, picture = null) {
  const body = new Blob([JSON.stringify(question), "\n", ...(picture ? [await shrunk(picture)] : [])]);
  let answer, values;
  try {
    answer = await fetch(`api/${name}`, { method: "POST", body });
    values = await answer.json();
  } catch {
    throw Object.assign(new Error(name), { code: answer ? "failed" : "connection" });
  }
  if (!answer.ok) throw Object.assign(new Error(name), { code: values.error, values: values.values });
  return values;
}

/** A picture of the visitor, made smaller where it is large: the model sees a few hundred pixels a side of it. */
async function shrunk(picture) {
  if (picture.size < 600_000) return picture;
  try {
    const image = await createImageBitmap(picture);
    const canvas = drawn(image, Math.min(1, 1024 / Math.max(image.width, image.height)));
    return await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  } catch {
    return picture; // a format that this browser does not know; the server may
  }
}

/** Address of a picture of the index; it changes with the file, so that browsers may keep the answer. */
export const address = (kind, picture) => `${kind}?${new URLSearchParams({ path: picture.path, v: picture.v ?? 0 })}`;

/** The picture large, as a file; null where its original is not there, for which the server sends the thumbnail. */
export async function large(picture) {
  const data = await (await fetch(address("picture", picture))).blob();
  return data.type === "image/jpeg" ? data : null;
}

/** Begins what goes on beside the search; `refresh` is to be called where it changed something. */
export function start(refresh) {}
