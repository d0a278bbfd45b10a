// The page: a photo, a question, and maps that sharpen while they are computed. What is asked stands in the address.

import { Problem, explain, get, setToken } from "./api.js";
import { COLORMAPS, curves, drawBoxes, drawMap, drawPhoto, loadColormaps, npy, values } from "./draw.js";

const at = (id) => document.getElementById(id);
const FIRST_METHODS = ["grad_cam", "group_cam"];
const MAPS_OF_A_STREAM = 40;
const INTERVAL_S = 0.25;

const state = {
  model: "",
  methods: [...FIRST_METHODS],
  // Index of the class that is explained, and of the one that it is held against; null: the most probable one, none.
  target: null,
  than: null,
  words: "",
  text: "",
  evaluate: false,
  colormap: COLORMAPS[0],
  opacity: 0.55,
  threshold: 0,
  boxes: false,
};

let model = null;
let file = null;
let bitmap = null;
let running = null;
// What is shown: the input's view, and for each map its message, numbers and canvas.
let view = null;
const cards = new Map();

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of given) {
    if (!(name in state)) continue;
    if (name === "methods") state.methods = value.split(",").filter(Boolean);
    else if (["evaluate", "boxes"].includes(name)) state[name] = value === "1";
    else if (["target", "than"].includes(name)) state[name] = value === "" ? null : Number(value);
    else if (["opacity", "threshold"].includes(name)) state[name] = Math.min(1, Math.max(0, Number(value) || 0));
    else state[name] = value;
  }
  if (!COLORMAPS.includes(state.colormap)) state.colormap = COLORMAPS[0];
}

function writeAddress() {
  const told = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value === null || value === "" || value === false) continue;
    told.set(name, Array.isArray(value) ? value.join(",") : value === true ? "1" : String(value));
  }
  history.replaceState(null, "", `#${told}`);
}

function say(text) {
  at("status").textContent = text;
}

function complain(error) {
  const box = at("problem");
  box.hidden = false;
  let text = error instanceof Problem ? error.message : "The server cannot be reached. Does it still run?";
  if (error.status === 401) {
    text = "This server wants a token: enter it above.";
    at("token-row").hidden = false;
    at("token").focus();
  }
  if (error.retryAfter) text += `\nTry again in ${error.retryAfter} s.`;
  if (error.requestId) text += `\nRequest ${error.requestId}`;
  box.textContent = text;
}

async function loadModels() {
  at("problem").hidden = true;
  const { models } = await get("v1/models");
  at("model").replaceChildren(...models.map((each) => new Option(each.name + (each.ready ? "" : " (not ready)"), each.name)));
  if (!models.length) throw new Problem({ detail: "No model is served." });
  const known = models.some((each) => each.name === state.model);
  await chooseModel(known ? state.model : models[0].name, known);
}

async function chooseModel(name, same = false) {
  model = await get(`v1/models/${encodeURIComponent(name)}`);
  at("model").value = state.model = name;
  if (!same) state.target = state.than = null;
  const works = model.methods.filter((method) => !method.refused);
  state.methods = state.methods.filter((each) => works.some((method) => method.name === each));
  if (!state.methods.length) state.methods = works.slice(0, 1).map((method) => method.name);
  at("methods").replaceChildren(
    ...model.methods.map((method) => {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", value: method.name });
      box.checked = state.methods.includes(method.name);
      box.disabled = Boolean(method.refused);
      label.title = method.refused || `${method.queries} masked queries`;
      label.append(box, ` ${method.title}`);
      return label;
    }),
  );
  at("text-row").hidden = !model.text;
  if (model.text) {
    at("text-what").textContent = model.text.what;
    at("text").placeholder = model.text.example;
  }
  const words = model.targets.find((form) => form.name === "text");
  at("words-row").hidden = !words;
  if (words) at("words").placeholder = words.example.replace(/^text:/, "");
}

function target() {
  if (state.words && !at("words-row").hidden) return [{ text: state.words }];
  if (state.target === null) return [];
  const of = { index: state.target };
  if (state.than !== null) return [{ contrast: { of, than: [{ index: state.than }] } }];
  return model.outputs === "value" ? [{ value: { of } }] : [of];
}

