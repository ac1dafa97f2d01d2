// The recurrence as launches of its own, a block each task: (task, part of the value channels).
#include "inter_chunk.cuh"

// The two passes of a backward, SAVE and REVERSE, need nothing of each other: where multiprocessors are left, they run side by side.
struct Both { InterChunkArguments save, reverse; };
template <int GROUPS> DEVICE void both(const Both& a) {
    const int parts = a.save.V / (64 * GROUPS), part = blockIdx.y;
    if (part < parts) inter_chunk<REVERSE, GROUPS>(a.reverse, blockIdx.x, part, nullptr, nullptr);
    else inter_chunk<SAVE, GROUPS>(a.save, blockIdx.x, part - parts, nullptr, nullptr);
}
#define KERNEL(name, arguments) extern "C" __global__ void __launch_bounds__(INTER_CHUNK_THREADS, 1) name(const __grid_constant__ arguments a)
KERNEL(inter_chunk_forward_1, InterChunkArguments) { inter_chunk<FORWARD, 1>(a, blockIdx.x, blockIdx.y, nullptr, nullptr); }
KERNEL(inter_chunk_forward_2, InterChunkArguments) { inter_chunk<FORWARD, 2>(a, blockIdx.x, blockIdx.y, nullptr, nullptr); }
KERNEL(inter_chunk_both_1, Both) { both<1>(a); }
KERNEL(inter_chunk_both_2, Both) { both<2>(a); }
