// The page: state, controls, mouse, touch and keys.

const $ = (id) => document.getElementById(id);
const make = (tag, text, properties = {}) => Object.assign(document.createElement(tag), { textContent: text }, properties);

async function start() {
  chooseTheme();
  const head = await unpack();
  const state = {
    coloring: head.coloring, size: 1, cut: head.view.cut, hideBacks: head.view.backs, lines: true,
    pick: null, crosshair: false, heat: null,
  };
  const canvas = $("points"), overlay = $("overlay");
  const camera = new Camera(fitSample(head), head.radius, head.view.azimuth, head.view.elevation, head.clouds.length > 1);
  let drawing = new Drawing(canvas, head);
  let waiting = 0, calm = 0;

  function resize() {
    const box = $("stage").getBoundingClientRect(), ratio = Math.min(window.devicePixelRatio || 1, 2);
    for (const one of [canvas, overlay]) {
      one.width = Math.max(1, Math.round(box.width * ratio));
      one.height = Math.max(1, Math.round(box.height * ratio));
    }
    camera.resize(Math.max(1, box.width), Math.max(1, box.height));
    redraw();
  }

  // One picture per frame while something moves; a finer one once it rests.
  function redraw() {
    clearTimeout(calm);
    if (!waiting)
      waiting = requestAnimationFrame(() => {
        waiting = 0;
        render(1);
        calm = setTimeout(() => render(2), 160);
      });
  }

  function render(samples) {
    if (drawing.gl.isContextLost()) return;
    const background = hexColor(getComputedStyle(document.documentElement).getPropertyValue("--stage"));
    drawing.draw(camera, { ...state, samples, background });
    drawOverlay(overlay, camera, head, state);
    canvas.dataset.samples = samples;
  }

  function recolor() {
    const heated = state.coloring === SIMILARITY && head.codes && state.pick;
    if (heated) {
      const rows = cosines(head, state.pick);
      state.heat = { rows, knots: scaleOf(head, rows) };
    } else state.heat = null;
    head.clouds.forEach((cloud, number) => drawing.recolor(number,
      state.heat ? heatColors(cloud, state.heat.rows[number], state.heat.knots, head.ramp) : storedColors(cloud, state.coloring)));
    showLegend(head, state);
    redraw();
  }

  function setColoring(name) {
    state.coloring = name;
    document.querySelectorAll('#colorings input').forEach((input) => { input.checked = input.value === name; });
    recolor();
    showPicked(head, state);
  }

  function pick(number) {
    if (number < 0) return clear();
    const cloud = head.clouds.findIndex((c) => number < c.first + c.count);
    state.pick = { cloud, point: number - head.clouds[cloud].first };
    $("pick-cloud").value = cloud;
    $("pick-index").value = numberOf(head.clouds[cloud], state.pick.point);
    if (head.mode === SIMILARITY) setColoring(SIMILARITY);
    else if (state.coloring === SIMILARITY) recolor();
    showPicked(head, state);
    redraw();
  }

  function clear() {
    state.pick = null;
    $("pick-index").value = "";
    if (state.coloring === SIMILARITY) recolor();
    showPicked(head, state);
    redraw();
  }

  function pickAt(x, y) {
    render(1); // the buffers must be of this very view
    const number = drawing.pick(camera, x, y);
    if (number >= 0) pick(number);
    redraw();
  }

  function typed() {
    const cloud = Number($("pick-cloud").value), text = $("pick-index").value;
    if (text === "") return clear();
    const point = shownOf(head.clouds[cloud], Number(text));
    if (point >= 0) return pick(head.clouds[cloud].first + point);
    const { total, count } = head.clouds[cloud], inside = Number(text) >= 0 && Number(text) < total;
    $("picked").replaceChildren(make("dt", "none"), make("dd", inside && count < total
      ? `point ${text} is among those left out of this page` : `points are 0 to ${total - 1}`));
  }

  function setSize(exponent) {
    $("size").value = exponent;
    state.size = 2 ** Number($("size").value);
    redraw();
  }

  buildControls(head, state, { setColoring });
  $("size").oninput = (event) => setSize(event.target.value);
  $("cut").oninput = (event) => { state.cut = Number(event.target.value); redraw(); };
  $("backs").onchange = (event) => { state.hideBacks = event.target.checked; redraw(); };
  $("lines").onchange = (event) => { state.lines = event.target.checked; redraw(); };
  $("reset").onclick = () => { camera.reset(); redraw(); };
  $("top").onclick = () => { camera.reset(1.5707); redraw(); };
  $("theme").onclick = () => { chooseTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); redraw(); };
  $("save").onclick = () => savePicture(canvas, overlay, head, () => render(2));
  $("pick-clear").onclick = () => { clear(); canvas.focus(); };
  $("pick-index").onchange = $("pick-cloud").onchange = typed;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { chooseTheme(); redraw(); });
  handlePointers(canvas, camera, { redraw, pickAt, around: (x, y) => {
    render(1);
    const number = drawing.pick(camera, x, y);
    if (number < 0) return;
    const cloud = head.clouds.find((c) => number < c.first + c.count);
    camera.turnAround(placeOf(cloud, number - cloud.first));
    redraw();
  } });
  canvas.addEventListener("keydown", (event) => {
    const turn = 0.09, far = 40, { key, shiftKey } = event;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const names = [...document.querySelectorAll("#colorings input")].map((input) => input.value);
    const act = {
      "+": () => camera.zoom(0.85), "=": () => camera.zoom(0.85), "-": () => camera.zoom(1 / 0.85),
      "0": () => camera.reset(), Home: () => camera.reset(), t: () => camera.reset(1.5707),
      "[": () => setSize(Number($("size").value) - 0.2), "]": () => setSize(Number($("size").value) + 0.2),
      c: () => setColoring(names[(names.indexOf(state.coloring) + 1) % names.length]),
      Enter: () => pickAt(camera.width / 2, camera.height / 2), Escape: clear,
    }[key.length === 1 ? key.toLowerCase() : key];
    if (arrows[key]) {
      const [x, y] = arrows[key];
      if (shiftKey) camera.move(-x * far, -y * far);
      else camera.turn(-x * turn, y * turn);
    } else if (act) act();
    else return;
    event.preventDefault();
    redraw();
  });
  for (const kind of ["focus", "blur", "keydown", "pointerdown"])
    canvas.addEventListener(kind, () => {
      const wanted = kind !== "blur" && kind !== "pointerdown" && canvas.matches(":focus-visible");
      if (wanted !== state.crosshair) { state.crosshair = wanted; redraw(); }
    });
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", () => { drawing = new Drawing(canvas, head); recolor(); });
  new ResizeObserver(resize).observe($("stage"));
  resize();
  recolor();
  if (head.picked) pick(head.clouds[head.picked[0]].first + head.picked[1]);
  $("message").hidden = true;
  // For scripts that drive the page.
  window.pointPage = { head, state, camera, pick, setColoring, where: (cloud, number) =>
    camera.project(placeOf(head.clouds[cloud], shownOf(head.clouds[cloud], number))) };
  document.documentElement.dataset.ready = "yes";
}

