/* The delta memory on a CPU: forward, exact backward, and one token in place.

   Law      palimpsest/ops/reference.py.  With a = exp(log_decay), for every token
                S <- Diag(a) S,    u = w - S^T e,    S <- S + k u^T,    o = S^T q
            KDA is e = beta k, w = beta v: then `erase` is null, `beta` is not, and `value` is v. Otherwise `value` is w.
            With a gate, q and k are first normalised, and log_decay and beta are logits: palimpsest/ops/gates.py.

   Form     Chunks of C = 16 tokens with decayed keys. When a chunk begins, let S be the memory and since_i the product
            of the decays of its tokens 0..i. Each key is kept as it stands in the memory, kd_j, and every later token
            multiplies it by its own decay. So, with kd_j as it stands at token i,
                A_ij = e_i . kd_j  (j < i)      P_ij = q_i . kd_j  (j <= i)
                (I + A) U = W - (E since) S     O = (Q since) S + P U     S <- Diag(since_last) S + kd^T U
            No factor exceeds 1, no exponent is a difference of sums, nothing divides: as accurate as the recurrence
            however fast the gates forget. The backward pass is the adjoint of these lines, in reverse order.

   Layout   q, k [rows, H, K]; value, out [rows, HV, V]; log_decay, erase [rows, HV, K]; beta [rows, HV]; rows are tokens
            of all sequences one after another, sequence n being rows cu[n] .. cu[n+1]. States [N, HV, K, V], fp32.
            Arrays are contiguous, fp32 or bf16; arithmetic is fp32. Value head j reads key head j / (HV / H).
            Scratch rows are padded with zeros to whole vectors; a padding token neither decays, erases nor writes.

   Threads  One task is one sequence and up to 4 heads, which advance together because their rows share memory pages.
            Tasks write disjoint results in a fixed order: the bits do not depend on the number of threads.

   Bound    Compute: 3 products of C x K x V multiply-adds per chunk and head forward, 8 more backward (2 recompute).
            Memory: forward O(1) per thread; for the backward pass one state per 64 tokens (`checkpoints`).
            Decode: one read and one write of the state.

   Portable GNU C (gcc, clang): vector extensions, no intrinsics. OpenMP if there is any. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { C = 16, SEGMENT = 64, TOGETHER = 4 }; /* tokens in a chunk, tokens between checkpoints, heads in a task */
enum { SHORT = 8, MAX_K = 256 };             /* so few tokens go one by one; channels a step can hold */

#if defined(__AVX512F__)
enum { VL = 16, TILE = 8, PAIR_ROWS = 8 }; /* floats in a vector; register tiles that fill, but fit, the registers */
#elif defined(__AVX__)
enum { VL = 8, TILE = 4, PAIR_ROWS = 2 };
#else
enum { VL = 4, TILE = 4, PAIR_ROWS = 1 };
#endif

typedef float vec __attribute__((vector_size(4 * VL), may_alias));
typedef float loose_vec __attribute__((vector_size(4 * VL), may_alias, aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * VL), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * VL), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define AT(p) (*(vec *)(p))
#define LOOSE(p) (*(loose_vec *)(p))
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef struct {
    void *data;
    int64_t bf16;
} Array;

typedef struct {
    int64_t sequences, key_heads, value_heads, K, V, threads;
    const int64_t *cu;
    double scale; /* multiplies q */
    Array q, k, value, log_decay, erase, beta;
    int64_t gate; /* not NONE: log_decay and beta are logits, q and k are still to be normalised */
    double floor;
    const float *A_log, *dt_bias; /* [HV], [HV, K] */
    const float *state;
    Array out;
    float *end_state, *checkpoints; /* checkpoints may be null forward: see `slot` */
    Array d_out;                    /* from here on: backward only */
    const float *d_end_state;
    Array d_q, d_k, d_value, d_log_decay, d_erase, d_beta;
    float *d_state, *d_A_log, *d_dt_bias; /* the last two per sequence, [N, HV], [N, HV, K] */
} Call;

enum { NONE, SOFTPLUS, SIGMOID };

/* ---- vectors ---------------------------------------------------------------------------------------------------- */

INLINE vec splat(float x) { return x - (vec){}; } /* minus: x + 0 may not be folded, because of the sign of zero */

INLINE vec only(ivec mask, vec x) { return (vec)(mask & (ivec)x); }
INLINE vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE vec minus_abs(vec x) { return (vec)((uvec)x | 0x80000000u); } /* of infinity, too, which x - 2 x is not */

INLINE float sum(vec x) {
    float total = 0;
    for (int i = 0; i < VL; i++) total += x[i];
    return total;
}

/* exp to 0.6 ulp: x = n log 2 + r, a Taylor polynomial in r, and 2^n in two factors so that no n overflows. A gate that
   stands still makes the same error at every token, so the last sum, 1 + (r + r^2 p), must be the only rounding. */
INLINE vec exp_vec(vec x) {
    x = pick(x < -160, splat(-160), x); /* comparisons are false for NaN, which so stays NaN */
    x = pick(x > 128, splat(128), x);
    const vec round = splat(12582912.f); /* adding 1.5 2^23 rounds to an integer, found in the low bits */
    vec shifted = x * 1.44269504f + round, n = shifted - round;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f; /* log 2 in two parts: the first product is exact */
    vec p = splat(1.f / 5040);
    p = p * r + 1.f / 720, p = p * r + 1.f / 120, p = p * r + 1.f / 24, p = p * r + 1.f / 6, p = p * r + .5f;
    p = r * r * p + r + 1;
    uvec exponent = (uvec)shifted - (uvec)round + 256, half = exponent >> 1;
    return p * (vec)((half - 1) << 23) * (vec)((exponent - half - 1) << 23); /* 2 x 127 = 256 - 2 */
}

/* log(1 + exp t) and 1 / (1 + exp -t), both to a few ulp of their own size: the exponential is of -|t|, and the
   logarithm is 2 atanh z = 2 (z + z^3 / 3 + ...) with z at most 1 / 3. */
INLINE vec softplus(vec t) {
    vec large = only(t > 0, t), y = exp_vec(minus_abs(t)), z = y / (y + 2), zz = z * z, p = splat(1.f / 15);
    p = p * zz + 1.f / 13, p = p * zz + 1.f / 11, p = p * zz + 1.f / 9, p = p * zz + 1.f / 7;
    p = p * zz + 1.f / 5, p = p * zz + 1.f / 3, p = p * zz + 1;
    return large + 2 * z * p;
}

INLINE vec sigmoid(vec t) {
    vec y = exp_vec(minus_abs(t));
    return pick(t > 0, splat(1), y) / (y + 1);
}

/* Denormals carry no accuracy and cost up to a hundred times: flush them while a task runs. */
INLINE uint64_t flush_denormals(void) {
    uint64_t old = 0;
#if defined(__SSE__)
    old = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr((unsigned)old | 0x8040);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" ::"r"(old | 1 << 24));
#endif
    return old;
}

INLINE void restore_denormals(uint64_t old) {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr((unsigned)old);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" ::"r"(old));
#endif
    (void)old;
}

/* ---- reading and writing the caller's arrays -------------------------------------------------------------------- */

INLINE float from_bf16(uint16_t x) {
    union { uint32_t bits; float value; } u = {.bits = (uint32_t)x << 16};
    return u.value;
}

