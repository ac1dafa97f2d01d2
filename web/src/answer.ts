/** The model's own answer: streamed, and what it would have answered after each earlier sentence. */

import { byId, count, h, latest, percent } from "./dom.ts";
import type { About, Answers, Source } from "./source.ts";

export class AnswerFigure {
  private source: Source;
  private text: string;
  private said = h("output", { class: "said", "aria-live": "polite" });
  private table = h("ol", { class: "earlier" });
  private message = h("p", { class: "message", role: "alert" });
  private timer = 0;
  private ask = latest(() => this.load());

  constructor(source: Source, about: About) {
    this.source = source;
    this.text = about.examples[0];
    const box = h("textarea", { rows: 3, spellcheck: false, "aria-label": "Your story, ending in a question", maxLength: 600, value: this.text, readOnly: !source.live });
    const form = h("form", { class: "story-form" }, box, h("button", { type: "submit", class: "primary" }, "Answer"));
    const use = (text: string) => {
      box.value = this.text = text;
      this.ask();
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      use(box.value.trim());
    });
    const examples = about.examples.map((text, i) => h("button", { type: "button", onclick: () => use(text) }, ["One thing", "Two things", "A person"][i] ?? `Story ${i + 1}`));
    byId("answer").append(
      form,
      h("div", { class: "presets", role: "group", "aria-label": "Stories" }, ...examples),
      this.message,
      h("p", { class: "small" }, `The model answers, token by token, with the chance that it gave each (${count(about.model.parameters)} parameters; it knows stories like these and little else):`),
      this.said,
      h("h3", { class: "sub" }, "And if it had been asked earlier?"),
      h("p", { class: "small" }, "After each sentence the state is forked and asked the same question. The last line is the probe of the whole story."),
      this.table,
    );
    this.ask();
  }

  private async load(): Promise<void> {
    clearTimeout(this.timer);
    try {
      const scene = await this.source.answers(this.text);
      this.message.textContent = "";
      this.show(scene);
    } catch (error) {
      this.message.textContent = (error as Error).message;
    }
  }

  private show({ said, earlier, question }: Answers): void {
    const pieces = said.map(({ text, chance }) => h("span", { class: "piece", title: percent(chance) }, text.replaceAll("␣", " ").replaceAll("\\n", " ")));
    if (pieces[0]) pieces[0].textContent = pieces[0].textContent.trimStart();
    this.said.replaceChildren();
    byId("answer").dataset.answer = "";
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const next = (i: number) => {
      if (i === pieces.length) {
        byId("answer").dataset.answer = pieces.map((p) => p.textContent).join("").trim();
        return;
      }
      this.said.append(pieces[i]);
      if (still) next(i + 1);
      else this.timer = window.setTimeout(() => next(i + 1), Math.max(40, 900 / pieces.length));
    };
    next(0);
    this.table.replaceChildren(
      ...earlier.map(({ sentence, answer, chance }) =>
        h("li", {}, h("span", { class: "told" }, sentence), h("span", { class: "asked" }, question), h("span", { class: "reply" }, answer), h("span", { class: "small" }, percent(chance))),
      ),
    );
    this.table.hidden = !earlier.length;
  }
}
