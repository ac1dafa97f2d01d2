// Gradients inside a chunk, once the walks have left the memory before it (h) and the gradient after it (dS); what the two
// kernels of gradient.py in the Triton room compute, in one.
//
// Grid     (chunk x value head), 8 warps: warp (w, z) holds tokens 16 w + r and 16 w + r + 8; the two z share the channels.
// First    fresh = M (write - E h), dP = do fresh^T, dA = -dw fresh^T: products with 16 tokens a warp.
// Then     16 key channels at a time. A row's gradient from whole blocks and from the memory is gathered by Horner's rule,
//          x <- x total_J + dP_J k_J, so no product of totals is ever formed twice; inside 16 tokens level by level.
// Decays   d log_decay goes back through the tree of decays: what a level's rows leave is summed over blocks by one exchange
//          a level. A token's own term q_i . k_i carries no decay and never enters.
// ERASE    0: erase = beta k, write = beta v.  1: vectors.
#include "warp.cuh"

#ifndef ERASE
#define ERASE 0
#endif
#ifndef KEY_DIM
#define KEY_DIM 128
#endif
constexpr int C = 64, K = KEY_DIM, VMAX = 128, PITCH = 72, X_PITCH = 24;

struct Arguments {
    const u16 *q, *k;
    const void *erase, *g;
    const float *A_log, *dt_bias;
    const u16* write;
    const float* norms;
    const u16 *E, *M, *d_out, *d_write, *memories, *d_memories;
    u16 *dq, *dk, *dv;  // dq, dk: [tokens, HV, K]
    void *dg, *d_erase;
    float *dA_log, *d_bias;  // per tile
    const int *cu_seqlens, *chunk_offsets;
    int T, N, H, HV, V;
    float scale, floor;
    int gate, wide_g, wide_erase;
};

struct Exchange {  // between the four warps of one z
    u16 k_until[C * X_PITCH], q_since[C * X_PITCH], e_since[C * X_PITCH];
    float total[4][16], part[4][4][16];  // part[block][warp]: what warp's rows add to the gradient of log total[block]
};
struct Smem {
    u16 d_out[C * VMAX], d_write[C * VMAX], fresh[C * VMAX];  // fresh: first E
    union {
        u16 R[C * VMAX];
        Exchange exchange[2];
    };
    u16 M[C * C];
    u16 dP[C * PITCH], dA[C * PITCH];
    float beta[C], d_beta[2][C], q_along[2][C], k_along[2][C], dA_log[8];
};

DEVICE u32 pair_at(const u16* p) { return *(const u32*)p; }

