for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
      const read = (row) => [row.cells[column].textContent, parseFloat(row.cells[column].textContent.replace(/,/g, ""))];
      const rows = [...table.tBodies[0].rows].map((row) => [row, ...read(row)]);
      rows.sort(([, a, x], [, b, y]) => isNaN(x) - isNaN(y) || way * (isNaN(x) ? a.localeCompare(b) : x - y));
      table.tBodies[0].append(...rows.map(([row]) => row));
    };
  });
}
