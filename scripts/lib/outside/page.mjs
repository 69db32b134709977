// The page in a real browser, used as a person would, with screenshots of every state:
//
//   node page.mjs NODE_MODULES_PARENT PODIUM PYTHON FOLDER
//
// PYTHON has the package openai; the screenshots go to FOLDER.
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [, , modules, podium, python, folder] = process.argv;
const { chromium } = createRequire(modules + "/")("playwright-core");
const KEY = "open-sesame";
mkdirSync(folder, { recursive: true });

async function serve(...options) {
  const server = spawn(podium, ["serve", "--port", "0", "--best-of", "8", "--ranker", "gcd", ...options], { stdio: ["ignore", "pipe", "ignore"] });
  for await (const line of createInterface({ input: server.stdout })) {
    return { server, url: line.replace("listening on ", "") };
  }
  throw new Error("the server did not come up");
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});

// A tab, in which errors and requests to elsewhere count as failures.
async function tab(url, { phone = false, dark = false } = {}) {
  const context = await browser.newContext({
    viewport: phone ? { width: 390, height: 844 } : { width: 1280, height: 900 },
    deviceScaleFactor: phone ? 2 : 1, hasTouch: phone, isMobile: phone,
    colorScheme: dark ? "dark" : "light",
    permissions: ["clipboard-read", "clipboard-write"],
  });
  const page = await context.newPage();
  page.problems = [];
  page.on("pageerror", error => page.problems.push(String(error)));
  page.on("console", message => message.type() === "error" && page.problems.push(message.text()));
  page.on("request", request => request.url().startsWith(url) || page.problems.push("elsewhere: " + request.url()));
  await page.goto(url);
  await page.waitForFunction(() => document.getElementById("model").dataset.id);
  return page;
}

const shot = (page, name) => page.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
const settled = page => page.waitForSelector("#strategies:not([hidden])", { timeout: 120_000 });
const status = page => page.textContent("#status");
const clipboard = page => page.evaluate(() => navigator.clipboard.readText());

function step(name) {
  console.log("ok " + name);
}

const open = await serve();
const { url } = open;
try {
  // With the keyboard alone.
  const page = await tab(url);
  await shot(page, "desktop-light-0-ready");
  assert.equal(await page.evaluate(() => document.activeElement.id), "prompt", "the prompt has the focus");
  await page.keyboard.press("Control+A");
  await page.keyboard.type("Give three short tips for a good night's sleep.");
  await page.fill("#seed", "4");
  await page.fill("#tokens", "60");
  await page.keyboard.press("Control+Enter");
  await page.waitForFunction(() => document.querySelectorAll("li .text").length === 8 && [...document.querySelectorAll("li .text")].every(text => text.textContent.length > 30));
  await shot(page, "desktop-light-1-writing");
  await settled(page);
  await shot(page, "desktop-light-2-settled");
  assert.equal(await page.locator("li.win").count(), 1);
  step("candidates write themselves, one is chosen");

  const texts = await page.locator("li .text").allTextContents();
  const buttons = page.locator("#strategies button");
  const before = await page.locator("#candidates").getAttribute("aria-busy");
  assert.equal(before, "false");
  for (let index = 0; index < await buttons.count(); index++) {
    await buttons.nth(index).focus();
    await page.keyboard.press("Enter");
    assert.equal(await buttons.nth(index).getAttribute("aria-pressed"), "true");
    const named = Number((await buttons.nth(index).textContent()).match(/(\d+)$/)[1]);
    assert.ok(await page.locator("li").nth(named).evaluate(item => item.classList.contains("win")));
  }
  assert.deepEqual(await page.locator("li .text").allTextContents(), texts);
  step("strategies are compared on the same candidates, by keyboard");

  await page.click("#curl");
  const curl = await clipboard(page);
  const pasted = JSON.parse(execFileSync("bash", ["-c", curl.replace("curl ", "curl -s ")], { encoding: "utf8" }));
  const chosen = pasted.podium.results[0].selected;
  assert.equal(pasted.choices[0].message.content, texts[chosen], curl);
  step("the request pasted as curl gives the same answer");

  await page.click("#python");
  const program = await clipboard(page);
  const printed = execFileSync(python, ["-c", program], { encoding: "utf8" });
  assert.equal(printed.trimEnd(), texts[chosen].trimEnd(), program);
  step("and so does the program pasted as Python");

  await page.selectOption("#kind", "text");
  await page.fill("#prompt", "It's \"a\" test\\n of $quotes and `ticks`:");
  await page.click("#curl");
  const quoted = JSON.parse(execFileSync("bash", ["-c", (await clipboard(page)).replace("curl ", "curl -s ")], { encoding: "utf8" }));
  assert.ok(quoted.choices[0].text.length > 0);
  await page.click("#python");
  execFileSync(python, ["-c", await clipboard(page)], { encoding: "utf8" });
  step("quotes survive the copies");

  await page.fill("#tokens", "2000");
  await page.click("#run");
  await page.waitForFunction(() => document.querySelector("li .text")?.textContent.length > 10);
  await page.keyboard.press("Escape");
  await page.waitForFunction(() => document.getElementById("status").textContent.startsWith("Stopped"));
  assert.equal(await page.locator("li.writing").count(), 0);
  await shot(page, "desktop-light-3-stopped");
  step("Escape stops");

  await page.fill("#n", "3");
  await page.fill("#tokens", "12");
  await page.fill("#temperature", "1.5");
  await page.selectOption("#ranker", "");
  await page.click("#run");
  await settled(page);
  assert.equal(await page.locator("li").count(), 3);
  assert.ok(!(await page.textContent("#strategies")).includes("Ranker"));
  step("N, temperature and ranker are switched");
  assert.deepEqual(page.problems, []);

  for (const [phone, dark] of [[false, true], [true, false], [true, true]]) {
    const name = `${phone ? "phone" : "desktop"}-${dark ? "dark" : "light"}`;
    const small = await tab(url, { phone, dark });
    await small.fill("#tokens", "60");
    await small.fill("#seed", "4");
    await (phone ? small.tap("#run") : small.click("#run"));
    await small.waitForFunction(() => [...document.querySelectorAll("li .text")].some(text => text.textContent.length > 60));
    await shot(small, name + "-1-writing");
    await settled(small);
    await shot(small, name + "-2-settled");
    const wide = await small.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    assert.equal(wide, 0, "nothing sticks out at the side");
    if (phone) {
      const low = await small.$$eval("button, input, select, textarea", all => all.filter(one => one.offsetHeight && one.offsetHeight < 36).map(one => one.id || one.textContent));
      assert.deepEqual(low, [], "what is touched is tall enough");
    }
    assert.deepEqual(small.problems, []);
    step(name);
  }

  const linked = await tab(url + "/?prompt=Hello&n=2&tokens=8&seed=1&run");
  await settled(linked);
  step("a link that writes at once");
} finally {
  open.server.kill();
}

const closed = await serve("--api-key", KEY);
try {
  const context = await browser.newContext({ viewport: { width: 1280, height: 700 } });
  const page = await context.newPage();
  await page.goto(closed.url);
  await page.waitForSelector("#status.bad");
  assert.match(await status(page), /key/);
  await shot(page, "desktop-light-4-key");
  await page.fill("#key", KEY);
  await page.keyboard.press("Tab");
  await page.waitForFunction(() => document.getElementById("model").dataset.id);
  await page.fill("#tokens", "8");
  await page.click("#run");
  await settled(page);
  step("behind a key");
} finally {
  closed.server.kill();
  await browser.close();
}
