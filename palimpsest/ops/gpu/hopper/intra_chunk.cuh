// Everything of a chunk that does not need the memory; what ../triton/intra_chunk.py computes, letter for letter.
//
// Group    four warps a chunk and value head; warp w holds 16 tokens, each lane all of them in two channels. So products of
//          decays stay in a lane, and no lane ever waits for another one's.
// Tree     pairs of tokens meet in the smallest aligned block of 2, 4, 8 or 16 that holds both: the later half decayed since
//          that half began, the earlier one until it ended. Every factor is a product of decays, never a difference of sums.
//          Halves are gathered as 8 + 8 + 8 rows (erase, q, k) in shared memory, and one small product gives their scores.
// Blocks   of 16 against earlier blocks: since this one's start, times whole blocks between, times until that one's end.
// ERASE    0: erase = beta k.  1: a vector.  2: a vector that reads before its own token's decay.
#include "hopper.cuh"

#ifndef ERASE
#define ERASE 0
#endif
constexpr int WIDTH = 64, PASSES = K / WIDTH;  // 64 channels at a time, two of them a lane's
constexpr int PITCH = K + 8, L_PITCH = 72, P_PITCH = 72;

struct Warp {
    union {
        u16 rows[32 * PITCH];  // q; then a level's halves; then erase and q since the block's start
        struct {
            float L[16 * L_PITCH];  // then rows of A, and of M on its diagonal; and of P
            u16 P[16 * P_PITCH];
        };
    };
};
struct alignas(1024) IntraChunkShared {
    union {
        float log_decay[4][16 * WIDTH];  // of a pass, on its way
        u16 k[C * K];                    // k until the chunk's end, swizzled, its pairs laid out as columns of tiles
    };
    Warp warp[4];
    u16 k_until[C * PITCH];  // k; then k until its block's end
    float total[4 * K];      // decay of each block of 16
    u16 between[3 * K];      // of block 1, of block 2, of both
    float e_scale[C], q_scale[C], k_norm[C], own[C];
};

struct IntraChunkArguments {
    const u16 *q, *k;
    const void *erase, *g;
    const float *A_log, *dt_bias;
    Tile* tiles;
    u16* M;
    float* norms;
    const int *cu_seqlens, *chunk_offsets;
    int T, N, H, HV;
    float scale, floor;
    int gate, wide_g, wide_erase;
    DEVICE Layout layout() const { return {cu_seqlens, chunk_offsets, T, N, HV}; }
};

DEVICE u32 factor(Float2 f) { return pack(f.x[0], f.x[1]); }
DEVICE Float2 product(Float2 f, Float2 by) { return {{f.x[0] * by.x[0], f.x[1] * by.x[1]}}; }
DEVICE Float2 product(Float2 f, float by) { return {{f.x[0] * by, f.x[1] * by}}; }
DEVICE void store(u16* p, u32 x) { *(u32*)p = x; }
constexpr Float2 NO_DECAY = {{1.0f, 1.0f}};

// Products of d that the compiler has formed so far are not worth the registers that would keep them.
DEVICE void forget(Float2 (&d)[16]) {
#ifndef WARP_ON_CPU
#pragma unroll
    for (int i = 0; i < 16; i++) asm volatile("" : "+f"(d[i].x[0]), "+f"(d[i].x[1]));
#endif
}

// Sixteen rows of `bytes` on their way to shared memory, 16 bytes a lane at a time; zeros beyond the last token.
template <int ROW> DEVICE void fetch(char* to, int to_pitch, const char* from, unsigned from_pitch, int tokens, int lane) {
    constexpr int PIECES = ROW / 16, DOWN = 32 / PIECES;
    const int row = lane / PIECES, at = lane % PIECES * 16;
    const unsigned long long step = (unsigned long long)from_pitch * DOWN;
    to += row * to_pitch + at, from += at;
    const char* source = from + (unsigned long long)from_pitch * row;
    if (tokens >= 16) {
#pragma unroll
        for (int i = 0; i < 16; i += DOWN, source += step) lane_copy(to + i * to_pitch, source, false);
    } else {
#pragma unroll 1
        for (int i = 0; i < 16; i += DOWN, source += step) lane_copy(to + i * to_pitch, row + i < tokens ? source : from, row + i >= tokens);
    }
}

