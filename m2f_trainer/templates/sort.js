document.querySelectorAll("th button").forEach(button => button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.dataset.down = head.dataset.down === "1" ? "0" : "1";
  const value = row => { const text = row.cells[column].textContent, number = parseFloat(text);
    return text === "-" ? -1 : isNaN(number) || column === 0 ? text : number };
  [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    return (x < y ? -1 : x > y ? 1 : 0) * (down === "1" && column ? -1 : 1) }).forEach(row => body.append(row));
});