INLINE uint16_t to_bf16(float x) {
    union { float value; uint32_t bits; } u = {.value = x};
    uint32_t rounded = (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16, quiet_nan = u.bits >> 16 | 0x40;
    return (uint16_t)((u.bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

/* The same row of the next chunk: rows of one head lie apart, where the hardware does not foresee them. */
static void fetch(Array from, int64_t offset, int64_t n) {
    const char *x = (const char *)from.data + offset * (from.bf16 ? 2 : 4), *end = x + n * (from.bf16 ? 2 : 4);
    for (; x < end; x += 64) __builtin_prefetch(x);
}

static void load(float *restrict to, Array from, int64_t offset, int64_t n, int64_t padded, float scale) {
    if (from.bf16) {
        const uint16_t *restrict x = (const uint16_t *)from.data + offset;
        for (int64_t i = 0; i < n; i++) to[i] = scale * from_bf16(x[i]);
    } else {
        const float *restrict x = (const float *)from.data + offset;
        for (int64_t i = 0; i < n; i++) to[i] = scale * x[i];
    }
    for (int64_t i = n; i < padded; i++) to[i] = 0;
}

static void store(Array to, int64_t offset, const float *restrict from, int64_t n, float scale) {
    if (to.bf16) {
        uint16_t *restrict x = (uint16_t *)to.data + offset;
        for (int64_t i = 0; i < n; i++) x[i] = to_bf16(scale * from[i]);
    } else {
        float *restrict x = (float *)to.data + offset;
        for (int64_t i = 0; i < n; i++) x[i] = scale * from[i];
    }
}

static void copy_state(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t K, int64_t V) {
    for (int64_t c = 0; c < K; c++) memcpy(to + c * to_stride, from + c * from_stride, sizeof(float) * V);
}

/* ---- products --------------------------------------------------------------------------------------------------- */

/* TILE rows and `columns` vectors of out = diag(keep) out_before + A B, held in registers. A[m, l] is at m am + l al. */
INLINE void product_tile(int columns, int64_t depth, const float *A, int64_t am, int64_t al, const float *B, int64_t bs,
                         const float *keep, const float *before, float *out, int64_t os) {
    vec acc[TILE][2];
    UNROLL for (int m = 0; m < TILE; m++)
        UNROLL for (int v = 0; v < columns; v++) {
            acc[m][v] = (vec){};
            if (keep) acc[m][v] = keep[m] * AT(before + m * os + v * VL);
        }
    for (int64_t l = 0; l < depth; l++) {
        vec b[2];
        UNROLL for (int v = 0; v < columns; v++) b[v] = AT(B + l * bs + v * VL);
        UNROLL for (int m = 0; m < TILE; m++) {
            vec a = splat(A[m * am + l * al]);
            UNROLL for (int v = 0; v < columns; v++) acc[m][v] += a * b[v];
        }
    }
    UNROLL for (int m = 0; m < TILE; m++)
        UNROLL for (int v = 0; v < columns; v++) AT(out + m * os + v * VL) = acc[m][v];
}

INLINE void product(int64_t rows, int64_t width, int64_t depth, const float *A, int64_t am, int64_t al, const float *B,
                    int64_t bs, const float *keep, const float *before, float *out, int64_t os) {
    for (int64_t n = 0; n < width; n += 2 * VL)
        for (int64_t m = 0; m < rows; m += TILE) {
            const float *k = keep ? keep + m : 0, *b = before + m * os + n;
            if (n + 2 * VL <= width)
                product_tile(2, depth, A + m * am, am, al, B + n, bs, k, b, out + m * os + n, os);
            else
                product_tile(1, depth, A + m * am, am, al, B + n, bs, k, b, out + m * os + n, os);
        }
}

/* to[n, m] = from[m, n] for a square of VL: log2(VL) rounds of interleaving the two halves of the rows. */
INLINE void transpose_tile(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    vec x[VL], y[VL];
    UNROLL for (int m = 0; m < VL; m++) x[m] = AT(from + m * from_stride);
#if defined(__GNUC__) && !defined(__clang__)
    ivec low, high;
    UNROLL for (int i = 0; i < VL; i++) low[i] = i / 2 + i % 2 * VL, high[i] = low[i] + VL / 2;
    UNROLL for (int round = 1; round < VL; round *= 2) {
        UNROLL for (int m = 0; m < VL / 2; m++) {
            y[2 * m] = __builtin_shuffle(x[m], x[m + VL / 2], low);
            y[2 * m + 1] = __builtin_shuffle(x[m], x[m + VL / 2], high);
        }
        UNROLL for (int m = 0; m < VL; m++) x[m] = y[m];
    }
#else
    UNROLL for (int m = 0; m < VL; m++)
        UNROLL for (int n = 0; n < VL; n++) y[n][m] = x[m][n];
    UNROLL for (int m = 0; m < VL; m++) x[m] = y[m];
#endif
    UNROLL for (int m = 0; m < VL; m++) AT(to + m * to_stride) = x[m];
}

static void transpose(int64_t rows, int64_t width, const float *from, int64_t from_stride, float *to,
                      int64_t to_stride) {
    for (int64_t m = 0; m < rows; m += VL)
        for (int64_t n = 0; n < width; n += VL)
            transpose_tile(from + m * from_stride + n, from_stride, to + n * to_stride + m, to_stride);
}

/* ---- a chunk ---------------------------------------------------------------------------------------------------- */

typedef struct {
    float *q, *k, *erase, *decay; /* [C, K] q scaled, e, a */
    float *since;                 /* [C, K] product of the decays of tokens 0..i */
    float *reads;                 /* [2C, K] erase since, then q since */
    float *kd;                    /* [K, C] the keys, decayed to the end of the chunk */
    float *pairs;                 /* [2C, C] A, then P; only j < i, j <= i mean anything */
    float *v_new;                 /* [C, V] W, then U */
    float *beta;                  /* [C] */
} Chunk;

typedef struct { /* strides of scratch rows, in floats: an odd number of cache lines, so that rows do not collide */
    int64_t K, V, ks, vs;
} Shape;

static Shape shape_of(const Call *c) {
    int64_t K = (c->K + 15) / 16 * 16, V = (c->V + 15) / 16 * 16;
    return (Shape){K, V, K / 16 % 2 ? K : K + 16, V / 16 % 2 ? V : V + 16};
}

typedef struct { /* scratch of one thread; without a base, `take` only counts */
    float *base;
    int64_t used;
} Arena;

static float *take(Arena *arena, int64_t floats) {
    float *p = arena->base ? arena->base + arena->used : 0;
    arena->used += (floats + 15) / 16 * 16;
    return p;
}

static Chunk take_chunk(Arena *arena, Shape s) {
    Chunk x;
    x.q = take(arena, C * s.ks), x.k = take(arena, C * s.ks), x.erase = take(arena, C * s.ks);
    x.decay = take(arena, C * s.ks), x.since = take(arena, C * s.ks), x.reads = take(arena, 2 * C * s.ks);
    x.kd = take(arena, s.K * C), x.pairs = take(arena, 2 * C * C), x.v_new = take(arena, C * s.vs);
    x.beta = take(arena, C);
    return x;
}

/* x / sqrt(sum x^2 + eps), times scale. */
INLINE void normalise(float *x, int64_t n, float scale) {
    vec squares = splat(0);
    for (int64_t i = 0; i < n; i += VL) squares += AT(x + i) * AT(x + i);
    const float by = scale / sqrtf(sum(squares) + 1e-6f);
    for (int64_t i = 0; i < n; i += VL) AT(x + i) *= by;
}

/* Log-decay from t = logit + dt_bias, and its slope in t. */
INLINE vec gated(const Call *c, int64_t head, vec t, vec *slope) {
    float rate = expf(c->A_log[head]);
    if (rate > FLT_MAX) rate = FLT_MAX; /* infinity times a logit of 0 would be no number */
    if (c->gate == SOFTPLUS) {
        *slope = -rate * sigmoid(t);
        return -rate * softplus(t);
    }
    vec y = exp_vec(minus_abs(rate * t)), high = 1 / (y + 1), low = y * high;
    *slope = (float)c->floor * (rate * (high * low));
    return (float)c->floor * pick(t > 0, high, low);
}

static void add_bias(const Call *c, int64_t head, float *logits) {
    for (int64_t n = 0; n < c->K; n++) logits[n] += c->dt_bias[head * c->K + n];
}

/* Rows row .. row + C of one head, of which `ahead` are left in its sequence; the rest of the chunk is padding. */
static void load_chunk(const Call *c, Shape s, int64_t row, int64_t ahead, int64_t head, Chunk x) {
    const int64_t HV = c->value_heads, H = c->key_heads, next_key = C * H * c->K, next = C * HV;
    for (int64_t i = 0; i < C; i++) {
        const int64_t real = i < ahead, K = real ? c->K : 0, V = real ? c->V : 0;
        const int64_t at = real ? (row + i) * HV + head : 0, key = real ? ((row + i) * H + head / (HV / H)) * K : 0;
        float *q = x.q + i * s.ks, *k = x.k + i * s.ks, *e = x.erase + i * s.ks, *a = x.decay + i * s.ks;
        float *since = x.since + i * s.ks, *reads = x.reads + i * s.ks, *w = x.v_new + i * s.vs;
        if (i + C < ahead) {
            fetch(c->q, key + next_key, K), fetch(c->k, key + next_key, K);
            fetch(c->value, (at + next) * V, V), fetch(c->log_decay, (at + next) * K, K);
        }
        load(q, c->q, key, K, s.K, c->gate ? 1 : (float)c->scale);
        load(k, c->k, key, K, s.K, 1);
        load(a, c->log_decay, at * K, K, s.K, 1);
        x.beta[i] = 1;
        if (c->beta.data) load(x.beta + i, c->beta, at, real, 1, 1);
        if (c->gate && real) {
            vec slope;
            normalise(q, s.K, (float)c->scale);
            normalise(k, s.K, 1);
            add_bias(c, head, a);
            for (int64_t n = 0; n < s.K; n += VL) AT(a + n) = gated(c, head, AT(a + n), &slope);
            x.beta[i] = 1 / (1 + expf(-x.beta[i]));
        }
        if (c->beta.data)
            for (int64_t n = 0; n < s.K; n += VL) AT(e + n) = x.beta[i] * AT(k + n);
        else
            load(e, c->erase, at * K, K, s.K, 1);
        load(w, c->value, at * V, V, s.V, x.beta[i]);
        for (int64_t n = 0; n < s.K; n += VL) {
            vec decay = exp_vec(AT(a + n)), product = decay;
            if (i) product *= AT(since - s.ks + n);
            AT(a + n) = decay, AT(since + n) = product;
            AT(reads + n) = AT(e + n) * product, AT(reads + C * s.ks + n) = AT(q + n) * product;
        }
    }
    transpose(C, s.K, x.k, s.ks, x.kd, C);
}

/* A and P, one channel after another, all keys j at once: token i decays the keys before it, then reads them all. */
static void pair_tokens(Shape s, Chunk x) {
    ivec lane[C / VL];
    for (int j = 0; j < C; j++) lane[j / VL][j % VL] = j;
    for (int first = 0; first < C; first += PAIR_ROWS) {
        vec A[PAIR_ROWS][C / VL], P[PAIR_ROWS][C / VL];
        UNROLL for (int r = 0; r < PAIR_ROWS; r++)
            UNROLL for (int v = 0; v < C / VL; v++) A[r][v] = P[r][v] = splat(0);
        const float *decay = x.decay + first * s.ks, *erase = x.erase + first * s.ks, *q = x.q + first * s.ks;
        for (int64_t n = 0; n < s.K; n++) {
            vec kd[C / VL];
            UNROLL for (int v = 0; v < C / VL; v++) kd[v] = AT(x.kd + n * C + v * VL);
            UNROLL for (int r = 0; r < PAIR_ROWS; r++)
                UNROLL for (int v = 0; v < C / VL; v++) {
                    kd[v] *= pick(lane[v] < first + r, splat(decay[r * s.ks + n]), splat(1));
                    A[r][v] += kd[v] * erase[r * s.ks + n];
                    P[r][v] += kd[v] * q[r * s.ks + n];
                }
            UNROLL for (int v = 0; v < C / VL; v++) AT(x.kd + n * C + v * VL) = kd[v];
        }
        UNROLL for (int r = 0; r < PAIR_ROWS; r++)
            UNROLL for (int v = 0; v < C / VL; v++) {
                AT(x.pairs + (first + r) * C + v * VL) = A[r][v];
                AT(x.pairs + (C + first + r) * C + v * VL) = P[r][v];
            }
    }
}

/* U by forward substitution and, unless out is null, O. `held` [2C, V] is scratch: what E and Q read from S. */
static void solve(Shape s, Chunk x, const float *S, float *held, float *out) {
    const float *A = x.pairs, *P = x.pairs + C * C;
    product(out ? 2 * C : C, s.V, s.K, x.reads, s.ks, 1, S, s.vs, 0, held, held, s.vs);
    for (int64_t n = 0; n < s.V; n += VL) {
        vec u[C];
        UNROLL for (int i = 0; i < C; i++) {
            u[i] = AT(x.v_new + i * s.vs + n) - AT(held + i * s.vs + n);
            UNROLL for (int j = 0; j < i; j++) u[i] -= A[i * C + j] * u[j];
            AT(x.v_new + i * s.vs + n) = u[i];
        }
        if (!out) continue;
        UNROLL for (int i = 0; i < C; i++) {
            vec o = AT(held + (C + i) * s.vs + n);
            UNROLL for (int j = 0; j <= i; j++) o += P[i * C + j] * u[j];
            AT(out + i * s.vs + n) = o;
        }
    }
}

/* S_after = Diag(since_last) S + kd^T U. The two may be the same memory. */
static void advance(Shape s, Chunk x, const float *S, float *S_after) {
    product(s.K, s.V, C, x.kd, C, 1, x.v_new, s.vs, x.since + (C - 1) * s.ks, S, S_after, s.vs);
}

/* One token, law for law, in two passes over S: what e and q read after the decay; then the edit. Any V, any stride.
   Reading q before the edit saves a pass: S^T q after it is S^T q before it, plus (q . k) u. */
INLINE void step_columns(int columns, int64_t K, float *S, int64_t stride, const float *decay, const float *erase,
                         const float *q, const float *k, float qk, const float *w, float *out) {
    vec held[4], read[4];
    UNROLL for (int v = 0; v < columns; v++) held[v] = read[v] = splat(0);
    for (int64_t c = 0; c < K; c++)
        UNROLL for (int v = 0; v < columns; v++) {
            vec S_c = LOOSE(S + c * stride + v * VL);
            held[v] += erase[c] * S_c, read[v] += q[c] * S_c;
        }
    UNROLL for (int v = 0; v < columns; v++) {
        held[v] = LOOSE(w + v * VL) - held[v];
        LOOSE(out + v * VL) = read[v] + qk * held[v];
    }
    for (int64_t c = 0; c < K; c++)
        UNROLL for (int v = 0; v < columns; v++) {
            float *S_c = S + c * stride + v * VL;
            LOOSE(S_c) = decay[c] * LOOSE(S_c) + k[c] * held[v];
        }
}

static void step_token(int64_t K, int64_t V, float *S, int64_t stride, const float *decay, const float *erase,
                       const float *q, const float *k, const float *w, float *out) {
    float erase_decayed[MAX_K], q_decayed[MAX_K], qk = 0;
    for (int64_t c = 0; c < K; c++) erase_decayed[c] = erase[c] * decay[c], q_decayed[c] = q[c] * decay[c];
    for (int64_t c = 0; c < K; c++) qk += q[c] * k[c];
    int64_t n = 0;
    for (; n + 4 * VL <= V; n += 4 * VL)
        step_columns(4, K, S + n, stride, decay, erase_decayed, q_decayed, k, qk, w + n, out + n);
    for (; n + VL <= V; n += VL)
        step_columns(1, K, S + n, stride, decay, erase_decayed, q_decayed, k, qk, w + n, out + n);
    for (; n < V; n++) {
        float held = 0, read = 0;
        for (int64_t c = 0; c < K; c++)
            held += erase_decayed[c] * S[c * stride + n], read += q_decayed[c] * S[c * stride + n];
        const float v_new = w[n] - held;
        for (int64_t c = 0; c < K; c++) S[c * stride + n] = decay[c] * S[c * stride + n] + k[c] * v_new;
        out[n] = read + qk * v_new;
    }
}

/* ---- forward ---------------------------------------------------------------------------------------------------- */

/* Where the checkpoint of a sequence's token lies: no two share a slot, and there are cu[N] / SEGMENT + N at most. */
static int64_t slot(const Call *c, int64_t n, int64_t token) { return c->cu[n] / SEGMENT + n + token / SEGMENT; }

static void forward_task(const Call *c, Shape s, int64_t n, int64_t first_head, int64_t heads, Arena *arena) {
    float *S = take(arena, TOGETHER * s.K * s.vs), *held = take(arena, 2 * C * s.vs), *out = take(arena, C * s.vs);
    Chunk x = take_chunk(arena, s);
    if (!arena->base) return;
    const int64_t K = c->K, V = c->V, HV = c->value_heads, tokens = c->cu[n + 1] - c->cu[n];
    memset(S, 0, sizeof(float) * TOGETHER * s.K * s.vs);
    for (int64_t h = 0; h < heads; h++)
        copy_state(S + h * s.K * s.vs, s.vs, c->state + (n * HV + first_head + h) * K * V, V, K, V);
    for (int64_t t = 0; t < tokens; t += C)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t head = first_head + h, row = c->cu[n] + t, real = tokens - t < C ? tokens - t : C;
            float *S_h = S + h * s.K * s.vs;
            if (c->checkpoints && t % SEGMENT == 0)
                copy_state(c->checkpoints + (slot(c, n, t) * HV + head) * K * V, V, S_h, s.vs, K, V);
            load_chunk(c, s, row, tokens - t, head, x);
            if (tokens <= SHORT && !c->checkpoints)
                for (int64_t i = 0; i < real; i++)
                    step_token(s.K, s.V, S_h, s.vs, x.decay + i * s.ks, x.erase + i * s.ks, x.q + i * s.ks,
                               x.k + i * s.ks, x.v_new + i * s.vs, out + i * s.vs);
            else {
                pair_tokens(s, x);
                solve(s, x, S_h, held, out);
                advance(s, x, S_h, S_h);
            }
            for (int64_t i = 0; i < real; i++) store(c->out, ((row + i) * HV + head) * V, out + i * s.vs, V, 1);
        }
    for (int64_t h = 0; h < heads; h++)
        copy_state(c->end_state + (n * HV + first_head + h) * K * V, V, S + h * s.K * s.vs, s.vs, K, V);
}

/* ---- backward --------------------------------------------------------------------------------------------------- */

typedef struct {
    float *d;       /* [2C, V] minus dR, the gradient of the right-hand side, then dO */
    float *d_t;     /* [V, 2C] its transpose */
    float *v_new_t; /* [V, C] */
    float *d_pairs; /* [2C, C] dA, then dP */
    float *d_reads_t, *d_reads; /* [K, 2C] and [2C, K] */
    float *d_kd_t, *d_kd;       /* [K, C] and [C, K] */
    float *d_since;             /* [K] what the memory's own decay contributes */
    float *d_erase, *d_decay;   /* [C, K] */
    float *d_beta;              /* [C] */
    float *row;                 /* [K or V] */
} Adjoint;

static Adjoint take_adjoint(Arena *arena, Shape s) {
    Adjoint y;
    y.d = take(arena, 2 * C * s.vs), y.d_t = take(arena, s.V * 2 * C), y.v_new_t = take(arena, s.V * C);
    y.d_pairs = take(arena, 2 * C * C), y.d_reads_t = take(arena, s.K * 2 * C), y.d_reads = take(arena, 2 * C * s.ks);
    y.d_kd_t = take(arena, s.K * C), y.d_kd = take(arena, C * s.ks), y.d_since = take(arena, s.K);
    y.d_erase = take(arena, C * s.ks), y.d_decay = take(arena, C * s.ks), y.d_beta = take(arena, C);
    y.row = take(arena, s.K > s.V ? s.K : s.V);
    return y;
}

/* dR: solve (I + A)^T dR = kd dS + P^T dO by back substitution. Stored negated: it enters everything with a minus. */
static void solve_adjoint(Shape s, Chunk x, const float *d_S, Adjoint y) {
    const float *A = x.pairs, *P = x.pairs + C * C, *d_out = y.d + C * s.vs;
    product(C, s.V, s.K, x.kd, 1, C, d_S, s.vs, 0, y.d, y.d, s.vs);
    for (int64_t n = 0; n < s.V; n += VL) {
        vec minus[C];
        UNROLL for (int j = C - 1; j >= 0; j--) {
            minus[j] = -AT(y.d + j * s.vs + n);
            UNROLL for (int i = C - 1; i >= j; i--) minus[j] -= P[i * C + j] * AT(d_out + i * s.vs + n);
            UNROLL for (int i = C - 1; i > j; i--) minus[j] -= A[i * C + j] * minus[i];
            AT(y.d + j * s.vs + n) = minus[j];
        }
    }
}

/* The adjoint of pair_tokens, load_chunk's products and the decays: VL channels at a time, tokens backwards.
   Adds to d_q and d_k [C, K]. */
static void unpair_tokens(Shape s, Chunk x, Adjoint y, int erase_is_beta_k, float *d_q_out, float *d_k_out) {
    const float *dA = y.d_pairs, *dP = y.d_pairs + C * C;
    vec d_beta[C];
    for (int i = 0; i < C; i++) d_beta[i] = splat(0);
    for (int64_t n = 0; n < s.K; n += VL) {
        vec kd[C * (C + 1) / 2], d_kd[C]; /* kd_j at token i is entry i (i + 1) / 2 + j */
        for (int i = 0; i < C; i++) {
            vec a = AT(x.decay + i * s.ks + n), *now = kd + i * (i + 1) / 2, *before = now - i;
            for (int j = 0; j < i; j++) now[j] = before[j] * a;
            now[i] = AT(x.k + i * s.ks + n);
            d_kd[i] = AT(y.d_kd + i * s.ks + n);
        }
        vec d_since = AT(y.d_since + n);
        for (int i = C - 1; i >= 0; i--) {
            const vec q = AT(x.q + i * s.ks + n), e = AT(x.erase + i * s.ks + n), a = AT(x.decay + i * s.ks + n);
            const vec since = AT(x.since + i * s.ks + n), *now = kd + i * (i + 1) / 2;
            const vec d_e_read = AT(y.d_reads + i * s.ks + n), d_q_read = AT(y.d_reads + (C + i) * s.ks + n);
            d_since += e * d_e_read + q * d_q_read;
            vec d_q = since * d_q_read, d_e = since * d_e_read, d_g = since * d_since;
            for (int j = 0; j < i; j++) {
                d_q += dP[i * C + j] * now[j];
                d_e += dA[i * C + j] * now[j];
                vec d = d_kd[j] + dP[i * C + j] * q + dA[i * C + j] * e;
                d_g += d * now[j];
                d_kd[j] = d * a;
            }
            d_q += dP[i * C + i] * now[i];
            vec d_k = d_kd[i] + dP[i * C + i] * q;
            if (erase_is_beta_k) d_k += x.beta[i] * d_e;
            d_since *= a;
            d_beta[i] += now[i] * d_e;
            AT(d_q_out + i * s.ks + n) += d_q;
            AT(d_k_out + i * s.ks + n) += d_k;
            AT(y.d_erase + i * s.ks + n) = d_e;
            AT(y.d_decay + i * s.ks + n) = d_g;
        }
    }
    for (int i = 0; i < C; i++) y.d_beta[i] = sum(d_beta[i]);
}

/* Turn the gradient of a log-decay row into that of its logits; d_parameters is d_dt_bias [K], then d_A_log. */
static void ungate(const Call *c, Shape s, int64_t row, int64_t head, float *scratch, float *d, float *d_parameters) {
    vec d_A_log = splat(0);
    load(scratch, c->log_decay, (row * c->value_heads + head) * c->K, c->K, s.K, 1);
    add_bias(c, head, scratch);
    for (int64_t n = 0; n < s.K; n += VL) {
        vec slope, t = AT(scratch + n), g = gated(c, head, t, &slope), d_g = AT(d + n);
        AT(d + n) = slope * d_g;
        AT(d_parameters + n) += slope * d_g;
        if (c->gate == SIGMOID) g = slope * t;
        d_A_log += d_g * g; /* A_log acts through rate: on g itself, or on rate t */
    }
    d_parameters[s.K] += sum(d_A_log);
}

/* Turn the gradient of scale times a normalised row into that of the row x: scale r (d - r^2 (x . d) x). */
static void unnormalise(Shape s, Array from, int64_t offset, int64_t n, float scale, float *x, float *d) {
    vec squares = splat(0), dots = splat(0);
    load(x, from, offset, n, s.K, 1);
    for (int64_t i = 0; i < s.K; i += VL) squares += AT(x + i) * AT(x + i), dots += AT(x + i) * AT(d + i);
    const float r = 1 / sqrtf(sum(squares) + 1e-6f), along = r * r * sum(dots);
    for (int64_t i = 0; i < s.K; i += VL) AT(d + i) = scale * r * (AT(d + i) - along * AT(x + i));
}

static void backward_chunk(const Call *c, Shape s, int64_t row, int64_t tokens, int64_t head, Chunk x, const float *S,
                           float *d_S, Adjoint y, float *d_q, float *d_k, float *d_parameters) {
    const int64_t K = c->K, V = c->V, HV = c->value_heads;
    for (int64_t i = 0; i < C; i++)
        load(y.d + (C + i) * s.vs, c->d_out, i < tokens ? ((row + i) * HV + head) * V : 0, i < tokens ? V : 0, s.V, 1);
    solve_adjoint(s, x, d_S, y);
    transpose(2 * C, s.V, y.d, s.vs, y.d_t, 2 * C);
    transpose(C, s.V, x.v_new, s.vs, y.v_new_t, C);
    product(2 * C, C, s.V, y.d, s.vs, 1, y.v_new_t, C, 0, y.d_pairs, y.d_pairs, C);
    product(s.K, 2 * C, s.V, S, s.vs, 1, y.d_t, 2 * C, 0, y.d_reads_t, y.d_reads_t, 2 * C);
    product(s.K, C, s.V, d_S, s.vs, 1, y.v_new_t, C, 0, y.d_kd_t, y.d_kd_t, C);
    for (int64_t m = 0; m < s.K; m++) {
        vec dot = splat(0);
        for (int64_t n = 0; n < s.V; n += VL) dot += AT(S + m * s.vs + n) * AT(d_S + m * s.vs + n);
        y.d_since[m] = sum(dot);
    }
    product(s.K, s.V, 2 * C, x.reads, 1, s.ks, y.d, s.vs, x.since + (C - 1) * s.ks, d_S, d_S, s.vs);
    transpose(s.K, 2 * C, y.d_reads_t, 2 * C, y.d_reads, s.ks);
    transpose(s.K, C, y.d_kd_t, C, y.d_kd, s.ks);
    unpair_tokens(s, x, y, c->beta.data != 0, d_q, d_k);
    for (int64_t i = 0; i < tokens; i++) {
        const int64_t at = (row + i) * HV + head;
        const float *minus_d_w = y.d + i * s.vs;
        if (c->beta.data) {
            vec dot = splat(0);
            load(y.row, c->value, at * V, V, s.V, 1);
            for (int64_t n = 0; n < s.V; n += VL) dot += AT(y.row + n) * AT(minus_d_w + n);
            y.d_beta[i] -= sum(dot);
            if (c->gate) y.d_beta[i] *= x.beta[i] * (1 - x.beta[i]);
            store(c->d_beta, at, y.d_beta + i, 1, 1);
        } else
            store(c->d_erase, at * K, y.d_erase + i * s.ks, K, 1);
        store(c->d_value, at * V, minus_d_w, V, -x.beta[i]);
        if (c->gate) ungate(c, s, row + i, head, y.row, y.d_decay + i * s.ks, d_parameters);
        store(c->d_log_decay, at * K, y.d_decay + i * s.ks, K, 1);
    }
}

/* Key heads first_head .. first_head + heads of sequence n, with all their value heads. */
static void backward_task(const Call *c, Shape s, int64_t n, int64_t first_head, int64_t heads, Arena *arena) {
    const int64_t K = c->K, V = c->V, H = c->key_heads, HV = c->value_heads, group = HV / H, square = s.K * s.vs;
    float *d_S = take(arena, TOGETHER * group * square), *S = take(arena, SEGMENT / C * square);
    float *held = take(arena, 2 * C * s.vs), *d_q = take(arena, SEGMENT * s.ks), *d_k = take(arena, SEGMENT * s.ks);
    float *d_parameters = take(arena, TOGETHER * group * (s.K + 16)); /* of each head d_dt_bias [K], then d_A_log */
    Adjoint y = take_adjoint(arena, s);
    Chunk x[SEGMENT / C];
    for (int i = 0; i < SEGMENT / C; i++) x[i] = take_chunk(arena, s);
    if (!arena->base) return;
    const int64_t tokens = c->cu[n + 1] - c->cu[n];
    memset(d_S, 0, sizeof(float) * TOGETHER * group * square);
    memset(S, 0, sizeof(float) * SEGMENT / C * square);
    memset(d_parameters, 0, sizeof(float) * TOGETHER * group * (s.K + 16));
    for (int64_t h = 0; h < heads * group; h++)
        copy_state(d_S + h * square, s.vs, c->d_end_state + (n * HV + first_head * group + h) * K * V, V, K, V);
    for (int64_t t0 = (tokens - 1) / SEGMENT * SEGMENT; t0 >= 0 && tokens; t0 -= SEGMENT)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t row = c->cu[n] + t0, real = tokens - t0 < SEGMENT ? tokens - t0 : SEGMENT;
            const int64_t chunks = (real + C - 1) / C;
            memset(d_q, 0, sizeof(float) * SEGMENT * s.ks);
            memset(d_k, 0, sizeof(float) * SEGMENT * s.ks);
            for (int64_t r = 0; r < group; r++) {
                const int64_t head = (first_head + h) * group + r;
                copy_state(S, s.vs, c->checkpoints + (slot(c, n, t0) * HV + head) * K * V, V, K, V);
                for (int64_t i = 0; i < chunks; i++) {
                    load_chunk(c, s, row + i * C, real - i * C, head, x[i]);
                    pair_tokens(s, x[i]);
                    solve(s, x[i], S + i * square, held, 0);
                    if (i + 1 < chunks) advance(s, x[i], S + i * square, S + (i + 1) * square);
                }
                for (int64_t i = chunks - 1; i >= 0; i--)
                    backward_chunk(c, s, row + i * C, real - i * C < C ? real - i * C : C, head, x[i], S + i * square,
                                   d_S + (h * group + r) * square, y, d_q + i * C * s.ks, d_k + i * C * s.ks,
                                   d_parameters + (h * group + r) * (s.K + 16));
            }
            for (int64_t i = 0; i < real; i++) {
                const int64_t at = ((row + i) * H + first_head + h) * K;
                if (c->gate) {
                    unnormalise(s, c->q, at, K, (float)c->scale, y.row, d_q + i * s.ks);
                    unnormalise(s, c->k, at, K, 1, y.row, d_k + i * s.ks);
                }
                store(c->d_q, at, d_q + i * s.ks, K, c->gate ? 1 : (float)c->scale);
                store(c->d_k, at, d_k + i * s.ks, K, 1);
            }
        }
    for (int64_t h = 0; h < heads * group; h++) {
        const int64_t at = n * HV + first_head * group + h;
        copy_state(c->d_state + at * K * V, V, d_S + h * square, s.vs, K, V);
        if (!c->gate) continue;
        memcpy(c->d_dt_bias + at * K, d_parameters + h * (s.K + 16), sizeof(float) * K);
        c->d_A_log[at] = d_parameters[h * (s.K + 16) + s.K];
    }
}

/* ---- entry points: 0, or 1 when memory runs out ----------------------------------------------------------------- */

/* Waking a thread costs some microseconds: as much as editing this many entries of the memory. */
static int64_t threads_for(const Call *c, int64_t tokens) {
    const int64_t useful = 1 + tokens * c->value_heads * c->K * c->V / (1 << 16);
    return c->threads < useful ? c->threads : useful;
}

typedef void Task(const Call *, Shape, int64_t, int64_t, int64_t, Arena *);

static int run(const Call *c, Task *task, int64_t heads) {
    const Shape s = shape_of(c);
    const int64_t threads = threads_for(c, c->cu[c->sequences]);
    int64_t together = (c->sequences * heads + threads - 1) / threads; /* enough tasks for every thread */
    together = together < 1 ? 1 : together > TOGETHER ? TOGETHER : together;
    const int64_t groups = (heads + together - 1) / together;
    Arena needed = {0, 0};
    task(c, s, 0, 0, 0, &needed);
    int failed = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1 && c->sequences * groups > 1)
    {
        void *memory = malloc(sizeof(float) * needed.used + 64);
        float *base = (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
        uint64_t mode = flush_denormals();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < c->sequences * groups; i++) {
            const int64_t first = i % groups * together;
            Arena arena = {base, 0};
            if (memory)
                task(c, s, i / groups, first, heads - first < together ? heads - first : together, &arena);
            else
#pragma omp atomic write
                failed = 1;
        }
        restore_denormals(mode);
        free(memory);
    }
    return failed;
}

EXPORT int delta_memory_forward(const Call *c) { return run(c, forward_task, c->value_heads); }

EXPORT int delta_memory_backward(const Call *c) { return run(c, backward_task, c->key_heads); }

/* One token for each of B sequences; `state` is edited in place. Bit i of bf16 is argument i among the arrays. */
EXPORT void delta_memory_step(int64_t B, int64_t H, int64_t HV, int64_t K, int64_t V, int64_t threads, int64_t bf16,
                              double scale, void *q, void *k, void *v, void *log_decay, void *beta, float *state,
                              void *out) {
    const Array q_ = {q, bf16 & 1}, k_ = {k, bf16 >> 1 & 1}, v_ = {v, bf16 >> 2 & 1}, out_ = {out, bf16 >> 2 & 1};
    const Array log_decay_ = {log_decay, bf16 >> 3 & 1}, beta_ = {beta, bf16 >> 4 & 1};
    const int64_t useful = 1 + B * HV * K * V / (1 << 16), Kp = (K + VL - 1) / VL * VL;
    threads = threads < useful ? threads : useful;
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t i = 0; i < B * HV; i++) {
        float q_row[MAX_K], k_row[MAX_K], erase[MAX_K], decay[MAX_K] __attribute__((aligned(64))), beta;
        float w[MAX_K], o[MAX_K];
        const int64_t key = (i / HV * H + i % HV / (HV / H)) * K;
        uint64_t mode = flush_denormals();
        load(q_row, q_, key, K, K, (float)scale);
        load(k_row, k_, key, K, K, 1);
        load(decay, log_decay_, i * K, K, Kp, 1);
        load(&beta, beta_, i, 1, 1, 1);
        for (int64_t n = 0; n < K; n += VL) AT(decay + n) = exp_vec(AT(decay + n));
        for (int64_t n = 0; n < K; n++) erase[n] = beta * k_row[n];
        for (int64_t n = 0; n < V; n += MAX_K) {
            const int64_t width = V - n < MAX_K ? V - n : MAX_K;
            load(w, v_, i * V + n, width, width, beta);
            step_token(K, width, state + i * K * V + n, V, decay, erase, q_row, k_row, w, o);
            store(out_, i * V + n, o, width, 1);
        }
        restore_denormals(mode);
    }
}

