// The page: a photo, a question, and maps that sharpen while they are computed. What is asked stands in the address.

import { Problem, explain, get, hasToken, setToken } from "./api.js";
import { COLORMAPS, drawLegend, loadColormaps, vectorOf } from "./draw.js";
import { Maps, button, json, save } from "./maps.js";
import { Photo } from "./photo.js";
import * as asking from "./question.js";
import { edges, fromAddress, toAddress } from "./state.js";

const at = (id) => document.getElementById(id);
const MAPS_OF_A_STREAM = 40;
const INTERVAL_S = 0.25;
const LOOK_AGAIN_MS = 2000;
// Keys move a box in many steps; this long after the last one it is asked about.
const PAUSE_MS = 400;
const MOST_HINTS = 50;
// For models that take none of the first methods.
const OTHER_METHODS = ["d_rise", "rise"];
// What the server reads; other images are sent as PNG.
const READ_BY_SERVER = ["image/jpeg", "image/png", "image/webp"];
// The methods that have negative evidence to show.
const SIGNED = new Set([
  ...["cam", "grad_cam", "hires_cam", "xgrad_cam", "integrated_grad_cam", "integrated_gradients"],
  ...["group_cam", "rise", "d_rise", "ablation_cam", "occlusion"],
]);
// What to do about an error, by its kind or its status; the server's own words come first.
const ADVICE = {
  Overloaded: "The server has too much to do just now.",
  DeadlineExceeded: "Choose fewer methods, or some with fewer masked queries.",
  Unavailable: "The model may still be starting, or its worker has been lost.",
  NotFound: "Choose another model above.",
  ContentTooLarge: "Make the photo smaller, or save it as JPEG.",
  InvalidImage: "Save the photo as JPEG or PNG, or make it smaller, and try that.",
  Internal: "This is the server's fault. Its log has the request under the number below.",
};

let state = fromAddress(location.hash);
let model = null;
let file = null;
let bitmap = null;
let stem = "photo";
// The vector, or the other image, that a question is about, in base64: it does not stand in the address.
let given = null;
let predictions = [];
let running = null;
let soon = 0;
let looking = 0;

const maps = new Maps(at("maps"));
const photo = new Photo(at("frame"), at("photo"), at("marks"), {
  onBox: (box) => {
    const kind = asking.questionOf(state, model);
    state.box = box ? box.join(",") : "";
    if (box && !asking.controls(state, model).box && asking.takes(model, "box")) state.question = "box";
    if (!box && kind === "box") state.question = "";
    fill();
    clearTimeout(soon);
    soon = setTimeout(run, PAUSE_MS);
  },
  onPick: (number) => pick(predictions[number], number),
});

function say(text) {
  at("status").textContent = text;
}

function complain(error) {
  const told = [error instanceof Problem ? error.message : "The server cannot be reached. Does it still run?"];
  if (error.status === 401) {
    told[0] = hasToken() ? "The server does not know this token. Enter another one above." : "This server wants a token: enter it above.";
    at("token-row").hidden = false;
    at("token").focus();
  } else if (ADVICE[error.kind]) {
    told.push(ADVICE[error.kind]);
  }
  if (error.retryAfter) told.push(`Try again in ${error.retryAfter} s.`);
  if (error.requestId && error.status !== 401) told.push(`Request ${error.requestId}`);
  at("problem-text").textContent = told.join("\n");
  at("again").hidden = error.status === 401;
  at("problem").hidden = false;
}

function calm() {
  at("problem").hidden = true;
}

// Shows the models, and looks again as long as none can answer.
async function loadModels() {
  clearTimeout(looking);
  calm();
  const { models } = await get("v1/models");
  at("model").replaceChildren(...models.map((each) => new Option(each.name + (each.ready ? "" : " (not ready)"), each.name)));
  const chosen = models.find((each) => each.name === state.model) ?? models.find((each) => each.ready) ?? models[0];
  if (!chosen?.ready) {
    say(chosen ? `No worker of ${chosen.name} is ready yet. ${chosen.failure || "It may be starting; this page looks again."}` : "No model is served yet; this page looks again.");
    looking = setTimeout(() => loadModels().then(run).catch(complain), LOOK_AGAIN_MS);
    if (!chosen) return;
  } else if (!file) {
    say("Choose a photo: predictions come first, maps sharpen as masked queries come in.");
  }
  try {
    await chooseModel(chosen.name, chosen.name === state.model || !state.model);
  } catch (error) {
    if (chosen.ready) throw error;
  }
}

