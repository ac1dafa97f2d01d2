// Gradients inside a chunk, once inter_chunk.cu has left the memory before it (h), the gradient after it (dS) and
// R = write - E h; what the two kernels of ../triton/gradient.py compute, in one.
//
// Grid     (chunk x value head), 8 warps: warp (w, z) holds 16 tokens from 16 w on; the two z share the channels.
// First    v_new = M R,   dP_ij = do_i . v_new_j (j <= i),   dA_ij = -dw_i . v_new_j (j < i): products with 16 tokens a warp.
// Then     16 key channels at a time. Products leave 16 x 16 sums in fragments; they cross to lanes that hold four tokens of
//          two channels each (lane = 8 t + l: tokens 4 t to 4 t + 3, channels 2 l and 2 l + 1), where decays are formed.
// Pairs    inside four tokens are taken one by one, inside 8 and 16 by levels as in intra_chunk.cuh. A row's sums over other
//          blocks and from the memory follow Horner's rule, x <- x total_J + dP_J k_J: no product of totals is formed twice.
// Decays   with g_t = log_decay of token t, e = erase, and per key channel
//              s_ij = decay(j, i) k_j (dP_ij q_i + dA_ij e_i), j < i          a later token's pair with an earlier one
//              b_i  = decay(0, i) (q_i (h do_i) - e_i (h dw_i))               from the memory before the chunk
//              c_j  = decay(j, C) k_j (dS v_new_j),   z = decay(0, C) h . dS  to the memory after it
//          each is proportional to exp of the g it spans, so
//              d g_t = sum_{j < t <= i} s_ij + sum_{i >= t} b_i + sum_{j < t} c_j + z
//              sum_{j < t <= i} s_ij = sum_{u >= t} p_u,   p_u = sum_{j < u} s_uj - sum_{i > u} s_iu
//          Both s of a pair come from the same rounded factors, so pairs that lie wholly after t cancel to fp32. A token's own
//          term q_i . k_i spans no decay and enters none of the sums. In the code: passed = p + b, to_end = c, kept = h . dS.
// Phases   1 load, 2 dv, 3 v_new, 4 scores, 5 operands, 6 rows (a to j, 16 key channels a turn), 7 finish: marked below. All in
//          one function: as functions of their own, inlined, they cost registers (with a gate, at 128 value channels, 120 bytes
//          of stack instead of 80, nvcc 13.0).
// ERASE    0: erase = beta k, write = beta v.  1: vectors.  2: vectors, and erase reads before its own token's decay: `before`
//          is the part of s and b that then does not span g_i.
#include "warp.cuh"

#ifndef ERASE
#define ERASE 0
#endif
constexpr int PITCH = 72, X_PITCH = 24;

struct Arguments {
    const u16 *q, *k;
    const void *erase, *g;
    const float *A_log, *dt_bias;
    const u16* write;
    const float* norms;
    const u16 *M, *R, *d_out, *d_write, *memories, *d_memories;  // R may be dv
    u16 *dq, *dk, *dv;  // dq, dk: [tokens, HV, K]
    void *dg, *d_erase;
    float *dA_log, *d_bias;  // per tile
    const int *cu_seqlens, *chunk_offsets;
    int T, N, H, HV;
    float scale, floor;
    int gate, wide_g, wide_erase;
};

struct Exchange {  // between the four warps of one z
    union {
        Uint4 memory[2][8][32];  // h and dS of 16 key channels, as second operands whose columns are key channels
        struct {
            u16 k_until[C * X_PITCH], q_since[C * X_PITCH], e_since[C * X_PITCH];
        };
    };
    float total[4][16];
    float kept[2][4][16], later[2][4][16], earlier[2][4][16];  // by turns: parts of h . dS; sums over a warp's tokens
};
union Scratch {  // of one warp
    u16 rows[48 * X_PITCH];   // of levels 4 and 8: 8 rows of erase, 8 of q, 8 of k each
    float sums[24 * X_PITCH];  // a level's sums for them, or 16 rows of anything
};
template <int V> struct Smem {
    u16 d_out[C * V], d_write[C * V], v_new[C * V];
    union {
        struct {
            u16 R[C * V], M[C * C];
        };
        struct {
            Exchange exchange[2];
            Scratch scratch[8];
        };
    };
    u16 dP[C * PITCH], dA[C * PITCH];
    Uint4 level[4][2][32];  // first operands of each warp's levels 4 and 8
    u32 pairs[16][8];      // dP and dA of four tokens' (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)
    int unused;  // whether a beta is 0
    float beta[C], d_beta[4][C], q_along[2][C], k_along[2][C], dA_log[8];
};

DEVICE Float2 halves(u32 x) { return {{low(x), high(x)}}; }

