"""Taggers: classifiers of images whose classes are tags, and the rules that make a caption of their probabilities."""
