/**
 * Where the page's numbers come from.
 *
 * Live: every scene is computed by the Python package, on this machine. Export: the inputs of each head were taken from the
 * package when the site was written, and law.ts runs the same law over them here.
 */

import { ask, chunk, difference, scaled, softmaxLookup, trace, type Inputs, type Numbers } from "./law.ts";
import { fromSafetensors, type Tensor } from "./safetensors.ts";

export interface About {
  version: string;
  model: {
    name: string;
    layer_types: string[];
    watchable: number[];
    heads: number;
    head_dim: number;
    parameters: number;
    tokenizer: string;
    max_tokens: number;
    telling: [number, number]; // the layer and head to begin with
  };
  worked: Record<string, string>;
  stories: Stories;
  examples: string[];
}

/** explainer/stories.json: what figures 2 and 3 are about. */
export interface Stories {
  old: { key: number[]; value: number[] }; // the fact that figure 2's memory holds at first
  recency: number; // what a token of distance takes off the scores, where softmax has positions
  sharpness: number; // scale of q in the softmax look-up: unit keys, so a key's own weight is e^8 to 1
  answers: string[];
  keys: Record<string, number[]>;
  stories: Record<string, { title: string; facts: Fact[]; asked: string }>;
}

export interface Fact {
  key: string;
  value: string | null;
}

export interface Code {
  paper: { label: string; url: string; where: string };
  papers: { label: string; url: string }[];
  functions: { file: string; name: string; code: string }[];
}

export interface Token {
  text: string;
  part?: number;
  parts?: number;
}

export interface Guess {
  text: string;
  chance: number;
}

/** Inputs as they are displayed, and the memory after every beat. */
export interface Traced {
  title?: string;
  about?: string;
  tokens: Token[];
  start: Tensor;
  q: Tensor;
  k: Tensor;
  v: Tensor;
  alpha: Tensor;
  beta: Tensor;
  decayed: Tensor;
  erased: Tensor;
  written: Tensor;
  read: Tensor;
  held: Tensor;
  norms: Tensor; // [T, 4]: before, after decay, after erase, after write
  final: Tensor;
  rows?: string[]; // names, where rows and columns of the board mean something
  columns?: string[];
  asked?: number; // the row whose key is asked after every token
  next?: Guess[][];
  /** Export only: how far the memory computed here is from the one the package computed. */
  drift?: number;
}

export interface Heads {
  layers: number[];
  memories: Tensor; // [layers, heads, K, V], after the last token
}

export interface Touch {
  start: Tensor;
  decayed: Tensor;
  erased: Tensor;
  written: Tensor;
  key: Tensor;
  value: Tensor;
  old_key: Tensor;
  old_value: Tensor;
  old_answers: Tensor;
  new_answers: Tensor;
}

export interface TouchArguments {
  alpha: number[];
  beta: number;
  angle: number;
  value: number[];
  times: number;
  eraser: boolean;
}

export interface Member {
  memory?: Tensor;
  weights?: Tensor;
  answer: Tensor;
}

export interface Family {
  title: string;
  asked: string;
  answers: string[];
  head_decay: number;
  facts: Fact[];
  keys: Tensor;
  members: Record<string, Member>;
}

export interface FamilyArguments {
  story: string;
  beta: number;
  keep: number[];
  positions: boolean;
}

export interface Chunked {
  tokens: Token[];
  start: number;
  size: number;
  memory: Tensor;
  A: Tensor;
  M: Tensor;
  W: Tensor;
  U: Tensor;
  P: Tensor;
  fresh: Tensor;
  inter: Tensor;
  intra: Tensor;
  output: Tensor;
  by_token: Tensor;
  after: Tensor;
  identity_error: number;
  output_difference: number;
  memory_difference: number;
}

export interface ChunkArguments {
  text: string;
  layer: number;
  head: number;
  start: number;
  size: number;
}

export interface Hybrid {
  layer_types: string[];
  heads: number;
  head_dim: number;
  latent_width: number;
  longest: number;
  layers: { kind: string; fixed: number; per_token: number }[];
  models: Record<string, { fixed: number; per_token: number }>;
}

export interface Order {
  tokens: Token[];
  exchanged: [number, number];
  memory: number;
  latent: number | null;
}

export interface Answers {
  question: string;
  said: Guess[];
  earlier: { sentence: string; answer: string; chance: number }[];
}

