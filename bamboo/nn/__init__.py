"""The graph equivariant transformer."""
