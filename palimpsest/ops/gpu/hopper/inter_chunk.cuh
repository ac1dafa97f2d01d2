// The recurrence from chunk to chunk, forth and back: what ../triton/inter_chunk_fwd.py and inter_chunk_bwd.py compute, letter
// for letter.
//     FORWARD, SAVE   v_new' = write - E S         o = Q S + (P M) v_new'          S <- Diag(D) S + W^T v_new',   W = M^T K
//     REVERSE         dw = (P M)^T do + W dS       dS <- Diag(D) dS + Q^T do - E^T dw
// W and P M are prepared in `Tile` as W and P.
//
// Block    a task: a sequence and value head, for 64 GROUPS value channels. GROUPS times four warps compute, four copy ahead.
//          Float2 groups read a chunk's tiles once for 128 value channels; one leaves work for twice as many blocks.
// Holds    S transposed in fragments, fp32: always the first operand of a product, so no number of it ever moves. The
//          tiles E, W, Q, P lie in memory exactly as the tensor cores read them: a chunk is one plain copy.
// SAVE     and REVERSE leave the memory before (the gradient after) each chunk, as fragments: [tile, 16 value channels, 16 key channels,
//          lane, 4], which gradient.cu reads as it lies.
#include "hopper.cuh"

constexpr int STAGES = 3, S_REGS = K / 2, INTER_CHUNK_THREADS = 384, COPIERS = 4;  // the last four warps copy

template <int GROUPS> struct alignas(1024) Stage {
    static constexpr int PITCH = 64 * GROUPS + 8;
    Tile tile;
    u16 rows[C * PITCH];  // of `write`, or of the output's gradient; then of the results on their way out
};
template <int GROUPS> struct InterChunkShared {
    Stage<GROUPS> stage[STAGES];
    u64 full[STAGES], done[STAGES], empty[STAGES];  // all is there; E, W, Q have been read; the rest, and the results have left
};
struct InterChunkArguments {
    const Tile* tiles;      // their betas are 0 beyond the last token
    const u16* rows;        // write, or the output's gradient: [tokens, HV, V]
    const float* state;     // [sequences, HV, K, V], null for zeros; going back, the gradient of the last one
    u16* out;               // [tokens, HV, V]: the output, or R = write - E S; going back, the gradient of write
    float* state_out;
    u16* memories;
    const int *cu_seqlens, *chunk_offsets;
    int T, N, HV, V;
    DEVICE Layout layout() const { return {cu_seqlens, chunk_offsets, T, N, HV}; }
};

enum { FORWARD, SAVE, REVERSE };  // the output; R and the memories, for the backward; gradients, against time

// Fragments of 16 rows of tokens, read as columns: [value channel, token].
template <int PITCH> DEVICE Uint4 load_rows_transposed(const u16* rows, int w, int step, int lane) {
    int t = lane / 8;
    return load_tiles_transposed(rows + (16 * step + t % 2 * 8 + lane % 8) * PITCH + 16 * w + t / 2 * 8);
}

// [value channel, token] results go out as rows of tokens, 32 bytes from each warp, over the columns that it has read.
template <int PITCH> DEVICE void store_rows(u16* staging, const float (&d)[32], u16* out, long long pitch, int count, int lane) {
    const int r = lane / 4, c = lane % 4;
    warp_barrier();
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            *(u32*)(staging + (8 * n + r) * PITCH + 8 * h + 2 * c) = transpose(pack(d[4 * n + 2 * h], d[4 * n + 2 * h + 1]));
    warp_barrier();
#pragma unroll
    for (int x = 0; x < 4; x++) {
        int row = (lane + 32 * x) / 2, half = lane % 2;
        if (row < count) *(Uint4*)(out + row * pitch + 8 * half) = *(const Uint4*)(staging + row * PITCH + 8 * half);
    }
    warp_barrier();
}

// S times the chunk's decay of its channels.
template <int N> DEVICE void apply_decay(float (&S)[N], const float* D, int c) {
#pragma unroll
    for (int y = 0; y < N; y += 4) {
        const float d0 = D[2 * y + 2 * c], d1 = D[2 * y + 2 * c + 1];
        S[y] *= d0, S[y + 1] *= d1, S[y + 2] *= d0, S[y + 3] *= d1;
    }
}

