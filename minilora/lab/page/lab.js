// The page's side: it asks the worker, and shows the events that come back.
import {bars, lines, picture, scale, waiting} from "./draw.js";

const $ = id => document.getElementById(id);
const say = (id, text) => { $(id).textContent = text; };
const place = relative => new URL(relative, document.baseURI).href;
const PANELS = {find: "find", read: "read", reuse: "read"};  // of a request; the others belong to "learn"
const BUTTONS = {train: ["train", "stop"], find: ["search", "halt"]};  // one begins it, the other stops it
let worker, session = {}, opened = [], truth = [];

// ---- asking

function ask(request) {
  worker.postMessage(request);
}

async function start() {
  say("status", "Loading Python, about 17 MB the first time …");
  const code = await (await fetch("worker.js")).blob();  // as a blob it stands under this page's policy
  worker = new Worker(URL.createObjectURL(new Blob([code], {type: "text/javascript"})));
  worker.onmessage = ({data}) => show[data.event](data);
  worker.onerror = error => show.failed({says: error.message});
  const pyodide = place(document.querySelector("meta[name=pyodide]").content);
  worker.postMessage({do: "start", pyodide, archive: place("minilora.zip")});
}

function config() {
  const targets = [...document.querySelectorAll("input[name=target]:checked")].map(box => box.value);
  return {rank: Number($("rank").value), alpha: Number($("alpha").value), targets};
}

function chosen() {  // what stands beside the sliders
  const {rank, alpha, targets} = config();
  say("rank-out", rank);
  say("alpha-out", alpha);
  say("factor", parseFloat((alpha / rank).toPrecision(3)));
  scale($("scale"), rank);
  say("scale-says", `To scale: one W of the attention, ${(96 * 96).toLocaleString("en")} numbers, and its B and A, ${(192 * rank).toLocaleString("en")}.`);
  $("own-field").hidden = $("text").value !== "own";
  if (session.ready) targets.length ? ask({do: "count", rank, alpha, targets}) : say("counted", "Choose at least one matrix.");
}

function running(what, yes) {  // while it runs, its button is the one that stops it, and Enter begins no other
  const [begin, end] = BUTTONS[what].map($);
  const focused = document.activeElement === (yes ? begin : end);
  begin.hidden = begin.disabled = yes;
  end.hidden = !yes;
  if (focused) (yes ? end : begin).focus();
}

// ---- showing

const show = {
  ready({says}) {
    session.ready = true;
    say("status", `${says} It took ${(performance.now() / 1000).toFixed(1)} s.`);
    say("read-says", "");
    for (const id of ["train", "search", "files"]) $(id).disabled = false;
    chosen();
  },

  counted({says}) {
    say("counted", says);
  },

  began({modules, steps, prompt, before}) {
    session = {...session, losses: [], steps, prompt};
    $("module").replaceChildren(...modules.map(name => new Option(name.replace(/^model\.layers\.(\d+)\.\w+\.(\w+)$/, "$2 of layer $1"), name)));
    $("module").disabled = false;
    written("before", before);
    for (const id of ["after", "merged"]) say(id, "…");
    $("merge-card").hidden = true;
  },

  learned({step, steps, loss, seconds, seen}) {
    session.losses.push([step, loss]);
    lines($("loss"), {series: [{points: session.losses, name: loss.toFixed(2)}], x: {to: steps, name: "step"}, y: {}});
    show.seen(seen);
    if (step % 10 === 0 || step === 1) say("learn-says", `Step ${step} of ${steps}: loss ${loss.toFixed(2)}, ${(1000 * seconds).toFixed(0)} ms.`);
  },

  seen({module, delta, values, energy, noise, says}) {
    $("module").value = module;
    picture($("delta"), delta);
    const rank = energy.length;
    const series = energy.map((_, i) => ({
      points: values.map((row, step) => [step + 1, row[i]]), opacity: 1 - 0.75 * i / rank,
      name: i === 0 ? "1st" : i === rank - 1 && rank > 3 ? "last" : "",
    }));
    lines($("values"), {series, x: {to: session.steps, name: "step"}, y: {}});
    shares($("energy"), energy, noise);
    say("energy-says", says);
  },

  compared({after, merged, difference, logits, milliseconds, says, pace}) {
    written("after", after);
    written("merged", merged);
    say("after-says", "With B and A beside W.");
    say("merged-says", after === merged ? "With W + BA as one matrix: the same, to the letter." : "With W + BA as one matrix: rounding has changed a letter.");
    say("merge-says", `W + BA is one matrix of W’s own size, so the model needs no more time than before. Merged or not, its scores for the next letter, which go up to ${logits}, differ by at most ${difference}: that is rounding.`);
    const rows = ["W alone", "W, with B and A beside it", "W + BA, merged"].map((name, i) => row([name, milliseconds[i].toFixed(1)]));
    $("times").replaceChildren(...rows);
    say("pace", pace);
    $("merge-card").hidden = false;
    say("learn-says", says);
    $("reuse").disabled = false;
  },

  wrote({plain, swapped, pairs, true: exact, rank}) {
    truth = exact;
    session.distances = [];
    const moved = new Set(pairs.join(""));
    spelled("plain", plain, moved);
    spelled("swapped", swapped, moved);
    $("swapped-texts").hidden = false;
    $("letters").replaceChildren(..."abcdefghijklmnopqrstuvwxyz".split("").map(letter => {
      const span = document.createElement("span");
      span.textContent = letter;
      if (moved.has(letter)) span.className = "moved";
      return span;
    }));
    say("find-says", `Training with rank ${rank} …`);
  },

  searched({step, steps, loss, values, found, delta}) {
    session.distances.push([step, loss]);
    bars($("bars"), {values, dark: found, rings: truth, x: "singular value"});
    picture($("rows"), delta);
    lines($("distance"), {series: [{points: session.distances, name: loss.toFixed(2)}], x: {to: steps, name: "step"}, y: {}});
    if (step % 10 === 0) say("find-says", `Step ${step} of ${steps}: distance ${loss.toFixed(2)}, largest drop after ${found}.`);
  },

  answered({says}) {
    say("find-says", says);
  },

  opened({modules, table, legend, says, notes}) {
    opened = modules;
    const head = document.createElement("thead"), body = document.createElement("tbody");
    head.append(row(table.head, "col"));
    body.append(...table.rows.map(cells => row(cells)));
    $("kinds").replaceChildren(head, body);
    say("legend", legend);
    $("opened-module").replaceChildren(...modules.map((m, i) => new Option(m.module, i)));
    $("notes").replaceChildren(...notes.map(text => element("li", text)));
    $("read-results").hidden = false;
    say("read-says", says);
    look();
  },

  refused({do: what, says}) {
    const panel = PANELS[what] ?? "learn";
    say(`${panel}-error`, says);
    say(`${panel}-says`, "");
    if (panel === "read") $("read-results").hidden = true;
  },

  failed({do: what, says}) {
    const lines = says.trim().split("\n");  // of a traceback the line that names the error
    const told = `This does not work here: ${lines.findLast(line => /Error/.test(line)) ?? lines[0]}`;
    if (session.ready && what) {
      show.refused({do: what, says: told});
      if (what in BUTTONS) running(what, false);
    } else {
      say("status", told);
      $("status").className = "error";
    }
  },

  over({do: what, stopped}) {
    if (what in BUTTONS) running(what, false);
    if (what === "train") {
      if (session.losses?.length) {
        say("learn-says", stopped ? "Stopped. Comparing …" : "Comparing before and after …");
        ask({do: "compare"});
      } else if (stopped) {
        say("learn-says", "Stopped before the first step.");
      }
    }
    if (what === "find" && stopped) say("find-says", "Stopped.");
  },
};

