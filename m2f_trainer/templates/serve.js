"use strict";
const find = selector => document.querySelector(selector);
const model = JSON.parse(find("main").dataset.model);
const canvas = find("canvas"), slider = find("input[type=range]"), drop = find(".drop"), auto = find("#auto");
const classes = new Map(model.categories.map(({ id, name }, index) => [id, { name, index }]));
const lowest = Math.min(0.05, ...Object.values(model.thresholds));
const SHORTEST = 800, LONGEST = 1600, MOST_LABELS = 20;  // of the longer side of the canvas, in pixels
let shown = null, latest = 0;

// The index-th colour, as in the package's own pictures.
const color = index => {
  const hue = (0.58 + index * 0.618033988749895) % 1, value = [1, 0.9][index % 2];
  const channel = n => { const k = (n + hue * 6) % 6;
    return Math.round(255 * value * (1 - [0.75, 0.9, 0.6][index % 3] * Math.max(0, Math.min(k, 4 - k, 1)))) };
  return [channel(5), channel(3), channel(1)];
};

// COCO's compressed run lengths: five bits a character, from the fourth number on as differences.
const runsOf = counts => {
  const runs = [];
  for (let at = 0; at < counts.length;) {
    let number = 0, scale = 1, code;
    do { code = counts.charCodeAt(at++) - 48; number += (code & 31) * scale; scale *= 32 } while (code & 32);
    if (code & 16) number -= scale;
    runs.push(runs.length > 2 ? number + runs[runs.length - 2] : number);
  }
  return runs;
};

// The mask of an instance inside its box, column by column.
const maskOf = ({ size: [height, width], counts }) => {
  const spans = [];
  let position = 0, [x0, y0, x1, y1] = [width, height, 0, 0];
  runsOf(counts).forEach((run, index) => {
    if (index % 2 && run) {
      const last = position + run - 1, first = Math.floor(position / height), end = Math.floor(last / height);
      spans.push([position, position + run]);
      x0 = Math.min(x0, first); x1 = Math.max(x1, end + 1);
      y0 = Math.min(y0, first < end ? 0 : position % height); y1 = Math.max(y1, first < end ? height : last % height + 1);
    }
    position += run;
  });
  const rows = y1 - y0, bits = new Uint8Array(Math.max(0, x1 - x0) * Math.max(0, rows));
  for (const [start, end] of spans) for (let at = start; at < end;) {
    const x = Math.floor(at / height), stop = Math.min(end, (x + 1) * height);
    bits.fill(1, (x - x0) * rows + at - x * height - y0, (x - x0) * rows + stop - x * height - y0);
    at = stop;
  }
  return { x0, y0, x1, y1, rows, bits, area: spans.reduce((sum, [start, end]) => sum + end - start, 0) };
};

// A mask as a picture at the scale of the canvas: tinted, with an outline.
const stampOf = (mask, scale, ink) => {
  const width = Math.max(1, Math.round((mask.x1 - mask.x0) * scale)), height = Math.max(1, Math.round(mask.rows * scale));
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && mask.bits[
    Math.min(mask.x1 - mask.x0 - 1, Math.floor((x + 0.5) / scale)) * mask.rows + Math.min(mask.rows - 1, Math.floor((y + 0.5) / scale))];
  const pixels = new ImageData(width, height);
  for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < width; x++, at += 4) if (inside(x, y)) {
    const edge = !(inside(x - 1, y) && inside(x + 1, y) && inside(x, y - 1) && inside(x, y + 1));
    pixels.data.set([...ink, edge ? 255 : 115], at);
  }
  const stamp = document.createElement("canvas");
  Object.assign(stamp, { width, height }).getContext("2d").putImageData(pixels, 0, 0);
  return stamp;
};

const isShown = ({ score, category_id }) =>
  score > (auto.ariaPressed === "true" ? model.thresholds[category_id] : Number(slider.value));