extern "C" __global__ void __launch_bounds__(256, 2) gradient(const __grid_constant__ Arguments a) {
#ifdef WARP_ON_CPU
    Smem& s = *(Smem*)cpu_shared;
#else
    extern __shared__ __align__(128) char shared[];
    Smem& s = *(Smem*)shared;
#endif
    const int lane = threadIdx.x % 32, w = threadIdx.x / 32 % 4, z = threadIdx.x / 128, r = lane / 4, c = lane % 4;
    const int HV = a.HV, V = a.V, head = blockIdx.x % HV, gate = a.gate;
    const long long tile = blockIdx.x;
    const Chunk at = find_chunk(blockIdx.x / HV, a.cu_seqlens, a.chunk_offsets, a.T, a.N, C);
    if (at.count <= 0) return;
    const int t8 = lane / 8, l8 = lane % 8;
    // Tiles of 16 rows and 16 columns of a swizzled workspace: pieces 2 y and 2 y + 1 of 8 lie at (2 y ^ turn).
    const int my_rows = (16 * w + lane % 16) * 64, turn = lane / 16 ^ l8;

    for (int x = threadIdx.x; x < C * V / 8; x += 256) {
        int row = x / (V / 8), piece = x % (V / 8);
        long long from = ((at.start + row) * HV + head) * V + 8 * piece;
        Quad zero = {{0, 0, 0, 0}};
        *(Quad*)(s.d_out + image(row, piece)) = row < at.count ? *(const Quad*)(a.d_out + from) : zero;
        *(Quad*)(s.d_write + image(row, piece)) = row < at.count ? *(const Quad*)(a.d_write + from) : zero;
    }
    for (int x = threadIdx.x; x < C * K / 8; x += 256) *(Quad*)(s.fresh + 8 * x) = *(const Quad*)(a.E + tile * C * K + 8 * x);
    for (int x = threadIdx.x; x < C * C / 8; x += 256) *(Quad*)(s.M + 8 * x) = *(const Quad*)(a.M + tile * C * C + 8 * x);
    if (ERASE == 0 && threadIdx.x < C) {
        float beta = 0.0f;
        if (threadIdx.x < at.count) {
            long long token = (at.start + threadIdx.x) * HV + head;
            beta = a.wide_erase ? ((const float*)a.erase)[token] : one((const u16*)a.erase + token);
            if (gate) beta = sigmoid(beta);
        }
        s.beta[threadIdx.x] = beta;
    }
    block_barrier();

    const int row[2] = {16 * w + r, 16 * w + r + 8};
    const bool inside[2] = {row[0] < at.count, row[1] < at.count};
    float beta[2] = {1.0f, 1.0f}, d_beta[2] = {};
    if (ERASE == 0) beta[0] = s.beta[row[0]], beta[1] = s.beta[row[1]];
    const int key_head = head / (HV / a.H);
    const long long key_row = ((at.start + row[0]) * a.H + key_head) * K + 2 * c, key_next = 8ll * a.H * K;
    const long long value_row = ((at.start + row[0]) * HV + head) * K + 2 * c, value_next = 8ll * HV * K;

    {  // R = write - E h, in rows
        Quad e[K / 16];
#pragma unroll
        for (int step = 0; step < K / 16; step++)
            e[step] = load_tiles(s.fresh + image(16 * w + lane % 16, 2 * step + lane / 16));
#pragma unroll 1
        for (int group = z; group < V / 16; group += 2) {
            float x[2][4] = {};
            const u16* h = a.memories + (tile * (V / 16) + group) * (K / 16) * 256 + 8 * lane;
            Quad ahead[K / 16];
#pragma unroll
            for (int step = 0; step < K / 16; step++) ahead[step] = *(const Quad*)(h + 256 * step);
#pragma unroll
            for (int step = 0; step < K / 16; step++) {
                const Quad& b = ahead[step];
                mma(x[0], e[step].x[0], e[step].x[1], e[step].x[2], e[step].x[3], b.x[0], b.x[2]);
                mma(x[1], e[step].x[0], e[step].x[1], e[step].x[2], e[step].x[3], b.x[1], b.x[3]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    u32 write = 0;
                    int piece = image(row[i], 2 * group + n) + 2 * c;
                    if (inside[i]) {
                        long long from = ((at.start + row[i]) * HV + head) * V + 16 * group + 8 * n + 2 * c;
                        write = pair_at(a.write + from);
                        if (ERASE == 0) {
                            u32 dw = pair_at(s.d_write + piece);
                            d_beta[i] += low(dw) * low(write) + high(dw) * high(write);
                            *(u32*)(a.dv + from) = pack(beta[i] * low(dw), beta[i] * high(dw));
                        }
                    }
                    *(u32*)(s.R + piece) = pack(beta[i] * low(write) - x[n][2 * i], beta[i] * high(write) - x[n][2 * i + 1]);
                }
        }
    }
    block_barrier();
    {  // fresh = M R
        Quad m[4];
#pragma unroll
        for (int J = 0; J < 4; J++)
            if (J <= w) m[J] = load_tiles_transposed(s.M + image(16 * J + t8 / 2 * 8 + l8, 2 * w + t8 % 2));
#pragma unroll 1
        for (int group = z; group < V / 16; group += 2) {
            float x[2][4] = {};
#pragma unroll
            for (int J = 0; J < 4; J++)
                if (J <= w) {
                    Quad b = load_tiles_transposed(s.R + image(16 * J + lane % 16, 2 * group + lane / 16));
                    mma(x[0], m[J].x[0], m[J].x[1], m[J].x[2], m[J].x[3], b.x[0], b.x[1]);
                    mma(x[1], m[J].x[0], m[J].x[1], m[J].x[2], m[J].x[3], b.x[2], b.x[3]);
                }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int n = 0; n < 2; n++)
                    *(u32*)(s.fresh + image(row[i], 2 * group + n) + 2 * c) = pack(x[n][2 * i], x[n][2 * i + 1]);
        }
    }
    block_barrier();
    {  // scale dP, and dA
        const u16* rows = z ? s.d_write : s.d_out;
        u16* out = z ? s.dA : s.dP;
        const float factor = z ? -1.0f : a.scale;
#pragma unroll 1
        for (int J = 0; J <= w; J++) {
            float x[2][4] = {};
#pragma unroll 1
            for (int group = 0; group < V / 16; group++) {
                Quad d = load_tiles(rows + image(16 * w + lane % 16, 2 * group + lane / 16));
                Quad b = load_tiles(s.fresh + image(16 * J + t8 / 2 * 8 + l8, 2 * group + t8 % 2));
                mma(x[0], d.x[0], d.x[1], d.x[2], d.x[3], b.x[0], b.x[1]);
                mma(x[1], d.x[0], d.x[1], d.x[2], d.x[3], b.x[2], b.x[3]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    int j = 16 * J + 8 * n + 2 * c;
                    float x0 = j + z <= row[i] ? factor * x[n][2 * i] : 0.0f, x1 = j + 1 + z <= row[i] ? factor * x[n][2 * i + 1] : 0.0f;
                    *(u32*)(out + row[i] * PITCH + j) = pack(x0, x1);
                }
        }
    }
    block_barrier();

    // The warp's own 16 x 16 block of dP and dA, as it is and transposed: its two 8 x 8 diagonal tiles, and the tile where
    // the later eight meet the earlier. What a level needs of the diagonal tiles is cut out by a mask.
    u32 P_tile[3], A_tile[3], Pt_tile[3], At_tile[3], mask[3], mask_t[3];
    float own[2];
    {
        Quad x = load_tiles(s.dP + (16 * w + lane % 16) * PITCH + 16 * w + lane / 16 * 8);
        P_tile[0] = x.x[0], P_tile[1] = x.x[3], P_tile[2] = x.x[1];
        x = load_tiles(s.dA + (16 * w + lane % 16) * PITCH + 16 * w + lane / 16 * 8);
        A_tile[0] = x.x[0], A_tile[1] = x.x[3], A_tile[2] = x.x[1];
#pragma unroll
        for (int y = 0; y < 3; y++) {
            Pt_tile[y] = transpose(P_tile[y]), At_tile[y] = transpose(A_tile[y]);
            if (ERASE == 0) {  // columns are the tokens that erase
                int i = 16 * w + (y ? 8 : 0) + 2 * c;
                At_tile[y] = times(At_tile[y], pack(s.beta[i], s.beta[i + 1]));
            }
            u32 early = 0, late = 0;
#pragma unroll
            for (int x = 0; x < 2; x++) {
                int apart = r ^ (2 * c + x), level = apart & 4 ? 2 : apart & 2 ? 1 : 0;
                if (apart && level == y) (r > 2 * c + x ? late : early) |= x ? 0xffff0000u : 0xffffu;
            }
            mask[y] = late, mask_t[y] = early;
        }
        own[0] = one(s.dP + row[0] * PITCH + row[0]), own[1] = one(s.dP + row[1] * PITCH + row[1]);
    }
    const float rate = gate ? exp_(a.A_log[head]) : 0.0f;
    float q_norm[2] = {1.0f, 1.0f}, k_norm[2] = {1.0f, 1.0f}, q_along[2] = {}, k_along[2] = {}, dA_log = 0.0f;
    if (gate)
#pragma unroll
        for (int i = 0; i < 2; i++) q_norm[i] = a.norms[tile * 2 * C + row[i]], k_norm[i] = a.norms[tile * 2 * C + C + row[i]];
    const bool late[3] = {(r & 1) != 0, (r & 2) != 0, (r & 4) != 0};
    Exchange& ex = s.exchange[z];

#pragma unroll 1
    for (int step = z * (K / 32); step < (z + 1) * (K / 32); step++) {
        // From the memory: do h, -dw h, fresh dS.
        float dq[2][4] = {}, de[2][4] = {}, dk[2][4] = {}, dD[4] = {};
        const u16 *h_from = a.memories + (tile * (V / 16) * (K / 16) + step) * 256 + 8 * lane;
        const u16 *dS_from = a.d_memories + (tile * (V / 16) * (K / 16) + step) * 256 + 8 * lane;
#pragma unroll 1
        for (int half = 0; half < V / 64; half++) {
            Quad h[4], dS[4];
#pragma unroll
            for (int y = 0; y < 4; y++) h[y] = *(const Quad*)(h_from + y * K * 16), dS[y] = *(const Quad*)(dS_from + y * K * 16);
            h_from += 4 * K * 16, dS_from += 4 * K * 16;
#pragma unroll
            for (int y = 0; y < 4; y++) {
                const int from = half * 4096 + my_rows + (2 * y ^ turn) * 8;
                Quad x = load_tiles(s.d_out + from), dw = load_tiles(s.d_write + from), u = load_tiles(s.fresh + from);
                if (y == w)
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        dD[n / 2 * 2] += low(h[y].x[n]) * low(dS[y].x[n]);
                        dD[n / 2 * 2 + 1] += high(h[y].x[n]) * high(dS[y].x[n]);
                    }
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    u32 b0 = transpose(h[y].x[2 * n]), b1 = transpose(h[y].x[2 * n + 1]);
                    mma(dq[n], x.x[0], x.x[1], x.x[2], x.x[3], b0, b1);
                    mma(de[n], dw.x[0], dw.x[1], dw.x[2], dw.x[3], b0, b1);
                    b0 = transpose(dS[y].x[2 * n]), b1 = transpose(dS[y].x[2 * n + 1]);
                    mma(dk[n], u.x[0], u.x[1], u.x[2], u.x[3], b0, b1);
                }
            }
        }
        // The rows of these 16 channels: element (i, n, x) is row[i], channel 16 step + 8 n + 2 c + x.
        u32 q2[2][2], k2[2][2], e2[2][2];
        float since[2][4], until[2][4], total[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                q2[i][n] = k2[i][n] = e2[i][n] = 0;
                float g0 = 0.0f, g1 = 0.0f;
                const int channel = 16 * step + 8 * n + 2 * c;
                if (inside[i]) {
                    const long long key_at = key_row + i * key_next + 16 * step + 8 * n;
                    const long long value_at = value_row + i * value_next + 16 * step + 8 * n;
                    q2[i][n] = pair_at(a.q + key_at), k2[i][n] = pair_at(a.k + key_at);
                    if (ERASE) e2[i][n] = pair_at((const u16*)a.erase + value_at);
                    if (a.wide_g) g0 = ((const float*)a.g)[value_at], g1 = ((const float*)a.g)[value_at + 1];
                    else g0 = low(pair_at((const u16*)a.g + value_at)), g1 = high(pair_at((const u16*)a.g + value_at));
                    if (gate) {
                        g0 += a.dt_bias[head * K + channel], g1 += a.dt_bias[head * K + channel + 1];
                        g0 = gate == 1 ? -rate * softplus(g0) : a.floor * sigmoid(rate * g0);
                        g1 = gate == 1 ? -rate * softplus(g1) : a.floor * sigmoid(rate * g1);
                        q2[i][n] = pack(low(q2[i][n]) * q_norm[i], high(q2[i][n]) * q_norm[i]);
                        k2[i][n] = pack(low(k2[i][n]) * k_norm[i], high(k2[i][n]) * k_norm[i]);
                    }
                }
                if (ERASE == 0) e2[i][n] = k2[i][n];
                since[i][2 * n] = total[i][2 * n] = exp_(g0), since[i][2 * n + 1] = total[i][2 * n + 1] = exp_(g1);
                until[i][2 * n] = until[i][2 * n + 1] = 1.0f;
            }
        u32 f[4][2][2];  // the factor of each row at levels 1, 2, 4, 8
#pragma unroll
        for (int level = 0; level < 3; level++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int n = 0; n < 2; n++)
                    f[level][i][n] = pack(late[level] ? since[i][2 * n] : until[i][2 * n], late[level] ? since[i][2 * n + 1] : until[i][2 * n + 1]);
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    float other = swap_lanes(total[i][x], 4 << level);
                    if (late[level]) since[i][x] *= other; else until[i][x] *= other;
                    total[i][x] *= other;
                }
            }
