// Draws maps over the photo in the browser, so that colours, opacity, threshold and boxes cost no query.

export const COLORMAPS = ["viridis", "inferno", "magma", "turbo", "jet"];
// The rows of colormaps.png; the last is for signed maps.
const ROWS = { jet: 0, turbo: 1, viridis: 2, inferno: 3, magma: 4, coolwarm: 5 };
const SEEN_PX = 448;
// Largest difference between equal values, relative to the map's maximum: that of the server's own boxes.
const ROUNDING = 1e-6;

let palettes = null;

export async function loadColormaps() {
  const bitmap = await createImageBitmap(await (await fetch("colormaps.png")).blob());
  const context = context2d(new OffscreenCanvas(bitmap.width, bitmap.height));
  context.drawImage(bitmap, 0, 0);
  palettes = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

// The values of a map that came as base64 of little-endian float32.
export function values(map) {
  const bytes = Uint8Array.from(atob(map.data), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, index) => view.getFloat32(4 * index, true));
}

// The part of the photo that the network saw, at a resolution for people.
export function seenPart(bitmap, view) {
  const scale = Math.max(1, Math.round(SEEN_PX / view.width));
  const canvas = new OffscreenCanvas(view.width * scale, view.height * scale);
  const context = context2d(canvas);
  context.imageSmoothingQuality = "high";
  const { left, top, right, bottom } = view;
  context.drawImage(bitmap, left, top, right - left, bottom - top, 0, 0, canvas.width, canvas.height);
  return canvas;
}

export function drawMap(canvas, seen, { numbers, shape: [height, width], map }, look) {
  const row = ROWS[map.signed ? "coolwarm" : look.colormap] * 256 * 4;
  const below = look.hide ? look.threshold - ROUNDING : -1;
  const heat = new ImageData(width, height);
  for (let index = 0; index < numbers.length; index += 1) {
    const number = numbers[index];
    const at = row + 4 * Math.round(255 * (map.signed ? (number + 1) / 2 : number));
    heat.data.set(palettes.subarray(at, at + 3), 4 * index);
    heat.data[4 * index + 3] = Math.abs(number) < below ? 0 : Math.round(255 * look.opacity);
  }
  const small = new OffscreenCanvas(width, height);
  context2d(small).putImageData(heat, 0, 0);
  canvas.width = seen.width;
  canvas.height = seen.height;
  const context = context2d(canvas);
  context.drawImage(seen, 0, 0);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

// Draws a frame that is seen on every colour; edges are shares of the canvas.
export function drawFrame(canvas, [left, top, right, bottom], dash = []) {
  const context = context2d(canvas);
  const { width, height } = canvas;
  context.setLineDash(dash);
  for (const [line, colour] of [[6, "#000000"], [2.5, "#ffffff"]]) {
    context.lineWidth = line;
    context.strokeStyle = colour;
    context.strokeRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  }
  context.setLineDash([]);
}

// The colours from low to high.
export function drawLegend(canvas, signed, colormap) {
  if (!palettes) return;
  const row = ROWS[signed ? "coolwarm" : colormap] * 256 * 4;
  context2d(canvas).putImageData(new ImageData(palettes.slice(row, row + 1024), 256, 1), 0, 0);
}

// Tight box around the largest part, connected by edges, of what reaches a share of the map's maximum and is above 0, as
// the server finds it (Grad-CAM, sec. 4.1): [left, top, right, bottom] in pixels of the map, half-open; null for none.
export function largestBox(numbers, [height, width], threshold) {
  const least = (threshold - ROUNDING) * numbers.reduce((most, number) => Math.max(most, number), 0);
  const marked = Uint8Array.from(numbers, (number) => Number(number > 0 && number >= least));
  let best = null;
  const stack = [];
  for (let start = 0; start < marked.length; start += 1) {
    if (!marked[start]) continue;
    const part = { area: 0, sum: 0, box: [width, height, 0, 0] };
    marked[start] = 0;
    stack.push(start);
    while (stack.length) {
      const at = stack.pop();
      const [row, column] = [Math.floor(at / width), at % width];
      const [left, top, right, bottom] = part.box;
      part.area += 1;
      part.sum += numbers[at];
      part.box = [Math.min(left, column), Math.min(top, row), Math.max(right, column + 1), Math.max(bottom, row + 1)];
      for (const [next, there] of [
        [at - width, row > 0],
        [at + width, row < height - 1],
        [at - 1, column > 0],
        [at + 1, column < width - 1],
      ]) {
        if (there && marked[next]) {
          marked[next] = 0;
          stack.push(next);
        }
      }
    }
    const better = best && part.area === best.area && part.sum > best.sum * (1 + ROUNDING);
    if (!best || part.area > best.area || better) best = part;
  }
  return best?.box ?? null;
}

// Insertion (solid) and deletion (dashed) of a map, between the lowest and highest score of all maps that are shown.
export function curves({ insertion, deletion }, [low, high]) {
  const at = (share, score) => `${(100 * share).toFixed(2)},${(50 - (50 * (score - low)) / (high - low)).toFixed(2)}`;
  const line = (points, kind) =>
    `<polyline class="${kind}" points="${points.map((point, index) => at(index / (points.length - 1), point)).join(" ")}"/>`;
  const levels = [0, 25, 50].map((y) => `<line class="level" x1="0" x2="100" y1="${y}" y2="${y}"/>`).join("");
  return `<svg viewBox="0 -1 100 52" preserveAspectRatio="none" aria-hidden="true">${levels}${line(deletion, "deletion")}${line(insertion, "insertion")}</svg>`;
}

// A NumPy file, version 1.0, of a float32 array.
export function npy(numbers, shape) {
  const described = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  const header = described.padEnd(64 * Math.ceil((described.length + 11) / 64) - 11) + "\n";
  const head = Uint8Array.from([0x93, ...[..."NUMPY"].map((letter) => letter.charCodeAt(0)), 1, 0, header.length & 255, header.length >> 8]);
  const data = new DataView(new ArrayBuffer(4 * numbers.length));
  numbers.forEach((number, index) => data.setFloat32(4 * index, number, true));
  return new Blob([head, header, data], { type: "application/octet-stream" });
}

// The numbers of a NumPy file of one float array, as bytes of little-endian float32; null where it is none.
export function vectorOf(buffer) {
  const bytes = new Uint8Array(buffer);
  if (bytes.length < 12 || String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY") return null;
  const view = new DataView(buffer);
  const [start, length] = bytes[6] === 1 ? [10, view.getUint16(8, true)] : [12, view.getUint32(8, true)];
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, start + length));
  const kind = /'descr': '<f([48])'/.exec(header)?.[1];
  if (!kind || (bytes.length - start - length) % Number(kind)) return null;
  const count = (bytes.length - start - length) / Number(kind);
  const data = new DataView(new ArrayBuffer(4 * count));
  for (let index = 0; index < count; index += 1) {
    const at = start + length + Number(kind) * index;
    data.setFloat32(4 * index, kind === "4" ? view.getFloat32(at, true) : view.getFloat64(at, true), true);
  }
  return new Uint8Array(data.buffer);
}

function context2d(canvas) {
  return canvas.getContext("2d");
}
