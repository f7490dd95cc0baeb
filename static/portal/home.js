// Draws the charts of the home page, in the person's own hours and days.
(() => {
  const data = JSON.parse(document.getElementById("hours").textContent);
  const short = new Intl.NumberFormat(undefined, { notation: "compact", maximumSignificantDigits: 3 });
  const HOUR = 3600;
  const series = ["Tokens in", "Tokens out", "Requests"];
  const colours = ["#3b82f6", "#0d9488", "#ea7317"];

  const empty = () => ({ "Tokens in": 0, "Tokens out": 0, Requests: 0 });
  const add = (sum, [, requests, input, output]) => {
    sum["Tokens in"] += input;
    sum["Tokens out"] += output;
    sum.Requests += requests;
  };
  const hours = () => {
    const slots = new Map();
    for (let at = data.now - 23 * HOUR; at <= data.now; at += HOUR) slots.set(at, empty());
    for (const each of data.hours) if (slots.has(each[0])) add(slots.get(each[0]), each);
    const said = (at) => new Date(at * 1000).toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit" });
    return { labels: [...slots.keys()].map(said), sums: [...slots.values()] };
  };
  const days = () => {
    const slots = new Map();
    for (let back = 6; back >= 0; back--) {
      const day = new Date(data.now * 1000);
      day.setDate(day.getDate() - back);
      slots.set(day.toDateString(), { day, sum: empty() });
    }
    for (const each of data.hours) {
      const slot = slots.get(new Date(each[0] * 1000).toDateString());
      if (slot) add(slot.sum, each);
    }
    const said = ({ day }) => day.toLocaleDateString(undefined, { weekday: "short", day: "numeric" });
    return { labels: [...slots.values()].map(said), sums: [...slots.values()].map(({ sum }) => sum) };
  };

  const axis = (position, title) => ({
    position,
    stacked: position === "left",
    beginAtZero: true,
    title: { display: true, text: title },
    grid: { drawOnChartArea: position === "left" },
    ticks: { callback: (value) => short.format(value), precision: 0, maxTicksLimit: 5 },
  });
  const draw = (id, { labels, sums }) => {
    const sets = series.map((label, index) => ({
      label,
      data: sums.map((sum) => sum[label]),
      ...(label === "Requests"
        ? { type: "line", yAxisID: "requests", borderColor: colours[index], borderWidth: 2, pointRadius: 0, order: 0 }
        : { yAxisID: "y", maxBarThickness: 28, order: 1 }),
      backgroundColor: colours[index],
    }));
    return new Chart(document.getElementById(id), {
      type: "bar",
      data: { labels, datasets: sets },
      options: {
        animation: false,
        maintainAspectRatio: false,
        interaction: { mode: "index", intersect: false },
        plugins: { legend: { position: "bottom", labels: { boxWidth: 12 } } },
        scales: {
          x: { stacked: true, grid: { display: false }, ticks: { maxRotation: 0, autoSkipPadding: 12 } },
          y: axis("left", "Tokens"),
          requests: axis("right", "Requests"),
        },
      },
    });
  };

  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  const charts = [draw("chart-1", hours()), draw("chart-2", days())];
  const dress = () => {
    const text = getComputedStyle(document.body).color;
    const lines = getComputedStyle(document.querySelector(".card")).borderTopColor;
    for (const chart of charts) {
      chart.options.color = text;
      for (const scale of Object.values(chart.options.scales)) {
        scale.ticks.color = text;
        if (scale.title) scale.title.color = text;
      }
      chart.options.scales.y.grid.color = lines;
      chart.update();
    }
  };
  new MutationObserver(dress).observe(document.documentElement, { attributes: true, attributeFilter: ["data-bs-theme"] });
  dress();
})();
