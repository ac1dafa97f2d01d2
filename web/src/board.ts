/** The whiteboard itself, on one canvas: the memory with its vectors at the sides on which they act. */

import { colour, inkOn, paint, style } from "./colour.ts";
import { h, text } from "./dom.ts";
import type { Numbers } from "./law.ts";

export type Beat = "start" | "decay" | "erase" | "write" | "read";

/** What is drawn at one moment. */
export interface Frame {
  beat: Beat;
  from: Numbers; // [K, V]
  to: Numbers; // [K, V]
  share: number; // 0 is `from`, 1 is `to`
  alpha: Numbers | null; // vectors of the token; null before the first
  k: Numbers | null;
  q: Numbers | null;
  v: Numbers | null;
  held: Numbers | null;
  read: Numbers | null;
  beta: number;
}

export interface Scales {
  memory: number;
  k: number;
  q: number;
  v: number;
  held: number;
  read: number;
}

type Vector = "alpha" | "k" | "q" | "v" | "held" | "read";
const LIT: Record<Beat, Vector[]> = { start: [], decay: ["alpha"], erase: ["k", "held"], write: ["k", "v"], read: ["q", "read"] };
const NAMES: Record<Vector, string> = { alpha: "α", k: "k", q: "q", v: "v", held: "βSᵀk", read: "o" };
const SPOKEN: Record<Vector, string> = { alpha: "alpha", k: "k", q: "q", v: "v", held: "beta S transposed k", read: "o" };

interface Box {
  x: number;
  y: number;
  w: number;
  h: number;
}

export class Board {
  readonly element: HTMLElement;
  private canvas = h("canvas", { tabIndex: 0, role: "img" });
  private readout = h("p", { class: "readout" });
  private spoken = h("p", { class: "spoken", role: "status" });
  private image = document.createElement("canvas");
  private pixels: ImageData | null = null;
  private K = 0;
  private V = 0;
  private cell = 0;
  private memory: Box = { x: 0, y: 0, w: 0, h: 0 };
  private boxes: Record<Vector, Box> = {} as Record<Vector, Box>;
  private scales: Scales = { memory: 1, k: 1, q: 1, v: 1, held: 1, read: 1 };
  private frame: Frame | null = null;
  private cursor: { row: number; column: number } | null = null;
  private names: { rows: string[]; columns: string[] } = { rows: [], columns: [] };

  constructor() {
    this.element = h("div", { class: "board" }, this.canvas, this.readout, this.spoken);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    new ResizeObserver(() => this.layout()).observe(this.element);
  }

  /** A memory of K rows and V columns, with the ends of its colour scales. */
  open(K: number, V: number, scales: Scales, rows: string[] = [], columns: string[] = []): void {
    const same = K === this.K && V === this.V;
    this.names = { rows, columns };
    [this.K, this.V, this.scales] = [K, V, scales];
    if (!same) {
      this.cursor = null;
      this.image.width = V;
      this.image.height = K;
      this.pixels = new ImageData(V, K);
    }
    this.layout();
  }

  show(frame: Frame): void {
    this.frame = frame;
    this.draw();
    if (this.cursor) this.tell(false);
  }

  describe(label: string): void {
    this.canvas.setAttribute("aria-label", `${label} Arrow keys read single entries.`);
  }

  private layout(): void {
    const width = this.element.clientWidth;
    if (!this.K || !width) return;
    const { K, V } = this;
    const narrow = width < 480;
    const gap = narrow ? 7 : 12;
    const label = 20;
    const band = (cell: number) => Math.max(narrow ? 12 : 14, Math.min(cell, 44));
    // columns: alpha, k, memory, q; the left side also carries the names of the rows above and below
    const named = this.names.rows.length ? 44 : 0;
    const leftOf = (b: number) => Math.max(1.9 * b + 2 * gap + named, 58);
    const across = (cell: number) => leftOf(band(cell)) + V * cell + gap + Math.max(band(cell), 34);
    let cell = Math.min(narrow ? 64 : 78, (narrow ? 300 : 400) / K);
    while (cell > 1 && across(cell) > width) cell -= cell > 12 ? 1 : 0.25;
    cell = cell > 6 ? Math.floor(cell) : cell;
    this.cell = cell;
    const b = band(cell);
    const x = Math.floor(Math.max(0, (width - across(cell)) / 2) + leftOf(b));
    const top = label;
    this.boxes.v = { x, y: top, w: V * cell, h: b };
    this.boxes.held = { x, y: top + b + 6, w: V * cell, h: b };
    const y = top + 2 * b + 6 + label + gap / 2;
    this.memory = { x, y, w: V * cell, h: K * cell };
    this.boxes.k = { x: x - gap - b, y, w: b, h: K * cell };
    this.boxes.alpha = { x: x - 2 * gap - 1.9 * b, y, w: 0.9 * b, h: K * cell };
    this.boxes.q = { x: x + V * cell + gap, y, w: b, h: K * cell };
    this.boxes.read = { x, y: y + K * cell + gap, w: V * cell, h: b };
    const height = y + K * cell + gap + b + 4;
    const ratio = Math.min(devicePixelRatio || 1, 3);
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    this.draw();
  }

