"""The benchmarks and the fine-tuning job share these modules: to measure, to compare and to report."""
