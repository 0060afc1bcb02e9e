// A camera that turns around a target, z up. Angles in radians, lengths in metres.

const FIELD = (40 * Math.PI) / 180;

function directions(azimuth, elevation) {
  const ca = Math.cos(azimuth), sa = Math.sin(azimuth);
  const ce = Math.cos(elevation), se = Math.sin(elevation);
  return {
    right: [-sa, ca, 0],
    up: [-ca * se, -sa * se, ce],
    forward: [-ca * ce, -sa * ce, -se],
  };
}

const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];

class Camera {
  // sample: flat array of points that the first view holds; radius: of everything around 0;
  // named: leave room above for names.
  constructor(sample, radius, azimuth, elevation, named) {
    Object.assign(this, { sample, radius, home: [azimuth, elevation], named });
    this.width = this.height = 1;
    this.reset();
  }

  reset(elevation = this.home[1]) {
    this.azimuth = this.home[0];
    this.elevation = elevation;
    this.fit();
  }

  resize(width, height) {
    Object.assign(this, { width, height });
    if (this.fitted) this.fit();
  }

  get focal() {
    return Math.min(this.height, this.width * 1.2) / 2 / Math.tan(FIELD / 2);
  }

  // The nearest position that holds the sample: each edge of the picture touches a point, or the
  // tighter pair of opposite edges does.
  fit() {
    const { right, up, forward } = directions(this.azimuth, this.elevation);
    const tx = (0.47 * this.width) / this.focal, ty = ((this.named ? 0.42 : 0.46) * this.height) / this.focal;
    const far = [-Infinity, -Infinity, -Infinity, -Infinity];
    let nearest = Infinity, deepest = -Infinity;
    const s = this.sample;
    for (let i = 0; i < s.length; i += 3) {
      const p = [s[i], s[i + 1], s[i + 2]];
      const x = dot(p, right), y = dot(p, up), z = dot(p, forward);
      far[0] = Math.max(far[0], x - tx * z);
      far[1] = Math.max(far[1], -x - tx * z);
      far[2] = Math.max(far[2], y - ty * z);
      far[3] = Math.max(far[3], -y - ty * z);
      nearest = Math.min(nearest, z);
      deepest = Math.max(deepest, z);
    }
    const z0 = Math.min(-(far[0] + far[1]) / (2 * tx), -(far[2] + far[3]) / (2 * ty), nearest - 0.02 * this.radius);
    const x0 = (far[0] - far[1]) / 2, y0 = (far[2] - far[3]) / 2, middle = (nearest + deepest) / 2;
    this.target = [0, 1, 2].map((a) => x0 * right[a] + y0 * up[a] + middle * forward[a]);
    this.distance = middle - z0;
    this.fitted = true;
  }

  turn(dx, dy) {
    this.azimuth -= dx;
    this.elevation = Math.max(-1.55, Math.min(1.5707, this.elevation + dy));
    this.fitted = false;
  }

  // dx, dy in CSS pixels.
  move(dx, dy) {
    const { right, up } = directions(this.azimuth, this.elevation);
    const scale = this.distance / this.focal;
    this.target = this.target.map((t, a) => t - dx * scale * right[a] + dy * scale * up[a]);
    this.fitted = false;
  }

  // Keeps what is under (x, y), measured from the middle of the picture, where it is.
  zoom(factor, x = 0, y = 0) {
    const limited = Math.max(0.01 * this.radius, Math.min(8 * this.radius, this.distance * factor));
    const k = limited / this.distance;
    this.move(-x * (1 - k), -y * (1 - k));
    this.distance = limited;
  }

  turnAround(point) {
    const { forward } = directions(this.azimuth, this.elevation);
    const eye = this.target.map((t, a) => t - this.distance * forward[a]);
    this.distance = Math.max(0.01 * this.radius, dot(point.map((p, a) => p - eye[a]), forward));
    this.target = point;
    this.fitted = false;
  }

  view() {
    const axes = directions(this.azimuth, this.elevation);
    const eye = this.target.map((t, a) => t - this.distance * axes.forward[a]);
    const middle = -dot(eye, axes.forward);
    const near = Math.max(0.003 * this.radius, middle - this.radius);
    const far = Math.max(near * 2, middle + this.radius);
    return { ...axes, eye, near, far };
  }

  // CSS pixels (x, y) and depth of a point in space.
  project(point, view = this.view()) {
    const p = point.map((v, a) => v - view.eye[a]);
    const z = dot(p, view.forward);
    const scale = this.focal / z;
    return [this.width / 2 + dot(p, view.right) * scale, this.height / 2 - dot(p, view.up) * scale, z];
  }
}
