// The page without a server: pictures that a visitor chooses, found by words in the visitor's own browser.
import { AutoImageProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env } from "../library/transformers.js";
import { LANGUAGE, PAGE, WORDS, drawn, find, gallery, notice, number, say, searchForm, showGiven, takeFiles, unquoted } from "./common.js";
import { bytes, leave, openDialog, picture, sayHere, showFacts } from "./dialog.js";

const NAMES = /\.(avif|bmp|gif|heic|heif|jfif|jpe?g|png|tiff?|webp)$/i; // where a file has no type
const [MAX_BYTES, MAX_ASPECT] = [200e6, 50]; // of a file, and long by short side, as in Python
const MAX_THREADS = 8;
const MODEL = WORDS.model; // its id, which is that of its files; the pixels of a side that it sees; numbers of a vector
const asked = { text: "", like: null, k: PAGE };
const pictures = new Map(); // key -> what is known of a picture, and its file
const queue = []; // files that are to be read
let stopped = false;
let latest = 0; // number of the search that was asked for last

// --- The model -------------------------------------------------------------------------------------------------------

const at = (path) => new URL(`../${path}`, import.meta.url).href;
const coded = (code, cause) => Object.assign(new Error(code, { cause }), { code });
Object.assign(env, { remoteHost: at("model/"), remotePathTemplate: "{model}/", allowLocalModels: false, useWasmCache: false });
const CACHE = `capivara ${at("")} `; // of this page, whatever its model
env.cacheKey = CACHE + MODEL.id;
env.backends.onnx.wasm.wasmPaths = { mjs: at("library/onnxruntime.js"), wasm: at("library/onnxruntime.wasm") };
env.backends.onnx.wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
const options = { dtype: "q8", device: "wasm", progress_callback: showModel };
const makers = {
  image: [CLIPVisionModelWithProjection, AutoImageProcessor],
  text: [CLIPTextModelWithProjection, AutoTokenizer],
};
const loaded = {}; // kind -> promise of a tower and what prepares its inputs

/** A tower of the model and what prepares its inputs; they are fetched when they are needed first. */
function part(kind) {
  const failed = (error) => {
    delete loaded[kind]; // the next question tries again
    throw coded("model", error);
  };
  loaded[kind] ??= Promise.all(makers[kind].map((maker) => maker.from_pretrained(MODEL.id, options))).catch(failed);
  return loaded[kind];
}

async function textVector(text) {
  const [model, tokenizer] = await part("text");
  const { text_embeds } = await model(tokenizer([text], { padding: true, truncation: true }));
  return { vector: text_embeds.data, cut: tokenizer.encode(text).length > tokenizer.model_max_length };
}

/** A picture's unit vector, its size in pixels, and a thumbnail of the short side that the model sees. */
async function readPicture(file) {
  if (file.size > MAX_BYTES) throw coded("no_picture");
  const unreadable = (error) => Promise.reject(coded("no_picture", error));
  const image = await createImageBitmap(file, { colorSpaceConversion: "none" }).catch(unreadable);
  const { width, height } = image;
  const [short, long] = [Math.min(width, height), Math.max(width, height)];
  if (long > MAX_ASPECT * short) throw coded("no_picture");
  const canvas = drawn(image, MODEL.side / short);
  image.close();
  const [model, processor] = await part("image");
  const { image_embeds } = await model(await processor(RawImage.fromCanvas(canvas)));
  return { vector: image_embeds.data, width, height, thumbnail: await canvas.convertToBlob({ type: "image/webp", quality: 0.85 }) };
}

// --- Pictures --------------------------------------------------------------------------------------------------------

const kept = () => globalThis.caches?.open(env.cacheKey).catch(() => null); // what a visit before has made; not without https
const address = (key) => at(`pictures/${encodeURIComponent(key)}`); // nothing lies there: a name in the cache

/** What the model made of a file, now or in a visit before: kept as size and vector, the thumbnail behind them. */
async function described(file, key) {
  const cache = await kept();
  const before = await cache?.match(address(key));
  if (before) {
    const content = await before.blob();
    const start = 4 * (2 + MODEL.width);
    const [width, height, ...vector] = new Float32Array(await content.slice(0, start).arrayBuffer());
    return { width, height, vector, thumbnail: content.slice(start, content.size, "image/webp") };
  }
  const made = await readPicture(file);
  const content = new Blob([Float32Array.of(made.width, made.height, ...made.vector), made.thumbnail]);
  await cache?.put(address(key), new Response(content)).catch(() => {}); // no room: it is read again next time
  return made;
}

