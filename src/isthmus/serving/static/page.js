"use strict";
// The page: it speaks the public API and the routes under /isthmus/. What anybody wrote is only ever textContent.

const MOST_MODELS = 4;
const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const COVER = "#808080";
const FRAME = 448; // longer side in pixels of what is taken from a video file
const RERANKED = 16; // of the pictures found: as many are matched with the text

const state = { models: [], limits: { pictures: 8, picture_bytes: 10485760, picture_pixels: 50000000,
  picture_side: 16384 }, searched: 0, key: "", attached: [], shots: [], turns: [], running: new Set() };
const $ = (id) => document.getElementById(id);

function make(tag, options = {}, ...children) {
  const { on = {}, data = {}, ...rest } = options;
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(rest)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  for (const [name, value] of Object.entries(data)) made.dataset[name] = value;
  for (const [name, handler] of Object.entries(on)) made.addEventListener(name, handler);
  made.append(...children);
  return made;
}

const button = (text, handler, options = {}) => make("button", { type: "button", textContent: text,
  on: { click: handler }, ...options });

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  if (text) $("notice").scrollIntoView({ block: "nearest" });
}

function askForKey() {
  $("key").hidden = false;
  $("secret").focus();
}

// The server

class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function call(path, body, signal) {
  const headers = state.key ? { authorization: `Bearer ${state.key}` } : {};
  if (body) headers["content-type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?", 0);
  }
  if (reply.ok) return reply;
  let message = `The server answered with status ${reply.status}.`;
  try {
    message = (await reply.json()).error.message;
  } catch { /* no body of ours: the status is all there is to say */ }
  if (reply.status === 413) {
    message += " All pictures of a conversation go with each question: begin a new one, or take smaller ones.";
  }
  throw new Refused(message, reply.status);
}

const answered = async (...args) => (await call(...args)).json();

/** Text, tokens and end of a streamed answer, handed to `hear` as they come. */
async function stream(body, signal, hear) {
  const reply = await call("/v1/chat/completions", { ...body, stream: true,
    stream_options: { include_usage: true } }, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      piece = { done: true };
    }
    if (piece.done) throw new Refused("The connection ended before the answer did. Is the server still running?", 0);
    waiting += piece.value;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const text = event.replace(/^data: /, "");
      if (text === "[DONE]") return;
      const said = JSON.parse(text);
      if (said.error) throw new Refused(said.error.message, 0);
      hear(said);
    }
  }
}

// Pictures

function readable(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Error(`${file.name} cannot be read from the disk.`));
    reader.readAsDataURL(file);
  });
}

function decoded(url, name) {
  return new Promise((done, fail) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => fail(new Error(`${name} is damaged or no picture.`));
    image.src = url;
  });
}

async function take(files) {
  notice("");
  const wrong = new Set();
  for (const file of files) {
    try {
      const most = state.limits.picture_bytes;
      if (file.type.startsWith("video/")) {
        await takeFilm(file);
        continue;
      }
      if (!KINDS.includes(file.type)) throw new Error(`${file.name} is no PNG, JPEG, WebP, GIF or BMP.`);
      if (file.size > most) {
        throw new Error(`${file.name} has ${megabytes(file.size)}; the server takes at most ${megabytes(most)}. ` +
          "Save it smaller.");
      }
      const url = await readable(file);
      fits(await decoded(url, file.name), file.name);
      attach({ url, name: file.name });
    } catch (error) {
      wrong.add(error.message);
    }
  }
  notice([...wrong].join(" "));
}

function fits({ naturalWidth: width, naturalHeight: height }, name) {
  const { picture_pixels: pixels, picture_side: side } = state.limits;
  if (width * height > pixels || Math.max(width, height) > side) {
    throw new Error(`${name} is ${counted(width)} × ${counted(height)}; the server takes at most ` +
      `${counted(pixels)} pixels, ${counted(side)} a side. Save it smaller.`);
  }
}

/** Frames of a video file, as many as one question takes and evenly spread, to be asked about as one clip. */
async function takeFilm(file) {
  const video = make("video", { muted: true, preload: "auto", src: URL.createObjectURL(file) });
  const event = (name) => new Promise((done, fail) => {
    video.addEventListener(name, done, { once: true });
    video.addEventListener("error", () => fail(new Error(`${file.name} is damaged or no video that this browser reads.`)),
      { once: true });
  });
  try {
    await event("loadeddata");
    if (!Number.isFinite(video.duration)) throw new Error(`${file.name} does not say how long it is.`);
    const room = state.limits.pictures - state.attached.length;
    if (room < 1) throw full();
    const scale = Math.min(1, FRAME / Math.max(video.videoWidth, video.videoHeight));
    const canvas = make("canvas", { width: video.videoWidth * scale, height: video.videoHeight * scale });
    for (let n = 0; n < room; n++) {
      const sought = event("seeked");
      video.currentTime = video.duration * n / room;
      await sought;
      canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
      attach({ url: canvas.toDataURL("image/jpeg", 0.9), name: `${file.name}, ${video.currentTime.toFixed(1)} s` });
    }
    $("joined").checked = true;
  } finally {
    URL.revokeObjectURL(video.src);
  }
}