  draw(): void {
    const frame = this.frame;
    const context = this.canvas.getContext("2d");
    if (!context || !frame || !this.cell) return;
    const ratio = this.canvas.width / this.element.clientWidth;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.drawMemory(context, frame, ratio);
    const lit = LIT[frame.beat];
    for (const name of Object.keys(NAMES) as Vector[]) {
      this.drawVector(context, name, frame[name], lit.includes(name));
    }
    this.drawBeta(context, frame);
    context.globalAlpha = 1;
    if (this.cursor) {
      const { x, y } = this.memory;
      context.strokeStyle = style.ink;
      context.lineWidth = 2;
      const size = Math.max(this.cell, 3);
      context.strokeRect(x + this.cursor.column * this.cell, y + this.cursor.row * this.cell, size, size);
    }
  }

  private drawMemory(context: CanvasRenderingContext2D, frame: Frame, ratio: number): void {
    const { x, y, w, h: height } = this.memory;
    const { K, V, cell } = this;
    const mixed = (n: number) => frame.from[n] + (frame.to[n] - frame.from[n]) * frame.share;
    if (cell * ratio < 8 || K * V > 2048) {
      paint(this.pixels!.data, frame.from, frame.to, frame.share, this.scales.memory);
      this.image.getContext("2d")!.putImageData(this.pixels!, 0, 0);
      context.imageSmoothingEnabled = false;
      context.drawImage(this.image, x, y, w, height);
    } else {
      const gap = cell > 30 ? 3 : 1;
      for (let i = 0; i < K; i++) {
        for (let j = 0; j < V; j++) {
          const value = mixed(i * V + j);
          context.fillStyle = colour(value, this.scales.memory);
          rounded(context, x + j * cell, y + i * cell, cell - gap, cell - gap, cell > 30 ? 5 : 1);
          if (cell >= 34) number(context, value, x + (j + 0.5) * cell - gap / 2, y + (i + 0.5) * cell, cell, inkOn(value, this.scales.memory));
        }
      }
    }
    context.fillStyle = style.ink;
    context.font = '500 13px "Inter Variable", sans-serif';
    context.textBaseline = "middle";
    context.textAlign = "right";
    this.names.rows.forEach((name, i) => context.fillText(name, this.boxes.alpha.x - 8, y + (i + 0.5) * cell));
    context.textAlign = "center";
    this.names.columns.forEach((name, j) => context.fillText(name, x + (j + 0.5) * cell, y - 12));
    context.strokeStyle = style.line;
    context.lineWidth = 1;
    context.strokeRect(x - 1.5, y - 1.5, w + 3 - (cell > 30 ? 3 : 1) * Number(K * V <= 2048), height + 3 - (cell > 30 ? 3 : 1) * Number(K * V <= 2048));
  }

  private drawBeta(context: CanvasRenderingContext2D, frame: Frame): void {
    const lit = frame.beat === "erase" || frame.beat === "write";
    context.fillStyle = lit ? style.accent : style.soft;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const { v, held, q } = this.boxes;
    const x = q.x + q.w / 2;
    context.font = `${lit ? 600 : 500} 14px "Inter Variable", sans-serif`;
    context.fillText("β", x, v.y + v.h / 2);
    if (frame.alpha) context.fillText(text(frame.beta, 2), x, held.y + held.h / 2);
  }

