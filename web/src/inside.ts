/** A trained head from within: what its answers are made of, what is left of each token, how long its channels keep. */

import { axisBottom } from "d3-axis";
import { scaleLog } from "d3-scale";
import { select } from "d3-selection";
import { colour, inkOn } from "./colour.ts";
import { byId, choice, h, latest, text } from "./dom.ts";
import { Heat } from "./heat.ts";
import { difference } from "./law.ts";
import type { Inside, Source } from "./source.ts";
import type { Watching, Whiteboard } from "./whiteboard.ts";

type View = "reads" | "asked" | "left";
const VIEWS: [View, string][] = [
  ["asked", "One question, asked all along"],
  ["reads", "What each token reads"],
  ["left", "What is left of each token"],
];
const MOST_LIFE = 1e4; // where the axis of half-lives ends

export class InsideFigure {
  private source: Source;
  private watching: Watching | null = null;
  private scene: Inside | null = null;
  private view: View = "asked";
  private asker = -1; // the token whose question is asked; -1 for the last
  private moment = -1; // after which token; -1 for the last
  private strip = h("div", { class: "tokens bytes weighed", role: "group", "aria-label": "Tokens: choose who asks" });
  private story = h("p", { class: "story", "aria-live": "polite" });
  private message = h("p", { class: "message", role: "alert" });
  private slide = h("input", { type: "range", min: "1", step: "1", "aria-label": "After token" });
  private weights = new Heat({ name: "weights", hover: (row) => row !== null && this.go(row) });
  private caption = h("figcaption", {});
  private eigen = new Heat({ name: "eigenvalues, one column a token", most: 1 });
  private lives = h("div", { class: "chart" });
  private ask = latest(() => this.load());

  constructor(source: Source, whiteboard: Whiteboard) {
    this.source = source;
    const views = choice("What is shown", VIEWS, this.view, (view) => {
      this.view = view;
      this.draw();
    });
    this.slide.addEventListener("input", () => this.go(this.slide.valueAsNumber - 1));
    byId("inside-controls").append(views);
    byId("inside-tokens").append(this.strip, h("div", { class: "scrub" }, this.slide), this.message);
    byId("inside-story").append(this.story);
    byId("inside-weights").append(h("figure", {}, this.weights.element, this.caption));
    byId("inside-channels").append(
      h("p", { class: "small chart-title" }, "Half-lives of the head’s channels, in tokens of this text"),
      this.lives,
      h("p", { class: "small chart-title" }, "Eigenvalues of (I − β k kᵀ) Diag(α): a column a token, smallest on top. Full colour keeps, none forgets"),
      h("div", { class: "eigen" }, this.eigen.element),
    );
    new ResizeObserver(() => this.draw()).observe(byId("inside"));
    whiteboard.onWatch((watching) => {
      const other = watching.text !== this.watching?.text;
      this.watching = watching;
      if (other) [this.asker, this.moment] = [-1, -1];
      this.ask();
    });
  }

  private async load(): Promise<void> {
    const { watching } = this;
    if (!watching) return;
    try {
      const length = (await this.source.sentence(watching.text, watching.layer, watching.head)).tokens.length;
      this.scene = await this.source.inside({ ...watching, asker: this.asker < 0 ? length - 1 : Math.min(this.asker, length - 1) });
      this.message.textContent = "";
      this.open();
      this.draw();
      byId("inside").dataset.head = `${watching.layer}-${watching.head}`;
    } catch (error) {
      this.message.textContent = (error as Error).message;
    }
  }

  private open(): void {
    const { tokens } = this.scene!;
    this.slide.max = String(tokens.length);
    const pick = (i: number) => () => {
      this.asker = i;
      this.ask();
    };
    if (this.strip.childElementCount !== tokens.length)
      this.strip.replaceChildren(...tokens.map((_, i) => h("button", { type: "button", onclick: pick(i) })));
    tokens.forEach(({ text: label, part }, i) => {
      this.strip.children[i].textContent = part && part > 1 ? "·" : label;
    });
  }

  private go(moment: number): void {
    this.moment = moment;
    this.draw();
  }