// Scores of the later halves against the earlier halves of all blocks of 2 S tokens: acc's rows are erase, then q.
template <int S> DEVICE void level(float (&acc)[4], Float2 (&d)[16], const u32 (&q)[16], const u32 (&k)[16], const u32 (&e)[16], u16* rows,
                                   const u16* raw_k, int column, int lane) {
    warp_barrier();  // what lay here has been read
    forget(d);
#pragma unroll
    for (int b = 0; b < 16; b += 2 * S) {
        Float2 run = NO_DECAY;
#pragma unroll
        for (int i = b + S; i < b + 2 * S; i++) {
            u16* to = rows + (b / 2 + i - b - S) * PITCH + column;
            if (ERASE == 2) store(to, i > b + S ? times(e[i], factor(run)) : e[i]);
            run = product(run, d[i]);
            const u32 f = factor(run);
            if (ERASE != 2) store(to, times(ERASE ? e[i] : k[i], f));
            store(to + 8 * PITCH, times(q[i], f));
        }
        run = NO_DECAY;
#pragma unroll
        for (int i = b + S - 1; i >= b && S > 1; i--) {
            store(rows + (16 + b / 2 + i - b) * PITCH + column, i < b + S - 1 ? times(k[i], factor(run)) : k[i]);
            if (i > b) run = product(run, d[i]);
        }
    }
    warp_barrier();
    const int from = column - 2 * lane;
    const u16* left = rows + lane % 16 * PITCH + from + lane / 16 * 8;
    const u16* right = (S > 1 ? rows + (16 + lane % 8) * PITCH : raw_k + 2 * (lane % 8) * PITCH) + from + lane / 8 * 8;
    Uint4 b[WIDTH / 32], x[WIDTH / 16];  // all on their way before the first is used
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++) {
        if (step % 2 == 0) b[step / 2] = load_tiles(right + 16 * step);
        x[step] = load_tiles(left + 16 * step);
    }
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++)
        mma(acc, x[step].x[0], x[step].x[1], x[step].x[2], x[step].x[3], b[step / 2].x[step % 2 * 2], b[step / 2].x[step % 2 * 2 + 1]);
}

// Products of each token's q and k with its own k, and of both with its q: diagonals of 8 x 8.
template <bool GATED> DEVICE void own_products(float (&own)[2][4], float (&q_own)[2][4], const u16* q, const u16* k, int from, int lane) {
    const u16* row = (lane / 8 % 2 ? k : q) + lane % 8 * PITCH + from + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const Uint4 x = load_tiles(row + 8 * h * PITCH + 16 * step);  // q, k; q, k of the next 8 channels
            mma(own[h], x.x[0], x.x[1], x.x[2], x.x[3], x.x[1], x.x[3]);
            if (GATED) mma(q_own[h], x.x[0], x.x[1], x.x[2], x.x[3], x.x[0], x.x[2]);
        }
}

// A level's scores, gathered by halves, to their places in A and P.
template <int S, bool GATED> DEVICE void scatter_scores(const float (&acc)[4], float* L, u16* P, const float* e_scale, const float* q_scale, const float* k_norm, int r, int c) {
#pragma unroll
    for (int x = 0; x < 2; x++) {
        const int at = 2 * c + x, i = r / S * 2 * S + S + r % S, j = at / S * 2 * S + at % S;
        const float A = acc[x] * e_scale[i] * (GATED ? k_norm[j] : 1.0f);
        const u16 p = (u16)pack(acc[2 + x] * q_scale[i], 0.0f);
        if (r / S == at / S) L[i * L_PITCH + j] = S == 8 ? as_factor(A) : A, P[i * P_PITCH + j] = p;
    }
}