#pragma unroll
        for (int n = 0; n < 2; n++) f[3][0][n] = pack(until[0][2 * n], until[0][2 * n + 1]), f[3][1][n] = pack(since[1][2 * n], since[1][2 * n + 1]);
#pragma unroll
        for (int x = 0; x < 4; x++) {
            since[1][x] *= total[0][x], until[0][x] *= total[1][x];
            if (r == 0) ex.total[w][8 * (x / 2) + 2 * c + x % 2] = total[0][x] * total[1][x];
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const int to = row[i] * X_PITCH + 8 * n + 2 * c;
                *(u32*)(ex.k_until + to) = times(k2[i][n], pack(until[i][2 * n], until[i][2 * n + 1]));
                *(u32*)(ex.q_since + to) = times(q2[i][n], pack(since[i][2 * n], since[i][2 * n + 1]));
                *(u32*)(ex.e_since + to) = times(e2[i][n], pack(beta[i] * since[i][2 * n], beta[i] * since[i][2 * n + 1]));
            }
        group_barrier(z);

        // Other blocks, and the memory: Horner's rule towards this one. `part`: what passes through a block's total.
        float part[4][4];
#pragma unroll
        for (int J = 0; J < 4; J++)
#pragma unroll
            for (int x = 0; x < 4; x++) part[J][x] = 0.0f;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int x = 0; x < 4; x++) dq[n][x] *= a.scale, de[n][x] = -de[n][x];
