// Draws the charts of the usage page; its tables say the same without this file.
(() => {
  const data = JSON.parse(document.getElementById("usage").textContent);
  const root = document.documentElement;
  // Each is readable on a light and on a dark ground; the last is for all other models.
  const colours = ["#3b82f6", "#ea7317", "#0d9488", "#a855f7", "#ec4899", "#16a34a", "#b7791f", "#7c8798"];
  const text = () => getComputedStyle(document.body).color;
  const lines = () => getComputedStyle(document.querySelector("#charts .card")).borderTopColor;
  const short = new Intl.NumberFormat(undefined, { notation: "compact", maximumSignificantDigits: 3 });

  const options = (legend, stacked) => ({
    animation: false,
    maintainAspectRatio: false,
    interaction: { mode: "index", intersect: false },
    plugins: { legend: { display: legend, position: "bottom", labels: { boxWidth: 12 } } },
    scales: {
      x: { stacked, grid: { display: false }, ticks: { maxRotation: 0, autoSkipPadding: 12 } },
      y: { stacked, beginAtZero: true, ticks: { callback: (value) => short.format(value) } },
    },
  });
  const bars = ({ label, data }, index) => ({ label, data, backgroundColor: colours[index], maxBarThickness: 40 });
  const draw = (id, sets, legend) =>
    new Chart(document.getElementById(id), {
      type: "bar",
      data: { labels: data.days, datasets: sets.map(bars) },
      options: options(legend, true),
    });

  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  document.getElementById("charts").hidden = false; // before drawing: a hidden canvas has no size
  const charts = [draw("chart-tokens", data.tokens, true), draw("chart-second", [data.second], false)];
  const dress = () => {
    for (const chart of charts) {
      chart.options.color = text();
      for (const scale of Object.values(chart.options.scales)) scale.ticks.color = text();
      chart.options.scales.y.grid = { color: lines() };
      chart.update();
    }
  };
  new MutationObserver(dress).observe(root, { attributes: true, attributeFilter: ["data-bs-theme"] });
  dress();
})();