function request() {
  const signed = state.than !== null;
  return {
    model: state.model,
    methods: state.methods.map((name) => ({ [name]: {} })),
    targets: target(),
    text: at("text-row").hidden ? "" : state.text,
    evaluate: state.evaluate,
    priority: "INTERACTIVE",
    output: { boxes: {}, signed: signed && state.methods.every((name) => SIGNED.has(name)) },
    stream: { maxMaps: MAPS_OF_A_STREAM, minIntervalS: INTERVAL_S },
  };
}

// The methods that have negative evidence to show.
const SIGNED = new Set([
  ...["cam", "grad_cam", "hires_cam", "xgrad_cam", "integrated_grad_cam", "integrated_gradients"],
  ...["group_cam", "rise", "d_rise", "ablation_cam", "occlusion"],
]);

async function run() {
  writeAddress();
  if (!file || !model) return;
  running?.abort();
  const abort = (running = new AbortController());
  const began = performance.now();
  at("problem").hidden = true;
  at("progress").hidden = false;
  at("progress").removeAttribute("value");
  at("cost").textContent = "";
  say("Sent.");
  cards.clear();
  at("maps").replaceChildren();
  try {
    for await (const [name, news] of explain(file, request(), abort.signal)) {
      show(news, name === "reply");
      const seconds = ((performance.now() - began) / 1000).toFixed(1);
      if (name === "progress") {
        at("progress").max = Math.max(1, news.total);
        at("progress").value = news.done;
        say(`${news.done} of ${news.total} masked queries, ${seconds} s`);
      } else {
        say(`Done in ${seconds} s.`);
        at("cost").textContent = `${news.cost.queries} masked queries, ${news.cost.precision.toLowerCase()}, ${news.cost.runtime || "PyTorch"}, request ${news.requestId}`;
      }
    }
  } catch (error) {
    if (abort.signal.aborted) return;
    say("");
    complain(error);
  }
  if (running === abort) at("progress").hidden = true;
}

function show(news, final) {
  if (news.input) {
    view = news.input;
    drawPhoto(at("photo"), bitmap, view);
  }
  if (news.predictions) showPredictions(news.predictions);
  news.maps.forEach((map, number) => showMap(map, number, final));
}

function showPredictions(predictions) {
  at("predictions-row").hidden = !predictions.length;
  const chosen = state.target ?? predictions[0]?.index;
  at("predictions").replaceChildren(
    ...predictions.map((each) => {
      const item = document.createElement("li");
      const name = button(each.label, () => choose(each.index, null));
      name.className = "name";
      name.setAttribute("aria-pressed", String(each.index === chosen));
      const not = button("not", () => choose(chosen, state.than === each.index ? null : each.index));
      not.setAttribute("aria-pressed", String(each.index === state.than));
      not.setAttribute("aria-label", `rather than ${each.label}`);
      not.disabled = each.index === chosen || !model.targets.some((form) => form.name === "contrast");
      item.append(name, figure(each), not);
      return item;
    }),
  );
}

function choose(index, than) {
  [state.target, state.than, state.words] = [index, than, ""];
  at("words").value = "";
  run();
}

function figure(prediction) {
  if (prediction.value !== undefined) return `${prediction.value.toPrecision(4)} ${prediction.unit}`.trim();
  if (prediction.share !== undefined) return `${(100 * prediction.share).toFixed(1)} %`;
  if (!prediction.probability && prediction.similarity !== undefined) return prediction.similarity.toFixed(2);
  return `${(100 * prediction.probability).toFixed(1)} %`;
}

function button(text, does) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.addEventListener("click", does);
  return made;
}

function showMap(map, number, final) {
  if (!cards.has(number)) cards.set(number, card(number));
  const shown = cards.get(number);
  Object.assign(shown, { map, numbers: values(map), shape: map.shape, final });
  const [name] = Object.keys(map.method);
  const method = model.methods.find((each) => each.name.replaceAll("_", "") === name.toLowerCase());
  // A label that cannot be read back is told by its index.
  const label = ["", String(map.target.index)].includes(map.targetText) ? map.target.label : map.targetText;
  shown.title.textContent = `${method?.title ?? name}: ${label}`;
  const notes = [map.degenerate ? "no evidence: the map is empty" : "", map.complete ? "" : `${Math.round(100 * map.fraction)} % of the queries`];
  shown.under.textContent = notes.filter(Boolean).join(", ");
  if (map.faithfulness) shown.curves.innerHTML = curves(map.faithfulness);
  draw(shown);
}

