import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import katex from "katex";
import { defineConfig, type Plugin, type UserConfig } from "vite";

/** Formulas in index.html, `<x-tex>...</x-tex>`, become HTML and MathML here, so that no renderer travels to the page. */
function formulas(): Plugin {
  const render = (_: string, display: string, tex: string) =>
    katex.renderToString(explained(tex.trim().replaceAll("&amp;", "&")), {
      displayMode: display !== "",
      trust: true, // \htmlClass marks the terms that light up
      strict: false,
      throwOnError: true,
    });
  return {
    name: "formulas",
    transformIndexHtml: {
      order: "pre",
      handler: (html) => html.replace(/<x-tex( display)?>([\s\S]*?)<\/x-tex>/g, (m, d, t) => render(m, d ?? "", t)),
    },
  };
}

/** The letters of the law carry the names under which terms.ts explains them. */
const LETTERS: [RegExp, string][] = [
  [/\\alpha(_t)?/g, "alpha"],
  [/\\beta(_t)?/g, "beta"],
  [/(?<![\\w{])S_(\{t-1\}|t)/g, "S"],
  [/(?<![\\a-zA-Z])k_t/g, "k"],
  [/(?<![\\a-zA-Z])v_t/g, "v"],
  [/(?<![\\a-zA-Z])q_t/g, "q"],
  [/(?<![\\a-zA-Z])o_t/g, "o"],
];

function explained(tex: string): string {
  return LETTERS.reduce((text, [letter, term]) => text.replace(letter, (found) => `\\htmlData{term=${term}}{${found}}`), tex);
}

/** A page opened from a folder may load no modules, and nothing that asks for another origin's leave: plain tags do. */
function plainTags(): Plugin {
  return {
    name: "plain-tags",
    transformIndexHtml: {
      order: "post",
      handler: (html) =>
        html
          .replace(/<script type="module" crossorigin src=/g, "<script defer src=")
          .replace(/<link rel="modulepreload"[^>]*>\s*/g, "")
          .replace(/ crossorigin/g, ""),
    },
  };
}

/** Keep of the fonts what the page uses: of KaTeX's the families in its formulas, as woff2 alone; of the serif, Latin. */
function fewerFonts(): Plugin {
  const used = /KaTeX_(Main|Math|Size[1-3])/;
  return {
    name: "fewer-fonts",
    enforce: "pre",
    transform(css, id) {
      if (id.includes("source-serif-4")) {
        return css.replace(/@font-face\s*\{[^}]*\}/g, (face) => (/cyrillic|greek|vietnamese/.test(face) ? "" : face));
      }
      if (!id.includes("katex.min.css")) return;
      return css
        .replace(/@font-face\{[^}]*\}/g, (face) => (used.test(face) ? face : ""))
        .replace(/,url\([^)]*\.(woff|ttf)\) format\("[^"]*"\)/g, "");
    },
  };
}

/** Beside the page: a digest of the sources it was built from, and the licences of what it contains. */
function record(): Plugin {
  return {
    name: "record",
    generateBundle() {
      const digest = createHash("sha256");
      const sources = readdirSync("src").map((name) => `src/${name}`);
      for (const file of ["index.html", "package-lock.json", "vite.config.ts", ...sources].sort()) {
        digest.update(`${file}\n`).update(readFileSync(file));
      }
      this.emitFile({ type: "asset", fileName: "build.json", source: JSON.stringify({ sources: digest.digest("hex") }) });
      this.emitFile({ type: "asset", fileName: "LICENSES.txt", source: licences() });
    },
  };
}

function licences(): string {
  const { dependencies } = JSON.parse(readFileSync("package.json", "utf8"));
  const names = new Set<string>(["katex"]);
  const visit = (name: string) => {
    if (names.has(name)) return;
    names.add(name);
    const inner = JSON.parse(readFileSync(join("node_modules", name, "package.json"), "utf8")).dependencies ?? {};
    Object.keys(inner).forEach(visit);
  };
  Object.keys(dependencies).forEach(visit);
  const parts = [...names].sort().map((name) => {
    const folder = join("node_modules", name);
    const { version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
    const file = ["LICENSE", "LICENSE.md", "LICENSE.txt"].map((f) => join(folder, f)).find(existsSync);
    return `${name} ${version} (${license})\n\n${file ? readFileSync(file, "utf8").trim() : "No licence text in the package."}`;
  });
  return "This page contains the following works.\n\n" + parts.join(`\n\n${"-".repeat(80)}\n\n`) + "\n";
}

const output = {
  entryFileNames: "assets/[name].js",
  chunkFileNames: "assets/[name].js",
  assetFileNames: "assets/[name][extname]",
};
const shared = { outDir: "../palimpsest/explainer/static", assetsInlineLimit: 0, modulePreload: { polyfill: false }, target: "es2022" };

/** The page, as one classic script; and, `--mode law`, the law and the reader of scenes apart, so that they can be checked by themselves. */
export default defineConfig(({ mode }): UserConfig =>
  mode === "law"
    ? {
        publicDir: false,
        build: {
          ...{ ...shared, emptyOutDir: false },
          rollupOptions: { input: { law: "src/law.ts", safetensors: "src/safetensors.ts" }, preserveEntrySignatures: "strict" as const, output },
        },
      }
    : {
        base: "./",
        plugins: [formulas(), fewerFonts(), record(), plainTags()],
        server: { proxy: { "/api": "http://127.0.0.1:8123" } },
        build: { ...shared, emptyOutDir: true, cssCodeSplit: false, rollupOptions: { input: { index: "index.html" }, output: { ...output, format: "iife" as const } } },
      },
);
