"""What looks at pictures: feature extractors and classifiers, one module for each kind."""