// First operands of a level of blocks of 2 S tokens, whose halves are gathered to 8 later and 8 earlier ones: dP and dA from
// later to earlier, and both transposed.
template <int S> DEVICE Uint4 level_operands(const u16* dP, const u16* dA, int r, int c) {
    Uint4 x;
    u16 straight[2][2], transposed[2][2];
#pragma unroll
    for (int y = 0; y < 2; y++) {
        const int at = 2 * c + y;
        const bool meet = r / S == at / S;
        const int to = (r / S * 2 * S + S + r % S) * PITCH + at / S * 2 * S + at % S, back = (at / S * 2 * S + S + at % S) * PITCH + r / S * 2 * S + r % S;
        straight[0][y] = meet ? dP[to] : 0, straight[1][y] = meet ? dA[to] : 0;
        transposed[0][y] = meet ? dP[back] : 0, transposed[1][y] = meet ? dA[back] : 0;
    }
#pragma unroll
    for (int z = 0; z < 2; z++) {
        x.x[z] = straight[z][0] | (u32)straight[z][1] << 16;
        x.x[2 + z] = transposed[z][0] | (u32)transposed[z][1] << 16;
    }
    return x;
}

// Decays of four tokens: each since the first one, after `start`; and from each to the last one, and on by `end`.
DEVICE void rows_of_four(Float2 (&since)[4], Float2 (&until)[4], const Float2 (&decay)[4], const Float2& start, const Float2& end) {
#pragma unroll
    for (int x = 0; x < 2; x++) {
        since[0].x[x] = start.x[x] * decay[0].x[x], until[3].x[x] = end.x[x];
#pragma unroll
        for (int i = 0; i < 3; i++) since[i + 1].x[x] = since[i].x[x] * decay[i + 1].x[x], until[2 - i].x[x] = until[3 - i].x[x] * decay[3 - i].x[x];
    }
}

// 16 rows of 16 sums, from fragments to the lanes of four tokens.
DEVICE void cross(Float2 (&to)[4], const float (&d)[2][4], float* sums, int lane) {
    const int r = lane / 4, c = lane % 4, t = lane / 8, l = lane % 8;
    warp_barrier();
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) *(Float2*)(sums + (8 * i + r) * X_PITCH + 8 * n + 2 * c) = {{d[n][2 * i], d[n][2 * i + 1]}};
    warp_barrier();
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = *(const Float2*)(sums + (4 * t + i) * X_PITCH + 2 * l);
}

