import "@fontsource-variable/inter/wght.css";
import "@fontsource-variable/source-serif-4/wght.css";
import "katex/dist/katex.min.css";
import "./styles.css";
import { ChunksFigure } from "./chunks.ts";
import { gradient, readTheme } from "./colour.ts";
import { byId } from "./dom.ts";
import { FamilyFigure } from "./family.ts";
import { redrawHeats } from "./heat.ts";
import { addHow } from "./how.ts";
import { HybridFigure } from "./hybrid.ts";
import { Exported, first, Live, type Source } from "./source.ts";
import { TouchFigure } from "./touch.ts";
import { Whiteboard } from "./whiteboard.ts";

const page = document.documentElement;
const live = document.querySelector<HTMLMetaElement>("meta[name=palimpsest]")!.content === "live";
const source: Source = live ? new Live() : new Exported();
const redraw: (() => void)[] = [redrawHeats];

function theme(): void {
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen: string | null = null;
  try {
    chosen = localStorage.getItem("theme");
  } catch {
    // storage may be forbidden; a choice then lasts as long as the page
  }
  const apply = () => {
    page.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
    readTheme();
    page.style.setProperty("--scale", gradient());
    const other = page.dataset.theme === "dark" ? "light" : "dark";
    button.textContent = other === "light" ? "Light" : "Dark";
    button.setAttribute("aria-label", `${button.textContent}: switch the page’s colours`);
    redraw.forEach((draw) => draw());
  };
  button.addEventListener("click", () => {
    chosen = page.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("theme", chosen);
    } catch {
      // as above
    }
    apply();
  });
  system.addEventListener("change", apply);
  apply();
}

async function start(): Promise<void> {
  theme();
  const status = byId("status");
  const whiteboard = new Whiteboard();
  redraw.push(() => whiteboard.redraw());
  try {
    whiteboard.open(await first());
    page.dataset.interactive = String(Math.round(performance.now()));
    addHow(source);
    await new Promise((done) => setTimeout(done)); // the first picture is drawn before the library is asked for
    const about = await source.about();
    whiteboard.connect(source, about);
    const { version, model } = about;
    status.textContent = live ? `Computed here by palimpsest ${version}` : `Exported by palimpsest ${version}; computed in your browser, held to the library by its tests`;
    byId("model-about").textContent = `${model.name ? `The model is “${model.name}”` : "The model is the small one that the package ships"}: ${model.layer_types.map((t) => (t.startsWith("mla") ? "M" : "K")).join("")}, ${Math.round(model.parameters / 1000)} thousand parameters, ${model.heads} heads of ${model.head_dim} × ${model.head_dim} a layer, ${model.tokenizer === "bytes" ? "reading bytes" : "with its own tokenizer"}.`;
    const touch = new TouchFigure(source);
    const family = new FamilyFigure(source, about);
    const chunks = new ChunksFigure(source, whiteboard);
    const hybrid = new HybridFigure(source, whiteboard);
    redraw.push(() => touch.draw(), () => family.draw(), () => hybrid.draw());
    void chunks;
    page.dataset.ready = String(Math.round(performance.now()));
  } catch (error) {
    status.textContent = (error as Error).message;
    status.classList.add("failed");
    page.dataset.failed = "true";
  }
}

void start();
