// A whole forward in one launch, for few heads: producers prepare chunks (intra_chunk.cuh), consumers take the memory over
// them (inter_chunk.cuh) meanwhile.
//
// Tickets   a block that starts takes the next ticket t. t < producers: it prepares groups of chunks t, t + producers, ...;
//           otherwise it is the consumer of task t - producers.
// Flags     ready[tile] is stored with release once the tile is in global memory, and loaded with acquire before its copy.
// Progress  Invariant: a producer waits for no other block for longer than 200 x 250 ns a chunk (wait_bounded). So a block
//           that holds a producer's ticket finishes, whatever else runs. A consumer's ticket is drawn after all producers'
//           tickets: when it waits for a flag, the block that will raise it has started or is done. Therefore every flag is
//           raised, every consumer finishes, and the launch ends however few of its blocks are resident at once.
// Order     chunk by chunk, all tasks alike, so tiles are wanted soon after they are made and most are still in the L2
//           cache. `taken` counts the tiles that were asked for; a producer that is AHEAD tiles in front waits, boundedly.
#include "intra_chunk.cuh"
#include "inter_chunk.cuh"

struct Arguments {
    IntraChunkArguments intra_chunk;
    InterChunkArguments inter_chunk;
    int* ready;  // of each tile; how many were asked for; the next ticket. Zeros
    int tiles, producers;
};
constexpr int CHUNKS_AT_ONCE = INTER_CHUNK_THREADS / 128;  // groups of a block, each with a chunk of its own
constexpr int AHEAD = 450;                     // tiles, 26 MB: what the cache keeps beside all that passes through it

// Chunks in the order in which they are wanted, each lane of a warp alike.
struct ChunkOrder {
    const Layout layout;
    const int tasks, lane;
    int chunk = 0, rank = 0;  // the rank-th of the tasks that are longer than `chunk`
    int live, until;          // how many are; until where none of them ends

    DEVICE ChunkOrder(const Layout& layout, int lane) : layout(layout), tasks(layout.sequences * layout.HV), lane(lane) { count(); }
    DEVICE bool longer(int x) const { return x + lane < tasks && layout.chunks((x + lane) / layout.HV) > chunk; }
    DEVICE void count() {
        live = 0, until = 1 << 30;
        for (int x = 0; x < tasks; x += 32) {
            const bool here = longer(x);
            live += popcount(lanes_where(here)), until = min(until, warp_min(here ? layout.chunks((x + lane) / layout.HV) : 1 << 30));
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
            if (left < popcount(found)) {
                const int task = x + popcount(lanes_where(here && popcount(found & ((1u << lane) - 1)) == left) - 1), n = task / layout.HV;
                return layout.chunk(n, chunk, task - n * layout.HV);
            }
            left -= popcount(found);
        }
    }
};

template <bool GATED> DEVICE void produce(const Arguments& a, int ticket) {
    const int group = warp_index() / 4, step = a.producers * CHUNKS_AT_ONCE, parts = a.inter_chunk.V / 64;
    const bool leader = threadIdx.x % 128 == 0;
    SHARED_MEMORY(IntraChunkShared, first);
    IntraChunkShared& s = (&first)[group];
    ChunkOrder order(a.intra_chunk.layout(), threadIdx.x % 32);
    int* done = nullptr;  // the flag of the chunk before, raised once its tile has surely left
    int place = ticket * CHUNKS_AT_ONCE + group;
    for (Chunk at = order.skip(place); at.count > 0; place += step) {
        if (leader) wait_bounded(a.ready + a.tiles, (place - AHEAD) * parts);
        prepare<GATED>(a.intra_chunk, s, at, group, [&] {
            if (done && leader) raise_flag(done);
        });
        publish();
        group_barrier(group);
        done = a.ready + at.tile, at = order.skip(step);
    }
    if (done && leader) raise_flag(done);
}

template <bool GATED> DEVICE void forward_block(const Arguments& a) {
    SHARED_MEMORY(int, ticket);
    int* taken = a.ready + a.tiles;
    if (threadIdx.x == 0) ticket = take_ticket(taken + 1);
    block_barrier();
    const int mine = ticket, consumer = mine - a.producers, parts = a.inter_chunk.V / 64;
    block_barrier();
    if (consumer < 0) produce<GATED>(a, mine);
    else inter_chunk<FORWARD, 1>(a.inter_chunk, consumer / parts, consumer % parts, a.ready, taken);
}

extern "C" __global__ void __launch_bounds__(INTER_CHUNK_THREADS, 1) forward(const __grid_constant__ Arguments a) { forward_block<false>(a); }
#if ERASE == 0
extern "C" __global__ void __launch_bounds__(INTER_CHUNK_THREADS, 1) forward_gated(const __grid_constant__ Arguments a) { forward_block<true>(a); }
#endif
