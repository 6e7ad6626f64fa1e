// What transformers.js makes of an exported repository; the same steps in Node and in a browser.
//
//   node tests/in_browser.mjs REQUEST.json    prints the answer as JSON
//   (await import("/code/in_browser.mjs")).answer(library, request)
//
// request: env        settings of transformers.js: from where it loads
//          name       of the repository
//          dtype      of the weights; null for what transformers.js takes by itself
//          texts      each is tokenised alone
//          pictures   addresses; each goes through the image processor
//          inputs     what the models get: input_ids, attention_mask (lists) and pixel_values (base64, float32)
//          labels, template   of the pipeline, which classifies the pictures

const now = () => performance.now() / 1000;

function numbers(base64) {
  return new Float32Array(Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer);
}

function base64(floats) {
  const bytes = new Uint8Array(floats.buffer, floats.byteOffset, floats.byteLength);
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

const rows = (tensor) => tensor.tolist().map((row) => row.map(Number));

async function timed(seconds, what, step) {
  const started = now();
  const result = await step();
  seconds[what] = now() - started;
  return result;
}

function tensors({ Tensor }, inputs) {
  const found = {};
  for (const name of ["input_ids", "attention_mask"]) {
    const list = inputs[name];
    found[name] = new Tensor("int64", BigInt64Array.from(list.flat().map(BigInt)), [list.length, list[0].length]);
  }
  const { data, dims } = inputs.pixel_values;
  found.pixel_values = new Tensor("float32", numbers(data), dims);
  return found;
}

async function whole(library, request, answer) {
  const model = await timed(answer.seconds, "load_model", () =>
    library.AutoModel.from_pretrained(request.name, request.options));
  const inputs = tensors(library, request.inputs);
  const output = await timed(answer.seconds, "scores", () => model(inputs));
  answer.logits_per_image = rows(output.logits_per_image);
  answer.dtype = model.sessions.model.config.dtype;
  await model.dispose();
}

async function towers(library, request, answer) {
  const { input_ids, attention_mask, pixel_values } = tensors(library, request.inputs);
  const sides = [
    ["text", library.CLIPTextModelWithProjection, { input_ids, attention_mask }, "text_embeds"],
    ["image", library.CLIPVisionModelWithProjection, { pixel_values }, "image_embeds"],
  ];
  for (const [side, kind, inputs, output] of sides) {
    const model = await timed(answer.seconds, `load_${side}s`, () =>
      kind.from_pretrained(request.name, request.options));
    answer[output] = rows((await timed(answer.seconds, `${side}s_first`, () => model(inputs)))[output]);
    await timed(answer.seconds, `${side}s`, () => model(inputs));
    await model.dispose();
  }
}

async function processed(library, request, answer) {
  if (request.texts) {
    const tokenizer = await timed(answer.seconds, "load_tokenizer", () =>
      library.AutoTokenizer.from_pretrained(request.name));
    answer.ids = request.texts.map((text) => rows(tokenizer(text, { truncation: true }).input_ids)[0]);
  }
  if (!request.pictures) return;
  const processor = await library.AutoProcessor.from_pretrained(request.name);
  answer.pixels = [];
  for (const address of request.pictures) {
    const { pixel_values } = await processor(await library.RawImage.read(address));
    answer.pixels.push({ data: base64(pixel_values.data), dims: pixel_values.dims });
  }
}

async function classified(library, request, answer) {
  const classify = await timed(answer.seconds, "load_pipeline", () =>
    library.pipeline("zero-shot-image-classification", request.name, request.options));
  answer.classes = await timed(answer.seconds, "classify", () =>
    classify(request.pictures, request.labels, { hypothesis_template: request.template }));
  // The pipeline gives probabilities alone; the scores that it makes them of, by its own parts.
  const { pixel_values } = await classify.processor(
    await Promise.all(request.pictures.map((address) => library.RawImage.read(address))));
  const texts = request.labels.map((label) => request.template.replaceAll("{}", label));
  const padding = classify.model.config.model_type === "siglip" ? "max_length" : true;  // as the pipeline has it
  const tokens = classify.tokenizer(texts, { padding, truncation: true });
  answer.logits = rows((await classify.model({ ...tokens, pixel_values })).logits_per_image);
  await classify.dispose();
}

export async function answer(library, request) {
  const { wasmPaths, ...env } = request.env;
  Object.assign(library.env, env);
  if (wasmPaths) library.env.backends.onnx.wasm.wasmPaths = wasmPaths;
  request.options = request.dtype ? { dtype: request.dtype } : {};
  const found = { seconds: {}, version: library.env.version };
  await processed(library, request, found);
  if (request.inputs) {
    await towers(library, request, found);
    await whole(library, request, found);
  }
  if (request.labels) await classified(library, request, found);
  return found;
}

if (globalThis.process?.argv[2]) {
  const { readFile } = await import("node:fs/promises");
  const request = JSON.parse(await readFile(process.argv[2], "utf-8"));
  const found = await answer(await import(request.library), request);
  found.peak_bytes = process.resourceUsage().maxRSS * 1024;
  console.log(JSON.stringify(found));
}
