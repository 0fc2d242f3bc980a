"""The molecular dynamics engine."""
