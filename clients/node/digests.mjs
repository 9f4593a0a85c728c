// Veneer's digests in JavaScript: the rules of protos/DIGESTS.md, with node:crypto and nothing else.
//
//   import { rowDigest, DatasetVersion } from "./digests.mjs";
//   node digests.mjs < cases.jsonl      one {"kind", "input"} a line, as in protos/digest_vectors.json;
//                                       one {"output"} or {"refused"} a line comes back
//
// Every digest is a string of 64 lower-case hex digits. What has no digest throws DigestError.

import { createHash } from "node:crypto";

export class DigestError extends Error {}

export const CANONICALISER_VERSION = 1;
const MAX_DEPTH = 64;
const MAX_DIMENSIONS = 32;
const MAX_SPLIT_BYTES = 255;
const ROLES = ["system", "user", "assistant"];

const DTYPE_BITS = {
  __proto__: null,
  BOOL: 8, U8: 8, I8: 8, F8_E4M3: 8, F8_E5M2: 8, F8_E8M0: 8, F8_E4M3FNUZ: 8, F8_E5M2FNUZ: 8,
  U16: 16, I16: 16, F16: 16, BF16: 16,
  U32: 32, I32: 32, F32: 32,
  U64: 64, I64: 64, F64: 64, C64: 64,
  F4: 4, F6_E2M3: 6, F6_E3M2: 6,
};

const ADAPTER_UNREAD = new Set([
  "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout", "megatron_core",
  "peft_version", "revision", "task_type",
]);
const STARTS_ONLY = ["gaussian", "eva", "orthogonal"];
const MODULE_SETS = ["exclude_modules", "modules_to_save", "target_modules"];

const MODEL_UNREAD = new Set([
  "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
  "initializer_range", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
]);

// ---- pieces

function refuse(problem) {
  throw new DigestError(problem);
}

function sha256(...pieces) {
  const hash = createHash("sha256");
  for (const piece of pieces) hash.update(piece);
  return hash.digest();
}

const domain = (kind) => Buffer.from(`veneer.${kind}.v1\0`, "latin1");

function unsigned(value, sizeBytes, what) {
  const integer = typeof value === "bigint" ? value : Number.isSafeInteger(value) ? BigInt(value) : -1n;
  if (integer < 0n || integer >> BigInt(8 * sizeBytes)) refuse(`${what} is no unsigned integer of ${sizeBytes} bytes`);
  return Buffer.from(integer.toString(16).padStart(2 * sizeBytes, "0"), "hex");
}

function utf8(text, what) {
  if (typeof text !== "string") refuse(`${what} must be a string`);
  if (!text.isWellFormed()) refuse(`${what} has a lone surrogate`);
  return Buffer.from(text, "utf8");
}

const sized = (bytes) => Buffer.concat([unsigned(bytes.length, 4, "length in bytes"), bytes]);

function digestBytes(hex, what) {
  if (typeof hex !== "string" || !/^[0-9a-f]{64}$/.test(hex)) refuse(`${what} must be 64 lower-case hex digits`);
  return Buffer.from(hex, "hex");
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

// ---- canonical JSON

/** The RFC 8785 form of a JSON value, as a string. */
export function canonicalJson(value, place = "$", depth = 0) {
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "string") {
    utf8(value, place);
    return JSON.stringify(value);
  }
  if (typeof value === "number") {
    if (!(Math.abs(value) <= Number.MAX_SAFE_INTEGER)) refuse(`${place} must be finite and within +-(2^53-1)`);
    return JSON.stringify(value);
  }
  if (typeof value !== "object") refuse(`${place} is of a type that JSON has not`);
  if (depth === MAX_DEPTH) refuse(`${place} lies deeper than ${MAX_DEPTH} arrays and objects`);
  if (Array.isArray(value)) {
    return `[${value.map((item, index) => canonicalJson(item, `${place}[${index}]`, depth + 1)).join()}]`;
  }
  const members = Object.keys(value).sort().map((key) => { // sort() compares UTF-16 code units, as RFC 8785 does
    utf8(key, `a key in ${place}`);
    return `${JSON.stringify(key)}:${canonicalJson(value[key], `${place}.${key}`, depth + 1)}`;
  });
  return `{${members.join()}}`;
}

// ---- blob and row

/** SHA-256 of bytes: what sha256sum prints. */
export const blobDigest = (bytes) => sha256(bytes).toString("hex");

/** SHA-256 of canonicalRow(row). */
export const rowDigest = (row) => sha256(canonicalRow(row)).toString("hex");

/** The RFC 8785 JSON of a row that is in canonical form; any other form throws. */
export function canonicalRow(row) {
  requireKeys(row, "$", ["messages"]);
  if (!Array.isArray(row.messages) || row.messages.length === 0) refuse("$.messages must hold a message");
  row.messages.forEach((message, index) => checkMessage(message, `$.messages[${index}]`));
  return canonicalJson(row);
}

