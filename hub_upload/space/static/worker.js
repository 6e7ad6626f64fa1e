// The model beside the page, so that the page stays alive: a question at a time, answered by `model.js`.
import * as model from "./model.js";

let last = Promise.resolve();

addEventListener("message", ({ data: { id, name, values } }) => {
  const progress = (found) => postMessage({ id, progress: found });
  last = last.then(async () => {
    try {
      postMessage({ id, answer: await model[name](values, progress) });
    } catch (error) {
      console.warn(name, error, error.cause);
      postMessage({ id, error: { code: error.code ?? "failed", values: error.values ?? {} } });
    }
  });
});
postMessage({ ready: true });
