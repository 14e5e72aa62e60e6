"use strict";

// Model texts arrive as HTML that the server has sanitized, and as plain text. Nothing else is ever set as HTML.

const at = (id) => document.getElementById(id);
const work = { item: null, chosen: null, ranking: [], tiesNext: false, edits: null, plain: false, busy: false, timer: null };
const clock = { spent: 0, since: null, mean: "" };
const narrow = window.matchMedia("(max-width: 46rem)");

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---- time: counted only while the page is visible ----

function startClock() {
  clock.spent = 0;
  clock.since = document.hidden ? null : performance.now();
}

function seconds() {
  const running = clock.since === null ? 0 : performance.now() - clock.since;
  return Math.round((clock.spent + running) / 100) / 10;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && clock.since !== null) {
    clock.spent += performance.now() - clock.since;
    clock.since = null;
  } else if (!document.hidden) {
    clock.since = performance.now();
  }
});

setInterval(() => {
  if (work.item) at("clock").textContent = `this item ${Math.floor(seconds())} s${clock.mean}`;
}, 500);

// ---- requests ----

async function ask(path, body) {
  const settings = body === undefined ? {} : {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  // Without an answer, a request is repeated with the same key until it is confirmed: it counts once. An answer that is
  // an error ends it.
  for (let wait = 500; ; wait = Math.min(wait * 2, 15000)) {
    let answer = null;
    try {
      answer = await fetch(path, settings);
    } catch {
      answer = null;
    }
    if (answer) return answer;
    say(body ? "Not saved yet: the server does not answer. Trying again …" : "The server does not answer. Trying again …", true);
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function load() {
  const answer = await ask("/api/item");
  if (answer.status === 401) location.assign("/enter");
  else if (answer.ok) show(await answer.json());
  else fail(await answer.text());
}

async function send(path, body) {
  if (work.busy) return;
  work.busy = true;
  document.body.classList.add("busy");
  try {
    const answer = await ask(path, { key: newKey(), ...body });
    if (answer.ok) {
      const told = await answer.json();
      show(told.next);
      if (path === "/api/undo") say(told.id === null ? "There is nothing to undo." : "Undone: judge it again.");
      else say("Saved.");
    } else if (answer.status === 401) {
      location.assign("/enter");
    } else if (answer.status === 409) {
      await load();
      say("That one is judged already, or no longer asked; here is the next.");
    } else if (answer.status >= 500) {
      fail(await answer.text());
    } else {
      say(await answer.text(), true);
    }
  } finally {
    work.busy = false;
    document.body.classList.remove("busy");
  }
}

function fail(reason) {
  at("actions").hidden = false;
  say(`The server reports an error: ${reason} Reload the page to try again.`, true);
}

function say(text, isProblem) {
  at("status").textContent = text;
  at("status").classList.toggle("problem", Boolean(isProblem));
}

// ---- showing an item ----

function show({ item, progress, state }) {
  clearTimeout(work.timer);
  Object.assign(work, { item, chosen: null, ranking: [], tiesNext: false, edits: null });
  const seen = progress.judged + progress.skipped;
  at("done").style.width = `${seen + progress.left ? (100 * seen) / (seen + progress.left) : 0}%`;
  clock.mean = progress.seconds ? ` · ${Math.round(progress.seconds)} s on average` : "";
  at("progress").textContent = `${progress.judged} judged · ${progress.skipped} skipped · ${progress.left} left`;
  at("work").hidden = !item;
  at("message").hidden = Boolean(item);
  at("actions").hidden = false;
  document.body.classList.toggle("idle", !item);
  if (!item) {
    at("clock").textContent = "";
    at("message").replaceChildren(
      element("h1", "", state ? "One moment" : "Nothing left to judge"),
      element("p", "", state || "You have judged every item that needs your judgement. Thank you."),
    );
    if (state) work.timer = setTimeout(load, 1500);
    return;
  }
  document.body.classList.toggle("pair", item.candidates.length === 2);
  at("prompt").replaceChildren(...item.prompt.map(turn));
  at("candidates").replaceChildren(...item.candidates.map(card));
  at("candidates").classList.toggle("many", item.candidates.length > 2);
  for (const box of at("more").querySelectorAll("input")) box.checked = false;
  at("more").open = false;
  window.scrollTo(0, 0);
  fold();
  say("");
  refresh();
  startClock();
}

function text({ html, text: plain }) {
  const made = element("div", "text");
  made.dir = "auto";
  made.dataset.plain = plain;
  if (work.plain) {
    made.append(element("pre", "plain", plain));
  } else {
    made.innerHTML = html;
    focusable(made);
  }
  made.rendered = html;
  return made;
}

// Blocks that scroll sideways must be reached by keyboard.
function focusable(made) {
  for (const block of made.querySelectorAll("pre, table")) block.tabIndex = 0;
}

// On a narrow screen a long prompt and long answers are cut, so that the first words of all are on the first screen.
function fold() {
  const prompt = at("prompt"), last = prompt.lastElementChild;
  prompt.classList.remove("open");
  prompt.scrollTop = last === prompt.firstElementChild ? 0 : last.offsetTop - prompt.offsetTop - 8;
  at("unfold").hidden = prompt.scrollHeight <= prompt.clientHeight + 2;
  tell(at("unfold"), false, "Show the whole prompt", "Fold the prompt");
  for (const made of document.querySelectorAll(".candidate")) {
    made.classList.remove("open");
    const shown = made.querySelector(":scope > .text");
    made.classList.toggle("long", shown.scrollHeight > shown.clientHeight + 2);
    tell(made.querySelector(".unfold"), false, "Show the whole answer", "Fold the answer");
  }
}

function unfold(part, button, open, close) {
  tell(button, part.classList.toggle("open"), open, close);
}

function tell(button, isOpen, open, close) {
  button.setAttribute("aria-expanded", String(isOpen));
  button.textContent = isOpen ? close : open;
}

function turn(one) {
  const made = element("article", `turn ${one.role}`);
  if (one.role) made.append(element("h2", "", one.role));
  made.append(text(one));
  return made;
}

function card(candidate, place) {
  const made = element("article", "candidate");
  made.dataset.place = place;
  const head = element("h2");
  const name = element("button", "name quiet", work.item.candidates.length === 2 ? ["Left", "Right"][place] : `${place + 1}`);
  name.dataset.stacked = ["First", "Second"][place];
  name.setAttribute("aria-pressed", "false");
  const editing = element("button", "edit quiet narrow-only", "Edit the chosen answer");
  const more = element("button", "unfold quiet narrow-only", "");
  head.append(name, element("span", "rank"), editing);
  made.append(head, text(candidate), more, element("p", "end", "end of answer"));
  editing.addEventListener("click", (event) => { event.stopPropagation(); edit(); });
  more.addEventListener("click", (event) => {
    event.stopPropagation();
    unfold(made, more, "Show the whole answer", "Fold the answer");
  });
  made.addEventListener("click", () => {
    name.blur();
    if (window.getSelection().toString() || made.querySelector("textarea")) return;
    if (narrow.matches && work.chosen === place) work.chosen = null, refresh();
    else choose(place);
  });
  return made;
}

function cardOf(place) {
  return at("candidates").querySelector(`[data-place="${place}"]`);
}

function refresh() {
  const pair = work.item.candidates.length === 2;
  work.item.candidates.forEach((_, place) => {
    const made = cardOf(place);
    const level = work.ranking.findIndex((tied) => tied.includes(place));
    made.classList.toggle("chosen", pair ? work.chosen === place : level === 0);
    made.classList.toggle("ranked", !pair && level > 0);
    made.querySelector(".name").setAttribute("aria-pressed", String(pair ? work.chosen === place : level >= 0));
    made.querySelector(".rank").textContent = pair ? (work.chosen === place ? "chosen" : "") : level < 0 ? "" : `rank ${level + 1}`;
  });
  const ready = pair ? work.chosen !== null : work.ranking.flat().length === work.item.candidates.length;
  document.body.classList.toggle("decided", pair ? work.chosen !== null : work.ranking.length > 0);
  at("actions").querySelector("[data-do=save]").disabled = !ready;
  for (const button of at("strengths").children) button.disabled = work.chosen === null;
  const order = work.ranking.map((tied) => tied.map((place) => place + 1).join(" = ")).join("  >  ");
  at("ranking").textContent = order ? order + (work.tiesNext ? "  =" : "") : "Rank the answers, best first: click them, or press their numbers.";
}

function redraw() {
  for (const made of document.querySelectorAll(".text")) {
    if (!made.dataset.plain) continue;
    if (work.plain) made.replaceChildren(element("pre", "plain", made.dataset.plain));
    else made.innerHTML = made.rendered;
    focusable(made);
  }
}

// ---- judging ----

function choose(place) {
  if (!work.item || place >= work.item.candidates.length) return;
  if (work.item.candidates.length === 2) {
    work.chosen = place;
  } else if (!work.ranking.flat().includes(place)) {
    if (work.tiesNext && work.ranking.length) work.ranking.at(-1).push(place);
    else work.ranking.push([place]);
    work.tiesNext = false;
  }
  refresh();
}

function unrank() {
  work.tiesNext = false;
  if (work.ranking.length && work.ranking.at(-1).length > 1) work.ranking.at(-1).pop();
  else work.ranking.pop();
  refresh();
}

function ticked(name) {
  return Array.from(at("more").querySelectorAll(`input[name=${name}]:checked`), (box) => box.value);
}

function judge(verdict, strength) {
  if (!work.item) return;
  const count = work.item.candidates.length;
  const body = { store: work.item.store, assignment: work.item.assignment, verdict, seconds: seconds(), reasons: ticked("reasons"), flags: ticked("flags") };
  if (verdict === "ranking" && count === 2) {
    if (work.chosen === null) return say("Choose one first: press ← or →, or click an answer.", true);
    body.ranks = work.chosen === 0 ? [0, 1] : [1, 0];
    if (strength) body.strength = strength;
  } else if (verdict === "ranking") {
    if (work.ranking.flat().length < count) return say("Rank all of them first.", true);
    if (work.ranking.length === 1) return judge("tie");
    body.ranks = work.item.candidates.map((_, place) => work.ranking.findIndex((tied) => tied.includes(place)));
  }
  const area = document.querySelector(".candidate textarea");
  if (area) keepEdit(area);
  if (work.edits) Object.assign(body, { edited: work.edits.text, edited_place: work.edits.place });
  send("/api/judgements", body);
}

// ---- editing ----

function edit() {
  if (!work.item || document.querySelector(".candidate textarea")) return;
  const best = work.item.candidates.length === 2 ? work.chosen : (work.ranking[0] ?? [null])[0];
  const place = work.edits ? work.edits.place : best;
  if (place === null) return say("Choose the answer to edit first.", true);
  const made = cardOf(place);
  const area = element("textarea"), done = element("button", "", "Close");
  area.value = work.edits ? work.edits.text : work.item.candidates[place].raw;
  area.rows = Math.min(Math.max(area.value.split("\n").length + 2, 8), 24);
  area.setAttribute("aria-label", "The answer as it should have been");
  const hint = element("p", "hint", "Your text is saved with your judgement. Esc or Ctrl+Enter closes it. ");
  hint.append(done);
  done.addEventListener("click", (event) => { event.stopPropagation(); keepEdit(area); });
  made.append(area, hint);
  made.classList.add("editing");
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape" || (event.key === "Enter" && (event.ctrlKey || event.metaKey))) {
      event.preventDefault();
      keepEdit(area);
    }
    event.stopPropagation();
  });
  area.focus();
}