const megabytes = (bytes) => `${(bytes / 1048576).toFixed(1)} MiB`;

const full = () => new Error(`One question takes at most ${state.limits.pictures} pictures.`);

function attach(picture) {
  if (state.attached.length >= state.limits.pictures) throw full();
  state.attached.push(picture);
  drawAttached();
}

function drawAttached() {
  $("attached").replaceChildren(...state.attached.map((picture, n) => figure(picture, 160,
    truth(picture),
    button("Remove", () => { state.attached.splice(n, 1); drawAttached(); },
      { ariaLabel: `Remove ${picture.name}` }))));
  const films = mode() === "chat" && state.models.some((model) => model.clips);
  $("film").hidden = !films;
  $("joining").hidden = !films || state.attached.length < 2;
  if (state.attached.length < 2) $("joined").checked = false;
}

/** The picture in a box of its own size, with a canvas exactly over it. */
function figure(picture, side, ...more) {
  const image = make("img", { src: picture.url, alt: picture.name });
  const canvas = make("canvas");
  const size = () => {
    const wide = Math.min(side, side * 1.3 * (image.naturalWidth / image.naturalHeight));
    image.style.width = `${Math.max(16, wide)}px`;
  };
  if (image.complete) size();
  image.addEventListener("load", size);
  const stage = make("div", { className: "stage" }, image, canvas);
  const made = make("figure", {}, stage, make("figcaption", { textContent: picture.name }), ...more);
  made.picture = picture;
  made.image = image;
  made.canvas = canvas;
  made.draw = () => {};
  new ResizeObserver(() => made.draw()).observe(image);
  return made;
}

function truth(picture) {
  if (!picture.truth) return "";
  const told = make("div");
  told.append(make("p", { textContent: picture.truth }), make("ul", {}, ...picture.questions.map((each) =>
    make("li", {}, button(each.question, () => { $("question").value = each.question; $("question").focus(); }),
      ` ${each.answer}`))));
  return make("details", {}, make("summary", { textContent: "the truth" }), told);
}

async function newScene(number) {
  notice("");
  try {
    const found = await answered(`/isthmus/scene?number=${number ?? Math.floor(Math.random() * 1e6)}`);
    attach({ url: found.picture, name: `scene ${found.number}`, truth: found.truth, questions: found.questions });
  } catch (error) {
    notice(error.message);
  }
}

async function newFilm() {
  notice("");
  try {
    const found = await answered(`/isthmus/clip?number=${Math.floor(Math.random() * 1e6)}`);
    state.attached = found.frames.map((url, n) => ({ url, name: `clip ${found.number}, frame ${n + 1}`,
      ...(n === 0 && { truth: "what happens in the frames", questions: found.questions }) }));
    drawAttached();
    $("joined").checked = true;
  } catch (error) {
    notice(error.message);
  }
}

// Examples before the question

function addShot(shot) {
  state.shots.push(shot);
  drawShots();
}

function drawShots() {
  $("shots").replaceChildren(...state.shots.map((shot, n) => shotFigure(shot,
    button("Remove", () => { state.shots.splice(n, 1); drawShots(); }, { ariaLabel: `Remove example ${n + 1}` }))));
  if (state.shots.length) $("examples").open = true;
}

const shotFigure = (shot, ...more) => figure(shot.picture, 100,
  make("figcaption", { textContent: [shot.question, shot.answer].filter(Boolean).join(" — ") }), ...more);

function makeShot() {
  notice("");
  const answer = $("shown").value.trim();
  if (state.attached.length !== 1) return notice("An example has one picture: choose it above.");
  if (!answer) return notice("Write the answer that the example gives.");
  addShot({ picture: state.attached[0], question: $("question").value.trim(), answer });
  state.attached = [];
  drawAttached();
  $("shown").value = "";
  $("shown").focus();
}

async function drawShot() {
  notice("");
  try {
    const found = await answered(`/isthmus/scene?number=${Math.floor(Math.random() * 1e6)}`);
    const [{ question, answer }] = [...found.questions, { question: "", answer: found.truth }];
    addShot({ picture: { url: found.picture, name: `scene ${found.number}` }, question, answer });
  } catch (error) {
    notice(error.message);
  }
}

// Models

const can = (model, ...what) => what.some((each) => model.capabilities.includes(each));
const mode = () => document.querySelector("input[name=mode]:checked").value;
const ABILITIES = { chat: ["chat"], labels: ["classify", "score", "match", "similarity"], match: ["match", "similarity"],
  search: ["embed_images"] };
const able = (model) => can(model, ...ABILITIES[mode()]);
const PLACEHOLDERS = { chat: "what is in the picture?", labels: "only for models that answer questions", match: "",
  search: "two red cubes; or nothing, and a picture to find ones like it" };
