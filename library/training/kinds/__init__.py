"""What can be trained and saved: one file for each kind; ``base.py`` is the list of what a kind must answer."""
