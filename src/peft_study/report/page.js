"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const print = matchMedia("print");

  // Charts: `ast` makes Vega interpret its expressions, so that the page needs no eval.
  const drawn = new Map();
  async function draw() {
    const theme = dark.matches && !print.matches ? "dark" : "light";
    for (const place of document.querySelectorAll("[data-chart]")) {
      drawn.get(place)?.finalize();
      const { view } = await vegaEmbed(place, data.charts[place.dataset.chart], {
        actions: false, ast: true, renderer: "svg", defaultStyle: false, config: data.themes[theme],
        tooltip: { disableDefaultStyle: true, theme: "page" },
      });
      drawn.set(place, view);
    }
    document.documentElement.dataset.charts = theme;
  }
  let drawing = draw();
  const again = () => { drawing = drawing.then(draw); };
  dark.addEventListener("change", again);
  print.addEventListener("change", again);

  // Copy buttons. A file opened from disk or in a notebook may have no clipboard: then the command is selected.
  async function copy(button) {
    const command = button.parentElement.querySelector("pre");
    try {
      await navigator.clipboard.writeText(command.textContent);
    } catch {
      getSelection().selectAllChildren(command);
      document.execCommand("copy");
    }
    const before = button.textContent;
    button.textContent = button.dataset.done;
    setTimeout(() => { button.textContent = before; }, 1500);
  }
  for (const button of document.querySelectorAll(".command button")) {
    button.hidden = false;
    button.addEventListener("click", () => { if (button.textContent !== button.dataset.done) copy(button); });
  }

  // The table of trials: search, filters, sorting.
  const table = document.querySelector(".trials");
  if (!table) return;
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
  const tools = document.querySelector(".tools");
  const [search, method, status] = ["search", "method", "status"].map((name) => tools.querySelector(`[name=${name}]`));
  const count = tools.querySelector("[role=status]");
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, text } of rows) {
      const fits = (!method.value || row.dataset.method === method.value)
        && (!status.value || row.dataset.status === status.value) && words.every((word) => text.includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = count.dataset.text.replace("{shown}", shown).replace("{all}", rows.length);
  }
  for (const field of [search, method, status]) field.addEventListener("input", filter);

  const order = new Intl.Collator(undefined, { numeric: true });
  function compare(a, b) {
    if (a === "" || b === "") return (a === "") - (b === "");
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? order.compare(a, b) : x - y;
  }
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  function sort(head) {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keys = new Map(rows.map(({ row }) => [row, value(row, head.cellIndex)]));
    const sorted = rows.map(({ row }) => row).sort((one, other) => {
      const [a, b] = [keys.get(one), keys.get(other)];
      return up || a === "" || b === "" ? compare(a, b) : compare(b, a);  // rows without a value stay last
    });
    table.tBodies[0].append(...sorted);
  }
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(head));
  }
  tools.hidden = false;
  filter();
})();
