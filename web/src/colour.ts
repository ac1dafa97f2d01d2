/** One diverging scale for every signed number: amber below zero, paper at zero, blue above. Safe for colour-blind eyes. */

import { scaleLinear } from "d3-scale";

const STOPS = {
  light: ["#8a3d00", "#c96a16", "#edb877", "#f4efe6", "#8fbbe0", "#2f74b8", "#0c3d78"],
  dark: ["#ffc27a", "#e08a34", "#7d4a1c", "#24262c", "#2b4f78", "#4a90d9", "#a9d4ff"],
};
const STEPS = 511;

let table = new Uint8ClampedArray(STEPS * 4);
let css: string[] = [];
let ink: string[] = [];

export let dark = false;

/** The colours of the page's own style sheet, for what is drawn on canvas. */
export const style = { ink: "", soft: "", faint: "", accent: "", paper: "", line: "" };

export function readTheme(): void {
  dark = document.documentElement.dataset.theme === "dark";
  const values = getComputedStyle(document.documentElement);
  for (const name of Object.keys(style) as (keyof typeof style)[]) style[name] = values.getPropertyValue(`--${name}`).trim();
  const stops = STOPS[dark ? "dark" : "light"];
  const scale = scaleLinear<string>()
    .domain(stops.map((_, i) => i / (stops.length - 1)))
    .range(stops);
  table = new Uint8ClampedArray(STEPS * 4);
  css = [];
  ink = [];
  for (let i = 0; i < STEPS; i++) {
    const [r, g, b] = scale(i / (STEPS - 1)).match(/[\d.]+/g)!.map(Number);
    table.set([r, g, b, 255], i * 4);
    css.push(`rgb(${r},${g},${b})`);
    ink.push(0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#16150f" : "#ffffff");
  }
}

const index = (x: number, most: number) => {
  const share = most > 0 ? Math.max(-1, Math.min(1, x / most)) : 0;
  return Math.round((share + 1) * 0.5 * (STEPS - 1));
};

/** The colour of x where `most` is the end of the scale. */
export const colour = (x: number, most: number) => css[index(x, most)];

/** Black or white, whichever can be read on that colour. */
export const inkOn = (x: number, most: number) => ink[index(x, most)];

/** Fills pixels with the colours of numbers, mixed from two arrays. */
export function paint(pixels: Uint8ClampedArray, from: ArrayLike<number>, to: ArrayLike<number>, share: number, most: number): void {
  for (let i = 0; i < to.length; i++) {
    const at = 4 * index(from[i] + (to[i] - from[i]) * share, most);
    pixels[4 * i] = table[at];
    pixels[4 * i + 1] = table[at + 1];
    pixels[4 * i + 2] = table[at + 2];
    pixels[4 * i + 3] = 255;
  }
}

/** A CSS gradient of the scale, for legends. */
export const gradient = () => `linear-gradient(90deg, ${STOPS[dark ? "dark" : "light"].join(", ")})`;