function draw(shown) {
  drawMap(shown.canvas, at("photo"), shown.numbers, shown.shape, shown.map.signed, state);
  if (shown.final && state.boxes) drawBoxes(shown.canvas, shown.map.boxes, view);
  shown.canvas.setAttribute("aria-label", `Map of ${shown.title.textContent}`);
}

function card(number) {
  const made = document.createElement("figure");
  const canvas = Object.assign(document.createElement("canvas"), { role: "img" });
  const caption = document.createElement("figcaption");
  const [title, under, drawn, buttons] = ["title", "under", "curves", "buttons"].map((name) => {
    const part = Object.assign(document.createElement("div"), { className: name });
    caption.append(part);
    return part;
  });
  const shown = { canvas, title, under, curves: drawn };
  const name = () => `${title.textContent.toLowerCase().replace(/[^a-z0-9]+/g, "-")}`;
  buttons.append(
    button("PNG", () => canvas.toBlob((blob) => save(blob, `${name()}.png`))),
    button("NPY", () => save(npy(shown.numbers, shown.shape), `${name()}.npy`)),
    button("JSON", () => save(new Blob([JSON.stringify(shown.map, null, 1)], { type: "application/json" }), `${name()}.json`)),
  );
  canvas.addEventListener("pointermove", (event) => {
    const [height, width] = shown.shape;
    const column = Math.min(width - 1, Math.max(0, Math.floor((event.offsetX / canvas.clientWidth) * width)));
    const row = Math.min(height - 1, Math.max(0, Math.floor((event.offsetY / canvas.clientHeight) * height)));
    under.textContent = `${shown.numbers[row * width + column].toFixed(3)} at ${column}, ${row}`;
  });
  made.append(canvas, caption);
  at("maps").append(made);
  return shown;
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function takeImage(blob) {
  if (!blob) return;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    complain(new Problem({ detail: "This browser cannot read that file as an image." }));
    return;
  }
  [file, view] = [blob, null];
  at("hint").hidden = true;
  at("photo").hidden = false;
  drawPhoto(at("photo"), bitmap, null);
  await run();
}

function wire() {
  at("colormap").replaceChildren(...COLORMAPS.map((name) => new Option(name, name)));
  for (const id of ["colormap", "opacity", "threshold", "words", "text"]) at(id).value = state[id];
  for (const id of ["evaluate", "boxes"]) at(id).checked = state[id];
  for (const id of ["colormap", "opacity", "threshold"]) {
    at(id).addEventListener("input", () => {
      state[id] = id === "colormap" ? at(id).value : Number(at(id).value);
      writeAddress();
      cards.forEach(draw);
    });
  }
  for (const id of ["words", "text"]) {
    at(id).addEventListener("change", () => {
      state[id] = at(id).value.trim();
      run();
    });
  }
  at("boxes").addEventListener("change", () => {
    state.boxes = at("boxes").checked;
    writeAddress();
    cards.forEach(draw);
  });
  at("evaluate").addEventListener("change", () => {
    state.evaluate = at("evaluate").checked;
    run();
  });
  at("methods").addEventListener("change", () => {
    state.methods = [...at("methods").querySelectorAll("input:checked")].map((box) => box.value);
    if (state.methods.length) run();
  });
  at("model").addEventListener("change", () => chooseModel(at("model").value).then(run, complain));
  at("token").addEventListener("change", () => {
    setToken(at("token").value);
    loadModels().then(run, complain);
  });
  at("file").addEventListener("change", () => takeImage(at("file").files[0]));
  at("drop").addEventListener("keydown", (event) => {
    if (["Enter", " "].includes(event.key)) at("file").click();
  });
  for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", over);
      if (name === "drop") takeImage(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => takeImage(event.clipboardData.files[0]));
}

readAddress();
wire();
try {
  await Promise.all([loadColormaps(), loadModels()]);
} catch (error) {
  complain(error);
}
