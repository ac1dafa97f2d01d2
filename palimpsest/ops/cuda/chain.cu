// The walks over the chunks, forth and back; what chain.py and reverse.py of the Triton room compute, letter for letter.
//
// Grid     (sequence x value head, 64 value channels): four warps that compute, one that copies ahead.
// Holds    S transposed in fragments, fp32: always the first operand of a product, so no number of it ever moves. The
//          tiles E, Q, W, P lie in memory exactly as the tensor cores read them: a chunk is five plain copies.
// Saves    the memory before (after, going back) each chunk, as fragments: [tile, 16 value channels, 16 key channels,
//          lane, 4], which gradient.cu reads as it lies.
#include "hopper.cuh"

#ifndef KEY_DIM
#define KEY_DIM 128
#endif
constexpr int C = 64, K = KEY_DIM, STAGES = 3, V_PITCH = 72, OUT_PITCH = 24, S_REGS = K / 2;

struct Stage {
    u16 E[C * K], Q[C * K], W[C * K], P[C * C];
    u16 rows[C * V_PITCH];  // of `write`, or of the output's gradient
    float D[K];
    float beta[C];
    char pad[1024 - (K * 4 + C * 4) % 1024];
};
struct Smem {
    Stage stage[STAGES];
    u16 out[4][C * OUT_PITCH];
    u64 full[STAGES], empty[STAGES];
};
struct Arguments {
    const u16 *E, *Q, *W, *P;
    const float* D;
    const u16* rows;        // write, or the output's gradient: [tokens, HV, V]
    const void* strength;   // beta [tokens, HV], or null
    const float* state;     // [sequences, HV, K, V]; going back, the gradient of the last one
    u16* out;               // [tokens, HV, V]: the output; going back, the gradient of write
    float* state_out;
    u16* memories;
    const int *cu_seqlens, *chunk_offsets;
    int T, HV, V, gate, wide_strength;
};

enum { FORWARD, SAVE, REVERSE };

DEVICE Smem& smem() {
#ifdef WARP_ON_CPU
    return *(Smem*)cpu_shared;
#else
    extern __shared__ __align__(1024) char shared[];
    return *(Smem*)shared;
#endif
}

// Fragments of 16 rows of tokens, read as columns: [value channel, token].
DEVICE Quad turned_rows(const u16* rows, int w, int step, int lane) {
    int t = lane / 8;
    return load_tiles_transposed(rows + (16 * step + t % 2 * 8 + lane % 8) * V_PITCH + 16 * w + t / 2 * 8);
}

// [value channel, token] results go out as rows of tokens, 32 bytes from each warp.
DEVICE void put_rows(u16* staging, const float (&d)[32], u16* out, long long pitch, int count, int lane) {
    const int r = lane / 4, c = lane % 4;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            *(u32*)(staging + (8 * n + r) * OUT_PITCH + 8 * h + 2 * c) = transpose(pack(d[4 * n + 2 * h], d[4 * n + 2 * h + 1]));
    warp_barrier();
#pragma unroll
    for (int x = 0; x < 4; x++) {
        int row = (lane + 32 * x) / 2, half = lane % 2;
        if (row < count) *(Quad*)(out + row * pitch + 8 * half) = *(const Quad*)(staging + row * OUT_PITCH + 8 * half);
    }
    warp_barrier();
}