const draw = () => {
  if (!shown) return;
  const { photo, scale, instances } = shown, context = canvas.getContext("2d");
  context.fillStyle = "#777";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (photo) context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  const visible = instances.filter(isShown);
  for (const { mask, stamp } of visible) context.drawImage(stamp, Math.round(mask.x0 * scale), Math.round(mask.y0 * scale));
  const taken = [];
  if (visible.length <= MOST_LABELS) visible.sort((a, b) => b.score - a.score).forEach(one => write(one, taken));
  const counts = new Map();
  for (const { category_id } of visible) counts.set(category_id, (counts.get(category_id) || 0) + 1);
  find("ul").replaceChildren(...[...counts].sort(([a], [b]) => a - b).map(([id, count]) => {
    const item = document.createElement("li"), square = document.createElement("i");
    if (classes.size > 1) { square.style.background = `rgb(${color(classes.get(id).index)})`; item.append(square) }
    item.append(`${classes.get(id).name} ${count}`);
    return item;
  }));
  find("output").textContent = auto.ariaPressed === "true" ? "" : Number(slider.value).toFixed(2);
};

// The label of an instance that is larger than its label, where it covers no label of a better one.
const write = ({ mask, ink, score, category_id }, taken) => {
  const context = canvas.getContext("2d"), size = Math.max(11, Math.min(canvas.width, canvas.height) / 36);
  const text = `${classes.size > 1 ? classes.get(category_id).name + " " : ""}${Math.round(100 * score)}%`;
  context.font = `${size}px system-ui, sans-serif`;
  const width = context.measureText(text).width + 6, height = size * 1.3;
  const x = Math.max(0, Math.min(mask.x0 * shown.scale, canvas.width - width)), y = Math.max(0, mask.y0 * shown.scale - height);
  if ((mask.x1 - mask.x0) * mask.rows * shown.scale ** 2 < width * height) return;
  if (taken.some(([left, top, right, bottom]) => x < right && left < x + width && y < bottom && top < y + height)) return;
  taken.push([x, y, x + width, y + height]);
  context.fillStyle = `rgb(${ink})`;
  context.fillRect(x, y, width, height);
  context.fillStyle = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2] > 140 ? "#000" : "#fff";
  context.fillText(text, x + 3, y + size);
};

const say = (text, failed = false) => {
  const status = find("#status");
  status.textContent = text;
  status.classList.toggle("error", failed);
};

const predict = async file => {
  const mine = ++latest;
  say(`${file.name || "Image"}: predicting ...`);
  shown = null;
  find("#result").hidden = true;
  try {
    const started = performance.now();
    const [photo, answer] = await Promise.all([
      createImageBitmap(file).catch(() => null),
      fetch(`instances?threshold=${lowest}`, { method: "POST", body: file }),
    ]);
    const results = await answer.json();
    if (mine !== latest) return;
    if (!answer.ok) throw new Error(results.detail);
    const [height, width] = results.length ? results[0].segmentation.size : [photo?.height || 1, photo?.width || 1];
    const scale = Math.max(SHORTEST, Math.min(LONGEST, Math.max(height, width))) / Math.max(height, width);
    Object.assign(canvas, { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) });
    const instances = results.map((result, index) => {
      const mask = maskOf(result.segmentation), ink = color(classes.size > 1 ? classes.get(result.category_id).index : index);
      return { ...result, mask, ink, stamp: stampOf(mask, scale, ink) };
    }).sort((a, b) => b.mask.area - a.mask.area);
    shown = { photo, scale, instances, results, name: (file.name || "image").replace(/\.[^.]*$/, "") };
    find("#result").hidden = false;
    draw();
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    say(`${file.name || "Image"}: ${width} x ${height}, ${seconds} s${photo ? "" : "; the browser can't show this format"}`);
  } catch (error) {
    if (mine === latest) say(`${file.name || "Image"}: ${error.message}`, true);
  }
};

const save = (content, name) => {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(content), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
};

find("input[type=file]").onchange = event => { if (event.target.files.length) predict(event.target.files[0]) };
document.ondragover = event => { event.preventDefault(); drop.classList.add("over") };
document.ondragleave = () => drop.classList.remove("over");
document.ondrop = event => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) predict(event.dataTransfer.files[0]);
};
document.onpaste = event => { if (event.clipboardData.files.length) predict(event.clipboardData.files[0]) };
slider.oninput = () => { auto.ariaPressed = "false"; draw() };
auto.onclick = () => { auto.ariaPressed = String(auto.ariaPressed !== "true"); draw() };
find("#coco").onclick = () =>
  save(new Blob([JSON.stringify(shown.results.filter(isShown))], { type: "application/json" }), `${shown.name}.json`);
find("#picture").onclick = () => canvas.toBlob(content => save(content, `${shown.name}.png`));
