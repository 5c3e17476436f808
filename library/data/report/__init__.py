"""The report of ``tools/check_dataset.py`` on a data set; ``survey.py`` tells the story."""