const chosen = () => [...document.querySelectorAll("#models input:checked:not(:disabled)")].map((box) =>
  state.models.find((model) => model.id === box.value));

function listModels() {
  const boxes = state.models.map((model, n) => make("label", {},
    make("input", { type: "checkbox", value: model.id, checked: n === firstAble(), on: { change: allow } }),
    ` ${model.id} `, make("small", { textContent: [model.kind, origin(model)].filter(Boolean).join(", ") })));
  $("models").replaceChildren($("models").firstElementChild, ...boxes);
  allow();
}

/** Ticked at first: a model that can do this and sees, else one that can do it. */
const firstAble = () => [(model) => able(model) && model.vision, able].map((wanted) =>
  state.models.findIndex((model) => wanted(model))).find((n) => n >= 0) ?? 0;

/** A box that cannot be ticked now is disabled: the model cannot do it, or four are ticked. */
function allow() {
  const boxes = [...document.querySelectorAll("#models input")];
  for (const box of boxes) box.disabled = !able(state.models.find((model) => model.id === box.value));
  const ticked = boxes.filter((box) => box.checked && !box.disabled).length;
  for (const box of boxes) if (!box.checked && ticked >= MOST_MODELS) box.disabled = true;
  $("choices").hidden = mode() !== "labels" && mode() !== "match";
  $("question").placeholder = PLACEHOLDERS[mode()];
  $("question").hidden = $("question").labels[0].hidden = mode() === "match";
  $("examples").hidden = $("tokens").parentElement.hidden = mode() !== "chat";
  drawAttached();
}

function setMode(wanted) {
  document.querySelector(`input[name=mode][value=${wanted}]`).checked = true;
  allow();
}

// Asking

function send(event) {
  event.preventDefault();
  notice("");
  const models = chosen();
  const words = [...new Set($("labels").value.split(",").map((each) => each.trim()).filter(Boolean))];
  const labels = mode() === "labels" || mode() === "match" ? words : null;
  const question = mode() === "match" ? "" : $("question").value.trim();
  const lacking = missing(models, question, labels);
  if (lacking) return notice(lacking);
  const turn = { mode: mode(), question, labels, pictures: state.attached, answers: [],
    clip: mode() === "chat" && $("joined").checked, shots: mode() === "chat" ? [...state.shots] : [] };
  turn.before = [...state.turns];
  state.turns.push(turn);
  state.attached = [];
  drawAttached();
  $("question").value = "";
  drawTurn(turn);
  for (const model of models) {
    ask(turn, model);
    if (turn.mode === "search" && question && can(model, "match")) ask(turn, model, { rerank: RERANKED });
  }
  turn.grid.style.setProperty("--columns", Math.max(2, turn.answers.length)); // covered below uncovered
}

/** What is still to be given before this can be asked. */
function missing(models, question, labels) {
  const pictures = state.attached.length, most = state.limits.pictures;
  if (!models.length) return "Tick a model that can do this.";
  if (mode() === "chat" && !question) return "Write a question.";
  const begun = state.turns.flatMap((turn) => turn.answers).filter((answer) => !answer.done);
  const writing = models.find((model) => begun.some((answer) => answer.model.id === model.id));
  if (mode() === "chat" && writing) return `${writing.id} is still answering: wait for it, or stop it.`;
  if (mode() === "chat" && pictures + state.shots.length > most) {
    return `Examples and question have at most ${most} pictures together.`;
  }
  if (mode() === "labels" && labels.length < 2) return "Give at least two words to choose from.";
  if (mode() === "match" && !labels.length) return "Give words to hold against the pictures.";
  if (labels && !pictures) return "Give a picture to choose words for.";
  if (mode() === "search" && (pictures ? 1 : 0) + (question ? 1 : 0) !== 1) {
    return "Write what to find, or give a picture to find ones like it.";
  }
  if (mode() === "search" && pictures > 1) return "Give one picture to find ones like it.";
  return "";
}

/** Earlier turns that the model answered and that this one goes on from: after examples stand no others. */
const earlier = (turn, model) => turn.shots.length ? [] : turn.before.filter((each) => each.mode === "chat" &&
  !each.shots.length && spoken(each, model));
const spoken = (turn, model) => turn.answers.find((a) => a.model === model && !a.covered && a.text);

/** What a model is sent: examples or earlier turns, then this one, with its pictures or with `pictures`. */
function messages(turn, model, pictures) {
  const said = (asked, answer) => [asked, { role: "assistant", content: answer }];
  return [...turn.shots.flatMap((shot) => said(userTurn(shot.question, [shot.picture]), shot.answer)),
    ...earlier(turn, model).flatMap((each) => said(userTurn(each.question, each.pictures, each.clip),
      spoken(each, model).text)),
    userTurn(turn.question, pictures, turn.clip)];
}

