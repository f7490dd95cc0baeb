// Draws how fast a batch went, and goes on while the page renews itself.
(() => {
  const root = document.documentElement;
  const text = () => getComputedStyle(document.body).color;
  const lines = () => getComputedStyle(document.querySelector("#charts .card")).borderTopColor;
  const short = new Intl.NumberFormat(undefined, { notation: "compact", maximumSignificantDigits: 3 });
  const after = (seconds) => {
    if (seconds >= 7200) return `${short.format(seconds / 3600)} h`;
    return seconds >= 120 ? `${short.format(seconds / 60)} min` : `${short.format(seconds)} s`;
  };
  const points = () => JSON.parse(document.getElementById("batch").dataset.progress || "[]");

  const options = (legend) => ({
    animation: false,
    maintainAspectRatio: false,
    interaction: { mode: "index", intersect: false },
    plugins: {
      legend: { display: legend, position: "bottom", labels: { boxWidth: 12 } },
      tooltip: { callbacks: { title: ([item]) => `after ${after(item.parsed.x)}` } },
    },
    scales: {
      x: { type: "linear", min: 0, grid: { display: false }, ticks: { maxRotation: 0, autoSkipPadding: 16, callback: after } },
      y: { beginAtZero: true, ticks: { callback: (value) => short.format(value) } },
    },
  });
  const line = (label, key, colour) => ({
    label, data: points(), parsing: { xAxisKey: "x", yAxisKey: key },
    borderColor: colour, backgroundColor: `${colour}33`, fill: true, borderWidth: 2, pointRadius: points().length > 20 ? 0 : 3,
  });
  const draw = (id, sets) =>
    new Chart(document.getElementById(id), { type: "line", data: { datasets: sets }, options: options(sets.length > 1) });

  let charts = [];
  const dress = () => {
    for (const chart of charts) {
      chart.options.color = text();
      for (const scale of Object.values(chart.options.scales)) scale.ticks.color = text();
      chart.options.scales.y.grid = { color: lines() };
      chart.update();
    }
  };
  const show = () => {
    if (!points().length) return;
    if (charts.length) {
      for (const chart of charts) for (const set of chart.data.datasets) set.data = points();
    } else {
      Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
      document.getElementById("charts").hidden = false; // before drawing: a hidden canvas has no size
      charts = [
        draw("chart-requests", [line("Requests", "requests", "#3b82f6")]),
        draw("chart-tokens", [line("In", "in", "#0d9488"), line("Out", "out", "#ea7317")]),
      ];
    }
    dress();
  };
  new MutationObserver(dress).observe(root, { attributes: true, attributeFilter: ["data-bs-theme"] });
  document.addEventListener("htmx:afterSwap", show);
  show();
})();
