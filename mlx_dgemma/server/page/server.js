// What the page asks of the server, and errors as sentences that say what to do.
"use strict";

export function headers() {
  const key = document.getElementById("key").value;
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

// The response to a POST; throws an Error whose message is for the reader.
export async function post(path, body, signal) {
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("The server does not answer: start it again. This page goes on when it is back.");
  }
  if (response.ok) return response;
  throw new Error(await sentence(response));
}

export class Unreachable extends Error {}

async function sentence(response) {
  try {
    const body = await response.json();
    const detail = Array.isArray(body.detail) ? body.detail[0].msg : body.detail && body.detail.message;
    return detail || body.error.message;
  } catch {
    return `The server answered ${response.status}: its log says why.`;
  }
}

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let done, value;
    try {
      ({ done, value } = await reader.read());
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Unreachable("The connection broke in the middle of the reply: ask again.");
    }
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

export async function health() {
  const answer = await fetch("health", { cache: "no-store" });
  return answer.json();
}
