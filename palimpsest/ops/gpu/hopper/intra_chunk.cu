// What intra_chunk.cuh prepares, as a launch of its own: (chunk x value head) blocks.
#include "intra_chunk.cuh"

template <bool GATED> DEVICE void tile(const IntraChunkArguments& a) {
    SHARED_MEMORY(IntraChunkShared, s);
    const Chunk at = a.layout().of_tile(blockIdx.x);
    if (at.count > 0) prepare<GATED>(a, s, at, 0, [] {});
}

extern "C" __global__ void __launch_bounds__(128, 3) intra_chunk(const __grid_constant__ IntraChunkArguments a) { tile<false>(a); }
#if ERASE == 0
extern "C" __global__ void __launch_bounds__(128, 3) intra_chunk_gated(const __grid_constant__ IntraChunkArguments a) { tile<true>(a); }
#endif
