"use strict";
// Shows one pair at a time and sends the answer. Texts are set as text, never as markup.

const KEYS = {
  a: "left", ArrowLeft: "left", b: "right", ArrowRight: "right", t: "tie", "=": "tie",
  s: "skip", u: "undo", Backspace: "undo",
};
const SAID = { left: "A is better.", right: "B is better.", tie: "Equal.", skip: "Skipped.", undo: "Taken back." };
const at = (id) => document.getElementById(id);
let name = "";
let pair = "";
let busy = false;
let canUndo = false;

async function ask(what, more) {
  const reply = await fetch(what, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ name, ...more }),
  });
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error);
  return found;
}

// One request at a time: a key held down or hit twice must not answer a pair that nobody has seen.
async function act(what, more, said) {
  if (busy) return;
  busy = true;
  at("answers").classList.add("busy");
  try {
    show(await ask(what, more));
    at("problem").hidden = true;
    at("spoken").textContent = said || "";
  } catch (error) {
    const lost = error instanceof TypeError;
    at("problem").textContent = lost
      ? "The server does not answer. Everything answered so far is kept: start rlaif annotate again and open the address that it prints."
      : error.message;
    at("problem").hidden = false;
  } finally {
    busy = false;
    at("answers").classList.remove("busy");
  }
}

function show(found) {
  sessionStorage.setItem("name", name);
  pair = found.finished ? "" : found.pair;
  canUndo = found.undo;
  at("start").hidden = true;
  at("work").hidden = Boolean(found.finished);
  at("finished").hidden = !found.finished;
  at("answers").hidden = false;
  document.body.classList.toggle("over", Boolean(found.finished));
  at("undo").disabled = !canUndo;
  at("who").textContent = name;
  at("place").textContent = `${found.done} of ${found.total}`;
  const track = at("track");
  track.setAttribute("aria-valuemax", found.total);
  track.setAttribute("aria-valuenow", found.done);
  track.firstElementChild.style.width = `${found.total ? (100 * found.done) / found.total : 0}%`;
  if (found.finished) return;
  for (const part of ["prompt", "left", "right"]) at(part).textContent = found[part];
  at("prompt").scrollTop = 0;
  window.scrollTo(0, 0);
}

function answer(choice) {
  if (choice === "undo") {
    if (canUndo) act("undo", {}, SAID.undo);
  } else if (pair) {
    act("answer", { pair, answer: choice }, SAID[choice]);
  }
}

document.addEventListener("keydown", (event) => {
  if (at("answers").hidden || event.repeat || event.altKey || event.metaKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const choice = event.ctrlKey ? (key === "z" ? "undo" : undefined) : KEYS[key];
  if (!choice) return;
  event.preventDefault();
  answer(choice);
});

for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => {
    answer(button.dataset.answer);
    button.blur();
  });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  name = at("name").value;
  act("next", {});
});

at("name").value = sessionStorage.getItem("name") || "";
at("name").focus();