async function chooseModel(name, same) {
  model = await get(`v1/models/${encodeURIComponent(name)}`);
  state.model = name;
  if (!same) Object.assign(state, { question: "", target: "", than: [], at: 0, words: "", text: "" });
  predictions = [];
  const works = model.methods.filter((method) => !method.refused).map((method) => method.name);
  state.methods = state.methods.filter((each) => works.includes(each));
  if (!state.methods.length) state.methods = [OTHER_METHODS.find((each) => works.includes(each)) ?? works[0]].filter(Boolean);
  listMethods();
  fill();
  showPredictions();
}

function listMethods() {
  at("methods").replaceChildren(
    ...model.methods
      .filter((method) => !method.refused)
      .map((method) => {
        const label = document.createElement("label");
        const box = Object.assign(document.createElement("input"), { type: "checkbox", value: method.name });
        const cost = Object.assign(document.createElement("span"), { className: "queries", textContent: method.queries });
        const needs = Object.assign(document.createElement("span"), { className: "needs", textContent: method.needs });
        const title = document.createElement("span");
        title.append(method.title, method.needs ? " " : "", needs);
        label.title = method.needs ? `${method.paper}; for networks with: ${method.needs}` : method.paper;
        label.append(box, title, cost);
        return label;
      }),
  );
  const refused = model.methods.filter((method) => method.refused);
  at("refused-row").hidden = !refused.length;
  at("refused-what").textContent = `${refused.length} more that this model does not take`;
  at("refused").replaceChildren(
    ...refused.flatMap((method) => [
      Object.assign(document.createElement("dt"), { textContent: method.title }),
      Object.assign(document.createElement("dd"), { textContent: method.refused }),
    ]),
  );
}

// Shows the state in all controls.
function fill() {
  history.replaceState(null, "", toAddress(state));
  for (const id of ["colormap", "opacity", "threshold", "text", "words", "direction"]) at(id).value = state[id];
  for (const id of ["evaluate", "signed", "evidence", "hide", "boxes"]) at(id).checked = state[id];
  at("threshold").disabled = !state.hide && !state.boxes;
  at("threshold-value").textContent = state.threshold.toFixed(2);
  if (!model) return;
  at("model").value = state.model;
  fillQuestion();
  fillMethods();
}

function fillQuestion() {
  const asked = asking.questions(model);
  const kind = asking.questionOf(state, model);
  at("question").replaceChildren(...asked.map((each) => new Option(each.asked, each.name)));
  at("question").value = kind;
  at("question-row").hidden = asked.length < 2;
  at("described").textContent = asked.find((each) => each.name === kind)?.description ?? "";
  const shown = asking.controls(state, model);
  for (const [name, does] of Object.entries(shown)) at(`${name}-row`).hidden = !does;
  at("target-what").textContent = kind === "value" ? "Number" : "Class";
  at("target").value = asking.labelOf(state.target, model);
  at("target").placeholder = { value: model.labels[0] ?? "", box: "any" }[kind] ?? "the most probable one";
  at("thans").replaceChildren(...state.than.map(chip));
  at("words-what").textContent = kind === "word" ? "Words of the caption" : "Text";
  at("words").placeholder = kind === "word" ? "those that the model writes" : example("text", "text:");
  at("at-what").textContent = kind === "word" ? "Word, from 1" : "Number, from 0";
  at("at").min = kind === "word" ? 1 : 0;
  at("at").value = Math.max(at("at").min, state.at);
  at("given-what").textContent = kind === "vector" ? "Vector (.npy)" : "Other image";
  at("given").accept = kind === "vector" ? ".npy" : "image/*";
  at("text-row").hidden = !model.text;
  if (model.text) {
    at("text-what").textContent = model.text.what.replace(/^./, (letter) => letter.toUpperCase());
    at("text").placeholder = model.text.example;
  }
  const box = edges(state.box);
  ["x0", "y0", "x1", "y1"].forEach((name, number) => {
    at(`box-${name}`).value = box ? box[number] : "";
  });
  at("unbox").hidden = !box;
  photo.takeBoxes(asking.takes(model, "box") || asking.takes(model, "region"));
  photo.mark({ box: shown.box ? box : null });
}

