// The page: a conversation over /v1/chat/completions with drafts, kept in this browser.
"use strict";

import { Conversations, images, words } from "./conversations.js";
import { setUp as setUpDecisions } from "./decisions.js";
import { Reply } from "./reply.js";
import { Unreachable, events, health, post } from "./server.js";

const $ = (id) => document.getElementById(id);
const kept = new Conversations();
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

function constraint() {
  const text = $("constraint").value;
  const kind = $("form").value;
  if (!kind) return {};
  if (!text.trim()) throw new Error("Say what the answer must be: fill in the field for it under Settings.");
  if (kind === "choice") return { structured_outputs: { choice: text.split("\n").filter((line) => line.trim()) } };
  if (kind === "regex") return { structured_outputs: { regex: text } };
  try {
    return { response_format: { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(text) } } };
  } catch (error) {
    throw new Error(`The schema is not valid JSON: ${error.message}.`);
  }
}

function request() {
  return {
    model: "default",
    messages: kept.current.turns.map(({ role, content }) => ({ role, content })),
    stream: true,
    stream_options: { include_drafts: true, include_usage: true },
    enable_thinking: $("thinking").checked,
    max_tokens: number("tokens"),
    max_denoising_steps: number("steps"),
    entropy_bound: number("bound"),
    temperature: number("temperature"),
    seed: number("seed"),
    ...constraint(),
  };
}

// Images of the next message

function picture(url, name) {
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
    item.append(picture(image.url, image.name), button(`Remove ${image.name}`, () => {
      attached.splice(index, 1);
      showAttached();
    }));
    return item;
  });
  $("attached").replaceChildren(...items);
}

function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", act);
  return made;
}

// The conversation on the page

function show() {
  $("log").replaceChildren();
  kept.current.turns.forEach((turn, index) => {
    if (turn.role === "user") return addUser(turn, index);
    const reply = new Reply($("log"));
    if (turn.thinking) reply.addThinking(turn.thinking);
    reply.addText(words(turn));
    reply.finish(turn.facts || "");
    withActions(reply, index);
  });
  showKept();
}

function showKept() {
  const items = kept.all.map((one) => {
    const item = document.createElement("li");
    const open = button(one.title || "Untitled", () => {
      stop();
      kept.open(one.id);
      show();
      $("kept").open = false;
      $("prompt").focus();
    });
    if (one.id === kept.current.id) open.setAttribute("aria-current", "true");
    const remove = button("Remove", () => { kept.remove(one.id); show(); });
    remove.setAttribute("aria-label", `Remove ${one.title || "Untitled"}`);
    item.append(open, remove);
    return item;
  });
  $("kept").querySelector("ul").replaceChildren(...items);
}

function addUser(turn, index) {
  const article = document.createElement("article");
  article.className = "user";
  const title = document.createElement("h2");
  title.textContent = "You";
  const text = document.createElement("p");
  text.textContent = words(turn);
  const names = turn.names || [];
  const shown = images(turn).map((url, place) => picture(url, names[place] || "attached image"));
  article.append(title, ...shown, text, button("Edit", () => edit(index)));
  $("log").append(article);
}

// Takes the message back into the composer; what followed it goes when it is sent.
function edit(index) {
  if (running) return;
  const turn = kept.current.turns[index];
  attached.splice(0, attached.length, ...images(turn).map((url, place) => ({ url, name: (turn.names || [])[place] || "image" })));
  showAttached();
  kept.current.turns.length = index;
  $("prompt").value = words(turn);
  show();
  $("prompt").focus();
}

function withActions(reply, index) {
  reply.find(".again").addEventListener("click", () => {
    if (running) return;
    kept.current.turns.length = index;
    show();
    answer();
  });
  reply.find(".rewrite").addEventListener("click", () => rewrite(reply, index));
}

