for (const table of document.querySelectorAll(".sortable")) {
  const rows = () => [...table.tBodies].at(-1).querySelectorAll("tr:not(.group)");
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const value = row => {
      const data = row.cells[column].querySelector("data");
      return data ? Number(data.value) : row.cells[column].textContent;
    };
    const compare = (a, b, sign) => {
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
    };
    head.querySelector("button").onclick = () => {
      const other = { ascending: "descending", descending: "ascending" };
      const order = other[head.getAttribute("aria-sort")] ?? head.dataset.best;
      heads.forEach(one => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const sorted = [...rows()].sort((a, b) => compare(value(a), value(b), sign));
      [...table.tBodies].at(-1).append(...sorted);
    };
  });
}

for (const box of document.querySelectorAll(".filters")) {
  const table = document.getElementById(box.dataset.table);
  const passes = (row, control) => {
    if (control.type === "checkbox")
      return !control.checked || row.classList.contains("front");
    if (control.type === "search")
      return row.cells[0].textContent.includes(control.value.trim());
    return !control.value || row.cells[control.dataset.column].textContent === control.value;
  };
  const show = () => {
    const controls = [...box.querySelectorAll("input, select")];
    for (const row of [...table.tBodies].at(-1).querySelectorAll("tr:not(.group)"))
      row.hidden = !controls.every(control => passes(row, control));
  };
  box.oninput = show;
  show();
}

for (const player of document.querySelectorAll(".player")) {
  const range = player.querySelector("input"), play = player.querySelector(".play");
  const count = Number(range.max) + 1;
  let timer = 0;
  const show = frame => {
    range.value = frame;
    player.style.setProperty("--frame", frame);
    player.querySelector("output").textContent = "frame " + frame;
  };
  const step = by => show((Number(range.value) + by + count) % count);
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  play.onclick = () => {
    if (timer) return stop();
    timer = setInterval(step, 125, 1);
    play.textContent = "Pause";
  };
  player.querySelector(".back").onclick = () => { stop(); step(-1); };
  player.querySelector(".on").onclick = () => { stop(); step(1); };
  range.oninput = () => { stop(); show(Number(range.value)); };
}