// `before_stores` runs halfway, before this chunk's tile is written.
template <bool GATED, class F> DEVICE void prepare(const IntraChunkArguments& a, IntraChunkShared& s, const Chunk& at, int group, F before_stores) {
    const int H = a.H, HV = a.HV, head = at.head;
    const int lane = threadIdx.x % 32, w = warp_index() % 4, r = lane / 4, c = lane % 4;
    const long long tile = at.tile;
    Tile& out = a.tiles[tile];
    const int tokens = at.count - 16 * w;  // of this warp, if it has 16
    const long long first = at.start + (tokens > 0 ? 16 * w : 0);
    float *e_scale = s.e_scale + 16 * w, *q_scale = s.q_scale + 16 * w, *k_norm = s.k_norm + 16 * w;  // of this warp's rows
    u16 *rows = s.warp[w].rows, *my_k = s.k_until + 16 * w * PITCH;
    char* log_decays = (char*)s.log_decay[w];
    const long long key_row = (first * H + head / (HV / H)) * K, value_row = (first * HV + head) * K;
    const auto fetch_log_decays = [&](int pass) {
        const char* from = (const char*)a.g;
        if (a.wide_g) fetch<4 * WIDTH>(log_decays, 4 * WIDTH, from + 4 * (value_row + pass * WIDTH), 4 * HV * K, tokens, lane);
        else fetch<2 * WIDTH>(log_decays, 2 * WIDTH, from + 2 * (value_row + pass * WIDTH), 2 * HV * K, tokens, lane);
    };
    fetch<2 * K>((char*)rows, 2 * PITCH, (const char*)(a.q + key_row), 2 * H * K, tokens, lane);
    fetch<2 * K>((char*)my_k, 2 * PITCH, (const char*)(a.k + key_row), 2 * H * K, tokens, lane);
    fetch_log_decays(0);
    if (lane < 16) {
        float beta = lane < tokens;
        if (ERASE == 0 && lane < tokens) {
            const long long from = (first + lane) * HV + head;
            beta = a.wide_erase ? ((const float*)a.erase)[from] : load_scalar((const u16*)a.erase + from);
            if (GATED) beta = sigmoid(beta);
        }
        out.beta[16 * w + lane] = beta;
        e_scale[lane] = ERASE ? 1.0f : beta, q_scale[lane] = a.scale, k_norm[lane] = 1.0f;
    }
    copies_landed();
    warp_barrier();
    {
        float own[2][4] = {}, q_own[2][4] = {};  // of 8 tokens each: q and k against k; q against q
#pragma unroll
        for (int from = 0; from < K; from += WIDTH) own_products<GATED>(own, q_own, rows, my_k, from, lane);
        if (c == r / 2)  // this lane holds the diagonals
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
    }
    float near[4][4] = {};  // scores at levels 1, 2, 4, 8
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        const int column = pass * WIDTH + 2 * lane;
        u32 q[16], k[16], e[16];  // e with ERASE alone
        Float2 d[16];
        if (pass > 0) {
            copies_landed();
            warp_barrier();
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
            if (ERASE) e[i] = i < tokens ? *(const u32*)((const u16*)a.erase + value_row + (long long)HV * K * i + column) : 0;
            q[i] = pair_at(rows + i * PITCH + column), k[i] = pair_at(my_k + i * PITCH + column);
        }
        if (a.wide_g) {
#pragma unroll
            for (int i = 0; i < 16; i++) d[i] = ((const Float2*)log_decays)[32 * i + lane];
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const u32 y = ((const u32*)log_decays)[32 * i + lane];
                d[i] = {{low(y), high(y)}};
            }
        }
        if (pass + 1 < PASSES) {
            warp_barrier();
            fetch_log_decays(pass + 1);
        }
        if (GATED) {
            const float rate = exp_(a.A_log[head]);
            const Float2 bias = *(const Float2*)(a.dt_bias + head * K + column);
            if (a.gate == 1) {
#pragma unroll
                for (int i = 0; i < 16; i++)
#pragma unroll
                    for (int x = 0; x < 2; x++) d[i].x[x] = i < tokens ? -rate * softplus(d[i].x[x] + bias.x[x]) : 0.0f;
            } else {
                const float slope = -rate * LOG2E;
                const Float2 start = product(bias, slope);
#pragma unroll
                for (int i = 0; i < 16; i++)
#pragma unroll
                    for (int x = 0; x < 2; x++) d[i].x[x] = i < tokens ? divide_(a.floor, 1.0f + exp2_(fmaf(d[i].x[x], slope, start.x[x]))) : 0.0f;
            }
        }
        // A block's whole decay: a product of many numbers near 1 drifts, so slow ones come from the sum of logarithms.
        Float2 total = NO_DECAY, sum = {{0.0f, 0.0f}};