function checkMessage(message, place) {
  const weighted = isObject(message) && Object.hasOwn(message, "weight");
  requireKeys(message, place, ["role", "content", ...(weighted ? ["weight"] : [])]);
  if (!ROLES.includes(message.role)) refuse(`${place}.role must be one of ${ROLES}`);
  if (weighted && (message.role !== "assistant" || message.weight !== 0)) refuse(`${place}.weight is 0 or not there`);
  if (!Array.isArray(message.content)) refuse(`${place}.content must be a list of parts`);
  message.content.forEach((part, index) => {
    checkPart(part, `${place}.content[${index}]`);
    if (index > 0 && part.type === "text" && message.content[index - 1].type === "text") {
      refuse(`${place}.content[${index}] is a text after a text: make them one part`);
    }
  });
}

function checkPart(part, place) {
  if (isObject(part) && part.type === "image") {
    requireKeys(part, place, ["type", "digest"]);
    digestBytes(part.digest, `${place}.digest`);
  } else if (isObject(part) && part.type === "text") {
    requireKeys(part, place, ["type", "text"]);
    if (utf8(part.text, `${place}.text`).length === 0) refuse(`${place}.text is empty: leave the part out`);
  } else {
    refuse(`${place} must be a part of type text or image`);
  }
}

function requireKeys(value, place, keys) {
  if (!isObject(value)) refuse(`${place} must be an object`);
  const found = Object.keys(value);
  if (found.length !== keys.length || !keys.every((key) => Object.hasOwn(value, key))) {
    refuse(`${place} must have just the keys ${keys}`);
  }
}

// ---- dataset version

/** Takes rows in any order, one at a time; digest() names those added so far. */
export class DatasetVersion {
  #rowsBySplit = new Map();

