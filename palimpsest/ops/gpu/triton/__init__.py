"""The portable GPU tier, in Triton: intra_chunk, inter_chunk_fwd, inter_chunk_bwd, gradient; linear attention; one step."""
