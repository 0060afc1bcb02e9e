// Points as round discs into buffers of colour, number and depth; then shading from the depths.

const POINT_VERTEX = `#version 300 es
precision highp float;
layout(location = 0) in vec3 grid;
layout(location = 1) in vec3 color;
layout(location = 2) in vec3 normal;
uniform vec3 step_, place, eye, right, up, forward;
uniform vec2 focal;           // in halves of the picture, per unit of tangent
uniform float radius, pixels, cut, near, far, largest;
uniform bool hideBacks, hasNormal;
uniform uint first;
flat out vec3 shaded;
flat out uint number;
flat out vec3 depth;          // along the view; radius of the disc; how far its rim lies behind
flat out vec2 slope;          // growth of depth to the right and upwards of the disc's surface
void main() {
  vec3 local = grid * step_;
  vec3 p = local + place - eye;
  vec3 seen = vec3(dot(p, right), dot(p, up), dot(p, forward));
  float facing = hasNormal && dot(normal, normal) > 0.01 ? -dot(normalize(normal), normalize(p)) : 1.0;
  bool hidden = local.z > cut || seen.z < near || (hideBacks && facing < -0.08);
  shaded = color * (hasNormal ? 0.8 + 0.2 * clamp(abs(facing), 0.0, 1.0) : 1.0);
  number = first + uint(gl_VertexID) + 1u;
  depth = vec3(seen.z, radius, hasNormal ? 0.55 : 1.3);
  vec3 n = vec3(dot(normal, right), dot(normal, up), dot(normal, forward));
  n = n.z > 0.0 ? -n : n;
  slope = hasNormal ? -n.xy / min(n.z, -0.3) : vec2(0.0);
  gl_PointSize = clamp(2.0 * radius * pixels / seen.z, 1.5, largest);
  gl_Position = hidden ? vec4(2.0, 2.0, 2.0, 1.0)
    : vec4(seen.xy * focal, 0.0, seen.z);
}`;

const POINT_FRAGMENT = `#version 300 es
precision highp float;
precision highp int;
uniform float near, far;
flat in vec3 shaded;
flat in uint number;
flat in vec3 depth;
flat in vec2 slope;
layout(location = 0) out vec4 colorOut;
layout(location = 1) out uint numberOut;
void main() {
  vec2 off = 2.0 * gl_PointCoord - 1.0;
  float back = dot(slope, vec2(off.x, -off.y)); // a disc in its surface: an ellipse to the eye
  float away = dot(off, off) + 0.5 * back * back;
  if (away > 1.0) discard;
  colorOut = vec4(shaded, 1.0);
  numberOut = number;
  // The rim of a disc lies deeper than its middle: of discs that overlap, the nearest middle wins.
  float z = depth.x + depth.y * (back + depth.z * away);
  gl_FragDepth = (1.0 / near - 1.0 / z) / (1.0 / near - 1.0 / far);
}`;

const SHADE_VERTEX = `#version 300 es
void main() { gl_Position = vec4(gl_VertexID == 1 ? 3.0 : -1.0, gl_VertexID == 2 ? 3.0 : -1.0, 0.0, 1.0); }`;

// Eye-dome lighting (Boucheny, 2009): a pixel is dark by how far it lies behind the middle between
// two opposite neighbours, in relation to its distance.
const SHADE_FRAGMENT = `#version 300 es
precision highp float;
precision highp usampler2D;
uniform sampler2D colors, depths;
uniform vec3 background;
uniform float near, far, strength, reach;
uniform int samples;
out vec4 result;
ivec2 size;
float at(ivec2 p) {
  float d = texelFetch(depths, clamp(p, ivec2(0), size - 1), 0).r;
  return d >= 1.0 ? -1.0 : 1.0 / (1.0 / near - d * (1.0 / near - 1.0 / far));
}
void main() {
  size = textureSize(depths, 0);
  ivec2 corner = ivec2(gl_FragCoord.xy) * samples;
  vec3 sum = vec3(0.0);
  for (int y = 0; y < samples; y++) for (int x = 0; x < samples; x++) {
    ivec2 p = corner + ivec2(x, y);
    float z = at(p);
    if (z < 0.0) { sum += background; continue; }
    float dark = 0.0;
    for (int ring = 0; ring < 2; ring++) {
      int r = int(max(1.0, (ring == 0 ? 1.0 : 4.0) * reach));
      for (int k = 0; k < 4; k++) {
        ivec2 d = k == 0 ? ivec2(r, 0) : k == 1 ? ivec2(0, r) : k == 2 ? ivec2(r, r) : ivec2(r, -r);
        float a = at(p + d), b = at(p - d);
        if (a > 0.0 && b > 0.0) dark += clamp((z - 0.5 * (a + b)) / (0.015 * z) - 0.12, 0.0, 1.0);
      }
    }
    sum += texelFetch(colors, p, 0).rgb * exp(-strength * dark / 8.0);
  }
  result = vec4(sum / float(samples * samples), 1.0);
}`;

