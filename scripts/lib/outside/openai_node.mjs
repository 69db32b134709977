// The npm package `openai` against a server: node openai_node.mjs NODE_MODULES_PARENT BASE_URL
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [, , folder, baseURL] = process.argv;
const OpenAI = createRequire(folder + "/")("openai").OpenAI;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name a colour." }];
const model = (await client.models.list()).data[0].id;
const common = { model, messages, max_tokens: 12, seed: 7 };

async function check(name, run) {
  await run();
  console.log("ok " + name);
}

await check("a model by its name", async () => {
  assert.equal((await client.models.retrieve(model)).id, model);
  await assert.rejects(client.models.retrieve("nobody"), OpenAI.NotFoundError);
});

await check("the best of eight", async () => {
  const answer = await client.chat.completions.create({ ...common, best_of: 8, return_all: true });
  const { candidates, selected } = answer.podium.results[0];
  assert.equal(candidates.length, 8);
  assert.equal(answer.choices[0].message.content, candidates[selected].text);
  const again = await client.chat.completions.create({ ...common, best_of: 8 });
  assert.deepEqual(again.choices, answer.choices.map(({ score, ...choice }) => choice));
});

await check("the best by the model's name", async () => {
  const answer = await client.chat.completions.create({ ...common, model: model + ":best-of-4:gcd", n: 2 });
  assert.equal(answer.podium.best_of, 4);
  assert.equal(answer.podium.ranker, "gcd");
  assert.equal(answer.choices.length, 2);
});

await check("a stream", async () => {
  const whole = await client.chat.completions.create(common);
  const stream = await client.chat.completions.create({ ...common, stream: true, stream_options: { include_usage: true } });
  let text = "", usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

await check("the stream helper, with candidates' events in between", async () => {
  const stream = client.chat.completions.stream({ ...common, best_of: 4, stream_candidates: true });
  const final = await stream.finalChatCompletion();
  assert.ok(final.choices[0].message.content.length > 0);
});

await check("a stream that is aborted", async () => {
  const stream = await client.chat.completions.create({ ...common, max_tokens: 500, ignore_eos: true, stream: true });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta?.content) stream.controller.abort();
  }
});

await check("completions with log-probabilities", async () => {
  const answer = await client.completions.create({ model, prompt: ["One,", "Two,"], max_tokens: 3, logprobs: 2, echo: true, best_of: 2 });
  assert.equal(answer.choices.length, 2);
  assert.ok(answer.choices[0].text.startsWith("One,"));
  assert.equal(answer.choices[0].logprobs.tokens.length, answer.choices[0].logprobs.token_logprobs.length);
});

await check("refusals", async () => {
  await assert.rejects(client.chat.completions.create({ ...common, temperature: 9 }), error => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
});

await check("many at a time", async () => {
  const answers = await Promise.all(Array.from({ length: 12 }, (_, seed) => client.chat.completions.create({ ...common, seed, best_of: 2 })));
  assert.ok(answers.every(answer => answer.choices[0].finish_reason));
});