// The selected words of a reply are denoised again, both sides in view.
async function rewrite(reply, index) {
  if (running) return;
  const turn = kept.current.turns[index];
  const selected = getSelection().toString();
  const start = selected ? turn.content.indexOf(selected) : -1;
  if (start < 0) {
    $("status").textContent = "Select some plain words of this reply first, within one line; then press “Rewrite a part”.";
    return;
  }
  running = new AbortController();
  busy(true);
  try {
    const [before, after] = [turn.content.slice(0, start), turn.content.slice(start + selected.length)];
    const response = await post("v1/completions", {
      model: "default", prompt: before, suffix: after, max_tokens: number("tokens"), seed: number("seed"),
    }, running.signal);
    turn.content = before + (await response.json()).choices[0].text + after;
    reply.replaceText(turn.content);
    $("status").textContent = kept.save() || "Rewritten.";
  } catch (error) {
    $("status").textContent = error.name === "AbortError" ? "Stopped." : error.message;
  }
  busy(false);
}

// Asking

async function answer() {
  const { turns } = kept.current;
  const reply = new Reply($("log"));
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
  let facts, usage, warnings = [], thinking = "", finished = "";
  running = new AbortController();
  busy(true);
  try {
    const response = await post("v1/chat/completions", request(), running.signal);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      warnings = event.x_warnings || warnings;
      following(() => {
        if (event.x_draft) reply.addDraft(event.x_draft);
        for (const choice of event.choices || []) {
          facts = choice.x_diffusion || facts;
          warnings = choice.x_warnings || warnings;
          if (choice.delta.content) reply.addText(choice.delta.content);
          if (choice.delta.reasoning) {
            thinking += choice.delta.reasoning;
            reply.addThinking(choice.delta.reasoning);
          }
          for (const call of choice.delta.tool_calls || []) reply.addCall(call);
        }
      });
    }
    finished = "Reply complete.";
  } catch (error) {
    finished = error.name === "AbortError" ? "Stopped." : "The request failed.";
    if (error.name !== "AbortError") reply.fail(error.message);
    if (error instanceof Unreachable) waitForServer();
  }
  const summary = summarised(facts, usage, warnings);
  following(() => reply.finish(summary));
  // A turn without an answer would mislead the next one; what there is of an answer counts.
  if (reply.text) {
    turns.push({ role: "assistant", content: reply.text, thinking, facts: summary });
    withActions(reply, turns.length - 1);
  } else {
    reply.find(".again").hidden = false;
    reply.find(".again").addEventListener("click", () => { if (!running) { show(); answer(); } });
  }
  $("status").textContent = kept.save() || finished;
  showKept();
  busy(false);
}

function summarised(facts, usage, warnings) {
  const parts = facts ? [`seed ${facts.seed}`, `steps per block: ${facts.steps_per_block.join(", ")}`] : [];
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  return [...parts, ...warnings].join(" · ");
}

function send(text) {
  const { turns } = kept.current;
  // A message that was never answered gives way to the next one.
  if (turns.length && turns[turns.length - 1].role === "user") turns.pop();
  const given = attached.splice(0);
  showAttached();
  const parts = given.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  turns.push({
    role: "user",
    content: parts.length ? [...parts, { type: "text", text }] : text,
    names: given.map(({ name }) => name),
  });
  show();
  answer();
}

function busy(on) {
  $("send").disabled = on;
  $("stop").disabled = !on;
  if (on) $("status").textContent = "Denoising…";
  else running = null;
}

function stop() {
  if (running) running.abort();
}

// The server

async function connect() {
  const body = await health();
  $("model").textContent = body.model;
}

async function waitForServer() {
  $("model").textContent = "not connected";
  for (;;) {
    await new Promise((done) => setTimeout(done, 1000));
    try {
      await connect();
      $("status").textContent = "The server is back: press “Answer again”.";
      return;
    } catch { /* not yet */ }
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  send(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("form").addEventListener("change", () => { $("constraint-label").hidden = !$("form").value; });
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
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", () => {
  stop();
  kept.current = kept.fresh();
  attached.length = 0;
  showAttached();
  show();
  $("prompt").focus();
});
setUpDecisions($("decisions").querySelector("form"));
show();
connect().catch(waitForServer);
