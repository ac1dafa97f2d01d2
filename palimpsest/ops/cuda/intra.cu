// Everything of a chunk that does not need the memory; what intra.py of the Triton room computes, letter for letter.
//
// Grid     (chunk x value head), 4 warps; warp w holds 16 tokens, each lane all of them in a few channels. So products of
//          decays stay in a lane, and no lane ever waits for another one's.
// Tree     pairs of tokens meet in the smallest aligned block of 2, 4, 8 or 16 that holds both: the later half decayed since
//          that half began, the earlier one until it ended. Every factor is a product of decays, never a difference of sums.
//          Halves are gathered as 8 + 8 + 8 rows (erase, q, k) in shared memory, and one small product gives their scores.
// Blocks   of 16 against earlier blocks: since this one's start, times whole blocks between, times until that one's end.
// ERASE    0: erase = beta k.  1: a vector.  2: a vector that reads before its own token's decay.
#include "warp.cuh"

#ifndef ERASE
#define ERASE 0
#endif
#ifndef KEY_DIM
#define KEY_DIM 128
#endif
constexpr int C = 64, K = KEY_DIM, CHANNELS = ERASE ? 2 : K / 32, PAIRS = CHANNELS / 2;  // of a lane at a time
constexpr int WIDTH = 32 * CHANNELS, PASSES = K / WIDTH;
constexpr int PITCH = K + 8, L_PITCH = 72, P_PITCH = 72;

struct Warp {
    union {
        u16 rows[32 * PITCH];  // a level's halves; then erase and q since the block's start
        struct {
            float L[16 * L_PITCH];  // then rows of A, and of M on its diagonal; and of P
            u16 P[16 * P_PITCH];
        };
    };
};
struct Smem {
    Warp warp[4];
    u16 k_until[C * PITCH];  // k; then k until its block's end
    u16 k_end[C * PITCH];    // q; then k until the chunk's end, its pairs laid out as columns of tiles
    float total[4 * K];      // decay of each block of 16
    u16 between[3 * K];      // of block 1, of block 2, of both
    float e_scale[C], q_scale[C], k_norm[C], own[C];
};

struct Arguments {
    const u16 *q, *k;
    const void *erase, *g;
    const float *A_log, *dt_bias;
    Tile<K>* tiles;
    u16* M;
    float* norms;
    const int *cu_seqlens, *chunk_offsets;
    int T, N, H, HV;
    float scale, floor;
    int gate, wide_g, wide_erase;
};

struct alignas(4 * PAIRS) Row { u32 x[PAIRS]; };  // of one token, what a lane holds
struct alignas(4 * CHANNELS) WideRow { float x[CHANNELS]; };
typedef float Factors[CHANNELS];

DEVICE Row factor(const Factors& f) {
    Row y;
#pragma unroll
    for (int p = 0; p < PAIRS; p++) y.x[p] = pack(f[2 * p], f[2 * p + 1]);
    return y;
}
DEVICE Row times_row(Row x, Row f) {
#pragma unroll
    for (int p = 0; p < PAIRS; p++) x.x[p] = times(x.x[p], f.x[p]);
    return x;
}
DEVICE void multiply(Factors& f, const Factors& by) {
#pragma unroll
    for (int x = 0; x < CHANNELS; x++) f[x] *= by[x];
}

// Products of d that the compiler has formed so far are not worth the registers that would keep them.
DEVICE void forget(Factors (&d)[16]) {
#ifndef WARP_ON_CPU
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
        for (int x = 0; x < CHANNELS; x++) asm volatile("" : "+f"(d[i][x]));
#endif
}

