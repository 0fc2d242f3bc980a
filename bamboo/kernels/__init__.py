"""Fast inference engines; the reference they must equal is bamboo/forcefield.py."""