  draw(): void {
    const { scene, view } = this;
    const width = byId("inside").clientWidth;
    if (!scene || !width) return;
    const T = scene.tokens.length;
    const now = this.moment < 0 ? T - 1 : Math.min(this.moment, T - 1);
    const asker = this.asker < 0 ? T - 1 : Math.min(this.asker, T - 1);
    const all = scene[view];
    const most = Math.max(1e-9, difference(all.data, new Float64Array(all.data.length)));
    const row = all.data.subarray(now * T, (now + 1) * T);
    [...this.strip.children].forEach((chip, i) => {
      const style = (chip as HTMLElement).style;
      style.background = i <= now ? colour(row[i], most) : "";
      style.color = i <= now ? inkOn(row[i], most) : "";
      chip.classList.toggle("asks", view === "asked" && i === asker);
      chip.classList.toggle("here", i === now);
      chip.setAttribute("aria-label", `Token ${i + 1}, ${scene.tokens[i].text}: weight ${text(i <= now ? row[i] : 0)}`);
    });
    this.slide.value = String(now + 1);
    this.slide.style.setProperty("--share", String(T > 1 ? now / (T - 1) : 1));
    this.slide.setAttribute("aria-valuetext", `after token ${now + 1}, ${scene.tokens[now].text}`);
    this.story.textContent = this.sentence(row, now, asker);
    const cell = Math.max(2, Math.min(11, Math.floor(Math.min(width, 560) / T)));
    this.caption.textContent = view === "left" ? "Row: after which token. Column: how much of that token’s value is left." : `Row: ${view === "asked" ? "after which token" : "who reads"}. Column: whose value is in the answer. Amber counts against.`;
    this.weights.show(all, { name: VIEWS.find(([name]) => name === view)![1], most, width: cell, height: cell });
    this.weights.mark(now === T - 1 ? null : now);
    const [, K] = scene.eigenvalues.shape;
    const turned = Float64Array.from({ length: K * T }, (_, n) => scene.eigenvalues.data[(n % T) * K + Math.floor(n / T)]);
    this.eigen.show({ shape: [K, T], data: turned }, { width: Math.max(2, Math.min(8, Math.floor(Math.min(width, 420) / T))), height: Math.max(2, Math.min(10, Math.floor(160 / K))) });
    this.drawLives();
    const body = byId("inside").dataset;
    [body.view, body.moment, body.asker] = [view, String(now), String(asker)];
  }

  private sentence(row: ArrayLike<number>, now: number, asker: number): string {
    const { tokens } = this.scene!;
    const name = (i: number) => `${tokens[i].text}\u00a0(${i + 1})`;
    const strongest = Array.from({ length: now + 1 }, (_, i) => i).sort((a, b) => Math.abs(row[b]) - Math.abs(row[a])).slice(0, 4).filter((i) => Math.abs(row[i]) > 5e-3);
    const list = strongest.map((i) => `${name(i)} ${text(row[i], 2)}`).join(", ") || "nothing that counts";
    if (this.view === "left") return `After token ${name(now)} most is left of: ${list}.`;
    if (this.view === "reads") return `Token ${name(now)} reads a sum of values: ${list}.`;
    return `After token ${name(now)}, the question of token ${name(asker)} would be answered by a sum of the values of: ${list}. Choose another token to ask.`;
  }

  private drawLives(): void {
    const width = this.lives.clientWidth;
    if (!width) return;
    const lives = Array.from(this.scene!.half_life.data).sort((a, b) => a - b);
    const [height, margin] = [150, { left: 8, right: 14, top: 8, bottom: 26 }];
    const x = scaleLog().domain([0.1, MOST_LIFE]).range([margin.left, width - margin.right]).clamp(true);
    const svg = select(this.lives).selectAll<SVGSVGElement, null>("svg").data([null]).join("svg");
    const middle = lives[Math.floor(lives.length / 2)];
    svg.attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img").attr("aria-label", `Half-lives of ${lives.length} channels: from ${text(lives[0], 2)} to ${text(lives[lives.length - 1], 2)} tokens, the middle one ${text(middle, 2)}.`);
    svg.html("");
    const ticks = [0.1, 1, 10, 100, 1000, 10000];
    svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - margin.bottom})`).call(axisBottom(x).tickValues(ticks).tickFormat((n) => ({ 0.1: "0.1", 1: "1", 10: "10", 100: "100", 1000: "1K", 10000: "10K" })[Number(n)] ?? "").tickSizeOuter(0));
    const tall = (height - margin.top - margin.bottom) / lives.length;
    lives.forEach((life, i) => {
      svg.append("rect").attr("class", "life").attr("x", margin.left).attr("y", margin.top + i * tall).attr("width", Math.max(1, x(life) - margin.left)).attr("height", Math.max(0.5, tall - (tall > 3 ? 1 : 0)));
    });
    this.lives.dataset.longest = String(lives[lives.length - 1]);
  }
}
