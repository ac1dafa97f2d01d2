/** Figure 3: the same tokens through six memories, and what each would answer now; then scroll against whiteboard. */

import { axisBottom, axisLeft } from "d3-axis";
import { scaleLog } from "d3-scale";
import { select } from "d3-selection";
import { line } from "d3-shape";
import { brief, byId, bytes, choice, count, formula, h, latest, slider, text } from "./dom.ts";
import { Heat } from "./heat.ts";
import type { About, Family, FamilyArguments, Source } from "./source.ts";

const MEMBERS: [string, string, string][] = [
  ["softmax_lookup", "Softmax look-up", "keeps every pair"],
  ["linear_attention", "Linear attention", "adds and never forgets"],
  ["delta_rule", "DeltaNet", "erases, never fades"],
  ["gated_linear_attention", "GLA", "fades by channel, never erases"],
  ["gated_delta", "Gated DeltaNet", "erases, fades by head"],
  ["kda", "KDA", "erases, fades by channel"],
];

export class FamilyFigure {
  private values: FamilyArguments = { story: "twice", beta: 1, keep: [0.7, 0.98], positions: false };
  private scene: Family | null = null;
  private moment = -1; // tokens seen; -1 for all
  private cards = new Map<string, { heat: Heat | null; scroll: HTMLElement; bars: HTMLElement; verdict: HTMLElement }>();
  private stories: ReturnType<typeof choice>;
  private facts = h("div", { class: "facts", role: "group", "aria-label": "Facts, in order" });
  private message = h("p", { class: "message", role: "alert" });
  private probe = h("table", { class: "probe" });
  private positions = h("input", { type: "checkbox", onchange: () => this.change({ positions: this.positions.checked }) });
  private source: Source;
  private ask = latest(() => this.load());

  constructor(source: Source, about: About) {
    this.source = source;
    const stories = Object.entries(about.stories.stories).map(([name, { title }]): [string, string] => [name, title]);
    this.stories = choice("Story", stories, this.values.story, (story) => {
      this.moment = -1;
      this.change({ story });
    });
    byId("family-story").append(
      this.stories,
      this.facts,
      this.message,
    );
    const beta = slider("β, strength of those that erase", { min: 0, max: 2, step: 0.05, value: this.values.beta }, (x) => this.change({ beta: x }));
    const door = slider("The door’s row keeps", { min: 0.05, max: 1, step: 0.01, value: this.values.keep[0] }, (x) => this.change({ keep: [x, this.values.keep[1]] }));
    const rest = slider("The other rows keep", { min: 0.05, max: 1, step: 0.01, value: this.values.keep[1] }, (x) => this.change({ keep: [this.values.keep[0], x] }));
    byId("family-sliders").append(beta.element, door.element, rest.element);
    byId("family-probe").append(h("label", { class: "switch" }, this.positions, h("span", {}, "Give softmax positions: what was said later counts more")), this.probe);
    for (const [name, title, about] of MEMBERS) {
      const heat = name === "softmax_lookup" ? null : new Heat({ name: `${title}, memory`, width: 58, height: 26 });
      const scroll = h("div", { class: "scroll" });
      const bars = h("div", { class: "bars" });
      const verdict = h("p", { class: "verdict" });
      const card = h("article", { class: "card", "data-member": name }, h("h3", {}, title), h("p", { class: "small" }, about), h("div", { class: "formula" }, formula(name)), heat ? heat.element : scroll, bars, verdict);
      byId("family-cards").append(card);
      this.cards.set(name, { heat, scroll, bars, verdict });
    }
    this.ask();
  }

  private change(change: Partial<FamilyArguments>): void {
    this.values = { ...this.values, ...change };
    this.ask();
  }

  private async load(): Promise<void> {
    try {
      this.scene = await this.source.family(this.values);
      this.message.textContent = "";
      this.draw();
    } catch (error) {
      this.message.textContent = (error as Error).message;
    }
  }

