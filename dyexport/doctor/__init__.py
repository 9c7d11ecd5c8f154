"""Diagnosis of a machine: what it is, which targets run on it, and which engines of a bundle do."""