function buildControls(head, state, { setColoring }) {
  $("title").textContent = head.title;
  $("note").textContent = head.note;
  $("facts").textContent = head.facts;
  head.colorings.forEach((name) => {
    const label = make("label", ""), input = make("input", "", { type: "radio", name: "coloring", value: name });
    input.checked = name === state.coloring;
    input.onchange = () => setColoring(name);
    label.append(input, make("span", name === SIMILARITY ? "similarity to the picked point" : name));
    $("colorings").append(label);
  });
  head.clouds.forEach((cloud, number) => $("pick-cloud").append(make("option", cloud.name, { value: number })));
  $("pick-cloud").hidden = head.clouds.length === 1;
  $("cut").value = state.cut;
  $("backs").checked = state.hideBacks;
  $("backs-label").hidden = !head.clouds.some((cloud) => cloud.arrays.normal);
  $("lines-label").hidden = !head.lines;
  if (head.mode === SIMILARITY) $("hint").textContent = "Click a point: everything is coloured by its cosine similarity to it.";
  if (head.mode === "match") $("hint").textContent = "Click a point to see its match in the other cloud.";
}

function showLegend(head, state) {
  $("legend").hidden = !state.heat;
  $("hint").hidden = Boolean(state.pick);
  const key = head.keys[state.coloring] || [];
  $("key").hidden = !key.length;
  $("key").replaceChildren(...key.map(([name, color, share]) => {
    const item = make("li", ""), patch = make("i", "");
    patch.style.background = `rgb(${color})`;
    item.append(patch, make("span", name), make("small", share));
    return item;
  }));
  if (!state.heat) return;
  const context = $("ramp").getContext("2d"), row = context.createImageData(240, 1);
  for (let i = 0; i < 240; i++) {
    rampColor(head.ramp, i / 239, row.data, 4 * i);
    row.data[4 * i + 3] = 255;
  }
  context.putImageData(row, 0, 0);
  const names = ["lowest", "median", "top 10 %", "top 2 %", "highest"];
  $("knots").replaceChildren(...state.heat.knots.map((value, i) => {
    const item = make("li", value.toFixed(2));
    item.append(make("small", names[i]));
    return item;
  }));
  $("legend-note").textContent = head.codes.note;
}

