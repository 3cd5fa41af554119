// One reply on the page: its text as Markdown, its thought, its calls, and its canvas at every step.
"use strict";

import { render } from "./markdown.js";

export class Reply {
  constructor(log) {
    const copy = document.getElementById("reply").content.cloneNode(true);
    this.root = copy.querySelector("article");
    log.append(copy);
    this.drafts = [];
    this.text = "";
    this.find("input").addEventListener("input", (event) => this.draw(Number(event.target.value)));
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  addText(text) {
    this.text += text;
    this.find(".text").replaceChildren(render(this.text));
  }

  replaceText(text) {
    this.text = "";
    this.addText(text);
  }

  addThinking(text) {
    this.find(".thinking").hidden = false;
    this.find(".thinking p").textContent += text;
  }

  addCall(call) {
    const shown = document.createElement("pre");
    shown.tabIndex = 0;
    shown.setAttribute("role", "region");
    shown.setAttribute("aria-label", "Tool call");
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

  finish(facts) {
    this.find(".facts").textContent = facts;
    this.find(".again").hidden = false;
    this.find(".rewrite").hidden = !this.text;
  }

  fail(message) {
    const line = document.createElement("p");
    line.className = "error";
    line.setAttribute("role", "alert");
    line.textContent = message;
    this.root.append(line);
  }
}
