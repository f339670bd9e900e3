"""What MLX keeps for the whole process."""

import mlx.core as mx


def mlx_limits() -> tuple[int, int]:
    """MLX's memory and cache limits, which can only be read by setting them."""
    limits = mx.set_memory_limit(2**40), mx.set_cache_limit(2**40)
    mx.set_memory_limit(limits[0])
    mx.set_cache_limit(limits[1])
    return limits
