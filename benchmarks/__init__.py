"""Side-by-side measurements; each prints its table and keeps its raw samples under benchmarks/results/."""
