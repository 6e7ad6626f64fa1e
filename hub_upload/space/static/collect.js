// Pictures that the visitor chooses become vectors, one after another; what is done shows, with its rate and the time left.
import { find, notice, number, say } from "./common.js";
import { work } from "./engine.js";
import * as pictures from "./pictures.js";

const NAMES = /\.(avif|bmp|gif|heic|heif|jfif|jpe?g|png|tiff?|webp)$/i; // where a file has no type
const ONLY_THIS = ["no_picture", "too_large"]; // errors of one file; after others the next ones would fail as well
const RATE_OF = 20; // pictures whose time says how long the others take
const SHOWN = 3; // names of files that could not be read
const SHOW_MS = 1000; // between two looks at what has come so far
const queue = [];
const state = { running: false, stopped: false, total: 0 };

/** Indexes the pictures among files; `changed` is called now and then, with how the model runs, and at the end. */
export async function collect(files, changed) {
  const found = [...files].filter((file) => (file.type ? file.type.startsWith("image/") : NAMES.test(file.name)));
  notice();
  tell(found.length ? "" : say("no_pictures"));
  queue.push(...found);
  state.total += found.length;
  if (state.running || !found.length) return;
  Object.assign(state, { running: true, stopped: false });
  navigator.storage?.persist?.().catch(() => {});
  const counts = { indexed: 0, known: 0, unreadable: [] };
  try {
    await readAll(counts, changed);
    tell(summary(counts));
  } catch (error) {
    tell(summary(counts));
    notice(error);
  } finally {
    queue.length = 0;
    Object.assign(state, { running: false, total: 0 });
    hideWork();
    changed();
  }
}

/** Ends after the picture that is being read. */
export const stop = () => (state.stopped = true);

async function readAll(counts, changed) {
  const times = [];
  let how = {};
  let shown = performance.now();
  for (let done = 0; queue.length && !state.stopped; done++) {
    const file = queue.shift();
    if (pictures.meet(file)) {
      counts.known += 1;
      continue;
    }
    showPictures(done, times);
    try {
      const answer = await work("picture", { file }, showModel);
      how = answer.how;
      await pictures.add(file, answer);
      counts.indexed += 1;
    } catch (error) {
      if (!ONLY_THIS.includes(error.code)) throw error;
      counts.unreadable.push(file.name);
    }
    times.push(performance.now());
    if (performance.now() - shown > SHOW_MS || counts.indexed === 1) {
      shown = performance.now();
      changed(how);
    }
  }
}

function summary({ indexed, known, unreadable }) {
  const parts = [indexed ? say("indexed", { n: indexed }) : say("indexed_none")];
  if (known) parts.push(say("known", { n: known }));
  if (unreadable.length) {
    const first = unreadable.slice(0, SHOWN).join(", ");
    const names = unreadable.length > SHOWN ? say("and_more", { names: first, n: unreadable.length - SHOWN }) : first;
    parts.push(say("unreadable", { n: unreadable.length, names }));
  }
  if (state.stopped) parts.push(say("stopped"));
  return parts.join(" ");
}

// --- What shows ------------------------------------------------------------------------------------------------------

const tell = (text) => (find("said").textContent = text);

/** How far the pictures are, by the time that the last ones took. */
function showPictures(done, times) {
  const parts = [say("indexing", { done, total: state.total })];
  const last = times.slice(-RATE_OF - 1);
  if (last.length > 1) {
    const rate = (1000 * (last.length - 1)) / (last.at(-1) - last[0]);
    parts.push(say("a_second", { rate: number(rate, rate < 10 ? 1 : 0) }), left(queue.length + 1, rate));
  }
  showWork(parts.join(" · "), done, state.total, true);
}

const download = { since: 0, from: 0 }; // when it began, and with how many bytes

/** How far the model is. */
export function showModel({ loaded = 0, total = 0, preparing = false }) {
  if (preparing) {
    download.since = 0;
    return showWork(say("preparing"), null, null, state.running);
  }
  if (!download.since) Object.assign(download, { since: performance.now(), from: loaded });
  const seconds = (performance.now() - download.since) / 1000;
  const parts = [say("downloading", { loaded: Math.round(loaded / 1e6), total: Math.round(total / 1e6) })];
  if (seconds > 1) {
    const rate = (loaded - download.from) / seconds;
    parts.push(say("megabytes_a_second", { rate: number(rate / 1e6, 1) }), left(total - loaded, rate));
  }
  showWork(parts.join(" · "), loaded, total, state.running);
}

function left(rest, rate) {
  const seconds = Math.ceil(rest / rate);
  if (!Number.isFinite(seconds)) return "";
  return seconds < 90 ? say("left_seconds", { n: seconds }) : say("left_minutes", { n: Math.round(seconds / 60) });
}

/** A bar of `done` of `total`, without an end where that is null. */
function showWork(text, done, total, stoppable) {
  find("work").hidden = false;
  find("stop").hidden = !stoppable;
  find("progress-said").textContent = text;
  if (total === null) find("progress").removeAttribute("value");
  else Object.assign(find("progress"), { max: total, value: done });
}

/** Hides the bar, but not that of pictures that are being read. */
export function hideWork() {
  if (!state.running) find("work").hidden = true;
}