function keepEdit(area) {
  const made = area.closest(".candidate");
  const place = Number(made.dataset.place);
  const isNew = area.value.trim() && area.value !== work.item.candidates[place].raw;
  work.edits = isNew ? { place, text: area.value } : null;
  made.querySelector(".hint").remove();
  area.remove();
  made.classList.remove("editing");
  made.classList.toggle("edited", Boolean(isNew));
}

// ---- keys and buttons ----

const doing = {
  save: () => judge("ranking"),
  tie: () => judge("tie"),
  both_bad: () => judge("both_bad"),
  skip: () => judge("skip"),
  undo: () => send("/api/undo", {}),
  edit,
  equal: () => { work.tiesNext = work.ranking.length > 0; refresh(); },
  back: unrank,
  plain: () => { work.plain = !work.plain; redraw(); },
  help: () => showHelp(at("help").hidden),
};

function showHelp(shown) {
  at("help").hidden = !shown;
  at("help-button").setAttribute("aria-expanded", String(shown));
}

const keys = { t: "tie", b: "both_bad", s: "skip", u: "undo", e: "edit", m: "plain", "?": "help" };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || at("instructions")?.open) return;
  // A focused control keeps the keys that it handles; Enter does nothing to a checkbox.
  if (event.key === " " || (event.key === "Enter" && event.target.closest?.("button, summary, a"))) return;
  const pair = work.item && work.item.candidates.length === 2;
  const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
  if (event.key === "ArrowLeft" && pair) choose(0);
  else if (event.key === "ArrowRight" && pair) choose(1);
  else if (event.key === "Enter" && work.item) doing.save();
  else if (digit && pair && digit <= 4) judge("ranking", digit);
  else if (digit && work.item && !pair) choose(digit - 1);
  else if (event.key === "=" && work.item && !pair) doing.equal();
  else if (event.key === "Escape" && !at("help").hidden) showHelp(false);
  else if (event.key === "Backspace" && work.item && !pair) unrank();
  else if (keys[event.key.toLowerCase()]) doing[keys[event.key.toLowerCase()]]();
  else return;
  event.preventDefault();
});

