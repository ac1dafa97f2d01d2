// Thirty-two lanes on one CPU: enough of the hardware to run the kernels of palimpsest/ops/gpu/hopper as C++.
// Each thread of a block is a fiber; a collective stores what the lane gives, waits for its warp, and reads the others.
#pragma once
#define WARP_ON_CPU
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <algorithm>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
using std::min;
using std::max;
struct Dim { unsigned x, y, z; };
static Dim threadIdx, blockIdx, blockDim;
alignas(128) static char cpu_shared[262144];
static inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }

static const int MAX_THREADS = 512;
static ucontext_t cpu_main, cpu_fiber[MAX_THREADS];
static bool cpu_done[MAX_THREADS];
static int cpu_current, cpu_threads;
static long cpu_epoch[MAX_THREADS], cpu_arrived[64][2], cpu_block_epoch[MAX_THREADS], cpu_block_arrived;
struct Slot { unsigned x[16]; const void* p; };
static Slot cpu_slot[2][MAX_THREADS];

static inline void cpu_yield() {
    int self = cpu_current;
    swapcontext(&cpu_fiber[self], &cpu_main);
}
static long cpu_warp_count[64];
static inline Slot* cpu_exchange(const Slot& mine) {
    int t = cpu_current, w = t / 32;
    long epoch = cpu_epoch[t]++;
    cpu_slot[epoch & 1][t] = mine;
    cpu_warp_count[w]++;
    while (cpu_warp_count[w] < (epoch + 1) * 32) cpu_yield();
    return &cpu_slot[epoch & 1][w * 32];
}
static inline void warp_barrier() { cpu_exchange(Slot{}); }
static inline void block_barrier() {
    long epoch = cpu_block_epoch[cpu_current]++;
    cpu_block_arrived++;
    while (cpu_block_arrived < (epoch + 1) * cpu_threads) cpu_yield();
}
static long cpu_group_epoch[MAX_THREADS], cpu_group_arrived[8];
static inline void group_barrier(int group) {
    long epoch = cpu_group_epoch[cpu_current]++;
    cpu_group_arrived[group]++;
    while (cpu_group_arrived[group] < (epoch + 1) * 128) cpu_yield();
}
static inline unsigned lanes_where(bool x) {
    Slot m; m.x[0] = x;
    Slot* s = cpu_exchange(m);
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= s[i].x[0] << i;
    return y;
}
static inline int warp_min(int x) {
    Slot m; m.x[0] = x;
    Slot* s = cpu_exchange(m);
    for (int i = 0; i < 32; i++) x = min(x, (int)s[i].x[0]);
    return x;
}
static inline int popcount(unsigned x) { return __builtin_popcount(x); }
static inline float cpu_bf16(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
static inline unsigned short cpu_to_bf16(float x) {
    unsigned u = __float_as_uint(x);
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
static inline int warp_index() { return threadIdx.x / 32; }
static inline float exp2_(float x) { return exp2f(x); }
static inline float divide_(float x, float y) { return x / y; }
static inline float rsqrt_(float x) { return 1.0f / sqrtf(x); }
static inline float log_(float x) { return logf(x); }
static inline unsigned pack(float low, float high) { return cpu_to_bf16(low) | ((unsigned)cpu_to_bf16(high) << 16); }
static inline float low(unsigned x) { return cpu_bf16(x & 0xffff); }
static inline float high(unsigned x) { return cpu_bf16(x >> 16); }
static inline unsigned times(unsigned x, unsigned y) { return pack(low(x) * low(y), high(x) * high(y)); }
static inline void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    Slot* s = cpu_exchange(Slot{{a0, a1, a2, a3, b0, b1}});
    int lane = cpu_current % 32, r = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; i++) {
        int row = r + 8 * (i / 2), col = 2 * c + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            unsigned a = s[(row % 8) * 4 + (k % 8) / 2].x[row / 8 + 2 * (k / 8)];
            unsigned b = s[col * 4 + (k % 8) / 2].x[4 + k / 8];
            sum += (k % 2 ? high(a) : low(a)) * (k % 2 ? high(b) : low(b));
        }
        d[i] += sum;
    }
}
static inline void mma_half(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) { mma(d, a0, a1, 0, 0, b0, 0); }
static inline float cpu_tf32(float x) { return __uint_as_float(__float_as_uint(x) & ~0x1fffu); }
static inline void mma_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    Slot m;
    float v[6] = {a0, a1, a2, a3, b0, b1};
    for (int i = 0; i < 6; i++) m.x[i] = __float_as_uint(cpu_tf32(v[i]));
    Slot* s = cpu_exchange(m);
    int lane = cpu_current % 32, r = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; i++) {
        int row = r + 8 * (i / 2), col = 2 * c + i % 2;
        for (int k = 0; k < 8; k++)
            d[i] += __uint_as_float(s[(row % 8) * 4 + k % 4].x[row / 8 + 2 * (k / 4)]) * __uint_as_float(s[col * 4 + k % 4].x[4 + k / 4]);
    }
}
static inline float swap_lanes(float x, int mask) {
    Slot m; m.x[0] = __float_as_uint(x);
    return __uint_as_float(cpu_exchange(m)[(cpu_current % 32) ^ mask].x[0]);
}
static inline unsigned transpose(unsigned x) {
    Slot m; m.x[0] = x;
    Slot* s = cpu_exchange(m);
    int lane = cpu_current % 32, r = lane / 4, c = lane % 4;
    unsigned short v[2];
    for (int e = 0; e < 2; e++) {  // element (row 2c + e, column r)
        unsigned y = s[(2 * c + e) * 4 + r / 2].x[0];
        v[e] = r % 2 ? y >> 16 : y & 0xffff;
    }
    return v[0] | ((unsigned)v[1] << 16);
}
struct Uint4;
template <bool TRANSPOSED, class Q> static inline Q cpu_tiles(const unsigned short* row) {
    Slot m; m.p = row;
    if ((size_t)row % 16) { fprintf(stderr, "tile row is not aligned\n"); abort(); }
    Slot* s = cpu_exchange(m);
    int lane = cpu_current % 32, r = lane / 4, c = lane % 4;
    Q d;
    for (int t = 0; t < 4; t++) {
        unsigned short v[2];
        for (int e = 0; e < 2; e++)
            v[e] = TRANSPOSED ? ((const unsigned short*)s[8 * t + 2 * c + e].p)[r] : ((const unsigned short*)s[8 * t + r].p)[2 * c + e];
        d.x[t] = v[0] | ((unsigned)v[1] << 16);
    }
    return d;
}
#define load_tiles(row) cpu_tiles<false, Uint4>(row)
#define load_tiles_transposed(row) cpu_tiles<true, Uint4>(row)