#define ELEMENT(d, i, x) d[(x) / 2][2 * (i) + (x) % 2]
#define VALUE(p, i, x) ((x) % 2 ? high(p[i][(x) / 2]) : low(p[i][(x) / 2]))
#pragma unroll
        for (int J = 0; J < 3; J++)
            if (J < w) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const float total_J = ex.total[J][8 * (x / 2) + 2 * c + x % 2];
#pragma unroll
                    for (int i = 0; i < 2; i++) ELEMENT(dq, i, x) *= total_J, ELEMENT(de, i, x) *= total_J;
#pragma unroll
                    for (int before = 0; before < J; before++) part[before][x] *= total_J;
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        part[J][x] += since[i][x] * (VALUE(q2, i, x) * ELEMENT(dq, i, x) + beta[i] * VALUE(e2, i, x) * ELEMENT(de, i, x));
                }
                Quad p = load_tiles(s.dP + (16 * w + lane % 16) * PITCH + 16 * J + lane / 16 * 8);
                Quad d = load_tiles(s.dA + (16 * w + lane % 16) * PITCH + 16 * J + lane / 16 * 8);
                Quad b = load_tiles_transposed(ex.k_until + (16 * J + lane % 16) * X_PITCH + lane / 16 * 8);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    mma(dq[n], p.x[0], p.x[1], p.x[2], p.x[3], b.x[2 * n], b.x[2 * n + 1]);
                    mma(de[n], d.x[0], d.x[1], d.x[2], d.x[3], b.x[2 * n], b.x[2 * n + 1]);
                }
            }
        // What the chunk's end asks of these rows passes through all later totals; pairs of blocks are counted above.
