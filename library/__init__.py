"""The shared core of the training scripts; see docs/architecture.md for the way through it."""
