// The web page of serve.py. Model output is inserted as text only (textContent), never as HTML.

const $ = (id) => document.getElementById(id);
const make = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
};

// ------------------------------------------------------------------ language
//
// English is the key. Strings with {0}, {1} have values filled in.

const CHINESE = {
  Play: "试用", Run: "训练过程", Views: "视图", Prompt: "提示词", Generate: "生成", Stop: "停止", Sampling: "采样",
  Temperature: "温度", "Top-p": "Top-p", "Top-k": "Top-k", Length: "长度", Samples: "生成段数", Results: "生成结果", Seed: "种子", random: "随机",
  Loss: "损失", training: "训练", validation: "验证", by: "横轴", iterations: "迭代次数", tokens: "词元数", time: "时间",
  "Samples during training": "训练期间生成的文本", Copy: "复制", Copied: "已复制", all: "全部", "0 · greedy": "0 · 贪心",
  "Paler tokens were more probable. Hover over a token, or use the arrow keys, to see its top 10 alternatives.":
    "颜色越浅，概率越高。把鼠标移到词元上，或用方向键，可查看概率最高的 10 个候选词元。",
  "Enter a prompt and press Generate.": "输入提示词，然后点击“生成”。",
  "No training log (metrics.jsonl) was found for this model, so there are no curves to show.":
    "没有找到该模型的训练日志（metrics.jsonl），因此没有曲线。",
  'No samples yet. train.py --sample_prompt="…" generates samples at each evaluation.':
    '暂无生成的文本。train.py --sample_prompt="…" 会在每次评估时生成几段文本。',
  "This server requires a token. It was printed when the server started.": "访问此服务器需要令牌。启动服务器时，终端中已打印该令牌。",
  Continue: "继续", "waiting for the first token …": "正在等待第一个词元…", " · stopped": " · 已停止", " · end of text": " · 文本结束",
  "{0} tokens": "{0} 个词元", ", {0} tokens/s": "，每秒 {0} 个", ", first token after {0} ms": "，首个词元用时 {0} 毫秒",
  "{0} tokens · perplexity {1}": "{0} 个词元 · 困惑度 {1}", "{0}: probability {1}, {2}": "{0}：概率 {1}，{2}",
  "not in the top 10": "不在前 10 名", "rank {0}": "第 {0} 名", "iteration {0}": "第 {0} 次迭代",
  "{0}: training {1}": "{0}：训练损失 {1}", "validation {0}": "验证损失 {0}", "loss (nats/token)": "损失（nats/词元）",
  "training and validation loss": "训练损失和验证损失", "tokens trained on": "训练词元数", "training time": "训练时间",
  iteration: "迭代次数", "training loss": "训练损失", "best validation loss": "最低验证损失", "tokens/s": "词元/秒", "time left": "剩余时间",
  "{0} s": "{0} 秒", "{0} min": "{0} 分钟", "{0} h": "{0} 小时",
  "{0} parameters": "{0} 个参数", "counting ({0}-grams): {1}": "{0}-gram 统计模型的损失 {1}", "context length: {0}": "上下文长度：{0}", "vocabulary: {0} {1}": "词表：{0} {1}",
  characters: "个字符", bytes: "个字节", "tokens ": "个词元", "validation loss {0}": "验证损失 {0}",
  "no checkpoint yet: the run is shown, and can be tried out as soon as it has saved one":
    "还没有检查点：先显示训练过程，保存第一个检查点后即可试用",
  "the server returned HTTP {0}": "服务器返回 HTTP {0}", "show in the curve": "在曲线中显示", "Loss curves": "损失曲线",
};
const chinese = navigator.language.toLowerCase().startsWith("zh");
function t(english, ...values) {
  const pattern = (chinese && CHINESE[english]) || english;
  return pattern.replace(/\{(\d)\}/g, (_, i) => values[i]);
}