#pragma unroll
        for (int i = 0; i < 16; i++) {
            sum.x[0] += d[i].x[0], sum.x[1] += d[i].x[1];
            d[i] = {{exp_(d[i].x[0]), exp_(d[i].x[1])}};
            total = product(total, d[i]);
        }
#pragma unroll
        for (int x = 0; x < 2; x++)
            if (sum.x[x] > -1.0f) total.x[x] = careful_exp(sum.x[x]);
        *(Float2*)(s.total + w * K + column) = total;

        level<1>(near[0], d, q, k, e, rows, my_k, column, lane);
        level<2>(near[1], d, q, k, e, rows, my_k, column, lane);
        level<4>(near[2], d, q, k, e, rows, my_k, column, lane);
        level<8>(near[3], d, q, k, e, rows, my_k, column, lane);
        if (pass == 0) before_stores();
        group_barrier(group);  // the decays of all blocks are known, and what lay in the rows has been read
        forget(d);

        // The 16 tokens since their block's start and until its end; with the other blocks, since the chunk's.
        if (w < WIDTH / 32) {
            const int channel = pass * WIDTH + 32 * w + lane;
            const float f1 = s.total[K + channel], f2 = s.total[2 * K + channel];
            s.between[channel] = (u16)pack(f1, 0.0f), s.between[K + channel] = (u16)pack(f2, 0.0f);
            s.between[2 * K + channel] = (u16)pack(f1 * f2, 0.0f);
            out.D[channel] = s.total[channel] * f1 * f2 * s.total[3 * K + channel];
        }
        {
            Float2 run = NO_DECAY, start = NO_DECAY;
#pragma unroll
            for (int J = 0; J < 3; J++)
                if (J < w) start = product(start, *(const Float2*)(s.total + J * K + column));
            Float2 scaled = product(start, a.scale);  // for q, where its scale is the same for all
            const int at_column = swizzled_offset(16 * w, pass * 8) + column % 8, turn = column / 8 % 8 * 8;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                u16 *E = out.E + at_column + (i % 8 * 8 ^ turn) + 64 * i, *Q = E + (out.Q - out.E), *since = rows + i * PITCH + column;
                if (ERASE == 2) store(since, times(e[i], factor(run))), store(E, times(e[i], factor(start)));
                run = product(run, d[i]), start = product(start, d[i]), scaled = product(scaled, d[i]);
                const u32 f = factor(run);
                if (ERASE != 2) store(since, times(ERASE ? e[i] : k[i], f));
                store(since + 16 * PITCH, times(q[i], f));
                if (ERASE != 2) store(E, ERASE ? times(e[i], factor(start)) : times(k[i], factor(product(start, e_scale[i]))));
                store(Q, times(q[i], factor(GATED ? product(start, q_scale[i]) : scaled)));
            }
            run = NO_DECAY;
