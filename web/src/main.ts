import "@fontsource-variable/inter/wght.css";
import "@fontsource-variable/source-serif-4/wght.css";
import "katex/dist/katex.min.css";
import "./styles.css";
import { AnswerFigure } from "./answer.ts";
import { ChunksFigure } from "./chunks.ts";
import { gradient, readTheme } from "./colour.ts";
import { byId } from "./dom.ts";
import { FamilyFigure, scrollAgainstBoard } from "./family.ts";
import { redrawHeats } from "./heat.ts";
import { Hero } from "./hero.ts";
import { addHow } from "./how.ts";
import { HybridFigure } from "./hybrid.ts";
import { InsideFigure } from "./inside.ts";
import { Exported, first, Live, type Source } from "./source.ts";
import { explainTerms } from "./terms.ts";
import { TouchFigure } from "./touch.ts";
import { Tour } from "./tour.ts";
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
  const [hero, whiteboard] = [new Hero(), new Whiteboard()];
  redraw.push(() => hero.draw(), () => whiteboard.redraw());
  scrollAgainstBoard();
  explainTerms();
  try {
    const walk = await first();
    hero.open(walk);
    whiteboard.open(walk);
    page.dataset.interactive = String(Math.round(performance.now()));
    addHow(source);
    await new Promise((done) => setTimeout(done)); // the first picture is drawn before the library is asked for
    const about = await source.about();
    whiteboard.connect(source, about);
    const { version, model } = about;
    status.textContent = live ? `Computed here by palimpsest ${version}` : `Exported by palimpsest ${version}; computed in your browser, held to the library by its tests`;
    byId("model-about").textContent = `${model.name ? `The model is “${model.name}”` : "The model is the small one that the package ships"}: ${model.layer_types.map((t) => (t.startsWith("mla") ? "M" : "K")).join("")}, ${Math.round(model.parameters / 1000)} thousand parameters, ${model.heads} heads of ${model.head_dim} × ${model.head_dim} a layer, ${model.tokenizer === "bytes" ? "reading bytes" : "with its own tokenizer"}.`;
    const answer = new AnswerFigure(source, about);
    void answer;
    const inside = new InsideFigure(source, whiteboard);
    const touch = new TouchFigure(source);
    const family = new FamilyFigure(source, about);
    const chunks = new ChunksFigure(source, whiteboard);
    const hybrid = new HybridFigure(source, whiteboard);
    redraw.push(() => inside.draw(), () => touch.draw(), () => family.draw(), () => hybrid.draw());
    void chunks;
    new Tour([
      { id: "beginning", title: "A board.", says: "Fade, erase, write, read: all that a token does. Watch it once round.", set: () => hero.go(0) },
      { id: "why", title: "Why a board?", says: "Drag the slider: the scroll grows with every token, the board stays as it is." },
      { id: "figure-1", title: "Fade.", says: "Each row keeps its own share α. Here the second row is halved.", set: () => whiteboard.go(1) },
      { id: "whiteboard", title: "Erase.", says: "The board is asked what it holds under the key, and that is wiped; nothing else is touched.", set: () => whiteboard.go(2) },
      { id: "whiteboard-tokens", title: "Write.", says: "Key times value, an outer product: each cell gets its row’s key times its column’s value.", set: () => whiteboard.go(3) },
      { id: "figure-answer", title: "What it is good for.", says: "The model reads a story in which something changes, and answers with the last word on it. Type your own." },
      { id: "figure-inside", title: "Inside.", says: "What the last token’s question finds after every token: the weights of red’s letters fade or are wiped, those of blue come." },
      { id: "figure-2", title: "Change one thing.", says: "Drag the key: what stands at right angles to it stays, whatever is written." },
      { id: "figure-3", title: "The family.", says: "Six memories hear the same facts. Those that cannot erase mix red with blue.", set: () => family.tell("twice") },
      { id: "figure-4", title: "All at once.", says: "The same numbers in matrix products, a chunk of tokens at a time: that is how it is trained." },
      { id: "figure-5", title: "The hybrid.", says: "Three layers of boards to one that looks back: most of the cache is gone, and nothing is out of reach." },
    ]);
    page.dataset.ready = String(Math.round(performance.now()));
  } catch (error) {
    status.textContent = (error as Error).message;
    status.classList.add("failed");
    page.dataset.failed = "true";
  }
}

void start();