// Sixteen tokens of k, erase and log-decay into registers, and of q into shared memory; zeros beyond the last token.
template <bool ALL> DEVICE void load(const Arguments& a, Row (&k)[16], Row (&e)[16], Factors (&g)[16], const u16* q_at, const u16* k_at,
                                     long long value_at, u16* q_to, int tokens) {
    const unsigned long long key_step = (unsigned)(a.H * K), value_step = (unsigned)(a.HV * K);
    Row q[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        if (!ALL) q[i] = k[i] = e[i] = Row{};
        if (ALL || i < tokens) {
            q[i] = *(const Row*)(q_at + key_step * i), k[i] = *(const Row*)(k_at + key_step * i);
            if (ERASE) e[i] = *(const Row*)((const u16*)a.erase + value_at + value_step * i);
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        if (!ALL)
#pragma unroll
            for (int x = 0; x < CHANNELS; x++) g[i][x] = 0.0f;
        if (ALL || i < tokens) {
            if (a.wide_g) {
                const WideRow y = *(const WideRow*)((const float*)a.g + value_at + value_step * i);
#pragma unroll
                for (int x = 0; x < CHANNELS; x++) g[i][x] = y.x[x];
            } else {
                const Row y = *(const Row*)((const u16*)a.g + value_at + value_step * i);
#pragma unroll
                for (int x = 0; x < CHANNELS; x++) g[i][x] = x % 2 ? high(y.x[x / 2]) : low(y.x[x / 2]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++) *(Row*)(q_to + i * PITCH) = q[i];
}

// Scores of the later halves against the earlier halves of all blocks of 2 S tokens: acc's rows are erase, then q.
template <int S> DEVICE void level(float (&acc)[4], Factors (&d)[16], const Row (&k)[16], const Row* e, u16* rows,
                                   const u16* raw_k, const u16* raw_q, int column, int lane) {
    warp_barrier();  // what lay here has been read
    forget(d);
#pragma unroll
    for (int b = 0; b < 16; b += 2 * S) {
        Factors run;
#pragma unroll
        for (int x = 0; x < CHANNELS; x++) run[x] = 1.0f;
#pragma unroll
        for (int i = b + S; i < b + 2 * S; i++) {
            const int to = (b / 2 + i - b - S) * PITCH + column;
            if (ERASE == 2) *(Row*)(rows + to) = i > b + S ? times_row(e[i], factor(run)) : e[i];
            multiply(run, d[i]);
            const Row f = factor(run);
            if (ERASE != 2) *(Row*)(rows + to) = times_row(ERASE ? e[i] : k[i], f);
            *(Row*)(rows + 8 * PITCH + to) = times_row(*(const Row*)(raw_q + i * PITCH + column), f);
        }
        if (S > 1) {
#pragma unroll
            for (int x = 0; x < CHANNELS; x++) run[x] = 1.0f;
#pragma unroll
            for (int i = b + S - 1; i >= b; i--) {
                *(Row*)(rows + (16 + b / 2 + i - b) * PITCH + column) = i < b + S - 1 ? times_row(k[i], factor(run)) : k[i];
                if (i > b) multiply(run, d[i]);
            }
        }
    }
    warp_barrier();
    const int from = column - CHANNELS * lane;
    const u16* left = rows + lane % 16 * PITCH + from + lane / 16 * 8;
    const u16* right = (S > 1 ? rows + (16 + lane % 8) * PITCH : raw_k + 2 * (lane % 8) * PITCH) + from + lane / 8 * 8;
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step += 2) {
        const Quad b = load_tiles(right + 16 * step);
#pragma unroll
        for (int y = 0; y < 2; y++) {
            const Quad x = load_tiles(left + 16 * (step + y));
            mma(acc, x.x[0], x.x[1], x.x[2], x.x[3], b.x[2 * y], b.x[2 * y + 1]);
        }
    }
}

// A level's scores, gathered by halves, to their places in A and P.
template <int S, bool GATED> DEVICE void spread(const float (&acc)[4], float* L, u16* P, const float* e_scale, const float* q_scale, const float* k_norm, int r, int c) {
#pragma unroll
    for (int x = 0; x < 2; x++) {
        const int at = 2 * c + x, i = r / S * 2 * S + S + r % S, j = at / S * 2 * S + at % S;
        if (r / S == at / S) {
            L[i * L_PITCH + j] = acc[x] * e_scale[i] * (GATED ? k_norm[j] : 1.0f);
            P[i * P_PITCH + j] = (u16)pack(acc[2 + x] * q_scale[i], 0.0f);
        }
    }
}

template <bool GATED> DEVICE void prepare(const Arguments& a) {
    const int H = a.H, HV = a.HV;
#ifdef WARP_ON_CPU
    Smem& s = *(Smem*)cpu_shared;
#else
    extern __shared__ __align__(16) char shared[];
    Smem& s = *(Smem*)shared;
#endif
    const int lane = threadIdx.x % 32, w = warp_index(), r = lane / 4, c = lane % 4;
    const int head = blockIdx.x % HV;
    const long long tile = blockIdx.x;
    const Chunk at = find_chunk(blockIdx.x / HV, a.cu_seqlens, a.chunk_offsets, a.T, a.N, C);
    if (at.count <= 0) return;
    Tile<K>& out = a.tiles[tile];
    const int tokens = at.count - 16 * w;  // of this warp, if it has 16
    const long long first = at.start + (tokens > 0 ? 16 * w : 0);
    float *e_scale = s.e_scale + 16 * w, *q_scale = s.q_scale + 16 * w, *k_norm = s.k_norm + 16 * w;  // of this warp's rows
    if (lane < 16) {
        float beta = lane < tokens;
        if (ERASE == 0 && lane < tokens) {
            const long long from = (first + lane) * HV + head;
            beta = a.wide_erase ? ((const float*)a.erase)[from] : one((const u16*)a.erase + from);
            if (GATED) beta = sigmoid(beta);
        }
        out.beta[16 * w + lane] = beta;
        e_scale[lane] = ERASE ? 1.0f : beta, q_scale[lane] = a.scale, k_norm[lane] = 1.0f;
    }
    u16 *rows = s.warp[w].rows, *my_k = s.k_until + 16 * w * PITCH, *my_end = s.k_end + 16 * w * PITCH;

    float near[4][4] = {};               // scores at levels 1, 2, 4, 8
    float own[2][4] = {}, q_own[2][4] = {};  // of 8 tokens each: q and k against k; q against q
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        const int column = pass * WIDTH + CHANNELS * lane;
        Row k[16], e[16];  // q waits in shared memory; e is used with ERASE alone
        Factors d[16];
        {
            const u16* q_at = a.q + (first * H + head / (HV / H)) * K + column;
            const u16* k_at = a.k + (first * H + head / (HV / H)) * K + column;
            const long long value_at = (first * HV + head) * K + column;
            if (tokens >= 16) load<true>(a, k, e, d, q_at, k_at, value_at, my_end + column, tokens);
            else load<false>(a, k, e, d, q_at, k_at, value_at, my_end + column, tokens);
        }
        if (GATED) {
            const float rate = exp_(a.A_log[head]);
            float bias[CHANNELS];
#pragma unroll
            for (int x = 0; x < CHANNELS; x++) bias[x] = a.dt_bias[head * K + column + x];
#pragma unroll
            for (int i = 0; i < 16; i++)
#pragma unroll
                for (int x = 0; x < CHANNELS; x++) {
                    const float y = d[i][x] + bias[x];
                    d[i][x] = i >= tokens ? 0.0f : a.gate == 1 ? -rate * softplus(y) : a.floor * sigmoid(rate * y);
                }
        }
        Factors total;
#pragma unroll
        for (int i = 0; i < 16; i++) {
#pragma unroll
            for (int x = 0; x < CHANNELS; x++) d[i][x] = exp_(d[i][x]), total[x] = i ? total[x] * d[i][x] : d[i][x];
            *(Row*)(my_k + i * PITCH + column) = k[i];
        }
#pragma unroll
        for (int x = 0; x < CHANNELS; x++) s.total[w * K + column + x] = total[x];
        block_barrier();

#pragma unroll
        for (int step = 0; step < WIDTH / 16; step++) {
            const int from = lane % 16 * PITCH + pass * WIDTH + 16 * step + lane / 16 * 8;
            const Quad x = load_tiles(my_end + from), y = load_tiles(my_k + from);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                mma(own[h], x.x[h], y.x[h], x.x[2 + h], y.x[2 + h], y.x[h], y.x[2 + h]);
                if (GATED) mma(q_own[h], x.x[h], 0, x.x[2 + h], 0, x.x[h], x.x[2 + h]);
            }
        }
        if (pass == PASSES - 1 && c == r / 2)  // this lane holds the diagonals
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int i = 8 * h + r;
                s.own[16 * w + i] = r % 2 ? own[h][1] : own[h][0];
                if (GATED) {
                    const float q_norm = rsqrt_((r % 2 ? q_own[h][1] : q_own[h][0]) + 1e-6f);
                    k_norm[i] = rsqrt_((r % 2 ? own[h][3] : own[h][2]) + 1e-6f);
                    e_scale[i] *= k_norm[i], q_scale[i] *= q_norm;
                    if (a.norms) a.norms[tile * 2 * C + 16 * w + i] = q_norm, a.norms[tile * 2 * C + C + 16 * w + i] = k_norm[i];
                }
            }
        level<1>(near[0], d, k, e, rows, my_k, my_end, column, lane);
        level<2>(near[1], d, k, e, rows, my_k, my_end, column, lane);
        level<4>(near[2], d, k, e, rows, my_k, my_end, column, lane);
        level<8>(near[3], d, k, e, rows, my_k, my_end, column, lane);
        warp_barrier();
        forget(d);

        // The 16 tokens since their block's start and until its end; with the other blocks, since the chunk's and until its.
        Factors before, after, run;
#pragma unroll
        for (int x = 0; x < CHANNELS; x++) {
            before[x] = after[x] = run[x] = 1.0f;
#pragma unroll
            for (int J = 0; J < 3; J++) {
                if (J < w) before[x] *= s.total[J * K + column + x];
                if (3 - J > w) after[x] *= s.total[(3 - J) * K + column + x];
            }
        }
        if (threadIdx.x < WIDTH) {
            const int channel = pass * WIDTH + threadIdx.x;
            const float f1 = s.total[K + channel], f2 = s.total[2 * K + channel];
            s.between[channel] = (u16)pack(f1, 0.0f), s.between[K + channel] = (u16)pack(f2, 0.0f);
            s.between[2 * K + channel] = (u16)pack(f1 * f2, 0.0f);
            out.D[channel] = s.total[channel] * f1 * f2 * s.total[3 * K + channel];
        }
        {
            const int at_column = image(16 * w, column / 64 * 8) + column % 8, turn = column / 8 % 8 * 8;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                u16 *E = out.E + at_column + (i % 8 * 8 ^ turn) + 64 * i, *Q = E + (out.Q - out.E);
                Factors f;
                if (ERASE == 2) {
                    *(Row*)(rows + i * PITCH + column) = times_row(e[i], factor(run));
#pragma unroll
                    for (int x = 0; x < CHANNELS; x++) f[x] = run[x] * before[x];
                    *(Row*)E = times_row(e[i], factor(f));
                }
                multiply(run, d[i]);
                const Row since = factor(run);
                if (ERASE != 2) *(Row*)(rows + i * PITCH + column) = times_row(ERASE ? e[i] : k[i], since);
                const Row q = *(const Row*)(my_end + i * PITCH + column);
                *(Row*)(rows + (16 + i) * PITCH + column) = times_row(q, since);
                const float beta = e_scale[i], scale = q_scale[i];
                Factors start;
#pragma unroll
                for (int x = 0; x < CHANNELS; x++) start[x] = run[x] * before[x], f[x] = start[x] * beta;
                if (ERASE != 2) *(Row*)E = times_row(ERASE ? e[i] : k[i], factor(f));
#pragma unroll
                for (int x = 0; x < CHANNELS; x++) f[x] = start[x] * scale;
                *(Row*)Q = times_row(q, factor(f));
            }
        }
        warp_barrier();  // all lanes have read q
#pragma unroll
        for (int x = 0; x < CHANNELS; x++) run[x] = 1.0f;
#pragma unroll
        for (int i = 15; i >= 0; i--) {
            Factors f;
            *(Row*)(my_k + i * PITCH + column) = times_row(k[i], factor(run));
#pragma unroll
            for (int x = 0; x < CHANNELS; x++) f[x] = run[x] * after[x];
            const Row end = times_row(k[i], factor(f));
#pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                const int channel = column + 2 * p;
                *(u32*)(my_end + i * PITCH + channel / 32 * 32 + channel % 8 / 2 * 8 + channel % 32 / 8 * 2) = end.x[p];
            }
            multiply(run, d[i]);
        }
    }
    block_barrier();

    // Blocks of 16 against earlier ones.
    float far[3][2][2][4] = {};
    {
        const u16 *left = rows + lane % 16 * PITCH + lane / 16 * 8, *right = s.k_until + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8;
        const u16 *f1 = s.between + (w == 3) * K + 2 * c, *f0 = s.between + (w == 3) * 2 * K + 2 * c;  // for J = 1, for J = 0
#pragma unroll
        for (int step = 0; step < K / 16; step++)
            if (w > 0) {
                const Quad e = load_tiles(left + 16 * step), q = load_tiles(left + 16 * PITCH + 16 * step);
#pragma unroll
                for (int J = 2; J >= 0; J--)
                    if (J < w) {
                        Quad k = load_tiles(right + 16 * J * PITCH + 16 * step);
                        if (J < w - 1) {
                            const u16* f = (J ? f1 : f0) + 16 * step;
                            const u32 x = *(const u32*)f, y = *(const u32*)(f + 8);
                            k.x[0] = times(k.x[0], x), k.x[1] = times(k.x[1], y), k.x[2] = times(k.x[2], x), k.x[3] = times(k.x[3], y);
                        }
#pragma unroll
                        for (int n = 0; n < 2; n++) {
                            mma(far[J][0][n], e.x[0], e.x[1], e.x[2], e.x[3], k.x[2 * n], k.x[2 * n + 1]);
                            mma(far[J][1][n], q.x[0], q.x[1], q.x[2], q.x[3], k.x[2 * n], k.x[2 * n + 1]);
                        }
                    }
            }
    }

    // A and P go to shared memory, each warp its 16 rows; -A of other blocks, rounded to tf32, as M asks for it. P has no
    // k_norm: M^T brings it.
    warp_barrier();  // all lanes have read their rows; A and P lie over them
    float* L = s.warp[w].L;
    u16* P = s.warp[w].P;
    *(Quad*)(P + lane / 2 * P_PITCH + 16 * w + lane % 2 * 8) = Quad{};
    if (w % 2 == 0) *(Quad*)(P + lane / 2 * P_PITCH + 16 * w + 16 + lane % 2 * 8) = Quad{};
    {
        const float es[2] = {e_scale[r], e_scale[r + 8]}, qs[2] = {q_scale[r], q_scale[r + 8]};
#pragma unroll
        for (int J = 0; J < 3; J++)
            if (J < w)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const int j = 16 * J + 8 * n + 2 * c;
                    const float n0 = GATED ? s.k_norm[j] : 1.0f, n1 = GATED ? s.k_norm[j + 1] : 1.0f;
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float* to = L + (8 * h + r) * L_PITCH + j;
                        const float A0 = far[J][0][n][2 * h] * es[h], A1 = far[J][0][n][2 * h + 1] * es[h];
                        to[0] = tf32(-(GATED ? A0 * n0 : A0)), to[1] = tf32(-(GATED ? A1 * n1 : A1));
                        *(u32*)(P + (8 * h + r) * P_PITCH + j) = pack(far[J][1][n][2 * h] * qs[h], far[J][1][n][2 * h + 1] * qs[h]);
                    }
                }
    }
    warp_barrier();
    spread<1, GATED>(near[0], L + 16 * w, P + 16 * w, e_scale, q_scale, k_norm, r, c);
    spread<2, GATED>(near[1], L + 16 * w, P + 16 * w, e_scale, q_scale, k_norm, r, c);
    spread<4, GATED>(near[2], L + 16 * w, P + 16 * w, e_scale, q_scale, k_norm, r, c);
    spread<8, GATED>(near[3], L + 16 * w, P + 16 * w, e_scale, q_scale, k_norm, r, c);
    if (lane < 16) P[lane * P_PITCH + 16 * w + lane] = (u16)pack(s.own[16 * w + lane] * q_scale[lane], 0.0f);
    warp_barrier();

    // M of the warp's own 16 x 16 block: of both its 8 x 8 blocks by substitution, a column per lane; then -M_22 A_21 M_11.
    {
        float* block = L + 16 * w;
        const int column = lane % 8;
        float *half = block + lane / 8 % 2 * (8 * L_PITCH + 8), m[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float sum[2] = {i == column ? 1.0f : 0.0f, 0.0f};
#pragma unroll
            for (int t = 0; t < i; t += 4) {
                const Quad row = *(const Quad*)(half + i * L_PITCH + t);
#pragma unroll
                for (int y = 0; y < 4; y++)
                    if (t + y < i) sum[y % 2] -= __uint_as_float(row.x[y]) * m[t + y];
            }
            m[i] = sum[0] + sum[1];
        }
        warp_barrier();
        if (lane < 16)
#pragma unroll
            for (int i = 0; i < 8; i++) half[i * L_PITCH + column] = tf32(m[i]);
        warp_barrier();
        float x[4] = {}, y[4] = {};
        const float *M11 = block + 2 * c * L_PITCH + r, *A21 = block + (8 + r) * L_PITCH + 2 * c, *M22 = A21 + 8;
        mma_tf32(x, M11[0], 0.0f, M11[L_PITCH], 0.0f, tf32(A21[0]), tf32(A21[1]));
        mma_tf32(y, tf32(-x[0]), 0.0f, tf32(-x[1]), 0.0f, M22[0], M22[1]);
        float* M21 = block + (8 + 2 * c) * L_PITCH + r;
        M21[0] = tf32(y[0]), M21[L_PITCH] = tf32(y[1]), block[lane / 4 * L_PITCH + 8 + 2 * c] = 0.0f, block[lane / 4 * L_PITCH + 9 + 2 * c] = 0.0f;
    }
    block_barrier();

    // Block row w of M^T: M_Iw^T = -(sum_t M_tw^T A_It^T) M_II^T. Every product's result is the next one's first operand.
    u32 m2[4][4] = {};
    {
        float m[4][2][4] = {}, rounded[4][2][4];
        const float *straight = s.warp[0].L + r * L_PITCH + 2 * c, *turned = s.warp[0].L + 2 * c * L_PITCH + r;
        constexpr int NEXT = sizeof(Warp) / 4;  // from the rows of one block to those of the next
#pragma unroll
        for (int I = 0; I < 4; I++) {
            if (I == w)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int x = 0; x < 4; x++) m[I][n][x] = turned[I * NEXT + (8 * n + x % 2) * L_PITCH + 16 * I + 8 * (x / 2)];
            if (I > w) {
                float sum[2][4] = {};
#pragma unroll
                for (int t = 0; t < 3; t++)
                    if (t >= w && t < I)
#pragma unroll
                        for (int n = 0; n < 2; n++)
#pragma unroll
                            for (int step = 0; step < 2; step++) {
                                const float *b = straight + I * NEXT + 8 * n * L_PITCH + 16 * t + 8 * step, (&x)[4] = rounded[t][step];
                                mma_tf32(sum[n], x[0], x[2], x[1], x[3], b[0], b[1]);
                            }
#pragma unroll
                for (int step = 0; step < 2; step++) {
#pragma unroll
                    for (int x = 0; x < 4; x++) sum[step][x] = tf32(sum[step][x]);
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const float* b = straight + I * NEXT + 8 * n * L_PITCH + 16 * I + 8 * step;
                        mma_tf32(m[I][n], sum[step][0], sum[step][2], sum[step][1], sum[step][3], b[0], b[1]);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int x = 0; x < 4; x++) rounded[I][n][x] = tf32(m[I][n][x]);
            m2[I][0] = pack(m[I][0][0], m[I][0][1]), m2[I][1] = pack(m[I][0][2], m[I][0][3]);
            m2[I][2] = pack(m[I][1][0], m[I][1][1]), m2[I][3] = pack(m[I][1][2], m[I][1][3]);
            if (a.M)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        *(u32*)(a.M + tile * C * C + (16 * w + r) * 64 + 512 * h + ((2 * I + n) ^ r) * 8 + 2 * c) = m2[I][2 * n + h];
            if (GATED && I >= w)  // from here on k's norm comes with M
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const float n0 = s.k_norm[16 * I + 8 * n + 2 * c], n1 = s.k_norm[16 * I + 8 * n + 2 * c + 1];
                    m2[I][2 * n] = pack(m[I][n][0] * n0, m[I][n][1] * n1), m2[I][2 * n + 1] = pack(m[I][n][2] * n0, m[I][n][3] * n1);
                }
        }
    }

    // W = M^T k_end, rows of block w.
    const u16* columns = s.k_end + lane % 16 * PITCH + lane / 16 * 8;