#pragma unroll
        for (int x = 0; x < 4; x++) {
            float sum = until[0][x] * VALUE(k2, 0, x) * ELEMENT(dk, 0, x) + until[1][x] * VALUE(k2, 1, x) * ELEMENT(dk, 1, x);
#pragma unroll
            for (int I = 1; I < 4; I++)
                if (I > w) sum *= ex.total[I][8 * (x / 2) + 2 * c + x % 2];
#pragma unroll
            for (int I = 1; I < 4; I++)
                if (I > w) part[I][x] += sum;
        }
#pragma unroll
        for (int I = 3; I > 0; I--)
            if (I > w) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const float total_I = ex.total[I][8 * (x / 2) + 2 * c + x % 2];
#pragma unroll
                    for (int i = 0; i < 2; i++) ELEMENT(dk, i, x) *= total_I;
                }
                Quad p = load_tiles_transposed(s.dP + (16 * I + t8 / 2 * 8 + l8) * PITCH + 16 * w + t8 % 2 * 8);
                Quad d = load_tiles_transposed(s.dA + (16 * I + t8 / 2 * 8 + l8) * PITCH + 16 * w + t8 % 2 * 8);
                Quad b = load_tiles_transposed(ex.q_since + (16 * I + lane % 16) * X_PITCH + lane / 16 * 8);
                Quad e = load_tiles_transposed(ex.e_since + (16 * I + lane % 16) * X_PITCH + lane / 16 * 8);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    mma(dk[n], p.x[0], p.x[1], p.x[2], p.x[3], b.x[2 * n], b.x[2 * n + 1]);
                    mma(dk[n], d.x[0], d.x[1], d.x[2], d.x[3], e.x[2 * n], e.x[2 * n + 1]);
                }
            }
        float d_since[2][4], d_until[2][4], d_total[2][4];
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int channel = 8 * (x / 2) + 2 * c + x % 2;
            const float all = dD[x] * ex.total[0][channel] * ex.total[1][channel] * ex.total[2][channel] * ex.total[3][channel];