/* One token through a KDA layer between its projections; palimpsest/ops/decode.py has the law. Windows and `state` are
   edited in place. x, window, decay, beta, gate and out share a type, the weights of the convolutions and norm another. */
typedef struct {
    int64_t B, H, K, W, threads, kind, silu, bf16, bf16_weights;
    double eps, floor, beta_max;
    void *x[3], *weight[3], *window[3]; /* of q, k, v: [B, D], [D, W], [B, D, W - 1] with D = H K */
    void *decay, *beta, *gate, *norm, *out; /* [B, D], [B, H], [B, D], [K], [B, D] */
    const float *A_log, *dt_bias;           /* [H], [D] */
    float *state;                           /* [B, H, K, K] */
} LayerStep;

/* The last W inputs of one head's channels against their weights, then SiLU; the window moves on. */
static void convolve(const LayerStep *c, int which, int64_t b, int64_t head, int64_t Kp, float *y) {
    const Array x = {c->x[which], c->bf16}, weight = {c->weight[which], c->bf16_weights};
    const Array window = {c->window[which], c->bf16};
    const int64_t K = c->K, W = c->W, D = c->H * K, first = head * K;
    float newest[MAX_K], taps[64], weights[64];
    load(newest, x, b * D + first, K, K, 1);
    for (int64_t n = 0; n < K; n++) {
        load(taps, window, (b * D + first + n) * (W - 1), W - 1, W - 1, 1);
        load(weights, weight, (first + n) * W, W, W, 1);
        taps[W - 1] = newest[n], y[n] = 0;
        for (int64_t w = 0; w < W; w++) y[n] += taps[w] * weights[w];
        store(window, (b * D + first + n) * (W - 1), taps + 1, W - 1, 1);
    }
    for (int64_t n = K; n < Kp; n++) y[n] = 0;
    for (int64_t n = 0; n < Kp; n += VL) AT(y + n) *= sigmoid(AT(y + n));
}