  add(split, rowDigest) {
    const row = digestBytes(rowDigest, "row digest").toString("hex");
    const sizeBytes = utf8(split, "split").length;
    if (sizeBytes === 0 || sizeBytes > MAX_SPLIT_BYTES) refuse(`split must be 1 to ${MAX_SPLIT_BYTES} bytes`);
    if (!this.#rowsBySplit.has(split)) this.#rowsBySplit.set(split, []);
    this.#rowsBySplit.get(split).push(row);
  }

  digest() {
    const splits = [...this.#rowsBySplit].map(([split, rows]) => ({ name: Buffer.from(split, "utf8"), rows }));
    splits.sort((a, b) => Buffer.compare(a.name, b.name));
    const pieces = splits.flatMap(({ name, rows }) => [
      sized(name), unsigned(rows.length, 8, "number of rows"), Buffer.from(rows.sort().join(""), "hex"),
    ]);
    const version = unsigned(CANONICALISER_VERSION, 4, "canonicaliser's version");
    const count = unsigned(splits.length, 4, "number of splits");
    return sha256(domain("dataset-version"), version, count, ...pieces).toString("hex");
  }
}

// ---- contract, adapter, model; a tensor is {name, dtype, shape, bytes}

/** The digest of a processing contract, a JSON object. */
export function contractDigest(contract) {
  if (!isObject(contract)) refuse("a contract must be an object");
  return sha256(domain("contract"), canonicalJson(contract)).toString("hex");
}

/** The digest of an adapter version: its tensors, PEFT's adapter_config.json, its contract's digest. */
export function adapterDigest(tensors, config, contract) {
  const start = Buffer.concat([domain("adapter"), digestBytes(contract, "contract digest")]);
  return weightsDigest(start, adapterForwardConfig(config), tensors);
}

/** The digest of a model: its tensors and its config.json. */
export const modelDigest = (tensors, config) => weightsDigest(domain("model"), modelForwardConfig(config), tensors);

function weightsDigest(start, config, tensors) {
  const parts = tensors.map((tensor) => ({ name: utf8(tensor.name, "tensor's name"), tensor }));
  parts.sort((a, b) => Buffer.compare(a.name, b.name));
  const pieces = [start, sized(Buffer.from(canonicalJson(config), "utf8")), unsigned(parts.length, 8, "tensors")];
  parts.forEach(({ name, tensor }, index) => {
    if (index > 0 && name.equals(parts[index - 1].name)) refuse(`tensor ${tensor.name} is there twice`);
    const { dtype, shape, bytes } = tensor;
    if (!(dtype in DTYPE_BITS)) refuse(`tensor ${tensor.name}: unknown dtype ${dtype}`);
    if (shape.length > MAX_DIMENSIONS) refuse(`tensor ${tensor.name}: more than ${MAX_DIMENSIONS} dimensions`);
    const dimensions = shape.map((dimension) => unsigned(dimension, 8, "dimension"));
    const bits = shape.reduce((product, dimension) => product * BigInt(dimension), BigInt(DTYPE_BITS[dtype]));
    if (bits !== 8n * BigInt(bytes.length)) refuse(`tensor ${tensor.name}: ${bytes.length} bytes, ${bits} bits by shape`);
    pieces.push(sized(name), sized(utf8(dtype, "dtype")), unsigned(shape.length, 4, "dimensions"), ...dimensions);
    pieces.push(sha256(bytes));
  });
  return sha256(...pieces).toString("hex");
}

function adapterForwardConfig(config) {
  for (const name of ["r", "lora_alpha"]) if (typeof config[name] !== "number") refuse(`$.${name} must be a number`);
  const read = filtered(config, (name, value) => {
    if (ADAPTER_UNREAD.has(name) || value === null || value === false) return false;
    if (typeof value === "object" && Object.keys(value).length === 0) return false;
    if (name === "bias") return value !== "none";
    if (name === "init_lora_weights") return value !== true && !STARTS_ONLY.includes(value);
    if (name === "qalora_group_size") return config.use_qalora === true;
    return true;
  });
  for (const name of MODULE_SETS) {
    if (Array.isArray(read[name])) {
      const modules = read[name].map((module) => utf8(module, `$.${name}`)).sort(Buffer.compare);
      read[name] = [...new Set(modules.map(String))];
    }
  }
  return read;
}

function modelForwardConfig(config) {
  const isRead = (name, value) => !MODEL_UNREAD.has(name) && value !== null;
  const read = filtered(config, isRead);
  for (const part of ["text_config", "vision_config"]) if (isObject(read[part])) read[part] = filtered(read[part], isRead);
  return read;
}

// fromEntries defines members, where an assignment to "__proto__" would set a prototype.
function filtered(object, keep) {
  return Object.fromEntries(Object.entries(object).filter(([name, value]) => keep(name, value)));
}

// ---- choices drawn from content; seed and epoch are BigInt or safe integers

/** Indices into rowDigests in the order an epoch visits them. */
export function epochOrder(seed, epoch, rowDigests) {
  const prefix = Buffer.concat([unsigned(seed, 8, "seed"), unsigned(epoch, 8, "epoch")]);
  const keys = rowDigests.map((row) => sha256(prefix, digestBytes(row, "row digest")));
  return [...keys.keys()].sort((a, b) => Buffer.compare(keys[a], keys[b]) || a - b);
}

/** The split of every row with this group key; shares are [split, weight], weights non-negative safe integers. */
export function splitOf(groupKey, shares, seed = 0) {
  if (new Set(shares.map(([split]) => split)).size !== shares.length) refuse("shares name a split twice");
  for (const [, weight] of shares) if (!Number.isSafeInteger(weight) || weight < 0) refuse("a weight is an integer from 0");
  const total = shares.reduce((sum, [, weight]) => sum + BigInt(weight), 0n);
  if (total === 0n || total > BigInt(Number.MAX_SAFE_INTEGER)) refuse("weights must add up to 1 to 2^53-1");
  const hash = sha256(domain("split"), unsigned(seed, 8, "seed"), sized(utf8(groupKey, "group key")));
  const position = hash.readBigUInt64BE(0) * total;
  let bound = 0n;
  for (const [split, weight] of shares) {
    bound += BigInt(weight);
    if (position < bound << 64n) return split;
  }
}

// ---- the cases of protos/digest_vectors.json

const decoded = (tensors) => tensors.map((tensor) => ({ ...tensor, bytes: Buffer.from(tensor.base64, "base64") }));

const EVALUATORS = {
  __proto__: null,
  canonical_json: (input) => canonicalJson(input),
  blob: ({ base64 }) => blobDigest(Buffer.from(base64, "base64")),
  row: (input) => rowDigest(input),
  dataset_version: ({ rows }) => {
    const version = new DatasetVersion();
    for (const [split, row] of rows) version.add(split, row);
    return version.digest();
  },
  contract: (input) => contractDigest(input),
  adapter: ({ tensors, config, contract }) => adapterDigest(decoded(tensors), config, contract),
  model: ({ tensors, config }) => modelDigest(decoded(tensors), config),
  epoch_order: ({ seed, epoch, rows }) => epochOrder(BigInt(seed), BigInt(epoch), rows),
  split: ({ group_key, shares, seed }) => splitOf(group_key, shares, BigInt(seed)),
};

/** {output} or {refused: why} of one case. */
export function evaluate({ kind, input }) {
  try {
    return { output: EVALUATORS[kind](input) };
  } catch (error) {
    if (error instanceof DigestError) return { refused: error.message };
    throw error;
  }
}

if (process.argv[1] === import.meta.filename) {
  const answer = (line) => process.stdout.write(`${JSON.stringify(evaluate(JSON.parse(line)))}\n`);
  let rest = "";
  // Split at "\n" alone: node:readline would split at U+2028 too, which a JSON string may hold.
  for await (const chunk of process.stdin.setEncoding("utf8")) {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop();
    lines.forEach(answer);
  }
  if (rest) answer(rest);
}
