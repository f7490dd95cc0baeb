// What pages do beyond HTML: every one of them works without this file, only less comfortably.
(() => {
  const $ = (selector) => document.querySelector(selector);

  // --- Toasts ---------------------------------------------------------------------------------
  const toasts = $("#toasts");
  const dismiss = () => toasts.replaceChildren();
  const toast = (text) => {
    const shown = toasts.querySelector("[data-toast-text]");
    if (shown?.textContent === text) return; // a poll that fails again says nothing new
    const fresh = $("#toast").content.cloneNode(true);
    fresh.querySelector("[data-toast-text]").textContent = text;
    fresh.querySelector("button").addEventListener("click", dismiss);
    toasts.replaceChildren(fresh);
  };

  // --- Live parts -----------------------------------------------------------------------------
  const busy = () => document.hidden || $("[data-live] [popover]:popover-open");
  document.addEventListener("htmx:beforeRequest", (event) => {
    if (event.target.matches("[data-live]") && busy()) event.preventDefault();
  });
  document.addEventListener("htmx:afterRequest", (event) => event.detail.successful && dismiss());
  document.addEventListener("htmx:responseError", (event) =>
    toast(`The portal answered ${event.detail.xhr.status}; what you see may be old.`));
  for (const name of ["htmx:sendError", "htmx:timeout"])
    document.addEventListener(name, () => toast("The portal cannot be reached; what you see may be old."));

  // Somebody who comes back sees what is, even where polling has ended.
  const seen = () => document.hidden || window.htmx?.trigger(document.body, "portal:seen");
  document.addEventListener("visibilitychange", seen);
  window.addEventListener("focus", seen);

  // --- Times in the person's own zone; the hint keeps UTC -----------------------------------------
  const short = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" };
  const localize = () =>
    document.querySelectorAll("time[datetime]").forEach((time) => {
      const moment = new Date(time.dateTime);
      const old = moment.getFullYear() !== new Date().getFullYear();
      time.textContent = moment.toLocaleString(undefined, old ? { year: "numeric", ...short } : short);
    });

  // --- Copying --------------------------------------------------------------------------------
  const copy = async (button) => {
    const code = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.lastChild.textContent = " Copied";
      setTimeout(() => (button.lastChild.textContent = " Copy"), 2000);
    } catch {
      getSelection().selectAllChildren(code); // no clipboard without HTTPS: Ctrl+C does it
    }
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (button) copy(button);
  });

  const dress = () => {
    localize();
    document.querySelectorAll("[data-copy]").forEach((button) => (button.hidden = false));
  };
  document.addEventListener("htmx:afterSwap", dress);
  dress();

  const theme = $("#theme");
  if (theme) {
    theme.hidden = false;
    theme.addEventListener("click", () => window.toggleTheme());
  }
})();