  private drawVector(context: CanvasRenderingContext2D, name: Vector, values: Numbers | null, lit: boolean): void {
    const box = this.boxes[name];
    const upright = box.h > box.w || name === "alpha" || name === "k" || name === "q";
    const { cell } = this;
    const gap = cell > 30 ? 3 : cell > 5 ? 1 : 0;
    const n = upright ? this.K : this.V;
    for (let i = 0; i < n; i++) {
      const [x, y] = upright ? [box.x, box.y + i * cell] : [box.x + i * cell, box.y];
      const [w, height] = upright ? [box.w, cell - gap] : [cell - gap, box.h];
      const radius = cell > 30 ? 4 : 1;
      if (name === "alpha") {
        context.fillStyle = style.faint;
        rounded(context, x, y, w, height, radius);
        if (values) {
          context.fillStyle = style.soft;
          rounded(context, x, y, Math.max(w * values[i], 0), height, radius);
        }
        if (values && cell >= 34) number(context, values[i], x + w / 2, y + cell / 2, w, values[i] > 0.55 ? style.paper : style.ink);
        continue;
      }
      const most = this.scales[name];
      context.fillStyle = values ? colour(values[i], most) : style.faint;
      rounded(context, x, y, w, height, radius);
      if (values && cell >= 34 && Math.min(w, height) >= 30) number(context, values[i], x + w / 2, y + height / 2, Math.min(w, height) + 8, inkOn(values[i], most));
    }
    context.fillStyle = lit ? style.accent : style.soft;
    context.font = `${lit ? 600 : 500} 14px "Inter Variable", sans-serif`;
    context.textBaseline = "middle";
    if (upright) {
      context.textAlign = "center";
      context.fillText(NAMES[name], box.x + box.w / 2, box.y - 12);
    } else {
      context.textAlign = "right";
      context.fillText(NAMES[name], box.x - 10, box.y + box.h / 2);
    }
    if (lit) {
      context.strokeStyle = style.accent;
      context.lineWidth = 2;
      context.strokeRect(box.x - 2.5, box.y - 2.5, box.w + 5 - (upright ? 0 : gap), box.h + 5 - (upright ? gap : 0));
    }
  }

  private hover(event: PointerEvent): void {
    const bounds = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left, event.clientY - bounds.top];
    const inside = (box: Box) => x >= box.x && y >= box.y && x < box.x + box.w && y < box.y + box.h;
    if (inside(this.memory)) {
      const row = Math.min(this.K - 1, Math.floor((y - this.memory.y) / this.cell));
      const column = Math.min(this.V - 1, Math.floor((x - this.memory.x) / this.cell));
      return this.point({ row, column });
    }
    this.point(null);
    const name = (Object.keys(NAMES) as Vector[]).find((n) => inside(this.boxes[n]));
    const values = name && this.frame?.[name];
    if (!name || !values) return;
    const upright = name === "alpha" || name === "k" || name === "q";
    const i = Math.min(values.length - 1, Math.floor((upright ? y - this.boxes[name].y : x - this.boxes[name].x) / this.cell));
    this.readout.textContent = `${NAMES[name]}, ${upright ? "row" : "column"} ${i + 1}: ${text(values[i], 4)}`;
  }

  private walk(event: KeyboardEvent): void {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const { row, column } = this.cursor ?? { row: 0, column: -step[1] };
    const within = (i: number, n: number) => Math.max(0, Math.min(n - 1, i));
    this.point({ row: within(row + step[0], this.K), column: within(column + step[1], this.V) });
    this.tell(true);
  }

  private point(cursor: { row: number; column: number } | null): void {
    if (cursor?.row === this.cursor?.row && cursor?.column === this.cursor?.column) return;
    this.cursor = cursor;
    this.tell(false);
    this.draw();
  }

  private tell(aloud: boolean): void {
    if (!this.cursor || !this.frame) {
      this.readout.textContent = "";
      return;
    }
    const { row, column } = this.cursor;
    const n = row * this.V + column;
    const [now, before] = [this.frame.to[n], this.frame.from[n]];
    const was = before === now ? "" : `, was ${text(before, 4)}`;
    const { rows, columns } = this.names;
    this.readout.textContent = `S, row ${rows[row] ?? row + 1}, column ${columns[column] ?? column + 1}: ${text(now, 4)}${was}`;
    if (aloud) this.spoken.textContent = this.readout.textContent;
  }
}

/** The vectors that a beat uses, for those who cannot see them lit. */
export const litNames = (beat: Beat) => LIT[beat].map((name) => SPOKEN[name]);

function rounded(context: CanvasRenderingContext2D, x: number, y: number, w: number, height: number, radius: number): void {
  if (radius < 2) return context.fillRect(x, y, w, height);
  context.beginPath();
  context.roundRect(x, y, w, height, Math.min(radius, w / 2, height / 2));
  context.fill();
}

function number(context: CanvasRenderingContext2D, value: number, x: number, y: number, room: number, ink: string): void {
  const size = Math.max(10, Math.min(17, room * 0.3));
  const shown = text(Math.abs(value) < 5e-4 ? 0 : value, Math.abs(value) < 1 ? 2 : 3);
  context.fillStyle = ink;
  context.font = `500 ${shown.length > 5 ? size * 0.85 : size}px "Inter Variable", sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(shown, x, y + 0.5);
}
