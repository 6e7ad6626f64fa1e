// The two towers of the model in onnxruntime-web: their files fetched once, kept by the browser, and run.
import { Tokenizer } from "../library/tokenizers.js";
import { coded, decoded, pixels, thumbnail } from "./pixels.js";

const HERE = new URL("../model/", import.meta.url);
const CACHE = "capivara-model";
const AGREES = 0.98; // least cosine of this machine's answer to a given input with Python's
const MAX_THREADS = 8;
const towers = {}; // kind -> session
const state = { ort: null, tokenizer: null }; // the runtime and the tokenizer, once they are loaded
// How the model runs here; `missing` are bytes that are not kept yet, `faulty` a GPU that gave a wrong answer.
const how = { provider: "wasm", threads: 1, lean: false, kept: true, faulty: false, missing: 0 };
let facts = null;

/**
 * Reads what the model is, and sees what this machine has; nothing large is fetched.
 * `lean`: only one tower is held at a time, for machines of little memory.
 */
export async function open({ lean }) {
  const answer = await fetch(new URL("model.json", HERE), { cache: "no-cache" }).catch((error) => error);
  if (!answer.ok) throw coded("download", { name: "model.json" }, answer);
  facts = await answer.json();
  const gpu = await navigator.gpu?.requestAdapter().catch(() => null);
  Object.assign(how, { lean, provider: gpu ? "webgpu" : "wasm" });
  if (crossOriginIsolated) how.threads = Math.min(navigator.hardwareConcurrency, MAX_THREADS);
  await countMissing();
  return { ...facts, ...how };
}

/** A picture's unit vector, its size in pixels, and a thumbnail. */
export async function picture({ file }, progress) {
  const session = await tower("vision", progress);
  const bitmap = await decoded(file);
  try {
    const vector = await ran(session, pixels(bitmap, facts));
    return { vector, width: bitmap.width, height: bitmap.height, thumbnail: await thumbnail(bitmap), how };
  } finally {
    bitmap.close();
  }
}

/** A sentence's unit vector, and whether its end was cut off. */
export async function text({ text }, progress) {
  const session = await tower("text", progress);
  const ids = tokens(text);
  const cut = ids.length > facts.length;
  if (cut) ids.splice(facts.length - 1, ids.length - facts.length); // its last token ends a text
  const shape = [1, ids.length];
  const input_ids = new state.ort.Tensor("int64", BigInt64Array.from(ids, BigInt), shape);
  const attention_mask = new state.ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape);
  const output = await session.run({ input_ids, attention_mask });
  return { vector: unit(output.text_embeds.data), cut, how };
}

/** Forgets the files of the model. */
export async function forget() {
  await globalThis.caches?.delete(CACHE);
  await countMissing();
  return { how };
}

/** The ids of a text. Of Python's repair: quotes, accents and blanks; neither mojibake nor HTML entities. */
function tokens(text) {
  const quoted = text.normalize("NFC").replace(/[\u02bc\u2018-\u201b]/g, "'").replace(/[\u201c-\u201f]/g, '"');
  return state.tokenizer.encode(quoted.split(/\s+/).filter(Boolean).join(" ")).ids;
}

/** A tower's session, its files fetched where they are not here. */
async function tower(kind, progress) {
  if (towers[kind]) return towers[kind];
  if (how.lean) await release();
  const files = await fetched(wanted(kind), progress);
  await startRuntime(files);
  if (kind === "text") state.tokenizer ??= madeTokenizer(files.tokenizer);
  progress({ preparing: true });
  try {
    towers[kind] = await session(kind, files);
  } catch (error) {
    if (error.code === "disagrees") throw error;
    if (how.lean || !Object.keys(towers).length) throw coded("memory", {}, error);
    how.lean = true; // both do not fit: one at a time may
    await release();
    towers[kind] = await session(kind, files).catch((again) => Promise.reject(coded("memory", {}, again)));
  }
  return towers[kind];
}

/** Names of the files that a tower needs. */
const wanted = (kind) => [...(state.ort ? [] : [how.provider]), kind, `${kind}_weights`, ...(kind === "text" && !state.tokenizer ? ["tokenizer"] : [])];

async function release() {
  for (const kind of Object.keys(towers)) {
    await towers[kind].release();
    delete towers[kind];
  }
}

async function startRuntime(files) {
  if (state.ort) return;
  state.ort = await import(`../library/ort.${how.provider}.js`);
  state.ort.env.wasm.wasmBinary = files[how.provider];
  state.ort.env.wasm.numThreads = how.threads;
  state.ort.env.logLevel = "error";
}

