"""Files of a bundle: manifest, segment plan, tables and tensors. Imports no torch."""
