// What a warp can do with fragments of matrices, and where a chunk lies. Everything a kernel asks of the hardware is
// here, so that the kernels can also be compiled for a CPU that plays the 32 lanes (tests/ops/warp_on_cpu.h).
//
// A fragment is spread over the lanes of a warp: lane = 4 r + c holds rows r and r + 8. All 16-bit numbers travel in
// pairs, the earlier column in the low half.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;

#ifndef KEY_DIM
#define KEY_DIM 128
#endif
#define DEVICE __device__ __forceinline__
constexpr int C = 64, K = KEY_DIM;  // tokens of a chunk, key channels
constexpr float LOG2E = 1.4426950408889634f;

struct alignas(16) Uint4 { u32 x[4]; };

#ifndef WARP_ON_CPU

DEVICE float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float divide_(float x, float y) { return __fdividef(x, y); }
DEVICE float rsqrt_(float x) { return rsqrtf(x); }
DEVICE float log_(float x) { return __logf(x); }
#ifdef FP16
DEVICE u32 pack(float low, float high) { u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d; }
DEVICE float low(u32 x) { float y; asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(y) : "r"(x)); return y; }
DEVICE float high(u32 x) { float y; asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(y) : "r"(x)); return y; }
DEVICE u32 times(u32 x, u32 y) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(x), "r"(y)); return d; }
#define MMA_TYPE "f16"
#else
DEVICE u32 pack(float low, float high) { u32 d; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d; }
DEVICE float low(u32 x) { return __uint_as_float(x << 16); }
DEVICE float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
DEVICE u32 times(u32 x, u32 y) { u32 d; asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(x), "r"(y)); return d; }
#define MMA_TYPE "bf16"
#endif