/** The session of a graph: images on the GPU where it gives the right answer, texts, which are short, never. */
async function session(kind, files) {
  const externalData = [{ path: facts.weights[kind], data: files[`${kind}_weights`] }];
  const create = (provider) =>
    state.ort.InferenceSession.create(files[kind], { executionProviders: [provider], externalData, logSeverityLevel: 3 });
  if (kind === "text") return create("wasm");
  if (how.provider === "webgpu") {
    try {
      const made = await create("webgpu");
      if (await agrees(made)) return made;
      await made.release();
    } catch (error) {
      console.warn("WebGPU:", error);
    }
    Object.assign(how, { provider: "wasm", faulty: true });
  }
  const made = await create("wasm");
  if (await agrees(made)) return made;
  await made.release();
  throw coded("disagrees");
}

/** Whether a session answers a given input as Python did when the page was made; it is the first run, too. */
async function agrees(session) {
  const length = 3 * facts.side * facts.side;
  const input = Float32Array.from({ length }, (_, i) => (((i * 40503) % 65536) / 65536) * 4 - 2);
  const vector = await ran(session, input);
  return vector.reduce((sum, value, i) => sum + value * facts.probe[i], 0) > AGREES;
}

async function ran(session, numbers) {
  const pixel_values = new state.ort.Tensor("float32", numbers, [1, 3, facts.side, facts.side]);
  const output = await session.run({ pixel_values });
  return unit(output.image_embeds.data);
}

function unit(vector) {
  const length = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  return Float32Array.from(vector, (value) => value / length);
}

function madeTokenizer(bytes) {
  const { tokenizer, config } = JSON.parse(new TextDecoder().decode(bytes));
  return new Tokenizer(tokenizer, config);
}

// --- Files -----------------------------------------------------------------------------------------------------------

/** Name -> bytes of files of the model, out of the browser's cache or of the host, part by part. */
async function fetched(names, progress) {
  const parts = names.flatMap((name) => facts.files[name].map((part) => ({ ...part, of: name })));
  const bytes = Object.fromEntries(names.map((name) => [name, new Uint8Array(size(facts.files[name]))]));
  const cache = await globalThis.caches?.open(CACHE).catch(() => null);
  const total = size(parts);
  const at = Object.fromEntries(names.map((name) => [name, 0]));
  let done = 0;
  for (const part of parts) {
    const kept = await cache?.match(address(part));
    const found = kept ? new Uint8Array(await kept.arrayBuffer()) : await download(part, (loaded) => progress({ loaded: done + loaded, total }));
    if (!kept) await keep(cache, part, found);
    bytes[part.of].set(found, at[part.of]);
    at[part.of] += part.bytes;
    done += part.bytes;
  }
  return bytes;
}

/** The bytes of a part from the host, whole. */
async function download(part, progress) {
  const found = new Uint8Array(part.bytes);
  let loaded = 0;
  try {
    const answer = await fetch(address(part));
    if (!answer.ok) throw new Error(`${answer.status}`);
    const reader = answer.body.getReader();
    for (let next = await reader.read(); !next.done; next = await reader.read()) {
      found.set(next.value, loaded);
      progress((loaded += next.value.length));
    }
    if (loaded !== part.bytes || !(await isWhole(found, part))) throw new Error(`${loaded} of ${part.bytes} bytes`);
  } catch (error) {
    throw coded("download", { name: part.name }, error);
  }
  return found;
}

/** Whether bytes are those of the part; a page that came without https may not compute it, and takes them as they are. */
async function isWhole(bytes, part) {
  if (!crypto.subtle) return true;
  const found = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(found, (byte) => byte.toString(16).padStart(2, "0")).join("") === part.sha256;
}

async function keep(cache, part, bytes) {
  try {
    await cache.put(address(part), new Response(bytes));
    how.missing -= part.bytes;
  } catch {
    how.kept = false; // no https, or no room: it is fetched again next time
  }
}

/** Counts the bytes that are not kept yet; parts of an earlier model are dropped. */
async function countMissing() {
  const parts = Object.entries(facts.files).flatMap(([name, list]) => (["wasm", "webgpu"].includes(name) && name !== how.provider ? [] : list));
  const cache = await globalThis.caches?.open(CACHE).catch(() => null);
  Object.assign(how, { kept: Boolean(cache), missing: size(parts) });
  if (!cache) return;
  const all = new Set(Object.values(facts.files).flat().map(address));
  const there = new Set((await cache.keys()).map((request) => request.url));
  for (const url of there) if (url.startsWith(HERE.href) && !all.has(url)) await cache.delete(url);
  how.missing = size(parts.filter((part) => !there.has(address(part))));
}

const size = (parts) => parts.reduce((sum, part) => sum + part.bytes, 0);
const address = (part) => new URL(`${part.name}?v=${part.sha256.slice(0, 16)}`, HERE).href;
