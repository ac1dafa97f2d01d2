/** Figure 2: one fact written over another, every number of it in the reader's hands. */

import { scaleLinear } from "d3-scale";
import { pointer, select } from "d3-selection";
import { line } from "d3-shape";
import { byId, h, latest, percent, slider, text, vector } from "./dom.ts";
import { Heat } from "./heat.ts";
import type { Source, Touch, TouchArguments } from "./source.ts";
import type { Tensor } from "./safetensors.ts";

const BEGIN: TouchArguments = { alpha: [1, 1], beta: 1, angle: 30, value: [0.8, 0.8], times: 1, eraser: true };
const PRESETS: [string, Partial<TouchArguments>, string][] = [
  ["β = 1: wiped", { angle: 30, beta: 1, eraser: true }, "With β = 1 the memory’s part along k is wiped whole, so the new key answers exactly v. What stood at right angles to k stays."],
  ["β = 0: untouched", { angle: 30, beta: 0, eraser: true }, "With β = 0 the token neither erases nor writes. Only decay would change the memory."],
  ["β = 2: mirrored", { angle: 30, beta: 2, eraser: true, value: [0, 0] }, "With β = 2 twice the answer is taken away: the part along k changes its sign, as in a mirror. The length stays."],
  ["No eraser: interference", { angle: 30, beta: 1, eraser: false }, "Without the eraser the new value is laid on top of the old. Neither key gets its own value back: they interfere."],
  ["No decay: residue", { angle: 30, beta: 1, eraser: true, times: 12, alpha: [1, 1] }, "However often the new fact is written, the old one's part at right angles to k never goes. That is the residue."],
  ["Decay: it goes", { angle: 30, beta: 1, eraser: true, times: 12, alpha: [0.8, 0.8] }, "With decay the residue fades at every token, while the new fact is written again each time and stays exact."],
];
const STAGES = ["before", "after decay", "after erase", "after write"];

export class TouchFigure {
  private values: TouchArguments = { ...BEGIN };
  private scene: Touch | null = null;
  private plane = byId("touch-plane");
  private answers = byId("touch-answers");
  private note = h("p", { class: "story" });
  private message = h("p", { class: "message", role: "alert" });
  private heats = STAGES.map((name) => new Heat({ name: `Memory ${name}`, most: 1.6, width: 46, height: 46 }));
  private set: Record<string, (x: number) => void> = {};
  private eraser = h("input", { type: "checkbox", checked: true, onchange: () => this.change({ eraser: this.eraser.checked }) });
  private presets: HTMLButtonElement[] = [];
  private source: Source;
  private ask = latest(() => this.load());

  constructor(source: Source) {
    this.source = source;
    const make = (name: string, label: string, min: number, max: number, step: number, value: number, change: (x: number) => Partial<TouchArguments>, show?: (x: number) => string) => {
      const { element, set } = slider(label, { min, max, step, value, show }, (x) => this.change(change(x)));
      this.set[name] = set;
      return element;
    };
    const { values } = this;
    byId("touch-sliders").append(
      make("alpha0", "α, row 1 keeps", 0, 1, 0.01, values.alpha[0], (x) => ({ alpha: [x, this.values.alpha[1]] })),
      make("alpha1", "α, row 2 keeps", 0, 1, 0.01, values.alpha[1], (x) => ({ alpha: [this.values.alpha[0], x] })),
      make("beta", "β, strength", 0, 2, 0.01, values.beta, (x) => ({ beta: x })),
      make("angle", "Angle of the key", 0, 180, 1, values.angle, (x) => ({ angle: x }), (x) => `${x}°`),
      make("value0", "v, column 1", -1.5, 1.5, 0.05, values.value[0], (x) => ({ value: [x, this.values.value[1]] })),
      make("value1", "v, column 2", -1.5, 1.5, 0.05, values.value[1], (x) => ({ value: [this.values.value[0], x] })),
      make("times", "Times written", 1, 24, 1, values.times, (x) => ({ times: x })),
      h("label", { class: "switch" }, this.eraser, h("span", {}, "Eraser")),
    );
    for (const [name, change, note] of PRESETS) {
      const button = h("button", { type: "button", onclick: () => this.preset(change, note) }, name);
      this.presets.push(button);
      byId("touch-presets").append(button);
    }
    byId("touch-stages").append(
      ...STAGES.map((name, i) => h("figure", {}, this.heats[i].element, h("figcaption", {}, name))),
    );
    byId("touch-note").append(this.note, this.message);
    this.note.textContent = PRESETS[0][2];
    this.presets[0].setAttribute("aria-pressed", "true");
    new ResizeObserver(() => this.draw()).observe(this.plane);
    this.ask();
  }