if (chinese) {
  document.documentElement.lang = "zh";
  for (const element of document.querySelectorAll("h2, label, button, summary, option, p, .key, [placeholder], [aria-label]")) {
    for (const name of ["placeholder", "aria-label"]) if (element.hasAttribute(name)) element.setAttribute(name, t(element.getAttribute(name)));
    const whole = CHINESE[element.textContent.trim().replace(/\s+/g, " ")];
    if (whole && !element.querySelector("output, select, span[id], .scale")) element.textContent = whole;
    for (const node of element.childNodes) {
      const key = node.nodeType === Node.TEXT_NODE ? node.textContent.trim() : "";
      if (CHINESE[key]) node.textContent = node.textContent.replace(key, CHINESE[key]);
    }
  }
}

// ------------------------------------------------------------------ server

let token = sessionStorage.getItem("nanogpt-token") ?? "";
const fromLink = new URLSearchParams(location.hash.slice(1)).get("token");
if (fromLink) {
  token = fromLink;
  sessionStorage.setItem("nanogpt-token", token);
  history.replaceState(null, "", location.pathname); // keep the token out of the address bar and the history
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askForToken();
    return ask(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? t("the server returned HTTP {0}", response.status));
  }
  return response;
}

let asking = null;
function askForToken() {
  asking ??= new Promise((resolve) => {
    const dialog = $("ask-token");
    dialog.addEventListener("close", () => {
      token = $("token").value.trim();
      sessionStorage.setItem("nanogpt-token", token);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of chunks(response.body)) {
    rest += decoder.decode(bytes, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.releaseLock();
  }
}

// ------------------------------------------------------------------ sliders

const TOP_K = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
let longest = 4096;
const meaning = {
  temperature: (v) => [Number(v), v == 0 ? t("0 · greedy") : Number(v).toFixed(2)],
  top_p: (v) => [Number(v), v == 1 ? t("all") : Number(v).toFixed(2)],
  top_k: (v) => [TOP_K[v], TOP_K[v] || t("all")],
  length: (v) => [Math.min(2 ** v, longest), t("{0} tokens", Math.min(2 ** v, longest))],
  samples: (v) => [Number(v), v],
};
for (const id of Object.keys(meaning)) {
  const input = $(id);
  const kept = localStorage.getItem(`nanogpt-${id}`);
  if (kept !== null) input.value = kept;
  const show = () => {
    const shown = String(meaning[id](input.value)[1]);
    document.querySelector(`output[for="${id}"]`).textContent = shown;
    input.setAttribute("aria-valuetext", shown);
  };
  input.addEventListener("input", () => {
    localStorage.setItem(`nanogpt-${id}`, input.value);
    show();
  });
  show();
}
if (matchMedia("(max-width: 860px)").matches) $("controls").open = false; // on phones, show the results first
const setting = (id) => meaning[id]($(id).value)[0];

// ------------------------------------------------------------------ generation

let controller = null;

async function write() {
  controller?.abort();
  const mine = (controller = new AbortController());
  const prompt = $("prompt").value || "\n"; // as --start of sample.py
  const seed = $("seed").value.trim();
  const samples = setting("samples");
  hideAlternatives();
  $("error").hidden = $("empty").hidden = true;
  $("legend").hidden = false;
  $("stop").disabled = false;
  $("status").textContent = t("waiting for the first token …");
  const results = Array.from({ length: samples }, () => new Sample(prompt));
  $("results").replaceChildren(...results.map((sample) => sample.card));
  const started = performance.now();
  let first = 0;
  let count = 0;
  const report = (end) => {
    const seconds = (performance.now() - started - first) / 1000;
    const speed = count > 1 ? t(", {0} tokens/s", ((count - 1) / Math.max(seconds, 1e-3)).toFixed(0)) : "";
    const wait = first ? t(", first token after {0} ms", first.toFixed(0)) : "";
    $("status").textContent = `${t("{0} tokens", count)}${speed}${wait}${end}`;
  };
  try {
    const body = {
      prompt,
      n: samples,
      max_tokens: setting("length"),
      temperature: setting("temperature"),
      top_p: setting("top_p"),
      top_k: setting("top_k"),
      logprobs: 10,
      slide: true, // a prompt longer than the context is cut at its beginning, as in sample.py
      stream: true,
      ...(seed ? { seed: Number(seed) } : {}),
    };
    const response = await ask("v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: mine.signal,
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        first ||= performance.now() - started;
        count += choice.logprobs?.tokens.length ?? 0;
        results[choice.index].add(choice);
      }
      report("");
    }
    report("");
  } catch (error) {
    if (error.name === "AbortError") {
      report(t(" · stopped"));
    } else {
      $("error").textContent = error.message;
      $("error").hidden = false;
      $("status").textContent = "";
      if (!count) {
        $("results").replaceChildren();
        $("legend").hidden = true;
      }
    }
  } finally {
    for (const sample of results) sample.end();
    if (controller === mine) {
      controller = null;
      $("stop").disabled = true;
    }
  }
}

class Sample {
  constructor(prompt) {
    this.content = prompt;
    this.tokens = [];
    this.bytes = []; // bytes of a character split over several tokens
    this.parts = [];
    this.surprise = 0;
    this.card = make("article", "sample writing");
    const head = make("header");
    this.note = make("span", "", "…");
    const copy = make("button", "", t("Copy"));
    copy.type = "button";
    copy.addEventListener("click", () => copyText(this.content, copy));
    head.append(this.note, copy);
    this.text = make("p", "text");
    this.text.dir = "auto";
    this.text.append(make("span", "given", prompt));
    this.card.append(head, this.text);
  }

  add(choice) {
    this.content += choice.text;
    const { tokens, token_logprobs, top_logprobs } = choice.logprobs;
    const spans = document.createDocumentFragment();
    let left = choice.text; // text not yet assigned to tokens; the last token may extend into a stop string
    for (const [i, content] of tokens.entries()) {
      this.surprise -= token_logprobs[i];
      const token = { content, logprob: token_logprobs[i], top: top_logprobs[i] ?? {} };
      this.tokens.push(token);
      this.parts.push(token);
      let shown = content;
      if (content.startsWith("bytes:\\x")) {
        this.bytes.push(...content.slice(8).split("\\x").map((byte) => parseInt(byte, 16)));
        shown = whole(this.bytes);
        if (shown === null) continue;
      } else if (this.bytes.length) {
        shown = "\ufffd" + content;
      }
      this.bytes = [];
      const at = left.indexOf(shown);
      if (at >= 0) left = left.slice(at + shown.length);
      spans.append(tokenSpan(shown, this.parts));
      this.parts = [];
    }
    this.text.append(spans);
    this.finish = choice.finish_reason ?? this.finish;
    this.describe();
    if (choice.finish_reason) this.end();
  }

  describe() {
    const count = this.tokens.length;
    const ended = { stop: t(" · end of text") }[this.finish] ?? "";
    this.note.textContent = t("{0} tokens · perplexity {1}", count, Math.exp(this.surprise / Math.max(count, 1)).toFixed(2)) + ended;
  }

  end() {
    this.card.classList.remove("writing");
  }
}

function whole(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes));
  } catch {
    return bytes.length >= 4 ? "\ufffd" : null;
  }
}

