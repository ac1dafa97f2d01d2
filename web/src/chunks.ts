/** Figure 4: the same numbers from matrix products, a chunk of tokens at once, checked against one token after the other. */

import { byId, choice, formula, h, latest, slider, text } from "./dom.ts";
import { Heat } from "./heat.ts";
import type { Chunked, Source } from "./source.ts";
import type { Watching, Whiteboard } from "./whiteboard.ts";

type Name = "A" | "P" | "M" | "W" | "U" | "memory" | "fresh" | "inter" | "intra" | "output" | "by_token";
const STEPS: { title: string; says: string; parts: [Name, string][] }[] = [
  {
    title: "Who meets whom",
    says: "Row i, column j: how much of what token j writes the key of token i will erase again (A), and its query will read (P). A token meets only what came before it, and P also what it wrote itself; nothing stands above the diagonal.",
    parts: [["A", "A, erased"], ["P", "P, read"]],
  },
  {
    title: "Undo the waiting",
    says: "Each token would have to wait for all before it. One triangular inverse, by forward substitution, settles all of them at once.",
    parts: [["M", "M = (I + A)⁻¹"]],
  },
  {
    title: "What to ask, what to write",
    says: "W asks the memory at the chunk’s start on behalf of each token; U is what each would write if that memory were empty. Neither needs to know the memory yet.",
    parts: [["W", "W"], ["U", "U"]],
  },
  {
    title: "What is truly new",
    says: "Once the memory arrives: what each token really adds to it.",
    parts: [["memory", "S, at the start"], ["fresh", "U − W S"]],
  },
  {
    title: "Answers",
    says: "The part from before the chunk, plus the part from within it, is each token’s output. Beside it the same from the law, one token after the other.",
    parts: [["inter", "between chunks"], ["intra", "within the chunk"], ["output", "their sum"], ["by_token", "token by token"]],
  },
];

export class ChunksFigure {
  private source: Source;
  private watching: Watching | null = null;
  private size = 8;
  private start = 8;
  private heats = new Map<Name, Heat>();
  private result = byId("chunks-result");
  private message = h("p", { class: "message", role: "alert" });
  private about = h("p", { class: "small" });
  private tokens = h("div", { class: "tokens bytes", role: "group", "aria-label": "Tokens of the chunk" });
  private place: ReturnType<typeof slider>;
  private total = 0;
  private ask = latest(() => this.load());

  constructor(source: Source, whiteboard: Whiteboard) {
    this.source = source;
    const sizes = choice("Tokens of a chunk", [[4, "4"], [8, "8"], [16, "16"]], this.size, (size) => {
      this.size = size;
      this.ask();
    });
    this.place = slider("First token", { min: 1, max: 40, step: 1, value: this.start + 1 }, (x) => {
      this.start = x - 1;
      this.ask();
    });
    const narrow = matchMedia("(max-width: 700px)").matches; // there one step at a time fits the screen
    const steps = choice("Steps shown", [[0, "All"], ...STEPS.map((_, i): [number, string] => [i + 1, String(i + 1)])], narrow ? 1 : 0, (step) => this.only(step));
    byId("chunks-controls").append(
      h("div", { class: "pick" }, h("span", {}, "Tokens of a chunk"), sizes),
      this.place.element,
      h("div", { class: "pick" }, h("span", {}, "Steps shown"), steps),
    );
    byId("chunks-tokens").append(this.tokens, this.about, this.message);
    const list = byId("chunks-steps");
    STEPS.forEach(({ title, says, parts }, i) => {
      const matrices = parts.map(([name, caption]) => {
        const heat = new Heat({ name: caption, hover: name === "memory" ? undefined : (row) => this.mark(row) });
        this.heats.set(name, heat);
        return h("figure", { "data-matrix": name }, heat.element, h("figcaption", {}, caption));
      });
      list.append(h("li", {}, h("div", { class: "words" }, h("h3", {}, title), h("p", {}, says), h("div", { class: "formula" }, formula(`chunk-${i + 1}`))), h("div", { class: "matrices" }, ...matrices)));
    });
    this.only(narrow ? 1 : 0);
    whiteboard.onWatch((watching) => {
      this.watching = watching;
      this.ask();
    });
  }

  /** Shows one step, or with 0 all of them. */
  private only(step: number): void {
    [...byId("chunks-steps").children].forEach((item, i) => ((item as HTMLElement).hidden = step > 0 && i !== step - 1));
  }

  private mark(row: number | null): void {
    this.heats.forEach((heat, name) => name !== "memory" && heat.mark(row));
    [...this.tokens.children].forEach((chip, i) => chip.classList.toggle("now", i === row));
  }

  private async load(): Promise<void> {
    const { watching } = this;
    if (!watching) return;
    try {
      const whole = await this.source.sentence(watching.text, watching.layer, watching.head);
      this.total = whole.tokens.length;
      if (this.total < this.size) throw new Error(`The sentence has ${this.total} tokens and a chunk ${this.size}; take a longer sentence in figure 1, or a smaller chunk.`);
      this.start = Math.min(this.start, this.total - this.size);
      this.place.range(1, this.total - this.size + 1);
      this.place.set(this.start + 1);
      const scene = await this.source.chunk({ ...watching, start: this.start, size: this.size });
      this.message.textContent = "";
      this.show(scene, watching);
    } catch (error) {
      this.message.textContent = (error as Error).message;
    }
  }

  private show(scene: Chunked, { text: sentence, layer, head }: Watching): void {
    const { size } = scene;
    this.about.textContent = `Layer ${layer + 1}, head ${head + 1} of “${sentence.length > 60 ? `${sentence.slice(0, 60)}…` : sentence}”, tokens ${scene.start + 1} to ${scene.start + size}, over the memory that the tokens before them left.`;
    if (this.tokens.childElementCount !== size) {
      const chip = (i: number) => h("span", { onpointerenter: () => this.mark(i), onpointerleave: () => this.mark(null) });
      this.tokens.replaceChildren(...Array.from({ length: size }, (_, i) => chip(i)));
      this.mark(null);
    }
    // the chips stay, so that the one under the pointer stays marked
    scene.tokens.forEach((token, i) => (this.tokens.children[i].textContent = token.part && token.part > 1 ? "·" : token.text));
    const square = Math.round(Math.min(24, 160 / size));
    const wide = scene.W.shape[1];
    const narrow = Math.max(2, Math.min(10, Math.floor(176 / wide)));
    const outputs = Math.max(...scene.output.data.map(Math.abs));
    for (const [name, heat] of this.heats) {
      const isSquare = name === "A" || name === "M" || name === "P";
      const most = name === "A" ? undefined : name === "M" ? 1 : name === "inter" || name === "intra" || name === "output" || name === "by_token" ? outputs : undefined;
      heat.show(scene[name], { height: name === "memory" ? Math.min(square, narrow) : square, width: isSquare ? square : narrow, most });
    }
    const line = (value: number, about: string) => h("p", {}, h("strong", {}, text(value, 2)), h("span", {}, about));
    this.result.replaceChildren(
      line(scene.output_difference, "largest difference of any output from the token-by-token form"),
      line(scene.memory_difference, "largest difference of the memory after the chunk"),
      line(scene.identity_error, "largest entry of M (I + A) − I"),
    );
    this.result.dataset.output = String(scene.output_difference);
    this.result.dataset.size = String(size);
    this.result.dataset.start = String(scene.start);
  }
}
