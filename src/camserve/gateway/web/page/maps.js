// The maps side by side: each with what it cost, its curves, its values under the cursor, and its files.

import { curves, drawFrame, drawMap, largestBox, npy, seenPart, values } from "./draw.js";

export class Maps {
  #root;
  #cards = [];
  #seen = null;
  #view = null;
  // Where the cursor is, in shares of what the network sees: the same place on every map.
  #cursor = null;

  constructor(root) {
    this.#root = root;
  }

  // Has the maps that are shown look like those of an earlier question, until others come.
  age() {
    this.#root.classList.add("old");
    this.#root.setAttribute("aria-busy", "true");
  }

  clear() {
    this.#cards = [];
    this.#root.replaceChildren();
    this.#root.classList.remove("old");
  }

  // Shows maps as far as they are known; `news` has what came, `seconds` how long it took.
  show(news, { model, bitmap, look, seconds, stem }) {
    if (!news.maps.length) return;
    if (this.#root.classList.contains("old")) this.clear();
    if (JSON.stringify(news.input) !== JSON.stringify(this.#view) || !this.#seen) {
      this.#view = news.input;
      this.#seen = seenPart(bitmap, news.input);
    }
    news.maps.forEach((map, number) => {
      if (!this.#cards[number]) this.#cards[number] = this.#card(number, stem);
      this.#fill(this.#cards[number], map, model, seconds);
    });
    this.draw(look);
  }

  draw(look) {
    for (const card of this.#cards) {
      drawMap(card.canvas, this.#seen, card, look);
      const asked = askedBox(card.map);
      if (asked) drawFrame(card.canvas, this.#shares(asked), [7, 5]);
      const box = look.boxes ? largestBox(card.numbers, card.shape, look.threshold) : null;
      const [height, width] = card.shape;
      if (box) drawFrame(card.canvas, [box[0] / width, box[1] / height, box[2] / width, box[3] / height]);
      card.box.textContent = box ? `Box ${this.#sent(box, card.shape).map(Math.round).join(", ")}` : "";
      card.box.hidden = !box;
    }
    this.#curves();
    this.#read();
  }

  get signed() {
    return this.#cards.some((card) => card.map.signed);
  }

  // The seen part as the photo has changed: what comes next is drawn anew.
  forget() {
    this.#seen = null;
    this.clear();
  }

  // Says that nothing more comes; what is shown may still be of an earlier question.
  settle() {
    this.#root.removeAttribute("aria-busy");
  }

  #fill(card, map, model, seconds) {
    Object.assign(card, { map, numbers: values(map), shape: map.shape });
    const [name] = Object.keys(map.method);
    const method = model.methods.find((each) => each.name.replaceAll("_", "") === name.toLowerCase());
    // A label that cannot be read back is told by its index.
    const label = ["", String(map.target.index)].includes(map.targetText) ? map.target.label : map.targetText;
    card.title.textContent = `${method?.title ?? name}: ${rounded(label)}`;
    if (map.complete) card.seconds ??= seconds;
    const asked = method ? (method.queries ? `at most ${method.queries} masked queries` : "no masked query") : "";
    const done = map.complete ? `complete after ${card.seconds.toFixed(1)} s` : `${Math.floor(100 * map.fraction)} % of the queries`;
    card.cost.textContent = [asked, done, `score ${score(map.score)}`].filter(Boolean).join(" · ");
    card.note.textContent = [map.degenerate ? "No evidence: the map is empty." : "", map.choice].filter(Boolean).join(" ");
    card.note.hidden = !card.note.textContent;
    card.canvas.setAttribute("aria-label", `Map, ${card.title.textContent}. Arrow keys read its values.`);
  }

  #curves() {
    const measured = this.#cards.filter((card) => card.map.faithfulness);
    const scores = measured.flatMap(({ map }) => [...map.faithfulness.insertion, ...map.faithfulness.deletion]);
    const range = [Math.min(0, ...scores), Math.max(1e-9, ...scores)];
    const best = Math.max(...measured.map(({ map }) => map.faithfulness.overall));
    for (const card of measured) {
      const told = card.map.faithfulness;
      const leads = measured.length > 1 && told.overall === best;
      card.root.classList.toggle("leads", leads);
      card.curves.hidden = false;
      card.curves.innerHTML =
        `<div class="plot"><span class="high">${score(range[1])}</span><span class="zero">${score(range[0])}</span>${curves(told, range)}</div>` +
        '<div class="axis"><span>0 %</span><span>of the pixels in, or out</span><span>100 %</span></div>' +
        `<div class="areas"><span class="key insertion">insertion ${told.insertionAuc.toFixed(3)}</span> ` +
        `<span class="key deletion">deletion ${told.deletionAuc.toFixed(3)}</span> ` +
        `<span>overall <strong>${told.overall.toFixed(3).replace("-", "\u2212")}</strong>${leads ? ' <span class="best">best</span>' : ""}</span></div>`;
    }
  }

  #card(number, stem) {
    const root = document.createElement("figure");
    const place = part(root, "div", "place");
    const canvas = part(place, "canvas", "");
    canvas.setAttribute("role", "img");
    canvas.tabIndex = 0;
    const cross = part(place, "span", "cross");
    cross.hidden = true;
    const caption = part(root, "figcaption", "");
    const title = part(caption, "div", "title");
    const [cost, under, box, note, plot, buttons] = ["cost", "under", "box-told", "note", "curves", "buttons"].map((name) => part(caption, "div", name));
    for (const each of [box, note, plot]) each.hidden = true;
    const card = { root, canvas, cross, title, cost, under, box, note, curves: plot, map: null };
    const name = (ending) => `${stem}-${title.textContent.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.${ending}`;
    buttons.append(
      button("PNG", () => canvas.toBlob((blob) => save(blob, name("png")))),
      button("NPY", () => save(npy(card.numbers, card.shape), name("npy"))),
      button("JSON", () => save(json(card.map), name("json"))),
    );
    for (const each of buttons.children) each.title = `Save this map as ${each.textContent}`;
    canvas.addEventListener("pointermove", (event) => this.#point(event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight));
    canvas.addEventListener("pointerleave", () => this.#point(null));
    canvas.addEventListener("blur", () => this.#point(null));
    canvas.addEventListener("keydown", (event) => this.#key(event, card));
    this.#root.insertBefore(root, this.#root.children[number] ?? null);
    return card;
  }

  #key(event, card) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [height, width] = card.shape;
    const far = event.shiftKey ? 1 : 10;
    const [x, y] = this.#cursor ?? [0.5, 0.5];
    this.#point(x + (far * step[0]) / width, y + (far * step[1]) / height);
  }

  #point(x, y) {
    const within = (share) => Math.min(1 - 1e-9, Math.max(0, share));
    this.#cursor = x === null ? null : [within(x), within(y)];
    this.#read();
  }

  // Tells the value of every map at the cursor, so that methods can be compared place by place.
  #read() {
    for (const card of this.#cards) {
      card.cross.hidden = !this.#cursor;
      card.under.textContent = "";
      if (!this.#cursor) continue;
      const [x, y] = this.#cursor;
      const [height, width] = card.shape;
      const number = card.numbers[Math.floor(y * height) * width + Math.floor(x * width)];
      const { left, top, right, bottom } = this.#view;
      const [column, row] = [left + x * (right - left), top + y * (bottom - top)].map(Math.floor);
      card.under.textContent = `${number.toFixed(3)} at ${column}, ${row}`;
      card.cross.style.left = `${100 * x}%`;
      card.cross.style.top = `${100 * y}%`;
    }
  }

  // A box of the photo in shares of what the network sees.
  #shares([x0, y0, x1, y1]) {
    const { left, top, right, bottom } = this.#view;
    const [width, height] = [right - left, bottom - top];
    return [(x0 - left) / width, (y0 - top) / height, (x1 - left) / width, (y1 - top) / height];
  }

  // A box of a map in pixels of the photo.
  #sent([x0, y0, x1, y1], [height, width]) {
    const { left, top, right, bottom } = this.#view;
    const [across, down] = [(right - left) / width, (bottom - top) / height];
    return [left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down];
  }
}

export function button(text, does) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.addEventListener("click", does);
  return made;
}

export function json(content) {
  return new Blob([JSON.stringify(content, null, 1)], { type: "application/json" });
}

export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function part(parent, name, kind) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}

// The box that a map is about, in pixels of the photo; null for none.
function askedBox({ targetText }) {
  const found = /^(?:box|region):([\d.]+),([\d.]+),([\d.]+),([\d.]+)/.exec(targetText);
  return found ? found.slice(1).map(Number) : null;
}

function rounded(text) {
  return text.replace(/\d+\.\d{2,}/g, (number) => Number(number).toFixed(1));
}

function score(number) {
  return Math.abs(number) >= 100 ? number.toFixed(0) : number.toFixed(Math.abs(number) >= 10 ? 1 : 2);
}
