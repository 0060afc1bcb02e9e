// The points of the page: a header in JSON, and one gzip of all arrays in base64.

const TYPES = { uint8: Uint8Array, int8: Int8Array, int16: Int16Array, uint32: Uint32Array, int32: Int32Array, float32: Float32Array };

async function unpack() {
  const head = JSON.parse(document.getElementById("head").textContent);
  const text = atob(document.getElementById("data").textContent.trim());
  document.getElementById("data").remove();
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = await new Response(stream).arrayBuffer();
  const read = ({ type, at, length }) => new TYPES[type](bytes, at, length);
  for (const cloud of head.clouds) {
    cloud.arrays = Object.fromEntries(Object.entries(cloud.arrays).map(([k, v]) => [k, read(v)]));
    cloud.colorings = Object.fromEntries(Object.entries(cloud.colorings).map(([k, v]) => [k, read(v)]));
    cloud.grid = integrate(cloud.arrays.coord, cloud.count);
    if (cloud.arrays.index) {
      const index = cloud.arrays.index; // stored as steps from each shown point to the next
      for (let i = 1; i < index.length; i++) index[i] += index[i - 1];
    }
  }
  let first = 0;
  for (const cloud of head.clouds) {
    cloud.first = first;
    first += cloud.count;
  }
  head.total = first;
  return head;
}

// Coordinates come as steps from point to point, low bytes and high bytes of each axis apart: near
// points in a row then compress well.
function integrate(planes, count) {
  const out = new Uint16Array(count * 3);
  for (let axis = 0; axis < 3; axis++) {
    const low = 2 * axis * count, high = low + count;
    let value = 0;
    for (let i = 0; i < count; i++) {
      value = (value + (planes[low + i] | (planes[high + i] << 8))) & 65535;
      out[3 * i + axis] = value;
    }
  }
  return out;
}

// The place of a shown point in the page's common space, relative to the middle of everything.
function placeOf(cloud, i) {
  const g = cloud.grid, s = cloud.step, p = cloud.place;
  return [g[3 * i] * s[0] + p[0], g[3 * i + 1] * s[1] + p[1], g[3 * i + 2] * s[2] + p[2]];
}

// The point's coordinates as the input file had them.
function coordOf(cloud, i) {
  return [0, 1, 2].map((axis) => cloud.low[axis] + cloud.grid[3 * i + axis] * cloud.step[axis]);
}

function numberOf(cloud, i) {
  return cloud.arrays.index ? cloud.arrays.index[i] : i;
}

// The shown point with a number of the input file, -1 if it was left out.
function shownOf(cloud, number) {
  const index = cloud.arrays.index;
  if (!index) return number >= 0 && number < cloud.count ? number : -1;
  let low = 0, high = index.length - 1;
  while (low <= high) {
    const mid = (low + high) >> 1;
    if (index[mid] === number) return mid;
    if (index[mid] < number) low = mid + 1;
    else high = mid - 1;
  }
  return -1;
}