function fillMethods() {
  for (const box of at("methods").querySelectorAll("input")) box.checked = state.methods.includes(box.value);
  const titles = model.methods.filter((each) => state.methods.includes(each.name));
  at("methods-chosen").textContent = titles.map((each) => each.title).join(", ");
  const without = titles.filter((each) => !SIGNED.has(each.name)).map((each) => each.title);
  at("signed").disabled = without.length > 0;
  at("signed-note").textContent = without.length && state.signed ? `Not with ${without.join(", ")}: their maps have one sign.` : "";
}

function example(name, prefix) {
  const form = model.targets.find((each) => each.name === name);
  return form ? form.example.replace(prefix, "") : "";
}

function chip(one) {
  const item = document.createElement("li");
  const label = asking.labelOf(one, model);
  const remove = button(`${label} ×`, () => ask({ than: state.than.filter((each) => each !== one) }));
  remove.setAttribute("aria-label", `Remove ${label}`);
  item.append(remove);
  return item;
}

// Changes what is asked, and asks it.
function ask(change) {
  Object.assign(state, change);
  fill();
  showPredictions();
  run();
}

// Changes the look alone: nothing is asked.
function look(change) {
  Object.assign(state, change);
  fill();
  drawLook();
}

function drawLook() {
  maps.draw(state);
  drawLegend(at("legend"), maps.signed, state.colormap);
  at("low").textContent = maps.signed ? "−1" : "0";
}

function request(question) {
  const signed = state.signed && state.methods.every((name) => SIGNED.has(name));
  return {
    model: state.model,
    methods: state.methods.map((name) => ({ [name]: {} })),
    targets: question.target ? [question.target] : [],
    text: model.text ? state.text : "",
    evaluate: state.evaluate,
    priority: "INTERACTIVE",
    // At the deadline, maps as far as they are known are worth more than none.
    allowPartial: true,
    predictionsOnly: Boolean(question.lacks) || !state.methods.length,
    output: { signed },
    // Maps of a record can be made again bit by bit, which is so of exact ones.
    ...(state.evidence && { evidence: true, precision: "EXACT" }),
    stream: { maxMaps: MAPS_OF_A_STREAM, minIntervalS: INTERVAL_S },
  };
}

async function run() {
  clearTimeout(soon);
  const earlier = running;
  running = null;
  earlier?.abort();
  if (!file || !model) return;
  calm();
  maps.age();
  const question = asking.target(state, model, given);
  const missing = model.text?.required && !state.text ? `Enter a ${model.text.what}.` : question.lacks;
  if (missing && (missing !== question.lacks || !asking.predicts(model))) {
    rest(missing);
    return;
  }
  const abort = (running = new AbortController());
  const began = performance.now();
  const seconds = () => (performance.now() - began) / 1000;
  let first = 0;
  let far = "";
  at("progress").hidden = at("stop").hidden = false;
  at("progress").removeAttribute("value");
  at("cost").textContent = "";
  at("saves").hidden = true;
  say("Sent.");
  abort.signal.addEventListener("abort", () => {
    if (running === abort) rest(`Stopped${far && ` after ${far}`}.`);
  });
  try {
    for await (const [name, news] of explain(file, request(question), abort.signal)) {
      first ||= seconds();
      show(news, seconds());
      far = `${news.done} of ${news.total} masked queries`;
      if (name === "progress") {
        at("progress").max = Math.max(1, news.total);
        at("progress").value = news.done;
        say(`${far}, ${seconds().toFixed(1)} s`);
      } else {
        finish(news, question, seconds(), first);
      }
    }
  } catch (error) {
    if (abort.signal.aborted) return;
    rest("");
    complain(error);
  }
}

