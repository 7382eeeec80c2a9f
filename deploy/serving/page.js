"use strict";
// A request from the golden pair, sent as it is edited; answers as bars, latencies as dots.
const $ = (id) => document.getElementById(id);
const times = [];
const MOST_BARS = 20;
const KEPT = 400;

async function ask(path, options) {
  const answer = await fetch(path, options);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error || `status ${answer.status}`);
  return body;
}

async function start() {
  const models = await ask("/v2/repository/index", { method: "POST" });
  for (const model of models) $("model").add(new Option(`${model.name} (version ${model.version})`, model.name));
  $("state").textContent = models.length === 1 ? "1 model is ready" : `${models.length} models are ready`;
  await choose();
}

async function choose() {
  const name = $("model").value;
  const described = await ask(`/v2/models/${encodeURIComponent(name)}`);
  const rows = [...described.inputs.map((t) => ["input", t]), ...described.outputs.map((t) => ["output", t])];
  $("tensors").tBodies[0].replaceChildren(...rows.map(([kind, tensor]) => {
    const row = document.createElement("tr");
    const shape = tensor.shape.map((size) => (size < 0 ? "any" : size)).join(" × ");
    for (const text of [kind, tensor.name, shape, tensor.datatype]) row.insertCell().textContent = text;
    return row;
  }));
  $("request").value = JSON.stringify(await ask(`/v2/models/${encodeURIComponent(name)}/example`));
}

async function send() {
  const began = performance.now();
  const answer = await ask(`/v2/models/${encodeURIComponent($("model").value)}/infer`, {
    method: "POST", headers: { "content-type": "application/json" }, body: $("request").value,
  });
  times.push(performance.now() - began);
  if (times.length > KEPT) times.shift();
  return answer;
}

function draw(answer) {
  const parts = answer.outputs.map((output) => {
    const part = document.createElement("div");
    const heading = document.createElement("p");
    heading.textContent = `${output.name}, ${output.shape.join(" × ")} ${output.datatype}`;
    part.append(heading);
    const width = output.shape.length > 1 ? output.shape[output.shape.length - 1] : output.data.length;
    const values = output.data.slice(0, width).map(Number);
    const order = values.map((value, index) => [value, index]).sort((a, b) => b[0] - a[0]).slice(0, MOST_BARS);
    const shown = values.length <= MOST_BARS ? values.map((value, index) => [value, index]) : order;
    const low = Math.min(0, ...values), high = Math.max(low + 1e-9, 0, ...values);
    for (const [value, index] of shown) {
      const bar = document.createElement("div");
      bar.className = "bar";
      const [label, track, fill, number] = ["span", "div", "div", "output"].map((tag) => document.createElement(tag));
      label.textContent = index;
      track.className = "track";
      fill.style.left = `${(100 * (Math.min(0, value) - low)) / (high - low)}%`;
      fill.style.width = `${(100 * Math.abs(value)) / (high - low)}%`;
      track.append(fill);
      number.textContent = value.toPrecision(4);
      bar.append(label, track, number);
      part.append(bar);
    }
    return part;
  });
  $("answer").replaceChildren(...parts);
}

function plot() {
  const canvas = $("latency"), pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const sorted = [...times].sort((a, b) => a - b);
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const top = Math.max(1, at(0.99) * 1.2), left = 70;
  pen.font = "16px system-ui, sans-serif";
  pen.fillStyle = style.getPropertyValue("--quiet");
  for (const share of [0, 0.5, 1]) pen.fillText(`${(top * share).toFixed(1)} ms`, 0, (canvas.height - 20) * (1 - share) + 16);
  pen.fillStyle = style.getPropertyValue("--mark");
  times.forEach((time, index) => {
    const x = left + ((index + 0.5) * (canvas.width - left)) / Math.max(20, times.length);
    const y = (canvas.height - 6) * (1 - Math.min(1, time / top)) + 3;
    pen.beginPath();
    pen.arc(x, y, 3, 0, 2 * Math.PI);
    pen.fill();
  });
  $("summary").textContent = `${times.length} requests: median ${at(0.5).toFixed(2)} ms, 90% within ${at(0.9).toFixed(2)} ms, 99% within ${at(0.99).toFixed(2)} ms`;
}

async function run(count) {
  const buttons = document.querySelectorAll("button");
  buttons.forEach((button) => { button.disabled = true; });
  try {
    let answer;
    for (let turn = 0; turn < count; turn += 1) answer = await send();
    draw(answer);
    plot();
    $("status").className = "quiet";
    $("status").textContent = `answered in ${times[times.length - 1].toFixed(2)} ms`;
  } catch (error) {
    $("status").className = "bad";
    $("status").textContent = String(error.message || error);
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
}

$("model").addEventListener("change", choose);
$("form").addEventListener("submit", (event) => { event.preventDefault(); run(1); });
$("repeat").addEventListener("click", () => run(200));
start().catch((error) => { $("state").className = "bad"; $("state").textContent = String(error.message || error); });