/** Reads the pictures among files, one after another. */
async function collect(files) {
  const found = files.filter((file) => (file.type ? file.type.startsWith("image/") : NAMES.test(file.name)));
  notice();
  if (!found.length) return (find("said").textContent = say("no_pictures"));
  if (queue.push(...found) > found.length) return; // they are being read
  stopped = false;
  const unreadable = [];
  const before = pictures.size;
  for (let done = 0; queue.length && !stopped; done++) {
    const file = queue[0];
    const path = file.webkitRelativePath || file.name;
    const key = [path, file.size, file.lastModified].join("|");
    showWork(say("indexing", { done, total: done + queue.length }), done, done + queue.length);
    try {
      const made = pictures.get(key) ?? (await described(file, key));
      const source = pictures.get(key)?.source ?? URL.createObjectURL(made.thumbnail);
      pictures.set(key, { ...made, key, path, file, source, name: file.name });
    } catch (error) {
      if (error.code !== "no_picture") {
        notice(error);
        console.warn(error, error.cause);
        break;
      }
      unreadable.push(file.name);
    }
    queue.shift();
    if (done % 10 === 0) await search();
    await new Promise(requestAnimationFrame); // what was clicked meanwhile
  }
  queue.length = 0;
  find("work").hidden = true;
  await search();
  const added = pictures.size - before;
  const parts = [added ? say("indexed", { n: added }) : say("indexed_none")];
  if (unreadable.length) parts.push(say("unreadable", { n: unreadable.length, names: unreadable.slice(0, 3).join(", ") }));
  if (stopped) parts.push(say("stopped"));
  find("said").textContent = parts.join(" ");
}

function showModel({ status, file, loaded = 0, total = 0 }) {
  if (status === "progress" && total > 1e5) showWork(say("downloading", { file, loaded: Math.round(loaded / 1e6), total: Math.round(total / 1e6) }), loaded, total);
  if (status === "ready" || status === "done") find("work").hidden = !queue.length;
}

function showWork(text, done, total) {
  find("work").hidden = false;
  find("stop").hidden = !queue.length;
  find("progress-said").textContent = text;
  Object.assign(find("progress"), { max: total, value: done });
}

// --- Searching -------------------------------------------------------------------------------------------------------

async function search() {
  const mine = ++latest;
  const { like, k } = asked;
  const text = asked.text.trim();
  find("collect").classList.toggle("empty", !pictures.size);
  if (!pictures.size || (!text && !like)) {
    const newest = [...pictures.values()].sort((a, b) => b.file.lastModified - a.file.lastModified || (a.path < b.path ? -1 : 1));
    return show(newest, k, say(pictures.size ? "newest" : text ? "first" : "empty"), false);
  }
  find("results").classList.add("waiting");
  try {
    const { vector, cut } = text ? await textVector(text) : { vector: like.vector, cut: false };
    if (mine !== latest) return;
    const nearest = [...pictures.values()].filter(({ key }) => key !== like?.key).map((one) => ({ ...one, score: cosine(one.vector, vector, like?.vector) }));
    const said = say(text ? (like ? "found_both" : "found_text") : "found_picture", { text: unquoted(text) });
    show(nearest.sort((a, b) => b.score - a.score), k, `${said}.${cut ? ` ${say("cut")}` : ""}`, true);
  } catch (error) {
    console.warn(error, error.cause);
    if (mine === latest) notice(error);
  } finally {
    if (mine === latest) find("results").classList.remove("waiting");
  }
}

/** The cosine of a unit vector to another one, or to the middle between that and a second one. */
function cosine(vector, one, other = one) {
  let [product, length] = [0, 0];
  for (let i = 0; i < vector.length; i++) {
    product += vector[i] * (one[i] + other[i]);
    length += (one[i] + other[i]) ** 2;
  }
  return product / Math.sqrt(length);
}

function show(found, k, said, searched) {
  const first = found.slice(0, k);
  find("said").textContent = said;
  find("results").replaceChildren(gallery(first, searched, (i) => openDialog(first, i, draw)));
  find("more").hidden = found.length <= k;
}

function setLike(like) {
  asked.like = like;
  showGiven(find("search-picture"), like?.thumbnail, () => (setLike(null), find("text").focus()));
  search();
}

/** What is known of the picture that is shown large. */
function draw(shown, image) {
  find("viewer-path").textContent = shown.path === shown.name ? "" : shown.path;
  showFacts([
    [say("modified"), new Date(shown.file.lastModified).toLocaleString(LANGUAGE, { dateStyle: "long", timeStyle: "short" })],
    [say("dimensions"), say("pixels", { width: shown.width, height: shown.height })],
    [say("bytes"), bytes(shown.file.size)],
    ...(shown.score == null ? [] : [[say("score_short"), number(shown.score, 3)]]),
  ]);
  URL.revokeObjectURL(image.dataset.source);
  image.dataset.source = URL.createObjectURL(shown.file);
  image.onerror = () => ((image.onerror = null), (image.src = shown.source), sayHere(say("only_thumbnail")));
  image.src = image.dataset.source;
}

// --- What the visitor does -------------------------------------------------------------------------------------------

find("similar").addEventListener("click", () =>
  leave(() => {
    Object.assign(asked, { text: "", k: PAGE });
    find("text").value = "";
    scrollTo({ top: 0 });
    setLike(picture());
  }),
);
takeFiles(document.body, [find("files"), find("folder")], collect);
find("stop").addEventListener("click", () => (stopped = true));
searchForm(asked, search);
find("forget").addEventListener("click", async () => {
  if (!confirm(say("forget_what"))) return;
  await globalThis.caches?.delete(env.cacheKey);
  pictures.clear();
  setLike(null);
});
for (const name of (await globalThis.caches?.keys().catch(() => [])) ?? [])
  if (name.startsWith(CACHE) && name !== env.cacheKey) caches.delete(name); // of an earlier model
find("collect").hidden = false;
search();
