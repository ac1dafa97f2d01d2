/** A small matrix: a heat map with a caption, its numbers printed where there is room, one row of it marked at will. */

import { colour, inkOn, style } from "./colour.ts";
import { h, text } from "./dom.ts";
import { difference } from "./law.ts";
import type { Tensor } from "./safetensors.ts";

export interface HeatOptions {
  name: string; // spoken and shown on hover
  most?: number; // end of the colour scale; the largest entry if missing
  height?: number; // of a row, pixels
  width?: number; // of a column
  rows?: string[]; // names of rows, written at the left
  columns?: string[];
  hover?: (row: number | null) => void;
}

export class Heat {
  readonly element: HTMLElement;
  private canvas = h("canvas", { role: "img" });
  private data: Tensor | null = null;
  private marked: number | null = null;
  private options: HeatOptions;

  constructor(options: HeatOptions) {
    this.options = options;
    this.element = h("div", { class: "heat" }, this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => {
      this.canvas.title = "";
      options.hover?.(null);
    });
    heats.add(this);
  }

  show(data: Tensor, change: Partial<HeatOptions> = {}): void {
    this.data = data;
    Object.assign(this.options, change);
    const most = this.most();
    const entries = data.data.length <= 16 ? `: ${Array.from(data.data, (x) => text(x, 3)).join(", ")}` : `, largest entry ${text(most, 3)}`;
    this.canvas.setAttribute("aria-label", `${this.options.name}, ${data.shape.join(" by ")}${entries}`);
    this.draw();
  }

  mark(row: number | null): void {
    if (row === this.marked) return;
    this.marked = row;
    this.draw();
  }

  private most(): number {
    return this.options.most ?? difference(this.data!.data, new Float64Array(this.data!.data.length));
  }

  private geometry() {
    const { height = 16, width = 16, rows, columns } = this.options;
    return { height, width, left: rows ? 46 : 0, top: columns ? 16 : 0 };
  }

  draw(): void {
    const { data, canvas } = this;
    if (!data) return;
    const [N, M] = data.shape.length === 1 ? [1, data.shape[0]] : data.shape;
    const { height, width, left, top } = this.geometry();
    const [w, tall] = [left + M * width, top + N * height];
    const ratio = Math.min(devicePixelRatio || 1, 3);
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(tall * ratio);
    canvas.style.width = `${w}px`;
    canvas.style.aspectRatio = `${w} / ${tall}`;
    const context = canvas.getContext("2d")!;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, w, tall);
    const most = this.most();
    const gap = Math.min(width, height) >= 24 ? 2 : Math.min(width, height) > 6 ? 1 : 0;
    context.textBaseline = "middle";
    for (let i = 0; i < N; i++) {
      context.globalAlpha = this.marked === null || this.marked === i ? 1 : 0.3;
      for (let j = 0; j < M; j++) {
        const value = data.data[i * M + j];
        context.fillStyle = colour(value, most);
        context.beginPath();
        context.roundRect(left + j * width, top + i * height, width - gap, height - gap, gap > 1 ? 3 : 0);
        context.fill();
        if (width >= 34 && height >= 22) {
          context.fillStyle = inkOn(value, most);
          context.font = `500 ${height > 30 ? 13 : 12}px "Inter Variable", sans-serif`;
          context.textAlign = "center";
          const shown = Math.abs(value) < 5e-4 ? 0 : value;
          context.fillText(text(shown, Math.abs(shown) < 1 ? 2 : 3), left + (j + 0.5) * width - gap / 2, top + (i + 0.5) * height);
        }
      }
    }
    context.globalAlpha = 1;
    context.fillStyle = style.soft;
    context.font = '500 12px "Inter Variable", sans-serif';
    this.options.rows?.forEach((name, i) => {
      context.textAlign = "right";
      context.fillText(name, left - 8, top + (i + 0.5) * height);
    });
    this.options.columns?.forEach((name, j) => {
      context.textAlign = "center";
      context.fillText(name, left + (j + 0.5) * width, 7);
    });
  }

  private hover(event: PointerEvent): void {
    if (!this.data) return;
    const bounds = this.canvas.getBoundingClientRect();
    const [N, M] = this.data.shape.length === 1 ? [1, this.data.shape[0]] : this.data.shape;
    const { height, width, left, top } = this.geometry();
    const zoom = (left + M * width) / bounds.width;
    const i = Math.floor(((event.clientY - bounds.top) * zoom - top) / height);
    const j = Math.floor(((event.clientX - bounds.left) * zoom - left) / width);
    if (i < 0 || j < 0 || i >= N || j >= M) return;
    this.canvas.title = `${this.options.name}, row ${i + 1}, column ${j + 1}: ${text(this.data.data[i * M + j], 4)}`;
    this.options.hover?.(i);
  }
}

const heats = new Set<Heat>();

/** Draws every matrix again, in the colours of the theme. */
export const redrawHeats = () => heats.forEach((heat) => heat.draw());
