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

struct Smem {
    float L[C * L_STRIDE];    // A, then on its diagonal blocks M
    u16 P[C * P_STRIDE];
    u16 rows[C * K];          // k until its block's end, then k until the chunk's end
    float total[4 * K];       // decay of each block of 16
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

extern "C" __global__ void __launch_bounds__(128, 3) intra(const __grid_constant__ Arguments a) {
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
    u32 e_since[GROUPS][2][4], q_since[GROUPS][2][4];
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        Quad q4[2], k4[2], e4[2];
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
        Quad k_until[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float since[2][4], until[2][4], total[2][4], before[2][4], qv[2][4], kv[2][4], ev[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    u32 q2 = q4[h].x[2 * half + x / 2], k2 = k4[h].x[2 * half + x / 2], e2 = e4[h].x[2 * half + x / 2];
                    qv[h][x] = x % 2 ? high(q2) : low(q2);
                    kv[h][x] = x % 2 ? high(k2) : low(k2);
                    ev[h][x] = ERASE ? (x % 2 ? high(e2) : low(e2)) : kv[h][x];
                    own[h] += qv[h][x] * kv[h][x];
                    if (gate) q_norm[h] += qv[h][x] * qv[h][x], k_norm[h] += kv[h][x] * kv[h][x];
                    since[h][x] = total[h][x] = decay[h][4 * half + x];
                    until[h][x] = 1.0f;
                    before[h][x] = 1.0f;  // ERASE 2: as since, without the row's own decay
                }
#pragma unroll
            for (int level = 0; level < 3; level++) {
                const bool late = (r >> level) & 1;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float f[4], fe[4];
#pragma unroll
                    for (int x = 0; x < 4; x++) {
                        f[x] = late ? since[h][x] : until[h][x];
                        fe[x] = ERASE == 2 ? (late ? before[h][x] : until[h][x]) : f[x];
                    }
                    u32 key[2], query[2];  // key: of late rows erase, of early rows k
#pragma unroll
                    for (int p = 0; p < 2; p++) {
                        float x0 = ERASE && late ? ev[h][2 * p] : kv[h][2 * p], x1 = ERASE && late ? ev[h][2 * p + 1] : kv[h][2 * p + 1];
                        key[p] = pack(x0 * fe[2 * p], x1 * fe[2 * p + 1]);
                        query[p] = pack(qv[h][2 * p] * f[2 * p], qv[h][2 * p + 1] * f[2 * p + 1]);
                    }
                    mma(near[level][h], key[0], query[0], key[1], query[1], key[0], key[1]);
#pragma unroll
                    for (int x = 0; x < 4; x++) {
                        float other = swap_lanes(total[h][x], 4 << level);
                        since[h][x] *= late ? other : 1.0f;
                        if (ERASE == 2) before[h][x] *= late ? other : 1.0f;
                        until[h][x] *= late ? 1.0f : other;
                        total[h][x] *= other;
                    }
                }
            }
            u32 key[2], query[2], early[2];
#pragma unroll
            for (int p = 0; p < 2; p++) {
                early[p] = pack(kv[0][2 * p] * until[0][2 * p], kv[0][2 * p + 1] * until[0][2 * p + 1]);
                const float* f = ERASE == 2 ? before[1] : since[1];
                key[p] = pack(ev[1][2 * p] * f[2 * p], ev[1][2 * p + 1] * f[2 * p + 1]);
                query[p] = pack(qv[1][2 * p] * since[1][2 * p], qv[1][2 * p + 1] * since[1][2 * p + 1]);
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
                    e_since[group][h][2 * half + p] = pack(ev[h][2 * p] * f[2 * p], ev[h][2 * p + 1] * f[2 * p + 1]);
                    q_since[group][h][2 * half + p] = pack(qv[h][2 * p] * since[h][2 * p], qv[h][2 * p + 1] * since[h][2 * p + 1]);
                    k_until[h].x[2 * half + p] = pack(kv[h][2 * p] * until[h][2 * p], kv[h][2 * p + 1] * until[h][2 * p + 1]);
                }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = 16 * w + 8 * h + r;
            *(Quad*)(s.rows + row * K + 8 * swizzled(row, 4 * group + c)) = k_until[h];
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
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        float ev[2][8], qv[2][8];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int p = 0; p < 4; p++) {
                ev[h][2 * p] = low(e_since[group][h][p]), ev[h][2 * p + 1] = high(e_since[group][h][p]);
                qv[h][2 * p] = low(q_since[group][h][p]), qv[h][2 * p + 1] = high(q_since[group][h][p]);
            }
#pragma unroll
        for (int J = 2; J >= 0; J--)
            if (J < w) {
                u32 e2[2][4], q2[2][4];
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int p = 0; p < 4; p++) {
                        e2[h][p] = pack(ev[h][2 * p], ev[h][2 * p + 1]);
                        q2[h][p] = pack(qv[h][2 * p], qv[h][2 * p + 1]);
                    }
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    int row = 16 * J + 8 * n + r;
                    Quad b = *(const Quad*)(s.rows + row * K + 8 * swizzled(row, 4 * group + c));
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int p = 2 * half;
                        mma(far[J][0][n], e2[0][p], e2[1][p], e2[0][p + 1], e2[1][p + 1], b.x[p], b.x[p + 1]);
                        mma(far[J][1][n], q2[0][p], q2[1][p], q2[0][p + 1], q2[1][p + 1], b.x[p], b.x[p + 1]);
                    }
                }
