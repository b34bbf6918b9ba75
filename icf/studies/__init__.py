"""What studies runs: ablations, comparisons, benchmarks, profiles."""