EXPORT void memory_layer_step(const LayerStep *c) {
    const int64_t B = c->B, H = c->H, K = c->K, D = H * K, Kp = (K + VL - 1) / VL * VL;
    const int64_t useful = 1 + B * H * K * K / (1 << 16), threads = c->threads < useful ? c->threads : useful;
    const Array decay_ = {c->decay, c->bf16}, beta_ = {c->beta, c->bf16}, gate_ = {c->gate, c->bf16};
    const Array norm_ = {c->norm, c->bf16_weights}, out_ = {c->out, c->bf16};
    Call gates = {.K = K, .gate = c->kind, .floor = c->floor, .A_log = c->A_log, .dt_bias = c->dt_bias};
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t i = 0; i < B * H; i++) {
        float q[MAX_K] __attribute__((aligned(64))), k[MAX_K] __attribute__((aligned(64)));
        float v[MAX_K] __attribute__((aligned(64))), decay[MAX_K] __attribute__((aligned(64)));
        float o[MAX_K] __attribute__((aligned(64))), gate[MAX_K] __attribute__((aligned(64)));
        float erase[MAX_K], norm[MAX_K], beta, squares = 0;
        const int64_t b = i / H, head = i % H;
        uint64_t mode = flush_denormals();
        convolve(c, 0, b, head, Kp, q), convolve(c, 1, b, head, Kp, k), convolve(c, 2, b, head, Kp, v);
        normalise(q, Kp, 1 / sqrtf((float)K)), normalise(k, Kp, 1);
        load(decay, decay_, b * D + head * K, K, Kp, 1);
        add_bias(&gates, head, decay);
        vec slope;
        for (int64_t n = 0; n < Kp; n += VL) AT(decay + n) = exp_vec(gated(&gates, head, AT(decay + n), &slope));
        load(&beta, beta_, i, 1, 1, 1);
        beta = (float)c->beta_max / (1 + expf(-beta));
        for (int64_t n = 0; n < K; n++) erase[n] = beta * k[n], v[n] *= beta;
        step_token(K, K, c->state + i * K * K, K, decay, erase, q, k, v, o);

        for (int64_t n = 0; n < K; n++) squares += o[n] * o[n];
        const float scale = 1 / sqrtf(squares / (float)K + (float)c->eps);
        load(gate, gate_, b * D + head * K, K, Kp, 1);
        load(norm, norm_, 0, K, K, scale);
        for (int64_t n = 0; n < Kp; n += VL) AT(gate + n) = sigmoid(AT(gate + n)) * (c->silu ? AT(gate + n) : splat(1));
        for (int64_t n = 0; n < K; n++) o[n] *= norm[n] * gate[n];
        store(out_, b * D + head * K, o, K, 1);
        restore_denormals(mode);
    }
}

