"""The shared core of the training scripts; see docs/architecture.md for the way through it."""

import os

# The threads of a step on the CPU wait for each other hundreds of times. Spinning, as OpenMP does by
# default, they take the core from the one they wait for where other work runs: measured with both cores in use, 4 s a
# step instead of 0.15 s (benchmarks/RESULTS.md). The setting counts only if it is there before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
