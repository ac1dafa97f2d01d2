/** Figure 1: a sentence, token by token, in four beats. */

import { axisBottom, axisLeft } from "d3-axis";
import { scaleLinear } from "d3-scale";
import { pointer, select } from "d3-selection";
import { line } from "d3-shape";
import { Board, litNames, type Beat, type Frame, type Scales } from "./board.ts";
import { animate, byId, choice, h, icon, latest, percent, text, vector } from "./dom.ts";
import { ask, norm, type Numbers } from "./law.ts";
import { Gallery } from "./gallery.ts";
import type { About, Source, Token, Traced } from "./source.ts";
import type { Tensor } from "./safetensors.ts";

const BEATS: Beat[] = ["decay", "erase", "write", "read"];
const BEAT_NAMES: Record<string, string> = { decay: "Decay", erase: "Erase", write: "Write", read: "Read" };

/** What the other figures need to know of this one: which head of which sentence is being watched. */
export interface Watching {
  text: string;
  layer: number;
  head: number;
}

export class Whiteboard {
  watching: Watching | null = null;
  private board = new Board();
  private scene: Traced | null = null;
  private position = 0; // 0 before the first token; 4 t + 1 .. 4 t + 4 the beats of token t
  private stop: () => void = () => undefined;
  private timer = 0;
  private playing = false;
  private speed = 1;
  private what: "memory" | "change" = "memory";
  private source: Source | null = null;
  private root = byId("whiteboard");
  private equation = byId("whiteboard-equation");
  private strip = h("div", { class: "tokens", role: "listbox", tabIndex: 0, "aria-label": "Tokens of the sentence" });
  private story = h("p", { class: "story" });
  private heading = h("p", { class: "beat-name" });
  private guesses = h("div", { class: "guesses" });
  private beats = h("div", { class: "beats", role: "group", "aria-label": "The four beats of a token" });
  private play = h("button", { type: "button", class: "play", onclick: () => this.toggle() });
  private scrub = h("input", { type: "range", min: "0", step: "1", value: "0", "aria-label": "Moment" });
  private chart = byId("whiteboard-norms");
  private controls = byId("whiteboard-source");
  private message = h("p", { class: "message", role: "alert" });
  private legend = h("div", { class: "legend" });
  private chosen = "walk";
  private mode: "worked" | "model" = "worked";
  private sentence = "";
  private told: ((watching: Watching) => void)[] = [];
  private ask = latest(() => this.load());
  private chartScale = scaleLinear();
  private gallery: Gallery | null = null;
  private galleryOf = ""; // the sentence that it shows

  constructor() {
    const button = (name: string, strokes: string, move: () => void) => {
      const element = h("button", { type: "button", class: "icon", "aria-label": name, title: name, onclick: () => (this.pause(), move()) });
      element.append(icon(strokes));
      return element;
    };
    const speed = h("select", { "aria-label": "Speed", onchange: (event: Event) => (this.speed = Number((event.target as HTMLSelectElement).value)) });
    for (const x of [0.5, 1, 2, 4, 8]) speed.append(h("option", { value: String(x), textContent: `${x}×`, selected: x === 1 }));
    const transport = h(
      "div",
      { class: "transport" },
      button("To the beginning", "M4 3v10M12.5 3l-6 5 6 5", () => this.go(0)),
      button("One beat back", "M10.5 3l-5 5 5 5", () => this.go(this.position - 1)),
      this.play,
      button("One beat forward", "M5.5 3l5 5-5 5", () => this.go(this.position + 1)),
      button("Next token", "M12 3v10M3.5 3l6 5-6 5", () => this.go(4 * Math.floor(this.position / 4) + 4)),
      speed,
    );
    for (const [i, beat] of BEATS.entries()) {
      this.beats.append(
        h("button", { type: "button", "data-beat": beat, onclick: () => (this.pause(), this.go(4 * this.token() + i + 1)) }, `${i + 1} ${BEAT_NAMES[beat]}`),
      );
    }
    const view = choice("What is drawn", [["memory", "The memory"], ["change", "What this beat changed"]], "memory", (what) => {
      this.what = what as "memory" | "change";
      this.draw();
    });
    this.scrub.addEventListener("input", () => (this.pause(), this.go(this.scrub.valueAsNumber, false)));
    byId("whiteboard-board").append(this.board.element, h("div", { class: "under" }, view, this.legend));
    byId("whiteboard-panel").append(this.beats, this.heading, this.story, transport, this.guesses);
    byId("whiteboard-tokens").append(this.strip, this.message);
    byId("whiteboard-scrub").append(this.scrub);
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.strip.addEventListener("click", (event) => {
      const chip = (event.target as HTMLElement).closest<HTMLElement>("[role=option]");
      if (!chip) return;
      this.pause();
      this.go(4 * Number(chip.dataset.index) + 3);
    });
    new ResizeObserver(() => this.drawChart()).observe(this.chart);
    this.setPlaying(false);
  }