function showPicked(head, state) {
  const list = $("picked"), rows = [];
  $("pick-clear").hidden = $("hint").hidden = Boolean(state.pick);
  $("pick-clear").hidden = !state.pick;
  if (!state.pick) return list.replaceChildren();
  const { cloud: number, point } = state.pick, cloud = head.clouds[number];
  const className = (label) => label < 0 ? "none" : (head.classes && head.classes[label]) || `class ${label}`;
  if (head.clouds.length > 1) rows.push(["cloud", cloud.name]);
  rows.push(["point", String(numberOf(cloud, point))]);
  rows.push(["x, y, z", `${coordOf(cloud, point).map((v) => v.toFixed(cloud.decimals)).join(", ")} m`]);
  if (cloud.arrays.label) rows.push(["class", className(cloud.arrays.label[point])]);
  const match = matchOf(head, state.pick);
  if (match) {
    const other = head.clouds[match.cloud];
    rows.push(["match", `point ${match.number} of ${other.name}`]);
    if (match.point >= 0 && other.arrays.label) rows.push(["its class", className(other.arrays.label[match.point])]);
    rows.push(["cosine", match.score.toFixed(3)]);
    rows.push(["mutual", match.state & 1 ? "yes" : "no"]);
    if (head.within && number === 0)
      rows.push(["right", match.state & 2 ? (match.state & 4 ? `yes, within ${head.within} m` : "no") : "no counterpart"]);
  }
  list.replaceChildren(...rows.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
}

// Places of up to 4000 points that the first view holds: those not cut away, without strays.
function fitSample(head) {
  const out = [], every = Math.max(1, Math.ceil(head.total / 4000));
  for (const cloud of head.clouds) {
    const [low, high] = cloud.inside, top = cutHeight(cloud, head.view.cut) / cloud.step[2], before = out.length;
    for (let i = 0; i < cloud.count; i += every) {
      const g = cloud.grid.subarray(3 * i, 3 * i + 3);
      if (g[2] <= top && [0, 1, 2].every((a) => g[a] >= low[a] && g[a] <= high[a])) out.push(...placeOf(cloud, i));
    }
    if (out.length === before) out.push(...placeOf(cloud, 0));
    if (head.clouds.length > 1) boxCorners(cloud, head.view.cut).forEach((corner) => out.push(...corner));
  }
  return Float32Array.from(out);
}

function handlePointers(canvas, camera, { redraw, pickAt, around }) {
  const held = new Map();
  let moved = 0, many = false;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const middle = () => [...held.values()].reduce((sum, p) => [sum[0] + p[0] / held.size, sum[1] + p[1] / held.size], [0, 0]);
  const spread = () => {
    const [a, b] = [...held.values()];
    return Math.max(8, Math.hypot(a[0] - b[0], a[1] - b[1]));
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    if (!held.size) { moved = 0; many = false; }
    held.set(event.pointerId, place(event));
    many ||= held.size > 1;
    canvas.classList.add("held");
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!held.has(event.pointerId)) return;
    const before = middle(), wide = held.size > 1 ? spread() : 1, now = place(event), old = held.get(event.pointerId);
    held.set(event.pointerId, now);
    const after = middle(), dx = after[0] - before[0], dy = after[1] - before[1];
    moved += Math.hypot(now[0] - old[0], now[1] - old[1]);
    if (moved < (event.pointerType === "mouse" ? 3 : 8)) return;
    if (held.size > 1) {
      camera.move(dx, dy);
      camera.zoom(wide / spread(), after[0] - camera.width / 2, after[1] - camera.height / 2);
    } else if (event.buttons & 6 || event.shiftKey) camera.move(dx, dy);
    else camera.turn(0.006 * dx, 0.006 * dy);
    redraw();
  });
  const release = (event) => {
    if (!held.delete(event.pointerId)) return;
    if (!held.size) canvas.classList.remove("held");
    const still = moved < (event.pointerType === "mouse" ? 3 : 8);
    if (event.type === "pointerup" && still && !many && event.button === 0) pickAt(...place(event));
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("dblclick", (event) => around(...place(event)));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const [x, y] = place(event), lines = event.deltaMode === 1 ? 30 : 1;
    camera.zoom(Math.exp(0.0012 * Math.max(-400, Math.min(400, event.deltaY * lines))), x - camera.width / 2, y - camera.height / 2);
    redraw();
  }, { passive: false });
}

function savePicture(canvas, overlay, head, render) {
  render();
  const both = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = both.getContext("2d");
  context.drawImage(canvas, 0, 0);
  context.drawImage(overlay, 0, 0);
  both.toBlob((blob) => {
    const link = make("a", "", { href: URL.createObjectURL(blob), download: `${head.title.replace(/[^\w-]+/g, "_")}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

function chooseTheme(theme) {
  document.documentElement.dataset.theme = theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function hexColor(text) {
  const value = parseInt(text.trim().slice(1), 16);
  return [(value >> 16) / 255, ((value >> 8) & 255) / 255, (value & 255) / 255];
}

start().catch((error) => {
  const message = $("message");
  message.hidden = false;
  message.textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old for this page: it cannot unpack the points. Any browser since 2023 can."
    : `The page cannot be shown: ${error.message}`;
  console.error(error);
});
