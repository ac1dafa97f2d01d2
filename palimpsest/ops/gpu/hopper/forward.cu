// A whole forward in one launch, for few heads: some blocks walk (inter_chunk.cuh), the others prepare chunks (intra_chunk.cuh) meanwhile.
//
// Tickets  the blocks that begin first prepare; the others walk, a task each. Who prepares waits for nobody without end, so
//          everyone is served, however few blocks run at once.
// Order    chunk by chunk, all tasks alike. Tiles are wanted soon after they are made, and most are still in the L2 cache:
//          who is far ahead of the walks waits for them a little.
#include "intra_chunk.cuh"
#include "inter_chunk.cuh"

struct Arguments {
    IntraArguments intra;
    WalkArguments walk;
    int* ready;  // of each tile; how many were asked for; the next ticket. Zeros
    int tiles, producers;
};
constexpr int PREPARING = WALK_THREADS / 128;  // groups of a block, each with a chunk of its own
constexpr int AHEAD = 450;                     // tiles, 26 MB: what the cache keeps beside all that passes through it

// Chunks in the order in which they are wanted, each lane of a warp alike.
struct Order {
    const Layout layout;
    const int tasks, lane;
    int chunk = 0, rank = 0;  // the rank-th of the tasks that are longer than `chunk`
    int live, until;          // how many are; until where none of them ends

    DEVICE Order(const Layout& layout, int lane) : layout(layout), tasks(layout.sequences * layout.HV), lane(lane) { count(); }
    DEVICE bool longer(int x) const { return x + lane < tasks && layout.chunks((x + lane) / layout.HV) > chunk; }
    DEVICE void count() {
        live = 0, until = 1 << 30;
        for (int x = 0; x < tasks; x += 32) {
            const bool here = longer(x);
            live += ones(lanes_where(here)), until = min(until, warp_min(here ? layout.chunks((x + lane) / layout.HV) : 1 << 30));
        }
    }
    DEVICE Chunk skip(int by) {  // none after the last
        rank += by;
        while (live > 0 && rank >= (long long)(until - chunk) * live) rank -= (until - chunk) * live, chunk = until, count();
        if (live == 0) return Chunk{};
        chunk += rank / live, rank %= live;
        for (int x = 0, left = rank;; x += 32) {
            const bool here = longer(x);
            const u32 found = lanes_where(here);
            if (left < ones(found)) {
                const int task = x + ones(lanes_where(here && ones(found & ((1u << lane) - 1)) == left) - 1), n = task / layout.HV;
                return layout.chunk(n, chunk, task - n * layout.HV);
            }
            left -= ones(found);
        }
    }
};

template <bool GATED> DEVICE void prepare_all(const Arguments& a, int ticket) {
    const int group = warp_index() / 4, step = a.producers * PREPARING, parts = a.walk.V / 64;
    const bool speaks = threadIdx.x % 128 == 0;
    SHARED_MEMORY(IntraShared, first);
    IntraShared& s = (&first)[group];
    Order order(a.intra.layout(), threadIdx.x % 32);
    int* done = nullptr;  // the flag of the chunk before, raised once its tile has surely left
    int place = ticket * PREPARING + group;
    for (Chunk at = order.skip(place); at.count > 0; place += step) {
        if (speaks) wait_a_little(a.ready + a.tiles, (place - AHEAD) * parts);
        prepare<GATED>(a.intra, s, at, group, [&] {
            if (done && speaks) say_ready(done);
        });
        publish();
        group_barrier(group);
        done = a.ready + at.tile, at = order.skip(step);
    }
    if (done && speaks) say_ready(done);
}

template <bool GATED> DEVICE void all(const Arguments& a) {
    SHARED_MEMORY(int, ticket);
    int* taken = a.ready + a.tiles;
    if (threadIdx.x == 0) ticket = take_ticket(taken + 1);
    block_barrier();
    const int mine = ticket, walker = mine - a.producers, parts = a.walk.V / 64;
    block_barrier();
    if (walker < 0) prepare_all<GATED>(a, mine); else walk<FORWARD, 1>(a.walk, walker / parts, walker % parts, a.ready, taken);
}

extern "C" __global__ void __launch_bounds__(WALK_THREADS, 1) forward(const __grid_constant__ Arguments a) { all<false>(a); }
#if ERASE == 0
extern "C" __global__ void __launch_bounds__(WALK_THREADS, 1) forward_gated(const __grid_constant__ Arguments a) { all<true>(a); }
#endif