  private preset(change: Partial<TouchArguments>, note: string): void {
    this.values = { ...BEGIN, ...change };
    const { alpha, beta, angle, value, times, eraser } = this.values;
    const sliders = { alpha0: alpha[0], alpha1: alpha[1], beta, angle, value0: value[0], value1: value[1], times };
    for (const [name, x] of Object.entries(sliders)) this.set[name](x);
    this.eraser.checked = eraser;
    this.note.textContent = note;
    this.presets.forEach((button, i) => button.setAttribute("aria-pressed", String(PRESETS[i][2] === note)));
    this.ask();
  }

  /** What the sliders say now, in words: the explanation goes with the hand. */
  private described(): string {
    const { alpha, beta, angle, times, eraser } = this.values;
    const off = Math.round(Math.abs(90 - angle));
    const meets = off === 0 ? "The new key is the old one" : off === 90 ? "The new key is at right angles to the old one" : `The new key is ${off}° off the old one`;
    const share = eraser ? (beta === 0 ? "nothing is wiped" : beta === 1 ? "what the memory holds along it is wiped whole" : beta < 1 ? `${Math.round(100 * beta)} % of what the memory holds along it is wiped` : `it is wiped ${text(beta, 3)} times over, so its sign changes`) : "nothing is wiped, the value is laid on top";
    const fades = alpha[0] === 1 && alpha[1] === 1 ? "Nothing fades." : `Row 1 keeps ${percent(alpha[0])} a token, row 2 ${percent(alpha[1])}.`;
    return `${meets}, and ${share}${times > 1 ? `, ${times} times` : ""}. ${fades}`;
  }

  private change(change: Partial<TouchArguments>): void {
    this.values = { ...this.values, ...change };
    this.presets.forEach((button) => button.setAttribute("aria-pressed", "false"));
    this.note.textContent = this.described();
    this.ask();
  }

  private async load(): Promise<void> {
    try {
      this.scene = await this.source.touch(this.values);
      this.message.textContent = "";
      this.draw();
    } catch (error) {
      this.message.textContent = (error as Error).message;
    }
  }

  draw(): void {
    const { scene } = this;
    if (!scene || !this.plane.clientWidth) return;
    const T = scene.written.shape[0];
    const at = (x: Tensor, t: number): Tensor => ({ shape: [2, 2], data: x.data.subarray(4 * t, 4 * t + 4) });
    const stages = [T > 1 ? at(scene.written, T - 2) : scene.start, at(scene.decayed, T - 1), at(scene.erased, T - 1), at(scene.written, T - 1)];
    stages.forEach((stage, i) => this.heats[i].show(stage));
    this.drawPlane(stages);
    this.drawAnswers();
  }