#pragma unroll
            for (int J = 0; J < 4; J++) {
                float sum = part[J][x] + all;
                sum += swap_lanes(sum, 4), sum += swap_lanes(sum, 8), sum += swap_lanes(sum, 16);
                if (r == 0) ex.part[J][w][channel] = sum;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                ELEMENT(dq, i, x) *= since[i][x], ELEMENT(de, i, x) *= since[i][x], ELEMENT(dk, i, x) *= until[i][x];
                d_since[i][x] = VALUE(q2, i, x) * ELEMENT(dq, i, x) + beta[i] * VALUE(e2, i, x) * ELEMENT(de, i, x);
                d_until[i][x] = VALUE(k2, i, x) * ELEMENT(dk, i, x);
            }
            d_total[0][x] = d_since[1][x], d_total[1][x] = d_until[0][x];
        }
        group_barrier(z);

        // Inside the 16 tokens, levels 8, 4, 2, 1.
#pragma unroll
        for (int level = 3; level >= 0; level--) {
            if (level < 3)
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int x = 0; x < 4; x++)
                        d_total[i][x] += swap_lanes(d_total[i][x] + (late[level] ? d_since[i][x] : d_until[i][x]), 4 << level);
            u32 P[2], A[2], Pt[2], At[2];
#pragma unroll
            for (int y = 0; y < 2; y++) {
                u32 lower = level < 3 ? mask[level] : 0u, upper = level < 3 ? mask_t[level] : 0u;
                P[y] = P_tile[y] & lower, A[y] = A_tile[y] & lower, Pt[y] = Pt_tile[y] & upper, At[y] = At_tile[y] & upper;
            }
            const u32 P_mid = level == 3 ? P_tile[2] : 0, A_mid = level == 3 ? A_tile[2] : 0;
            const u32 Pt_mid = level == 3 ? Pt_tile[2] : 0, At_mid = level == 3 ? At_tile[2] : 0;
