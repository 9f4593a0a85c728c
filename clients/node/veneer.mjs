// A small complete client of Veneer: grpc-js, and the contract read from protos/ as it is.
//
//   node veneer.mjs push DIR NAME               uploads DIR's *.jsonl and pictures, prints the version's digest
//   node veneer.mjs train NAME ADAPTER [EPOCHS] queues a job and follows it, prints the adapter version
//   node veneer.mjs ask MODEL IMAGE QUESTION    streams the answer; MODEL as in adapters/digits or models/NAME
//
// The cluster is named by VENEER_DATASET, VENEER_TRAINER, VENEER_INFERENCE (the first of a list) and VENEER_TOKEN, or
// by cluster.json in VENEER_DIR. Exits with 0, 1 (a call failed: its reason is printed) or 2 (called wrongly).

import { createHash, randomUUID } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import protobuf from "protobufjs";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));
const FILES = ["dataset/v1/dataset_service", "trainer/v1/training_service", "inference/v1/inference_service"];
const PIECE_BYTES = 1 << 20;
const CALL_TIMEOUT_S = 30;
const STREAM_TIMEOUT_S = 3600;
const DONE = ["JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_DEAD_LETTERED"];

// ---- errors: what google.rpc puts into grpc-status-details-bin, of which Veneer always sends an ErrorInfo

const field = (type, id, rule) => ({ type, id, ...(rule && { rule }) });
const rpc = protobuf.Root.fromJSON({
  nested: {
    Any: { fields: { typeUrl: field("string", 1), value: field("bytes", 2) } },
    Status: { fields: { code: field("int32", 1), message: field("string", 2), details: field("Any", 3, "repeated") } },
    ErrorInfo: {
      fields: {
        reason: field("string", 1),
        domain: field("string", 2),
        metadata: { keyType: "string", type: "string", id: 3 },
      },
    },
  },
});

/** A call that failed: gRPC's code by name, Veneer's reason to branch on, and a text for people. */
export class VeneerError extends Error {
  constructor(error) {
    super(error.details || error.message);
    this.code = grpc.status[error.code] ?? "UNKNOWN";
    const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
    const details = packed ? rpc.lookupType("Status").decode(packed).details : [];
    const info = details.find((detail) => detail.typeUrl.endsWith("/google.rpc.ErrorInfo"));
    const { reason = this.code, metadata = {} } = info ? rpc.lookupType("ErrorInfo").decode(info.value) : {};
    Object.assign(this, { reason, metadata });
  }
}

// ---- calls

/** How to reach a cluster: from the environment, else from the file that a local cluster writes. */
export function findCluster(environment = process.env) {
  const { VENEER_DATASET, VENEER_TRAINER, VENEER_INFERENCE, VENEER_TOKEN, VENEER_DIR } = environment;
  const file = VENEER_DIR ? JSON.parse(readFileSync(join(VENEER_DIR, "cluster.json"), "utf8")) : {};
  return {
    dataset: VENEER_DATASET ?? file.dataset,
    trainer: VENEER_TRAINER ?? file.trainer,
    inference: VENEER_INFERENCE?.split(",")[0].trim() ?? file.inference?.[0],
    token: VENEER_TOKEN ?? file.token,
  };
}

export class Veneer {
  #metadata = new grpc.Metadata();

  constructor({ dataset, trainer, inference, token }) {
    const options = { keepCase: true, longs: Number, enums: String, defaults: true, includeDirs: [PROTOS] };
    const names = FILES.map((file) => `veneer/${file}.proto`);
    const { veneer } = grpc.loadPackageDefinition(loadSync(names, options));
    const local = grpc.credentials.createInsecure(); // loopback alone: across a network use createSsl()
    this.datasets = new veneer.dataset.v1.DatasetService(dataset, local);
    this.jobs = new veneer.trainer.v1.TrainerService(trainer, local);
    this.inference = new veneer.inference.v1.InferenceService(inference, local);
    this.#metadata.set("authorization", `Bearer ${token}`);
  }

  close() {
    for (const client of [this.datasets, this.jobs, this.inference]) client.close();
  }

  /** Uploads what is missing of a folder and freezes it; returns the dataset version. */
  async push(folder, name) {
    const files = readdirSync(folder, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile() && !entry.name.startsWith("."))
      .map((entry) => join(entry.parentPath ?? entry.path, entry.name))
      .sort();
    const read = (path) => blob(readFileSync(path), relative(folder, path).split(sep).join("/"));
    const rows = files.filter((path) => path.endsWith(".jsonl")).map(read);
    const pictures = files.filter((path) => /\.(jpe?g|png|webp)$/i.test(path)).map(read);
    const lines = pictures.map(({ path, digest }) => `${JSON.stringify({ path, digest })}\n`);
    const manifest = blob(Buffer.from(lines.join("")), "manifest");
    await this.#upload([...rows, ...pictures, manifest]);

    const parent = `datasets/${name}`;
    try {
      await this.#call(this.datasets, "GetDataset", { name: parent });
    } catch (error) {
      if (error.code !== "NOT_FOUND") throw error;
      await this.#call(this.datasets, "CreateDataset", { dataset_id: name, request_id: randomUUID() });
    }
    const request = {
      parent,
      row_files: rows.map(({ path, digest }) => ({ path, digest })),
      picture_manifest: manifest.digest,
      request_id: randomUUID(),
    };
    for await (const message of this.#stream(this.datasets, "CreateDatasetVersion", request)) {
      if (message.dataset_version) return message.dataset_version;
    }
    throw new Error("the stream ended without a version");
  }