/** A trained head: what its answers are made of, what is left of each token, how long its channels keep. */
export interface Inside {
  tokens: Token[];
  reads: Tensor; // [T, T]: of token s in what token t reads
  asked: Tensor; // [T, T]: of token s in what the asker would read after token t
  left: Tensor; // [T, T]: of token s after token t
  half_life: Tensor; // [K], tokens
  eigenvalues: Tensor; // [T, K], ascending
}

export interface InsideArguments {
  text: string;
  layer: number;
  head: number;
  asker: number;
}

export interface Source {
  live: boolean;
  about(): Promise<About>;
  code(): Promise<Record<string, Code>>;
  worked(name: string): Promise<Traced>;
  sentence(text: string, layer: number, head: number): Promise<Traced>;
  heads(text: string): Promise<Heads>;
  touch(a: TouchArguments): Promise<Touch>;
  family(a: FamilyArguments): Promise<Family>;
  chunk(a: ChunkArguments): Promise<Chunked>;
  hybrid(): Promise<Hybrid>;
  order(text: string): Promise<Order>;
  answers(text: string): Promise<Answers>;
  inside(a: InsideArguments): Promise<Inside>;
}

async function answer(response: Response): Promise<Response> {
  if (response.ok) return response;
  const body = await response.json().catch(() => ({ error: "" }));
  throw new Error(body.error || `The server answered ${response.status}; start palimpsest explain again.`);
}

/** The first picture on the page, a file of its own: it is there before anything else is. */
export async function first(): Promise<Traced> {
  if (exported) return fromSafetensors(inside("first.safetensors"));
  return fromSafetensors(await (await answer(await fetch("first.safetensors"))).arrayBuffer());
}

/** An exported page brings its files in data.js, as base64 by their names: a page opened from a folder may fetch none. */
const exported = (globalThis as { PALIMPSEST?: Record<string, string> }).PALIMPSEST;

function inside(name: string): ArrayBuffer {
  const packed = exported?.[name];
  if (packed === undefined) throw new Error(`This site has no ${name}; export it again.`);
  return Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)).buffer;
}

const unreachable = () => new Error("The server no longer answers; start palimpsest explain again and reload this page.");

export class Live implements Source {
  live = true;
  about = once(() => this.get<About>("api/about"));
  code = once(() => this.get<Record<string, Code>>("api/code"));

  private async get<T>(url: string): Promise<T> {
    const response = await fetch(url).catch(() => Promise.reject(unreachable()));
    return (await answer(response)).json();
  }

  private async scene<T>(name: string, args: object): Promise<T> {
    const request = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(args) };
    const response = await fetch(`api/scene/${name}`, request).catch(() => Promise.reject(unreachable()));
    return fromSafetensors<T>(await (await answer(response)).arrayBuffer());
  }

  worked = (name: string) => this.scene<Traced>("worked", { name });
  sentence = (text: string, layer: number, head: number) => this.scene<Traced>("sentence", { text, layer, head });
  heads = (text: string) => this.scene<Heads>("heads", { text });
  touch = (a: TouchArguments) => this.scene<Touch>("touch", a);
  family = (a: FamilyArguments) => this.scene<Family>("family", a);
  chunk = (a: ChunkArguments) => this.scene<Chunked>("chunk", a);
  hybrid = () => this.scene<Hybrid>("hybrid", {});
  order = (text: string) => this.scene<Order>("order", { text });
  answers = (text: string) => this.scene<Answers>("answers", { text });
  inside = (a: InsideArguments) => this.scene<Inside>("inside", a);
}

export class Exported implements Source {
  live = false;
  about = once(() => this.json<About>("data/about.json"));
  code = once(() => this.json<Record<string, Code>>("data/code.json"));
  private files = new Map<string, unknown>();

  private async json<T>(name: string): Promise<T> {
    return JSON.parse(new TextDecoder().decode(inside(name)));
  }

  private async file<T>(name: string): Promise<T> {
    if (!this.files.has(name)) this.files.set(name, fromSafetensors(inside(name)));
    return this.files.get(name) as T;
  }

  private async number(text: string): Promise<number> {
    const i = (await this.about()).examples.indexOf(text);
    if (i < 0) throw new Error("This site holds a few sentences only; run palimpsest explain to use your own.");
    return i;
  }

  worked = async (name: string) => withBeats(await this.file<Traced>(`data/worked-${name}.safetensors`));