template <int MODE> DEVICE void walk(const Arguments& a) {
    Smem& s = smem();
    const int lane = threadIdx.x % 32, w = threadIdx.x / 32, r = lane / 4, c = lane % 4;
    const int n = blockIdx.x / a.HV, head = blockIdx.x % a.HV, V = a.V, HV = a.HV;
    long long start, first;
    int tokens;
    if (a.chunk_offsets == nullptr) {
        tokens = a.T;
        start = (long long)n * a.T;
        first = (long long)n * ((a.T + C - 1) / C);
    } else {
        start = a.cu_seqlens[n];
        tokens = a.cu_seqlens[n + 1] - a.cu_seqlens[n];
        first = a.chunk_offsets[n];
    }
    const int chunks = (tokens + C - 1) / C;
    if (threadIdx.x == 0) {
        for (int x = 0; x < STAGES; x++) barrier_init(&s.full[x], 65), barrier_init(&s.empty[x], 4);
        barrier_fence();
    }
    block_barrier();

    if (w == 4) {
        // A small load takes longer than the copies of a whole chunk: the strengths are fetched one chunk ahead.
        float beta[2] = {}, next[2];
        for (int i = -1; i < chunks; i++) {
            const int ahead = i + 1;
#pragma unroll
            for (int y = 0; y < 2; y++) {
                const int row = lane + 32 * y;
                const bool inside = ahead < chunks && ahead * C + row < tokens;
                next[y] = inside ? 1.0f : 0.0f;
                if (MODE != REVERSE && a.strength && inside) {
                    const long long at = (start + ahead * C + row) * HV + head;
                    next[y] = a.wide_strength ? ((const float*)a.strength)[at] : one((const u16*)a.strength + at);
                }
            }
            if (i >= 0) {
                const int chunk = MODE == REVERSE ? chunks - 1 - i : i, x = i % STAGES, count = min(C, tokens - chunk * C);
                const long long tile = (first + chunk) * HV + head;
                Stage& g = s.stage[x];
                wait(&s.empty[x], (i / STAGES + 1) & 1);
                if (lane == 0) {
                    const int big = MODE == SAVE ? 2 : 3;
                    arrive_expecting(&s.full[x], big * 2 * C * K + (MODE == SAVE ? 0 : 2 * C * C) + 4 * K);
                    bulk_copy(g.E, a.E + tile * C * K, 2 * C * K, &s.full[x]);
                    bulk_copy(g.W, a.W + tile * C * K, 2 * C * K, &s.full[x]);
                    if (MODE != SAVE) bulk_copy(g.Q, a.Q + tile * C * K, 2 * C * K, &s.full[x]);
                    if (MODE != SAVE) bulk_copy(g.P, a.P + tile * C * C, 2 * C * C, &s.full[x]);
                    bulk_copy(g.D, a.D + tile * K, 4 * K, &s.full[x]);
                }
                const u16* rows = a.rows + ((start + chunk * C) * HV + head) * V + 64 * blockIdx.y + 8 * (lane % 8);
#pragma unroll
                for (int y = 0; y < 16; y++) {
                    const int row = lane / 8 + 4 * y;
                    if (row < count) lane_copy(g.rows + row * V_PITCH + 8 * (lane % 8), rows + (long long)row * HV * V);
                }
#pragma unroll
                for (int y = 0; y < 2; y++) g.beta[lane + 32 * y] = a.gate && MODE != REVERSE ? sigmoid(beta[y]) : beta[y];
                arrive(&s.full[x]);
                arrive_when_copied(&s.full[x]);
            }
            beta[0] = next[0], beta[1] = next[1];
        }
        return;
    }

    float S[S_REGS];
    const int v = 64 * blockIdx.y + 16 * w + r;
    const long long state_at = (long long)blockIdx.x * K * V;
#pragma unroll
    for (int x = 0; x < S_REGS; x++)
        S[x] = a.state[state_at + (long long)(x / 4 * 8 + 2 * c + x % 2) * V + v + x % 4 / 2 * 8];

    for (int i = 0; i < chunks; i++) {
        const int chunk = MODE == REVERSE ? chunks - 1 - i : i, x = i % STAGES, count = min(C, tokens - chunk * C);
        const long long tile = (first + chunk) * HV + head;
        const long long out_at = ((start + chunk * C) * HV + head) * V + 64 * blockIdx.y + 16 * w;
        const Stage& g = s.stage[x];
        u32 S2[S_REGS / 2];
#pragma unroll
        for (int y = 0; y < S_REGS / 2; y++) S2[y] = pack(S[2 * y], S[2 * y + 1]);
        if (MODE != FORWARD)
#pragma unroll
            for (int y = 0; y < K / 16; y++)
                *(Quad*)(a.memories + ((tile * (V / 16) + 4 * blockIdx.y + w) * (K / 16) + y) * 256 + 8 * lane) =
                    Quad{{S2[4 * y], S2[4 * y + 1], S2[4 * y + 2], S2[4 * y + 3]}};
        wait(&s.full[x], (i / STAGES) & 1);
#pragma unroll
        for (int y = 0; y < S_REGS; y += 4) {
            float d0 = g.D[2 * y + 2 * c], d1 = g.D[2 * y + 2 * c + 1];
            S[y] *= d0, S[y + 1] *= d1, S[y + 2] *= d0, S[y + 3] *= d1;
        }

        if (MODE != REVERSE) {
            float fresh[32], o[32] = {};
#pragma unroll
            for (int step = 0; step < 4; step++) {
                Quad rows = turned_rows(g.rows, w, step, lane);
#pragma unroll
                for (int y = 0; y < 4; y++) {
                    const int m = 2 * step + y % 2, token = 8 * m + 2 * c;
                    float b0 = g.beta[token], b1 = g.beta[token + 1];
                    fresh[4 * m + y / 2 * 2] = token < count ? b0 * low(rows.x[y]) : 0.0f;
                    fresh[4 * m + y / 2 * 2 + 1] = token + 1 < count ? b1 * high(rows.x[y]) : 0.0f;
                }
            }
            if (MODE == FORWARD) settle(o);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < K / 16; step++) wgmma<false, true>(fresh, S2 + 4 * step, by_columns(g.E, step));
            wgmma_commit();
            if (MODE == FORWARD) {
#pragma unroll
                for (int step = 0; step < K / 16; step++) wgmma<false, false>(o, S2 + 4 * step, by_columns(g.Q, step));
                wgmma_commit();
            }
            if (MODE == FORWARD) wgmma_wait<1>(); else wgmma_wait<0>();
            u32 fresh2[16];
#pragma unroll
            for (int y = 0; y < 16; y++) fresh2[y] = pack(fresh[2 * y], fresh[2 * y + 1]);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) wgmma<true, false>(S, fresh2 + 4 * step, by_rows(g.W, step));
            wgmma_commit();
            if (MODE == FORWARD) {
#pragma unroll
                for (int step = 0; step < 4; step++) wgmma<true, false>(o, fresh2 + 4 * step, by_rows(g.P, step));
                wgmma_commit();
            }
            wgmma_wait<0>();
            if (lane == 0) arrive(&s.empty[x]);
            if (MODE == FORWARD) put_rows(s.out[w], o, a.out + out_at, (long long)HV * V, count, lane);
        } else {
            u32 rows2[16];
            float dw[32];
#pragma unroll
            for (int step = 0; step < 4; step++) {
                Quad rows = turned_rows(g.rows, w, step, lane);
                const int token = 16 * step + 2 * c;
                if (count < C)
#pragma unroll
                    for (int y = 0; y < 4; y++) {
                        u32 keep = (token + y % 2 * 8 < count ? 0xffffu : 0u) | (token + y % 2 * 8 + 1 < count ? 0xffff0000u : 0u);
                        rows.x[y] &= keep;
                    }
                rows2[4 * step] = rows.x[0], rows2[4 * step + 1] = rows.x[2];
                rows2[4 * step + 2] = rows.x[1], rows2[4 * step + 3] = rows.x[3];
            }
#pragma unroll
            for (int y = 0; y < 32; y++) dw[y] = 0.0f;
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < K / 16; step++) wgmma<false, false>(dw, S2 + 4 * step, by_columns(g.W, step));
#pragma unroll
            for (int step = 0; step < 4; step++) wgmma<false, false>(dw, rows2 + 4 * step, by_columns(g.P, step));
            wgmma_commit();
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) wgmma<true, false>(S, rows2 + 4 * step, by_rows(g.Q, step));
            wgmma_commit();
            wgmma_wait<1>();
            u32 dw2[16];
#pragma unroll
            for (int y = 0; y < 16; y++) dw2[y] = pack(dw[2 * y], dw[2 * y + 1]);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) wgmma<true, true>(S, dw2 + 4 * step, by_rows(g.E, step));
            wgmma_commit();
            put_rows(s.out[w], dw, a.out + out_at, (long long)HV * V, count, lane);
            wgmma_wait<0>();
            if (lane == 0) arrive(&s.empty[x]);
        }
    }
    if (MODE != SAVE)
#pragma unroll
        for (int x = 0; x < S_REGS; x++)
            a.state_out[state_at + (long long)(x / 4 * 8 + 2 * c + x % 2) * V + v + x % 4 / 2 * 8] = S[x];
}

extern "C" __global__ void __launch_bounds__(160, 1) chain_forward(const __grid_constant__ Arguments a) { walk<FORWARD>(a); }
extern "C" __global__ void __launch_bounds__(160, 1) chain_save(const __grid_constant__ Arguments a) { walk<SAVE>(a); }
extern "C" __global__ void __launch_bounds__(160, 1) chain_reverse(const __grid_constant__ Arguments a) { walk<REVERSE>(a); }
