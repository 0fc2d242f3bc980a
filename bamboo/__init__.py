"""bamboo: a force field for liquid electrolytes and how it learns. Simulation lives in the package ``md``."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["BambooCalculator", "ForceField", "System"]

_HOMES = {"BambooCalculator": "bamboo.calculator", "ForceField": "bamboo.forcefield", "System": "bamboo.system"}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``import bamboo`` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bamboo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
