/**
 * The law, as the package's ops/reference.py states it, in float64.
 *
 *     S <- Diag(alpha) S;    S <- S + k (write - S^T erase)^T;    o = S^T q
 *
 * With erase = beta k and write = beta v it is Kimi Delta Attention. The exported site computes with these functions;
 * the package's tests hold them to the library. T tokens, K key channels, V value channels; rows one after the other.
 */

export type Numbers = Float64Array | Float32Array;

export interface Inputs {
  T: number;
  K: number;
  V: number;
  q: Numbers; // [T, K], scaled
  k: Numbers; // [T, K]
  erase: Numbers; // [T, K]
  write: Numbers; // [T, V]
  alpha: Numbers; // [T, K]
  start: Numbers; // [K, V]
}

export interface Beats {
  decayed: Float64Array; // [T, K, V]
  erased: Float64Array; // [T, K, V]
  written: Float64Array; // [T, K, V]
  held: Float64Array; // [T, V], what the memory answered to the eraser
  read: Float64Array; // [T, V]
}

/** The memory after each beat of each token. */
export function trace({ T, K, V, q, k, erase, write, alpha, start }: Inputs): Beats {
  const beat = () => new Float64Array(T * K * V);
  const beats = { decayed: beat(), erased: beat(), written: beat(), held: new Float64Array(T * V), read: new Float64Array(T * V) };
  let before: Numbers = start;
  for (let t = 0; t < T; t++) {
    const part = (x: Float64Array) => x.subarray(t * K * V, (t + 1) * K * V);
    const [decayed, erased, written] = [part(beats.decayed), part(beats.erased), part(beats.written)];
    const held = beats.held.subarray(t * V, (t + 1) * V);
    for (let i = 0; i < K; i++) {
      for (let j = 0; j < V; j++) {
        decayed[i * V + j] = alpha[t * K + i] * before[i * V + j];
        held[j] += erase[t * K + i] * decayed[i * V + j];
      }
    }
    for (let i = 0; i < K; i++) {
      for (let j = 0; j < V; j++) {
        erased[i * V + j] = decayed[i * V + j] - k[t * K + i] * held[j];
        written[i * V + j] = erased[i * V + j] + k[t * K + i] * write[t * V + j];
      }
    }
    beats.read.set(ask(written, q.subarray(t * K, (t + 1) * K), K, V), t * V);
    before = written;
  }
  return beats;
}

/** S^T u: what the memory answers to u. */
export function ask(S: Numbers, u: ArrayLike<number>, K: number, V: number): Float64Array {
  const answer = new Float64Array(V);
  for (let i = 0; i < K; i++) for (let j = 0; j < V; j++) answer[j] += u[i] * S[i * V + j];
  return answer;
}

/** Rows [T, N] each times its own number. */
export function scaled(rows: Numbers, by: ArrayLike<number>, N: number): Float64Array {
  return Float64Array.from(rows, (x, i) => x * by[Math.floor(i / N)]);
}

export interface Lookup {
  weights: Float64Array; // [T, T], of token t on token s
  answer: Float64Array; // [T, V]
}

/** The scroll: every token asks all that were written so far. `sharpness` scales the scores; `recency` is taken off for each token of distance. */
export function softmaxLookup(T: number, K: number, V: number, q: Numbers, k: Numbers, v: Numbers, sharpness: number, recency = 0): Lookup {
  const weights = new Float64Array(T * T);
  const answer = new Float64Array(T * V);
  for (let t = 0; t < T; t++) {
    const row = weights.subarray(t * T, t * T + t + 1);
    for (let s = 0; s <= t; s++) for (let i = 0; i < K; i++) row[s] += sharpness * q[t * K + i] * k[s * K + i];
    for (let s = 0; s <= t; s++) row[s] -= recency * (t - s);
    const most = Math.max(...row);
    let sum = 0;
    for (let s = 0; s <= t; s++) sum += row[s] = Math.exp(row[s] - most);
    for (let s = 0; s <= t; s++) {
      row[s] /= sum;
      for (let j = 0; j < V; j++) answer[t * V + j] += row[s] * v[s * V + j];
    }
  }
  return { weights, answer };
}

export interface Chunk {
  A: Float64Array; // [C, C], below the diagonal
  M: Float64Array; // [C, C], (I + A)^-1
  W: Float64Array; // [C, K]
  U: Float64Array; // [C, V]
  P: Float64Array; // [C, C], on and below the diagonal
  fresh: Float64Array; // [C, V]
  inter: Float64Array; // [C, V]
  intra: Float64Array; // [C, V]
  output: Float64Array; // [C, V]
  after: Float64Array; // [K, V]
}

/** One chunk in matrix products; T of the inputs is its size C and `start` the memory on entry. */
export function chunk({ T: C, K, V, q, k, erase, write, alpha, start }: Inputs): Chunk {
  // kept(j, i)[c]: what channel c keeps from after token j up to and with token i; j = -1 is the entry. Products only.
  const kept = (j: number, i: number) => {
    const product = new Float64Array(K).fill(1);
    for (let t = j + 1; t <= i; t++) for (let c = 0; c < K; c++) product[c] *= alpha[t * K + c];
    return product;
  };
  const A = new Float64Array(C * C);
  const P = new Float64Array(C * C);
  for (let i = 0; i < C; i++) {
    for (let j = 0; j <= i; j++) {
      const decay = kept(j, i);
      for (let c = 0; c < K; c++) {
        if (j < i) A[i * C + j] += erase[i * K + c] * k[j * K + c] * decay[c];
        P[i * C + j] += q[i * K + c] * k[j * K + c] * decay[c];
      }
    }
  }
  const M = new Float64Array(C * C); // forward substitution, row by row
  for (let i = 0; i < C; i++) {
    M[i * C + i] = 1;
    for (let j = 0; j < i; j++) for (let c = 0; c <= j; c++) M[i * C + c] -= A[i * C + j] * M[j * C + c];
  }
  const sinceEntry = (rows: Numbers) => Float64Array.from(rows, (x, n) => x * entry[Math.floor(n / K)][n % K]);
  const entry = Array.from({ length: C }, (_, i) => kept(-1, i));
  const W = product(M, sinceEntry(erase), C, C, K);
  const U = product(M, write, C, C, V);
  const WS = product(W, start, C, K, V);
  const fresh = U.map((x, n) => x - WS[n]);
  const inter = product(sinceEntry(q), start, C, K, V);
  const intra = product(P, fresh, C, C, V);
  const after = Float64Array.from(start, (x, n) => entry[C - 1][Math.floor(n / V)] * x);
  for (let i = 0; i < C; i++) {
    const decay = kept(i, C - 1);
    for (let c = 0; c < K; c++) for (let j = 0; j < V; j++) after[c * V + j] += k[i * K + c] * decay[c] * fresh[i * V + j];
  }
  return { A, M, W, U, P, fresh, inter, intra, output: inter.map((x, n) => x + intra[n]), after };
}

function product(a: Numbers, b: Numbers, N: number, I: number, J: number): Float64Array {
  const c = new Float64Array(N * J);
  for (let n = 0; n < N; n++) for (let i = 0; i < I; i++) for (let j = 0; j < J; j++) c[n * J + j] += a[n * I + i] * b[i * J + j];
  return c;
}

/** The largest difference between two arrays of the same numbers. */
export function difference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let largest = 0;
  for (let i = 0; i < a.length; i++) largest = Math.max(largest, Math.abs(a[i] - b[i]));
  return largest;
}

export function norm(x: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] * x[i];
  return Math.sqrt(sum);
}