// Hopper: copies arrive at once, products are done when issued.
#include <map>
#define __grid_constant__
struct CpuBarrier { int arrivals, left; long bytes; int phase; };
static std::map<const void*, CpuBarrier> cpu_barriers;
static inline void cpu_turn(CpuBarrier& b) { if (b.left == 0 && b.bytes == 0) { b.phase ^= 1; b.left = b.arrivals; } }
static inline void barrier_init(unsigned long long* b, int arrivals) { cpu_barriers[b] = {arrivals, arrivals, 0, 0}; }
static inline void barrier_fence() {}
static inline void arrive(unsigned long long* b) { CpuBarrier& x = cpu_barriers[b]; x.left--; cpu_turn(x); }
static inline void arrive_expecting(unsigned long long* b, int bytes) { CpuBarrier& x = cpu_barriers[b]; x.left--; x.bytes += bytes; cpu_turn(x); }
static inline void expect(unsigned long long* b, int bytes) { cpu_barriers[b].bytes += bytes; }
static inline void wait(unsigned long long* b, int parity) { while (cpu_barriers[b].phase == parity) cpu_yield(); }
static inline void bulk_copy(void* to, const void* from, int bytes, unsigned long long* b) {
    if ((size_t)to % 16 || (size_t)from % 16 || bytes % 16) { fprintf(stderr, "bulk copy is not aligned\n"); abort(); }
    memcpy(to, from, bytes);
    CpuBarrier& x = cpu_barriers[b]; x.bytes -= bytes; cpu_turn(x);
}
static inline void lane_copy(void* to, const void* from, bool zero) {
    if ((size_t)to % 16 || (size_t)from % 16) { fprintf(stderr, "lane copy is not aligned\n"); abort(); }
    if (zero) memset(to, 0, 16); else memcpy(to, from, 16);
}
static inline void copies_landed() {}
static inline void bulk_prefetch(const void*, int) {}
static inline void arrive_when_copied(unsigned long long* b) { arrive(b); }
static inline void publish() {}
static inline void raise_flag(int* p) { *p = 1; }
static inline int wait_until_ready(const int* flags, int step, int count, int lane) {  // blocks run one after the other
    unsigned missing = ~lanes_where(lane < count && flags[(long long)lane * step]);
    if (missing & 1) { fprintf(stderr, "waits for a tile that nobody has prepared\n"); abort(); }
    return missing ? __builtin_ctz(missing) : 32;
}
static inline void count_one(int* p) { ++*p; }
static inline void wait_bounded(const int*, int) {}
static inline int take_ticket(int* next) { return (*next)++; }
template <int N> static inline void settle(float (&)[N]) {}
template <int N> static inline void fewer_registers() {}
template <int N> static inline void more_registers() {}
static inline void to_tensor_cores() {}
static inline void wgmma_fence() {}
static inline void wgmma_commit() {}
template <int PENDING> static inline void wgmma_wait() {}
static inline unsigned long long by_columns(const unsigned short* tile, int step) { return (unsigned long long)((const char*)tile - cpu_shared) * 1024 + step; }
static inline unsigned long long by_rows(const unsigned short* tile, int step) { return by_columns(tile, step); }
template <bool ROWS, bool MINUS, int REGS> static inline void wgmma(float (&d)[REGS], const unsigned* a, unsigned long long tile) {
    Slot* s = cpu_exchange(Slot{{a[0], a[1], a[2], a[3]}});
    const unsigned short* t = (const unsigned short*)(cpu_shared + tile / 1024);
    int step = tile % 1024, lane = cpu_current % 32, r = lane / 4, c = lane % 4;
    for (int i = 0; i < REGS; i++) {
        int row = r + 8 * (i % 4 / 2), col = i / 4 * 8 + 2 * c + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            unsigned x = s[(row % 8) * 4 + (k % 8) / 2].x[row / 8 + 2 * (k / 8)];
            int tr = ROWS ? 16 * step + k : col, tc = ROWS ? col : 16 * step + k;
            sum += (k % 2 ? high(x) : low(x)) * cpu_bf16(t[tc / 64 * 4096 + tr * 64 + ((tc / 8 % 8) ^ (tr % 8)) * 8 + tc % 8]);
        }
        d[i] += MINUS ? -sum : sum;
    }
}