function finish(reply, question, seconds, first) {
  const { cost } = reply;
  if (!reply.maps.length) maps.clear();
  const partial = reply.maps.some((map) => !map.complete);
  const done = `${partial ? "The deadline came after" : "Done in"} ${seconds.toFixed(1)} s, predictions after ${first.toFixed(2)} s.`;
  rest(`${done} ${question.lacks ?? (state.methods.length ? "" : "Choose a method to see a map.")}`.trim());
  const curves = cost.evaluationQueries ? `, ${cost.evaluationQueries} of them for curves` : "";
  const told = [`${cost.queries} masked queries${curves}`, cost.precision.toLowerCase(), cost.runtime, cost.worker, cost.cached ? "kept from an earlier request" : ""];
  at("cost").textContent = `${told.filter(Boolean).join(" · ")} · request ${reply.requestId}`;
  at("saves").replaceChildren(button("Answer as JSON", () => save(json(reply), `${stem}.json`)));
  if (reply.evidence) at("saves").append(button("Evidence", () => save(record(reply.evidence), `${stem}-evidence.json`)));
  at("saves").hidden = false;
}

// The record as it came: its bytes are what is hashed.
function record(line) {
  return new Blob([line, "\n"], { type: "application/json" });
}

// Nothing is asked any more.
function rest(text) {
  running = null;
  at("progress").hidden = at("stop").hidden = true;
  maps.settle();
  say(text);
}

function show(news, seconds) {
  if (news.input) photo.mark({ view: news.input });
  if (news.predictions) {
    ({ predictions } = news);
    showPredictions();
  }
  maps.show(news, { model, bitmap, look: state, seconds, stem });
  if (news.maps.length) drawLook();
}

function showPredictions() {
  at("predictions-row").hidden = !model || !file || !asking.predicts(model);
  if (!model) return;
  const boxes = model.outputs === "boxes";
  const chosen = predictions.findIndex((each, number) => asking.isChosen(state, model, each, number));
  at("predictions").replaceChildren(...predictions.map((each, number) => line(each, number, number === chosen)));
  at("predictions").start = boxes ? 0 : 1;
  at("predictions-note").textContent = !predictions.length
    ? boxes && at("progress").hidden
      ? "Nothing was detected."
      : ""
    : asking.takes(model, "contrast") && model.outputs !== "tokens"
      ? "Choose one to see what speaks for it; “not” asks why the chosen one rather than that."
      : "Choose one to see what speaks for it.";
  photo.mark({ detections: boxes ? predictions.filter((each) => each.box) : [], chosen });
}

function line(prediction, number, chosen) {
  const item = document.createElement("li");
  const name = button(prediction.label || String(prediction.index), () => pick(prediction, number));
  name.className = "name";
  name.setAttribute("aria-pressed", String(chosen));
  const told = Object.assign(document.createElement("span"), { className: "figure", textContent: figure(prediction) });
  const share = prediction.share ?? prediction.probability;
  if (share) name.style.setProperty("--share", `${100 * share}%`);
  item.append(name, told);
  const held = asking.contrast(state, model, prediction, predictions[0]);
  if (asking.takes(model, "contrast") && !["boxes", "tokens"].includes(model.outputs)) {
    const not = button("not", () => ask({ ...held, signed: true }));
    not.setAttribute("aria-pressed", String(asking.isThan(state, prediction)));
    not.setAttribute("aria-label", `rather than ${prediction.label}`);
    not.disabled = !held;
    item.append(not);
  }
  if (model.outputs === "boxes") {
    for (const [kind, lit] of [["pointerenter", number], ["focusin", number], ["pointerleave", -1], ["focusout", -1]]) {
      item.addEventListener(kind, () => photo.light(lit));
    }
  }
  return item;
}

function pick(prediction, number) {
  ask(asking.choice(state, model, prediction, number));
}

function figure(prediction) {
  if (prediction.value !== undefined) return `${prediction.value.toPrecision(4)} ${prediction.unit}`.trim();
  if (prediction.share !== undefined) return `${(100 * prediction.share).toFixed(1)} %`;
  if (!prediction.probability && prediction.similarity !== undefined) return prediction.similarity.toFixed(2);
  return `${(100 * prediction.probability).toFixed(1)} %`;
}

async function takeImage(blob) {
  if (!blob) return;
  let read;
  try {
    read = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    complain(new Problem({ detail: "This browser cannot read that file as an image.", kind: "InvalidImage" }));
    at("again").hidden = true;
    return;
  }
  bitmap = read;
  file = READ_BY_SERVER.includes(blob.type) ? blob : await asPng(bitmap);
  stem = (blob.name ?? "photo").replace(/\.[^.]*$/, "") || "photo";
  predictions = [];
  maps.forget();
  document.body.classList.add("has-photo");
  at("hint").textContent = "Another photo";
  photo.show(bitmap);
  showPredictions();
  await run();
}

