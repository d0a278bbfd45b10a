// What a user of gRPC-Web writes with Connect's clients: nothing of camserve but its messages' description. The argument is
// JSON: address, transport (node: HTTP/2, web: fetch, as in a browser), and calls. Prints one line of JSON for each event.
import { readFile } from "node:fs/promises";

import { createFileRegistry, fromBinary, toJson } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcWebTransport as node } from "@connectrpc/connect-node";
import { createGrpcWebTransport as web } from "@connectrpc/connect-web";

const asked = JSON.parse(process.argv[2]);
const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, await readFile("camserve.binpb")));
const options = { baseUrl: `https://${asked.address}`, useBinaryFormat: true };
const transport = asked.transport === "node" ? node({ ...options, httpVersion: "2" }) : web(options);
const client = createClient(registry.getService("camserve.v1.ExplanationService"), transport);
const image = { content: { case: "encoded", value: await readFile(asked.image) } };

function tell(event) {
  console.log(JSON.stringify(event));
}

async function answer({ method, request, timeoutMs, headers, abortAfter }) {
  const ended = new AbortController();
  const given = { timeoutMs, signal: ended.signal, headers: { ...asked.headers, ...headers } };
  given.onHeader = (found) => tell({ header: found.get("x-request-id") });
  const typed = method.toLowerCase().includes("explain") ? { image, ...request } : request;
  if (method !== "streamExplain") {
    const reply = await client[method](typed, given);
    tell({ reply: reply.maps ? reply.maps.map((map) => map.shape) : reply.name || reply.models.map((one) => one.name) });
    return;
  }
  let seen = 0;
  for await (const { update } of client.streamExplain(typed, given)) {
    tell({ [update.case]: update.case === "reply" ? update.value.maps.length : update.value.done });
    seen += 1;
    if (seen === abortAfter) ended.abort();
  }
}

for (const call of asked.calls) {
  try {
    await answer(call);
  } catch (error) {
    const found = ConnectError.from(error);
    tell({ code: Code[found.code], text: found.rawMessage, kind: found.metadata.get("camserve-error") });
  }
}
process.exit(0);