#pragma unroll
            for (int i = 15; i >= 0; i--) {
                store(my_k + i * PITCH + column, times(k[i], factor(run)));
                run = product(run, d[i]);
            }
        }
    }
    group_barrier(group);

    // Blocks of 16 against earlier ones: six pairs of blocks, shared out so that each warp has both kinds of scores of one
    // pair, and one kind of another.
    float both[2][2][4] = {}, one_kind[2][4] = {};
    const int I = w == 0 || w == 2 ? 3 : 2, J = w < 2 ? 0 : 1, I2 = w < 2 ? 1 : 3, J2 = w < 2 ? 0 : 2, kind = w % 2;  // kind 0: erase, 1: q
    {
        const int left = lane % 16 * PITCH + lane / 16 * 8, right = (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8;
        const u16 *left1 = s.warp[I].rows + left, *left2 = s.warp[I2].rows + left + kind * 16 * PITCH;
        const u16 *right1 = s.k_until + right + 16 * J * PITCH, *right2 = s.k_until + right + 16 * J2 * PITCH;
        const u16* f = s.between + (w == 0 ? 2 : w == 2 ? 1 : 0) * K + 2 * c;  // of the blocks between I and J, if there are any
#pragma unroll
        for (int step = 0; step < K / 16; step++) {
            const Uint4 e = load_tiles(left1 + 16 * step), q = load_tiles(left1 + 16 * PITCH + 16 * step), x = load_tiles(left2 + 16 * step);
            Uint4 k = load_tiles(right1 + 16 * step);
            const Uint4 k2 = load_tiles(right2 + 16 * step);
            if (w < 3) {
                const u32 f0 = *(const u32*)(f + 16 * step), f8 = *(const u32*)(f + 16 * step + 8);
                k.x[0] = times(k.x[0], f0), k.x[1] = times(k.x[1], f8), k.x[2] = times(k.x[2], f0), k.x[3] = times(k.x[3], f8);
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                mma(one_kind[n], x.x[0], x.x[1], x.x[2], x.x[3], k2.x[2 * n], k2.x[2 * n + 1]);
                mma(both[0][n], e.x[0], e.x[1], e.x[2], e.x[3], k.x[2 * n], k.x[2 * n + 1]);
                mma(both[1][n], q.x[0], q.x[1], q.x[2], q.x[3], k.x[2 * n], k.x[2 * n + 1]);
            }
        }
    }

    // A and P go to shared memory; -A of other blocks, as M asks for it. P has no k_norm: M^T brings it.
    group_barrier(group);  // all lanes have read the rows; A and P lie over them
    const auto store_erase = [&](const float (&A)[2][4], int I, int J) {
        float* L = s.warp[I].L + r * L_PITCH + 16 * J + 2 * c;
        const float *scale = s.e_scale + 16 * I + r, *norm = s.k_norm + 16 * J + 2 * c;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float A0 = A[n][2 * h] * -scale[8 * h], A1 = A[n][2 * h + 1] * -scale[8 * h];
                L[8 * h * L_PITCH + 8 * n] = as_factor(GATED ? A0 * norm[8 * n] : A0), L[8 * h * L_PITCH + 8 * n + 1] = as_factor(GATED ? A1 * norm[8 * n + 1] : A1);
            }
    };
    const auto store_q = [&](const float (&P)[2][4], int I, int J) {
        u16* to = s.warp[I].P + r * P_PITCH + 16 * J + 2 * c;
        const float* scale = s.q_scale + 16 * I + r;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) store(to + 8 * h * P_PITCH + 8 * n, pack(P[n][2 * h] * scale[8 * h], P[n][2 * h + 1] * scale[8 * h]));
    };
    store_erase(both[0], I, J), store_q(both[1], I, J);
    if (kind == 0) store_erase(one_kind, I2, J2); else store_q(one_kind, I2, J2);
    float* L = s.warp[w].L;
    u16* P = s.warp[w].P;
    *(Uint4*)(P + lane / 2 * P_PITCH + 16 * w + lane % 2 * 8) = Uint4{};
    if (w % 2 == 0) *(Uint4*)(P + lane / 2 * P_PITCH + 16 * w + 16 + lane % 2 * 8) = Uint4{};
    warp_barrier();
    scatter_scores<1, GATED>(near[0], L + 16 * w, P + 16 * w, e_scale, q_scale, k_norm, r, c);
    scatter_scores<2, GATED>(near[1], L + 16 * w, P + 16 * w, e_scale, q_scale, k_norm, r, c);
    scatter_scores<4, GATED>(near[2], L + 16 * w, P + 16 * w, e_scale, q_scale, k_norm, r, c);
    scatter_scores<8, GATED>(near[3], L + 16 * w, P + 16 * w, e_scale, q_scale, k_norm, r, c);
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
                const Uint4 row = *(const Uint4*)(half + i * L_PITCH + t);
#pragma unroll
                for (int y = 0; y < 4; y++)
                    if (t + y < i) sum[y % 2] -= __uint_as_float(row.x[y]) * m[t + y];
            }
            m[i] = sum[0] + sum[1];
        }
        warp_barrier();
        if (lane < 16)
#pragma unroll
            for (int i = 0; i < 8; i++) half[i * L_PITCH + column] = as_factor(m[i]);
        warp_barrier();
        float x[4] = {}, y[4] = {};
        const float *M11 = block + 2 * c * L_PITCH + r, *A21 = block + (8 + r) * L_PITCH + 2 * c, *M22 = A21 + 8;
        mma_split_tf32(x, Float4{{M11[0], 0.0f, M11[L_PITCH], 0.0f}}, A21[0], A21[1]);
        mma_split_tf32(y, Float4{{-x[0], 0.0f, -x[1], 0.0f}}, M22[0], M22[1]);
        float* M21 = block + (8 + 2 * c) * L_PITCH + r;
        M21[0] = as_factor(y[0]), M21[L_PITCH] = as_factor(y[1]), block[lane / 4 * L_PITCH + 8 + 2 * c] = 0.0f, block[lane / 4 * L_PITCH + 9 + 2 * c] = 0.0f;
    }
    group_barrier(group);

    // All have read k until its block's end: on to the chunk's.
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        const int column = pass * WIDTH + 2 * lane;
        Float2 after = NO_DECAY;
