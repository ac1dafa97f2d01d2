/** Every head of the model at a glance, by the memory that it ends with; choosing one watches it. */

import { colour } from "./colour.ts";
import { h } from "./dom.ts";
import type { Heads } from "./source.ts";

const MOST = 48; // heads that are drawn; a model with more is chosen from by number

export class Gallery {
  readonly element = h("div", { class: "gallery", role: "radiogroup", "aria-label": "Layer and head" });
  private buttons: HTMLButtonElement[] = [];
  private places: [number, number][] = [];
  private shown: Heads | null = null;

  constructor(layers: number[], heads: number, choose: (layer: number, head: number) => void, first: [number, number]) {
    this.places = layers.flatMap((layer) => Array.from({ length: heads }, (_, head) => [layer, head] as [number, number]));
    if (this.places.length > MOST) {
      const select = h("select", { "aria-label": "Layer and head", onchange: () => choose(...this.places[select.selectedIndex]) });
      for (const [layer, head] of this.places) select.append(h("option", { textContent: `Layer ${layer + 1}, head ${head + 1}`, selected: layer === first[0] && head === first[1] }));
      this.element.removeAttribute("role");
      this.element.append(select);
      return;
    }
    this.buttons = this.places.map(([layer, head]) => {
      const name = `Layer ${layer + 1}, head ${head + 1}`;
      return h("button", { type: "button", role: "radio", "aria-label": name, title: name, onclick: () => (this.mark(layer, head), choose(layer, head)) }, h("canvas", { "aria-hidden": "true" }));
    });
    layers.forEach((layer, i) => {
      this.element.append(h("div", { class: "shelf" }, h("span", { class: "small" }, `Layer ${layer + 1}`), ...this.buttons.slice(i * heads, (i + 1) * heads)));
    });
    this.element.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: heads, ArrowUp: -heads }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      const n = this.buttons.length;
      const next = (this.buttons.indexOf(document.activeElement as HTMLButtonElement) + step + n) % n;
      this.buttons[next].focus();
      this.buttons[next].click();
    });
    this.mark(...first);
  }

  show(heads: Heads): void {
    this.shown = heads;
    this.draw();
  }

  draw(): void {
    const { shown } = this;
    if (!shown) return;
    const [, , K, V] = shown.memories.shape;
    this.buttons.forEach((button, n) => {
      const canvas = button.firstElementChild as HTMLCanvasElement;
      const memory = Array.from(shown.memories.data.subarray(n * K * V, (n + 1) * K * V));
      const most = memory.reduce((a, x) => Math.max(a, Math.abs(x)), 1e-9);
      canvas.width = V;
      canvas.height = K;
      const context = canvas.getContext("2d")!;
      memory.forEach((x, i) => {
        context.fillStyle = colour(x, most);
        context.fillRect(i % V, Math.floor(i / V), 1, 1);
      });
    });
  }

  private mark(layer: number, head: number): void {
    this.buttons.forEach((button, n) => {
      const chosen = this.places[n][0] === layer && this.places[n][1] === head;
      button.setAttribute("aria-checked", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    });
  }
}
