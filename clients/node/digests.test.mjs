// node --test clients/node: the vectors of protos/digest_vectors.json.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { DatasetVersion, DigestError, contractDigest, epochOrder, evaluate, splitOf } from "./digests.mjs";

const vectors = JSON.parse(readFileSync(new URL("../../protos/digest_vectors.json", import.meta.url), "utf8"));

test("the file has the rules this program knows", () => assert.equal(vectors.rules, 1));

for (const { kind, name, input, output, refused } of vectors.cases) {
  test(`${kind}: ${name}`, () => {
    const result = evaluate({ kind, input });
    if (refused) assert.equal(typeof result.refused, "string");
    else assert.deepEqual(result, { output });
  });
}

test("a dataset version may be read before its last row", () => {
  const row = createHash("sha256").update("row").digest("hex");
  const version = new DatasetVersion();
  const empty = version.digest();
  version.add("train", row);
  const one = version.digest();
  assert.notEqual(one, empty);
  assert.equal(version.digest(), one);
  version.add("train", row);
  assert.notEqual(version.digest(), one);
});

test("an unknown kind of case is a mistake, not a refusal", () => {
  assert.throws(() => evaluate({ kind: "toString", input: {} }), TypeError);
});

test("what is no JSON has no digest", () => {
  assert.throws(() => contractDigest({ a: undefined }), DigestError);
  assert.throws(() => contractDigest({ a: 1n }), DigestError);
  assert.throws(() => contractDigest([]), DigestError);
});

test("a number that is no safe integer is no seed and no weight", () => {
  assert.throws(() => epochOrder(2 ** 53, 0, []), DigestError);
  assert.throws(() => splitOf("key", [["a", 0.5]]), DigestError);
});
