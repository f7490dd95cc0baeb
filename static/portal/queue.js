// Keeps what is ticked in the queue while its rows are replaced, and says how many are.
(() => {
  const boxes = () => [...document.querySelectorAll('input[name="batch"][form="bulk"]')];
  const all = () => document.getElementById("choose-all");
  const count = document.getElementById("bulk-count");
  const form = document.getElementById("bulk");
  let chosen = new Set();

  const tell = () => {
    chosen = new Set(boxes().filter((box) => box.checked).map((box) => box.value));
    count.textContent = chosen.size ? ` (${chosen.size})` : "";
    form.querySelector("button").disabled = !chosen.size;
    if (all()) all().checked = chosen.size > 0 && chosen.size === boxes().length;
  };
  document.addEventListener("change", (event) => {
    if (event.target === all()) boxes().forEach((box) => (box.checked = event.target.checked));
    tell();
  });
  document.addEventListener("htmx:afterSwap", () => {
    boxes().forEach((box) => (box.checked = chosen.has(box.value)));
    tell();
  });
  tell();
})();