  draw(): void {
    const { scene } = this;
    if (!scene) return;
    const T = scene.facts.length;
    const t = this.moment < 0 ? T - 1 : Math.min(this.moment, T - 1);
    this.facts.replaceChildren(
      ...scene.facts.map(({ key, value }, i) =>
        h("button", { type: "button", "aria-pressed": String(i === t), class: i > t ? "later" : "", onclick: () => ((this.moment = i), this.draw()) }, value ? `${key} is ${value}` : "…"),
      ),
      h("span", { class: "asked" }, `What is the ${scene.asked}?`),
    );
    this.drawProbe(scene, t);
    const N = scene.answers.length;
    const most = Math.max(1, ...Object.values(scene.members).flatMap((m) => (m.memory ? Array.from(m.memory.data, Math.abs) : [])));
    for (const [name] of MEMBERS) {
      const member = scene.members[name];
      const card = this.cards.get(name)!;
      const answer = member.answer.data.subarray(t * N, (t + 1) * N);
      if (member.memory && card.heat) {
        const [, K, V] = member.memory.shape;
        card.heat.show({ shape: [K, V], data: member.memory.data.subarray(t * K * V, (t + 1) * K * V) }, { most, rows: ["door", "lamp", "gate", "else"], columns: scene.answers });
      } else if (member.weights) {
        const weights = member.weights.data.subarray(t * T, t * T + t + 1);
        card.scroll.replaceChildren(
          ...Array.from(weights, (weight, s) => {
            const { key, value } = scene.facts[s];
            const bar = h("i", {});
            bar.style.width = `${100 * weight}%`;
            return h("div", { class: "line" }, h("span", {}, value ? `${key} → ${value}` : "…"), h("span", { class: "track" }, bar), h("span", { class: "figure" }, brief(weight)));
          }),
        );
      }
      card.bars.replaceChildren(
        ...Array.from(answer, (x, i) => {
          const bar = h("i", { class: x < 0 ? "negative" : "" });
          bar.style.width = `${Math.min(100, (100 * Math.abs(x)) / Math.max(1.25, most))}%`;
          return h("div", { class: "line" }, h("span", {}, scene.answers[i]), h("span", { class: "track" }, bar), h("span", { class: "figure" }, brief(x)));
        }),
      );
      card.verdict.textContent = verdict(answer, scene.answers);
    }
    byId("family").dataset.story = this.values.story;
    byId("family").dataset.moment = String(t);
  }

  /** What every member answers to the question after every fact. */
  private drawProbe(scene: Family, now: number): void {
    const N = scene.answers.length;
    const said = (answer: ArrayLike<number>) => {
      const strong = scene.answers.filter((_, i) => answer[i] > 0.2 * Math.max(0.25, ...Array.from(answer)));
      return strong.length ? strong.join(" + ") : "nothing";
    };
    const head = scene.facts.map(({ key, value }, i) => h("th", { scope: "col", "aria-current": i === now ? "step" : null }, value ? `${key} is ${value}` : "…"));
    const rows = MEMBERS.map(([name, title]) => {
      const { data } = scene.members[name].answer;
      const cells = scene.facts.map((_, i) => {
        const answer = data.subarray(i * N, (i + 1) * N);
        return h("td", { class: i === now ? "now" : "", title: `${scene.answers.map((a, j) => `${a} ${brief(answer[j])}`).join(", ")}` }, said(answer));
      });
      return h("tr", { "data-probe": name }, h("th", { scope: "row" }, title), ...cells);
    });
    const caption = h("caption", {}, `What is the ${scene.asked}? Asked after every fact.`);
    this.probe.replaceChildren(caption, h("thead", {}, h("tr", {}, h("td", {}), ...head)), h("tbody", {}, ...rows));
  }

  /** Shows a story by its name. */
  tell(story: string): void {
    this.moment = -1;
    this.stories.select(story);
    this.change({ story });
  }
}

function verdict(answer: ArrayLike<number>, names: string[]): string {
  const order = Array.from(answer, (x, i) => [x, names[i]] as [number, string]).sort((a, b) => b[0] - a[0]);
  const [[first, name], [second, other]] = order;
  if (first < 0.05) return "It has nothing to say.";
  if (second > 0.85 * first) return `It cannot tell ${name} from ${other}.`;
  const sum = order.reduce((s, [x]) => s + Math.abs(x), 0);
  if (first > 1.5 * Math.max(1, second)) return `It says ${name}, ${text(first, 2)} times over.`;
  return first / sum > 0.98 ? (first > 0.9 ? `It says ${name}.` : `It says ${name}, faintly.`) : `It says ${name}, with a trace of ${other}.`;
}

