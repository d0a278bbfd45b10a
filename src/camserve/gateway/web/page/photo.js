// The photo: what the network sees of it, what was detected, and the box that is asked about, drawn with a pointer or keys.

const MOST_PX = 720;
// Pointers go so far, in pixels of the screen, before a click is a drag; so near a corner they take hold of it.
const DRAG_PX = 4;
const CORNER_PX = 12;
// Keys cross the photo in so many steps.
const STEPS = 50;
const SVG = "http://www.w3.org/2000/svg";

export class Photo {
  #frame;
  #canvas;
  #marks;
  #size = [1, 1];
  #view = null;
  #detections = [];
  #chosen = -1;
  #lit = -1;
  #box = null;
  #takesBox = false;
  #drag = null;

  // `onBox` is called with the edges of a box, or null; `onPick` with the number of a detection.
  constructor(frame, canvas, marks, { onBox, onPick }) {
    this.#frame = frame;
    this.#canvas = canvas;
    this.#marks = marks;
    frame.addEventListener("pointerdown", (event) => this.#down(event));
    frame.addEventListener("pointermove", (event) => this.#move(event));
    frame.addEventListener("pointerup", (event) => this.#up(event, onBox, onPick));
    frame.addEventListener("pointercancel", () => this.#cancel());
    frame.addEventListener("keydown", (event) => this.#key(event, onBox));
  }

  show(bitmap) {
    this.#size = [bitmap.width, bitmap.height];
    const scale = Math.min(1, MOST_PX / Math.max(bitmap.width, bitmap.height));
    this.#canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    this.#canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = this.#canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, this.#canvas.width, this.#canvas.height);
    this.#frame.hidden = false;
    this.#frame.style.maxWidth = `calc(75vh * ${bitmap.width / bitmap.height})`;
    this.mark({ view: null, detections: [], chosen: -1, box: this.#box });
  }

  mark({ view = this.#view, detections = this.#detections, chosen = this.#chosen, box = this.#box }) {
    [this.#view, this.#detections, this.#chosen, this.#box] = [view, detections, chosen, box];
    this.#draw();
  }

  // Lights up a detection, as its line in the list is pointed at; -1: none.
  light(number) {
    this.#lit = number;
    this.#draw();
  }

  takeBoxes(does) {
    this.#takesBox = does;
    this.#frame.classList.toggle("takes-box", does);
    if (does) this.#frame.tabIndex = 0;
    else this.#frame.removeAttribute("tabindex");
    const keys = ". Arrow keys move the box, with Shift they change its size, Delete removes it.";
    this.#frame.setAttribute("aria-label", `The photo${does ? keys : ""}`);
  }

  #draw() {
    const [width, height] = this.#size;
    this.#marks.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const parts = [];
    if (this.#view) {
      const { left, top, right, bottom } = this.#view;
      const seen = `M${left} ${top}V${bottom}H${right}V${top}Z`;
      parts.push(made("path", { class: "unseen-part", d: `M0 0H${width}V${height}H0Z${seen}`, "fill-rule": "evenodd" }));
    }
    this.#detections.forEach(({ box }, number) => {
      const kind = number === this.#chosen ? "found chosen" : number === this.#lit ? "found lit" : "found";
      parts.push(rectangle([box.x0, box.y0, box.x1, box.y1], kind));
    });
    if (this.#box) {
      parts.push(rectangle(this.#box, "asked-shade"), rectangle(this.#box, "asked-box"));
      const [x0, y0, x1, y1] = this.#box;
      const [dx, dy] = this.#pixels(5);
      for (const [x, y] of [[x0, y0], [x1, y0], [x0, y1], [x1, y1]]) {
        parts.push(made("ellipse", { class: "corner", cx: x, cy: y, rx: dx, ry: dy }));
      }
    }
    this.#marks.replaceChildren(...parts);
  }

  // So many pixels of the screen in pixels of the photo, across and down.
  #pixels(px) {
    const { width, height } = this.#canvas.getBoundingClientRect();
    return [(px * this.#size[0]) / (width || 1), (px * this.#size[1]) / (height || 1)];
  }

  #point(event) {
    const { left, top, width, height } = this.#canvas.getBoundingClientRect();
    const share = (at, from, length) => Math.min(1, Math.max(0, (at - from) / length));
    return [share(event.clientX, left, width) * this.#size[0], share(event.clientY, top, height) * this.#size[1]];
  }

  #down(event) {
    if (event.button !== 0) return;
    const [x, y] = this.#point(event);
    this.#drag = { at: [event.clientX, event.clientY], from: [x, y], before: this.#box, moved: false, ...this.#hold(x, y) };
    if (this.#takesBox) this.#frame.setPointerCapture(event.pointerId);
  }

  // What a drag from a point does: it moves a corner, the box, or draws a new one.
  #hold(x, y) {
    if (!this.#box) return { fixed: [x, y] };
    const [x0, y0, x1, y1] = this.#box;
    const [near, down] = this.#pixels(CORNER_PX);
    for (const [cx, cy, ox, oy] of [[x0, y0, x1, y1], [x1, y0, x0, y1], [x0, y1, x1, y0], [x1, y1, x0, y0]]) {
      if (Math.abs(x - cx) <= near && Math.abs(y - cy) <= down) return { fixed: [ox, oy] };
    }
    return x > x0 && x < x1 && y > y0 && y < y1 ? { moves: this.#box } : { fixed: [x, y] };
  }

  #move(event) {
    const drag = this.#drag;
    if (!drag || !this.#takesBox) return;
    drag.moved ||= Math.hypot(event.clientX - drag.at[0], event.clientY - drag.at[1]) >= DRAG_PX;
    if (!drag.moved) return;
    const [x, y] = this.#point(event);
    if (drag.moves) this.#box = this.#moved(drag.moves, x - drag.from[0], y - drag.from[1]);
    else this.#box = ordered(...drag.fixed, x, y);
    this.#draw();
  }

  #up(event, onBox, onPick) {
    const drag = this.#drag;
    this.#drag = null;
    if (!drag) return;
    if (drag.moved) {
      this.#box = whole(this.#box);
      if (this.#box) onBox(this.#box);
      else this.#box = drag.before;
      this.#draw();
      return;
    }
    const number = this.#under(...this.#point(event));
    if (number >= 0) onPick(number);
  }

  #cancel() {
    if (this.#drag) this.#box = this.#drag.before;
    this.#drag = null;
    this.#draw();
  }

  // The smallest detection at a point: the larger ones can be had beside it.
  #under(x, y) {
    const area = ({ box }) => (box.x1 - box.x0) * (box.y1 - box.y0);
    let best = -1;
    this.#detections.forEach((each, number) => {
      const { x0, y0, x1, y1 } = each.box;
      const inside = x >= x0 && x <= x1 && y >= y0 && y <= y1;
      if (inside && (best < 0 || area(each) < area(this.#detections[best]))) best = number;
    });
    return best;
  }

  #key(event, onBox) {
    if (!this.#takesBox) return;
    const [width, height] = this.#size;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      event.preventDefault();
      const [dx, dy] = [step[0] * Math.max(1, width / STEPS), step[1] * Math.max(1, height / STEPS)];
      const box = this.#box ?? [width / 4, height / 4, (3 * width) / 4, (3 * height) / 4];
      if (!this.#box) this.#box = box;
      else if (event.shiftKey) this.#box = ordered(box[0], box[1], Math.min(width, box[2] + dx), Math.min(height, box[3] + dy));
      else this.#box = this.#moved(box, dx, dy);
      this.#box = whole(this.#box) ?? box;
      onBox(this.#box);
    } else if (["Delete", "Backspace", "Escape"].includes(event.key) && this.#box) {
      event.preventDefault();
      this.#box = null;
      onBox(null);
    }
    this.#draw();
  }

  #moved([x0, y0, x1, y1], dx, dy) {
    const [width, height] = this.#size;
    const across = Math.min(width - x1, Math.max(-x0, dx));
    const down = Math.min(height - y1, Math.max(-y0, dy));
    return [x0 + across, y0 + down, x1 + across, y1 + down];
  }
}

function ordered(xa, ya, xb, yb) {
  return [Math.min(xa, xb), Math.min(ya, yb), Math.max(xa, xb), Math.max(ya, yb)];
}

// The box in whole pixels; null where nothing is left of it.
function whole(box) {
  const [x0, y0, x1, y1] = box.map(Math.round);
  return x0 < x1 && y0 < y1 ? [x0, y0, x1, y1] : null;
}

function rectangle([x0, y0, x1, y1], kind) {
  return made("rect", { class: kind, x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
}

function made(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
