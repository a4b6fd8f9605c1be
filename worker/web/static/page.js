// The page works without this. With it, what is live is looked at again in place (focus, selection and open tables stay),
// and the value of the nearest point of a chart is shown beside the pointer.
"use strict";

const every = Number(document.documentElement.dataset.refresh);

function inUse(part) {
  const chosen = document.getSelection();
  const selects = chosen && !chosen.isCollapsed && part.contains(chosen.anchorNode);
  return part.contains(document.activeElement) || selects;
}

function replace(part, now) {
  if (!now || part.innerHTML === now.innerHTML || inUse(part)) return;
  for (const table of part.querySelectorAll("details[open]")) now.querySelector("#" + table.id)?.setAttribute("open", "");
  const places = [...part.querySelectorAll(".scroll")].map((box) => [box.scrollLeft, box.scrollTop]);
  part.replaceChildren(...now.childNodes);
  [...part.querySelectorAll(".scroll")].forEach((box, i) => { if (places[i]) [box.scrollLeft, box.scrollTop] = places[i]; });
}

async function look() {
  if (document.hidden) return;
  const said = document.getElementById("refreshed");
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const parts = [...document.querySelectorAll("[data-live]")];
    const same = parts.length && parts.every((part) => page.getElementById(part.id));
    if (!same || page.querySelectorAll("[data-live]").length !== parts.length) {
      if (document.activeElement === document.body) location.reload(); // parts came or went
      return;
    }
    for (const part of parts) replace(part, page.getElementById(part.id));
    document.body.classList.remove("stale");
    if (said) said.textContent = `looks again every ${every} s`;
  } catch {
    document.body.classList.add("stale");
    if (said) said.textContent = "the dashboard does not answer: what is shown is old";
  }
}

if (every) setInterval(look, every * 1000);

let readout = null;
function hide() { readout?.remove(); readout = null; }

document.addEventListener("pointermove", (event) => {
  const chart = event.target.closest?.("svg.chart");
  if (!chart) return hide();
  let best = null, least = 30 * 30;
  for (const point of chart.querySelectorAll(".point")) {
    const box = point.getBoundingClientRect();
    const far = (box.x + box.width / 2 - event.clientX) ** 2 + (box.y + box.height / 2 - event.clientY) ** 2;
    if (far < least) [best, least] = [point, far];
  }
  if (!best) return hide();
  if (!readout) {
    readout = document.createElement("div");
    readout.id = "readout";
    readout.setAttribute("aria-hidden", "true");
    document.body.append(readout);
  }
  readout.textContent = best.querySelector("title").textContent;
  // A script may set a style that a policy forbids in markup.
  readout.style.left = Math.min(event.clientX + 12, innerWidth - readout.offsetWidth - 8) + "px";
  readout.style.top = Math.max(4, event.clientY - 32) + "px";
});
document.addEventListener("pointerleave", hide);
