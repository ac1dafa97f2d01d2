/** "How is this computed": the functions behind a figure, as they stand in the package, and the paper's equation. */

import { busy, h, icon } from "./dom.ts";
import type { Source } from "./source.ts";

export function addHow(source: Source): void {
  const dialog = h("dialog", { class: "how", "aria-labelledby": "how-title" });
  document.body.append(dialog);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  for (const button of document.querySelectorAll<HTMLButtonElement>("button[data-how]")) {
    const explain = async () => {
      const close = h("button", { type: "button", class: "icon", "aria-label": "Close", onclick: () => dialog.close() });
      close.append(icon("M4 4l8 8M12 4l-8 8"));
      const head = h("header", {}, h("h2", { id: "how-title" }, "How is this computed?"), close);
      dialog.replaceChildren(head, h("p", {}, "…"));
      dialog.showModal();
      try {
        const { paper, papers, functions } = (await source.code())[button.dataset.how!];
        const link = ({ label, url }: { label: string; url: string }) => h("a", { href: url, rel: "noreferrer", target: "_blank" }, label);
        const where = source.live
          ? "The numbers of this figure come from these functions of the installed package, called as you touch it."
          : "In this exported site the numbers come from a copy of the law in your browser, held to these functions by the package’s tests.";
        const further = h("p", {}, "See also ");
        papers.forEach((p, i) => further.append(i ? ", " : "", link(p)));
        dialog.replaceChildren(
          head,
          h("p", {}, link(paper), `, ${paper.where}.`),
          ...(papers.length ? [further] : []),
          h("p", { class: "small" }, where),
          ...functions.flatMap(({ file, name, code }) => [h("h3", {}, h("code", {}, name), h("span", { class: "soft" }, ` in ${file}`)), h("pre", { tabIndex: 0, "aria-label": `Source of ${name}` }, h("code", {}, code))]),
        );
      } catch (error) {
        dialog.replaceChildren(head, h("p", { class: "message" }, (error as Error).message));
      }
    };
    button.addEventListener("click", () => void busy(explain));
  }
}
