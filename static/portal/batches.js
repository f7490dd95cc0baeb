// Keeps what is ticked in the list of batches while it renews itself.
(() => {
  const ticked = () => [...document.querySelectorAll("#batches [name=batch]:checked")].map((box) => box.value);
  let kept = [];
  document.addEventListener("htmx:beforeSwap", () => (kept = ticked()));
  document.addEventListener("htmx:afterSwap", () => {
    for (const box of document.querySelectorAll("#batches [name=batch]")) box.checked = kept.includes(box.value);
  });
})();