  /** Shows the first example; sources can be chosen once they are known. */
  open(scene: Traced): void {
    this.show(scene);
    this.go(0, false);
  }

  onWatch(tell: (watching: Watching) => void): void {
    this.told.push(tell);
    if (this.watching) tell(this.watching);
  }

  connect(source: Source, about: About): void {
    this.source = source;
    this.sentence = about.examples[0];
    const { model } = about;
    const [layer, head] = model.telling;
    this.watching = { text: this.sentence, layer, head };
    const worked = h("div", { class: "row" });
    const options = Object.entries(about.worked) as [string, string][];
    worked.append(
      choice("Example", options, this.chosen, (name) => {
        this.chosen = name;
        this.ask();
      }),
    );
    const form = this.form(source, about);
    this.gallery = new Gallery(model.watchable, model.heads, (layer, head) => this.watch({ layer, head }), [layer, head]);
    const trained = h(
      "div",
      { class: "row model", hidden: true },
      form,
      this.gallery.element,
    );
    const pick = choice("Source", [["worked", "Worked by hand"], ["model", "A trained model"]], "worked", (mode) => {
      this.mode = mode as "worked" | "model";
      byId("model-about").hidden = mode !== "model";
      worked.hidden = mode !== "worked";
      trained.hidden = mode !== "model";
      this.ask();
    });
    this.controls.replaceChildren(pick, worked, trained);
    if (this.scene?.drift !== undefined || !source.live) this.ask();
    this.told.forEach((tell) => tell(this.watching!));
  }