#pragma unroll
            for (int n = 0; n < 2; n++) {
                u32 kf[2], qf[2], ef[2], kb[2], qb[2], eb[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    kf[i] = times(k2[i][n], f[level][i][n]), qf[i] = times(q2[i][n], f[level][i][n]);
                    ef[i] = ERASE ? times(e2[i][n], f[level][i][n]) : kf[i];
                    kb[i] = transpose(kf[i]), qb[i] = transpose(qf[i]), eb[i] = ERASE ? transpose(ef[i]) : kb[i];
                }
                float q_part[4] = {}, e_part[4] = {}, k_part[4] = {};
                mma(q_part, P[0], P_mid, 0, P[1], kb[0], kb[1]);
                mma(e_part, A[0], A_mid, 0, A[1], kb[0], kb[1]);
                mma(k_part, Pt[0], 0, Pt_mid, Pt[1], qb[0], qb[1]);
                mma(k_part, At[0], 0, At_mid, At[1], eb[0], eb[1]);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int y = 0; y < 2; y++) {
                        const int x = 2 * n + y, d = 2 * i + y;
                        const float factor = VALUE(f[level], i, x);
                        dq[n][d] += factor * q_part[d], de[n][d] += factor * e_part[d], dk[n][d] += factor * k_part[d];
                        const float kf_ = y ? high(kf[i]) : low(kf[i]), qf_ = y ? high(qf[i]) : low(qf[i]), ef_ = y ? high(ef[i]) : low(ef[i]);
                        const float sum = ERASE ? qf_ * q_part[d] + ef_ * e_part[d] + kf_ * k_part[d]
                                                : qf_ * q_part[d] + kf_ * (beta[i] * e_part[d] + k_part[d]);
                        if (level == 3 ? i == 1 : late[level % 3]) d_since[i][x] += sum; else d_until[i][x] += sum;
                    }
            }
        }

