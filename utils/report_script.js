
"use strict";
const cards = [...document.querySelectorAll(".card")];
const byId = (id) => document.getElementById(id);
const texts = new Map(cards.map((card) => [
  card,
  `${card.dataset.row} ${card.querySelector(".caption").textContent}`.toLowerCase(),
]));
const values = new Map(cards.map((card) => [card, JSON.parse(card.dataset.values)]));

function chosen(id) {
  const control = byId(id);
  return control ? control.value : "";
}

function show() {
  const words = chosen("search").toLowerCase().split(/\s+/).filter(Boolean);
  const number = words.length === 1 && /^\d+$/.test(words[0]) ? words[0] : null;
  let shown = 0;
  for (const card of cards) {
    const fits =
      (number === card.dataset.row || words.every((word) => texts.get(card).includes(word))) &&
      ["type", "state"].every((key) => !chosen(key) || card.dataset[key] === chosen(key));
    card.hidden = !fits;
    shown += fits;
  }
  byId("count").textContent = `${shown} of ${cards.length} prompts`;
}

function sort() {
  const key = chosen("sort");
  const sign = chosen("order") === "down" ? -1 : 1;
  const value = (card) => (key === "row" ? Number(card.dataset.row) : values.get(card)[Number(key)]);
  const order = [...cards].sort((a, b) => {
    const [first, second] = [value(a), value(b)];
    // What is not known stands last, whatever the order.
    if (first === null || second === null) return (first === null) - (second === null);
    return sign * (first - second) || Number(a.dataset.row) - Number(b.dataset.row);
  });
  byId("cards").append(...order);
}

function setAll(open) {
  for (const card of cards) if (!card.hidden) card.querySelector("details").open = open;
}

// On paper nothing can be opened.
let closed = [];
function openForPrint() {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const part of closed) part.open = true;
}
function closeAfterPrint() {
  for (const part of closed) part.open = false;
}

if (cards.length) {
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", show);
  for (const id of ["type", "state"]) if (byId(id)) byId(id).addEventListener("change", show);
  for (const id of ["sort", "order"]) byId(id).addEventListener("change", sort);
  byId("open").addEventListener("click", () => setAll(true));
  byId("close").addEventListener("click", () => setAll(false));
  show();
  sort();
}
window.addEventListener("beforeprint", openForPrint);
window.addEventListener("afterprint", closeAfterPrint);