// d[16 x 8] += a[16 x 16] b[16 x 8]. a: (r, 2c), (r + 8, 2c), (r, 2c + 8), (r + 8, 2c + 8); b: rows 2c, 2c + 8 of column r;
// d: (r, 2c), (r, 2c + 1), (r + 8, 2c), (r + 8, 2c + 1).
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// d[16 x 8] += a[16 x 8] b[8 x 8]: the first half of the columns of a, and of the rows of b.
DEVICE void mma_half(float (&d)[4], u32 a0, u32 a1, u32 b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
}
// d[16 x 8] += a[16 x 8] b[8 x 8] in tf32, which drops the 13 low bits of each number. a: (r, c), (r + 8, c), (r, c + 4),
// (r + 8, c + 4); b: rows c, c + 4 of column r.
DEVICE void mma_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
DEVICE float swap_lanes(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// The transpose of an 8 x 8 tile of 16-bit numbers held as (r, 2c), (r, 2c + 1).
DEVICE u32 transpose(u32 x) { u32 y; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x)); return y; }
// Float4 8 x 8 tiles from shared memory, lane l giving the address of row l % 8 of tile l / 8; as they lie, or transposed.
DEVICE Uint4 load_tiles(const u16* row) {
    Uint4 d;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(d.x[0]), "=r"(d.x[1]), "=r"(d.x[2]), "=r"(d.x[3]) : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
    return d;
}
DEVICE Uint4 load_tiles_transposed(const u16* row) {
    Uint4 d;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(d.x[0]), "=r"(d.x[1]), "=r"(d.x[2]), "=r"(d.x[3]) : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
    return d;
}
// 16 bytes of each lane, or zeros, on their way to shared memory while the lane goes on.
DEVICE void lane_copy(void* to, const void* from, bool zero) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(zero ? 0 : 16) : "memory");
}
DEVICE void copies_landed() { asm volatile("cp.async.wait_all;" ::: "memory"); }  // this lane's
DEVICE void bulk_prefetch(const void* p, int bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory"); }
DEVICE u32 lanes_where(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE int warp_min(int x) { return __reduce_min_sync(0xffffffffu, x); }
DEVICE int popcount(u32 x) { return __popc(x); }
DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }  // so the compiler knows it is one for all lanes
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void group_barrier(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }  // of four warps

#endif

// A block's shared memory, as what lies in it.
#ifdef WARP_ON_CPU
#define SHARED_MEMORY(type, name) type& name = *(type*)cpu_shared
#else
#define SHARED_MEMORY(type, name) extern __shared__ __align__(1024) char shared[]; type& name = *(type*)shared
#endif
struct alignas(8) Float2 { float x[2]; };
DEVICE u32 pair_at(const u16* p) { return *(const u32*)p; }
// Numbers in pairs, as products ask for them.
template <int N> DEVICE void pack_all(u32 (&to)[N], const float (&from)[2 * N]) {
#pragma unroll
    for (int x = 0; x < N; x++) to[x] = pack(from[2 * x], from[2 * x + 1]);
}

// Products for M on the tensor cores, in tf32: 11 significant bits, unit roundoff 2^-11; mma drops the 13 bits below.
//     bf16   a b ~ rn(a) rn(b): each factor rounded once (`as_factor`) to 2^-11, where bf16 itself rounds to 2^-8.
//     fp16   x = h + l, h the first 11 bits of x, |l| < 2^-10 |x|;   a b ~ h_a h_b + h_a l_b + l_a h_b
//            l_a l_b is left out and each l is cut to 11 bits: |error| < 3 x 2^-20 |a b|, where fp16 rounds to 2^-11.
struct Float4 { float x[4]; };
#ifdef FP16
struct SplitTf32 {
    Float4 high, low;
    DEVICE SplitTf32(const Float4& a) {
#pragma unroll
        for (int i = 0; i < 4; i++) high.x[i] = __uint_as_float(__float_as_uint(a.x[i]) & 0xffffe000u), low.x[i] = a.x[i] - high.x[i];
    }
};
DEVICE void mma_split_tf32(float (&d)[4], const SplitTf32& a, float b0, float b1) {
    const float h0 = __uint_as_float(__float_as_uint(b0) & 0xffffe000u), h1 = __uint_as_float(__float_as_uint(b1) & 0xffffe000u);
    mma_tf32(d, a.low.x[0], a.low.x[1], a.low.x[2], a.low.x[3], h0, h1);
    mma_tf32(d, a.high.x[0], a.high.x[1], a.high.x[2], a.high.x[3], b0 - h0, b1 - h1);
    mma_tf32(d, a.high.x[0], a.high.x[1], a.high.x[2], a.high.x[3], h0, h1);
}
DEVICE float as_factor(float x) { return x; }
#else
DEVICE float as_factor(float x) { return __uint_as_float(__float_as_uint(x) + 0x1000u); }
struct SplitTf32 {
    Float4 a;
    DEVICE SplitTf32(const Float4& x) {
#pragma unroll
        for (int i = 0; i < 4; i++) a.x[i] = as_factor(x.x[i]);
    }
};
DEVICE void mma_split_tf32(float (&d)[4], const SplitTf32& x, float b0, float b1) {
    mma_tf32(d, x.a.x[0], x.a.x[1], x.a.x[2], x.a.x[3], b0, b1);
}
#endif

DEVICE float exp_(float x) { return exp2_(x * LOG2E); }
// With x log2(e) in two parts: what is left of rounding grows with the result, not with x.
DEVICE float careful_exp(float x) {
    const float whole = x * LOG2E, rest = fmaf(x, LOG2E, -whole) + x * 1.925963033500212e-8f;
    return exp2_(whole) * fmaf(rest, 0.6931471805599453f, 1.0f);
}
DEVICE float sigmoid(float x) { return divide_(1.0f, 1.0f + exp_(-x)); }
DEVICE float softplus(float x) {
    float u = exp_(-fabsf(x));
    return fmaxf(x, 0.0f) + (u < 1e-4f ? u - 0.5f * u * u : log_(1.0f + u));
}
DEVICE float quad_sum(float x) { x += swap_lanes(x, 1); return x + swap_lanes(x, 2); }  // over c
DEVICE float load_scalar(const u16* p) { return low((u32)*p); }

// Where the 16-byte piece `at` of a row lies in a tile of 64 rows, counted in numbers: pieces of 64 columns side by side,
// 128-byte rows, swizzled as the tensor cores want them. Workspaces are kept so, and a tile is one contiguous copy.
DEVICE int swizzled_offset(int row, int at) { return at / 8 * 4096 + row * 64 + ((at % 8) ^ (row % 8)) * 8; }

// What is prepared of a chunk (letters as in inter_chunk.cuh): E, W, Q [64, K] and P [64, 64] swizzled, D [K], beta [64]. One
// contiguous copy; the pass that forms no output takes E, W, D and beta.
struct Tile {
    u16 E[64 * K], W[64 * K], Q[64 * K], P[64 * 64];
    float D[K], beta[64];
};

// A chunk of one head: its first token, its tokens (none if there is nothing to do), and where its tile lies.
struct Chunk { long long start, tile; int count, head; };

// Where sequences lie: T tokens each, or packed by their borders, with chunks counted from `chunk_offsets`.
struct Layout {
    const int *cu_seqlens, *chunk_offsets;
    int T, sequences, HV;
    DEVICE long long start(int n) const { return chunk_offsets ? cu_seqlens[n] : (long long)n * T; }
    DEVICE int tokens(int n) const { return chunk_offsets ? cu_seqlens[n + 1] - cu_seqlens[n] : T; }
    DEVICE int chunks(int n) const { return (tokens(n) + C - 1) / C; }
    DEVICE long long first_chunk(int n) const { return chunk_offsets ? chunk_offsets[n] : (long long)n * ((T + C - 1) / C); }
    DEVICE Chunk chunk(int n, int chunk, int head) const {
        return {start(n) + (long long)chunk * C, (first_chunk(n) + chunk) * HV + head, min(C, tokens(n) - chunk * C), head};
    }
    DEVICE Chunk of_tile(int tile) const {  // a packed batch may have fewer than there is room for
        const int all = tile / HV, per = (T + C - 1) / C;
        if (chunk_offsets == nullptr) return chunk(all / per, all % per, tile % HV);
        int n = 0, after = sequences;
        while (after - n > 1) {
            int middle = (n + after) / 2;
            if (chunk_offsets[middle] <= all) n = middle; else after = middle;
        }
        return chunk(n, all - chunk_offsets[n], tile % HV);
    }
};