function element(name, text) {
  const node = document.createElement(name);
  node.textContent = text;
  return node;
}

function row(cells, scope = "row") {
  const line = document.createElement("tr");
  line.append(...cells.map((text, i) => {
    const cell = element(i === 0 || scope === "col" ? "th" : "td", text);
    if (cell.tagName === "TH") cell.scope = scope;
    return cell;
  }));
  return line;
}

function written(id, text) {  // what the model wrote, after the prompt in bold
  $(id).replaceChildren(element("b", session.prompt), text);
}

function spelled(id, text, moved) {  // with the letters that change places marked
  $(id).replaceChildren(...[...text].map(letter => moved.has(letter) ? element("mark", letter) : letter));
}

function shares(svg, energy, noise) {
  const points = shares => [[0, 0], ...shares.map((share, i) => [i + 1, 100 * share])];
  const series = [{points: points(noise), kind: "noise"}, {points: points(energy), name: "ΔW"}];
  lines(svg, {series, x: {to: energy.length, name: "strongest directions"}, y: {to: 100, unit: " %"}});
}

function look() {  // at a module of the opened adapter
  const m = opened[Number($("opened-module").value)];
  bars($("opened-values"), {values: m.values.slice(0, 64), dark: m.values.length, rings: [], x: "singular value"});
  shares($("opened-energy"), m.energy, m.noise);
  say("opened-says", m.says);
}

// ---- listening

$("learn-form").addEventListener("input", event => { if (event.target.id !== "own" && event.target.id !== "prompt") chosen(); });
$("learn-form").addEventListener("submit", event => {
  event.preventDefault();
  say("learn-error", "");
  say("learn-says", "The frozen model writes …");
  running("train", true);
  session.losses = [];
  ask({do: "train", ...config(), text: $("text").value, own: $("own").value, prompt: $("prompt").value});
});
$("module").addEventListener("change", () => ask({do: "look", module: $("module").value}));
$("pairs").addEventListener("input", () => say("pairs-out", $("pairs").value));
$("find-form").addEventListener("submit", event => {
  event.preventDefault();
  say("find-error", "");
  say("find-says", "The model writes a text …");
  running("find", true);
  ask({do: "find", pairs: Number($("pairs").value)});
});
for (const id of ["stop", "halt"]) $(id).addEventListener("click", () => ask({do: "stop"}));

function reading() {
  say("read-error", "");
  say("read-says", "Reading …");
}

function read(files) {
  if (!files.length) return;
  if (!session.ready) return say("read-says", "Python is still loading. Drop the files again when it is ready.");
  reading();
  ask({do: "read", files, name: files.map(file => file.name).join(" and ")});
}

$("files").addEventListener("change", () => {
  read([...$("files").files]);
  $("files").value = "";  // so that the same file can be chosen again
});
$("reuse").addEventListener("click", () => {
  reading();
  ask({do: "reuse"});
});
$("opened-module").addEventListener("change", look);
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("drop").addEventListener(name, event => {
    $("drop").classList.toggle("over", over);
    if (name === "drop") read([...event.dataTransfer.files]);
  });
}

for (const name of ["dragover", "drop"]) {  // of files, wherever: the browser would show them in the page's place
  window.addEventListener(name, event => { if (event.dataTransfer.types.includes("Files")) event.preventDefault(); });
}

for (const id of ["loss", "values", "energy"]) waiting($(id), "press Train");
for (const id of ["bars", "distance"]) waiting($(id), "press Swap and train");
chosen();
start().catch(error => show.failed({says: error.message}));