template <int V, bool GATED> DEVICE void gradients(const Arguments& a) {
    SHARED_MEMORY(Smem<V>, s);
    const int lane = threadIdx.x % 32, warp = warp_index(), w = warp % 4, z = warp / 4, r = lane / 4, c = lane % 4;
    const Chunk at = Layout{a.cu_seqlens, a.chunk_offsets, a.T, a.N, a.HV}.of_tile(blockIdx.x);
    if (at.count <= 0) return;
    const int HV = a.HV, head = at.head;
    const long long tile = blockIdx.x;
    const int t8 = lane / 8, l8 = lane % 8;
    const unsigned long long value_step = (unsigned)(HV * V);  // from token to token
    constexpr int PIECES = V / 8;
    if (threadIdx.x == 0) bulk_prefetch(a.memories + tile * V * K, 2 * V * K), bulk_prefetch(a.d_memories + tile * V * K, 2 * V * K);

    // ---- 1. Load: do, dw, R and M to shared memory, and beta
    {
        const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        const long long from = (at.start + row) * value_step + head * V + 8 * piece;
#pragma unroll
        for (int down = 0; down < C; down += 256 / PIECES) {
            Uint4 d_out = {}, d_write = {}, R = {};
            if (row + down < at.count) {
                d_out = *(const Uint4*)(a.d_out + from + down * value_step), d_write = *(const Uint4*)(a.d_write + from + down * value_step);
                R = *(const Uint4*)(a.R + from + down * value_step);
            }
            const int to = swizzled_offset(row, piece) + 64 * down;  // `down` is a multiple of 8
            *(Uint4*)(s.d_out + to) = d_out, *(Uint4*)(s.d_write + to) = d_write, *(Uint4*)(s.R + to) = R;
        }
    }
#pragma unroll
    for (int x = 0; x < C * C / 8; x += 256) *(Uint4*)(s.M + 8 * (x + threadIdx.x)) = *(const Uint4*)(a.M + tile * C * C + 8 * (x + threadIdx.x));
    if (ERASE == 0 && threadIdx.x < C) {
        float beta = 0.0f;
        if (threadIdx.x < at.count) {
            long long token = (at.start + threadIdx.x) * HV + head;
            beta = a.wide_erase ? ((const float*)a.erase)[token] : load_scalar((const u16*)a.erase + token);
            if (GATED) beta = sigmoid(beta);
        }
        s.beta[threadIdx.x] = beta;
    }
    if (threadIdx.x == 0) s.unused = 0;
    block_barrier();
    if (ERASE == 0 && threadIdx.x < C && s.beta[threadIdx.x] == 0.0f) s.unused = 1;

    // Tiles of 16 rows and 16 columns of a swizzled tile: pieces 2 y and 2 y + 1 of 8 lie at (2 y ^ turn).
    const int my_rows = (16 * w + lane % 16) * 64, turn = lane / 16 ^ l8;           // rows down the lanes, then columns
    const int columns = (t8 / 2 * 8 + l8) * 64, column_turn = t8 % 2 ^ l8;          // columns first
    // ---- 2. dv = beta dw
    if (ERASE == 0) {
        const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        u16* to = a.dv + (at.start + row) * value_step + head * V + 8 * piece;
#pragma unroll
        for (int down = 0; down < C; down += 256 / PIECES) {
            Uint4 d = *(const Uint4*)(s.d_write + swizzled_offset(row, piece) + 64 * down);
            const float b = s.beta[row + down];
            const u32 beta = pack(b, b);
#pragma unroll
            for (int p = 0; p < 4; p++) d.x[p] = times(d.x[p], beta);
            if (row + down < at.count) *(Uint4*)(to + down * value_step) = d;
        }
    }
    // ---- 3. v_new = M R
    {
        Uint4 m[4];
#pragma unroll
        for (int J = 0; J < 4; J++)
            if (J <= w) m[J] = load_tiles_transposed(s.M + columns + 1024 * J + ((2 * w) ^ column_turn) * 8);
#pragma unroll
        for (int y = 0; y < V / 32; y++) {
            const int group = 2 * y + z;
            {
                float x[2][4] = {};
                const u16* from = s.R + group / 4 * 4096 + lane % 16 * 64 + ((2 * group % 8) ^ turn) * 8;
#pragma unroll
                for (int J = 0; J < 4; J++)
                    if (J <= w) {
                        const Uint4 b = load_tiles_transposed(from + 1024 * J);
                        mma(x[0], m[J].x[0], m[J].x[1], m[J].x[2], m[J].x[3], b.x[0], b.x[1]);
                        mma(x[1], m[J].x[0], m[J].x[1], m[J].x[2], m[J].x[3], b.x[2], b.x[3]);
                    }
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int n = 0; n < 2; n++)
                        *(u32*)(s.v_new + swizzled_offset(16 * w + r, 2 * group + n) + 512 * i + 2 * c) = pack(x[n][2 * i], x[n][2 * i + 1]);
            }
        }
    }
    block_barrier();
    // ---- 4. Scores: scale dP of the warps z = 0, dA of z = 1; and with dA, dw . v_new, and dw . v where a beta is 0
    {
        const u16* rows = z ? s.d_write : s.d_out;
        u16* out = z ? s.dA : s.dP;
        const float factor = z ? -1.0f : a.scale;
        Uint4 d[V / 16];
#pragma unroll
        for (int y = 0; y < V / 16; y++)
            d[y] = load_tiles(rows + y / 4 * 4096 + my_rows + ((2 * y % 8) ^ turn) * 8);
#pragma unroll
        for (int J = 0; J < 4; J++)
            if (J <= w) {
                float x[2][4] = {};
#pragma unroll
                for (int y = 0; y < V / 16; y++) {
                        const Uint4 b = load_tiles(s.v_new + y / 4 * 4096 + columns + 1024 * J + ((2 * y % 8) ^ column_turn) * 8);
                        mma(x[0], d[y].x[0], d[y].x[1], d[y].x[2], d[y].x[3], b.x[0], b.x[1]);
                        mma(x[1], d[y].x[0], d[y].x[1], d[y].x[2], d[y].x[3], b.x[2], b.x[3]);
                    }
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const int row = 16 * w + 8 * i + r, j = 16 * J + 8 * n + 2 * c;
                        const float x0 = j + z <= row ? factor * x[n][2 * i] : 0.0f, x1 = j + 1 + z <= row ? factor * x[n][2 * i + 1] : 0.0f;
                        *(u32*)(out + row * PITCH + j) = pack(x0, x1);
                        if (ERASE == 0 && z && J == w && i == n && c == r / 2) s.d_beta[3][row] = r % 2 ? x[n][2 * i + 1] : x[n][2 * i];  // dw . v_new
                    }
            }
        if (ERASE == 0 && z && s.unused) {  // the diagonals of products of 8 rows with 8 rows
            float x[2][4] = {};
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const bool inside = 16 * w + 8 * n + r < at.count;
                const u16* from = a.write + (at.start + (inside ? 16 * w + 8 * n + r : 0)) * value_step + head * V + 2 * c;
#pragma unroll
                for (int y = 0; y < V / 16; y++)
                    mma(x[n], d[y].x[0], d[y].x[1], d[y].x[2], d[y].x[3], inside ? pair_at(from + 16 * y) : 0, inside ? pair_at(from + 16 * y + 8) : 0);
            }
            if (c == r / 2) s.d_beta[2][16 * w + r] = r % 2 ? x[0][1] : x[0][0], s.d_beta[2][16 * w + 8 + r] = r % 2 ? x[1][3] : x[1][2];
        }
    }
    block_barrier();

    // ---- 5. Operands: first operands of levels 4 and 8; pairs inside four tokens
    {
        const u16 *dP = s.dP + 16 * w * (PITCH + 1), *dA = s.dA + 16 * w * (PITCH + 1);
        s.level[w][z][lane] = z ? level_operands<8>(dP, dA, r, c) : level_operands<4>(dP, dA, r, c);
        if (z == 0 && l8 < 6) {
            const int i = l8 < 1 ? 1 : l8 < 3 ? 2 : 3, from = (4 * t8 + i) * PITCH + 4 * t8 + l8 - i * (i - 1) / 2;
            s.pairs[4 * w + t8][l8] = dP[from] | (u32)dA[from] << 16;
        }
    }
    const float rate = GATED ? exp_(a.A_log[head]) : 0.0f;
    const int row = 16 * w + 4 * t8;  // the first of this lane's four tokens
    const int key_head = head / (HV / a.H);
    const unsigned key_step = a.H * K, gate_step = HV * K;
    const long long key_at = (at.start + row) * key_step + key_head * K + 2 * l8, gate_at = (at.start + row) * gate_step + head * K + 2 * l8;
    float d_beta[4] = {}, q_along[4] = {}, k_along[4] = {}, dA_log = 0.0f;
    const bool odd = t8 % 2, second = t8 >= 2;  // of groups of four tokens: in 8, and of eights: in 16
    Exchange& ex = s.exchange[z];
    Scratch& scratch = s.scratch[warp];

    const long long memory_at = (tile * (V / 16) + w) * (K / 16) * 256 + 8 * lane;
    Uint4 h[2] = {}, dS[2] = {};  // this warp's share of 16 key channels: 16 value channels from 16 w on, and from 64 on
    const auto fetch = [&](int step) {
#pragma unroll
        for (int y = 0; y < 2; y++)
            if (4 * y < V / 16) {
                const long long from = memory_at + (4 * y * (K / 16) + step) * 256;
                h[y] = *(const Uint4*)(a.memories + from), dS[y] = *(const Uint4*)(a.d_memories + from);
            }
    };
    // ---- 6. Rows: 16 key channels a turn
