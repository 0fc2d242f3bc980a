"""Quantum data: sampling of structures, labels from electronic-structure codes, and the HDF5 dataset."""
