"""Learning: losses, one optimisation loop, and the three uses of it (fit, distil, align)."""
