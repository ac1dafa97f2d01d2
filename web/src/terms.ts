/** Words and letters that explain themselves: on hover, on focus, on tap, and to those who hear the page. */

import { h } from "./dom.ts";

export const TERMS: Record<string, [string, string]> = {
  S: ["S, the memory", "A board of numbers, one row for each key channel and one column for each value channel. It never grows."],
  alpha: ["α, decay", "What each row keeps of itself at this token: 1 keeps all, 0 forgets all. Each row has its own, chosen by the token."],
  beta: ["β, strength", "How much of a correction is made under the key: 0 nothing, 1 replaces the old value, 2 mirrors it."],
  k: ["k, key", "Where to write: a direction of length one across the rows."],
  v: ["v, value", "What to write: a number for each column."],
  q: ["q, query", "What to ask: a direction across the rows, as a key is."],
  o: ["o, output", "The board’s answer to the query."],
  head: ["head", "One board with keys, values and queries of its own. A layer has several."],
  channel: ["channel", "One number of a key or a value: one row, or one column, of the board."],
  latent: ["latent attention", "Attention that keeps one short vector for every token, and looks back over all of them."],
  token: ["token", "A piece of text that the model reads at once: here a word, a sign, or a few letters."],
  scroll: ["scroll", "Softmax attention’s memory: every key and value that ever came, in a list that grows."],
};

/** Makes every [data-term] of the page explain itself, and formulas' letters with them. */
export function explainTerms(): void {
  const tip = h("div", { id: "tip", class: "tip", role: "tooltip", hidden: true });
  document.body.append(tip);
  let shown: HTMLElement | null = null;
  const show = (element: HTMLElement) => {
    const [title, says] = TERMS[element.dataset.term!];
    tip.replaceChildren(h("strong", {}, title), h("span", {}, says));
    tip.hidden = false;
    shown = element;
    const at = element.getBoundingClientRect();
    const { offsetWidth: w, offsetHeight: height } = tip;
    tip.style.left = `${Math.max(8, Math.min(innerWidth - w - 8, at.left + at.width / 2 - w / 2))}px`;
    tip.style.top = `${at.top - height - 8 > 56 ? at.top - height - 8 : at.bottom + 8}px`;
    document.documentElement.dataset.term = element.dataset.term;
  };
  const hide = () => {
    tip.hidden = true;
    shown = null;
    delete document.documentElement.dataset.term;
  };
  for (const element of document.querySelectorAll<HTMLElement>("[data-term]")) {
    if (!TERMS[element.dataset.term!]) continue;
    if (element.tagName === "BUTTON") element.setAttribute("aria-description", TERMS[element.dataset.term!][1]);
    element.addEventListener("pointerenter", () => show(element));
    // the pointer may leave one element, moved away by scrolling, while another that has the focus is explained
    element.addEventListener("pointerleave", () => shown === element && document.activeElement !== element && hide());
    element.addEventListener("focus", () => show(element));
    element.addEventListener("blur", () => shown === element && hide());
    element.addEventListener("click", () => (shown === element ? undefined : show(element)));
  }
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
  addEventListener("scroll", () => shown && (shown === document.activeElement ? show(shown) : hide()), { passive: true });
}