async function asPng(image) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

// Takes the file of a vector, or of another image.
async function takeGiven(blob) {
  given = null;
  if (blob) {
    const buffer = await blob.arrayBuffer();
    const bytes = asking.questionOf(state, model) === "vector" ? vectorOf(buffer) : new Uint8Array(buffer);
    if (!bytes) {
      complain(new Problem({ detail: "That file is no array of floats of NumPy (.npy)." }));
      at("again").hidden = true;
      return;
    }
    given = base64(bytes);
  }
  await run();
}

function base64(bytes) {
  let text = "";
  for (let start = 0; start < bytes.length; start += 0x8000) text += String.fromCharCode(...bytes.subarray(start, start + 0x8000));
  return btoa(text);
}

function hint(text) {
  const wanted = text.trim().toLowerCase();
  const found = (model?.labels ?? []).filter((label) => label.toLowerCase().includes(wanted));
  at("labels").replaceChildren(...found.slice(0, MOST_HINTS).map((label) => new Option(label)));
}

function wireQuestion() {
  at("question").addEventListener("change", () => {
    given = null;
    at("given").value = "";
    ask({ question: at("question").value });
  });
  for (const id of ["target", "than"]) {
    for (const kind of ["input", "focus"]) at(id).addEventListener(kind, () => hint(at(id).value));
  }
  at("target").addEventListener("change", () => ask({ target: asking.fromTyped(at("target").value, model) }));
  at("than").addEventListener("change", () => {
    const one = asking.fromTyped(at("than").value, model);
    at("than").value = "";
    if (one) ask({ than: [...new Set([...state.than, one])] });
  });
  at("direction").addEventListener("change", () => ask({ direction: at("direction").value }));
  for (const id of ["words", "text"]) at(id).addEventListener("change", () => ask({ [id]: at(id).value.trim() }));
  at("at").addEventListener("change", () => ask({ at: Number(at("at").value) }));
  at("given").addEventListener("change", () => takeGiven(at("given").files[0]));
  for (const name of ["x0", "y0", "x1", "y1"]) {
    at(`box-${name}`).addEventListener("change", () => {
      const box = ["x0", "y0", "x1", "y1"].map((each) => at(`box-${each}`).value).join(",");
      if (edges(box) && !box.split(",").includes("")) ask({ box });
    });
  }
  at("unbox").addEventListener("click", () => ask({ box: "" }));
}

function wireLook() {
  at("colormap").replaceChildren(...COLORMAPS.map((name) => new Option(name, name)));
  at("colormap").addEventListener("change", () => look({ colormap: at("colormap").value }));
  for (const id of ["opacity", "threshold"]) at(id).addEventListener("input", () => look({ [id]: Number(at(id).value) }));
  for (const id of ["hide", "boxes"]) at(id).addEventListener("change", () => look({ [id]: at(id).checked }));
}

function wirePhoto() {
  at("file").addEventListener("change", () => takeImage(at("file").files[0]));
  for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      document.body.classList.toggle("over", over);
      if (name === "drop") takeImage(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => takeImage(event.clipboardData.files[0]));
}

function wire() {
  wireQuestion();
  wireLook();
  wirePhoto();
  for (const id of ["evaluate", "signed", "evidence"]) at(id).addEventListener("change", () => ask({ [id]: at(id).checked }));
  at("methods").addEventListener("change", () => ask({ methods: [...at("methods").querySelectorAll("input:checked")].map((box) => box.value) }));
  at("model").addEventListener("change", () => chooseModel(at("model").value, false).then(run).catch(complain));
  at("token").addEventListener("change", () => {
    setToken(at("token").value);
    loadModels().then(run).catch(complain);
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("again").addEventListener("click", () => (model ? run() : loadModels().then(run).catch(complain)));
  window.addEventListener("hashchange", () => {
    state = fromAddress(location.hash);
    loadModels().then(run).catch(complain);
  });
  at("methods-row").open = !matchMedia("(max-width: 52rem)").matches;
}

wire();
fill();
try {
  await Promise.all([loadColormaps().then(drawLook), loadModels()]);
} catch (error) {
  complain(error);
}
