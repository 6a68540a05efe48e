// Draws every chart of the page. The theme needs no redrawing: charts use the colour of the text around them.
"use strict";
const options = { renderer: "svg", actions: false, tooltip: { theme: "custom", disableDefaultStyle: true } };
const draw = (element) => vegaEmbed(element, JSON.parse(element.nextElementSibling.textContent), options);
Promise.all([...document.querySelectorAll(".chart")].map(draw)).then(
  () => { document.documentElement.dataset.charts = "drawn"; },
  (error) => { console.error(`a chart could not be drawn: ${error}`); },
);
