"""What estimates are called for people, and which property of a configuration each belongs to.

properties.json keeps the short names (``transference_Li_barycentric``); what stands here groups and spells them.
"""

from collections.abc import Iterable

from bamboo.structure.molecules import IONS, molecule
from md.config import Property

HEADINGS: dict[Property, str] = {
    "density": "Density and equation of state",
    "viscosity": "Viscosity",
    "conductivity": "Conductivity and transference",
    "diffusion": "Diffusion",
    "coordination": "Shell of the cations and ion pairs",
    "dielectric": "Dielectric constant",
}
# the estimates that answer for a property where it is not all of them: the others are by-products
_ANSWERS: dict[Property, tuple[str, ...]] = {
    "density": ("density",),
    "conductivity": ("conductivity", "conductivity_green_kubo"),
}
_GROUPS: dict[str, Property] = {  # how an estimate's name begins -> its property
    "density": "density",
    "isothermal_compressibility": "density",
    "thermal_expansion": "density",
    "viscosity": "viscosity",
    "conductivity": "conductivity",
    "ionicity": "conductivity",
    "transference": "conductivity",
    "diffusion": "diffusion",
    "dielectric": "dielectric",
    "coordination": "coordination",
    "ion_pairing": "coordination",
    "residence_time": "coordination",
}
_NAMES = {
    "isothermal_compressibility": "isothermal compressibility",
    "thermal_expansion": "thermal expansion coefficient",
    "viscosity": "shear viscosity",
    "conductivity": "ionic conductivity (Einstein, ions correlated)",
    "conductivity_green_kubo": "ionic conductivity (Green-Kubo)",
    "conductivity_nernst_einstein": "ionic conductivity of independent ions (Nernst-Einstein)",
    "ionicity": "ionicity (Einstein / Nernst-Einstein)",
    "ion_pairing_separated": "share of cations without an anion",
    "ion_pairing_contact": "share of cations in contact pairs",
    "ion_pairing_aggregate": "share of cations in aggregates",
    "dielectric_constant": "static dielectric constant",
}


def property_of(name: str) -> Property:
    """Return the property of the configuration that an estimate belongs to."""
    return next(group for start, group in _GROUPS.items() if name.startswith(start))


def answers(name: Property, names: Iterable[str]) -> list[str]:
    """Return those of some estimates that answer for a property."""
    chosen = _ANSWERS.get(name)
    return [one for one in names if property_of(one) == name and (chosen is None or one in chosen)]


def readable(name: str) -> str:
    """Return the name of an estimate for people: ``Li+ transference number (barycentric frame)``."""
    if name in _NAMES:
        return _NAMES[name]
    first, *words = name.split("_")
    if first == "transference":
        text = f"{_species(words[0])} transference number ({words[1]} frame)"
    elif first == "diffusion" and words:
        frame = "as in the box" if words[1:] else "infinite box"
        text = f"self-diffusion of {_species(words[0])} ({frame})"
    elif first == "coordination" and words:
        of = f" of {_species(words[2])}" if len(words) > 2 else ""
        text = f"number of {words[1]}{of} around {_species(words[0])}"
    elif first == "residence":
        text = f"residence time of {_species(words[2])} around {_species(words[1])}"
    else:
        text = name
    return text


def _species(name: str) -> str:
    """Return the name of a molecule, with its sign where it is an ion."""
    charge = molecule(name).charge if name in IONS else 0
    return name + ("" if not charge else "+" if charge > 0 else "-") + (str(abs(charge)) if abs(charge) > 1 else "")
