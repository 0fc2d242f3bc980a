"""Molecular dynamics of liquid electrolytes with bamboo force fields, and the properties that follow."""