for (const button of document.querySelectorAll("[data-do]")) {
  button.addEventListener("click", () => { button.blur(); doing[button.dataset.do](); });
}
for (const button of document.querySelectorAll("[data-strength]")) {
  button.addEventListener("click", () => { button.blur(); judge("ranking", Number(button.dataset.strength)); });
}
at("help-button").addEventListener("click", () => { at("help-button").blur(); doing.help(); });
at("help-close").addEventListener("click", () => { at("help-close").blur(); showHelp(false); });
at("unfold").addEventListener("click", () => unfold(at("prompt"), at("unfold"), "Show the whole prompt", "Fold the prompt"));
narrow.addEventListener("change", () => { if (work.item) fold(); });

// ---- instructions: shown at first, again when they have changed, and on demand ----

const instructions = at("instructions");
if (instructions) {
  const version = instructions.dataset.version;
  const remembered = () => { try { return localStorage.getItem("instructions"); } catch { return null; } };
  instructions.addEventListener("close", () => {
    try { localStorage.setItem("instructions", version); } catch { /* shown again next time */ }
    startClock();
  });
  at("instructions-close").addEventListener("click", () => instructions.close());
  at("instructions-button").addEventListener("click", () => { at("instructions-button").blur(); instructions.showModal(); });
  if (remembered() !== version) instructions.showModal();
}

load();