class Drawing {
  constructor(canvas, head) {
    this.canvas = canvas;
    this.head = head;
    const gl = canvas.getContext("webgl2", { antialias: false, alpha: false, preserveDrawingBuffer: true });
    if (!gl) throw new Error("This browser has no WebGL 2, which the page needs to draw points.");
    this.gl = gl;
    this.points = this.program(POINT_VERTEX, POINT_FRAGMENT);
    this.shade = this.program(SHADE_VERTEX, SHADE_FRAGMENT);
    this.largest = gl.getParameter(gl.ALIASED_POINT_SIZE_RANGE)[1];
    this.limit = gl.getParameter(gl.MAX_TEXTURE_SIZE);
    this.bare = gl.createVertexArray();
    this.clouds = head.clouds.map((cloud) => this.upload(cloud));
    this.buffers = null;
  }

  program(vertex, fragment) {
    const gl = this.gl, program = gl.createProgram();
    for (const [type, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS) && !gl.isContextLost())
        throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost())
      throw new Error(gl.getProgramInfoLog(program));
    const places = {};
    for (let i = 0; i < gl.getProgramParameter(program, gl.ACTIVE_UNIFORMS); i++) {
      const { name } = gl.getActiveUniform(program, i);
      places[name] = gl.getUniformLocation(program, name);
    }
    return { program, places };
  }

  upload(cloud) {
    const gl = this.gl, array = gl.createVertexArray();
    gl.bindVertexArray(array);
    const attribute = (place, values, type, normalized, use) => {
      // Four values a point: rows of three bytes or shorts are slow to read.
      const padded = new values.constructor(cloud.count * 4);
      for (let i = 0, j = 0; i < cloud.count; i++, j += 3) padded.set([values[j], values[j + 1], values[j + 2]], 4 * i);
      const buffer = gl.createBuffer();
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, padded, use);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, 3, type, normalized, padded.BYTES_PER_ELEMENT * 4, 0);
      return buffer;
    };
    attribute(0, cloud.grid, gl.UNSIGNED_SHORT, false, gl.STATIC_DRAW);
    const colors = attribute(1, new Uint8Array(cloud.count * 3), gl.UNSIGNED_BYTE, true, gl.DYNAMIC_DRAW);
    if (cloud.arrays.normal) attribute(2, cloud.arrays.normal, gl.BYTE, true, gl.STATIC_DRAW);
    gl.bindVertexArray(null);
    return { array, colors };
  }

  // rgba: Uint8Array of four values a point.
  recolor(number, rgba) {
    const gl = this.gl;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.clouds[number].colors);
    gl.bufferSubData(gl.ARRAY_BUFFER, 0, rgba);
  }

  target(width, height) {
    const gl = this.gl, old = this.buffers;
    if (old && old.width === width && old.height === height) return old;
    if (old) {
      [old.color, old.number, old.depth].forEach((t) => gl.deleteTexture(t));
      gl.deleteFramebuffer(old.frame);
    }
    const texture = (inside, format, type) => {
      const made = gl.createTexture();
      gl.bindTexture(gl.TEXTURE_2D, made);
      gl.texImage2D(gl.TEXTURE_2D, 0, inside, width, height, 0, format, type, null);
      gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
      gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
      return made;
    };
    const frame = gl.createFramebuffer();
    const made = {
      width, height, frame,
      color: texture(gl.RGBA8, gl.RGBA, gl.UNSIGNED_BYTE),
      number: texture(gl.R32UI, gl.RED_INTEGER, gl.UNSIGNED_INT),
      depth: texture(gl.DEPTH_COMPONENT24, gl.DEPTH_COMPONENT, gl.UNSIGNED_INT),
    };
    gl.bindFramebuffer(gl.FRAMEBUFFER, frame);
    const attach = (place, what) => gl.framebufferTexture2D(gl.FRAMEBUFFER, place, gl.TEXTURE_2D, what, 0);
    attach(gl.COLOR_ATTACHMENT0, made.color);
    attach(gl.COLOR_ATTACHMENT1, made.number);
    attach(gl.DEPTH_ATTACHMENT, made.depth);
    gl.drawBuffers([gl.COLOR_ATTACHMENT0, gl.COLOR_ATTACHMENT1]);
    this.buffers = made;
    return made;
  }

  // settings: size factor, share of the height, hideBacks, background (0-1), samples per pixel and axis.
  draw(camera, settings) {
    const gl = this.gl, { canvas } = this;
    const ratio = canvas.width / camera.width;
    let samples = settings.samples;
    while (samples > 1 && Math.max(canvas.width, canvas.height) * samples > Math.min(this.limit, 5000)) samples--;
    const buffers = this.target(canvas.width * samples, canvas.height * samples);
    const view = camera.view(), pixels = camera.focal * ratio * samples;
    gl.bindFramebuffer(gl.FRAMEBUFFER, buffers.frame);
    gl.viewport(0, 0, buffers.width, buffers.height);
    gl.clearBufferfv(gl.COLOR, 0, [0, 0, 0, 0]);
    gl.clearBufferuiv(gl.COLOR, 1, [0, 0, 0, 0]);
    gl.clearBufferfv(gl.DEPTH, 0, [1]);
    gl.enable(gl.DEPTH_TEST);
    const { program, places } = this.points;
    gl.useProgram(program);
    for (const key of ["eye", "right", "up", "forward"]) gl.uniform3fv(places[key], view[key]);
    gl.uniform2f(places.focal, (2 * camera.focal) / camera.width, (2 * camera.focal) / camera.height);
    gl.uniform1f(places.pixels, pixels);
    gl.uniform1f(places.near, view.near);
    gl.uniform1f(places.far, view.far);
    gl.uniform1f(places.largest, Math.min(this.largest, 160 * samples));
    gl.uniform1i(places.hideBacks, settings.hideBacks);
    this.head.clouds.forEach((cloud, number) => {
      gl.uniform3fv(places.step_, cloud.step);
      gl.uniform3fv(places.place, cloud.place);
      const slanted = cloud.arrays.normal ? 1.2 : 1; // ellipses in the surface leave more gaps than discs
      gl.uniform1f(places.radius, cloud.radius * settings.size * slanted);
      gl.uniform1f(places.cut, cutHeight(cloud, settings.cut));
      gl.uniform1i(places.hasNormal, Boolean(cloud.arrays.normal));
      gl.uniform1ui(places.first, cloud.first);
      gl.bindVertexArray(this.clouds[number].array);
      gl.drawArrays(gl.POINTS, 0, cloud.count);
    });
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.disable(gl.DEPTH_TEST);
    const last = this.shade;
    gl.useProgram(last.program);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, buffers.color);
    gl.activeTexture(gl.TEXTURE1);
    gl.bindTexture(gl.TEXTURE_2D, buffers.depth);
    gl.activeTexture(gl.TEXTURE0);
    gl.uniform1i(last.places.colors, 0);
    gl.uniform1i(last.places.depths, 1);
    gl.uniform3fv(last.places.background, settings.background);
    gl.uniform1f(last.places.near, view.near);
    gl.uniform1f(last.places.far, view.far);
    gl.uniform1f(last.places.strength, 0.9);
    gl.uniform1f(last.places.reach, ratio * samples);
    gl.uniform1i(last.places.samples, samples);
    gl.bindVertexArray(this.bare);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }

  // The number of the point seen at, or within a few pixels of, a place in CSS pixels; -1 for none.
  // Of the points seen there that lie about as deep as the nearest pixel's, it is the one whose
  // middle is nearest to the place: on slanted surfaces discs hide one another's middles.
  pick(camera, x, y) {
    const gl = this.gl, buffers = this.buffers;
    if (!buffers) return -1;
    const scale = buffers.width / camera.width, reach = Math.ceil(7 * scale);
    const cx = Math.floor(x * scale), cy = Math.floor(buffers.height - y * scale);
    const x0 = Math.max(0, cx - reach), y0 = Math.max(0, cy - reach);
    const width = Math.min(buffers.width, cx + reach + 1) - x0, height = Math.min(buffers.height, cy + reach + 1) - y0;
    if (width <= 0 || height <= 0) return -1;
    const read = new Uint32Array(4 * width * height); // the one format that every browser reads
    gl.bindFramebuffer(gl.FRAMEBUFFER, buffers.frame);
    gl.readBuffer(gl.COLOR_ATTACHMENT1);
    gl.readPixels(x0, y0, width, height, gl.RGBA_INTEGER, gl.UNSIGNED_INT, read);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    const seen = new Set();
    let base = -1, least = Infinity;
    for (let j = 0; j < height; j++)
      for (let i = 0; i < width; i++) {
        const number = read[4 * (j * width + i)] - 1, away = (x0 + i - cx) ** 2 + (y0 + j - cy) ** 2;
        if (number < 0) continue;
        seen.add(number);
        if (away < least) [base, least] = [number, away];
      }
    if (base < 0) return -1;
    const view = camera.view();
    const middleOf = (number) => {
      const cloud = this.head.clouds.find((c) => number < c.first + c.count);
      return [...camera.project(placeOf(cloud, number - cloud.first), view), cloud.radius];
    };
    const [, , deep, radius] = middleOf(base);
    let best = base, nearest = Infinity;
    for (const number of seen) {
      const [px, py, z] = middleOf(number), away = Math.hypot(px - x, py - y);
      if (Math.abs(z - deep) < 3 * radius && away < nearest) [best, nearest] = [number, away];
    }
    return best;
  }
}

// Height above a cloud's lowest point up to which it is drawn; all of it at a share of 1.
function cutHeight(cloud, share) {
  return share >= 0.999 ? 1e30 : cloud.floor + share * (cloud.ceiling - cloud.floor);
}
