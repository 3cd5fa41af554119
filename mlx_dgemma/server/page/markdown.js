// Markdown of a reply as a DOM fragment. A model's text is untrusted: HTML in it is shown as text,
// what marked makes is sanitised, and nothing is fetched.
"use strict";

const MATH = { name: "math", level: "inline" };

function mathml(source, displayMode) {
  const options = { displayMode, output: "mathml", throwOnError: false, trust: false, maxExpand: 100, maxSize: 20 };
  // The source, which is repeated for machines, would be shown as text once it is sanitised.
  return katex.renderToString(source, options).replace(/<annotation[\s\S]*?<\/annotation>/g, "");
}

const INLINE_MATH = /^\\\((.+?)\\\)|^\$(?!\s)((?:[^$\\\n]|\\.)+?)(?<!\s)\$(?!\d)/s;
const BLOCK_MATH = /^(?:\$\$|\\\[)([\s\S]+?)(?:\$\$|\\\])/;

marked.use({
  gfm: true,
  extensions: [
    {
      ...MATH,
      start: (text) => text.search(/\$|\\\(/),
      tokenizer(text) {
        const found = INLINE_MATH.exec(text);
        return found ? { type: "math", raw: found[0], source: found[1] ?? found[2] } : undefined;
      },
      renderer: (token) => mathml(token.source, false),
    },
    {
      name: "mathBlock",
      level: "block",
      start: (text) => text.search(/\$\$|\\\[/),
      tokenizer(text) {
        const found = BLOCK_MATH.exec(text);
        return found ? { type: "mathBlock", raw: found[0], source: found[1] } : undefined;
      },
      renderer: (token) => mathml(token.source, true),
    },
  ],
  renderer: {
    html: ({ text }) => escaped(text),
    // An image's address would be fetched: its words are shown instead.
    image: ({ text }) => escaped(text),
  },
});

function escaped(text) {
  const holder = document.createElement("span");
  holder.textContent = text;
  return holder.innerHTML;
}

const ALLOWED = {
  USE_PROFILES: { html: true, mathMl: true },
  FORBID_TAGS: ["style", "form", "input", "button", "textarea", "select", "img", "video", "audio", "iframe", "base", "link", "meta"],
  FORBID_ATTR: ["style", "id", "name", "class", "srcset", "action", "formaction"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

export function render(text) {
  let html;
  try {
    html = marked.parse(text);
  } catch {
    html = `<p>${escaped(text)}</p>`;
  }
  // A code block's language is the one class that is needed; it goes round the sanitiser as data.
  const languages = marked.lexer(text).flatMap(codeLanguages);
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  [...fragment.querySelectorAll("pre > code")].forEach((code, index) => highlight(code, languages[index]));
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = document.createElement("div");
    frame.className = "table";
    frame.tabIndex = 0;
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", "Table");
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

function codeLanguages(token) {
  if (token.type === "code") return [(token.lang || "").split(/\s/)[0]];
  const inner = [...(token.tokens || []), ...(token.items || [])];
  return inner.flatMap(codeLanguages);
}

function highlight(code, language) {
  const source = code.textContent;
  if (language && hljs.getLanguage(language) && source.length < 100_000) {
    const html = hljs.highlight(source, { language, ignoreIllegals: true }).value;
    const clean = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true };
    code.replaceChildren(DOMPurify.sanitize(html, clean));
  }
  const frame = document.createElement("div");
  frame.className = "code";
  const copy = document.createElement("button");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Press Ctrl-C";
      getSelection().selectAllChildren(code);
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  const block = code.parentElement;
  block.tabIndex = 0;
  block.setAttribute("role", "region");
  block.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  block.replaceWith(frame);
  frame.append(copy, block);
}
