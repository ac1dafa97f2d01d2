// What the gradient needs of every chunk: a launch of its own, (chunk x value head) blocks.
#include "intra.cuh"

template <bool GATED> DEVICE void tile(const IntraArguments& a) {
#ifdef WARP_ON_CPU
    IntraShared& s = *(IntraShared*)cpu_shared;
#else
    extern __shared__ __align__(1024) char shared[];
    IntraShared& s = *(IntraShared*)shared;
#endif
    const Chunk at = a.layout().of_tile(blockIdx.x);
    if (at.count > 0) prepare<GATED>(a, s, at, 0, [] {});
}

extern "C" __global__ void __launch_bounds__(128, 3) intra(const __grid_constant__ IntraArguments a) { tile<false>(a); }
#if ERASE == 0
extern "C" __global__ void __launch_bounds__(128, 3) intra_gated(const __grid_constant__ IntraArguments a) { tile<true>(a); }
#endif
