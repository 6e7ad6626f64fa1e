// What transformers.js makes of an exported repository; the same steps in Node and in a browser.
//
//   node tests/in_browser.mjs REQUEST.json    prints the answer as JSON
//   (await import("/code/in_browser.mjs")).answer(library, request)
//
// request: env        settings of transformers.js: from where it loads
//          name       of the repository
//          dtype      of the weights; null for what transformers.js takes by itself
//          texts      each is tokenised alone
//          pictures   addresses
//          inputs     what the models get: input_ids, attention_mask (lists) and pixel_values (base64, float32)
//          labels, template   of the pipeline, which classifies the pictures

function numbers(base64) {
  return new Float32Array(Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer);
}

const rows = (tensor) => tensor.tolist().map((row) => row.map(Number));

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
  const model = await library.AutoModel.from_pretrained(request.name, request.options);
  const output = await model(tensors(library, request.inputs));
  answer.logits_per_image = rows(output.logits_per_image);
  answer.dtype = model.sessions.model.config.dtype;
  await model.dispose();
}

async function towers(library, request, answer) {
  const { input_ids, attention_mask, pixel_values } = tensors(library, request.inputs);
  const sides = [
    [library.CLIPTextModelWithProjection, { input_ids, attention_mask }, "text_embeds"],
    [library.CLIPVisionModelWithProjection, { pixel_values }, "image_embeds"],
  ];
  for (const [kind, inputs, output] of sides) {
    const model = await kind.from_pretrained(request.name, request.options);
    answer[output] = rows((await model(inputs))[output]);
    await model.dispose();
  }
}

async function tokenised(library, request, answer) {
  const tokenizer = await library.AutoTokenizer.from_pretrained(request.name);
  answer.ids = request.texts.map((text) => rows(tokenizer(text, { truncation: true }).input_ids)[0]);
}

async function classified(library, request, answer) {
  const classify = await library.pipeline("zero-shot-image-classification", request.name, request.options);
  answer.classes = await classify(request.pictures, request.labels, { hypothesis_template: request.template });
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
  const found = {};
  if (request.texts) await tokenised(library, request, found);
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
  console.log(JSON.stringify(found));
}
