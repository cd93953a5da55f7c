"""What the benchmarks and the fine-tuning job share: how to measure, compare and report."""