#pragma unroll
                for (int x = 0; x < 8; x++) {
                    float f = s.total[J * K + 32 * group + 8 * c + x];
                    ev[0][x] *= f, ev[1][x] *= f, qv[0][x] *= f, qv[1][x] *= f;
                }
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Quad e4, q4;
#pragma unroll
            for (int p = 0; p < 4; p++) {
                e4.x[p] = pack(ev[h][2 * p] * e_scale[h], ev[h][2 * p + 1] * e_scale[h]);
                q4.x[p] = pack(qv[h][2 * p] * q_scale[h], qv[h][2 * p + 1] * q_scale[h]);
            }
            long long out = tile * C * K + image(16 * w + 8 * h + r, 4 * group + c);
            *(Quad*)(a.E + out) = e4;
            *(Quad*)(a.Q + out) = q4;
        }
    }

    // A and P go to shared memory, each warp its 16 rows.
    u32* P2 = (u32*)s.P;
#pragma unroll
    for (int J = 0; J < 4; J++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int i = 16 * w + 8 * h + r, j = 16 * J + 8 * n + 2 * c;
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
                s.L[i * L_STRIDE + j] = A[0] * e_scale[h] * n0;
                s.L[i * L_STRIDE + j + 1] = A[1] * e_scale[h] * n1;
                P2[(i * P_STRIDE + j) / 2] = pack(p[0] * q_scale[h] * n0, p[1] * q_scale[h] * n1);
            }
    warp_barrier();

    // M of the warp's own 16 x 16 block, by substitution: a column per lane.
    {
        float* block = s.L + 16 * w * L_STRIDE + 16 * w;
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
#pragma unroll
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
                        m[I][n][x] = s.L[(16 * I + 8 * n + 2 * c + x % 2) * L_STRIDE + 16 * I + r + 8 * (x / 2)];
            if (I > w) {
                float sum[2][4] = {};
#pragma unroll
                for (int t = 0; t < 3; t++)
                    if (t >= w && t < I)
#pragma unroll
                        for (int n = 0; n < 2; n++)
#pragma unroll
                            for (int step = 0; step < 2; step++) {
                                const float* b = s.L + (16 * I + 8 * n + r) * L_STRIDE + 16 * t + 8 * step + 2 * c;
                                mma_tf32(sum[n], m[t][step][0], m[t][step][2], m[t][step][1], m[t][step][3], b[0], b[1]);
                            }
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int step = 0; step < 2; step++) {
                        const float* b = s.L + (16 * I + 8 * n + r) * L_STRIDE + 16 * I + 8 * step + 2 * c;
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
#pragma unroll
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
#pragma unroll
    for (int group = 0; group < 2; group++) {
        float out[4][4] = {};
#pragma unroll
        for (int I = 0; I < 4; I++)
            if (I >= w && I < 2 * group + 2)
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const u32* b = P2 + ((32 * group + 8 * (r / 2) + 2 * p + r % 2) * P_STRIDE + 16 * I + 2 * c) / 2;
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
