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
  // What is new is worked into what is there, so that focus, selections and scrolling stay. What
  // people opened or ticked is theirs: the answer knows nothing of it.
  const theirs = { open: "details, dialog", checked: "input" };
  const callbacks = {
    beforeAttributeUpdated: (name, element) => !(theirs[name] && element.matches(theirs[name])),
  };
  window.htmx?.defineExtension("morph", {
    isInlineSwap: (style) => style === "morph",
    handleSwap: (style, target, fragment) => {
      if (style !== "morph") return false;
      dress(fragment); // or local times would flicker between the two
      return Idiomorph.morph(target, fragment.children, { callbacks });
    },
  });

  const PRIMARY = 1;
  let pressed = false;
  for (const name of ["pointerdown", "pointermove", "pointerup", "pointercancel"])
    document.addEventListener(
      name,
      (event) => (pressed = name !== "pointercancel" && (event.buttons & PRIMARY) > 0),
      { capture: true, passive: true },
    );
  const selectedIn = (part) => {
    const selection = getSelection();
    return !selection.isCollapsed && selection.containsNode(part, true);
  };
  // Whether somebody is at something that a swap would take from under their hands.
  const busy = (part) =>
    pressed || sent.size > 0 || $("[data-live] [popover]:popover-open") || selectedIn(part);

  // Somebody who comes back sees what is, even where polling has ended.
  const seen = () => document.hidden || window.htmx?.trigger(document.body, "portal:seen");
  document.addEventListener("visibilitychange", seen);
  window.addEventListener("focus", seen);

  const AGAIN = 1000; // milliseconds until what was put off is asked for anew
  let later;
  const putOff = () => {
    clearTimeout(later);
    later = setTimeout(seen, AGAIN);
  };
  document.addEventListener("htmx:beforeRequest", (event) => {
    if (!event.target.matches("[data-live]")) return;
    if (document.hidden) return event.preventDefault();
    if (!busy(event.target)) return;
    event.preventDefault();
    putOff();
  });
  // It may have begun while the answer was on its way.
  document.addEventListener("htmx:beforeSwap", (event) => {
    if (!event.target.matches("[data-live]") || !event.detail.shouldSwap || !busy(event.target)) return;
    event.detail.shouldSwap = false;
    putOff();
  });
  document.addEventListener("htmx:afterRequest", (event) => event.detail.successful && dismiss());
  // What was typed stays: HTMX puts nothing in its place unless the answer is a good one.
  const lost = (event) =>
    event.target.closest?.("form") ? "what you typed is still here, nothing else happened." : "what you see may be old.";
  document.addEventListener("htmx:responseError", (event) =>
    toast(`The portal answered ${event.detail.xhr.status}; ${lost(event)}`));
  for (const name of ["htmx:sendError", "htmx:timeout"])
    document.addEventListener(name, (event) => toast(`The portal cannot be reached; ${lost(event)}`));

  // --- A form that was sent -------------------------------------------------------------------
  // What takes long says so at its button, and nothing is sent twice; HTMX's forms say so themselves.
  const SOON = 300; // milliseconds, so that nothing flickers
  const LONG = 10_000; // then it can be sent again: no event tells that it was stopped by hand
  const sent = new Map();
  const letGo = (form) => {
    const { button, timers } = sent.get(form);
    timers.forEach(clearTimeout);
    button?.classList.remove("btn-loading");
    sent.delete(form);
  };
  document.addEventListener("submit", (event) => {
    const { target: form, submitter: button } = event;
    if (event.defaultPrevented || form.method !== "post") return;
    if (sent.has(form)) return event.preventDefault();
    const timers = [
      setTimeout(() => button?.classList.add("btn-loading"), SOON),
      setTimeout(() => letGo(form), LONG),
    ];
    sent.set(form, { button, timers });
  });
  // Come back to by the browser's own way: the page is as it was left.
  window.addEventListener("pageshow", () => [...sent.keys()].forEach(letGo));

  // --- Times in the person's own zone; the hint keeps UTC -----------------------------------------
  const short = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" };
  const localize = (part) =>
    part.querySelectorAll("time[datetime]").forEach((time) => {
      const moment = new Date(time.dateTime);
      const old = moment.getFullYear() !== new Date().getFullYear();
      const said = moment.toLocaleString(undefined, old ? { year: "numeric", ...short } : short);
      if (time.textContent !== said) time.textContent = said;
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
    const folded = (field) => field.closest("details:not([open])");
    return fields.find((field) => field.checkVisibility()) ?? fields.find(folded);
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
      const field = search();
      field.closest("details")?.setAttribute("open", "");
      field.focus();
      field.select();
    }
  });

  const dress = (part) => {
    localize(part);
    part.querySelectorAll("[data-copy], [data-needs-script]").forEach((it) => (it.hidden = false));
  };
  document.addEventListener("htmx:afterSwap", () => dress(document));
  dress(document);

  const theme = $("#theme");
  if (theme) {
    theme.hidden = false;
    theme.addEventListener("click", () => window.toggleTheme());
  }
})();
