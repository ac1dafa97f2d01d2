// Everything of a chunk that does not need the memory; what intra.py of the Triton room computes, letter for letter.
//
// Grid     (chunk x value head), 4 warps; warp w holds tokens 16 w + r and 16 w + r + 8, lane c of a row eight channels
//          of every 32. So a decayed row is at once the first and the second operand of a product, without moving.
// Tree     decays inside 16 tokens: `since` and `until` are products of decays from a block's first token, up to its last
//          one; blocks double by one exchange between lanes. One exponential per number, no difference of sums.
// ERASE    0: erase = beta k.  1: a vector.  2: a vector that reads before its own token's decay.
#include "warp.cuh"

#ifndef ERASE
#define ERASE 0
#endif
#ifndef KEY_DIM
#define KEY_DIM 128
#endif
constexpr int C = 64, K = KEY_DIM, GROUPS = K / 32;
constexpr int L_STRIDE = 72, P_STRIDE = 74;

struct Block {  // what one warp keeps: first its decayed rows, each lane its own; then its rows of A (and M) and of P
    union {
        Quad since[GROUPS][2][2][32];
        struct {
            float L[16 * L_STRIDE];
            u16 P[16 * P_STRIDE];
        };
    };
};
struct Smem {
    Block block[4];
    u16 rows[C * K];     // k until its block's end, then k until the chunk's end
    float total[4 * K];  // decay of each block of 16
    float k_norm[C];
};

struct Arguments {
    const u16 *q, *k;
    const void *erase, *g;
    const float *A_log, *dt_bias;
    u16 *E, *Q, *W, *P;
    float* D;
    u16* M;
    float* norms;
    const int *cu_seqlens, *chunk_offsets;
    int T, N, H, HV;
    float scale, floor;
    int gate, wide_g, wide_erase;
};

