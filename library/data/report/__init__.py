"""The report of ``tools/check_dataset.py`` on a data set; start reading at ``survey.py``."""
