"""The physical energy terms, one file each."""
