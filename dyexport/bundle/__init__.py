"""What is on disk: a bundle, its manifest, its tables and tensors. Imports no torch."""
