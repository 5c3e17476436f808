"""The kinds of training: one file for each kind; ``base.py`` is the interface that a kind implements."""
