// Talks to the server that this page came from. The token is kept here, in memory, and nowhere else.

let token = "";

export function setToken(secret) {
  token = secret.trim();
}

export function hasToken() {
  return token !== "";
}

// What the server said was wrong, in its words.
export class Problem extends Error {
  constructor(document) {
    super(sentence(document.detail || document.title || "the server did not say what is wrong"));
    this.kind = document.kind ?? "";
    this.status = document.status;
    this.requestId = document.request_id || "";
    this.retryAfter = document.retryAfter || "";
  }
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

// Yields [name, data] for each event of an explanation; `signal` ends it, at the server too.
export async function* explain(image, request, signal) {
  const body = new FormData();
  body.append("image", image);
  body.append("request", JSON.stringify(request));
  const response = await checked(await fetch("v1/explain:stream", { method: "POST", body, signal, headers: headers() }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const [name, data] = text.slice(0, end).split("\n", 2).map((line) => line.slice(line.indexOf(": ") + 2));
      text = text.slice(end + 2);
      if (name === "problem") throw new Problem(JSON.parse(data));
      yield [name, JSON.parse(data)];
      if (name === "reply") return;
    }
  }
  throw new Problem({ detail: "the answer broke off", kind: "Unavailable" });
}

function headers() {
  return token ? { authorization: `Bearer ${token}` } : {};
}

async function checked(response) {
  if (response.ok) return response;
  const document = await response.json().catch(() => ({ title: response.statusText, status: response.status }));
  throw new Problem({ ...document, retryAfter: response.headers.get("retry-after") });
}

function sentence(text) {
  const begun = text.replace(/^./, (letter) => letter.toUpperCase());
  return /[.?!]$/.test(begun) ? begun : `${begun}.`;
}