function userTurn(question, pictures, clip) {
  if (!pictures.length) return { role: "user", content: question };
  const text = question ? [{ type: "text", text: question }] : [];
  return { role: "user", content: [...(clip ? [film(pictures)] : pictures.map(part)), ...text] };
}

/** Frames in the form in which vLLM takes a clip. */
function film(pictures) {
  const data = pictures.map(({ url }) => url.slice(url.indexOf(",") + 1));
  const kind = /^data:image\/(png|jpeg|webp);/.exec(pictures[0].url)?.[1] ?? "png";
  return { type: "video_url", video_url: { url: `data:video/${kind};base64,${data.join(",")}` } };
}

const part = (picture) => ({ type: "image_url", image_url: { url: picture.url } });

/** The figures of the pictures that `messages` holds, in order: of examples and turns that were sent too. */
function shown(turn, model, own) {
  return [...turn.shotFigures, ...earlier(turn, model).flatMap((each) => each.figures), ...own];
}

/** Where a model is asked, and what. `how` may hold other `pictures`, or how many of those found to `rerank`. */
function bodyOf(turn, model, how) {
  const pictures = how.pictures || turn.pictures;
  if (turn.mode === "chat") {
    return ["/v1/chat/completions", { model: model.id, messages: messages(turn, model, pictures),
      max_tokens: Math.min(1024, Math.max(1, Number($("tokens").value) || 128)) }];
  }
  const input = pictures.map(part);
  if (turn.mode === "search") {
    return ["/isthmus/search", { model: model.id, input: turn.question || input, rerank: how.rerank || 0 }];
  }
  if (turn.mode === "match") return ["/isthmus/match", { model: model.id, pictures: input, texts: turn.labels }];
  if (can(model, "classify")) return ["/v1/classify", { model: model.id, input, labels: turn.labels }];
  const text = turn.question && can(model, "score") ? [{ type: "text", text: turn.question }] : [];
  return ["/v1/score", { model: model.id, input: [...input, ...text], candidates: turn.labels }];
}

const DRAWN = { labels: bars, match: pairs, search: hits };

async function ask(turn, model, how = {}) {
  const [path, body] = bodyOf(turn, model, how);
  const answer = { model, covered: how.pictures && how, rerank: how.rerank, text: "", path, body };
  turn.answers.push(answer);
  drawAnswer(turn, answer);
  const stopper = new AbortController();
  state.running.add(stopper);
  $("stop").disabled = false;
  answer.said.ariaBusy = "true";
  const began = performance.now();
  let pieces = 0, tokens = 0, ended = "";
  const facts = () => {
    const count = tokens || pieces;
    const speed = ` · ${(count / Math.max(0.001, (performance.now() - began) / 1000)).toFixed(1)} tokens/s`;
    const sight = `${model.visual_tokens && ` · ${model.visual_tokens}`} · ${megabytes(model.weight_bytes)} of weights`;
    const told = count ? `${count} ${count === 1 ? "token" : "tokens"}${speed}${sight}` : "";
    answer.facts.textContent = turn.mode !== "chat" ? ended : [told, ended].filter(Boolean).join(" · ");
  };
  try {
    if (turn.mode !== "chat") {
      DRAWN[turn.mode](answer, await answered(path, body, stopper.signal), turn);
    } else {
      await stream(body, stopper.signal, (said) => {
        tokens = said.usage ? said.usage.completion_tokens : tokens;
        for (const choice of said.choices) {
          if (choice.delta.content) {
            pieces += 1;
            answer.text += choice.delta.content;
            answer.said.textContent = answer.text;
          }
          if (choice.finish_reason === "length") ended = "cut at the longest length asked for";
        }
        if (!said.usage) facts();
      });
      if (!answer.text) ended = "the model said nothing";
    }
  } catch (error) {
    if (error.name === "AbortError") ended = "stopped";
    else fault(answer, error);
  }
  state.running.delete(stopper);
  $("stop").disabled = !state.running.size;
  answer.said.ariaBusy = "false";
  answer.done = true;
  facts();
  tools(turn, answer);
}

function fault(answer, error) {
  answer.problem.textContent = error.message;
  answer.problem.hidden = false;
  if (error.status === 401) askForKey();
}

/** Shares of the labels: probabilities of a classifier, else likelihoods of the answers made to sum to 1. */
function bars(answer, found, { labels }) {
  const scores = found.measure ? found.data.map((each) => each.score) : found.data[0].probs;
  let shares = scores;
  if (found.measure === "likelihood") {
    const top = Math.max(...scores);
    const weights = scores.map((score) => Math.exp(score - top));
    shares = weights.map((weight) => weight / weights.reduce((a, b) => a + b, 0));
  }
  const what = { likelihood: "share of the answers' likelihood", ...MEASURES }[found.measure] || "zero-shot probability";
  const rows = labels.map((label, n) => [label, shares[n]]).sort((a, b) => b[1] - a[1]).flatMap(([label, share]) => {
    const bar = make("span", { className: "bar", ariaHidden: "true" });
    bar.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
    return [make("span", { textContent: label }), bar,
      make("span", { textContent: found.measure === "similarity" ? share.toFixed(3) : `${(share * 100).toFixed(1)} %` })];
  });
  answer.said.replaceChildren(make("small", { textContent: what }), make("div", { className: "bars" }, ...rows));
}