#pragma unroll 1
    for (int turns = 0; turns < K / 32; turns++) {
        const int step = z * (K / 32) + turns, channel = 16 * step + 2 * l8;
        // 6a. Load: the memory and its gradient; q, k, erase and log_decay of this lane's tokens
        fetch(step);
        u32 q[4], k[4], e[4];
        Float2 decay[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            q[i] = k[i] = e[i] = 0, decay[i] = {{0.0f, 0.0f}};
            if (row + i < at.count) {
                q[i] = pair_at(a.q + key_at + (unsigned long long)key_step * i + 16 * step), k[i] = pair_at(a.k + key_at + (unsigned long long)key_step * i + 16 * step);
                const long long from = gate_at + (unsigned long long)gate_step * i + 16 * step;
                if (ERASE) e[i] = pair_at((const u16*)a.erase + from);
                decay[i] = a.wide_g ? *(const Float2*)((const float*)a.g + from) : halves(pair_at((const u16*)a.g + from));
            }
        }
        // 6b. Share: the memory, transposed, for all four warps (its columns are now value channels); this warp's part of h . dS
        {
            float kept[2] = {};
#pragma unroll
            for (int y = 0; y < V / 64; y++) {
                Uint4 x, d;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    x.x[n] = transpose(h[y].x[n]), d.x[n] = transpose(dS[y].x[n]);
                    kept[n / 2] += low(x.x[n]) * low(d.x[n]) + high(x.x[n]) * high(d.x[n]);
                }
                ex.memory[0][w + 4 * y][lane] = x, ex.memory[1][w + 4 * y][lane] = d;
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                kept[n] = quad_sum(kept[n]);
                if (c == 0) ex.kept[turns % 2][w][8 * n + r] = kept[n];
            }
        }
        group_barrier(z);
        // 6c. Across the border: do h, dw h, v_new dS, without decays
        float dq[2][4] = {}, de[2][4] = {}, dk[2][4] = {};
#pragma unroll 1
        for (int half = 0; half < V / 64; half++)
#pragma unroll
            for (int y = 0; y < 4; y++) {
                const int from = half * 4096 + my_rows + ((2 * y) ^ turn) * 8;
                const Uint4 x = load_tiles(s.d_out + from), dw = load_tiles(s.d_write + from), u = load_tiles(s.v_new + from);
                const Uint4 b = ex.memory[0][4 * half + y][lane], d = ex.memory[1][4 * half + y][lane];
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    mma(dq[n], x.x[0], x.x[1], x.x[2], x.x[3], b.x[2 * n], b.x[2 * n + 1]);
                    mma(de[n], dw.x[0], dw.x[1], dw.x[2], dw.x[3], b.x[2 * n], b.x[2 * n + 1]);
                    mma(dk[n], u.x[0], u.x[1], u.x[2], u.x[3], d.x[2 * n], d.x[2 * n + 1]);
                }
            }

        // 6d. Decays: since the start of blocks of 4, 8, 16 tokens and until their end; `wide`: what level 4 and level 8 ask for.
        u32 wide[2][4], wide_e[2][4];  // of erase, where it differs
        Float2 start = {{1.0f, 1.0f}}, end = {{1.0f, 1.0f}};  // of this lane's four in the 16: decay before them, and after
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (GATED && row + i < at.count) {
                const float qn = a.norms[tile * 2 * C + row + i], kn = a.norms[tile * 2 * C + C + row + i];
                q[i] = pack(low(q[i]) * qn, high(q[i]) * qn), k[i] = pack(low(k[i]) * kn, high(k[i]) * kn);
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    const float y = decay[i].x[x] + a.dt_bias[head * K + channel + x];
                    decay[i].x[x] = a.gate == 1 ? -rate * softplus(y) : a.floor * sigmoid(rate * y);
                }
            }
            if (ERASE == 0) e[i] = pack(s.beta[row + i] * low(k[i]), s.beta[row + i] * high(k[i]));
