// Sets light or dark before the first paint: what the person chose here, else what their system says.
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const ofSystem = () => (system.matches ? "dark" : "light");
  const stored = () => {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null; // storage is off: follow the system
    }
  };
  const apply = () => document.documentElement.setAttribute("data-bs-theme", stored() || ofSystem());

  // Choosing what the system says anyway means following the system again.
  window.toggleTheme = () => {
    const next = (stored() || ofSystem()) === "dark" ? "light" : "dark";
    try {
      next === ofSystem() ? localStorage.removeItem("theme") : localStorage.setItem("theme", next);
    } catch {
      document.documentElement.setAttribute("data-bs-theme", next);
      return;
    }
    apply();
  };
  system.addEventListener("change", apply);
  apply();
})();
