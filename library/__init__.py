"""The shared core of the training scripts; see docs/architecture.md for the way through it."""

import os

# The threads of a step on the CPU wait for each other hundreds of times. If they sleep at once (OMP_WAIT_POLICY=PASSIVE),
# waking them costs a quarter of a step; if they spin as long as libgomp does by default, they take the core from the
# thread that they wait for where other work runs. A short spin is as fast as a long one alone, and nearly as fast as none
# beside other work (benchmarks/RESULTS.md). It counts only if it is set before torch is loaded.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "30000"
