"""Feature extractors and classifiers, one module for each kind."""
