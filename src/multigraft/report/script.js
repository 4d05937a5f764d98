"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Which adapter is shown.
  const select = document.getElementById("adapter");
  if (select) {
    select.closest("[hidden]").hidden = false;
    const show = () => {
      for (const block of all("[data-adapter]")) {
        block.hidden = select.value !== "all" && block.dataset.adapter !== select.value;
      }
    };
    select.addEventListener("change", show);
    show(); // a browser that reloads a page keeps what was selected
  }

  // Heat maps: one stop of the Tab key each, arrow keys within, and words for the cell.
  for (const table of all(".heat")) {
    const cells = all("td[data-say]", table);
    if (!cells.length) continue;
    const output = table.closest(".scroll").nextElementSibling;
    const say = (cell) => {
      output.textContent = cell.dataset.say;
    };
    const enter = (cell) => {
      for (const other of cells) other.tabIndex = -1;
      cell.tabIndex = 0;
    };
    const go = (cell) => {
      const row = cell.dataset.row && document.getElementById(cell.dataset.row);
      if (!row) return;
      const details = row.closest("details");
      if (details) details.open = true;
      row.scrollIntoView({ block: "center" });
      row.focus({ preventScroll: true });
    };
    const beside = (cell, down, right) => {
      let row = cell.parentElement;
      let column = cell.cellIndex;
      for (;;) {
        if (down) row = down > 0 ? row.nextElementSibling : row.previousElementSibling;
        column += right;
        const next = row && row.cells[column];
        if (!next || next.tagName === "TH") return null;
        if (next.dataset.say) return next;
      }
    };
    const steps = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
    enter(cells[0]);
    for (const cell of cells) {
      cell.addEventListener("mouseenter", () => say(cell));
      cell.addEventListener("focus", () => { enter(cell); say(cell); });
      cell.addEventListener("click", () => { cell.focus(); go(cell); });
      cell.addEventListener("keydown", (event) => {
        const ends = { Home: cells[0], End: cells[cells.length - 1] };
        if (event.key === "Enter") {
          go(cell);
        } else if (event.key in ends) {
          ends[event.key].focus();
        } else if (event.key in steps) {
          const next = beside(cell, ...steps[event.key]);
          if (next) next.focus();
        } else {
          return;
        }
        event.preventDefault();
      });
    }
  }

  // Columns sort by their heading: largest first for numbers, A first for text.
  for (const head of all("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const isNumber = head.dataset.sort === "number";
      const first = isNumber ? "descending" : "ascending";
      const second = isNumber ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const body = head.closest("table").tBodies[0];
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => {
        const cell = row.cells[head.cellIndex];
        return isNumber ? Number(cell.dataset.value ?? -Infinity) : cell.textContent;
      };
      const compare = (a, b) => (isNumber ? a - b : a.localeCompare(b, undefined, { numeric: true }));
      body.append(...[...body.rows].sort((a, b) => sign * compare(value(a), value(b))));
    });
  }
})();