const MEASURES = { match: "probability of matching", similarity: "similarity" };

/** A row per picture, a column per text. */
function pairs(answer, found, turn) {
  const told = (score) => found.measure === "match" ? `${(score * 100).toFixed(1)} %` : score.toFixed(3);
  answer.said.replaceChildren(make("small", { textContent: MEASURES[found.measure] }), make("div", { className: "wide" },
    make("table", {}, make("thead", {}, make("tr", {}, make("td"),
      ...turn.labels.map((text) => make("th", { scope: "col", textContent: text })))),
    make("tbody", {}, ...found.data.map(({ scores }, n) => make("tr", {},
      make("th", { scope: "row", textContent: turn.pictures[n].name }),
      ...scores.map((score) => make("td", { textContent: told(score),
        className: score === Math.max(...scores) ? "best" : "" }))))))));
}

/** The pictures that were found, best first; each can be taken to ask about it, or to find ones like it. */
function hits(answer, found) {
  const skipped = found.unreadable ? `, ${found.unreadable} of which cannot be read` : "";
  const how = found.reranked ? `the best ${found.reranked} in order of similarity and matching` : "by similarity";
  answer.said.replaceChildren(make("small", { textContent: `${found.pictures} pictures${skipped}, ${how}` }),
    make("ol", { className: "hits" }, ...found.data.map((hit) => make("li", {},
      make("img", { src: hit.thumbnail, alt: hit.name }),
      make("small", { textContent: `${hit.name} · ${hit.score.toFixed(3)}` }),
      button("Take it", () => takeFound(hit), { ariaLabel: `Take ${hit.name}` })))));
}

async function takeFound(hit) {
  notice("");
  try {
    const { picture, name } = await answered(`/isthmus/picture?number=${hit.number}`);
    attach({ url: picture, name });
    $("attached").scrollIntoView({ block: "nearest" });
  } catch (error) {
    notice(error.message);
  }
}

// Turns

const titleOf = (turn) => ({ chat: () => turn.question, labels: () => `which fits? ${turn.labels.join(", ")}`,
  match: () => `which belong together? ${turn.labels.join(", ")}`,
  search: () => turn.question ? `find: ${turn.question}` : "find pictures like this one" })[turn.mode]();

function drawTurn(turn) {
  turn.figures = turn.pictures.map((picture) => figure(picture, turn.clip ? 200 : 320, truth(picture)));
  for (const each of turn.figures) coverable(turn, each);
  turn.shotFigures = turn.shots.map((shot) => shotFigure(shot));
  turn.grid = make("div", { className: "answers" });
  turn.opacity = make("input", { type: "range", min: 0, max: 100, value: 70, ariaLabel: "Opacity of the map",
    on: { input: () => everyFigure(turn, (each) => { each.canvas.style.opacity = turn.opacity.value / 100; }) } });
  turn.heat = make("p", { className: "row hint", hidden: true }, make("strong", { textContent: "attention, not proof" }),
    "point at a word, or move to it with Tab; yellow: a little, red: most", make("label", {}, "opacity ", turn.opacity));
  const title = titleOf(turn);
  const examples = make("details", { hidden: !turn.shots.length },
    make("summary", { textContent: `after ${turn.shots.length} ${turn.shots.length === 1 ? "example" : "examples"}` }),
    make("div", { className: "pictures" }, ...turn.shotFigures));
  turn.card = make("article", { className: "turn", ariaLabel: title },
    make("h2", { textContent: turn.clip ? `${title} (${turn.pictures.length} frames as one clip)` : title }), examples,
    make("div", { className: "pictures" }, ...turn.figures), turn.heat, turn.grid,
    make("p", { className: "row" }, button("Edit and ask again", () => edit(turn))));
  $("log").append(turn.card);
  turn.card.scrollIntoView({ block: "nearest" });
}

const everyFigure = (turn, what) => state.turns.flatMap((each) => [...each.figures, ...each.shotFigures,
  ...each.answers.flatMap((a) => a.figures || [])]).forEach(what);

function drawAnswer(turn, answer) {
  answer.said = make("div", { className: "said", "aria-live": "polite" });
  answer.facts = make("p", { className: "facts" });
  answer.problem = make("p", { className: "problem", role: "alert", hidden: true });
  answer.tools = make("p", { className: "row" });
  answer.figures = [];
  const name = `${answer.model.id}${answer.covered ? ", covered" : ""}${answer.rerank ? ", reranked" : ""}`;
  answer.card = make("section", { className: "answer", ariaLabel: `Answer of ${name}`, data: { model: answer.model.id } },
    make("h3", { textContent: name }));
  if (answer.covered) {
    answer.figures = answer.covered.pictures.map((picture) => figure(picture, 200));
    answer.card.append(make("div", { className: "pictures" }, ...answer.figures));
  }
  answer.card.append(answer.said, answer.facts, answer.problem, answer.tools);
  turn.grid.append(answer.card);
}

