// One situation of a JavaScript client against a running server; the outcome is a line of JSON.
// node client.mjs KIND SITUATION URL [PICTURE]
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, Output, stepCountIs, streamText, tool } from 'ai';
import OpenAI from 'openai';
import { zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const [kind, situation, url, picture] = process.argv.slice(2);
const settings = { baseURL: `${url}/v1`, apiKey: 'none' };
const Place = z.object({ city: z.string(), country: z.string() });
const LONG = 'word '.repeat(600);
const asked = [];

function look({ q }) {
  asked.push(q);
  return `found ${q}`;
}

// The AI SDK, through each of its providers.

const models = {
  compatible: () =>
    createOpenAICompatible({ name: 'here', ...settings, supportsStructuredOutputs: true })('default'),
  chat: () => createOpenAI(settings).chat('default'),
  responses: () => createOpenAI(settings)('default'),
  anthropic: () => createAnthropic(settings)('claude-sonnet-4-5'),
};
const tools = {
  look: tool({ description: 'Looks.', inputSchema: z.object({ q: z.string() }), execute: look }),
};

const sdk = {
  async loop(model) {
    const done = await generateText({ model, tools, prompt: 'Find.', stopWhen: stepCountIs(9) });
    return { text: done.text, asked };
  },
  async streamed(model) {
    const run = streamText({ model, tools, prompt: 'Find.', stopWhen: stepCountIs(9) });
    let text = '';
    for await (const part of run.fullStream) {
      if (part.type === 'error') throw part.error;
      if (part.type === 'text-delta') text += part.text;
    }
    return { text, asked };
  },
  async output(model) {
    const done = await generateText({ model, prompt: 'Where?', output: Output.object({ schema: Place }) });
    return done.output;
  },
  async outputWithTools(model) {
    const done = await generateText({
      model, tools, prompt: 'Where?', stopWhen: stepCountIs(9),
      output: Output.object({ schema: Place }),
    });
    return { ...done.output, asked };
  },
  async picture(model) {
    const content = [{ type: 'text', text: '?' }, { type: 'image', image: picture }];
    return { text: (await generateText({ model, messages: [{ role: 'user', content }] })).text };
  },
  async long(model) {
    const error = await generateText({ model, prompt: LONG, maxRetries: 0 }).catch((e) => e);
    return { status: error.statusCode, message: error.message };
  },
  async cut(model, limit) {
    const done = await generateText({ model, tools, prompt: 'a', maxOutputTokens: limit });
    return { text: done.text, calls: done.toolCalls.length, reason: done.finishReason };
  },
  async cancelled(model) {
    const leaving = new AbortController();
    const run = streamText({ model, prompt: 'a', abortSignal: leaving.signal, onError() {} });
    for await (const part of run.fullStream) if (part.type === 'text-delta') leaving.abort();
    return { left: true };
  },
};

// The openai package.

const FUNCTION = {
  name: 'look', description: 'Looks.', parse: JSON.parse, function: look,
  parameters: { type: 'object', properties: { q: { type: 'string' } }, required: ['q'] },
};
const DECLARED = [{ type: 'function', function: { name: 'look', parameters: FUNCTION.parameters } }];

function ask(content) {
  return { model: 'default', messages: [{ role: 'user', content }] };
}

const plain = {
  async loop(client) {
    const run = client.chat.completions.runTools({ ...ask('Find.'), tools: [{ type: 'function', function: FUNCTION }] });
    return { text: await run.finalContent(), asked };
  },
  async streamed(client) {
    const run = client.chat.completions.runTools({
      ...ask('Find.'), stream: true, tools: [{ type: 'function', function: FUNCTION }],
    });
    let text = '';
    run.on('content', (piece) => (text += piece));
    await run.finalContent();
    return { text, asked };
  },
  async output(client) {
    const format = zodResponseFormat(Place, 'place');
    const done = await client.chat.completions.parse({ ...ask('Where?'), response_format: format });
    return done.choices[0].message.parsed;
  },
  async picture(client) {
    const parts = [{ type: 'text', text: '?' }, { type: 'image_url', image_url: { url: picture } }];
    return { text: (await client.chat.completions.create(ask(parts))).choices[0].message.content };
  },
  async long(client) {
    const error = await client.chat.completions.create(ask(LONG)).catch((e) => e);
    return { status: error.status, message: error.message, code: error.code };
  },
  async cut(client, limit) {
    const done = await client.chat.completions.create({ ...ask('a'), tools: DECLARED, max_tokens: limit });
    const { message, finish_reason } = done.choices[0];
    return { text: message.content, calls: message.tool_calls?.length ?? 0, reason: finish_reason };
  },
  async cancelled(client) {
    const stream = await client.chat.completions.create({ ...ask('a'), stream: true });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
    return { left: true };
  },
};

const outcome =
  kind === 'openai'
    ? await plain[situation](new OpenAI({ ...settings, maxRetries: 0 }), Number(picture))
    : await sdk[situation](models[kind](), Number(picture));
console.log(JSON.stringify(outcome));
if (situation === 'cancelled') await new Promise((resolve) => setTimeout(resolve, 3000));
