// The tokens of the Token Explorer: hover or focus shows alternatives, click or Enter keeps them,
// choosing one goes to Python as {place, choice}. Texts enter the page as textContent only.
const percent = p => p >= 0.001 ? (100 * p).toFixed(1) + "%" : p.toExponential(1);
const tokens = () => [...element.querySelectorAll(".st-tokens .st-token")];
let kept = null;

function show(token) {
  const facts = JSON.parse(token.dataset.facts), panel = element.querySelector(".st-panel");
  const title = document.createElement("h3"), about = document.createElement("p");
  title.textContent = `“${facts.label}”`;
  about.className = "st-note";
  about.textContent = `${percent(facts.p)}, the model's choice number ${facts.rank.toLocaleString("en")}`;
  const list = document.createElement("ol");
  for (const [id, text, p] of facts.others) {
    const item = document.createElement("li"), button = document.createElement("button");
    const name = document.createElement("b"), share = document.createElement("span");
    name.textContent = text;
    share.textContent = percent(p);
    button.type = "button";
    button.style.setProperty("--p", `${(100 * p).toFixed(1)}%`);
    button.dataset.place = facts.place;
    button.dataset.choice = id;
    button.dataset.probability = p;
    button.setAttribute("aria-label", `${text}, ${percent(p)}: go on from here with it`);
    if (text === facts.label) button.setAttribute("aria-current", "true");
    button.append(name, share);
    item.append(button);
    list.append(item);
  }
  panel.replaceChildren(title, about, list);
}

function keep(token) {
  for (const other of tokens()) other.removeAttribute("aria-pressed");
  kept = token;
  if (token) { token.setAttribute("aria-pressed", "true"); show(token); }
}

function reach(token) {
  if (!token) return;
  for (const other of tokens()) other.tabIndex = -1;
  token.tabIndex = 0;
  token.focus();
}

element.addEventListener("mouseover", event => {
  const token = event.target.closest(".st-tokens .st-token");
  if (kept && !kept.isConnected) kept = null;
  if (token && !kept) show(token);
});
element.addEventListener("focusin", event => {
  const token = event.target.closest(".st-tokens .st-token");
  if (token && (!kept || !kept.isConnected)) show(token);
});
element.addEventListener("click", event => {
  const choice = event.target.closest(".st-panel button");
  if (choice) {
    kept = null;
    trigger("submit", { place: +choice.dataset.place, choice: +choice.dataset.choice });
    return;
  }
  const token = event.target.closest(".st-tokens .st-token");
  if (token) keep(token === kept ? null : token);
});
element.addEventListener("keydown", event => {
  const choices = [...element.querySelectorAll(".st-panel button")];
  const at = choices.indexOf(event.target);
  if (at >= 0) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) { event.preventDefault(); choices[at + step]?.focus(); }
    if (event.key === "Escape") { const token = kept; keep(null); reach(token?.isConnected ? token : tokens()[0]); }
    return;
  }
  const token = event.target.closest(".st-tokens .st-token");
  if (!token) return;
  const all = tokens(), place = all.indexOf(token);
  const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next !== undefined) { event.preventDefault(); keep(null); reach(all[next]); }
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    keep(token);
    element.querySelector(".st-panel button")?.focus();
  }
  if (event.key === "Escape") keep(null);
});