function tools(turn, answer) {
  answer.tools.append(button("Copy as curl", () => copy(curl(answer))), button("Copy as Python", () => copy(python(answer))));
  const pictured = () => shown(turn, answer.model, turn.figures).length;
  if (answer.text && turn.mode === "chat" && can(answer.model, "attend") && pictured()) {
    const look = button("Where did it look?", async () => {
      look.disabled = true;
      look.textContent = "Looking …";
      answer.problem.hidden = true;
      try {
        await lookAt(turn, answer);
        look.remove();
      } catch (error) {
        fault(answer, error);
        look.disabled = false;
        look.textContent = "Where did it look?";
      }
    });
    answer.tools.prepend(look);
  }
}

function edit(turn) {
  stopAll();
  const from = state.turns.indexOf(turn);
  for (const each of state.turns.splice(from)) each.card.remove();
  state.attached = [...turn.pictures];
  state.shots = [...turn.shots];
  drawShots();
  setMode(turn.mode);
  $("joined").checked = turn.clip;
  $("question").value = turn.question;
  if (turn.labels) $("labels").value = turn.labels.join(", ");
  $(turn.labels ? "labels" : "question").focus();
}

function stopAll() {
  for (const stopper of state.running) stopper.abort();
}

function restart() {
  stopAll();
  for (const each of state.turns) each.card.remove();
  state.turns = [];
  state.attached = [];
  state.shots = [];
  drawAttached();
  drawShots();
  notice("");
  $("question").focus();
}

// Where a model looked

async function lookAt(turn, answer) {
  const { model, messages: sent, max_tokens } = answer.body;
  const found = await answered("/isthmus/look", { model, messages: sent, max_tokens: Math.min(256, max_tokens) });
  const figures = shown(turn, answer.model, answer.covered ? answer.figures : turn.figures);
  const top = found.pictures.map((picture) => Math.max(...picture.maps.flat(), 1e-9));
  let held = null;
  const words = found.words.map((word, n) => {
    const show = () => {
      for (const each of document.querySelectorAll(".word.on")) each.classList.remove("on");
      words[n].classList.add("on");
      figures.forEach((each, p) => heat(each, found.pictures[p], found.pictures[p].maps[n], top[p],
        turn.opacity.value / 100));
    };
    return make("button", { type: "button", className: "word", textContent: word, ariaPressed: "false",
      ariaLabel: `${word}: show where the model looked`,
      on: { pointerenter: show, focus: show, pointerleave: () => held !== null && held(), click: () => {
        held = show;
        words.forEach((each) => { each.ariaPressed = String(each === words[n]); });
        show();
      } } });
  });
  answer.said.replaceChildren(...words.flatMap((each) => [each, " "]));
  turn.heat.hidden = false;
  const plain = (text) => text.replace(/\s+/g, "");
  if (plain(found.text) !== plain(answer.text)) {
    answer.facts.textContent += " · the words are those of the answer written once more";
  }
}

/** Draw a map over the part of the picture that it covers; again whenever the picture's size changes. */
function heat(each, grid, map, top, opacity) {
  const small = make("canvas", { width: grid.columns, height: grid.rows });
  const dots = new ImageData(grid.columns, grid.rows);
  map.forEach((value, n) => {
    const share = Math.min(1, value / top);
    dots.data.set([255, Math.round(210 * (1 - share)), 0, Math.round(255 * Math.sqrt(share))], 4 * n);
  });
  small.getContext("2d").putImageData(dots, 0, 0);
  each.canvas.style.opacity = opacity;
  each.draw = () => {
    const [width, height] = fit(each);
    const [left, top_, right, bottom] = grid.box;
    const pen = each.canvas.getContext("2d");
    pen.drawImage(small, left * width, top_ * height, (right - left) * width, (bottom - top_) * height);
  };
  each.draw();
}

/** The canvas emptied, with as many dots as the screen has under the picture. */
function fit(each) {
  const ratio = window.devicePixelRatio || 1;
  each.canvas.width = Math.round(each.image.clientWidth * ratio);
  each.canvas.height = Math.round(each.image.clientHeight * ratio);
  return [each.canvas.width, each.canvas.height];
}

// Covering a region

