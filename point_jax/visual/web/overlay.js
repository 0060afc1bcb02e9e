// Names of clouds, lines between matches, and rings around picked points, over the picture.

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';

// Corners of the box around what is shown of a cloud, strays left out.
function boxCorners(cloud, cut) {
  const [low, high] = cloud.inside.map((g) => g.map((v, a) => v * cloud.step[a] + cloud.place[a]));
  const top = Math.min(high[2], cloud.place[2] + cutHeight(cloud, cut));
  return [0, 1, 2, 3, 4, 5, 6, 7].map((k) => [k & 1 ? high[0] : low[0], k & 2 ? high[1] : low[1], k & 4 ? top : low[2]]);
}

function drawOverlay(canvas, camera, head, state) {
  const context = canvas.getContext("2d"), ratio = canvas.width / camera.width;
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), stage = style.getPropertyValue("--stage");
  const accent = style.getPropertyValue("--accent");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, camera.width, camera.height);
  const view = camera.view();
  const spot = (cloud, point) => camera.project(placeOf(head.clouds[cloud], point), view);
  const line = (a, b, color, width, alpha) => {
    if (a[2] <= view.near || b[2] <= view.near) return;
    context.globalAlpha = alpha;
    context.lineWidth = width;
    context.strokeStyle = color;
    context.beginPath();
    context.moveTo(a[0], a[1]);
    context.lineTo(b[0], b[1]);
    context.stroke();
    context.globalAlpha = 1;
  };
  const disc = (p, radius, fill, rim, width) => {
    if (p[2] <= view.near) return;
    context.beginPath();
    context.arc(p[0], p[1], radius, 0, 7);
    if (fill) {
      context.fillStyle = fill;
      context.fill();
    }
    context.lineWidth = width;
    context.strokeStyle = rim;
    context.stroke();
  };
  if (head.lines && state.lines) {
    const quiet = state.pick && head.clouds[state.pick.cloud].arrays.match ? 0.22 : 0.85;
    const { pairs, colors } = head.lines;
    pairs.forEach(([i, j], k) => {
      const color = `rgb(${colors[k].join(" ")})`, a = spot(0, i), b = spot(1, j);
      line(a, b, color, 1.3, quiet);
      context.globalAlpha = quiet;
      disc(a, 2.5, color, stage, 0.75);
      disc(b, 2.5, color, stage, 0.75);
      context.globalAlpha = 1;
    });
  }
  if (state.pick) {
    const a = spot(state.pick.cloud, state.pick.point), match = matchOf(head, state.pick);
    const ring = (p) => {
      disc(p, 7, null, stage, 5);
      disc(p, 7, null, accent, 2.5);
    };
    if (match && match.point >= 0) {
      const b = spot(match.cloud, match.point);
      line(a, b, stage, 5, 0.9);
      line(a, b, accent, 2.5, 1);
      ring(b);
    }
    ring(a);
  }
  if (head.clouds.length > 1) {
    context.textAlign = "center";
    context.lineJoin = "round";
    for (const cloud of head.clouds) {
      const corners = boxCorners(cloud, state.cut).map((corner) => camera.project(corner, view));
      if (corners.some((corner) => corner[2] <= view.near)) continue;
      const xs = corners.map((corner) => corner[0]), top = Math.min(...corners.map((corner) => corner[1]));
      const x = (Math.min(...xs) + Math.max(...xs)) / 2, rows = cloud.caption.split("\n");
      rows.forEach((text, row) => {
        context.font = `${row ? 400 : 600} 13px ${FONT}`;
        const half = context.measureText(text).width / 2 + 6;
        const inside = Math.max(half, Math.min(camera.width - half, x)), y = Math.max(16, top - 8 - 17 * (rows.length - 1)) + 17 * row;
        context.lineWidth = 4;
        context.strokeStyle = stage;
        context.strokeText(text, inside, y);
        context.fillStyle = ink;
        context.fillText(text, inside, y);
      });
    }
  }
  if (state.crosshair) {
    const x = Math.round(camera.width / 2) + 0.5, y = Math.round(camera.height / 2) + 0.5;
    for (const [color, width] of [[stage, 4], [ink, 1]])
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]])
        line([x + 4 * dx, y + 4 * dy, 1e9], [x + 11 * dx, y + 11 * dy, 1e9], color, width, 1);
  }
}

// The match of a picked point: the other cloud, the shown point nearest to it (or -1), its number.
function matchOf(head, pick) {
  const arrays = head.clouds[pick.cloud].arrays;
  if (!arrays.match) return null;
  const at = pick.point;
  return {
    cloud: 1 - pick.cloud,
    point: arrays.match[at],
    number: arrays.match_number[at],
    score: arrays.match_score[at] / 32767,
    state: arrays.match_state[at],
  };
}