  async sentence(text: string, layer: number, head: number): Promise<Traced> {
    const i = await this.number(text);
    const traced = withBeats(await this.file<Traced>(`data/sentence-${i}-${layer}-${head}.safetensors`));
    return { ...traced, next: await this.json<Guess[][]>(`data/next-${i}.json`) };
  }

  async touch({ alpha, beta, angle, value, times, eraser }: TouchArguments): Promise<Touch> {
    const turn = (angle * Math.PI) / 180;
    const key = Float64Array.of(Math.cos(turn), Math.sin(turn));
    const { old } = (await this.about()).stories;
    const [oldKey, oldValue] = [Float64Array.from(old.key), Float64Array.from(old.value)];
    const start = outer(oldKey, oldValue);
    const k = repeat(key, times);
    const inputs = {
      ...{ T: times, K: 2, V: 2, q: k, k, start },
      erase: k.map((x) => (eraser ? beta * x : 0)),
      write: repeat(Float64Array.from(value), times).map((x) => beta * x),
      alpha: repeat(Float64Array.from(alpha), times),
    };
    const beats = trace(inputs);
    const history = [start, ...Array.from({ length: times }, (_, t) => beats.written.subarray(4 * t, 4 * t + 4))];
    const answers = (u: Numbers) => tensor(Float64Array.from(history.flatMap((S) => [...ask(S, u, 2, 2)])), times + 1, 2);
    return {
      ...{ start: tensor(start, 2, 2), key: tensor(key, 2), value: tensor(Float64Array.from(value), 2) },
      ...{ old_key: tensor(oldKey, 2), old_value: tensor(oldValue, 2) },
      decayed: tensor(beats.decayed, times, 2, 2),
      erased: tensor(beats.erased, times, 2, 2),
      written: tensor(beats.written, times, 2, 2),
      ...{ old_answers: answers(oldKey), new_answers: answers(key) },
    };
  }

  async family({ story, beta, keep, positions }: FamilyArguments): Promise<Family> {
    const { stories, keys, answers, sharpness, recency } = (await this.about()).stories;
    const { title, facts, asked } = stories[story];
    const T = facts.length;
    const k = Float64Array.from(facts.flatMap(({ key }) => keys[key]));
    const v = Float64Array.from(facts.flatMap(({ value }) => answers.map((a) => Number(a === value))));
    const q = repeat(Float64Array.from(keys[asked]), T);
    const byChannel = [keep[0], keep[1], keep[1], keep[1]];
    const mean = Math.exp(byChannel.reduce((sum, x) => sum + Math.log(x), 0) / 4);
    const none = new Float64Array(4 * T);
    const run = (alpha: number[], strength: number | null): Member => {
      const erase = strength === null ? none : k.map((x) => strength * x);
      const write = strength === null ? v : v.map((x) => strength * x);
      const inputs = { T, K: 4, V: 3, q, k, erase, write, alpha: repeat(Float64Array.from(alpha), T), start: new Float64Array(12) };
      const beats = trace(inputs);
      return { memory: tensor(beats.written, T, 4, 3), answer: tensor(beats.read, T, 3) };
    };
    const lookup = softmaxLookup(T, 4, 3, q, k, v, sharpness, positions ? recency : 0);
    return {
      ...{ title, asked, answers, facts, head_decay: mean, keys: tensor(k, T, 4) },
      members: {
        softmax_lookup: { weights: tensor(lookup.weights, T, T), answer: tensor(lookup.answer, T, 3) },
        linear_attention: run([1, 1, 1, 1], null),
        delta_rule: run([1, 1, 1, 1], beta),
        gated_linear_attention: run(byChannel, null),
        gated_delta: run([mean, mean, mean, mean], beta),
        kda: run(byChannel, beta),
      },
    };
  }

