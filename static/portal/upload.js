// Sends a form's file with a progress bar, and takes files that are dropped on it. Without this
// file the same form is sent by the browser itself.
(() => {
  const size = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });
  const megabytes = (bytes) => `${size.format(bytes / 1e6)} MB`;

  const equip = (form) => {
    const part = (name) => form.querySelector(`[data-upload-${name}]`);
    const input = form.querySelector("input[type=file]");
    const button = form.querySelector("button[type=submit]");
    const [shown, bar, said, stop, wrong] = ["shown", "bar", "said", "stop", "wrong"].map(part);
    let request = null;

    // A file may be dropped anywhere, also while the form is folded away.
    const seen = () => form.closest("details")?.setAttribute("open", "");
    const refuse = (text) => {
      if (text) seen();
      wrong.textContent = text;
      wrong.hidden = !text;
    };
    const rest = () => {
      request = null;
      shown.hidden = true;
      button.disabled = input.disabled = false;
    };
    const fail = (text) => {
      rest();
      refuse(text);
    };

    const answered = () => {
      let answer = {};
      try {
        answer = JSON.parse(request.responseText);
      } catch {
        // Not the portal's own words: a proxy's, or the page to sign in at.
      }
      if (answer.url) location.assign(answer.url);
      else if (answer.error) fail(answer.error);
      else if (request.status === 200) location.assign(request.responseURL);
      else fail(`The portal answered ${request.status}; nothing was stored.`);
    };

    const send = () => {
      const data = new FormData(form);
      request = new XMLHttpRequest();
      request.open("POST", form.action);
      request.setRequestHeader("Accept", "application/json");
      request.upload.addEventListener("progress", ({ loaded, total }) => {
        bar.value = (100 * loaded) / total;
        said.textContent = loaded < total ? `${megabytes(loaded)} of ${megabytes(total)}` : "Looking at it";
      });
      request.addEventListener("load", answered);
      request.addEventListener("error", () => fail("The upload broke off; nothing was stored. Try again."));
      request.addEventListener("abort", () => fail("Stopped; nothing was stored."));
      refuse("");
      bar.value = 0;
      said.textContent = "";
      shown.hidden = false;
      seen();
      button.disabled = input.disabled = true;
      request.send(data);
    };

    form.addEventListener("submit", (event) => {
      const file = input.files[0];
      if (!file) return; // the browser asks for one
      event.preventDefault();
      if (file.size > Number(form.dataset.limit))
        refuse(`The file has ${megabytes(file.size)}; at most ${megabytes(Number(form.dataset.limit))} are taken here.`);
      else if (!request) send();
    });
    stop.addEventListener("click", () => request?.abort());

    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    let depth = 0;
    const over = (change) => {
      depth = change ? depth + change : 0;
      form.classList.toggle("is-over", depth > 0);
    };
    document.addEventListener("dragenter", (event) => hasFiles(event) && over(1));
    document.addEventListener("dragleave", (event) => hasFiles(event) && over(-1));
    document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      over(0);
      if (request) return;
      if (event.dataTransfer.files.length !== 1) return refuse("Drop one file at a time.");
      input.files = event.dataTransfer.files;
      form.requestSubmit();
    });
    window.addEventListener("pageshow", rest); // come back to by the browser's own way
  };

  document.querySelectorAll("form[data-upload]").forEach(equip);
})();
