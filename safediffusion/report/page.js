"use strict";
for (const gallery of document.querySelectorAll(".gallery")) {
  const covers = [...gallery.querySelectorAll("button.cover")];
  const all = gallery.querySelector("button.all");
  const shown = (cover) => cover.getAttribute("aria-pressed") === "true";
  const say = () => {
    if (all) all.textContent = covers.every(shown) ? "Blur all" : "Show all";
  };
  for (const cover of covers) {
    cover.addEventListener("click", () => {
      cover.setAttribute("aria-pressed", String(!shown(cover)));
      say();
    });
  }
  if (all) {
    all.hidden = false;
    all.addEventListener("click", () => {
      const show = !covers.every(shown);
      for (const cover of covers) cover.setAttribute("aria-pressed", String(show));
      say();
    });
  }
}