/* ---- the rest of a decoded token: a few rows against fp32 weights ----------------------------------------------- */

INLINE float dot(const float *a, const float *b, int64_t n) {
    vec total = splat(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) total += LOOSE(a + i) * LOOSE(b + i);
    float rest = sum(total);
    for (; i < n; i++) rest += a[i] * b[i];
    return rest;
}

/* y[o] = w[o] . x for O rows of w, four at a time so that x is read from registers. */
static void rows_times(const float *restrict w, const float *restrict x, int64_t O, int64_t D, float *restrict y) {
    int64_t o = 0;
    for (; o + 4 <= O; o += 4) {
        const float *a = w + o * D, *b = a + D, *c = b + D, *d = c + D;
        vec sa = splat(0), sb = sa, sc = sa, sd = sa;
        int64_t i = 0;
        for (; i + VL <= D; i += VL) {
            const vec v = LOOSE(x + i);
            sa += LOOSE(a + i) * v, sb += LOOSE(b + i) * v, sc += LOOSE(c + i) * v, sd += LOOSE(d + i) * v;
        }
        float ta = sum(sa), tb = sum(sb), tc = sum(sc), td = sum(sd);
        for (; i < D; i++) ta += a[i] * x[i], tb += b[i] * x[i], tc += c[i] * x[i], td += d[i] * x[i];
        y[o] = ta, y[o + 1] = tb, y[o + 2] = tc, y[o + 3] = td;
    }
    for (; o < O; o++) y[o] = dot(w + o * D, x, D);
}

