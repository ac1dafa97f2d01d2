// What a group of four warps can do on Hopper: asynchronous matrix products with one operand in shared memory, bulk
// copies, and barriers that count the bytes of a copy.
#pragma once
#include "warp.cuh"

typedef unsigned long long u64;

#ifndef WARP_ON_CPU

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void barrier_init(u64* b, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)); }
DEVICE void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(u64* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory"); }
DEVICE void arrive_expecting(u64* b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
DEVICE void expect(u64* b, int bytes) { asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory"); }
DEVICE void wait(u64* b, int parity) {
    asm volatile(
        "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}"
        ::"r"(shared_address(b)), "r"(parity) : "memory");
}
DEVICE void bulk_copy(void* to, const void* from, int bytes, u64* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)) : "memory");
}
DEVICE void arrive_when_copied(u64* b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory"); }
// What one block wrote and another copies in bulk: each thread that wrote publishes, all meet, one says so.
DEVICE void publish() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DEVICE void raise_flag(int* p) { asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(p) : "memory"); }
// How many of the next `count` flags, `step` apart, are up, from the first on; waits for that one. 32 at most.
DEVICE int wait_until_ready(const int* flags, int step, int count, int lane) {
    u32 missing;
    do {
        int there = 0;
        if (lane < count) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(flags + (long long)lane * step) : "memory");
        missing = ~lanes_where(there);
    } while (missing & 1);
    publish();
    return missing ? popcount((missing & -missing) - 1) : 32;
}
DEVICE void count_one(int* p) { asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(p) : "memory"); }
// Until the count has come so far, or for 200 x 250 ns: the bound that forward.cu relies on.
DEVICE void wait_bounded(const int* count, int enough) {
    for (int tries = 0; tries < 200; tries++) {
        int now;
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
        if (now >= enough) return;
        __nanosleep(250);
    }
}
DEVICE int take_ticket(int* next) { return atomicAdd(next, 1); }
// The compiler must have these numbers in their registers here, before products run that it does not see.
template <int N> DEVICE void settle(float (&d)[N]) {
#pragma unroll
    for (int x = 0; x < N; x++) asm volatile("" : "+f"(d[x])::"memory");
}
// Registers of a group of four warps: given back, or taken.
template <int N> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
DEVICE void to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // what this lane wrote to shared memory
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// The descriptor of 16 reduction steps in a tile that lies as `swizzled_offset` says. By columns: the reduction runs along the
// row, 16 columns from `step`; rows are the result's columns. By rows: it runs down 16 rows; the tile's columns are the result's.
// One addition a step: addresses count 16 bytes and stay below 2^14, so nothing runs over into the other fields.
DEVICE u64 tile_descriptor(const u16* tile, u32 low_fields) { return (64ull << 32 | 1ull << 62) | ((shared_address(tile) >> 4) + low_fields); }
DEVICE u64 by_columns(const u16* tile, int step) { return tile_descriptor(tile, (1u << 16) + step / 4 * 512 + step % 4 * 2); }
DEVICE u64 by_rows(const u16* tile, int step) { return tile_descriptor(tile, (512u << 16) + step * 128); }
// d[64 x n] +- a[64 x 16] b[16 x n]; a and d in fragments, warp w holding rows 16 w to 16 w + 15. ROWS: b is by_rows.
template <bool ROWS, bool MINUS> DEVICE void wgmma(float (&d)[32], const u32* a, u64 tile) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." MMA_TYPE "." MMA_TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, %37, 1, %38;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "n"(MINUS ? -1 : 1), "n"(ROWS ? 1 : 0));
}
template <bool ROWS, bool MINUS> DEVICE void wgmma(float (&d)[64], const u32* a, u64 tile) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." MMA_TYPE "." MMA_TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, %69, 1, %70;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "n"(MINUS ? -1 : 1), "n"(ROWS ? 1 : 0));
}

#endif
