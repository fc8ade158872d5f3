// Draws each figure of a page from the JSON beside it, in the colours of the page's theme.
(function () {
  "use strict";

  const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["toImage"] };

  function themeLayout() {
    const style = getComputedStyle(document.documentElement);
    const read = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
    const text = read("--pst-color-text-base", "#222222");
    const line = read("--pst-color-border", "#c9c9c9");
    const surface = read("--pst-color-surface", "#f5f5f5");
    return { text, line, surface };
  }

  // What the theme decides, by plotly's path names; data colours are the figure's own.
  function themed(layout) {
    const { text, line, surface } = themeLayout();
    const update = {
      paper_bgcolor: "rgba(0,0,0,0)",
      "font.color": text,
      "hoverlabel.bgcolor": surface,
      "hoverlabel.bordercolor": line,
      "hoverlabel.font.color": text,
    };
    if (!layout.plot_bgcolor) {
      update.plot_bgcolor = "rgba(0,0,0,0)";
    }
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        update[key + ".gridcolor"] = line;
        update[key + ".linecolor"] = line;
        update[key + ".zerolinecolor"] = line;
      }
    }
    // Menus and buttons keep the figure's dark on light: the chosen one is light in any theme.
    (layout.sliders || []).forEach((_, index) => {
      update["sliders[" + index + "].bgcolor"] = surface;
      update["sliders[" + index + "].bordercolor"] = line;
      update["sliders[" + index + "].font.color"] = text;
    });
    return update;
  }

  // Plotly breaks no lines: the figure brings its title broken for a window and for a telephone.
  function titled(figure, layout) {
    const titles = (layout.meta && layout.meta.title) || {};
    return titles[figure.clientWidth < 600 ? "narrow" : "wide"] || {};
  }

  async function draw(figure) {
    const plot = figure.querySelector(".plotly-figure-plot");
    const { data, layout, frames } = JSON.parse(
      figure.querySelector("script[type='application/json']").textContent
    );
    // The column decides the width, unless the figure says that it needs more: then it scrolls.
    delete layout.width;
    layout.autosize = true;
    layout.height = layout.height || parseInt(plot.style.minHeight, 10);
    const needs = layout.meta && layout.meta.min_width;
    if (needs) {
      plot.style.minWidth = needs + "px";
    }
    await Plotly.newPlot(plot, { data, layout, frames, config: CONFIG });
    await Plotly.relayout(plot, { ...themed(layout), ...titled(figure, layout) });
    figure.dataset.drawn = "true";
  }

  async function drawAll() {
    const figures = Array.from(document.querySelectorAll("figure.plotly-figure"));
    // First of all, for the page may settle on a theme while figures are being drawn.
    new MutationObserver(() => {
      for (const figure of figures) {
        const plot = figure.querySelector(".plotly-figure-plot");
        if (plot.layout) {
          Plotly.relayout(plot, themed(plot.layout));
        }
      }
    }).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    window.addEventListener("resize", () => {
      for (const figure of figures) {
        const plot = figure.querySelector(".plotly-figure-plot");
        if (plot.layout) {
          Plotly.relayout(plot, titled(figure, plot.layout));
        }
      }
    });
    for (const figure of figures) {
      await draw(figure);
      // Let the page answer the reader between two figures.
      await new Promise((resume) => setTimeout(resume));
    }
  }

  drawAll();
})();