/** A scroll grows with the text, a board does not. One head of the released model: 128 x 128. */
export function scrollAgainstBoard(): void {
  const [K, V] = [128, 128];
  const says = h("p", { class: "story" });
  const box = byId("family-size");
  const chart = h("div", { class: "chart" });
  let length = 1024;
  const { element } = slider("Tokens read", { min: 0, max: 20, step: 0.25, value: 10, show: (x) => count(2 ** x) }, (x) => {
    length = 2 ** x;
    draw();
  });
  box.append(element, says, chart);
  const draw = () => {
    const width = chart.clientWidth;
    if (!width) return;
    const [height, margin] = [220, { left: 58, right: 16, top: 14, bottom: 38 }];
    const x = scaleLog().base(2).domain([1, 2 ** 20]).range([margin.left, width - margin.right]);
    const y = scaleLog().domain([100, 1e9]).range([height - margin.bottom, margin.top]);
    const svg = select(chart).selectAll<SVGSVGElement, null>("svg").data([null]).join("svg");
    svg.attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img").attr("aria-label", `Numbers held by one head. After ${count(length)} tokens the scroll holds ${count((K + V) * length)}, the whiteboard ${count(K * V)}.`);
    svg.html("");
    const ticks = [1, 2 ** 5, 2 ** 10, 2 ** 15, 2 ** 20];
    svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - margin.bottom})`).call(axisBottom(x).tickValues(ticks).tickFormat((n) => ["1", "32", "1K", "32K", "1M"][ticks.indexOf(Number(n))]).tickSizeOuter(0));
    svg.append("g").attr("class", "axis").attr("transform", `translate(${margin.left},0)`).call(axisLeft(y).tickValues([1e3, 1e5, 1e7, 1e9]).tickSize(0).tickPadding(8).tickFormat((n) => ({ 3: "1 K", 5: "100 K", 7: "10 M", 9: "1 G" })[Math.round(Math.log10(Number(n)))] ?? ""));
    svg.append("text").attr("class", "small").attr("x", (margin.left + width - margin.right) / 2).attr("y", height - 4).attr("text-anchor", "middle").text("tokens read");
    const path = line<[number, number]>((p) => x(p[0]), (p) => y(p[1]));
    svg.append("path").attr("class", "curve scroll-curve").attr("d", path([[1, K + V], [2 ** 20, (K + V) * 2 ** 20]]));
    svg.append("path").attr("class", "curve").attr("d", path([[1, K * V], [2 ** 20, K * V]]));
    svg.append("text").attr("class", "label soft").attr("x", x(2 ** 13)).attr("y", y((K + V) * 2 ** 13) - 12).attr("text-anchor", "end").text("scroll: keys and values");
    svg.append("text").attr("class", "label accent").attr("x", width - margin.right).attr("y", y(K * V) + 18).attr("text-anchor", "end").text("whiteboard: 128 × 128");
    svg.append("line").attr("class", "playhead").attr("x1", x(length)).attr("x2", x(length)).attr("y1", margin.top).attr("y2", height - margin.bottom);
    for (const n of [(K + V) * length, K * V]) svg.append("circle").attr("class", "playhead").attr("cx", x(length)).attr("cy", y(n)).attr("r", 4.5);
    const ratio = ((K + V) * length) / (K * V);
    const word = ratio > 1 ? `${text(ratio, 3)} times as much as` : ratio === 1 ? "exactly as much as" : "less than";
    says.textContent = `After ${count(length)} tokens one head’s scroll holds ${count((K + V) * length)} numbers (${bytes(2 * (K + V) * length)} in 16 bits), ${word} its whiteboard’s ${count(K * V)} (${bytes(4 * K * V)} in 32 bits). To read so far it has compared ${count((length * (length + 1)) / 2)} pairs of tokens; the board was touched ${count(length)} times. They are level at ${count((K * V) / (K + V))} tokens.`;
  };
  new ResizeObserver(draw).observe(chart);
}