function coverable(turn, each) {
  let rect = null, start = null, on = false;
  const place = (event) => {
    const box = each.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((x) =>
      Math.min(1, Math.max(0, x)));
  };
  const paint = () => {
    const [width, height] = fit(each);
    if (!rect) return;
    const pen = each.canvas.getContext("2d");
    pen.fillStyle = COVER;
    pen.fillRect(rect[0] * width, rect[1] * height, (rect[2] - rect[0]) * width, (rect[3] - rect[1]) * height);
  };
  const again = button("Ask again with it covered", async () => {
    const url = await coveredUrl(each, rect);
    const pictures = turn.pictures.map((p) => p === each.picture ? { url, name: `${p.name}, covered` } : p);
    const models = [...new Set(turn.answers.map((answer) => answer.model))];
    toggle();
    for (const model of models) ask(turn, model, { pictures });
  }, { hidden: true });
  const toggle = () => {
    on = !on;
    cover.ariaPressed = String(on);
    each.canvas.classList.toggle("cover", on);
    each.canvas.tabIndex = on ? 0 : -1;
    each.canvas.ariaLabel = on ? "Region to cover: arrow keys move it, with Shift they size it" : "";
    again.hidden = !on;
    rect = on ? [0.35, 0.35, 0.65, 0.65] : null;
    each.canvas.style.opacity = 1;
    each.draw = paint;
    paint();
    if (on) each.canvas.focus({ preventScroll: true });
  };
  const cover = button("Cover a region", toggle, { ariaPressed: "false" });
  each.canvas.addEventListener("pointerdown", (event) => {
    if (!on) return;
    start = place(event);
    each.canvas.setPointerCapture(event.pointerId);
  });
  each.canvas.addEventListener("pointermove", (event) => {
    if (!start) return;
    const [x, y] = place(event);
    rect = [Math.min(x, start[0]), Math.min(y, start[1]), Math.max(x, start[0]), Math.max(y, start[1])];
    paint();
  });
  each.canvas.addEventListener("pointerup", () => { start = null; });
  each.canvas.addEventListener("keydown", (event) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] || [0, 0];
    if (!on || !(dx || dy)) return;
    event.preventDefault();
    const [left, top, right, bottom] = rect;
    const kept = (x) => Math.min(1, Math.max(0, x));
    if (event.shiftKey) rect = [left, top, kept(Math.max(left + 0.05, right + dx / 20)),
      kept(Math.max(top + 0.05, bottom + dy / 20))];
    else {
      const x = Math.min(1 - right, Math.max(-left, dx / 20)), y = Math.min(1 - bottom, Math.max(-top, dy / 20));
      rect = [left + x, top + y, right + x, bottom + y];
    }
    paint();
  });
  each.append(make("p", { className: "row" }, cover, again));
}

async function coveredUrl(each, rect) {
  const { image } = each;
  const canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  pen.fillStyle = COVER;
  const [left, top, right, bottom] = rect;
  pen.fillRect(left * canvas.width, top * canvas.height, (right - left) * canvas.width, (bottom - top) * canvas.height);
  const png = canvas.toDataURL("image/png");
  // A large photograph as PNG may be more than the server takes.
  return png.length * 0.75 < state.limits.picture_bytes ? png : canvas.toDataURL("image/jpeg", 0.95);
}

// The request as others would write it

function curl(answer) {
  const key = state.key ? " -H \"Authorization: Bearer $ISTHMUS_API_KEY\"" : "";
  return `curl ${location.origin}${answer.path} -H 'content-type: application/json'${key} -d @- <<'END'\n` +
    `${JSON.stringify(answer.body)}\nEND\n`;
}

function python(answer) {
  const key = state.key ? ", \"authorization\": f\"Bearer {os.environ['ISTHMUS_API_KEY']}\"" : "";
  return `import json\n${state.key ? "import os\n" : ""}import urllib.request\n\n` +
    `body = json.loads(${JSON.stringify(JSON.stringify(answer.body))})\n` +
    `request = urllib.request.Request(\n    ${JSON.stringify(location.origin + answer.path)},\n` +
    `    json.dumps(body).encode(),\n    {"content-type": "application/json"${key}},\n)\n` +
    "print(json.load(urllib.request.urlopen(request)))\n";
}

async function copy(text) {
  $("copied").value = text;
  $("copy").showModal();
  $("copied").select();
  try {
    await navigator.clipboard.writeText(text);
    $("copy").firstElementChild.textContent = "The request, copied:";
  } catch {
    $("copy").firstElementChild.textContent = "The request, to be copied from here:";
  }
}

// What was trained

const counted = (value) => value.toLocaleString("en");

function table(title, rows, columns) {
  const cells = (row, tag) => row.map((value, n) => make(n ? tag : "th", { textContent: value,
    ...(!n && tag === "td" && { scope: "row" }) }));
  return make("div", { className: "wide" }, make("strong", { textContent: title }), make("table", {},
    ...(columns ? [make("thead", {}, make("tr", {}, ...cells(columns, "th")))] : []),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells(row, "td"))))));
}

