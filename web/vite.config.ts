import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import katex from "katex";
import { defineConfig, type Plugin } from "vite";

/** Formulas in index.html, `<x-tex>...</x-tex>`, become HTML and MathML here, so that no renderer travels to the page. */
function formulas(): Plugin {
  const render = (_: string, display: string, tex: string) =>
    katex.renderToString(tex.trim().replaceAll("&amp;", "&"), {
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

export default defineConfig({
  base: "./",
  plugins: [formulas(), fewerFonts(), record()],
  server: { proxy: { "/api": "http://127.0.0.1:8123" } },
  build: {
    outDir: "../palimpsest/explainer/static",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
    rollupOptions: {
      input: { index: "index.html", law: "src/law.ts", safetensors: "src/safetensors.ts" }, // two apart, so that they can be checked by themselves
      preserveEntrySignatures: "strict",
      output: {
        entryFileNames: "assets/[name].js",
        chunkFileNames: "assets/[name].js",
        assetFileNames: "assets/[name][extname]",
      },
    },
  },
});
