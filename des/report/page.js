
"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  const theme = document.getElementById("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const nameTheme = () => (theme.textContent = isDark() ? "Light colours" : "Dark colours");
  const KEY = "des-report-theme";
  try {  // a browser may forbid storage to a page from a file
    const kept = localStorage.getItem(KEY);
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch {}
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem(KEY, root.dataset.theme); } catch {}
    nameTheme();
  });
  prefersDark.addEventListener("change", nameTheme);
  nameTheme();

  const reveal = (veil, shown) => {
    veil.setAttribute("aria-pressed", String(shown));
    veil.firstElementChild.textContent = shown ? "Blur" : "Show";
    veil.closest(".frame").classList.toggle("blurred", !shown);
  };
  for (const veil of all(".veil")) {
    veil.addEventListener("click", () => reveal(veil, veil.getAttribute("aria-pressed") !== "true"));
  }
  for (const [id, shown] of [["show-all", true], ["blur-all", false]]) {
    document.getElementById(id).addEventListener("click", () => all(".veil").forEach((veil) => reveal(veil, shown)));
  }
  document.querySelector(".tools").hidden = all(".veil").length === 0;

  const hint = (box) => (box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth + 1);
  const observer = new ResizeObserver((entries) => entries.forEach((entry) => hint(entry.target)));
  all(".scroll").forEach((box) => observer.observe(box));

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    return cell.dataset.value === undefined || text === "" ? text : Number(text);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  for (const button of all(".sort")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const body = head.closest("table").tBodies[0];
      const descending = head.getAttribute("aria-sort") === "ascending";
      all("th[aria-sort]", head.parentElement).forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [valueOf(row, head.cellIndex), row]);
      rows.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : compare(a, b) * (descending ? -1 : 1)));
      body.append(...rows.map(([, row]) => row));
    });
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details.numbers:not([open])");
    opened.forEach((details) => (details.open = true));
  });
  addEventListener("afterprint", () => opened.forEach((details) => (details.open = false)));
})();