#pragma unroll
        for (int n = 0; n < 2; n++) {
            float d_bias[2] = {}, from_blocks[2];
#pragma unroll
            for (int y = 0; y < 2; y++) {
                const int here = 8 * n + 2 * c + y;
                from_blocks[y] = ex.part[w][0][here] + ex.part[w][1][here] + ex.part[w][2][here] + ex.part[w][3][here];
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float dg[2];
                const int channel = 16 * step + 8 * n + 2 * c;
                const long long value_at = value_row + i * value_next + 16 * step + 8 * n;
#pragma unroll
                for (int y = 0; y < 2; y++) {
                    const int x = 2 * n + y, d = 2 * i + y;
                    dg[y] = d_since[i][x] + d_total[i][x] + from_blocks[y];
                    dq[n][d] += own[i] * VALUE(k2, i, x);
                    dk[n][d] += own[i] * VALUE(q2, i, x);
                    if (ERASE == 0) {
                        d_beta[i] += VALUE(k2, i, x) * de[n][d];
                        dk[n][d] += beta[i] * de[n][d];
                    }
                    if (gate && inside[i]) {
                        float logit = a.wide_g ? ((const float*)a.g)[value_at + y] : one((const u16*)a.g + value_at + y);
                        logit += a.dt_bias[head * K + channel + y];
                        if (gate == 1) {
                            dA_log -= dg[y] * rate * softplus(logit);
                            dg[y] *= -rate * sigmoid(logit);
                        } else {
                            float f = sigmoid(rate * logit);
                            dg[y] *= a.floor * rate * f * (1.0f - f);
                            dA_log += dg[y] * logit;
                        }
                        d_bias[y] += dg[y];
                        q_along[i] += VALUE(q2, i, x) * dq[n][d], k_along[i] += VALUE(k2, i, x) * dk[n][d];
                    }
                }
                if (inside[i]) {
                    *(u32*)(a.dq + value_at) = pack(dq[n][2 * i], dq[n][2 * i + 1]);
                    *(u32*)(a.dk + value_at) = pack(dk[n][2 * i], dk[n][2 * i + 1]);
                    if (ERASE) *(u32*)((u16*)a.d_erase + value_at) = pack(de[n][2 * i], de[n][2 * i + 1]);
                    if (a.wide_g) ((float*)a.dg)[value_at] = dg[0], ((float*)a.dg)[value_at + 1] = dg[1];
                    else *(u32*)((u16*)a.dg + value_at) = pack(dg[0], dg[1]);
                }
            }
            if (gate)
#pragma unroll
                for (int y = 0; y < 2; y++) {
                    float sum = d_bias[y];
                    sum += swap_lanes(sum, 4), sum += swap_lanes(sum, 8), sum += swap_lanes(sum, 16);
                    if (r == 0) a.d_bias[(tile * 4 + w) * K + 16 * step + 8 * n + 2 * c + y] = sum;
                }
        }
        group_barrier(z);  // ex is written again
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = quad_sum(d_beta[i]), q_sum = quad_sum(q_along[i]), k_sum = quad_sum(k_along[i]);
        if (c == 0) s.d_beta[z][row[i]] = sum, s.q_along[z][row[i]] = q_sum, s.k_along[z][row[i]] = k_sum;
    }
    if (gate) {
        dA_log = quad_sum(dA_log);
        dA_log += swap_lanes(dA_log, 4), dA_log += swap_lanes(dA_log, 8), dA_log += swap_lanes(dA_log, 16);
        if (lane == 0) s.dA_log[4 * z + w] = dA_log;
    }
    block_barrier();
    if (ERASE == 0 && threadIdx.x < at.count) {
        const long long to = (at.start + threadIdx.x) * HV + head;
        float d = s.d_beta[0][threadIdx.x] + s.d_beta[1][threadIdx.x], b = s.beta[threadIdx.x];
        if (gate) d *= b * (1.0f - b);
        if (a.wide_erase) ((float*)a.d_erase)[to] = d; else ((u16*)a.d_erase)[to] = (u16)(pack(d, 0.0f) & 0xffffu);
    }
    if (gate) {  // through the L2 norms: what lies along the row itself goes
        if (threadIdx.x == 0) {
            float sum = 0.0f;
            for (int x = 0; x < 8; x++) sum += s.dA_log[x];
            a.dA_log[tile] = sum;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float qa = s.q_along[0][row[i]] + s.q_along[1][row[i]], ka = s.k_along[0][row[i]] + s.k_along[1][row[i]];
            if (inside[i])
#pragma unroll 1
                for (int x = z * (K / 16); x < (z + 1) * (K / 16); x++) {  // the same lane wrote these
                    const long long key_at = key_row + i * key_next + 8 * x, value_at = value_row + i * value_next + 8 * x;
                    u32 q = pair_at(a.q + key_at), k = pair_at(a.k + key_at), dq = pair_at(a.dq + value_at), dk = pair_at(a.dk + value_at);
                    *(u32*)(a.dq + value_at) = pack(q_norm[i] * (low(dq) - qa * q_norm[i] * low(q)), q_norm[i] * (high(dq) - qa * q_norm[i] * high(q)));
                    *(u32*)(a.dk + value_at) = pack(k_norm[i] * (low(dk) - ka * k_norm[i] * low(k)), k_norm[i] * (high(dk) - ka * k_norm[i] * high(k)));
                }
        }
    }
}
