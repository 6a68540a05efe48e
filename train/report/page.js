// Draws every chart of the page. The theme needs no redrawing: charts use the colour of the text around them.
"use strict";
const options = { renderer: "svg", actions: false, tooltip: { theme: "custom", disableDefaultStyle: true } };
const copy = (event, item) => { if (item?.datum?.command) navigator.clipboard?.writeText(item.datum.command); };
const draw = (element) => vegaEmbed(element, JSON.parse(element.nextElementSibling.textContent), options)
  .then(({ view }) => view.addEventListener("click", copy)); // a point of the frontier says what extracts it
Promise.all([...document.querySelectorAll(".chart")].map(draw)).then(
  () => { document.documentElement.dataset.charts = "drawn"; },
  (error) => { console.error(`a chart could not be drawn: ${error}`); },
);