  async chunk({ text, layer, head, start, size }: ChunkArguments): Promise<Chunked> {
    const scene = await this.sentence(text, layer, head);
    const whole = inputsOf(scene);
    const { K, V } = whole;
    const rows = (x: Numbers, N: number) => x.subarray(start * N, (start + size) * N);
    const S = start ? scene.written.data.subarray((start - 1) * K * V, start * K * V) : whole.start;
    const inside: Inputs = {
      ...{ T: size, K, V, start: S, q: rows(whole.q, K), k: rows(whole.k, K), alpha: rows(whole.alpha, K) },
      ...{ erase: rows(whole.erase, K), write: rows(whole.write, V) },
    };
    const c = chunk(inside);
    const beats = trace(inside);
    const square = (x: Float64Array) => tensor(x, size, size);
    const identity = c.M.map((_, n) => {
      const [i, j] = [Math.floor(n / size), n % size];
      let sum = c.M[n] - Number(i === j);
      for (let m = 0; m < size; m++) sum += c.M[i * size + m] * c.A[m * size + j];
      return sum;
    });
    return {
      ...{ tokens: scene.tokens.slice(start, start + size), start, size, memory: { shape: [K, V], data: S } },
      ...{ A: square(c.A), M: square(c.M), P: square(c.P), W: tensor(c.W, size, K), U: tensor(c.U, size, V) },
      ...{ fresh: tensor(c.fresh, size, V), inter: tensor(c.inter, size, V), intra: tensor(c.intra, size, V) },
      ...{ output: tensor(c.output, size, V), by_token: tensor(beats.read, size, V), after: tensor(c.after, K, V) },
      identity_error: difference(identity, new Float64Array(size * size)),
      output_difference: difference(c.output, beats.read),
      memory_difference: difference(c.after, beats.written.subarray((size - 1) * K * V)),
    };
  }

  async inside({ text, layer, head, asker }: InsideArguments): Promise<Inside> {
    const scene = await this.sentence(text, layer, head);
    const kept = await this.file<Pick<Inside, "half_life" | "eigenvalues">>(`data/inside-${await this.number(text)}-${layer}-${head}.safetensors`);
    const { T, K, ...rest } = inputsOf(scene);
    const own = Float64Array.from({ length: T * T }, (_, n) => (n % (T + 1) === 0 ? scene.beta.data[n / (T + 1)] : 0));
    const { read, written } = trace({ ...rest, T, K, V: T, write: own, start: new Float64Array(K * T) });
    const q = rest.q.subarray(asker * K, (asker + 1) * K);
    const asked = new Float64Array(T * T);
    const left = new Float64Array(T * T);
    for (let t = 0; t < T; t++) {
      const S = written.subarray(t * K * T, (t + 1) * K * T);
      asked.set(ask(S, q, K, T), t * T);
      for (let s = 0; s < T; s++) {
        let sum = 0;
        for (let i = 0; i < K; i++) sum += S[i * T + s] ** 2;
        left[t * T + s] = Math.sqrt(sum);
      }
    }
    return { tokens: scene.tokens, ...kept, reads: tensor(read, T, T), asked: tensor(asked, T, T), left: tensor(left, T, T) };
  }

  hybrid = () => this.file<Hybrid>("data/hybrid.safetensors");
  heads = async (text: string) => this.file<Heads>(`data/heads-${await this.number(text)}.safetensors`);
  order = async (text: string) => this.file<Order>(`data/order-${await this.number(text)}.safetensors`);
  answers = async (text: string) => this.file<Answers>(`data/answers-${await this.number(text)}.safetensors`);
}

/** KDA's inputs in the core's terms. */
export function inputsOf(scene: Pick<Traced, "q" | "k" | "v" | "alpha" | "beta" | "start">): Inputs {
  const [T, K] = scene.k.shape;
  const V = scene.v.shape[1];
  const [erase, write] = [scaled(scene.k.data, scene.beta.data, K), scaled(scene.v.data, scene.beta.data, V)];
  return { T, K, V, q: scene.q.data, k: scene.k.data, erase, write, alpha: scene.alpha.data, start: scene.start.data };
}

function withBeats(scene: Traced): Traced {
  const inputs = inputsOf(scene);
  const { T, K, V } = inputs;
  const beats = trace(inputs);
  const last = beats.written.subarray((T - 1) * K * V);
  const drift = Math.max(difference(last, scene.final.data), difference(beats.read, scene.read.data));
  const cube = (x: Float64Array) => tensor(x, T, K, V);
  return {
    ...scene,
    ...{ decayed: cube(beats.decayed), erased: cube(beats.erased), written: cube(beats.written) },
    ...{ held: tensor(beats.held, T, V), read: tensor(beats.read, T, V), drift },
  };
}

const tensor = (data: Float64Array, ...shape: number[]): Tensor => ({ shape, data });
const outer = (a: Numbers, b: Numbers) => Float64Array.from({ length: a.length * b.length }, (_, n) => a[Math.floor(n / b.length)] * b[n % b.length]);
const repeat = (x: Float64Array, times: number) => Float64Array.from({ length: x.length * times }, (_, n) => x[n % x.length]);

function once<T>(work: () => Promise<T>): () => Promise<T> {
  let kept: Promise<T> | null = null;
  return () => (kept ??= work());
}
