"""Launch shapes: one measured row per kernel and problem, so that every process runs the same bits and nothing tunes itself.

Rows are (kernel, wide) -> settings; wide is true for fp32 operands or more than 128 channels.
"""

CONFIGS = {
    "intra_chunk": dict(block_k=64, num_warps=4, num_stages=1),
    "intra_chunk_by_levels": dict(num_warps=8, num_stages=1),
    "inter_chunk_fwd": dict(block_v=64, num_warps=4, stages=2),
    "inter_chunk_bwd": dict(block_v=64, num_warps=4, stages=2),
    "scores": dict(block_v=64, num_warps=4, num_stages=1),
    "scores_by_levels": dict(block_v=64, num_warps=8, num_stages=1),
    "gradient": dict(block_v=64, num_warps=8, num_stages=1),
    "gradient_by_levels": dict(block_k=64, block_v=64, num_warps=8, num_stages=1),
    "step": dict(block_v=64, num_warps=4),
    "sums": dict(block_c=128, block=64, num_warps=4, stages=3),
    "running": dict(width=1024, num_warps=4),
    "reads": dict(block_c=64, block=64, num_warps=4, stages=2),
}
WIDE = {
    "intra_chunk": dict(block_k=32, num_warps=4, num_stages=1),
    "intra_chunk_by_levels": dict(num_warps=8, num_stages=1),
    "inter_chunk_fwd": dict(block_v=32, num_warps=4, stages=1),
    "inter_chunk_bwd": dict(block_v=32, num_warps=4, stages=1),
    "scores": dict(block_v=32, num_warps=8, num_stages=1),
    "scores_by_levels": dict(block_v=32, num_warps=8, num_stages=1),
    "gradient": dict(block_v=32, num_warps=8, num_stages=1),
    "gradient_by_levels": dict(block_k=32, block_v=32, num_warps=8, num_stages=1),
    "step": dict(block_v=32, num_warps=4),
    "sums": dict(block_c=32, block=32, num_warps=8, stages=1),
    "running": dict(width=1024, num_warps=4),
    "reads": dict(block_c=32, block=32, num_warps=8, stages=1),
}
CHUNK, WIDE_CHUNK = 64, 32  # tokens


def config(kernel: str, wide: bool) -> dict:
    """The settings of one launch."""
    return dict((WIDE if wide else CONFIGS)[kernel])


def padded(channels: int, wide: bool) -> int:
    """Columns of a tile that holds so many channels.

    Half precision has 64 at least: of narrower tiles Triton 3.6 makes wrong gradients and illegal reads on Hopper.
    """
    return max(16 if wide else 64, 1 << (channels - 1).bit_length())