function listRuns(models) {
  $("runs").lastElementChild.replaceChildren(...models.map((model) => make("section", { ariaLabel: model.id },
    make("h3", { textContent: `${model.id} (${model.kind})` }),
    make("p", { className: "facts", textContent: origin(model) }),
    table("parameters", [...Object.entries(model.parts), ["all", Object.values(model.parts).reduce((a, b) => a + b, 0)]]
      .map(([name, value]) => [name, counted(value)])),
    table("memory", [["weights", megabytes(model.weight_bytes)],
      ...(model.visual_tokens ? [["a picture", model.visual_tokens]] : [])]),
    ...model.stages.map(stageOf),
    ...model.scores.map((score) => make("div", {}, score.rows.length ? table(score.task, score.rows, score.columns) :
      make("strong", { textContent: score.task }), make("p", { className: "facts",
      textContent: score.caption || score.problem }))))));
}

const origin = (model) => model.shipped ? "came with the package" : model.stages.length ? "trained here" : "";

/** A stage of a training: what it trains, and its losses over its steps. */
function stageOf(stage) {
  const seconds = stage.seconds < 90 ? `${stage.seconds.toFixed(0)} s` : `${(stage.seconds / 60).toFixed(0)} min`;
  const begun = stage.steps ? `${counted(stage.steps)} steps, ${seconds}` : "not begun";
  return make("div", {}, table(`stage ${stage.name}: ${begun}`, stage.parts.map((row) =>
    [row.part, counted(row.parameters), counted(row.trained)]), ["part", "parameters", "trained"]),
  ...Object.entries(stage.curves).map(([term, points]) => curve(term, points)),
  make("p", { className: "facts", textContent: stage.problem }));
}

function curve(term, points) {
  const losses = points.map(([, loss]) => loss), steps = points.map(([step]) => step);
  const [low, high] = [Math.min(0, ...losses), Math.max(...losses, 1e-9)];
  const at = ([step, loss]) => `${(296 * step / steps.at(-1) + 2).toFixed(1)},` +
    `${(76 - 72 * (loss - low) / (high - low)).toFixed(1)}`;
  const told = `loss ${term}: ${losses[0].toFixed(3)} at step ${counted(steps[0])}, ` +
    `${losses.at(-1).toFixed(3)} at step ${counted(steps.at(-1))}`;
  const chart = $("chart").content.firstElementChild.cloneNode(true);
  chart.setAttribute("aria-label", told);
  chart.firstElementChild.setAttribute("points", points.map(at).join(" "));
  return make("figure", { className: "curve" }, chart, make("figcaption", { textContent: told }));
}

// Start

async function start() {
  notice("");
  try {
    const { data } = await answered("/v1/models");
    const runs = await answered("/isthmus/runs");
    state.limits = runs.limits;
    state.searched = runs.pictures;
    $("finding").hidden = !state.searched;
    state.models = data.map((model) => ({ ...model, ...runs.models.find((each) => each.id === model.id) }));
    const talks = state.models.some((model) => can(model, "chat"));
    setMode(talks ? "chat" : "labels");
    listModels();
    listRuns(runs.models);
    await prefill();
  } catch (error) {
    if (error.status === 401) {
      notice(state.key ? "That is not the key." : "");
      askForKey();
    } else notice(error.message);
  }
}

/** An address may say what is ready to be asked: #models=a,b&scene=7&question=… */
async function prefill() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const names = (wanted.get("models") || "").split(",").slice(0, MOST_MODELS);
  const boxes = [...document.querySelectorAll("#models input")].filter((box) => able(state.models.find((model) =>
    model.id === box.value)));
  if (boxes.some((box) => names.includes(box.value))) {
    for (const box of boxes) box.checked = names.includes(box.value);
    allow();
  }
  $("question").value ||= wanted.get("question") || "";
  if (/^\d+$/.test(wanted.get("scene") || "")) await newScene(Number(wanted.get("scene")));
}

$("runs").addEventListener("toggle", async () => {
  if (!$("runs").open) return;
  try {
    listRuns((await answered("/isthmus/runs")).models); // a training may have gone on
  } catch (error) {
    notice(error.message);
  }
});
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("secret").value;
  $("key").hidden = true;
  start();
});
$("ask").addEventListener("submit", send);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
$("stop").addEventListener("click", stopAll);
$("new").addEventListener("click", restart);
$("scene").addEventListener("click", () => newScene());
$("film").addEventListener("click", newFilm);
$("shot").addEventListener("click", makeShot);
$("drawn").addEventListener("click", drawShot);
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { take([...$("file").files]); $("file").value = ""; });
for (const each of document.querySelectorAll("input[name=mode]")) {
  each.addEventListener("change", () => {
    allow();
    const boxes = [...document.querySelectorAll("#models input")];
    if (!chosen().length && boxes.length) { boxes[firstAble()].checked = true; allow(); }
  });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stopAll(); });
window.addEventListener("beforeunload", (event) => { // a conversation is nowhere but here
  if (state.turns.length) event.preventDefault();
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) { event.preventDefault(); take(files); }
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return; // text that is dragged goes where it always goes
    event.preventDefault();
    document.body.classList.toggle("dropping", name === "dragover");
    if (name === "drop") take([...event.dataTransfer.files]);
  });
}
start();