#pragma unroll
        for (int J = 1; J < 4; J++)
            if (J > w) after = product(after, *(const Float2*)(s.total + J * K + column));
        const u32 f = factor(after);
        u16* to = s.k + swizzled_offset(16 * w, pass * 8) + column % 32 / 8 * 2;
        const int turn = (column / 32 % 2 * 4 + column % 8 / 2) * 8;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            store(to + (i % 8 * 8 ^ turn) + 64 * i, times(pair_at(my_k + i * PITCH + column), f));
        }
    }
    to_tensor_cores();

    // Block row w of M^T: M_Iw^T = -(sum_t M_tw^T A_It^T) M_II^T. Every product's result is the next one's first operand.
    u32 m2[4][4] = {};
    {
        float m[4][2][4] = {};
        const float *straight = s.warp[0].L + r * L_PITCH + 2 * c, *transposed = s.warp[0].L + 2 * c * L_PITCH + r;
        constexpr int NEXT = sizeof(Warp) / 4;  // from the rows of one block to those of the next
#pragma unroll
        for (int I = 0; I < 4; I++) {
            if (I == w)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int x = 0; x < 4; x++) m[I][n][x] = transposed[I * NEXT + (8 * n + x % 2) * L_PITCH + 16 * I + 8 * (x / 2)];
            if (I > w) {
                float sum[2][4] = {};
#pragma unroll
                for (int t = 0; t < 3; t++)
                    if (t >= w && t < I)
#pragma unroll
                        for (int step = 0; step < 2; step++) {
                            const SplitTf32 x(Float4{{m[t][step][0], m[t][step][2], m[t][step][1], m[t][step][3]}});
#pragma unroll
                            for (int n = 0; n < 2; n++) {
                                const float* b = straight + I * NEXT + 8 * n * L_PITCH + 16 * t + 8 * step;
                                mma_split_tf32(sum[n], x, b[0], b[1]);
                            }
                        }
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    const SplitTf32 x(Float4{{sum[step][0], sum[step][2], sum[step][1], sum[step][3]}});
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const float* b = straight + I * NEXT + 8 * n * L_PITCH + 16 * I + 8 * step;
                        mma_split_tf32(m[I][n], x, b[0], b[1]);
                    }
                }
            }
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

    group_barrier(group);

    // W = M^T k, rows of block w; while it runs, (P M)^T.
    float W[K / 2] = {};
    settle(W);
    wgmma_fence();
#pragma unroll
    for (int I = 0; I < 4; I++) wgmma<true, false>(W, m2[I], by_rows(s.k, I));
    wgmma_commit();
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
                    const Uint4 b = load_tiles(s.warp[2 * group + row / 16].P + row % 16 * P_PITCH + 16 * I + 8 * half);
                    mma(x[p], m2[I][0], m2[I][1], m2[I][2], m2[I][3], b.x[0], b.x[1]);
                    mma(x[p + 1], m2[I][0], m2[I][1], m2[I][2], m2[I][3], b.x[2], b.x[3]);
                }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Uint4 o;
#pragma unroll
            for (int p = 0; p < 4; p++) o.x[p] = pack(x[p][2 * h], x[p][2 * h + 1]);
            *(Uint4*)(out.P + swizzled_offset(16 * w + 8 * h + r, 4 * group + c)) = o;
        }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int part = 0; part < K / 32; part++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Uint4 o;
#pragma unroll
            for (int p = 0; p < 4; p++) o.x[p] = pack(W[16 * part + 4 * p + 2 * h], W[16 * part + 4 * p + 2 * h + 1]);
            *(Uint4*)(out.W + swizzled_offset(16 * w + 8 * h + r, 4 * part + c)) = o;
        }
}
