/** Figure 5: three memories to one scroll, what they hold as the text grows, and which of them knows the order. */

import { axisBottom, axisLeft } from "d3-axis";
import { scaleLinear } from "d3-scale";
import { select } from "d3-selection";
import { line } from "d3-shape";
import { busy, byId, bytes, count, h, latest, slider, text } from "./dom.ts";
import type { Hybrid, Source } from "./source.ts";
import type { Watching, Whiteboard } from "./whiteboard.ts";

export class HybridFigure {
  private source: Source;
  private scene: Hybrid | null = null;
  private length = 131072;
  private chart = h("div", { class: "chart" });
  private says = h("p", { class: "story" });
  private layers = h("ol", { class: "layers" });
  private orders = byId("hybrid-order");

  constructor(source: Source, whiteboard: Whiteboard) {
    this.source = source;
    const { element } = slider("Tokens read", { min: 10, max: 20, step: 0.25, value: 17, show: (x) => count(2 ** x) }, (x) => {
      this.length = 2 ** x;
      this.draw();
    });
    byId("hybrid-stack").append(this.layers);
    byId("hybrid-cache").append(element, this.says, this.chart);
    new ResizeObserver(() => this.draw()).observe(this.chart);
    void busy(() => this.load());
    whiteboard.onWatch(latest((watching: Watching) => this.order(watching)));
  }

  private async load(): Promise<void> {
    try {
      this.scene = await this.source.hybrid();
    } catch (error) {
      this.says.textContent = (error as Error).message;
      return;
    }
    const { scene } = this;
    this.layers.setAttribute("aria-label", `${scene.layer_types.length} layers`);
    this.layers.replaceChildren(
      ...scene.layers.map(({ kind }, i) => {
        const memory = kind === "kda";
        return h("li", { class: memory ? "memory" : "latent", title: `Layer ${i + 1}: ${memory ? "KDA" : "latent attention"}` }, h("span", { class: "glyph", "aria-hidden": "true" }), h("span", { class: "bytes" }), h("span", { class: "spoken" }, memory ? "KDA" : "latent attention"));
      }),
    );
    this.draw();
  }

  draw(): void {
    const { scene, length } = this;
    const width = this.chart.clientWidth;
    if (!scene || !width) return;
    const held = (name: string, n = length) => scene.models[name].fixed + scene.models[name].per_token * n;
    const most = Math.max(...scene.layers.map((l) => l.fixed + l.per_token * scene.longest));
    [...this.layers.children].forEach((item, i) => {
      const { fixed, per_token } = scene.layers[i];
      const holds = fixed + per_token * length;
      const bar = item.querySelector<HTMLElement>(".bytes")!;
      bar.style.height = `${Math.max(2, 100 * Math.sqrt(holds / most))}%`;
      item.setAttribute("aria-label", `Layer ${i + 1} holds ${bytes(holds)}`);
    });
    const saved = 1 - held("hybrid") / held("latent");
    this.says.textContent = `After ${count(length)} tokens the hybrid holds ${bytes(held("hybrid"))} for one sequence: ${bytes(scene.models.hybrid.fixed)} of memories, whatever the length, and ${bytes(scene.models.hybrid.per_token)} more with every token. ${scene.layers.length} latent layers would hold ${bytes(held("latent"))}, ` + (saved > 0 ? `so ${text(100 * saved, 3)} % is saved.` : "less than that: at this length the memories have not yet paid for themselves.");
    this.chart.dataset.hybrid = String(held("hybrid"));
    this.chart.dataset.latent = String(held("latent"));
    const [height, margin] = [240, { left: 64, right: 12, top: 18, bottom: 38 }];
    const x = scaleLinear().domain([0, 2 ** 20]).range([margin.left, width - margin.right]);
    const y = scaleLinear().domain([0, held("latent", scene.longest)]).nice().range([height - margin.bottom, margin.top]);
    const svg = select(this.chart).selectAll<SVGSVGElement, null>("svg").data([null]).join("svg");
    svg.attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img").attr("aria-label", `Cache against length. At 1M tokens: hybrid ${bytes(held("hybrid", scene.longest))}, all latent ${bytes(held("latent", scene.longest))}, all KDA ${bytes(held("memory", scene.longest))}.`);
    svg.html("");
    const ticks = [0, 2 ** 18, 2 ** 19, 3 * 2 ** 18, 2 ** 20];
    svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - margin.bottom})`).call(axisBottom(x).tickValues(ticks).tickFormat((n) => (Number(n) === 2 ** 20 ? "1M" : Number(n) ? `${Number(n) / 1024}K` : "0")).tickSizeOuter(0));
    svg.append("g").attr("class", "axis").attr("transform", `translate(${margin.left},0)`).call(axisLeft(y).ticks(4).tickSize(0).tickPadding(8).tickFormat((n) => (Number(n) ? bytes(Number(n)) : "0")));
    svg.append("text").attr("class", "small").attr("x", (margin.left + width - margin.right) / 2).attr("y", height - 4).attr("text-anchor", "middle").text("tokens read");
    const path = (name: string) => line<number>((n) => x(n), (n) => y(held(name, n)))([0, scene.longest]);
    const named: [string, string, string][] = [["latent", "all latent attention", "scroll-curve"], ["hybrid", "three KDA to one", ""], ["memory", "all KDA", "thin-curve"]];
    for (const [name, label, kind] of named) {
      svg.append("path").attr("class", `curve ${kind}`).attr("d", path(name));
      const at = 0.86 * scene.longest;
      svg.append("text").attr("class", `label ${name === "hybrid" ? "accent" : "soft"}`).attr("x", x(at)).attr("y", y(held(name, at)) - 10).attr("text-anchor", "end").text(label);
    }
    svg.append("line").attr("class", "playhead").attr("x1", x(length)).attr("x2", x(length)).attr("y1", margin.top).attr("y2", height - margin.bottom);
    for (const [name] of named) svg.append("circle").attr("class", "playhead").attr("cx", x(length)).attr("cy", y(held(name))).attr("r", 4.5);
  }

  private async order({ text: sentence }: Watching): Promise<void> {
    try {
      const { tokens, exchanged, memory, latent } = await this.source.order(sentence);
      const [i, j] = exchanged;
      const row = (name: string, moved: number | null, about: string) => {
        const bar = h("i", {});
        bar.style.width = `${Math.min(100, 100 * Math.sqrt(moved ?? 0))}%`;
        return h("div", { class: "line wide" }, h("span", {}, name), h("span", { class: "track" }, bar), h("span", { class: "figure" }, moved === null ? "none here" : moved < 1e-4 ? text(moved, 1) : `${text(100 * moved, 2)}\u2009%`), h("span", { class: "soft" }, about));
      };
      this.orders.replaceChildren(
        h("p", { class: "small" }, `Tokens ${i + 1} (${tokens[i].text}) and ${j + 1} (${tokens[j].text}) of the sentence in figure 1 change places. How far does a layer’s output at the last token move?`),
        row("A KDA layer", memory, "it notices: decay and erasing tell early from late"),
        row("A latent layer", latent, "rounding only: it sees a set of tokens"),
      );
    } catch (error) {
      this.orders.replaceChildren(h("p", { class: "small" }, (error as Error).message));
    }
  }
}

