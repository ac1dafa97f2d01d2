/** A guided tour: a step is a place on the page, a sentence, and what is set there. Links lead to steps; so does scrolling. */

import { byId, h } from "./dom.ts";

export interface Step {
  id: string; // of the element that it is about
  title: string;
  says: string;
  set?: () => void;
}

export class Tour {
  private steps: Step[];
  private at = 0;
  private moving = 0; // until when a move of ours scrolls, so that scrolling does not choose another step
  private title = h("strong", {});
  private says = h("span", {});
  private back = h("button", { type: "button", onclick: () => this.go(this.at - 1) }, "Back");
  private next = h("button", { type: "button", class: "primary", onclick: () => this.go(this.at + 1) }, "Next");
  private bar = h("aside", { class: "tour", "aria-label": "Guided tour" });

  constructor(steps: Step[]) {
    this.steps = steps;
    const close = h("button", { type: "button", class: "icon close", "aria-label": "End the tour", onclick: () => this.end() }, "×");
    this.bar.append(h("p", { "aria-live": "polite" }, this.title, this.says), h("div", { class: "moves" }, this.back, this.next, close));
    this.bar.hidden = true;
    document.body.append(this.bar);
    byId("begin").addEventListener("click", () => this.go(0));
    addEventListener("keydown", (event) => {
      const target = event.target as HTMLElement;
      if (event.ctrlKey || event.altKey || event.metaKey || target.matches("input, select, textarea")) return;
      if (event.key === "n") this.go(this.bar.hidden ? 0 : this.at + 1);
      else if (event.key === "p" && !this.bar.hidden) this.go(this.at - 1);
      else if (event.key === "Escape" && !this.bar.hidden) this.end();
    });
    addEventListener("hashchange", () => this.follow());
    addEventListener("scroll", () => this.scrolled(), { passive: true });
    this.follow();
  }

  private follow(): void {
    const found = /^#step-(\d+)$/.exec(location.hash);
    if (found) this.go(Number(found[1]) - 1);
  }

  go(step: number): void {
    this.at = Math.max(0, Math.min(this.steps.length - 1, step));
    this.tell();
    const { id, set } = this.steps[this.at];
    this.moving = performance.now() + 900;
    document.getElementById(id)!.scrollIntoView({ block: "start" });
    set?.();
  }

  private tell(): void {
    const { title, says } = this.steps[this.at];
    this.bar.hidden = false;
    document.documentElement.dataset.tour = String(this.at + 1);
    this.title.textContent = `${this.at + 1} of ${this.steps.length}. ${title} `;
    this.says.textContent = says;
    this.back.disabled = this.at === 0;
    this.next.disabled = this.at === this.steps.length - 1;
    history.replaceState(null, "", `#step-${this.at + 1}`);
  }

  /** The reader scrolls: the step is that of the place which is read now. */
  private scrolled(): void {
    if (this.bar.hidden || performance.now() < this.moving) return;
    const line = innerHeight * 0.35;
    let best = 0;
    this.steps.forEach(({ id }, i) => {
      if (document.getElementById(id)!.getBoundingClientRect().top <= line && document.getElementById(id)!.getBoundingClientRect().top > document.getElementById(this.steps[best].id)!.getBoundingClientRect().top) best = i;
    });
    if (this.steps[best].id === this.steps[this.at].id) return;
    this.at = best;
    this.tell();
  }

  private end(): void {
    this.bar.hidden = true;
    delete document.documentElement.dataset.tour;
    history.replaceState(null, "", location.pathname + location.search);
  }
}
