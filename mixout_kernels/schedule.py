"""Which of the two GPU schedules a product with a mixed weight follows, where a backend's kernels are at their best."""

from __future__ import annotations

# Rows up to which the fused schedule is chosen. Reading w and u once costs 2 * N * K * b bytes in both schedules; the
# staged one also writes and reads Phi (2 * N * K * b more) and launches once more. That is what a product with few
# rows is made of, while with many rows the vendor GEMM's higher throughput outweighs it: at 4.3 TB/s and 700 TFLOP/s
# in bf16 the product takes longer than the bytes of w and u from about 320 rows on. Arithmetic, not yet a measurement.
FUSED_MAX_ROWS = 256


def choose(rows: int, schedule: str) -> str:
    """``fused`` or ``staged``: what was asked for, or for ``auto`` what ``rows`` suggests."""
    if schedule != "auto":
        return schedule
    return "fused" if rows <= FUSED_MAX_ROWS else "staged"
