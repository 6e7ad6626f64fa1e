// Where answers and pictures come from on the page without a server: a visitor's own files, by the model in the browser.
import { AutoImageProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env } from "../library/transformers.js";
import { MESSAGES, byId, drawScaled, errorMessage, message, onFiles } from "./common.js";

const [MAX_BYTES, MAX_ASPECT, MAX_THREADS] = [200e6, 50, 8]; // of a file; long by short side, as in Python
const MODEL = MESSAGES.own_model; // its id, which is that of its files; the pixels of a side that it sees
const pictures = new Map(); // path -> what is known of a picture, and its file
const loaded = new Map(); // tower -> promise of it and of what prepares its inputs
let [version, progress, changed, reading] = [0, null, null, Promise.resolve()];

const at = (path) => new URL(`../${path}`, import.meta.url).href;
const coded = (code, cause) => Object.assign(new Error(code, { cause }), { code });
Object.assign(env, { remoteHost: at("model/"), remotePathTemplate: "{model}/", allowLocalModels: false, useWasmCache: false });
env.backends.onnx.wasm.wasmPaths = { mjs: at("library/onnxruntime.js"), wasm: at("library/onnxruntime.wasm") };
env.backends.onnx.wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;

/** A tower of the model and what prepares its inputs; they are fetched when they are needed first. */
function part(...kinds) {
  const options = { dtype: "q8", device: "wasm", progress_callback: showDownload };
  if (!loaded.has(kinds[0])) loaded.set(kinds[0], Promise.all(kinds.map((kind) => kind.from_pretrained(MODEL.id, options))));
  return loaded.get(kinds[0]).catch((error) => {
    loaded.delete(kinds[0]); // the next question tries again
    throw coded("model", error);
  });
}

function showDownload({ status, loaded = 0, total = 0 }) {
  const [done, all] = [loaded, total].map((bytes) => Math.round(bytes / 1e6));
  if (status === "progress" && total > 1e5) progress = { what: "downloading", done, total: all, left_s: null };
  else if (status === "done") progress = null;
  else return;
  changed();
}

// --- Answers ---------------------------------------------------------------------------------------------------------

const answers = {
  status: async () => ({ version, count: pictures.size, model: MODEL.name, progress, local: true }),

  async search({ text, like, k }) {
    const [vectors, count] = [[], pictures.size];
    let [cut, hits] = [false, [...pictures.values()].filter(({ path }) => path !== like)];
    if (like && !pictures.has(like)) throw coded("gone");
    if (like) vectors.push(pictures.get(like).vector);
    if (text.trim() && count) {
      const [model, tokenizer] = await part(CLIPTextModelWithProjection, AutoTokenizer);
      vectors.push((await model(tokenizer([text], { padding: true, truncation: true }))).text_embeds.data);
      cut = tokenizer.encode(text).length > tokenizer.model_max_length;
    }
    if (vectors.length) {
      const middle = Array.from(vectors[0], (_, i) => vectors.reduce((sum, one) => sum + one[i], 0));
      const cosine = (vector) => vector.reduce((sum, value, i) => sum + value * middle[i], 0) / Math.hypot(...middle);
      hits = hits.map((one) => ({ ...one, score: cosine(one.vector) })).sort((a, b) => b.score - a.score);
    } else hits.sort((a, b) => (a.date === b.date ? (a.path < b.path ? -1 : 1) : a.date < b.date ? 1 : -1));
    return { hits: hits.slice(0, k), count, version, cut };
  },
};

export const ask = (name, question) => answers[name](question);
export const imageUrl = (_, { path }) => pictures.get(path)?.thumbnail ?? "";
export const fetchLargeView = async ({ file }) => file;

// --- Pictures --------------------------------------------------------------------------------------------------------

/** What is known of a picture: its unit vector, its size in pixels, a thumbnail of the short side that the model sees. */
async function read(file, path) {
  if (file.size > MAX_BYTES) throw coded("no_picture");
  const image = await createImageBitmap(file, { colorSpaceConversion: "none" }).catch((error) => Promise.reject(coded("no_picture", error)));
  const { width, height } = image;
  const [short, long] = [Math.min(width, height), Math.max(width, height)];
  if (long > MAX_ASPECT * short) throw coded("no_picture");
  const canvas = drawScaled(image, MODEL.side / short);
  image.close();
  const [model, processor] = await part(CLIPVisionModelWithProjection, AutoImageProcessor);
  const { image_embeds } = await model(await processor(RawImage.fromCanvas(canvas)));
  const thumbnail = URL.createObjectURL(await canvas.convertToBlob({ type: "image/webp", quality: 0.85 }));
  const known = { path, name: file.name, size: file.size, date: new Date(file.lastModified).toISOString(), date_source: "file" };
  return { ...known, file, width, height, vector: image_embeds.data, thumbnail, score: null };
}

/** Reads the pictures among files, one after another; those that are there already are not read again. */
async function collect(files) {
  const [found, unreadable, before] = [files.filter((file) => file.type.startsWith("image/")), [], pictures.size];
  if (!found.length) return (byId("collected").textContent = message("no_pictures"));
  let failed = null;
  for (const [done, file] of found.entries()) {
    const path = file.webkitRelativePath || file.name;
    progress = { done, total: found.length, left_s: null };
    try {
      if (pictures.get(path)?.file.lastModified !== file.lastModified) pictures.set(path, await read(file, path));
    } catch (error) {
      console.warn(error, error.cause);
      if (error.code !== "no_picture") {
        failed = errorMessage(error);
        break;
      }
      unreadable.push(file.name);
    }
    version++;
    if (done % 10 === 0) changed();
    await new Promise((resume) => setTimeout(resume)); // what was clicked meanwhile
  }
  progress = null;
  changed();
  const added = pictures.size - before;
  const said = [failed, added ? message("indexed", { n: added }) : message("indexed_none")];
  if (unreadable.length) said.push(message("unreadable", { n: unreadable.length, names: unreadable.slice(0, 3).join(", ") }));
  byId("collected").textContent = said.filter(Boolean).join(" ");
}

/** Makes the choice of files work; `refresh` shows what has changed. */
export function startBackgroundWork(refresh) {
  changed = () => {
    byId("collect").classList.toggle("empty", !pictures.size);
    refresh();
  };
  onFiles(document.body, [byId("files"), byId("own-folder")], (files) => (reading = reading.then(() => collect(files))));
}