extern "C" __global__ void __launch_bounds__(128, 4) intra(const __grid_constant__ Arguments a) {
    const int T = a.T, N = a.N, H = a.H, HV = a.HV, gate = a.gate;
    const void *g = a.g, *erase = a.erase;
#ifdef WARP_ON_CPU
    Smem& s = *(Smem*)cpu_shared;
#else
    extern __shared__ __align__(16) char shared[];
    Smem& s = *(Smem*)shared;
#endif
    const int lane = threadIdx.x % 32, w = threadIdx.x / 32, r = lane / 4, c = lane % 4;
    const int head = blockIdx.x % HV;
    const long long tile = blockIdx.x;
    const Chunk at = find_chunk(blockIdx.x / HV, a.cu_seqlens, a.chunk_offsets, T, N, C);
    if (at.count <= 0) return;

    float beta[2];
    const u16 *q_row[2], *k_row[2];
    long long value_row[2];
    bool inside[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = 16 * w + 8 * h + r;
        inside[h] = row < at.count;
        long long token = at.start + (inside[h] ? row : 0);
        q_row[h] = a.q + (token * H + head / (HV / H)) * K + 8 * c;
        k_row[h] = a.k + (token * H + head / (HV / H)) * K + 8 * c;
        value_row[h] = (token * HV + head) * K + 8 * c;
        beta[h] = 1.0f;
        if (ERASE == 0) {
            beta[h] = a.wide_erase ? ((const float*)erase)[token * HV + head] : one((const u16*)erase + token * HV + head);
            if (gate) beta[h] = sigmoid(beta[h]);
            if (!inside[h]) beta[h] = 0.0f;
        }
    }
    const float rate = gate ? exp_(a.A_log[head]) : 0.0f;

    float near[3][2][4] = {}, mid[4] = {};  // scores at levels 1, 2, 4 for each 8 rows, and at level 8: k rows, then q rows
    float own[2] = {}, q_norm[2] = {}, k_norm[2] = {};
    const bool late[3] = {(r & 1) != 0, (r & 2) != 0, (r & 4) != 0};
#pragma unroll 1
    for (int group = 0; group < GROUPS; group++) {
        Quad q4[2], k4[2], e4[2], e_since[2], q_since[2], k_until[2];
        float decay[2][8];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            q4[h] = k4[h] = e4[h] = Quad{{0, 0, 0, 0}};
#pragma unroll
            for (int x = 0; x < 8; x++) decay[h][x] = 0.0f;
            if (inside[h]) {
                q4[h] = *(const Quad*)(q_row[h] + 32 * group);
                k4[h] = *(const Quad*)(k_row[h] + 32 * group);
                if (ERASE) e4[h] = *(const Quad*)((const u16*)erase + value_row[h] + 32 * group);
                if (a.wide_g) {
#pragma unroll
                    for (int x = 0; x < 8; x += 4) {
                        Quad g4 = *(const Quad*)((const float*)g + value_row[h] + 32 * group + x);
#pragma unroll
                        for (int y = 0; y < 4; y++) decay[h][x + y] = __uint_as_float(g4.x[y]);
                    }
                } else {
                    Quad g4 = *(const Quad*)((const u16*)g + value_row[h] + 32 * group);
#pragma unroll
                    for (int x = 0; x < 4; x++) decay[h][2 * x] = low(g4.x[x]), decay[h][2 * x + 1] = high(g4.x[x]);
                }
                if (gate)
#pragma unroll
                    for (int x = 0; x < 8; x++) {
                        float y = decay[h][x] + a.dt_bias[head * K + 32 * group + 8 * c + x];
                        decay[h][x] = gate == 1 ? -rate * softplus(y) : a.floor * sigmoid(rate * y);
                    }
            }
#pragma unroll
            for (int x = 0; x < 8; x++) decay[h][x] = exp_(decay[h][x]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float since[2][4], until[2][4], total[2][4], before[2][4];
            u32 q2[2][2], k2[2][2], e2[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int p = 0; p < 2; p++) {
                    q2[h][p] = q4[h].x[2 * half + p], k2[h][p] = k4[h].x[2 * half + p];
                    e2[h][p] = ERASE ? e4[h].x[2 * half + p] : k2[h][p];
                    own[h] += low(q2[h][p]) * low(k2[h][p]) + high(q2[h][p]) * high(k2[h][p]);
                    if (gate) {
                        q_norm[h] += low(q2[h][p]) * low(q2[h][p]) + high(q2[h][p]) * high(q2[h][p]);
                        k_norm[h] += low(k2[h][p]) * low(k2[h][p]) + high(k2[h][p]) * high(k2[h][p]);
                    }
                }
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    since[h][x] = total[h][x] = decay[h][4 * half + x];
                    until[h][x] = before[h][x] = 1.0f;  // before: as since, without the row's own decay
                }
            }
#pragma unroll
            for (int level = 0; level < 3; level++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    u32 key[2], query[2];  // key: of late rows erase, of early rows k
#pragma unroll
                    for (int p = 0; p < 2; p++) {
                        u32 f = pack(late[level] ? since[h][2 * p] : until[h][2 * p], late[level] ? since[h][2 * p + 1] : until[h][2 * p + 1]);
                        u32 fe = f;
                        if (ERASE == 2)
                            fe = pack(late[level] ? before[h][2 * p] : until[h][2 * p], late[level] ? before[h][2 * p + 1] : until[h][2 * p + 1]);
                        key[p] = times(ERASE && late[level] ? e2[h][p] : k2[h][p], fe);
                        query[p] = times(q2[h][p], f);
                    }
                    mma(near[level][h], key[0], query[0], key[1], query[1], key[0], key[1]);
#pragma unroll
                    for (int x = 0; x < 4; x++) {
                        float other = swap_lanes(total[h][x], 4 << level);
                        if (late[level]) since[h][x] *= other;
                        if (ERASE == 2 && late[level]) before[h][x] *= other;
                        if (!late[level]) until[h][x] *= other;
                        total[h][x] *= other;
                    }
                }
            u32 key[2], query[2], early[2];
#pragma unroll
            for (int p = 0; p < 2; p++) {
                u32 f = pack(since[1][2 * p], since[1][2 * p + 1]);
                early[p] = times(k2[0][p], pack(until[0][2 * p], until[0][2 * p + 1]));
                key[p] = times(e2[1][p], ERASE == 2 ? pack(before[1][2 * p], before[1][2 * p + 1]) : f);
                query[p] = times(q2[1][p], f);
            }
            mma(mid, key[0], query[0], key[1], query[1], early[0], early[1]);
#pragma unroll
            for (int x = 0; x < 4; x++) {
                since[1][x] *= total[0][x];
                before[1][x] *= total[0][x];
                until[0][x] *= total[1][x];
                if (r == 0) s.total[w * K + 32 * group + 8 * c + 4 * half + x] = total[0][x] * total[1][x];
            }
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int p = 0; p < 2; p++) {
                    const float* f = ERASE == 2 ? before[h] : since[h];
                    e_since[h].x[2 * half + p] = pack(low(e2[h][p]) * f[2 * p], high(e2[h][p]) * f[2 * p + 1]);
                    q_since[h].x[2 * half + p] = pack(low(q2[h][p]) * since[h][2 * p], high(q2[h][p]) * since[h][2 * p + 1]);
                    k_until[h].x[2 * half + p] = pack(low(k2[h][p]) * until[h][2 * p], high(k2[h][p]) * until[h][2 * p + 1]);
                }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = 16 * w + 8 * h + r;
            *(Quad*)(s.rows + row * K + 8 * swizzled(row, 4 * group + c)) = k_until[h];
            s.block[w].since[group][0][h][lane] = e_since[h];
            s.block[w].since[group][1][h][lane] = q_since[h];
        }
    }
    float e_scale[2], q_scale[2];  // what a row's scores are multiplied by, beside the column's k_norm
