"""Properties from trajectories: numpy and md.trajectory only, no torch, no model."""