static void (*cpu_body)();
static void cpu_entry() { cpu_body(); cpu_done[cpu_current] = true; swapcontext(&cpu_fiber[cpu_current], &cpu_main); }
static void cpu_run(unsigned blocks_x, unsigned blocks_y, int threads, void (*body)()) {
    static char* stacks = nullptr;
    if (!stacks) stacks = (char*)malloc((size_t)MAX_THREADS << 16);
    cpu_body = body; cpu_threads = threads; blockDim.x = threads;
    for (unsigned by = 0; by < blocks_y; by++) for (unsigned b = 0; b < blocks_x; b++) {
        blockIdx.x = b; blockIdx.y = by;
        memset(cpu_shared, 0xff, sizeof cpu_shared);  // NaN
        memset(cpu_epoch, 0, sizeof cpu_epoch); memset(cpu_warp_count, 0, sizeof cpu_warp_count);
        memset(cpu_block_epoch, 0, sizeof cpu_block_epoch); cpu_block_arrived = 0;
        memset(cpu_group_epoch, 0, sizeof cpu_group_epoch); memset(cpu_group_arrived, 0, sizeof cpu_group_arrived);
        for (int t = 0; t < threads; t++) {
            getcontext(&cpu_fiber[t]);
            cpu_fiber[t].uc_stack.ss_sp = stacks + ((size_t)t << 16);
            cpu_fiber[t].uc_stack.ss_size = 1 << 16;
            cpu_fiber[t].uc_link = nullptr;
            cpu_done[t] = false;
            makecontext(&cpu_fiber[t], cpu_entry, 0);
        }
        for (int left = threads; left;) {
            left = 0;
            for (int t = 0; t < threads; t++)
                if (!cpu_done[t]) { cpu_current = t; threadIdx.x = t; swapcontext(&cpu_main, &cpu_fiber[t]); left += !cpu_done[t]; }
        }
    }
}
