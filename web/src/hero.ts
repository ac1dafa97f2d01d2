/** The first screen: one token meets a board of two rows, over and over; what it does is said beside it. */

import { animate, byId, h, text } from "./dom.ts";
import { colour, inkOn } from "./colour.ts";
import type { Numbers } from "./law.ts";
import type { Traced } from "./source.ts";

const STEPS: { name: string; says: string; lit: string }[] = [
  { name: "Before", says: "A memory is a board. Each of its two rows holds a number for each of two columns.", lit: "" },
  { name: "Fade", says: "A token arrives. First the board fades: the first row keeps all, the second keeps half.", lit: "decay" },
  { name: "Erase", says: "The token’s key points at the second row. What the board holds there is wiped.", lit: "erase" },
  { name: "Write", says: "The token’s value, [5, 5], is written in its place.", lit: "write" },
  { name: "Read", says: "Asked with the same key, the board answers [5, 5]. The first row was never touched.", lit: "read" },
];
const PAUSE = 2000;

export class Hero {
  private scene: Traced | null = null;
  private step = 0;
  private playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  private timer = 0;
  private cells = Array.from({ length: 4 }, () => h("span", { class: "cell" }));
  private alphas = [h("i", {}), h("i", {})];
  private keys = [h("span", { class: "cell key" }), h("span", { class: "cell key" })];
  private says = h("p", { class: "says", "aria-live": "off" });
  private answer = h("p", { class: "answer" });
  private steps = STEPS.map(({ name }, i) => h("button", { type: "button", onclick: () => (this.pause(), this.go(i)) }, name));
  private play = h("button", { type: "button", class: "play", onclick: () => (this.playing ? this.pause() : this.start()) });

  constructor() {
    const row = (i: number) => [h("span", { class: "keep", title: "what the row keeps" }, this.alphas[i]), this.keys[i], this.cells[2 * i], this.cells[2 * i + 1]];
    const head = ["keeps", "key", "", ""].map((name) => h("span", { class: "name" }, name));
    byId("hero").append(
      h("div", { class: "hero-board", role: "img", "aria-label": "A board of two rows and two columns" }, ...head, ...row(0), ...row(1)),
      this.answer,
      h("div", { class: "hero-steps", role: "group", "aria-label": "What a token does" }, ...this.steps, this.play),
      this.says,
    );
  }

  open(scene: Traced): void {
    this.scene = scene;
    this.go(0);
    if (this.playing) this.start();
    else this.pause();
  }

  private start(): void {
    this.playing = true;
    this.play.textContent = "Pause";
    const tick = () => {
      this.timer = window.setTimeout(tick, PAUSE + 600 * Number(this.step === 4));
      this.go((this.step + 1) % STEPS.length);
    };
    clearTimeout(this.timer);
    this.timer = window.setTimeout(tick, PAUSE / 2);
  }

  private pause(): void {
    this.playing = false;
    clearTimeout(this.timer);
    this.play.textContent = "Play";
  }

  private memory(step: number): Numbers {
    const { start, decayed, erased, written } = this.scene!;
    return [start, decayed, erased, written, written][step].data;
  }

  go(step: number): void {
    if (!this.scene) return;
    const before = this.memory(step === (this.step + 1) % STEPS.length && step ? this.step : step);
    this.step = step;
    this.says.textContent = STEPS[step].says;
    this.steps.forEach((button, i) => button.setAttribute("aria-pressed", String(i === step)));
    byId("hero").dataset.step = String(step);
    byId("hero-law").dataset.beat = STEPS[step].lit || "start";
    const { read } = this.scene;
    this.answer.textContent = step === 4 ? `“What is there?” → [${Array.from(read.data, (x) => text(x)).join(", ")}]` : "\u00a0";
    animate(step ? 700 : 0, (share) => this.draw(before, share));
  }

  draw(before = this.scene ? this.memory(this.step) : null, share = 1): void {
    if (!this.scene || !before) return;
    const now = this.memory(this.step);
    const { k, alpha } = this.scene;
    this.cells.forEach((cell, i) => {
      const x = before[i] + (now[i] - before[i]) * share;
      cell.style.background = colour(x, 10);
      cell.style.color = inkOn(x, 10);
      cell.textContent = text(share < 1 ? Number(x.toFixed(1)) : x);
    });
    this.alphas.forEach((bar, i) => (bar.style.width = `${100 * (this.step ? alpha.data[i] : 1)}%`));
    this.keys.forEach((cell, i) => {
      const x = this.step ? k.data[i] : 0;
      cell.style.background = colour(x, 1);
      cell.style.color = inkOn(x, 1);
      cell.textContent = this.step ? text(x) : "";
    });
  }
}