/* y_i = x_i W_i^T for several weights: x_i [N, D], W_i [O_i, D], y_i [N, O_i]. */
EXPORT void decode_project(int64_t count, int64_t N, int64_t D, int64_t threads, const int64_t *O,
                           const float *const *x, const float *const *w, float *const *y) {
    enum { ROWS = 64 };
    for (int64_t i = 0; i < count; i++) {
        const int64_t blocks = (O[i] + ROWS - 1) / ROWS, useful = 1 + N * O[i] * D / (1 << 18);
#pragma omp parallel for num_threads((int)(threads < useful ? threads : useful)) if (threads > 1 && useful > 1)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t n = 0; n < N; n++) {
                const int64_t o = block * ROWS, rows = O[i] - o < ROWS ? O[i] - o : ROWS;
                rows_times(w[i] + o * D, x[i] + n * D, rows, D, y[i] + n * O[i] + o);
            }
    }
}

/* sums = x + sum_j parts_j, y = its RMSNorm: x [N, D], parts [N, J, D]. */
EXPORT void decode_add_norm(int64_t N, int64_t J, int64_t D, double eps, const float *x, const float *parts,
                            const float *weight, float *sums, float *y) {
    for (int64_t n = 0; n < N; n++) {
        float *s = sums + n * D;
        memcpy(s, x + n * D, sizeof(float) * D);
        for (int64_t j = 0; j < J; j++)
            for (int64_t d = 0; d < D; d++) s[d] += parts[(n * J + j) * D + d];
        const float scale = 1 / sqrtf(dot(s, s, D) / (float)D + (float)eps);
        for (int64_t d = 0; d < D; d++) y[n * D + d] = s[d] * scale * weight[d];
    }
}

