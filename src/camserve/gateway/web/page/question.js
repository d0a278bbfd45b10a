// What can be asked of a model, and the target that a question becomes. What is offered is what the server says of the model.

import { edges } from "./state.js";

const ASKED = {
  class: "What speaks for it?",
  contrast: "Why this and not that?",
  finer: "What tells it from the nearest ones?",
  against: "What speaks against it?",
  value: "What makes a number go up, or down?",
  text: "What fits a text?",
  reference: "What is like another image?",
  vector: "What is like a vector?",
  detection: "What is a detection made of?",
  box: "What makes it see something in a box?",
  word: "What speaks for one word?",
};
const OF_CLASSES = ["class", "contrast", "finer", "against"];
// What a model is asked by itself, the first of these that it takes.
const FIRST = ["class", "value", "text", "reference"];
// Kinds of outputs whose predictions are not the classes that a target names.
const LISTED = { boxes: "detection", tokens: "word" };

// The kinds of questions: a region is a question about classes inside a box.
export function questions(model) {
  return model.targets
    .filter((form) => form.name !== "region")
    .map((form) => ({ name: form.name, asked: ASKED[form.name] ?? form.name, description: form.description }));
}

export function questionOf(state, model) {
  const names = questions(model).map((each) => each.name);
  if (names.includes(state.question)) return state.question;
  return FIRST.find((name) => names.includes(name)) ?? names[0];
}

// The controls that a question has.
export function controls(state, model) {
  const kind = questionOf(state, model);
  return {
    target: [...OF_CLASSES, "value", "box"].includes(kind),
    than: kind === "contrast",
    direction: kind === "value",
    words: ["text", "word"].includes(kind),
    at: ["word", "detection"].includes(kind),
    given: ["vector", "reference"].includes(kind),
    box: kind === "box" || (takes(model, "region") && OF_CLASSES.includes(kind)),
  };
}

// The message of the target, none where the model's own question is meant; and what is missing, in words.
export function target(state, model, given) {
  const kind = questionOf(state, model);
  const of = state.target ? classOf(state.target) : null;
  const some = of ?? { topK: 1 };
  const box = controls(state, model).box ? edges(state.box) : null;
  switch (kind) {
    case "contrast":
      if (!state.than.length) return { lacks: "Choose what it is held against." };
      return about(kind, { of: some, than: state.than.map(classOf) }, box);
    case "finer":
    case "against":
      return about(kind, { of: some }, box);
    case "value":
      return { target: { value: { of: of ?? { index: 0 }, direction: state.direction.toUpperCase() } } };
    case "text":
      return state.words ? { target: { text: state.words } } : { lacks: "Enter a text." };
    case "word":
      return { target: { word: { at: Math.max(1, state.at), words: state.words } } };
    case "detection":
      return { target: { detection: Math.max(0, state.at) } };
    case "box":
      return box ? { target: { box: { box: named(box), ...(of && { of }) } } } : { lacks: "Drag a box on the photo." };
    case "vector":
    case "reference":
      if (!given) return { lacks: kind === "vector" ? "Choose a file with a vector (.npy)." : "Choose an image to compare with." };
      return { target: kind === "vector" ? { vector: given } : { reference: { encoded: given } } };
    default:
      if (box) return { target: { region: { ...(of && { of }), box: named(box) } } };
      return { target: of };
  }
}

// What a click on a prediction asks: a change of the state.
export function choice(state, model, prediction, number) {
  const listed = LISTED[model.outputs];
  if (listed) return { question: listed, at: listed === "word" ? number + 1 : number, words: "" };
  const kind = questionOf(state, model);
  const than = without(state.than, prediction);
  const keeps = [...OF_CLASSES, "value"].includes(kind) && (than.length > 0 || !state.than.length);
  return { question: keeps ? state.question : "class", target: String(prediction.index), than };
}

export function isChosen(state, model, prediction, number) {
  const listed = LISTED[model.outputs];
  const kind = questionOf(state, model);
  if (listed && kind === listed) return state.at === (listed === "word" ? number + 1 : number);
  if (![...OF_CLASSES, "value"].includes(kind)) return false;
  if (!state.target) return number === 0;
  return !listed && is(state.target, prediction);
}

// What a click on "not" asks; null where the model has no such question.
export function contrast(state, model, prediction, first) {
  if (!takes(model, "contrast") || LISTED[model.outputs] || !first) return null;
  const target = state.target || String(first.index);
  if (is(target, prediction)) return null;
  const than = isThan(state, prediction) ? without(state.than, prediction) : [...state.than, String(prediction.index)];
  return { question: than.length ? "contrast" : "class", target, than };
}

export function isThan(state, prediction) {
  return state.than.some((one) => is(one, prediction));
}

export function predicts(model) {
  return takes(model, "class") || takes(model, "value");
}

export function takes(model, name) {
  return model.targets.some((form) => form.name === name);
}

// What people call a class that stands in the state by index or label.
export function labelOf(text, model) {
  return /^\d+$/.test(text) ? (model.labels[Number(text)] ?? text) : text;
}

// How a class that was typed stands in the state: by index where its label tells it from others.
export function fromTyped(text, model) {
  const wanted = text.trim();
  const found = model.labels.flatMap((label, index) => (label.toLowerCase() === wanted.toLowerCase() ? [index] : []));
  return found.length === 1 ? String(found[0]) : wanted;
}

function about(kind, content, box) {
  return { target: box ? { region: { [kind]: content, box: named(box) } } : { [kind]: content } };
}

function named([x0, y0, x1, y1]) {
  return { x0, y0, x1, y1 };
}

function classOf(text) {
  return /^\d+$/.test(text) ? { index: Number(text) } : { label: text };
}

function is(text, prediction) {
  return text === String(prediction.index) || text === prediction.label;
}

function without(than, prediction) {
  return than.filter((one) => !is(one, prediction));
}
