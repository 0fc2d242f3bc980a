"""Molecules and boxes: names or SMILES to verified geometries, packed boxes and clusters."""