#pragma unroll
            for (int x = 0; x < 2; x++) decay[i].x[x] = exp_(decay[i].x[x]);
        }
        {
            float four[2], eight[2];
            Float2 since[4], until[4], total;
            rows_of_four(since, until, decay, start, end);
            four[0] = since[3].x[0], four[1] = since[3].x[1];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                wide[0][i] = pack(odd ? since[i].x[0] : until[i].x[0], odd ? since[i].x[1] : until[i].x[1]);
                if (ERASE == 2) wide_e[0][i] = i ? pack(since[i - 1].x[0], since[i - 1].x[1]) : pack(1.0f, 1.0f);
            }
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float other = swap_lanes(four[x], 8);
                eight[x] = four[x] * other;
                if (odd) start.x[x] = other; else end.x[x] = other;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float by[2];
#pragma unroll
                for (int x = 0; x < 2; x++) by[x] = second ? since[i].x[x] * start.x[x] : until[i].x[x] * end.x[x];
                wide[1][i] = pack(by[0], by[1]);
                if (ERASE == 2) wide_e[1][i] = i ? pack(since[i - 1].x[0] * start.x[0], since[i - 1].x[1] * start.x[1]) : pack(start.x[0], start.x[1]);
            }
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float other = swap_lanes(eight[x], 16);
                total.x[x] = eight[x] * other;
                if (second) start.x[x] *= other; else end.x[x] *= other;
            }
            group_barrier(z);  // all have read the memory; the rows lie over it
            if (t8 == 0) *(Float2*)(ex.total[w] + 2 * l8) = total;
            rows_of_four(since, until, decay, start, end);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 factor = pack(since[i].x[0], since[i].x[1]);
                const int to = (row + i) * X_PITCH + 2 * l8;
                u32 factor_e = factor;
                if (ERASE == 2) factor_e = i ? pack(since[i - 1].x[0], since[i - 1].x[1]) : pack(start.x[0], start.x[1]);
                *(u32*)(ex.q_since + to) = times(q[i], factor), *(u32*)(ex.e_since + to) = times(e[i], factor_e);
                *(u32*)(ex.k_until + to) = times(k[i], pack(until[i].x[0], until[i].x[1]));
            }
        }
        u32 alive = 0;  // a bit for each decay that is not zero; the decays themselves wait in shared memory
        Float2* parked = (Float2*)(scratch.sums + 16 * X_PITCH) + lane;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            alive |= (decay[i].x[0] != 0.0f ? 1u << 2 * i : 0u) | (decay[i].x[1] != 0.0f ? 2u << 2 * i : 0u);
            if (i) parked[32 * (i - 1)] = decay[i];
        }
        group_barrier(z);

        // 6e. Other blocks, by Horner's rule towards this one.
        float dk_far[2][4] = {};
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int x = 0; x < 4; x++) dq[n][x] *= a.scale, de[n][x] = -de[n][x];
#pragma unroll
        for (int J = 0; J < 3; J++)
            if (J < w) {
                const Uint4 b = load_tiles_transposed(ex.k_until + (16 * J + lane % 16) * X_PITCH + lane / 16 * 8);
                const Uint4 p = load_tiles(s.dP + (16 * w + lane % 16) * PITCH + 16 * J + lane / 16 * 8);
                const Uint4 d = load_tiles(s.dA + (16 * w + lane % 16) * PITCH + 16 * J + lane / 16 * 8);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const Float2 by = *(const Float2*)(ex.total[J] + 8 * n + 2 * c);
#pragma unroll
                    for (int x = 0; x < 4; x++) dq[n][x] *= by.x[x % 2], de[n][x] *= by.x[x % 2];
                    mma(dq[n], p.x[0], p.x[1], p.x[2], p.x[3], b.x[2 * n], b.x[2 * n + 1]);
                    mma(de[n], d.x[0], d.x[1], d.x[2], d.x[3], b.x[2 * n], b.x[2 * n + 1]);
                }
            }