#pragma unroll
    for (int h = 0; h < 2; h++) {
        own[h] = quad_sum(own[h]);
        q_norm[h] = gate ? rsqrt_(quad_sum(q_norm[h]) + 1e-6f) : 1.0f;
        k_norm[h] = gate ? rsqrt_(quad_sum(k_norm[h]) + 1e-6f) : 1.0f;
        int row = 16 * w + 8 * h + r;
        if (c == 0) {
            s.k_norm[row] = k_norm[h];
            if (gate && a.norms) a.norms[tile * 2 * C + row] = q_norm[h], a.norms[tile * 2 * C + C + row] = k_norm[h];
        }
        e_scale[h] = ERASE ? 1.0f : beta[h] * k_norm[h];
        q_scale[h] = q_norm[h] * a.scale;
    }
    block_barrier();

    // Blocks of 16 against earlier ones: since this block's start, times whole blocks between, times until that one's end.
    float far[3][2][2][4] = {};
#pragma unroll 1
    for (int group = 0; group < GROUPS; group++) {
        Quad e4[2], q4[2];
        float f[8];
        u32 f2[4];
#pragma unroll
        for (int h = 0; h < 2; h++) e4[h] = s.block[w].since[group][0][h][lane], q4[h] = s.block[w].since[group][1][h][lane];
#pragma unroll
        for (int x = 0; x < 8; x++) f[x] = 1.0f;
#pragma unroll
        for (int p = 0; p < 4; p++) f2[p] = pack(1.0f, 1.0f);
#pragma unroll
        for (int J = 2; J >= 0; J--)
            if (J < w) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int p = 2 * half;
                    u32 e2[4] = {times(e4[0].x[p], f2[p]), times(e4[1].x[p], f2[p]), times(e4[0].x[p + 1], f2[p + 1]), times(e4[1].x[p + 1], f2[p + 1])};
                    u32 q2[4] = {times(q4[0].x[p], f2[p]), times(q4[1].x[p], f2[p]), times(q4[0].x[p + 1], f2[p + 1]), times(q4[1].x[p + 1], f2[p + 1])};
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        int row = 16 * J + 8 * n + r;
                        const u32* b = (const u32*)(s.rows + row * K + 8 * swizzled(row, 4 * group + c)) + p;
                        mma(far[J][0][n], e2[0], e2[1], e2[2], e2[3], b[0], b[1]);
                        mma(far[J][1][n], q2[0], q2[1], q2[2], q2[3], b[0], b[1]);
                    }
                }
#pragma unroll
                for (int x = 0; x < 8; x++) f[x] *= s.total[J * K + 32 * group + 8 * c + x];