  /** Each column of the memory is an arrow in the plane of keys: decay squeezes it, erase projects it, write moves it. */
  private drawPlane(stages: Tensor[]): void {
    const scene = this.scene!;
    const size = Math.min(this.plane.clientWidth, innerWidth < 760 ? 0.36 * innerHeight : 420);
    const reach = 1.75;
    const x = scaleLinear().domain([-reach, reach]).range([0, size]);
    const y = scaleLinear().domain([-reach, reach]).range([size, 0]);
    const svg = select(this.plane).selectAll<SVGSVGElement, null>("svg").data([null]).join("svg");
    svg.attr("viewBox", `0 0 ${size} ${size}`).attr("width", size).attr("height", size).attr("role", "img");
    const [c, s] = scene.key.data;
    const [last, before] = [stages[3].data, stages[0].data];
    svg.attr("aria-label", `The plane of keys. Column 1 of the memory went from ${vector([before[0], before[2]])} to ${vector([last[0], last[2]])}, column 2 from ${vector([before[1], before[3]])} to ${vector([last[1], last[3]])}. The key is ${vector(scene.key.data)}.`);
    svg.html("");
    svg.append("circle").attr("class", "circle").attr("cx", x(0)).attr("cy", y(0)).attr("r", x(1) - x(0));
    for (const [x1, y1, x2, y2] of [[-reach, 0, reach, 0], [0, -reach, 0, reach]]) {
      svg.append("line").attr("class", "cross").attr("x1", x(x1)).attr("y1", y(y1)).attr("x2", x(x2)).attr("y2", y(y2));
    }
    svg.append("text").attr("class", "small").attr("x", size - 4).attr("y", y(0) - 6).attr("text-anchor", "end").text("row 1");
    svg.append("text").attr("class", "small").attr("x", x(0) + 6).attr("y", 12).text("row 2");
    svg.append("line").attr("class", "keyline").attr("x1", x(-reach * c)).attr("y1", y(-reach * s)).attr("x2", x(reach * c)).attr("y2", y(reach * s));
    const oldKey = scene.old_key.data;
    svg.append("circle").attr("class", "oldkey").attr("cx", x(oldKey[0])).attr("cy", y(oldKey[1])).attr("r", 4);
    svg.append("text").attr("class", "small").attr("x", x(oldKey[0]) - 8).attr("y", y(oldKey[1]) - 8).attr("text-anchor", "end").text("old key");
    for (const column of [0, 1]) {
      const tips = stages.map(({ data }) => [data[column], data[2 + column]] as [number, number]);
      svg.append("path").attr("class", `trail column-${column + 1}`).attr("d", line<[number, number]>((p) => x(p[0]), (p) => y(p[1]))(tips));
      tips.slice(0, 3).forEach((tip) => svg.append("circle").attr("class", `ghost column-${column + 1}`).attr("cx", x(tip[0])).attr("cy", y(tip[1])).attr("r", 3.5));
      arrow(svg.append("g").attr("class", `arrow column-${column + 1}`), x(0), y(0), x(tips[3][0]), y(tips[3][1]));
      if (Math.hypot(...tips[3]) > 0.15) {
        const turn = Math.atan2(tips[3][1], tips[3][0]) + (column ? -0.16 : 0.16);
        const far = Math.hypot(...tips[3]) + 0.1;
        svg.append("text").attr("class", `label column-${column + 1}`).attr("x", x(far * Math.cos(turn))).attr("y", y(far * Math.sin(turn))).attr("text-anchor", "middle").text(`column ${column + 1}`);
      }
    }
    const handle = svg.append("circle").attr("class", "handle").attr("cx", x(c)).attr("cy", y(s)).attr("r", 9);
    svg.append("text").attr("class", "label key").attr("x", x(1.2 * c)).attr("y", y(1.2 * s) + 5).attr("text-anchor", "middle").text("k");
    const node = svg.node()!;
    const turn = (event: PointerEvent) => {
      const [px, py] = pointer(event, node);
      const angle = Math.round((Math.atan2(y.invert(py), x.invert(px)) * 180) / Math.PI);
      const inside = Math.max(0, Math.min(180, angle < -90 ? 180 : angle));
      this.set.angle(inside);
      this.change({ angle: inside });
    };
    handle.on("pointerdown", (event: PointerEvent) => {
      event.preventDefault();
      const move = (e: PointerEvent) => turn(e);
      const up = () => {
        removeEventListener("pointermove", move);
        removeEventListener("pointerup", up);
      };
      addEventListener("pointermove", move);
      addEventListener("pointerup", up);
    });
  }

  private drawAnswers(): void {
    const scene = this.scene!;
    const T = scene.written.shape[0];
    const row = (x: Tensor, t: number) => x.data.subarray(2 * t, 2 * t + 2);
    const lines: [string, ArrayLike<number>, ArrayLike<number>, string][] = [
      ["the new key", row(scene.new_answers, T), scene.value.data, "wanted"],
      ["the old key", row(scene.old_answers, T), scene.old_value.data, "it was"],
    ];
    const rows = lines.map(([name, answer, reference, word]) => {
      const head = h("p", {}, h("span", { class: "name" }, `Ask with ${name}: `), h("strong", {}, vector(answer)), h("span", { class: "soft" }, `  ${word} ${vector(reference)}`));
      const bars = h("div", { class: "answer-bars" });
      for (const j of [0, 1]) {
        const bar = (value: number, kind: string) => {
          const element = h("i", { class: `${kind} column-${j + 1}` });
          const share = Math.max(-1, Math.min(1, value / 1.75));
          element.style.left = `${50 + Math.min(0, share) * 50}%`;
          element.style.width = `${Math.abs(share) * 50}%`;
          return element;
        };
        const mark = h("i", { class: "wanted" });
        mark.style.left = `${50 + Math.max(-1, Math.min(1, reference[j] / 1.75)) * 50}%`;
        bars.append(h("span", { class: "lane", title: `column ${j + 1}: ${text(answer[j], 4)}` }, bar(answer[j], "bar"), mark));
      }
      return h("div", { class: "answer" }, head, bars);
    });
    this.answers.replaceChildren(...rows);
  }
}

function arrow(g: ReturnType<typeof select<SVGGElement, unknown>> | any, x1: number, y1: number, x2: number, y2: number): void {
  const length = Math.hypot(x2 - x1, y2 - y1);
  if (length < 1) return void g.append("circle").attr("cx", x1).attr("cy", y1).attr("r", 3);
  const [ux, uy] = [(x2 - x1) / length, (y2 - y1) / length];
  const head = Math.min(11, length);
  const [bx, by] = [x2 - ux * head, y2 - uy * head];
  g.append("line").attr("x1", x1).attr("y1", y1).attr("x2", bx).attr("y2", by);
  g.append("path").attr("d", `M${x2},${y2}L${bx - uy * head * 0.45},${by + ux * head * 0.45}L${bx + uy * head * 0.45},${by - ux * head * 0.45}Z`);
}
