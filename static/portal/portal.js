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

  // allauth's scripts say so when a passkey was not used after all.
  document.addEventListener("allauth.error", (event) => {
    event.preventDefault();
    toast("The passkey was not used: it was cancelled, took too long, or is not for this site.");
  });

  // --- Live parts -----------------------------------------------------------------------------
  const busy = () => document.hidden || $("[data-live] [popover]:popover-open");
  document.addEventListener("htmx:beforeRequest", (event) => {
    if (event.target.matches("[data-live]") && busy()) event.preventDefault();
  });
  document.addEventListener("htmx:afterRequest", (event) => event.detail.successful && dismiss());
  // What was typed stays: HTMX puts nothing in its place unless the answer is a good one.
  const lost = (event) =>
    event.target.closest?.("form") ? "what you typed is still here, nothing else happened." : "what you see may be old.";
  document.addEventListener("htmx:responseError", (event) =>
    toast(`The portal answered ${event.detail.xhr.status}; ${lost(event)}`));
  for (const name of ["htmx:sendError", "htmx:timeout"])
    document.addEventListener(name, (event) => toast(`The portal cannot be reached; ${lost(event)}`));

  // Somebody who comes back sees what is, even where polling has ended.
  const seen = () => document.hidden || window.htmx?.trigger(document.body, "portal:seen");
  document.addEventListener("visibilitychange", seen);
  window.addEventListener("focus", seen);

  // --- A form that was sent -------------------------------------------------------------------
  // What takes long says so at its button, and nothing is sent twice; HTMX's forms say so themselves.
  const SOON = 300; // milliseconds, so that nothing flickers
  const sent = new Set();
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (event.defaultPrevented || form.method !== "post") return;
    if (sent.has(form)) return event.preventDefault();
    sent.add(form);
    const button = event.submitter;
    setTimeout(() => button?.classList.toggle("btn-loading", sent.has(form)), SOON);
  });
  // Come back to by the browser's own way: the page is as it was left.
  window.addEventListener("pageshow", () => {
    sent.clear();
    document.querySelectorAll(".btn-loading").forEach((it) => it.classList.remove("btn-loading"));
  });

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

  // --- What was opened inside a list, closed again --------------------------------------------
  document.addEventListener("click", (event) => {
    const id = event.target.closest("[data-empty]")?.dataset.empty;
    if (!id) return;
    document.getElementById(id).replaceChildren();
    $(`[aria-controls="${CSS.escape(id)}"]`)?.focus();
  });

  // --- The keyboard ---------------------------------------------------------------------------
  const TOGETHER = 1500; // milliseconds between the two keys of "g b"
  const typing = (target) => target.closest?.("input, textarea, select, [contenteditable]");
  let goUntil = 0;
  const search = () => {
    const fields = [...document.querySelectorAll("main input[type=search], main [data-search]")];
    return fields.find((field) => field.checkVisibility());
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || typing(event.target)) return;
    const list = $("#shortcuts");
    const going = performance.now() < goUntil && $(`[data-go="${CSS.escape(event.key)}"]`);
    goUntil = 0;
    if (going) {
      going.click();
    } else if (event.key === "g") {
      goUntil = performance.now() + TOGETHER;
    } else if (event.key === "?") {
      list?.togglePopover();
    } else if (event.key === "/" && search()) {
      event.preventDefault(); // or the "/" would be typed into it
      search().focus();
      search().select();
    }
  });

  const dress = () => {
    localize();
    document.querySelectorAll("[data-copy], [data-needs-script]").forEach((it) => (it.hidden = false));
  };
  document.addEventListener("htmx:afterSwap", dress);
  dress();

  const theme = $("#theme");
  if (theme) {
    theme.hidden = false;
    theme.addEventListener("click", () => window.toggleTheme());
  }
})();