#pragma unroll
        for (int I = 3; I > 0; I--)
            if (I > w) {
                const Uint4 b = load_tiles_transposed(ex.q_since + (16 * I + lane % 16) * X_PITCH + lane / 16 * 8);
                const Uint4 e = load_tiles_transposed(ex.e_since + (16 * I + lane % 16) * X_PITCH + lane / 16 * 8);
                const Uint4 p = load_tiles_transposed(s.dP + (16 * I + t8 / 2 * 8 + l8) * PITCH + 16 * w + t8 % 2 * 8);
                const Uint4 d = load_tiles_transposed(s.dA + (16 * I + t8 / 2 * 8 + l8) * PITCH + 16 * w + t8 % 2 * 8);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const Float2 by = *(const Float2*)(ex.total[I] + 8 * n + 2 * c);
                    if (I < 3)
#pragma unroll
                        for (int x = 0; x < 4; x++) dk_far[n][x] *= by.x[x % 2];
                    mma(dk_far[n], p.x[0], p.x[1], p.x[2], p.x[3], b.x[2 * n], b.x[2 * n + 1]);
                    mma(dk_far[n], d.x[0], d.x[1], d.x[2], d.x[3], e.x[2 * n], e.x[2 * n + 1]);
                }
            }

        // 6f. To rows: from here on four tokens a lane. `passed`: what passes a token on its way, of pairs and from before the chunk, at
        // its later end, less what begins here; `to_end`: what this token leaves to the chunk's end.
        Float2 q_sum[4], e_sum[4], k_sum[4], passed[4], to_end[4], before[4];
        {
            Float2 after = {{1.0f, 1.0f}}, since[4], until[4];
#pragma unroll
            for (int i = 1; i < 4; i++) decay[i] = parked[32 * (i - 1)];
            rows_of_four(since, until, decay, start, end);
#pragma unroll
            for (int I = 1; I < 4; I++)
                if (I > w) {
                    const Float2 by = *(const Float2*)(ex.total[I] + 2 * l8);
                    after.x[0] *= by.x[0], after.x[1] *= by.x[1];
                }
            cross(q_sum, dq, scratch.sums, lane);
            cross(e_sum, de, scratch.sums, lane);
            cross(to_end, dk, scratch.sums, lane);
            cross(k_sum, dk_far, scratch.sums, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int from = (row + i) * X_PITCH + 2 * l8;
                const Float2 fq = halves(pair_at(ex.q_since + from)), fe = halves(pair_at(ex.e_since + from)), fk = halves(pair_at(ex.k_until + from));
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    if (ERASE == 2) before[i].x[x] = fe.x[x] * e_sum[i].x[x];
                    passed[i].x[x] = fq.x[x] * q_sum[i].x[x] + fe.x[x] * e_sum[i].x[x] - fk.x[x] * k_sum[i].x[x];
                    to_end[i].x[x] *= after.x[x];
                    q_sum[i].x[x] *= since[i].x[x], e_sum[i].x[x] *= ERASE < 2 ? since[i].x[x] : i ? since[i - 1].x[x] : start.x[x];
                    k_sum[i].x[x] = until[i].x[x] * (k_sum[i].x[x] + to_end[i].x[x]);
                    to_end[i].x[x] *= fk.x[x];
                }
            }
        }

        // 6g. Inside the four tokens: each pair by itself, a later i that brings q and erase, an earlier j that brings k.
