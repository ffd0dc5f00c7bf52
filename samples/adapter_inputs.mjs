// An adapter of PEFT as plain inputs or in a slot of a graph, in JavaScript: in a browser, or in Node 18 or newer.
//
//     lora-export onnx BASE -a ADAPTER --lora inputs --names peft --required-inputs -o model.onnx
//     npm install onnxruntime-web
//     node samples/adapter_inputs.mjs model.onnx ADAPTER 5,7,9
//
// It prints the first output of the base and of the adapter, as JSON. The guide's page `browser` imports the functions.
// A graph of `--lora inputs` usually has optional inputs, and onnxruntime for JavaScript passes none: onnxruntime-web
// refuses them, and onnxruntime-node leaves them out and runs the base. `--required-inputs` makes them plain ones.

// A safetensors file: the length of a header, the header in JSON, and the numbers.
function readTensors(bytes) {
  const end = 8 + Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, end)));
  const tensors = {};
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    if (dtype !== "F32") throw new Error(`${name} is ${dtype}; this sample reads F32`);
    tensors[name] = { shape, data: new Float32Array(bytes.slice(end + from, end + to).buffer) };
  }
  return tensors;
}

// The graph takes A (in, rank) and B (rank, out); PEFT stores the transposes.
function transposed(ort, { shape: [rows, columns], data }, factor) {
  const turned = new Float32Array(data.length);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) turned[column * rows + row] = factor * data[row * columns + column];
  }
  return new ort.Tensor("float32", turned, [columns, rows]);
}

// The inputs of an adapter, from its adapter_config.json and the bytes of its adapter_model.safetensors.
export function adapterInputs(ort, config, bytes) {
  const { r, lora_alpha, use_rslora, use_dora, rank_pattern = {}, alpha_pattern = {} } = config;
  if (use_dora) throw new Error("this sample reads no DoRA: lora-export convert makes its factors of the base's weights");
  if (Object.keys({ ...rank_pattern, ...alpha_pattern }).length) throw new Error("this sample reads one rank and one alpha");
  const scale = lora_alpha / (use_rslora ? Math.sqrt(r) : r); // of B
  const inputs = {};
  for (const [name, tensor] of Object.entries(readTensors(bytes))) {
    inputs[name] = transposed(ort, tensor, name.includes(".lora_B.") ? scale : 1);
  }
  return inputs;
}

// The same, of a folder on the server of the page.
export async function fetchAdapter(ort, folder) {
  const config = await (await fetch(`${folder}/adapter_config.json`)).json();
  return adapterInputs(ort, config, new Uint8Array(await (await fetch(`${folder}/adapter_model.safetensors`)).arrayBuffer()));
}

const isDora = (name) => name.endsWith(".lora_magnitude_vector");
const filled = (ort, shape, value) => {
  return new ort.Tensor("float32", new Float32Array(shape.reduce((size, each) => size * each)).fill(value), shape);
};
const isFactor = ({ name }) => /\.lora_[AB]\./.test(name) || isDora(name);

// A and B of rank 0 at every layer, and ones for the factors of DoRA: the base.
export function inputsOfBase(ort, session) {
  const empty = (shape) => new ort.Tensor("float32", new Float32Array(0), shape.map((size) => (typeof size === "number" ? size : 0)));
  const input = (name, shape) => (isDora(name) ? filled(ort, shape, 1) : empty(shape));
  return Object.fromEntries(session.inputMetadata.filter(isFactor).map(({ name, shape }) => [name, input(name, shape)]));
}

// The stacks (slots + 1, in, rank) and (slots + 1, rank, out) of a graph of `--lora slots --names peft`: zeros, the base.
// With `--dora`, also (slots + 1, out): ones.
export function emptySlots(ort, session) {
  const stack = (name, shape) => filled(ort, shape, isDora(name) ? 1 : 0);
  return Object.fromEntries(session.inputMetadata.filter(isFactor).map(({ name, shape }) => [name, stack(name, shape)]));
}

// Put what `adapterInputs` gives into a slot, from 1 on. Nothing of an adapter that was there remains.
export function fillSlot(stacks, slot, adapter) {
  for (const [name, { dims }] of Object.entries(adapter)) {
    const [slots, height, width] = stacks[name]?.dims ?? [0];
    const isA = name.includes(".lora_A."); // the rank alone may be smaller than the graph's
    const hasSize = isA ? dims[0] === height && dims[1] <= width : dims[0] <= height && dims[1] === width;
    const fits = slot > 0 && slot < slots && hasSize;
    if (!fits) throw new Error(`the graph has no slot ${slot} that takes ${name} of ${dims}`);
  }
  for (const [name, { data, dims: [, height, width = 1] }] of Object.entries(stacks)) {
    const own = data.subarray(slot * height * width, (slot + 1) * height * width).fill(isDora(name) ? 1 : 0);
    const { data: values = [], dims: [rows, columns] = [0] } = adapter[name] ?? {};
    for (let row = 0; row < rows; row++) own.set(values.subarray(row * columns, (row + 1) * columns), row * width);
  }
}

async function main([graph, folder, words = "5,7,9", runtime = "onnxruntime-web"]) {
  const { readFileSync } = await import("node:fs");
  const { createRequire } = await import("node:module");
  const { join } = await import("node:path");
  const ort = createRequire(join(process.cwd(), "package.json"))(runtime); // installed where the program is run
  ort.env.logLevel = "error";

  const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(graph)));
  const base = inputsOfBase(ort, session);
  const config = JSON.parse(readFileSync(join(folder, "adapter_config.json"), "utf8"));
  const adapter = adapterInputs(ort, config, new Uint8Array(readFileSync(join(folder, "adapter_model.safetensors"))));
  const unknown = Object.keys(adapter).filter((name) => !(name in base));
  if (unknown.length) throw new Error(`the graph has no inputs ${unknown.join(", ")}`);

  const ids = words.split(",").map(BigInt);
  const texts = {};
  for (const { name } of session.inputMetadata.filter((input) => !isFactor(input))) {
    const fill = { input_ids: ids, attention_mask: ids.map(() => 1n) }[name] ?? ids.map(() => 0n);
    texts[name] = new ort.Tensor("int64", BigInt64Array.from(fill), [1, ids.length]);
  }

  const output = session.outputNames[0];
  const run = async (factors) => Array.from((await session.run({ ...texts, ...factors }))[output].data);
  console.log(JSON.stringify({ base: await run(base), adapter: await run({ ...base, ...adapter }) }));
}

// Whether this file is what Node was started with, and not imported.
async function isProgram() {
  if (!globalThis.process?.argv?.[1]) return false;
  const [{ realpathSync }, { fileURLToPath }] = [await import("node:fs"), await import("node:url")];
  try {
    return realpathSync(process.argv[1]) === realpathSync(fileURLToPath(import.meta.url));
  } catch {
    return false; // the first argument of another program need not be a file
  }
}

if (await isProgram()) await main(process.argv.slice(2));
