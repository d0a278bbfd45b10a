// What is asked and how it looks. All of it stands in the address, so that a colleague can be sent it; the photo does not.

export const START = Object.freeze({
  model: "",
  methods: Object.freeze(["grad_cam", "group_cam"]),
  // Kind of target, by its name in the proto; "": the one that the model is asked by itself.
  question: "",
  // A class, or number, by index or label; "": the most probable one.
  target: "",
  than: Object.freeze([]),
  direction: "up",
  words: "",
  at: 0,
  // Edges "x0,y0,x1,y1" in pixels of the photo; "": none.
  box: "",
  text: "",
  evaluate: false,
  signed: false,
  evidence: false,
  colormap: "viridis",
  opacity: 0.55,
  threshold: 0.15,
  hide: false,
  boxes: false,
});

export function fromAddress(hash) {
  const given = new URLSearchParams(hash.slice(1));
  const state = { ...START };
  for (const name of Object.keys(START)) {
    if (given.has(name)) state[name] = read(START[name], given.getAll(name));
  }
  for (const name of ["opacity", "threshold"]) state[name] = Math.min(1, Math.max(0, state[name]));
  if (!edges(state.box)) state.box = "";
  return state;
}

export function toAddress(state) {
  const told = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (String(value) === String(START[name])) continue;
    // A list that was emptied is told as well, or the first one would be back.
    const values = Array.isArray(value) ? (value.length ? value : [""]) : [typeof value === "boolean" ? Number(value) : value];
    for (const one of values) told.append(name, one);
  }
  return `#${told}`;
}

// The four numbers of a box; null where the text has none that enclose something.
export function edges(text) {
  const found = text.split(",").map(Number);
  const [x0, y0, x1, y1] = found;
  return found.length === 4 && found.every(Number.isFinite) && x0 < x1 && y0 < y1 ? found : null;
}

function read(like, texts) {
  if (Array.isArray(like)) return texts.filter(Boolean);
  if (typeof like === "boolean") return texts[0] === "1";
  if (typeof like === "number") return texts[0] !== "" && Number.isFinite(Number(texts[0])) ? Number(texts[0]) : like;
  return texts[0];
}
