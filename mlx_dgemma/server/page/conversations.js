// Conversations kept in this browser. Each is {id, title, turns}; a turn is a message of the chat
// API, a reply's with its facts.
"use strict";

const KEY = "mlx_dgemma.conversations";
const MOST = 50;

export class Conversations {
  constructor() {
    try {
      const stored = JSON.parse(localStorage.getItem(KEY) || "[]");
      this.all = Array.isArray(stored) ? stored.filter(isConversation) : [];
    } catch {
      this.all = [];
    }
    this.current = this.fresh();
  }

  fresh() {
    return { id: crypto.randomUUID ? crypto.randomUUID() : String(Math.random()), title: "", turns: [] };
  }

  // Returns a sentence where the browser keeps no more.
  save() {
    const { current } = this;
    this.all = this.all.filter((one) => one.id !== current.id);
    if (current.turns.length) {
      current.title = current.title || words(current.turns[0]).slice(0, 60);
      this.all.unshift(current);
    }
    this.all.length = Math.min(this.all.length, MOST);
    try {
      localStorage.setItem(KEY, JSON.stringify(this.all));
      return "";
    } catch {
      return "This browser has no room to keep the conversation: remove older ones.";
    }
  }

  open(id) {
    this.current = this.all.find((one) => one.id === id) || this.fresh();
  }

  remove(id) {
    this.all = this.all.filter((one) => one.id !== id);
    if (this.current.id === id) this.current = this.fresh();
    this.save();
  }
}

function isConversation(one) {
  return one && typeof one.id === "string" && typeof one.title === "string" && Array.isArray(one.turns)
    && one.turns.every((turn) => turn && (turn.role === "user" || turn.role === "assistant"));
}

export function words(turn) {
  if (typeof turn.content === "string") return turn.content;
  return (turn.content || []).filter((part) => part.type === "text").map((part) => part.text).join("\n");
}

export function images(turn) {
  if (typeof turn.content === "string") return [];
  return (turn.content || []).filter((part) => part.type === "image_url").map((part) => part.image_url.url);
}
