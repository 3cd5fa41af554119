// Questions with fixed answers about a text: one line a question, as `mlx_dgemma.decide` takes them.
"use strict";

import { post } from "./server.js";

export function parseQuestion(line) {
  const found = /^(.*?)\s*\[([^\[\]]*)\]\s*$/s.exec(line);
  if (!found) return { type: "noul", instructions: line };
  const [, instructions, answers] = found;
  const [mark, type] = answers.includes("<") ? ["<", "score"] : ["|", "choice"];
  return { type, instructions, criteria: answers.split(mark).map((answer) => answer.trim()) };
}

export function setUp(form) {
  const [state, questions] = form.querySelectorAll("textarea");
  const table = form.querySelector("tbody");
  const status = form.querySelector("[role=status]");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const lines = questions.value.split("\n").map((line) => line.trim()).filter(Boolean);
    const asked = Object.fromEntries(lines.map((line, index) => [`q${index + 1}`, parseQuestion(line)]));
    status.textContent = "Reading…";
    try {
      const response = await post("v1/systemone", { state: state.value, questions: asked });
      const { answers } = await response.json();
      table.replaceChildren(...lines.map((line, index) => row(line, answers[`q${index + 1}`])));
      table.parentElement.hidden = false;
      status.textContent = "";
    } catch (error) {
      status.textContent = error.message;
    }
  });
}

function row(line, answer) {
  const cells = [line.replace(/\s*\[.*$/s, ""), inWords(answer)].map((text) => {
    const cell = document.createElement("td");
    cell.textContent = text;
    return cell;
  });
  const line_ = document.createElement("tr");
  line_.append(...cells);
  return line_;
}

function inWords(answer) {
  const share = (value) => `${Math.round(100 * value)} %`;
  if (answer.type === "noul") return answer.noul >= 0.5 ? `yes, ${share(answer.noul)}` : `no, ${share(1 - answer.noul)}`;
  if (answer.type === "score") return `${answer.score.toFixed(1)} of ${Object.keys(answer.legend).length - 1}`;
  const sorted = Object.entries(answer.probabilities).sort((one, other) => other[1] - one[1]);
  return sorted.slice(0, 3).map(([name, value]) => `${name} ${share(value)}`).join(", ");
}
