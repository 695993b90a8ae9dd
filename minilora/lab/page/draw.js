// Numbers -> SVG and canvas. Nothing is computed here but places on the paper.
const WIDE = 360, HIGH = 220, LEFT = 42, RIGHT = 52, TOP = 12, BOTTOM = 36;

function make(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function ticks(most) {  // 0 and two to five round numbers
  const rough = most / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(factor => factor * power >= rough) * power;
  return Array.from({length: Math.floor(most / step + 1e-9) + 1}, (_, i) => i * step);
}

const label = (value, unit = "") => `${parseFloat(value.toPrecision(3))}${unit}`;

function paper(svg, {x, y}) {  // an empty chart; x and y: {from, to, name, unit}; returns the two scales
  svg.setAttribute("viewBox", `0 0 ${WIDE} ${HIGH}`);
  const from = x.from ?? 0, to = Math.max(x.to, from + 1), most = y.to || 1;
  const across = value => LEFT + (value - from) / (to - from) * (WIDE - LEFT - RIGHT);
  const up = value => HIGH - BOTTOM - value / most * (HIGH - TOP - BOTTOM);
  const parts = [];
  for (const value of ticks(most)) {
    parts.push(make("line", {class: "grid", x1: LEFT, x2: WIDE - RIGHT, y1: up(value), y2: up(value)}));
    parts.push(make("text", {x: LEFT - 6, y: up(value) + 4, "text-anchor": "end"}, label(value, y.unit)));
  }
  for (const value of x.at ?? ticks(to).filter(value => value >= from)) {
    parts.push(make("text", {x: across(value), y: HIGH - BOTTOM + 16, "text-anchor": "middle"}, label(value)));
  }
  parts.push(make("text", {x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 4, "text-anchor": "middle"}, x.name));
  svg.replaceChildren(...parts);
  return {across, up};
}

export function waiting(svg, text) {  // an empty chart that says what fills it
  const {up} = paper(svg, {x: {to: 1, at: [], name: ""}, y: {to: 1}});
  svg.querySelectorAll("text").forEach(node => node.remove());
  svg.append(make("text", {x: (LEFT + WIDE - RIGHT) / 2, y: up(0.22), "text-anchor": "middle"}, text));
}

export function lines(svg, {series, x, y}) {  // series: {points: [[x, y], ...], kind, opacity, name}
  const highest = Math.max(0, ...series.flatMap(s => s.points.map(([, value]) => value)));
  const {across, up} = paper(svg, {x, y: {...y, to: y.to ?? highest * 1.05}});
  for (const {points, kind = "", opacity = 1, name} of series) {
    if (!points.length) continue;
    const path = points.map(([a, b], i) => `${i ? "L" : "M"}${across(a).toFixed(1)} ${up(b).toFixed(1)}`).join("");
    svg.append(make("path", {class: `line ${kind}`, d: path, opacity}));
    const [a, b] = points.at(-1);
    if (!kind) svg.append(make("circle", {class: "dot", cx: across(a), cy: up(b), r: 2.5, opacity}));
    if (name) svg.append(make("text", {x: across(a) + 6, y: up(b) + 4}, name));
  }
}

export function bars(svg, {values, dark, rings, x}) {  // the first `dark` bars stand out
  const most = Math.max(...values, ...rings, 0) * 1.05;
  const at = values.map((_, i) => i + 1);
  const {across, up} = paper(svg, {x: {name: x, from: 0.5, to: values.length + 0.5, at}, y: {to: most}});
  const width = (across(2) - across(1)) * 0.7;
  values.forEach((value, i) => svg.append(make("rect", {
    class: i < dark ? "bar" : "bar rest", x: across(i + 1) - width / 2, width, y: up(value), height: up(0) - up(value),
  })));
  rings.forEach((value, i) => svg.append(make("circle", {class: "ring", cx: across(i + 1), cy: up(value), r: 4})));
}

export function picture(canvas, {rows, columns, bytes}) {  // 128 is the paper, 255 blue, 1 orange
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi)?.map(hex => parseInt(hex, 16));
  const [paper, blue, orange] = ["--card", "--blue", "--orange"].map(colour);
  const levels = atob(bytes), context = canvas.getContext("2d");
  canvas.width = columns;
  canvas.height = rows;
  const image = context.createImageData(columns, rows);
  for (let i = 0; i < levels.length; i++) {
    const level = (levels.charCodeAt(i) - 128) / 127, share = Math.abs(level), end = level > 0 ? blue : orange;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = paper[c] + share * (end[c] - paper[c]);
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

export function scale(svg, rank, width = 96) {  // W, B and A in true proportion
  const side = 110, thin = side * rank / width, top = 20, gap = 24, b = side + gap, a = b + thin + gap;
  const middle = top + side / 2, sign = {class: "name", y: middle + 4, "text-anchor": "middle"};
  const name = {class: "name", y: top - 7}, under = {y: top + side + 17};
  svg.setAttribute("viewBox", `0 0 ${2 * side + side / 3 + 2 * gap} ${top + side + 20}`);
  svg.replaceChildren(
    make("rect", {class: "w", x: 0, y: top, width: side, height: side}),
    make("rect", {class: "b", x: b, y: top, width: thin, height: side}),
    make("rect", {class: "a", x: a, y: middle - thin / 2, width: side, height: thin}),
    make("text", {...name, x: 0}, "W, frozen"), make("text", {...name, x: b}, "B"),
    make("text", {...name, x: a, y: middle - thin / 2 - 7}, "A"),
    make("text", {...sign, x: b - gap / 2}, "+"), make("text", {...sign, x: a - gap / 2}, "×"),
    make("text", {...under, x: 0}, `${width} × ${width}`), make("text", {...under, x: b}, `${width} × ${rank} and ${rank} × ${width}`),
  );
}
