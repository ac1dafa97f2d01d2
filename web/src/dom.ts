/** Elements, numbers as text, and one animation clock: all that the page needs of a framework. */

type Child = Node | string | null | undefined | false;
type Props = Record<string, unknown>;

export function h<K extends keyof HTMLElementTagNameMap>(tag: K, props: Props = {}, ...children: Child[]): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value as EventListener);
    else if (name in element && !name.startsWith("aria")) (element as unknown as Props)[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) if (child) element.append(child);
  return element;
}

export const byId = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;

/** A formula that the build has rendered into a template of index.html. */
export function formula(id: string): DocumentFragment {
  return (byId<HTMLTemplateElement>(`tex-${id}`).content.cloneNode(true)) as DocumentFragment;
}

/** A number for the eye: at most `digits` significant ones, a true minus, nothing behind a whole number. */
export function text(x: number, digits = 3): string {
  if (!Number.isFinite(x)) return String(x);
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-4) {
    const [head, tail] = x.toExponential(digits - 1).split("e");
    return `${minus(String(Number(head)))}\u2009×\u200910${raised(Number(tail))}`;
  }
  return minus(String(Number(x.toPrecision(digits))));
}

const minus = (shown: string) => shown.replaceAll("-", "\u2212");
const raised = (n: number) => String(n).replace(/./g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(c)]));

/** A small number of a figure: nothing that the eye would take for zero is spelled out. */
export const brief = (x: number) => text(Math.abs(x) < 5e-3 ? 0 : Number(x.toFixed(2)), 3);

export const percent = (x: number) => `${text(100 * x, x < 0.1 ? 1 : 2)}\u2009%`;

export function vector(xs: ArrayLike<number>, digits = 3): string {
  return `[${Array.from(xs, (x) => text(x, digits)).join(", ")}]`;
}

/** Bytes in decimal units, as memory is sold. */
export function bytes(n: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) {
    n /= 1000;
    i++;
  }
  return `${text(n, 3)}\u00a0${units[i]}`;
}

export const count = (n: number) => Math.round(n).toLocaleString("en").replaceAll(",", "\u2009");

const still = matchMedia("(prefers-reduced-motion: reduce)");

/** Calls `frame` with 0 to 1 over `milliseconds`; returns how to stop it. Readers who want no motion see the end at once. */
export function animate(milliseconds: number, frame: (share: number) => void): () => void {
  if (still.matches || milliseconds <= 0) {
    frame(1);
    return () => undefined;
  }
  const begun = performance.now();
  let handle = requestAnimationFrame(function tick(now) {
    const share = Math.min(1, Math.max(0, (now - begun) / milliseconds));
    frame(share * share * (3 - 2 * share));
    if (share < 1) handle = requestAnimationFrame(tick);
  });
  return () => cancelAnimationFrame(handle);
}

/** A picture of a few strokes, for buttons. */
export function icon(path: string): SVGSVGElement {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const stroke = document.createElementNS("http://www.w3.org/2000/svg", "path");
  stroke.setAttribute("d", path);
  svg.append(stroke);
  return svg;
}

/** A group of buttons of which one is chosen. */
export function choice<T extends string | number>(label: string, options: [T, string][], chosen: T, choose: (value: T) => void): HTMLElement & { select(value: T): void } {
  const buttons = options.map(([value, name]) =>
    h("button", { type: "button", role: "radio", textContent: name, "data-value": String(value), onclick: () => pick(value, true) }),
  );
  const group = h("div", { class: "choice", role: "radiogroup", "aria-label": label }, ...buttons) as unknown as HTMLElement & { select(value: T): void };
  const mark = (value: T) =>
    buttons.forEach((b, i) => {
      b.setAttribute("aria-checked", String(options[i][0] === value));
      b.tabIndex = options[i][0] === value ? 0 : -1;
    });
  const pick = (value: T, tell: boolean) => {
    mark(value);
    if (tell) choose(value);
  };
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const at = buttons.indexOf(document.activeElement as HTMLButtonElement);
    const next = (at + step + buttons.length) % buttons.length;
    buttons[next].focus();
    pick(options[next][0], true);
  });
  group.select = (value) => pick(value, false);
  mark(chosen);
  return group;
}

/** A labelled slider that shows its number. */
export function slider(label: string, { min, max, step, value, show = (x: number) => text(x) }: { min: number; max: number; step: number; value: number; show?: (x: number) => string }, change: (x: number) => void) {
  const output = h("output", {}, show(value));
  const input = h("input", { type: "range", min: String(min), max: String(max), step: String(step), value: String(value) });
  const tell = () => {
    output.textContent = show(input.valueAsNumber);
    input.setAttribute("aria-valuetext", show(input.valueAsNumber));
    input.style.setProperty("--share", String((input.valueAsNumber - min) / (max - min)));
  };
  input.addEventListener("input", () => {
    tell();
    change(input.valueAsNumber);
  });
  tell();
  const element = h("label", { class: "slider" }, h("span", { class: "name" }, label), output, input);
  const set = (x: number) => {
    input.value = String(x);
    tell();
  };
  const range = (low: number, high: number) => {
    [min, max] = [low, high];
    input.min = String(low);
    input.max = String(high);
    tell();
  };
  return { element, input, set, range };
}

let underWay = 0;

/** Runs `work`; while any is under way the page says so, as html[data-busy]. */
export async function busy<T>(work: () => Promise<T>): Promise<T> {
  const { dataset } = document.documentElement;
  dataset.busy = String(++underWay);
  try {
    return await work();
  } finally {
    if (--underWay) dataset.busy = String(underWay);
    else delete dataset.busy;
  }
}

/** Runs `work` for the newest arguments only: while one run is under way, later ones replace each other. */
export function latest<A extends unknown[]>(work: (...args: A) => Promise<void>): (...args: A) => void {
  let running = false;
  let waiting: A | null = null;
  return async function run(...args: A) {
    if (running) {
      waiting = args;
      return;
    }
    running = true;
    try {
      await busy(() => work(...args));
    } finally {
      running = false;
      const next = waiting;
      waiting = null;
      if (next) void run(...next);
    }
  };
}