/* The k best experts by sigmoid + bias, and their weights; `scores` is scratch of 2 E. */
EXPORT void decode_route(int64_t N, int64_t E, int64_t k, int64_t renormalize, int64_t biased, double scaling,
                         const float *logits, const float *bias, float *scores, int64_t *experts, float *weights) {
    for (int64_t n = 0; n < N; n++) {
        float total = 0, *left = scores + E;
        for (int64_t e = 0; e < E; e++) scores[e] = 1 / (1 + expf(-logits[n * E + e])), left[e] = scores[e] + bias[e];
        for (int64_t j = 0; j < k; j++) {
            int64_t best = 0;
            for (int64_t e = 1; e < E; e++)
                if (left[e] > left[best] || left[best] != left[best]) best = e;
            experts[n * k + j] = best;
            weights[n * k + j] = biased ? scores[best] + bias[best] : scores[best];
            total += weights[n * k + j], left[best] = -INFINITY;
        }
        for (int64_t j = 0; j < k; j++) weights[n * k + j] *= (float)scaling / (renormalize ? total + 1e-20f : 1);
    }
}

static void gated_mlp(const float *x, const float *gate, const float *up, const float *down, int64_t D, int64_t W,
                      float weight, float *h, float *y) {
    rows_times(gate, x, W, D, h), rows_times(up, x, W, D, h + W);
    for (int64_t i = 0; i < W; i++) h[i] = weight * h[i + W] * h[i] / (1 + expf(-h[i]));
    rows_times(down, h, D, W, y);
}

/* parts [N, k, D], or [N, k + 1, D] with an MLP of width S that all tokens share. Returns 1 without memory. */
EXPORT int decode_experts(int64_t N, int64_t k, int64_t E, int64_t D, int64_t W, int64_t S, int64_t threads,
                          const float *x, const int64_t *experts, const float *weights, const float *gate,
                          const float *up, const float *down, const float *const *shared, float *parts) {
    const int64_t J = k + (S > 0), width = W > S ? W : S, useful = 1 + N * J * D * W / (1 << 17);
    threads = threads < useful ? threads : useful;
    float *scratch = malloc(sizeof(float) * 2 * width * N * J);
    if (!scratch) return 1;
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t i = 0; i < N * J; i++) {
        const int64_t n = i / J, j = i % J, e = j < k ? experts[n * k + j] : 0;
        float *h = scratch + i * 2 * width, *y = parts + i * D;
        if (j == k)
            gated_mlp(x + n * D, shared[0], shared[1], shared[2], D, S, 1, h, y);
        else if (e >= 0 && e < E)
            gated_mlp(x + n * D, gate + e * W * D, up + e * W * D, down + e * W * D, D, W, weights[n * k + j], h, y);
        else
            for (int64_t d = 0; d < D; d++) y[d] = NAN; /* there is no such expert */
    }
    free(scratch);
    return 0;
}

/* ---- a whole token of a model, so that a small one is not bound by the calls ------------------------------------ */