const alternativesOf = new WeakMap();

function tokenSpan(shown, parts) {
  const span = make("span", "t", shown);
  const logprob = parts.reduce((sum, part) => sum + part.logprob, 0);
  // Shading: none at probability 1, full at 1/1000.
  span.style.setProperty("--s", Math.min(1, -logprob / Math.log(1000)).toFixed(3));
  alternativesOf.set(span, parts);
  return span;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // The clipboard API requires HTTPS or localhost; copying a selection works without.
    const area = make("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = t("Copied");
  setTimeout(() => (button.textContent = t("Copy")), 1200);
}

// ------------------------------------------------------------------ alternatives

let shownFor = null;
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)}%` : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : "< 0.1%");

function showAlternatives(span) {
  const box = $("alternatives");
  shownFor?.classList.remove("on");
  shownFor = span;
  span.classList.add("on");
  box.replaceChildren(...alternativesOf.get(span).flatMap(alternativesTable));
  box.hidden = false;
  const target = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = box;
  const below = target.bottom + 6;
  box.style.left = `${Math.max(8, Math.min(target.left, innerWidth - width - 8))}px`;
  box.style.top = `${below + height > innerHeight - 8 ? Math.max(8, target.top - height - 6) : below}px`;
}

function alternativesTable(token) {
  const table = make("table");
  const ranked = Object.entries(token.top).sort((a, b) => b[1] - a[1]);
  for (const [content, logprob] of ranked.slice(0, 11)) {
    const row = make("tr", content === token.content ? "chosen" : "");
    const bar = make("span", "bar");
    bar.style.setProperty("--p", Math.exp(logprob - ranked[0][1]).toFixed(4)); // relative to the likeliest
    const cell = make("td");
    cell.append(bar);
    row.append(make("td", "", visible(content)), cell, make("td", "", percent(Math.exp(logprob))));
    table.append(row);
  }
  const rank = ranked.findIndex(([content]) => content === token.content) + 1;
  const place = rank > 10 || !rank ? t("not in the top 10") : t("rank {0}", rank);
  return [make("p", "", t("{0}: probability {1}, {2}", visible(token.content), percent(Math.exp(token.logprob)), place)), table];
}

function hideAlternatives() {
  shownFor?.classList.remove("on");
  shownFor = null;
  $("alternatives").hidden = true;
}

$("results").addEventListener("pointerover", (event) => {
  if (event.pointerType !== "touch" && event.target.matches(".t")) showAlternatives(event.target);
});
$("results").addEventListener("pointerleave", (event) => event.pointerType !== "touch" && hideAlternatives());
document.addEventListener("click", (event) => {
  if (event.target instanceof Element && event.target.matches(".t")) showAlternatives(event.target);
  else if (!$("alternatives").contains(event.target)) hideAlternatives();
});
addEventListener("scroll", hideAlternatives, { passive: true });

// ------------------------------------------------------------------ keys

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
$("stop").addEventListener("click", () => controller?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!$("play").hidden) write();
  } else if (event.key === "Escape") {
    if (shownFor) hideAlternatives();
    else controller?.abort();
  } else if (/^Arrow(Left|Right)$/.test(event.key)) {
    const step = event.key === "ArrowRight" ? 1 : -1;
    if (event.target.matches?.('[role="tab"]')) {
      select(event.target.id === "tab-play" ? "run" : "play", true);
    } else if (!event.target.matches?.("input, textarea, select")) {
      const spans = [...$("results").querySelectorAll(".t")];
      const next = spans[shownFor ? spans.indexOf(shownFor) + step : 0];
      if (next) {
        event.preventDefault();
        next.scrollIntoView({ block: "nearest" });
        showAlternatives(next);
      }
    }
  }
});

function select(view, focus = false) {
  for (const name of ["play", "run"]) {
    $(name).hidden = name !== view;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === view));
    $(`tab-${name}`).tabIndex = name === view ? 0 : -1;
  }
  if (focus) $(`tab-${view}`).focus();
  hideAlternatives();
  if (view === "run") draw();
}
for (const name of ["play", "run"]) $(`tab-${name}`).addEventListener("click", () => select(name));

// ------------------------------------------------------------------ training run

const run = { steps: [], evals: [], position: "", sample: -1, changed: 0, moved: false, marked: null };

async function follow() {
  for (;;) {
    let more = false;
    try {
      more = await look();
    } catch {
      $("live").hidden = true; // server unreachable; keep polling
    }
    await new Promise((resolve) => setTimeout(resolve, more ? 0 : document.hidden ? 5000 : 1000));
  }
}

async function look() {
  const answer = await (await ask(`run/metrics?after=${encodeURIComponent(run.position)}`)).json();
  const began = run.position === "";
  if (answer.anew) {
    run.steps = [];
    run.evals = [];
    run.moved = true;
  }
  run.position = answer.next;
  for (const row of answer.rows) (row.event === "step" ? run.steps : run.evals).push(row);
  if (answer.rows.length) {
    run.moved = true;
    if (!began) run.changed = performance.now();
  }
  $("live").hidden = !run.changed || performance.now() - run.changed > 30000;
  if (answer.rows.some((row) => row.event === "eval") || began || answer.anew) await lookAtSamples(answer.anew);
  if (run.moved && !$("run").hidden) draw();
  return answer.rows.length > 1000;
}

async function lookAtSamples(anew) {
  if (anew) {
    run.sample = -1;
    $("run-samples").replaceChildren();
  }
  // Samples are written shortly after an evaluation.
  for (const wait of [0, 3000]) {
    setTimeout(async () => {
      const { samples } = await (await ask(`run/samples?after=${run.sample}`)).json();
      for (const { iter, texts } of samples) {
        if (iter <= run.sample) continue;
        run.sample = iter;
        const article = make("article");
        article.dataset.iter = iter;
        const place = make("button", "place", t("iteration {0}", iter.toLocaleString("en")));
        place.type = "button";
        place.title = t("show in the curve");
        place.addEventListener("click", () => mark(iter, true));
        const heading = make("h3");
        heading.append(place);
        article.append(heading);
        article.append(...texts.map((text) => make("pre", "", text)));
        for (const pre of article.querySelectorAll("pre")) pre.dir = "auto";
        $("run-samples").prepend(article);
      }
      $("no-samples").hidden = run.sample >= 0;
      if (samples.length && !$("run").hidden) draw(); // marks the evaluations that have samples
    }, wait);
  }
}

const SVG = "http://www.w3.org/2000/svg";
function shape(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) found.push(tick);
  return found;
}

const short = (n) => new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(n);
const time = (s) =>
  s < 120 ? t("{0} s", Math.round(s)) : s < 7200 ? t("{0} min", (s / 60).toFixed(1)) : t("{0} h", (s / 3600).toFixed(1));

function draw() {
  run.moved = false;
  const axis = $("x-axis").value;
  const width = Math.max(300, $("chart").clientWidth || 700);
  const height = width < 500 ? 260 : 380;
  const train = points(run.steps, axis, "loss");
  const val = points(run.evals, axis, "val_loss");
  $("no-run").hidden = train.length + val.length > 0;
  $("chart").hidden = train.length + val.length === 0;
  numbers();
  if ($("chart").hidden) return;
  const box = { left: 62, right: width - 14, top: 12, bottom: height - 48 };
  const high = [...train, ...val].reduce((most, p) => Math.max(most, p.x), 0) || 1;
  // Clip the top 2 % of losses: those of the first iterations would flatten the rest of the curve.
  const losses = [...train, ...val].map((p) => p.y).sort((a, b) => a - b);
  const least = losses[0];
  const most = Math.max(losses[Math.floor((losses.length - 1) * 0.98)], least + 0.1);
  const margin = (most - least) * 0.06;
  const x = (value) => box.left + (value / high) * (box.right - box.left);
  const y = (value) => box.bottom - ((value - least + margin) / (most - least + 2 * margin)) * (box.bottom - box.top);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": t("training and validation loss") });
  const clip = shape("clipPath", { id: "inside" });
  clip.append(shape("rect", { x: box.left - 8, y: box.top - 6, width: box.right - box.left + 16, height: box.bottom - box.top + 6 }));
  svg.append(clip);
  for (const tick of ticks(least, most, 5)) {
    svg.append(shape("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }));
    svg.append(shape("text", { x: box.left - 8, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(most - least < 0.5 ? 2 : 1)));
  }
  const label = axis === "elapsed_s" ? time : short;
  for (const tick of ticks(0, high, width < 500 ? 3 : 6)) {
    svg.append(shape("text", { x: x(tick), y: height - 28, "text-anchor": tick > high * 0.97 ? "end" : "middle" }, label(tick)));
  }
  const title = { iter: t("iterations"), tokens: t("tokens trained on"), elapsed_s: t("training time") }[axis];
  svg.append(shape("text", { class: "title", x: (box.left + box.right) / 2, y: height - 8, "text-anchor": "middle" }, title));
  const turned = `rotate(-90 14 ${(box.top + box.bottom) / 2})`;
  svg.append(shape("text", { class: "title", x: 14, y: (box.top + box.bottom) / 2, "text-anchor": "middle", transform: turned }, t("loss (nats/token)")));
  const lines = shape("g", { "clip-path": "url(#inside)" });
  const thin = thinned(train, x, box.right - box.left);
  const path = (list) => list.map((p, i) => `${i ? "L" : "M"}${x(p.x).toFixed(1)} ${y(p.y).toFixed(1)}`).join("");
  if (thin.length > 40) lines.append(shape("path", { class: "raw", d: path(thin) }));
  lines.append(shape("path", { class: "train", d: path(thin.length > 40 ? smoothed(thin) : thin) }));
  lines.append(shape("path", { class: "val", d: path(val) }));
  for (const p of val) {
    const sampled = document.querySelector(`#run-samples article[data-iter="${p.iter}"]`);
    if (val.length > 60 && !sampled && p.iter !== run.marked) continue;
    const dot = shape("circle", { cx: x(p.x), cy: y(p.y), r: p.iter === run.marked ? 6 : sampled ? 4.5 : 3, class: sampled ? "sampled" : "" });
    if (sampled) dot.addEventListener("click", () => mark(p.iter));
    lines.append(dot);
  }
  svg.append(lines);
  pointAt(svg, { train, val, x, y, box, label });
  $("chart").replaceChildren(svg);
}

