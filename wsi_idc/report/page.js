"use strict";
(() => {
  const table = document.getElementById("slides");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const told = document.getElementById("shown");
  const words = document.getElementById("words");
  const choices = [...document.querySelectorAll("input[name=kind]")];
  const dialog = document.getElementById("detail");
  const detail = dialog.querySelector("article");
  const place = document.getElementById("place");
  const [back, on] = ["back", "on"].map((id) => document.getElementById(id));
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const alike = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  let opacity = null;

  const visible = () => [...body.rows].filter((row) => !row.hidden);

  function filter() {
    const kind = choices.find((choice) => choice.checked).value;
    const wanted = words.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const fits = kind === "all" || row.dataset.kinds.split(",").includes(kind);
      row.hidden = !(fits && wanted.every((word) => text.get(row).includes(word)));
    }
    told.textContent = `${visible().length} of ${rows.length} shown`;
  }

  function sort(head) {
    const column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending" ||
      (!head.hasAttribute("aria-sort") && head.dataset.first === "descending");
    const sign = down ? -1 : 1;
    const key = (row) => row.cells[column].dataset.key;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (head.dataset.as === "number" ? x - y : alike.compare(x, y));
    };
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort(order));
  }

  function show(row) {
    const template = document.getElementById(row.dataset.detail);
    detail.replaceChildren(template.content.cloneNode(true));
    const all = visible(), at = all.indexOf(row);
    place.textContent = `${at + 1} of ${all.length}`;
    dialog.dataset.row = row.dataset.detail;
    back.disabled = at <= 0;
    on.disabled = at < 0 || at + 1 >= all.length;
    const slider = detail.querySelector(".opacity");
    if (slider) {
      if (opacity !== null) slider.value = opacity;
      slider.addEventListener("input", () => fade(slider));
      fade(slider);
    }
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    detail.querySelector("h2").focus();
  }

  function fade(slider) {
    opacity = slider.value;
    detail.querySelector(".map").setAttribute("opacity", opacity / 100);
    detail.querySelector(".slider output").textContent = `${opacity} %`;
  }

  function step(by) {
    const all = visible();
    const next = all[all.findIndex((row) => row.dataset.detail === dialog.dataset.row) + by];
    if (next) show(next);
  }

  for (const head of table.tHead.rows[0].cells) {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => sort(head));
  }
  for (const choice of choices) choice.addEventListener("change", filter);
  words.addEventListener("input", filter);
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && (event.target.closest(".open") || !String(getSelection()))) show(row);
  });
  back.addEventListener("click", () => step(-1));
  on.addEventListener("click", () => step(1));
  document.getElementById("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("input") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("close", () => {
    const row = rows.find((one) => one.dataset.detail === dialog.dataset.row);
    detail.replaceChildren();
    if (row) row.querySelector(".open").focus();
  });
  filter();
})();
