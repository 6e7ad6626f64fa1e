// The pictures that are indexed, in memory and in the browser's storage, and which of them are nearest to a vector.
import * as store from "./store.js";

const known = new Map(); // key -> record of the storage, with `source`, an address of its thumbnail
const files = new Map(); // key -> file, of those that were chosen since the page was opened
const others = new BroadcastChannel("capivara"); // this page in other tabs
let digest = "";
let stored = false; // whether there is a storage; without one the index is in memory alone

/** Reads what the storage has; `changed` is called where another tab has added or forgotten pictures. */
export async function load(imageDigest, changed) {
  digest = imageDigest;
  await reread();
  stored = true;
  others.onmessage = () => reread().then(() => changed());
}

async function reread() {
  const records = await store.all(digest);
  const there = new Set(records.map((record) => record.key));
  for (const key of known.keys()) if (!there.has(key)) drop(key);
  for (const record of records) if (!known.has(record.key)) note(record);
}

const note = (record) => known.set(record.key, Object.assign(record, { source: URL.createObjectURL(record.thumbnail) }));

function drop(key) {
  URL.revokeObjectURL(known.get(key).source);
  known.delete(key);
  files.delete(key);
}

export const count = () => known.size;
export const get = (key) => known.get(key);

/** Whether a file is indexed already; from now on it is shown whole. */
export function meet(file) {
  const key = store.key(digest, file);
  if (!known.has(key)) return false;
  files.set(key, file);
  return true;
}

/** Indexes a file with what the model has made of it. */
export async function add(file, { vector, width, height, thumbnail }) {
  const key = store.key(digest, file);
  const path = file.webkitRelativePath || file.name;
  const record = { key, path, name: file.name, size: file.size, modified: file.lastModified, width, height, vector, thumbnail };
  if (stored) await store.put(record);
  note({ ...record });
  files.set(key, file);
  others.postMessage("changed");
}

export async function forget(key) {
  if (stored) await store.remove(key);
  drop(key);
  others.postMessage("changed");
}

export async function forgetAll() {
  if (stored) await store.clear();
  for (const key of [...known.keys()]) drop(key);
  others.postMessage("changed");
}

/** The file of a picture, where it was chosen since the page was opened. */
export const original = (key) => files.get(key);

/** The pictures that were changed last. */
export const newest = (k) => [...known.values()].sort((a, b) => b.modified - a.modified || (a.path < b.path ? -1 : 1)).slice(0, k);

/** The `k` pictures of the highest cosine to a unit vector, each with its `score`, but for the one of the key `except`. */
export function nearest(vector, k, except = "") {
  const scored = [];
  for (const picture of known.values()) {
    if (picture.key === except) continue;
    let score = 0;
    for (let i = 0; i < vector.length; i++) score += vector[i] * picture.vector[i];
    scored.push({ ...picture, score });
  }
  return scored.sort((a, b) => b.score - a.score).slice(0, k);
}