#pragma unroll
                for (int p = 0; p < 4; p++) f2[p] = pack(f[2 * p], f[2 * p + 1]);
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Quad e_out, q_out;
#pragma unroll
            for (int p = 0; p < 4; p++) {
                e_out.x[p] = pack(low(e4[h].x[p]) * (f[2 * p] * e_scale[h]), high(e4[h].x[p]) * (f[2 * p + 1] * e_scale[h]));
                q_out.x[p] = pack(low(q4[h].x[p]) * (f[2 * p] * q_scale[h]), high(q4[h].x[p]) * (f[2 * p + 1] * q_scale[h]));
            }
            long long out = tile * C * K + image(16 * w + 8 * h + r, 4 * group + c);
            *(Quad*)(a.E + out) = e_out;
            *(Quad*)(a.Q + out) = q_out;
        }
    }

    // A and P go to shared memory, each warp its 16 rows.
    warp_barrier();  // all lanes have read their decayed rows; A and P lie over them
    u32* P2 = (u32*)s.block[w].P;
    float* L = s.block[w].L;
#pragma unroll
    for (int J = 0; J < 4; J++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int j = 16 * J + 8 * n + 2 * c;
                float A[2] = {0.0f, 0.0f}, p[2] = {0.0f, 0.0f};
                if (J < w) {
#pragma unroll
                    for (int x = 0; x < 2; x++) A[x] = far[J % 3][0][n][2 * h + x], p[x] = far[J % 3][1][n][2 * h + x];
                } else if (J == w && h == 1 && n == 0) {
#pragma unroll
                    for (int x = 0; x < 2; x++) A[x] = mid[x], p[x] = mid[2 + x];
                } else if (J == w && h == n) {
#pragma unroll
                    for (int x = 0; x < 2; x++) {
                        int apart = r ^ (2 * c + x);
                        if (r > 2 * c + x) {
                            A[x] = apart & 4 ? near[2][h][x] : apart & 2 ? near[1][h][x] : near[0][h][x];
                            p[x] = apart & 4 ? near[2][h][2 + x] : apart & 2 ? near[1][h][2 + x] : near[0][h][2 + x];
                        }
                        if (apart == 0) p[x] = own[h];
                    }
                }
                float n0 = s.k_norm[j], n1 = s.k_norm[j + 1];
                L[(8 * h + r) * L_STRIDE + j] = A[0] * e_scale[h] * n0;
                L[(8 * h + r) * L_STRIDE + j + 1] = A[1] * e_scale[h] * n1;
                P2[((8 * h + r) * P_STRIDE + j) / 2] = pack(p[0] * q_scale[h] * n0, p[1] * q_scale[h] * n1);
            }
    warp_barrier();

    // M of the warp's own 16 x 16 block, by substitution: a column per lane.
    {
        float* block = L + 16 * w;
        int column = lane % 16;
        float m[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
            for (int t = 0; t < i; t++) sum -= block[i * L_STRIDE + t] * m[t];
            m[i] = sum;
        }
        warp_barrier();
        if (lane < 16)
#pragma unroll
            for (int i = 0; i < 16; i++) block[i * L_STRIDE + column] = m[i];
    }
    block_barrier();  // all have read `rows` as k_until, too

    // k until the chunk's end, its pairs laid out as columns of tiles: column 2c + x of tile 4 group + p.