const points = (rows, axis, key) =>
  rows.filter((row) => Number.isFinite(row[key]) && Number.isFinite(row[axis])).map((row) => ({ x: row[axis], y: row[key], iter: row.iter }));

// Show the samples of an iteration, and where they are on the curve.
function mark(iter, fromSample = false) {
  run.marked = iter;
  draw();
  for (const article of document.querySelectorAll("#run-samples article")) {
    article.classList.toggle("marked", article.dataset.iter === String(iter));
  }
  const target = fromSample ? $("chart") : document.querySelector("#run-samples article.marked");
  target.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

// One point per pixel: the mean of the points in it.
function thinned(list, x, pixels) {
  if (list.length <= pixels) return list;
  const found = [];
  let bucket = [];
  for (const p of list) {
    if (bucket.length && Math.floor(x(p.x)) !== Math.floor(x(bucket[0].x))) {
      found.push(mean(bucket));
      bucket = [];
    }
    bucket.push(p);
  }
  if (bucket.length) found.push(mean(bucket));
  return found;
}
const mean = (bucket) => ({
  x: bucket[bucket.length - 1].x,
  y: bucket.reduce((sum, p) => sum + p.y, 0) / bucket.length,
});

// Bias-corrected exponential moving average.
function smoothed(list) {
  const keep = 1 - 1 / Math.min(20, Math.max(2, list.length / 12));
  let sum = 0;
  let weight = 0;
  return list.map((p) => {
    sum = keep * sum + p.y;
    weight = keep * weight + 1;
    return { x: p.x, y: sum / weight };
  });
}

function pointAt(svg, { train, val, x, y, box, label }) {
  const line = shape("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
  const note = shape("text", { y: box.top + 4, visibility: "hidden" });
  svg.append(line, note);
  svg.addEventListener("pointermove", (event) => {
    const { left, width } = svg.getBoundingClientRect();
    const at = ((event.clientX - left) / width) * svg.viewBox.baseVal.width;
    const nearest = (list) => list.reduce((best, p) => (!best || Math.abs(x(p.x) - at) < Math.abs(x(best.x) - at) ? p : best), null);
    const [near, v] = [nearest(train), nearest(val)];
    const parts = [near && t("{0}: training {1}", label(near.x), near.y.toFixed(3)), v && t("validation {0}", v.y.toFixed(3))];
    const middle = (box.left + box.right) / 2;
    line.setAttribute("x1", at);
    line.setAttribute("x2", at);
    note.setAttribute("x", at < middle ? at + 8 : at - 8);
    note.setAttribute("text-anchor", at < middle ? "start" : "end");
    note.textContent = parts.filter(Boolean).join(chinese ? "，" : ", ");
    for (const part of [line, note]) part.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerleave", () => {
    for (const part of [line, note]) part.setAttribute("visibility", "hidden");
  });
}

function numbers() {
  const step = run.steps.at(-1);
  const losses = run.evals.map((row) => row.val_loss).filter(Number.isFinite);
  const rows = [
    [t("iteration"), step && step.iter.toLocaleString("en")],
    [t("training loss"), Number.isFinite(step?.loss) && step.loss.toFixed(4)],
    [t("best validation loss"), losses.length > 0 && Math.min(...losses).toFixed(4)],
    [t("tokens"), step?.tokens && short(step.tokens)],
    [t("tokens/s"), step?.tokens_per_s && short(step.tokens_per_s)],
    [t("time"), step?.elapsed_s && time(step.elapsed_s)],
    [t("time left"), step?.share > 0 && step.share < 1 && !$("live").hidden && time((step.elapsed_s * (1 - step.share)) / step.share)],
  ];
  $("numbers").replaceChildren(
    ...rows.filter(([, value]) => value).map(([name, value]) => {
      const group = make("div");
      group.append(make("dt", "", name), make("dd", "", value));
      return group;
    }),
  );
}

$("x-axis").addEventListener("change", draw);
new ResizeObserver(() => !$("run").hidden && draw()).observe($("chart"));

// ------------------------------------------------------------------ start

// Show the model; return whether there is one, rather than a run without a checkpoint.
async function introduce() {
  try {
    const about = await (await ask("about")).json();
    document.title = `${about.name} · nanogpt`;
    $("name").textContent = about.name;
    $("tab-play").disabled = Boolean(about.waiting);
    if (about.waiting) {
      $("about").textContent = t("no checkpoint yet: the run is shown, and can be tried out as soon as it has saved one");
      select("run");
      return false;
    }
    const facts = [
      t("{0} parameters", short(about.parameters)),
      t("context length: {0}", about.block_size.toLocaleString("en")),
      t("vocabulary: {0} {1}", about.vocab_size.toLocaleString("en"), t({ char: "characters", byte: "bytes" }[about.tokenizer] ?? "tokens ")),
      about.iter && t("iteration {0}", about.iter.toLocaleString("en")),
      about.val_loss !== null && t("validation loss {0}", about.val_loss.toFixed(3)),
      about.baseline && t("counting ({0}-grams): {1}", about.baseline.order, about.baseline.loss.toFixed(3)),
    ];
    $("about").textContent = facts.filter(Boolean).join(" · ");
    longest = about.max_tokens;
    $("length").max = String(Math.floor(Math.log2(longest)));
    $("length").dispatchEvent(new Event("input"));
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
  }
  return true;
}

async function begin() {
  if (!(await introduce())) {
    const retry = setInterval(async () => {
      if (await introduce()) clearInterval(retry);
    }, 2000);
  }
  follow();
}
begin();
