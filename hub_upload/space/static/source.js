// Replaces the server on the static page: reads a visitor's own files and searches them with the model in the browser.
import { AutoImageProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env } from "../library/transformers.js";
import { MESSAGES, byId, drawScaled, errorMessage, message, onFiles } from "./common.js";

const MAX_BYTES = 200e6; // largest file that is read
const MAX_ASPECT = 50; // largest ratio of long to short side of a picture, as in the search server
const MAX_THREADS = 8; // largest number of WebAssembly threads
const MODEL = MESSAGES.own_model; // id (folder name of its files), name, and side (image size in pixels)
const pictures = new Map(); // path -> picture as returned by `read`
const loaded = new Map(); // tower class -> promise of the tower and the processor of its inputs
let [version, progress, changed, reading] = [0, null, null, Promise.resolve()];

const urlOf = (path) => new URL(`../${path}`, import.meta.url).href;
const errorWithCode = (code, cause) => Object.assign(new Error(code, { cause }), { code });
Object.assign(env, { remoteHost: urlOf("model/"), remotePathTemplate: "{model}/", allowLocalModels: false, useWasmCache: false });
env.backends.onnx.wasm.wasmPaths = { mjs: urlOf("library/onnxruntime.js"), wasm: urlOf("library/onnxruntime.wasm") };
env.backends.onnx.wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;

/** Loads a tower of the model and the processor of its inputs, when they are needed for the first time. */
function loadTower(...classes) {
  const options = { dtype: "q8", device: "wasm", progress_callback: showDownload };
  const [tower] = classes;
  if (!loaded.has(tower)) loaded.set(tower, Promise.all(classes.map((type) => type.from_pretrained(MODEL.id, options))));
  return loaded.get(tower).catch((error) => {
    loaded.delete(tower); // so that the next query tries again
    throw errorWithCode("model", error);
  });
}

function showDownload({ status, loaded = 0, total = 0 }) {
  const [done, all] = [loaded, total].map((bytes) => Math.round(bytes / 1e6));
  if (status === "progress" && total > 1e5) progress = { what: "downloading", done, total: all, left_s: null };
  else if (status === "done") progress = null;
  else return;
  changed();
}

// --- Search ----------------------------------------------------------------------------------------------------------

const answers = {
  status: async () => ({ version, count: pictures.size, model: MODEL.name, progress, local: true }),

  async search({ text, like, k }) {
    const [vectors, count] = [[], pictures.size];
    let [cut, hits] = [false, [...pictures.values()].filter(({ path }) => path !== like)];
    if (like && !pictures.has(like)) throw errorWithCode("gone");
    if (like) vectors.push(pictures.get(like).vector);
    if (text.trim() && count) {
      const [model, tokenizer] = await loadTower(CLIPTextModelWithProjection, AutoTokenizer);
      vectors.push((await model(tokenizer([text], { padding: true, truncation: true }))).text_embeds.data);
      cut = tokenizer.encode(text).length > tokenizer.model_max_length;
    }
    if (vectors.length) {
      // With a text and a similar picture, the query is the sum of both vectors. Picture vectors have unit length.
      const query = Array.from(vectors[0], (_, i) => vectors.reduce((sum, vector) => sum + vector[i], 0));
      const cosine = (vector) => vector.reduce((sum, value, i) => sum + value * query[i], 0) / Math.hypot(...query);
      hits = hits.map((hit) => ({ ...hit, score: cosine(hit.vector) })).sort((a, b) => b.score - a.score);
    } else hits.sort((a, b) => (a.date === b.date ? (a.path < b.path ? -1 : 1) : a.date < b.date ? 1 : -1));
    return { hits: hits.slice(0, k), count, version, cut };
  },
};

export const ask = (name, question) => answers[name](question);
export const imageUrl = (_, { path }) => pictures.get(path)?.thumbnail ?? "";
export const fetchLargeView = async ({ file }) => file;

// --- Pictures --------------------------------------------------------------------------------------------------------

/** Reads a picture: its embedding (unit length), its size in pixels, and a thumbnail whose short side is the model's image size. */
async function read(file, path) {
  if (file.size > MAX_BYTES) throw errorWithCode("no_picture");
  const image = await createImageBitmap(file, { colorSpaceConversion: "none" }).catch((error) => {
    throw errorWithCode("no_picture", error);
  });
  const { width, height } = image;
  const [short, long] = [Math.min(width, height), Math.max(width, height)];
  if (long > MAX_ASPECT * short) throw errorWithCode("no_picture");
  const canvas = drawScaled(image, MODEL.side / short);
  image.close();
  const [model, processor] = await loadTower(CLIPVisionModelWithProjection, AutoImageProcessor);
  const { image_embeds } = await model(await processor(RawImage.fromCanvas(canvas)));
  const thumbnail = URL.createObjectURL(await canvas.convertToBlob({ type: "image/webp", quality: 0.85 }));
  const metadata = { path, name: file.name, size: file.size, date: new Date(file.lastModified).toISOString(), date_source: "file" };
  return { ...metadata, file, width, height, vector: image_embeds.data, thumbnail, score: null };
}

/** Reads the pictures among files, one after another. Pictures that were read before and have not changed are skipped. */
async function collect(files) {
  const [images, unreadable, before] = [files.filter((file) => file.type.startsWith("image/")), [], pictures.size];
  if (!images.length) return (byId("collected").textContent = message("no_pictures"));
  let failed = null;
  for (const [done, file] of images.entries()) {
    const path = file.webkitRelativePath || file.name;
    progress = { done, total: images.length, left_s: null };
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
    await new Promise((resume) => setTimeout(resume)); // lets the page react to clicks between pictures
  }
  progress = null;
  changed();
  const added = pictures.size - before;
  const messages = [failed, added ? message("indexed", { n: added }) : message("indexed_none")];
  if (unreadable.length) messages.push(message("unreadable", { n: unreadable.length, names: unreadable.slice(0, 3).join(", ") }));
  byId("collected").textContent = messages.filter(Boolean).join(" ");
}

/** Connects the file inputs of the page; `refresh` updates the page when pictures were added. */
export function startBackgroundWork(refresh) {
  changed = () => {
    byId("collect").classList.toggle("empty", !pictures.size);
    refresh();
  };
  onFiles(document.body, [byId("files"), byId("own-folder")], (files) => (reading = reading.then(() => collect(files))));
}