#pragma unroll
        for (int j = 0; j < 3; j++) {
            const Float2 kj = halves(k[j]);
            Float2 run = kj, factor = {{1.0f, 1.0f}};
#pragma unroll
            for (int i = j + 1; i < 4; i++) {
                const Float2 qi = halves(q[i]), ei = halves(e[i]);
                const float P = low(s.pairs[4 * w + t8][i * (i - 1) / 2 + j]), A = high(s.pairs[4 * w + t8][i * (i - 1) / 2 + j]);
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    if (ERASE == 2) {  // erase first, before this token's decay
                        const float part = A * ei.x[x] * run.x[x];
                        e_sum[i].x[x] += A * run.x[x], k_sum[j].x[x] += factor.x[x] * A * ei.x[x];
                        passed[i].x[x] += part, passed[j].x[x] -= part, before[i].x[x] += part;
                    }
                    run.x[x] *= decay[i].x[x], factor.x[x] *= decay[i].x[x];
                    const float both = ERASE == 2 ? P * qi.x[x] : P * qi.x[x] + A * ei.x[x], part = run.x[x] * both;
                    q_sum[i].x[x] += P * run.x[x];
                    if (ERASE < 2) e_sum[i].x[x] += A * run.x[x];
                    k_sum[j].x[x] += factor.x[x] * both;
                    passed[i].x[x] += part, passed[j].x[x] -= part;
                }
            }
        }
        // 6h. Levels 4 and 8: all four tokens of a lane are later ones, or all are earlier ones.
        warp_barrier();
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const bool late = slot ? second : odd;
            u16* to = scratch.rows + (24 * slot + (slot ? t8 % 2 * 4 : t8 / 2 * 4)) * X_PITCH + 2 * l8;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                *(u32*)(to + ((late ? 8 : 16) + i) * X_PITCH) = times(late ? q[i] : k[i], wide[slot][i]);
                if (late) *(u32*)(to + i * X_PITCH) = times(e[i], ERASE == 2 ? wide_e[slot][i] : wide[slot][i]);
            }
        }
        warp_barrier();
        {
            const Uint4 kb = load_tiles_transposed(scratch.rows + (24 * (t8 / 2) + 16 + l8) * X_PITCH + t8 % 2 * 8);
            Uint4 qe[2];
#pragma unroll
            for (int slot = 0; slot < 2; slot++)
                qe[slot] = load_tiles_transposed(scratch.rows + (24 * slot + (t8 % 2 ? 0 : 8) + l8) * X_PITCH + t8 / 2 * 8);
#pragma unroll
            for (int slot = 0; slot < 2; slot++) {
                const bool late = slot ? second : odd;
                const float* from = scratch.sums + (slot ? t8 % 2 * 4 : t8 / 2 * 4) * X_PITCH + 2 * l8;
                const Uint4 level = s.level[w][slot][lane];
                warp_barrier();
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    float x[4] = {}, y[4] = {};
                    mma_half(x, level.x[0], level.x[1], kb.x[2 * slot + n]);
                    mma(y, level.x[2], 0, level.x[3], 0, qe[slot].x[2 * n], qe[slot].x[2 * n + 1]);
                    float* to = scratch.sums + r * X_PITCH + 8 * n + 2 * c;
                    *(Float2*)to = {{x[0], x[1]}}, *(Float2*)(to + 8 * X_PITCH) = {{x[2], x[3]}}, *(Float2*)(to + 16 * X_PITCH) = {{y[0], y[1]}};
                }
                warp_barrier();
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const Float2 by = halves(wide[slot][i]), mine = halves(times(late ? q[i] : k[i], wide[slot][i]));
                    const Float2 sum = *(const Float2*)(from + (i + (late ? 0 : 16)) * X_PITCH);
                    Float2 fe = {{0.0f, 0.0f}}, e_part = {{0.0f, 0.0f}};
                    const Float2 by_e = ERASE == 2 ? halves(wide_e[slot][i]) : by;
                    if (late) fe = halves(times(e[i], ERASE == 2 ? wide_e[slot][i] : wide[slot][i])), e_part = *(const Float2*)(from + (i + 8) * X_PITCH);
#pragma unroll
                    for (int x = 0; x < 2; x++) {
                        if (late) q_sum[i].x[x] += by.x[x] * sum.x[x]; else k_sum[i].x[x] += by.x[x] * sum.x[x];
                        e_sum[i].x[x] += by_e.x[x] * e_part.x[x];
                        if (ERASE == 2) before[i].x[x] += fe.x[x] * e_part.x[x];
                        passed[i].x[x] += (late ? mine.x[x] : -mine.x[x]) * sum.x[x] + fe.x[x] * e_part.x[x];
                    }
                }
            }
        }

        // 6i. d log_decay: sums from a token on, and up to it, over this lane's four, the warp's 16, then the chunk's 64.
        Float2 dg[4];
        {
            Float2 run = {{0.0f, 0.0f}}, ahead, behind;
#pragma unroll
            for (int i = 3; i >= 0; i--)
#pragma unroll
                for (int x = 0; x < 2; x++) run.x[x] += passed[i].x[x], dg[i].x[x] = run.x[x];
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float near = swap_lanes(run.x[x], 8), far = swap_lanes(run.x[x] + near, 16);
                ahead.x[x] = (odd ? 0.0f : near) + (second ? 0.0f : far);
                run.x[x] += near + far;
            }
            if (t8 == 0) *(Float2*)(ex.later[turns % 2][w] + 2 * l8) = run;
            run = {{0.0f, 0.0f}};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int x = 0; x < 2; x++) dg[i].x[x] += run.x[x], run.x[x] += to_end[i].x[x];
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float near = swap_lanes(run.x[x], 8), far = swap_lanes(run.x[x] + near, 16);
                behind.x[x] = (odd ? near : 0.0f) + (second ? far : 0.0f);
                run.x[x] += near + far;
            }
            if (t8 == 0) *(Float2*)(ex.earlier[turns % 2][w] + 2 * l8) = run;
            Float2 all = {{1.0f, 1.0f}}, kept = {{0.0f, 0.0f}};
            group_barrier(z);
#pragma unroll
            for (int J = 0; J < 4; J++) {
                const Float2 by = *(const Float2*)(ex.total[J] + 2 * l8), more = *(const Float2*)(ex.kept[turns % 2][J] + 2 * l8);
#pragma unroll
                for (int x = 0; x < 2; x++) all.x[x] *= by.x[x], kept.x[x] += more.x[x];
                if (J != w) {
                    const Float2 other = *(const Float2*)((J > w ? ex.later : ex.earlier)[turns % 2][J] + 2 * l8);
                    ahead.x[0] += other.x[0], ahead.x[1] += other.x[1];
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    const float sum = dg[i].x[x] + ahead.x[x] + behind.x[x] + all.x[x] * kept.x[x] - (ERASE == 2 ? before[i].x[x] : 0.0f);
                    dg[i].x[x] = alive >> (2 * i + x) & 1 ? sum : 0.0f;  // nothing passes where nothing is kept
                }
        }

        // 6j. Out: own terms, beta and the gate
        float d_bias[2] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Float2 q2 = halves(q[i]), k2 = halves(k[i]);
            const float own = load_scalar(s.dP + (row + i) * (PITCH + 1)), beta = ERASE ? 1.0f : s.beta[row + i];
            const long long to = gate_at + (unsigned long long)gate_step * i + 16 * step;
