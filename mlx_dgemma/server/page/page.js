"use strict";
// Chat over /v1/chat/completions with draft events; every text goes in as text, never as HTML.

const $ = (id) => document.getElementById(id);
const history = [];
const attached = []; // {name, url} of the next message's images
let running = null;

// Follows the reply as long as the reader has not scrolled away from the end.
function following(change) {
  const page = document.documentElement;
  const atEnd = page.scrollTop + page.clientHeight >= page.scrollHeight - 40;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

function headers() {
  const key = $("key").value;
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

function request() {
  return {
    model: "default",
    messages: history,
    stream: true,
    stream_options: { include_drafts: true, include_usage: true },
    enable_thinking: $("thinking").checked,
    max_tokens: number("tokens"),
    max_denoising_steps: number("steps"),
    entropy_bound: number("bound"),
    temperature: number("temperature"),
    seed: number("seed"),
  };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

function picture({ name, url }) {
  const shown = document.createElement("img");
  shown.src = url;
  shown.alt = name;
  return shown;
}

async function attach(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      $("status").textContent = `${file.name} is not an image.`;
      continue;
    }
    const reader = new FileReader();
    const read = new Promise((done, failed) => { reader.onload = done; reader.onerror = failed; });
    reader.readAsDataURL(file);
    await read;
    attached.push({ name: file.name, url: reader.result });
  }
  showAttached();
}

function showAttached() {
  const items = attached.map((image, index) => {
    const item = document.createElement("li");
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = `Remove ${image.name}`;
    remove.addEventListener("click", () => { attached.splice(index, 1); showAttached(); });
    item.append(picture(image), remove);
    return item;
  });
  $("attached").replaceChildren(...items);
}

function addUser(text, images) {
  const article = document.createElement("article");
  article.className = "user";
  const title = document.createElement("h2");
  title.textContent = "You";
  const words = document.createElement("p");
  words.textContent = text;
  article.append(title, ...images.map(picture), words);
  $("log").append(article);
}

class Reply {
  constructor() {
    const copy = $("reply").content.cloneNode(true);
    this.root = copy.querySelector("article");
    $("log").append(copy);
    this.drafts = [];
    this.text = "";
    this.find("input").addEventListener("input", (event) => this.draw(Number(event.target.value)));
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  addText(text) {
    this.text += text;
    this.find(".text").textContent = this.text;
  }

  addThinking(text) {
    this.find(".thinking").hidden = false;
    this.find(".thinking p").textContent += text;
  }

  addCall(call) {
    const shown = document.createElement("pre");
    shown.textContent = `${call.function.name}(${call.function.arguments})`;
    this.find(".calls").append(shown);
  }

  addDraft(draft) {
    this.drafts.push(draft);
    const slider = this.find("input");
    const watching = Number(slider.value) >= Number(slider.max);
    this.find(".canvas").hidden = false;
    slider.max = String(this.drafts.length - 1);
    if (!watching) return;
    slider.value = slider.max;
    this.draw(this.drafts.length - 1);
  }

  draw(index) {
    const draft = this.drafts[index];
    const firstChanged = draft.changed.length ? draft.changed[0][0] : draft.tokens.length;
    const cells = draft.tokens.map((token, position) => {
      const cell = document.createElement("span");
      const control = /^<[^ ]+>$/.test(token) && token.includes("|") || token === "<eos>";
      cell.textContent = control ? "·" : token;
      cell.title = `${token} (entropy ${draft.entropy[position]} nats)`;
      cell.style.setProperty("--sure", Math.exp(-draft.entropy[position]).toFixed(3));
      cell.classList.toggle("control", control);
      cell.classList.toggle("accepted", draft.accepted[position] === 1);
      cell.classList.toggle("stable", position < firstChanged);
      return cell;
    });
    this.find(".cells").replaceChildren(...cells);
    const where = `block ${draft.block + 1}, step ${draft.step}`;
    this.find(".where").textContent = `(${where}, mean entropy ${draft.mean_entropy.toFixed(3)})`;
    this.find("input").setAttribute("aria-valuetext", where);
  }

  finish(facts, usage, warnings) {
    const steps = facts ? facts.steps_per_block.join(", ") : "";
    const parts = facts ? [`seed ${facts.seed}`, `steps per block: ${steps}`] : [];
    if (usage) parts.push(`${usage.completion_tokens} tokens`);
    this.find(".facts").textContent = [...parts, ...warnings].join(" · ");
  }

  fail(message) {
    const line = document.createElement("p");
    line.className = "error";
    line.textContent = message;
    this.root.append(line);
  }
}

async function ask(text) {
  const before = history.length;
  const images = attached.splice(0);
  showAttached();
  const parts = images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  history.push({ role: "user", content: parts.length ? [...parts, { type: "text", text }] : text });
  addUser(text, images);
  const reply = new Reply();
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
  let facts, usage, warnings = [];
  running = new AbortController();
  busy(true);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      warnings = event.x_warnings || warnings;
      following(() => {
        if (event.x_draft) reply.addDraft(event.x_draft);
        for (const choice of event.choices || []) {
          facts = choice.x_diffusion || facts;
          if (choice.delta.content) reply.addText(choice.delta.content);
          if (choice.delta.reasoning) reply.addThinking(choice.delta.reasoning);
          for (const call of choice.delta.tool_calls || []) reply.addCall(call);
        }
      });
    }
    history.push({ role: "assistant", content: reply.text });
    $("status").textContent = "Reply complete.";
  } catch (error) {
    if (error.name !== "AbortError") reply.fail(error.message);
    $("status").textContent = error.name === "AbortError" ? "Stopped." : "The request failed.";
    // A turn without an answer would mislead the next one; what there is of an answer counts.
    if (reply.text) history.push({ role: "assistant", content: reply.text });
    else history.length = Math.min(history.length, before);
  }
  following(() => reply.finish(facts, usage, warnings));
  busy(false);
}

function busy(on) {
  $("send").disabled = on;
  $("stop").disabled = !on;
  if (on) $("status").textContent = "Denoising…";
  else running = null;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("show").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  attach([...$("files").files]).then(() => { $("files").value = ""; });
});
$("composer").addEventListener("dragover", (event) => {
  event.preventDefault();
  $("composer").classList.add("over");
});
$("composer").addEventListener("dragleave", () => $("composer").classList.remove("over"));
$("composer").addEventListener("drop", (event) => {
  event.preventDefault();
  $("composer").classList.remove("over");
  attach([...event.dataTransfer.files]);
});
$("prompt").addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    attach([...event.clipboardData.files]);
  }
});
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  history.length = 0;
  attached.length = 0;
  showAttached();
  $("log").replaceChildren();
  $("prompt").focus();
});
fetch("health").then((answer) => answer.json()).then((body) => {
  $("model").textContent = body.model;
});
