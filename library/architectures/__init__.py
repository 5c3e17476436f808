"""One folder per model family; ``base.Architecture`` says what a family declares."""