  private form(source: Source, about: About): HTMLElement {
    if (!source.live) {
      const options = about.examples.map((text) => h("option", { value: text, textContent: text }));
      const choose = h("select", { class: "sentence", "aria-label": "Sentence", onchange: () => this.watch({ text: choose.value }) }, ...options);
      return h("div", { class: "form" }, choose);
    }
    const input = h("input", { type: "text", class: "sentence", value: this.sentence, spellcheck: false, autocomplete: "off", "aria-label": "Your sentence", maxLength: 2000 });
    const examples = h("datalist", { id: "examples" }, ...about.examples.map((value) => h("option", { value })));
    input.setAttribute("list", "examples");
    const form = h("form", { class: "form" }, input, h("button", { type: "submit" }, "Trace"), examples);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.watch({ text: input.value });
    });
    return form;
  }

  private watch(change: Partial<Watching>): void {
    this.watching = { ...this.watching!, ...change };
    this.sentence = this.watching.text;
    this.ask();
  }

  private async load(): Promise<void> {
    const { source, watching } = this;
    if (!source || !watching) return;
    this.pause();
    try {
      const begun = performance.now();
      const scene = this.mode === "worked" ? await source.worked(this.chosen) : await source.sentence(watching.text, watching.layer, watching.head);
      this.message.textContent = "";
      const keep = this.scene && this.mode === "model" && this.scene.tokens.length === scene.tokens.length ? this.position : null;
      this.show(scene);
      this.go(keep ?? (this.mode === "model" ? 4 * Math.min(scene.tokens.length, 24) - 1 : 0), false);
      this.root.dataset.scene = this.mode === "worked" ? this.chosen : `${watching.layer}-${watching.head}`;
      this.root.dataset.milliseconds = String(Math.round(performance.now() - begun));
      if (this.mode === "model" && this.galleryOf !== watching.text) {
        this.galleryOf = watching.text;
        this.gallery?.show(await source.heads(watching.text));
      }
      if (this.mode === "model") this.told.forEach((tell) => tell(watching));
    } catch (error) {
      this.message.textContent = (error as Error).message;
    }
  }

  private show(scene: Traced): void {
    this.scene = scene;
    const [T, K, V] = scene.written.shape;
    this.board.open(K, V, this.scales(scene), scene.rows, scene.columns);
    this.scrub.max = String(4 * T);
    const answers = probe(scene);
    this.strip.replaceChildren(...scene.tokens.map((token, i) => chip(token, i, answers?.[i])));
    this.strip.classList.toggle("bytes", T > 12 && !scene.rows);
    this.strip.classList.toggle("probed", answers !== null);
    this.position = Math.min(this.position, 4 * T);
    this.root.dataset.tokens = String(T);
    this.root.dataset.drift = scene.drift === undefined ? "" : String(scene.drift);
    this.drawChart();
  }

  private scales(scene: Traced): Scales {
    const clip = scene.tokens.length > 12 ? 0.998 : 1; // a few strongest entries must not pale the rest
    const most = (x: Tensor) => quantile(x.data, clip);
    return { memory: Math.max(most(scene.written), most(scene.start)), k: most(scene.k), q: most(scene.q), v: most(scene.v), held: Math.max(most(scene.held), 1e-9), read: most(scene.read) };
  }

  private token = () => Math.max(0, Math.ceil(this.position / 4) - 1);

  /** The memory at a moment. */
  private memory(position: number): Numbers {
    const scene = this.scene!;
    const size = scene.start.data.length;
    if (position === 0) return scene.start.data;
    const t = Math.ceil(position / 4) - 1;
    const beat = (position - 1) % 4;
    const states = [scene.decayed, scene.erased, scene.written, scene.written][beat];
    return states.data.subarray(t * size, (t + 1) * size);
  }

  go(position: number, moving = true): void {
    const scene = this.scene;
    if (!scene) return;
    const target = Math.max(0, Math.min(4 * scene.tokens.length, position));
    const forward = target === this.position + 1;
    this.position = target;
    this.stop();
    this.tell();
    if (forward && moving) this.stop = animate(Math.min(520, (scene.tokens.length > 12 ? 300 : 620) / this.speed), (share) => this.draw(share));
    else this.draw();
  }

  private draw(share = 1): void {
    const scene = this.scene;
    if (!scene) return;
    const t = this.token();
    const [, K, V] = scene.written.shape;
    const row = (x: Tensor, n: number) => x.data.subarray(t * n, (t + 1) * n);
    const before = this.memory(Math.max(0, this.position - 1));
    const now = this.memory(this.position);
    const started = this.position > 0;
    let [from, to]: Numbers[] = [before, now];
    if (this.what === "change") {
      to = Float64Array.from(now, (x, i) => x - before[i]);
      from = new Float64Array(now.length);
    }
    const frame: Frame = {
      ...{ beat: this.beat(), from, to, share },
      alpha: started ? row(scene.alpha, K) : null,
      k: started ? row(scene.k, K) : null,
      q: started ? row(scene.q, K) : null,
      v: started ? row(scene.v, V) : null,
      held: started && (this.position - 1) % 4 >= 1 ? row(scene.held, V) : null,
      read: started && (this.position - 1) % 4 === 3 ? row(scene.read, V) : null,
      beta: started ? scene.beta.data[t] : 0,
    };
    this.board.show(frame);
  }

  redraw(): void {
    this.gallery?.draw();
    this.draw();
    this.drawChart();
  }

  private beat = (): Beat => (this.position === 0 ? "start" : BEATS[(this.position - 1) % 4]);

  private tell(): void {
    const scene = this.scene!;
    const beat = this.beat();
    const t = this.token();
    this.equation.dataset.beat = beat;
    for (const button of this.beats.querySelectorAll<HTMLElement>("button")) {
      button.setAttribute("aria-pressed", String(button.dataset.beat === beat));
    }
    const label = scene.tokens[t];
    const name = label.parts ? `${label.text} (byte ${label.part} of ${label.parts})` : label.text;
    this.heading.textContent = beat === "start" ? "Before the first token" : `Token ${t + 1} of ${scene.tokens.length}: ${name}`;
    this.story.textContent = this.sentenceOf(beat, t);
    [...this.strip.children].forEach((chip, i) => {
      chip.classList.toggle("past", this.position > 0 && i < t);
      chip.classList.toggle("now", this.position > 0 && i === t);
      chip.setAttribute("aria-selected", String(this.position > 0 && i === t));
    });
    const now = this.strip.querySelector<HTMLElement>(".now");
    if (now) {
      this.strip.setAttribute("aria-activedescendant", now.id);
      const { offsetTop, offsetHeight } = now;
      if (offsetTop < this.strip.scrollTop || offsetTop + offsetHeight > this.strip.scrollTop + this.strip.clientHeight) this.strip.scrollTop = offsetTop - 8;
    }
    this.scrub.value = String(this.position);
    this.scrub.style.setProperty("--share", String(this.position / (4 * scene.tokens.length)));
    this.scrub.setAttribute("aria-valuetext", `${this.heading.textContent}${beat === "start" ? "" : `, ${beat}`}`);
    this.board.describe(`The memory, ${scene.written.shape.slice(1).join(" by ")}. ${this.heading.textContent}. ${this.story.textContent} Lit: ${litNames(beat).join(", ") || "nothing"}.`);
    this.drawGuesses(t);
    this.drawPlayhead();
    this.root.dataset.position = String(this.position);
  }

  private sentenceOf(beat: Beat, t: number): string {
    const scene = this.scene!;
    const [, K, V] = scene.written.shape;
    const row = (x: Tensor, n: number) => x.data.subarray(t * n, (t + 1) * n);
    const small = K <= 4 && V <= 4;
    const silent = scene.rows !== undefined && scene.beta.data[t] === 0; // a word of a story that writes nothing
    const beta = text(scene.beta.data[t]);
    const equals = "\u00a0=\u00a0";
    if (beat === "start") {
      const empty = norm(scene.start.data) === 0;
      const intro = scene.about ?? (empty ? "The memory is empty. " : "");
      return `${intro} Step forward, or press play.`.trim();
    }
    if (beat === "decay") {
      const alpha = row(scene.alpha, K);
      if (small) return `Each row fades by its own factor: α = ${vector(alpha)}.`;
      return `Each row fades by its own factor. The fastest keeps ${percent(Math.min(...alpha))} of itself, the slowest ${percent(Math.max(...alpha))}.`;
    }
    if (silent && (beat === "erase" || beat === "write")) return `β${equals}0: this word ${beat === "erase" ? "erases" : "writes"} nothing.`;
    if (silent && beat === "read" && norm(row(scene.q, K)) === 0) return "It asks nothing either.";
    if (beat === "erase") {
      const held = row(scene.held, V);
      if (small) return `Asked for k = ${vector(row(scene.k, K))}, the memory holds ${vector(Array.from(held, (x) => (scene.beta.data[t] ? x / scene.beta.data[t] : 0)))}. With β${equals}${beta}, ${vector(held)} is wiped along k.`;
      return `The memory is asked what it holds under k. With β${equals}${beta}, that share of the answer, of size ${text(norm(held))}, is wiped along k and nothing else.`;
    }
    if (beat === "write") {
      if (small) return `β v = ${vector(Array.from(row(scene.v, V), (x) => x * scene.beta.data[t]))} is written along the same k.`;
      return `With the same β${equals}${beta}, the value v, of size ${text(norm(row(scene.v, V)))}, is written along the same k.`;
    }
    const read = row(scene.read, V);
    return small ? `The query asks and the memory answers: o = ${vector(read)}.` : `The query q asks and the memory answers with o, of size ${text(norm(read))}. Reading changes nothing.`;
  }

  private drawGuesses(t: number): void {
    const next = this.scene?.next?.[t];
    if (!next || this.position === 0) {
      this.guesses.replaceChildren();
      return;
    }
    const rows = next.map(({ text: token, chance }) => {
      const bar = h("span", { class: "bar" });
      bar.style.width = `${100 * chance}%`;
      return h("div", { class: "guess" }, h("span", { class: "chip" }, token), h("span", { class: "track" }, bar), h("span", { class: "figure" }, percent(chance)));
    });
    this.guesses.replaceChildren(h("p", { class: "small" }, "What the whole model expects next"), ...rows);
  }

  private drawChart(): void {
    const scene = this.scene;
    const width = this.chart.clientWidth;
    if (!scene || !width) return;
    const height = 120;
    const T = scene.tokens.length;
    const margin = { left: 44, right: T <= 3 ? 24 : 10, top: 10, bottom: 24 };
    const points: [number, number][] = [[0, scene.norms.data[0]]];
    for (let t = 0; t < T; t++) {
      for (let b = 1; b < 4; b++) points.push([4 * t + b, scene.norms.data[4 * t + b]]);
      points.push([4 * t + 4, scene.norms.data[4 * t + 3]]);
    }
    const x = (this.chartScale = scaleLinear().domain([0, 4 * T]).range([margin.left, width - margin.right]));
    const y = scaleLinear().domain([0, Math.max(...points.map((p) => p[1]), 1e-9)]).nice(3).range([height - margin.bottom, margin.top]);
    const svg = select(this.chart).selectAll<SVGSVGElement, null>("svg").data([null]).join("svg");
    svg.attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img").attr("aria-label", `Size of the memory over time, from ${text(points[0][1])} to ${text(points.at(-1)![1])}, at most ${text(Math.max(...points.map((p) => p[1])))}.`);
    svg.html("");
    const few = T <= 3; // room to name the beats
    const ticks = few ? points.map((p) => p[0]) : x.ticks(Math.min(T, width / 60)).filter((i) => i % 4 === 0);
    const name = (i: number) => (!few ? String(i / 4) : i === 0 ? "start" : T > 1 && width < 700 ? "" : BEATS[(i - 1) % 4]);
    svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - margin.bottom})`).call(axisBottom(x).tickValues(ticks).tickFormat((i) => name(Number(i))).tickSizeOuter(0));
    svg.append("g").attr("class", "axis").attr("transform", `translate(${margin.left},0)`).call(axisLeft(y).ticks(3).tickSize(0).tickPadding(8).tickFormat((n) => text(Number(n))));
    svg.append("path").attr("class", "curve").attr("d", line<[number, number]>((p) => x(p[0]), (p) => y(p[1]))(points));
    svg.append("line").attr("class", "playhead").attr("y1", margin.top).attr("y2", height - margin.bottom);
    svg.append("circle").attr("class", "playhead").attr("r", 4.5);
    svg.on("click", (event) => (this.pause(), this.go(Math.round(x.invert(pointer(event, svg.node())[0])), false)));
    this.scrub.parentElement!.style.paddingLeft = `${margin.left - 8}px`;
    this.scrub.parentElement!.style.paddingRight = `${margin.right - 8}px`;
    this.heights = points.map((p) => y(p[1]));
    this.drawPlayhead();
    const { memory } = this.scales(scene);
    this.legend.replaceChildren(h("span", {}, text(-memory, 2)), h("i", { class: "scale" }), h("span", {}, text(memory, 2)));
  }

  private heights: number[] = [];

  private drawPlayhead(): void {
    const at = this.chartScale(this.position);
    const svg = select(this.chart);
    svg.select("line.playhead").attr("x1", at).attr("x2", at);
    svg.select("circle.playhead").attr("cx", at).attr("cy", this.heights[this.position] ?? 0);
  }

  private toggle(): void {
    if (this.playing) return this.pause();
    if (this.position >= 4 * (this.scene?.tokens.length ?? 0)) this.go(0, false);
    this.setPlaying(true);
    const tick = () => {
      this.go(this.position + 1);
      if (this.position >= 4 * this.scene!.tokens.length) return this.pause();
      this.timer = window.setTimeout(tick, Math.max(30, (this.scene!.tokens.length > 12 ? 360 : 1100) / this.speed));
    };
    tick();
  }

  private pause(): void {
    clearTimeout(this.timer);
    this.setPlaying(false);
  }

  private setPlaying(playing: boolean): void {
    this.playing = playing;
    this.play.textContent = playing ? "Pause" : "Play";
    this.root.dataset.playing = String(playing);
  }

  private key(event: KeyboardEvent): void {
    const target = event.target as HTMLElement;
    if (target.matches("input[type=text], select, textarea")) return;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const whole = event.shiftKey || target === this.strip ? 4 : 1;
    const next = 4 * (this.token() + Number(this.position > 0)) ;
    const moves: Record<string, () => void> = {
      ArrowRight: () => this.go(whole === 4 ? next + 4 : this.position + 1),
      ArrowLeft: () => this.go(whole === 4 ? Math.max(0, next - 4) : this.position - 1),
      Home: () => this.go(0),
      End: () => this.go(Infinity),
    };
    if (event.key === " " && !target.matches("button")) {
      event.preventDefault();
      return this.toggle();
    }
    if (!moves[event.key] || target.matches("input[type=range]")) return;
    event.preventDefault();
    this.pause();
    moves[event.key]();
  }
}

function chip({ text: label, part, parts }: Token, i: number, answer?: string): HTMLElement {
  const token = parts ? `${label}, byte ${part} of ${parts}` : label === "␣" ? "space" : label;
  const name = answer === undefined ? token : `${token}; asked now, the board says ${answer || "nothing"}`;
  const below = answer === undefined ? null : h("small", { class: "probe" }, answer || "–");
  return h("span", { role: "option", id: `token-${i}`, "data-index": String(i), "aria-selected": "false", "aria-label": name, title: name }, part && part > 1 ? "·" : label, below);
}

/** What the board answers to the row that is asked after every token: the columns that it says aloud; null where none is asked. */
function probe({ asked, columns, written }: Traced): string[] | null {
  if (asked === undefined || !columns) return null;
  const [T, K, V] = written.shape;
  const key = Float64Array.from({ length: K }, (_, i) => Number(i === asked));
  return Array.from({ length: T }, (_, t) => {
    const answer = ask(written.data.subarray(t * K * V, (t + 1) * K * V), key, K, V);
    return columns.filter((_, j) => answer[j] > 0.2).join(" + ");
  });
}

function quantile(x: ArrayLike<number>, share: number): number {
  if (share === 1 || x.length < 500) {
    let most = 0;
    for (let i = 0; i < x.length; i++) most = Math.max(most, Math.abs(x[i]));
    return most;
  }
  const stride = Math.max(1, Math.floor(x.length / 20000));
  const sample: number[] = [];
  for (let i = 0; i < x.length; i += stride) sample.push(Math.abs(x[i]));
  sample.sort((a, b) => a - b);
  return sample[Math.min(sample.length - 1, Math.floor(share * sample.length))];
}
