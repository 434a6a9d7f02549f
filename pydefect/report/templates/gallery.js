"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const list = at("cards");
  const cards = [...list.children];
  const viewer = at("viewer");
  let current = null;

  const orders = {
    errors: (a, b) => a.dataset.rank - b.dataset.rank,
    highest: (a, b) => b.dataset.score - a.dataset.score,
    lowest: (a, b) => a.dataset.score - b.dataset.score,
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true }),
  };
  const value = (id) => at(id)?.value ?? "";
  const shown = () => [...list.children].filter((card) => !card.hidden);

  function fits(card) {
    const { outcome, kind, name } = card.dataset;
    const wanted = value("outcome");
    const wrong = outcome === "miss" || outcome === "false_alarm";
    return (!wanted || outcome === wanted || (wanted === "errors" && wrong))
      && (!value("kind") || kind === value("kind"))
      && name.toLowerCase().includes(value("search").trim().toLowerCase());
  }

  function update() {
    list.append(...[...cards].sort(orders[value("sort")]));
    for (const card of cards) card.hidden = !fits(card);
    const count = shown().length;
    at("shown").textContent = `${count} of ${cards.length} images`;
    at("none").hidden = count > 0;
    document.body.classList.toggle("hide-found", !at("show-found").checked);
    document.body.classList.toggle("hide-truth", !at("show-truth").checked);
  }

  function show(card) {
    current = card;
    const stage = at("stage");
    stage.className = card.className;
    stage.replaceChildren(...[...card.children].map((child) => child.cloneNode(true)));
    viewer.setAttribute("aria-label", card.dataset.name);
    if (!viewer.open) viewer.showModal();
  }

  function step(by) {
    const among = shown();
    const next = among[among.indexOf(current) + by];
    if (next) show(next);
  }

  list.addEventListener("click", (event) => {
    if (event.target.closest(".views, .enlarge")) show(event.target.closest(".card"));
  });
  at("previous").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  at("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  viewer.addEventListener("close", () => current?.querySelector(".enlarge").focus());

  const controls = at("controls");
  // Some tell of a chosen option by the one, some by the other.
  for (const kind of ["input", "change"]) controls.addEventListener(kind, update);
  controls.addEventListener("submit", (event) => event.preventDefault());
  // Without scripts the page shows every card in the first order, and nothing that would not work.
  controls.hidden = false;
  for (const button of list.querySelectorAll(".enlarge")) button.hidden = false;
  update();
})();