typedef struct {
    int64_t latent, sparse, length_stride; /* which mixer, which MLP; 1 if each sequence has a length of its own, or 0 */
    const float *norm_in, *norm_post;      /* [D] */
    const float *in[6];                    /* KDA: q, k, v, f_a, g_a, b. Latent: q, kv_a, its norm [R], kv_b */
    const float *f_b, *g_b, *out;
    LayerStep memory;                      /* KDA; of its fields all but x, decay, beta, gate and out are filled */
    float *rows;                           /* latent: [B, any, R + P], `row_stride` floats apart from b to b + 1 */
    int64_t row_stride;
    const int64_t *length;                 /* rows filled before */
    const float *router, *bias, *gate, *up, *down, *shared[3];
} TokenLayer;

typedef struct {
    int64_t B, layers, D, heads, N, P, V, R, E, k, I, S, dense, low, renormalize, biased, threads;
    double eps, latent_eps, scaling;
    const int64_t *ids;
    const float *embedding, *norm;
    TokenLayer *layer;
    float *out; /* [B, D] */
} Token;

/* One new token reads the rows before it and itself: queries and values go through the latents. */
static void latent_token(const Token *t, const TokenLayer *l, int64_t b, const float *q, const float *latent, float *y,
                         float *scratch) {
    const int64_t R = t->R, P = t->P, C_ = R + P, N = t->N, V = t->V, held = l->length[b * l->length_stride];
    float *row = l->rows + b * l->row_stride + held * C_;
    const float squares = dot(latent, latent, R), norm = 1 / sqrtf(squares / (float)R + (float)t->latent_eps);
    for (int64_t r = 0; r < R; r++) row[r] = latent[r] * norm * l->in[2][r];
    memcpy(row + R, latent + R, sizeof(float) * P);
    const float *rows = l->rows + b * l->row_stride, scale = 1 / sqrtf((float)(N + P));
    float *against = scratch, *read = against + C_, *weights = read + R;
    for (int64_t h = 0; h < t->heads; h++) {
        const float *mine = q + h * (N + P), *keys = l->in[3] + h * (N + V) * R, *values = keys + N * R;
        memset(against, 0, sizeof(float) * R), memset(read, 0, sizeof(float) * R);
        for (int64_t n = 0; n < N; n++)
            for (int64_t r = 0; r < R; r++) against[r] += scale * mine[n] * keys[n * R + r];
        for (int64_t p = 0; p < P; p++) against[R + p] = scale * mine[N + p];
        float largest = -INFINITY, total = 0;
        rows_times(rows, against, held + 1, C_, weights);
        for (int64_t s = 0; s <= held; s++) largest = weights[s] > largest ? weights[s] : largest;
        for (int64_t s = 0; s <= held; s++) total += weights[s] = expf(weights[s] - largest);
        for (int64_t s = 0; s <= held; s++)
            for (int64_t r = 0; r < R; r++) read[r] += weights[s] * rows[s * C_ + r];
        rows_times(values, read, V, R, y + h * V);
        for (int64_t v = 0; v < V; v++) y[h * V + v] /= total;
    }
}

INLINE float *cut(float **scratch, int64_t floats) {
    float *part = *scratch;
    *scratch += (floats + 15) / 16 * 16;
    return part;
}

/* Returns 1 where there was no memory. */
EXPORT int decode_token(Token *t) {
    const int64_t B = t->B, D = t->D, J = t->k + 1;
    int64_t mix = t->heads * (t->N + t->P + t->V) + t->R + t->P, longest = 0, wide = t->I > t->S ? t->I : t->S;
    for (int64_t i = 0; i < t->layers; i++) {
        const TokenLayer *l = t->layer + i;
        const int64_t own = l->latent ? 0 : l->memory.H * (8 * l->memory.K + 1) + 2 * t->low;
        mix = own > mix ? own : mix;
        for (int64_t b = 0; l->latent && b < B; b++)
            longest = l->length[b * l->length_stride] > longest ? l->length[b * l->length_stride] : longest;
    }
    wide = t->dense > wide ? t->dense : wide;
    const int64_t floats = B * (4 * D + J * D + mix + 64 * 16) + 2 * wide + 2 * t->E + 2 * B * (t->E + t->k) +
                           2 * t->R + t->P + longest + 1024, even = (floats + 15) / 16 * 16;
    float *all = malloc(sizeof(float) * even + sizeof(int64_t) * B * (t->k + 1)), *free_ = all;
    if (!all) return 1;
    float *x = cut(&free_, B * D), *sums = cut(&free_, B * D), *y = cut(&free_, B * D), *z = cut(&free_, B * D);
    float *parts = cut(&free_, B * J * D), *logits = cut(&free_, B * t->E), *weights = cut(&free_, B * t->k);
    float *scores = cut(&free_, 2 * t->E), *hidden = cut(&free_, 2 * wide);
    float *latent_scratch = cut(&free_, 2 * t->R + t->P + longest + 1), *streams = free_;
    int64_t *experts = (int64_t *)(all + even);
    int64_t have = 0, status = 0;
    for (int64_t b = 0; b < B; b++) memcpy(x + b * D, t->embedding + t->ids[b] * D, sizeof(float) * D);
    for (int64_t i = 0; i < t->layers && !status; i++) {
        TokenLayer *l = t->layer + i;
        decode_add_norm(B, have, D, t->eps, x, parts, l->norm_in, sums, y);
        float *left = streams;
        if (l->latent) {
            const int64_t outputs[2] = {t->heads * (t->N + t->P), t->R + t->P};
            float *to[2] = {cut(&left, B * outputs[0]), cut(&left, B * outputs[1])}, *o = cut(&left, B * t->heads * t->V);
            const float *from[2] = {y, y};
            decode_project(2, B, D, t->threads, outputs, from, l->in, to);
            for (int64_t b = 0; b < B; b++)
                latent_token(t, l, b, to[0] + b * outputs[0], to[1] + b * outputs[1], o + b * t->heads * t->V,
                             latent_scratch);
            const int64_t width = D;
            decode_project(1, B, t->heads * t->V, t->threads, &width, (const float *const[]){o},
                           (const float *const[]){l->out}, &z);
        } else {
            LayerStep *m = &l->memory;
            const int64_t HK = m->H * m->K, outputs[6] = {HK, HK, HK, t->low, t->low, m->H}, both[2] = {HK, HK};
            float *to[6], *gates[2];
            const float *from[6] = {y, y, y, y, y, y};
            for (int j = 0; j < 6; j++) to[j] = cut(&left, B * outputs[j]);
            for (int j = 0; j < 2; j++) gates[j] = cut(&left, B * HK);
            float *o = cut(&left, B * HK);
            decode_project(6, B, D, t->threads, outputs, from, l->in, to);
            decode_project(2, B, t->low, t->threads, both, (const float *const[]){to[3], to[4]},
                           (const float *const[]){l->f_b, l->g_b}, gates);
            for (int j = 0; j < 3; j++) m->x[j] = to[j];
            m->decay = gates[0], m->gate = gates[1], m->beta = to[5], m->out = o;
            memory_layer_step(m);
            const int64_t width = D;
            decode_project(1, B, HK, t->threads, &width, (const float *const[]){o}, (const float *const[]){l->out}, &z);
        }
        decode_add_norm(B, 1, D, t->eps, sums, z, l->norm_post, x, y);
        if (l->sparse) {
            const int64_t E = t->E;
            decode_project(1, B, D, t->threads, &E, (const float *const[]){y}, (const float *const[]){l->router}, &logits);
            decode_route(B, E, t->k, t->renormalize, t->biased, t->scaling, logits, l->bias, scores, experts, weights);
            status = decode_experts(B, t->k, E, D, t->I, t->S, t->threads, y, experts, weights, l->gate, l->up, l->down,
                                    l->shared, parts);
            have = t->k + (t->S > 0);
        } else {
            for (int64_t b = 0; b < B; b++)
                gated_mlp(y + b * D, l->gate, l->up, l->down, D, t->dense, 1, hidden, parts + b * D);
            have = 1;
        }
    }
    decode_add_norm(B, have, D, t->eps, x, parts, t->norm, sums, t->out);
    free(all);
    return (int)status;
}
