// What colour each point has: stored colours, or the cosine similarity to the picked point.

const SIMILARITY = "similarity";
const GREY = 176;

function rampColor(ramp, place, out, at) {
  const x = Math.min(1, Math.max(0, place)) * (ramp.length - 1);
  const low = Math.min(Math.floor(x), ramp.length - 2), part = x - low;
  for (let c = 0; c < 3; c++) out[at + c] = Math.round(ramp[low][c] * (1 - part) + ramp[low + 1][c] * part);
}

// Place on the ramp, in [0, 1], of a value: linear between knots that do not fall.
function heat(value, knots) {
  const last = knots.length - 2;
  let below = 0;
  while (below < last && value >= knots[below + 1]) below++;
  const span = knots[below + 1] - knots[below];
  const part = span > 0 ? (value - knots[below]) / span : 1;
  return (below + Math.min(1, Math.max(0, part))) / (knots.length - 1);
}

// Cosines of all features of all clouds to the feature of one point: inner products of the codes.
function cosines(head, pick) {
  const { width, offset, scale } = head.codes;
  const query = new Float32Array(width);
  const from = head.clouds[pick.cloud].arrays;
  const row = from.owner ? from.owner[pick.point] : pick.point;
  for (let k = 0; k < width; k++) query[k] = offset[k] + scale[k] * from.codes[row * width + k];
  let base = 0;
  const weight = new Float32Array(width);
  for (let k = 0; k < width; k++) {
    base += query[k] * offset[k];
    weight[k] = query[k] * scale[k];
  }
  return head.clouds.map((cloud, number) => {
    const codes = cloud.arrays.codes, out = new Float32Array(codes.length / width);
    for (let i = 0, j = 0; i < out.length; i++) {
      let sum = base;
      for (let k = 0; k < width; k++) sum += weight[k] * codes[j++];
      out[i] = Math.min(1, Math.max(-1, sum));
    }
    if (number === pick.cloud) out[row] = 1; // what the codes leave out is equal in equal features
    return out;
  });
}

// Cosines at the knots of the ramp, over the points of all clouds.
function scaleOf(head, rows) {
  const values = new Float32Array(head.total);
  head.clouds.forEach((cloud, number) => {
    const owner = cloud.arrays.owner;
    for (let i = 0; i < cloud.count; i++) values[cloud.first + i] = rows[number][owner ? owner[i] : i];
  });
  values.sort();
  return head.shares.map((share) => values[Math.floor((values.length - 1) * (1 - share))]);
}

function storedColors(cloud, name) {
  const rgba = new Uint8Array(cloud.count * 4).fill(GREY), stored = cloud.colorings[name];
  if (stored)
    for (let c = 0; c < 3; c++)
      for (let i = 0, from = c * cloud.count; i < cloud.count; i++) rgba[4 * i + c] = stored[from + i];
  return rgba;
}

function heatColors(cloud, rows, knots, ramp) {
  const table = new Uint8Array(rows.length * 3), rgba = new Uint8Array(cloud.count * 4);
  for (let i = 0; i < rows.length; i++) rampColor(ramp, heat(rows[i], knots), table, 3 * i);
  const owner = cloud.arrays.owner;
  for (let i = 0; i < cloud.count; i++) {
    const at = 3 * (owner ? owner[i] : i);
    rgba[4 * i] = table[at];
    rgba[4 * i + 1] = table[at + 1];
    rgba[4 * i + 2] = table[at + 2];
  }
  return rgba;
}
