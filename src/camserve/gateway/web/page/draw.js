// Draws maps over the photo in the browser, so that colours, opacity and threshold cost no query.

// The rows of colormaps.png; the last is for signed maps.
export const COLORMAPS = ["viridis", "inferno", "magma", "turbo", "jet"];
const ROWS = { jet: 0, turbo: 1, viridis: 2, inferno: 3, magma: 4, coolwarm: 5 };

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

// The part of the photo that the network saw, on a canvas of the network's input size or of three times that.
export function drawPhoto(canvas, bitmap, input) {
  const { left, top, right, bottom } = edges(input, bitmap);
  const scale = Math.max(1, Math.round(480 / Math.max(input ? input.width : bitmap.width, 1)));
  const [width, height] = input ? [input.width * scale, input.height * scale] : fitted(bitmap, 480);
  canvas.width = width;
  canvas.height = height;
  const context = context2d(canvas);
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, left, top, right - left, bottom - top, 0, 0, width, height);
}

export function drawMap(canvas, photo, numbers, [height, width], signed, { colormap, opacity, threshold }) {
  const row = ROWS[signed ? "coolwarm" : colormap] * 256 * 4;
  const heat = new ImageData(width, height);
  for (let index = 0; index < numbers.length; index += 1) {
    const number = numbers[index];
    const at = row + 4 * Math.round(255 * (signed ? (number + 1) / 2 : number));
    heat.data.set(palettes.subarray(at, at + 3), 4 * index);
    heat.data[4 * index + 3] = Math.abs(number) < threshold ? 0 : Math.round(255 * opacity);
  }
  const small = new OffscreenCanvas(width, height);
  context2d(small).putImageData(heat, 0, 0);
  canvas.width = photo.width;
  canvas.height = photo.height;
  const context = context2d(canvas);
  context.drawImage(photo, 0, 0);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

export function drawBoxes(canvas, boxes, input) {
  const context = context2d(canvas);
  const across = canvas.width / (input.right - input.left);
  const down = canvas.height / (input.bottom - input.top);
  context.lineWidth = 3;
  context.strokeStyle = "#ffffff";
  for (const box of boxes) {
    const left = (box.left - input.left) * across;
    const top = (box.top - input.top) * down;
    context.strokeRect(left, top, (box.right - box.left) * across, (box.bottom - box.top) * down);
  }
}

// Insertion (solid) and deletion (dashed) of a map, as shares of the score.
export function curves(faithfulness) {
  const all = [...faithfulness.insertion, ...faithfulness.deletion, 0];
  const [low, high] = [Math.min(...all), Math.max(...all, 1e-9)];
  const line = (points, dash) => {
    const at = points.map((point, index) => `${(100 * index) / (points.length - 1)},${39 - (38 * (point - low)) / (high - low)}`);
    return `<polyline points="${at.join(" ")}" fill="none" stroke="currentColor" stroke-width="1.5" ${dash} vector-effect="non-scaling-stroke"/>`;
  };
  const said = `insertion ${faithfulness.insertionAuc.toFixed(3)}, deletion ${faithfulness.deletionAuc.toFixed(3)}`;
  return `<svg viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label="${said}">${line(faithfulness.insertion, "")}${line(
    faithfulness.deletion,
    'stroke-dasharray="4 3"',
  )}</svg><div>${said}</div>`;
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

function edges(input, bitmap) {
  return input ?? { left: 0, top: 0, right: bitmap.width, bottom: bitmap.height };
}

function fitted(bitmap, most) {
  const scale = Math.min(1, most / Math.max(bitmap.width, bitmap.height));
  return [Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale))];
}

function context2d(canvas) {
  return canvas.getContext("2d");
}
