// A picture's file to the numbers that the model takes, as Python's processor makes them: PIL's bicubic filter, columns
// first. Of pictures more than twice as tall as wide Pillow 13 takes the rows first, which changes a level here and there.
const BITS = 22; // of the whole numbers that PIL computes with
const STRIP = 256; // rows that are read at once: a photograph of 50 megapixels is never held as numbers
const THUMBNAIL_SIDE = 256; // pixels of the longer side
export const MAX_BYTES = 200e6; // of a file

/** A file as a picture, upright as its EXIF data say, its colours as they stand in the file. */
export async function decoded(file) {
  if (file.size > MAX_BYTES) throw coded("too_large");
  try {
    return await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw coded("no_picture");
  }
}

/** A thumbnail as a file, on white. */
export function thumbnail(bitmap) {
  const scale = Math.min(1, THUMBNAIL_SIDE / Math.max(bitmap.width, bitmap.height));
  const sides = [bitmap.width, bitmap.height].map((length) => Math.max(1, Math.round(length * scale)));
  const context = onWhite(...sides);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, ...sides);
  return context.canvas.convertToBlob({ type: "image/webp", quality: 0.85 });
}

/**
 * The numbers of a picture: its short side brought to `side` pixels, its middle cut out, normalised.
 * Returns a Float32Array of 3 x side x side, the colours one after another. As in Python, a picture so narrow that it
 * would have more than `most` pixels before the cut is refused.
 */
export function pixels(bitmap, { side, mean, std, most }) {
  const { width, height } = bitmap;
  const long = Math.trunc((side * Math.max(width, height)) / Math.min(width, height));
  if (side * long > most) throw coded("no_picture");
  const [across, down] = width <= height ? [side, long] : [long, side];
  const columns = weights(width, across, half(across - side), side);
  const rows = weights(height, down, half(down - side), side);
  const [top, bottom] = [rows[0].first, rows[side - 1].first + rows[side - 1].shares.length];
  const narrow = new Uint8Array((bottom - top) * side * 3);
  const context = onWhite(width, Math.min(STRIP, bottom - top));
  for (let y = top; y < bottom; y += STRIP) {
    const tall = Math.min(STRIP, bottom - y);
    context.fillRect(0, 0, width, tall);
    context.drawImage(bitmap, 0, -y);
    const strip = context.getImageData(0, 0, width, tall).data;
    for (let row = 0; row < tall; row++)
      for (let x = 0; x < side; x++)
        mixed(strip, 4 * (row * width + columns[x].first), 4, columns[x].shares, narrow, 3 * ((y - top + row) * side + x));
  }
  const found = new Float32Array(3 * side * side);
  const colour = new Uint8Array(3);
  for (let y = 0; y < side; y++)
    for (let x = 0; x < side; x++) {
      mixed(narrow, 3 * ((rows[y].first - top) * side + x), 3 * side, rows[y].shares, colour, 0);
      for (let c = 0; c < 3; c++) found[(c * side + y) * side + x] = (colour[c] / 255 - mean[c]) / std[c];
    }
  return found;
}

/** Of `count` of `to` pixels the first of the `from` pixels that each is mixed of, and their shares in whole numbers. */
export function weights(from, to, start, count) {
  const scale = from / to;
  const wide = Math.max(scale, 1); // a smaller picture: the filter is as wide as what becomes one pixel
  return Array.from({ length: count }, (_, at) => {
    const centre = (start + at + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - 2 * wide + 0.5), 0);
    const last = Math.min(Math.trunc(centre + 2 * wide + 0.5), from);
    const curve = Array.from({ length: last - first }, (_, i) => cubic((i + first - centre + 0.5) * (1 / wide)));
    const sum = curve.reduce((total, share) => total + share, 0);
    const whole = (share) => Math.trunc((share / sum) * 2 ** BITS + (share < 0 ? -0.5 : 0.5));
    return { first, shares: Int32Array.from(curve, whole) };
  });
}

/** Keys' cubic with a = -1/2. */
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/** Three colours, each mixed of every `step`-th number of `source` from `at` on, rounded to 8 bits. */
function mixed(source, at, step, shares, target, place) {
  let [red, green, blue] = [2 ** (BITS - 1), 2 ** (BITS - 1), 2 ** (BITS - 1)];
  for (let i = 0; i < shares.length; i++, at += step) {
    red += source[at] * shares[i];
    green += source[at + 1] * shares[i];
    blue += source[at + 2] * shares[i];
  }
  target[place] = eight(red);
  target[place + 1] = eight(green);
  target[place + 2] = eight(blue);
}

const eight = (sum) => Math.min(Math.max(sum >> BITS, 0), 255);

/** Half of a whole number, rounded as Python's `round` does: halves to the even one. */
function half(length) {
  const down = Math.floor(length / 2);
  return length % 2 && down % 2 ? down + 1 : down;
}

function onWhite(width, height) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { alpha: false, willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  return context;
}

/** An error with the code of its words on the page. */
export const coded = (code, values = {}, cause = undefined) => Object.assign(new Error(code, { cause }), { code, values });
