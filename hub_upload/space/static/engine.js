// The page's side of the worker: questions to the model, and what is heard of it meanwhile.
const waiting = new Map(); // number of a question -> what waits for its answer
let asked = 0;
let worker = null;

/** Starts the worker. It is made of a blob, for a worker has the rules of this page on other addresses by that alone. */
function start() {
  const module = JSON.stringify(new URL("worker.js", import.meta.url).href);
  const source = URL.createObjectURL(new Blob([`import ${module};`], { type: "text/javascript" }));
  const made = new Worker(source, { type: "module" });
  return new Promise((done, fail) => {
    made.onerror = (event) => {
      const error = Object.assign(new Error(event.message), { code: "no_worker" });
      fail(error);
      for (const question of waiting.values()) question.fail(error);
      waiting.clear();
    };
    made.onmessage = ({ data }) => {
      if (data.ready) return done(made);
      const question = waiting.get(data.id);
      if (!question) return;
      if (data.progress) return question.progress(data.progress);
      waiting.delete(data.id);
      if (data.error) question.fail(Object.assign(new Error(data.error.code), data.error));
      else question.done(data.answer);
    };
  });
}

/** The answer of `model.js` to a question; `progress` hears of bytes that are loaded, and that the model is prepared. */
export async function work(name, values = {}, progress = () => {}) {
  const running = await (worker ??= start());
  const id = ++asked;
  return new Promise((done, fail) => {
    waiting.set(id, { done, fail, progress });
    running.postMessage({ id, name, values });
  });
}
