"""What every kernel for TPUs knows of a core."""

from __future__ import annotations

# Lanes of a tile: a block's last dimension is a multiple, or the whole array.
LANES = 128
# What a kernel may use, told to the compiler: of 64 MiB (v5p) or 128 (v5e,
# v6e), where the compiler's default is 16 to 32.
VMEM_LIMIT = 48 * 2**20
# What the plans' estimates may reach. These are above what the compiler used at
# every shape that was tried, and are guesses at all others.
VMEM_BUDGET = 40 * 2**20
# Products of bfloat16 pieces that make one of float32 in full precision.
PASSES = 6
