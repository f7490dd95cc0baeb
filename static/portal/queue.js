// Says how many are ticked in the queue, also when a ticked row has gone, and ticks all of a page.
(() => {
  const boxes = () => [...document.querySelectorAll('input[name="batch"][form="bulk"]')];
  const all = () => document.getElementById("choose-all");
  const count = document.getElementById("bulk-count");
  const form = document.getElementById("bulk");

  const tell = () => {
    const chosen = boxes().filter((box) => box.checked).length;
    count.textContent = chosen ? ` (${chosen})` : "";
    form.querySelector("button").disabled = !chosen;
    if (all()) all().checked = chosen > 0 && chosen === boxes().length;
  };
  document.addEventListener("change", (event) => {
    if (event.target === all()) boxes().forEach((box) => (box.checked = event.target.checked));
    tell();
  });
  document.addEventListener("htmx:afterSwap", tell);
  tell();
})();