#pragma unroll
            for (int x = 0; x < 2; x++) {
                q_sum[i].x[x] += own * k2.x[x], k_sum[i].x[x] += own * q2.x[x];
                if (ERASE == 0) {
                    d_beta[i] += k2.x[x] * e_sum[i].x[x];
                    k_sum[i].x[x] += beta * e_sum[i].x[x];
                }
                if (GATED && row + i < at.count) {
                    float logit = a.wide_g ? ((const float*)a.g)[to + x] : load_scalar((const u16*)a.g + to + x);
                    logit += a.dt_bias[head * K + channel + x];
                    float d = dg[i].x[x];
                    if (a.gate == 1) {
                        dA_log -= d * rate * softplus(logit);
                        d *= -rate * sigmoid(logit);
                    } else {
                        const float y = sigmoid(rate * logit);
                        d *= a.floor * rate * y * (1.0f - y);
                        dA_log += d * logit;
                    }
                    dg[i].x[x] = d, d_bias[x] += d;
                    q_along[i] += q2.x[x] * q_sum[i].x[x], k_along[i] += k2.x[x] * k_sum[i].x[x];
                }
            }
            if (row + i < at.count) {
                *(u32*)(a.dq + to) = pack(q_sum[i].x[0], q_sum[i].x[1]);
                *(u32*)(a.dk + to) = pack(k_sum[i].x[0], k_sum[i].x[1]);
                if (ERASE) *(u32*)((u16*)a.d_erase + to) = pack(e_sum[i].x[0], e_sum[i].x[1]);
                if (a.wide_g) *(Float2*)((float*)a.dg + to) = dg[i];
                else *(u32*)((u16*)a.dg + to) = pack(dg[i].x[0], dg[i].x[1]);
            }
        }
        if (GATED)
#pragma unroll
            for (int x = 0; x < 2; x++) {
                d_bias[x] += swap_lanes(d_bias[x], 8), d_bias[x] += swap_lanes(d_bias[x], 16);
                if (t8 == 0) a.d_bias[(tile * 4 + w) * K + channel + x] = d_bias[x];
            }
    }

    // ---- 7. Finish what needs all key channels: d beta, d A_log, and q and k through their norms
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float sums[3] = {d_beta[i], q_along[i], k_along[i]};
#pragma unroll
        for (int x = ERASE > 0; x < (GATED ? 3 : 1); x++)
#pragma unroll
            for (int y = 1; y < 8; y *= 2) sums[x] += swap_lanes(sums[x], y);
        if (l8 == 0) s.d_beta[z][row + i] = sums[0], s.q_along[z][row + i] = sums[1], s.k_along[z][row + i] = sums[2];
    }
    if (GATED) {
#pragma unroll
        for (int y = 1; y < 32; y *= 2) dA_log += swap_lanes(dA_log, y);
        if (lane == 0) s.dA_log[warp] = dA_log;
    }
    block_barrier();
    if (ERASE == 0 && threadIdx.x < at.count) {
        const long long to = (at.start + threadIdx.x) * HV + head;
        const float b = s.beta[threadIdx.x];  // dw . v_new = beta x (d beta); where beta is 0, the long way
        float d = b != 0.0f ? s.d_beta[3][threadIdx.x] / b : s.d_beta[0][threadIdx.x] + s.d_beta[1][threadIdx.x] + s.d_beta[2][threadIdx.x];
        if (GATED) d *= b * (1.0f - b);
        if (a.wide_erase) ((float*)a.d_erase)[to] = d; else ((u16*)a.d_erase)[to] = (u16)(pack(d, 0.0f) & 0xffffu);
    }
    if (GATED) {  // through the L2 norms: what lies along the row itself goes
        if (threadIdx.x == 0) {
            float sum = 0.0f;
            for (int x = 0; x < 8; x++) sum += s.dA_log[x];
            a.dA_log[tile] = sum;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (row + i < at.count) {
                const float qn = a.norms[tile * 2 * C + row + i], kn = a.norms[tile * 2 * C + C + row + i];
                const float qa = s.q_along[0][row + i] + s.q_along[1][row + i], ka = s.k_along[0][row + i] + s.k_along[1][row + i];
#pragma unroll 1
                for (int x = z * (K / 32); x < (z + 1) * (K / 32); x++) {  // the same lane wrote these
                    const long long from = key_at + (unsigned long long)key_step * i + 16 * x, to = gate_at + (unsigned long long)gate_step * i + 16 * x;
                    u32 q = pair_at(a.q + from), k = pair_at(a.k + from), dq = pair_at(a.dq + to), dk = pair_at(a.dk + to);
                    *(u32*)(a.dq + to) = pack(qn * (low(dq) - qa * qn * low(q)), qn * (high(dq) - qa * qn * high(q)));
                    *(u32*)(a.dk + to) = pack(kn * (low(dk) - ka * kn * low(k)), kn * (high(dk) - ka * kn * high(k)));
                }
            }
    }
}

#define KERNEL(name, value_dim, gated) \
    extern "C" __global__ void __launch_bounds__(256, 2) name(const __grid_constant__ Arguments a) { gradients<value_dim, gated>(a); }
KERNEL(gradient_64, 64, false)
KERNEL(gradient_128, 128, false)
#if ERASE == 0
KERNEL(gradient_64_gated, 64, true)
KERNEL(gradient_128_gated, 128, true)
#endif