#pragma unroll 1
    for (int group = 0; group < GROUPS; group++) {
        float f[8];
#pragma unroll
        for (int x = 0; x < 8; x++) {
            int at = 32 * group + 8 * c + x;
            f[x] = 1.0f;
            for (int J = 1; J < 4; J++)
                if (J > w) f[x] *= s.total[J * K + at];
        }
        Quad k4[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = 16 * w + 8 * h + r;
            k4[h] = *(const Quad*)(s.rows + row * K + 8 * swizzled(row, 4 * group + c));
        }
        warp_barrier();
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int p = 0; p < 4; p++) {
                int row = 16 * w + 8 * h + r;
                u32 pair = pack(low(k4[h].x[p]) * f[2 * p] * k_norm[h], high(k4[h].x[p]) * f[2 * p + 1] * k_norm[h]);
                *(u32*)(s.rows + row * K + 8 * swizzled(row, 4 * group + p) + 2 * c) = pair;
            }
        warp_barrier();
    }
    for (int x = threadIdx.x; x < K; x += 128)
        a.D[tile * K + x] = s.total[x] * s.total[K + x] * s.total[2 * K + x] * s.total[3 * K + x];
    block_barrier();

    // Block row w of M^T: M_Iw^T = -(sum_t M_tw^T A_It^T) M_II^T. Every product's result is the next one's first operand.
    u32 m2[4][4] = {};
    {
        float m[4][2][4] = {};
#pragma unroll
        for (int I = 0; I < 4; I++) {
            if (I == w)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int x = 0; x < 4; x++)
                        m[I][n][x] = s.block[I].L[(8 * n + 2 * c + x % 2) * L_STRIDE + 16 * I + r + 8 * (x / 2)];
            if (I > w) {
                float sum[2][4] = {};
#pragma unroll
                for (int t = 0; t < 3; t++)
                    if (t >= w && t < I)
#pragma unroll
                        for (int n = 0; n < 2; n++)
#pragma unroll
                            for (int step = 0; step < 2; step++) {
                                const float* b = s.block[I].L + (8 * n + r) * L_STRIDE + 16 * t + 8 * step + 2 * c;
                                mma_tf32(sum[n], m[t][step][0], m[t][step][2], m[t][step][1], m[t][step][3], b[0], b[1]);
                            }
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int step = 0; step < 2; step++) {
                        const float* b = s.block[I].L + (8 * n + r) * L_STRIDE + 16 * I + 8 * step + 2 * c;
                        mma_tf32(m[I][n], sum[step][0], sum[step][2], sum[step][1], sum[step][3], -b[0], -b[1]);
                    }
            }
            m2[I][0] = pack(m[I][0][0], m[I][0][1]), m2[I][1] = pack(m[I][0][2], m[I][0][3]);
            m2[I][2] = pack(m[I][1][0], m[I][1][1]), m2[I][3] = pack(m[I][1][2], m[I][1][3]);
            if (a.M)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        *(u32*)(a.M + tile * C * C + image(16 * w + 8 * h + r, 2 * I + n) + 2 * c) = m2[I][2 * n + h];
        }
    }

    // W = M^T k_until, rows of block w.
#pragma unroll 1
    for (int group = 0; group < GROUPS; group++) {
        float out[4][4] = {};
#pragma unroll
        for (int I = 0; I < 4; I++)
            if (I >= w)
#pragma unroll
                for (int p = 0; p < 4; p += 2) {
                    int row = 16 * I + lane % 16;
                    Quad b = load_tiles_transposed(s.rows + row * K + 8 * swizzled(row, 4 * group + p + lane / 16));
                    mma(out[p], m2[I][0], m2[I][1], m2[I][2], m2[I][3], b.x[0], b.x[1]);
                    mma(out[p + 1], m2[I][0], m2[I][1], m2[I][2], m2[I][3], b.x[2], b.x[3]);
                }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Quad o;
#pragma unroll
            for (int p = 0; p < 4; p++) o.x[p] = pack(out[p][2 * h], out[p][2 * h + 1]);
            *(Quad*)(a.W + tile * C * K + image(16 * w + 8 * h + r, 4 * group + c)) = o;
        }
    }
    // (P M)^T = M^T P^T, rows of block w.
#pragma unroll 1
    for (int group = 0; group < 2; group++) {
        float out[4][4] = {};
#pragma unroll
        for (int I = 0; I < 4; I++)
            if (I >= w && I < 2 * group + 2)
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const int row = 8 * (r / 2) + 2 * p + r % 2;  // of 32
                    const u32* b = (const u32*)s.block[2 * group + row / 16].P + (row % 16 * P_STRIDE + 16 * I + 2 * c) / 2;
                    mma(out[p], m2[I][0], m2[I][1], m2[I][2], m2[I][3], b[0], b[4]);
                }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Quad o;
#pragma unroll
            for (int p = 0; p < 4; p++) o.x[p] = pack(out[p][2 * h], out[p][2 * h + 1]);
            *(Quad*)(a.P + tile * C * C + image(16 * w + 8 * h + r, 4 * group + c)) = o;
        }
    }
}