#pragma unroll
    for (int group = 0; group < K / 32; group++) {
        float x[4][4] = {};
#pragma unroll
        for (int I = 0; I < 4; I++)
            if (I >= w)
#pragma unroll
                for (int p = 0; p < 4; p += 2) {
                    const Quad b = load_tiles_transposed(columns + 16 * I * PITCH + 32 * group + 8 * p);
                    mma(x[p], m2[I][0], m2[I][1], m2[I][2], m2[I][3], b.x[0], b.x[1]);
                    mma(x[p + 1], m2[I][0], m2[I][1], m2[I][2], m2[I][3], b.x[2], b.x[3]);
                }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Quad o;
#pragma unroll
            for (int p = 0; p < 4; p++) o.x[p] = pack(x[p][2 * h], x[p][2 * h + 1]);
            *(Quad*)(out.W + image(16 * w + 8 * h + r, 4 * group + c)) = o;
        }
    }
    // (P M)^T = M^T P^T, rows of block w.
#pragma unroll
    for (int group = 0; group < 2; group++) {
        float x[4][4] = {};
        const int l = lane % 8, half = lane / 8 % 2;  // of the columns; lanes from 16 on read the odd tiles
#pragma unroll
        for (int I = 0; I < 4; I++)
            if (I >= w && I < 2 * group + 2)
#pragma unroll
                for (int p = 0; p < 4; p += 2) {
                    const int row = 8 * (l / 2) + 2 * (p + lane / 16) + l % 2;  // of 32
                    const Quad b = load_tiles(s.warp[2 * group + row / 16].P + row % 16 * P_PITCH + 16 * I + 8 * half);
                    mma(x[p], m2[I][0], m2[I][1], m2[I][2], m2[I][3], b.x[0], b.x[1]);
                    mma(x[p + 1], m2[I][0], m2[I][1], m2[I][2], m2[I][3], b.x[2], b.x[3]);
                }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Quad o;
#pragma unroll
            for (int p = 0; p < 4; p++) o.x[p] = pack(x[p][2 * h], x[p][2 * h + 1]);
            *(Quad*)(out.P + image(16 * w + 8 * h + r, 4 * group + c)) = o;
        }
    }
}

extern "C" __global__ void __launch_bounds__(128, 3) intra(const __grid_constant__ Arguments a) { prepare<false>(a); }
#if ERASE == 0
extern "C" __global__ void __launch_bounds__(128, 3) intra_gated(const __grid_constant__ Arguments a) { prepare<true>(a); }
#endif