// `ready`, if not null, says which tiles there are yet; `taken` counts those that were asked for.
template <int MODE, int GROUPS> DEVICE void inter_chunk(const InterChunkArguments& a, const int task, const int part, const int* ready, int* taken) {
    SHARED_MEMORY(InterChunkShared<GROUPS>, s);
    constexpr int PITCH = Stage<GROUPS>::PITCH;
    const int lane = threadIdx.x % 32, w = warp_index(), r = lane / 4, c = lane % 4;
    const int V = a.V, HV = a.HV, n = task / HV, head = task % HV;
    const Layout layout = a.layout();
    const int tokens = layout.tokens(n), chunks = layout.chunks(n);
    const long long start = layout.start(n), first = layout.first_chunk(n);
    const long long pitch = (long long)HV * V;  // from token to token
    if (threadIdx.x == 0) {
        for (int x = 0; x < STAGES; x++) {
            barrier_init(&s.full[x], 1 + 32 * COPIERS);
            barrier_init(&s.done[x], 4 * GROUPS), barrier_init(&s.empty[x], 4 * GROUPS);
        }
        barrier_fence();
    }
    block_barrier();
    if (w >= 8) {  // a share of the rows each; the first copies the tiles, too
        fewer_registers<40>();
        constexpr int PIECES = 8 * GROUPS, SHARE = C / COPIERS, DOWN = 32 / PIECES;  // pieces of a row, rows of a warp, rows at once
        const int copier = w - 8, piece = lane % PIECES, row = copier * SHARE + lane / PIECES;
        const long long rows_at = (start + row) * pitch + head * V + 64 * GROUPS * part + 8 * piece;
        for (int i = 0, known = 0; i < chunks; i++) {
            const int chunk = MODE == REVERSE ? chunks - 1 - i : i, x = i % STAGES, count = min(C, tokens - chunk * C);
            const long long tile = (first + chunk) * HV + head;
            const Tile& from_tile = a.tiles[tile];
            Stage<GROUPS>& g = s.stage[x];
            constexpr int BEGIN = (MODE == SAVE ? 2 : 3) * sizeof(g.tile.E), REST = MODE == SAVE ? 0 : sizeof(g.tile.P);
            constexpr int END = REST + sizeof(g.tile.D) + sizeof(g.tile.beta);
            if (copier == 0) {
                if (ready && i == known) known += wait_until_ready(ready + tile, HV, chunks - i, lane);
                if (lane == 0) {
                    wait(&s.done[x], (i / STAGES + 1) & 1);
                    expect(&s.full[x], BEGIN);
                    bulk_copy(g.tile.E, from_tile.E, BEGIN, &s.full[x]);
                    if (taken) count_one(taken);
                }
            }
            wait(&s.empty[x], (i / STAGES + 1) & 1);
            if (copier == 0 && lane == 0) {
                arrive_expecting(&s.full[x], END);
                bulk_copy((char*)g.tile.D - REST, (const char*)from_tile.D - REST, END, &s.full[x]);
            }
            const u16* from = a.rows + rows_at + chunk * C * pitch;
            u16* to = g.rows + row * PITCH + 8 * piece;
            if (count == C) {
#pragma unroll
                for (int y = 0; y < SHARE; y += DOWN, from += DOWN * pitch) lane_copy(to + y * PITCH, from, false);
            } else {  // zeros beyond the last token; their address stays inside
#pragma unroll 1
                for (int y = 0; y < SHARE; y += DOWN, from += DOWN * pitch)
                    lane_copy(to + y * PITCH, row + y < count ? from : a.rows + 8 * piece, row + y >= count);
            }
            arrive_when_copied(&s.full[x]);
        }
        return;
    }
    if (w >= 4 * GROUPS) {
        fewer_registers<40>();
        return;
    }
    more_registers<232>();
    const int v = 64 * GROUPS * part + 16 * w + r;
    float S[S_REGS];
    const long long state_at = (long long)task * K * V;
#pragma unroll
    for (int x = 0; x < S_REGS; x++)
        S[x] = a.state ? a.state[state_at + (long long)(x / 4 * 8 + 2 * c + x % 2) * V + v + x % 4 / 2 * 8] : 0.0f;

    float o[32] = {};  // of FORWARD: a chunk's output is finished, and leaves, while the next one's products run
    u32 v_new2[16] = {};
    const long long out_from = start * pitch + head * V + 64 * GROUPS * part + 16 * w;
    const auto multiply_v_new = [&](int x) {  // o += v_new P
#pragma unroll
        for (int step = 0; step < 4; step++) wgmma<true, false>(o, v_new2 + 4 * step, by_rows(s.stage[x].tile.P, step));
    };
    const auto store = [&](const float (&d)[32], int chunk, int x) {
        store_rows<PITCH>(s.stage[x].rows + 16 * w, d, a.out + out_from + chunk * C * pitch, pitch, min(C, tokens - chunk * C), lane);
    };
    const auto store_output = [&](int chunk, int x) {
        store(o, chunk, x);
        if (lane == 0) arrive(&s.empty[x]);
    };
    for (int i = 0; i < chunks; i++) {
        const int chunk = MODE == REVERSE ? chunks - 1 - i : i, x = i % STAGES, before = (i + STAGES - 1) % STAGES;
        const long long tile = (first + chunk) * HV + head;
        Stage<GROUPS>& g = s.stage[x];
        u32 S2[S_REGS / 2];
        pack_all(S2, S);
        if (MODE != FORWARD)
#pragma unroll
            for (int y = 0; y < K / 16; y++)
                *(Uint4*)(a.memories + ((tile * (V / 16) + 4 * GROUPS * part + w) * (K / 16) + y) * 256 + 8 * lane) =
                    Uint4{{S2[4 * y], S2[4 * y + 1], S2[4 * y + 2], S2[4 * y + 3]}};
        wait(&s.full[x], (i / STAGES) & 1);
        apply_decay(S, g.tile.D, c);

        if (MODE != REVERSE) {
            float v_new[32];
#pragma unroll
            for (int step = 0; step < 4; step++) {
                Uint4 rows = load_rows_transposed<PITCH>(g.rows, w, step, lane);
#pragma unroll
                for (int y = 0; y < 4; y++) {
                    const int m = 2 * step + y % 2, token = 8 * m + 2 * c;
                    v_new[4 * m + y / 2 * 2] = g.tile.beta[token] * low(rows.x[y]);
                    v_new[4 * m + y / 2 * 2 + 1] = g.tile.beta[token + 1] * high(rows.x[y]);
                }
            }
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < K / 16; step++) wgmma<false, true>(v_new, S2 + 4 * step, by_columns(g.tile.E, step));
            if (MODE == FORWARD) multiply_v_new(i > 0 ? before : x);  // of the chunk before; at the first, nobody takes it
            wgmma_commit();
            wgmma_wait<0>();
            pack_all(v_new2, v_new);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) wgmma<true, false>(S, v_new2 + 4 * step, by_rows(g.tile.W, step));
            wgmma_commit();
            if (MODE == FORWARD) {
                if (i > 0) store_output(i - 1, before);
#pragma unroll
                for (int y = 0; y < 32; y++) o[y] = 0.0f;
                settle(o);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < K / 16; step++) wgmma<false, false>(o, S2 + 4 * step, by_columns(g.tile.Q, step));
                wgmma_commit();
            }
            if (MODE == SAVE) store(v_new, chunk, x);
            wgmma_wait<0>();
            if (lane == 0) arrive(&s.done[x]);
            if (MODE == SAVE && lane == 0) arrive(&s.empty[x]);
        } else {
            u32 rows2[16];
            float dw[32];
#pragma unroll
            for (int step = 0; step < 4; step++) {
                Uint4 rows = load_rows_transposed<PITCH>(g.rows, w, step, lane);
                rows2[4 * step] = rows.x[0], rows2[4 * step + 1] = rows.x[2];
                rows2[4 * step + 2] = rows.x[1], rows2[4 * step + 3] = rows.x[3];
            }
#pragma unroll
            for (int y = 0; y < 32; y++) dw[y] = 0.0f;
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < K / 16; step++) wgmma<false, false>(dw, S2 + 4 * step, by_columns(g.tile.W, step));
#pragma unroll
            for (int step = 0; step < 4; step++) wgmma<false, false>(dw, rows2 + 4 * step, by_columns(g.tile.P, step));
            wgmma_commit();
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) wgmma<true, false>(S, rows2 + 4 * step, by_rows(g.tile.Q, step));
            wgmma_commit();
            wgmma_wait<1>();
            u32 dw2[16];
            pack_all(dw2, dw);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) wgmma<true, true>(S, dw2 + 4 * step, by_rows(g.tile.E, step));
            wgmma_commit();
            store(dw, chunk, x);
            wgmma_wait<0>();
            if (lane == 0) arrive(&s.done[x]), arrive(&s.empty[x]);
        }
    }
    if (MODE == FORWARD && chunks > 0) {
        const int x = (chunks - 1) % STAGES;
        wgmma_fence();
        multiply_v_new(x);
        wgmma_commit();
        wgmma_wait<0>();
        store_output(chunks - 1, x);
    }
    if (MODE != SAVE)
#pragma unroll
        for (int x = 0; x < S_REGS; x++)
            a.state_out[state_at + (long long)(x / 4 * 8 + 2 * c + x % 2) * V + v + x % 4 / 2 * 8] = S[x];
}