  /** Queues a job on a dataset's newest version, and yields its snapshots until it has ended. */
  async *train(dataset, adapter, model, epochs) {
    const { latest_version } = await this.#call(this.datasets, "GetDataset", { name: `datasets/${dataset}` });
    const spec = { model, dataset_version: latest_version, adapter: `adapters/${adapter}`, epochs };
    const order = { training_job: { spec }, request_id: randomUUID() };
    const { name } = await this.#call(this.jobs, "CreateTrainingJob", order);
    for await (const { training_job: job } of this.#stream(this.jobs, "WatchTrainingJob", { name })) {
      yield job;
      if (DONE.includes(job.state)) return;
    }
  }

  /** Yields the pieces of an answer's text as they come. */
  async *ask(model, picture, question) {
    const parts = [{ picture: { data: picture } }, { text: question }];
    const request = { model, prompt: { messages: [{ role: "ROLE_USER", parts }] } };
    for await (const piece of this.#stream(this.inference, "StreamGenerate", request)) yield piece.text;
  }

  /** The base that the replica holds, `models/{model}`. */
  async base() {
    return (await this.#call(this.inference, "GetModel", {})).model;
  }

  #call(client, method, request) {
    const options = { deadline: deadline(CALL_TIMEOUT_S) };
    return new Promise((resolve, reject) => {
      client[method](request, this.#metadata, options, (error, response) => {
        if (error) reject(new VeneerError(error));
        else resolve(response);
      });
    });
  }

  async *#stream(client, method, request) {
    const call = client[method](request, this.#metadata, { deadline: deadline(STREAM_TIMEOUT_S) });
    try {
      yield* call;
    } catch (error) {
      throw new VeneerError(error);
    } finally {
      call.cancel();
    }
  }

  async #upload(blobs) {
    const byDigest = new Map(blobs.map((each) => [each.digest, each]));
    const { missing } = await this.#call(this.datasets, "FindMissingBlobs", { digests: [...byDigest.keys()] });
    if (missing.length === 0) return;
    await new Promise((resolve, reject) => {
      const options = { deadline: deadline(STREAM_TIMEOUT_S) };
      const call = this.datasets.UploadBlobs(this.#metadata, options, (error) => {
        if (error) reject(new VeneerError(error));
        else resolve();
      });
      send(call, missing, byDigest).catch(reject);
    });
  }
}

async function send(call, missing, byDigest) {
  for (const { digest, received_bytes } of missing) {
    const { data } = byDigest.get(digest);
    await write(call, { header: { digest, size_bytes: data.length, offset_bytes: received_bytes } });
    for (let start = received_bytes; start < data.length; start += PIECE_BYTES) {
      await write(call, { data: data.subarray(start, start + PIECE_BYTES) });
    }
  }
  call.end();
}

// Waits where the service reads more slowly than we send; a call that failed meanwhile says so in its callback.
const write = (call, message) =>
  call.write(message) ? undefined : new Promise((resolve) => call.once("drain", resolve).once("close", resolve));

const deadline = (seconds) => Date.now() + 1000 * seconds;

const blob = (data, path) => ({ path, data, digest: createHash("sha256").update(data).digest("hex") });

// ---- the program

const COMMANDS = {
  __proto__: null,
  async push(veneer, folder, name) {
    const { digest, report } = await veneer.push(folder, name);
    console.log(`${digest} ${report.accepted_rows} rows accepted, ${report.refused_rows} refused`);
  },
  async train(veneer, dataset, adapter, epochs = "3") {
    let last;
    for await (const job of veneer.train(dataset, adapter, await veneer.base(), Number(epochs))) {
      last = job;
      if (job.progress) console.log(`step ${job.progress.step}/${job.progress.total_steps} loss ${job.progress.loss}`);
    }
    if (last?.state !== "JOB_STATE_SUCCEEDED") throw new Error(`${last?.name} is ${last?.state}`);
    console.log(last.adapter_version);
  },
  async ask(veneer, model, image, question) {
    for await (const text of veneer.ask(model, readFileSync(image), question)) process.stdout.write(text);
    console.log();
  },
};

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [name, ...words] = process.argv.slice(2);
  const command = COMMANDS[name];
  if (!command || words.length < 2 || (name === "ask" && words.length < 3)) {
    console.error("usage: node veneer.mjs push DIR NAME | train NAME ADAPTER [EPOCHS] | ask MODEL IMAGE QUESTION");
    process.exit(2);
  }
  const veneer = new Veneer(findCluster());
  try {
    await command(veneer, ...words);
  } catch (error) {
    console.error(error instanceof VeneerError ? `${error.code} ${error.reason}: ${error.message}` : error.message);
    process.exitCode = 1;
  } finally {
    veneer.close();
  }
}
