"""Random compositions of clusters and liquids: which molecules, how many, at what density."""

from collections.abc import Sequence

import numpy as np

from bamboo.structure.densities import ideal_density
from bamboo.structure.molecules import IONS, molecule

SOLVENTS = ("EC", "PC", "FEC", "VC", "DMC", "EMC", "DEC")
CATION = "Li"
ANIONS = ("PF6", "FSI")
NAMES = (*SOLVENTS, CATION, *ANIONS)
MAX_SMALL_ATOMS = 60

Counts = dict[str, int]


def kind_of(names: Sequence[str]) -> str:
    """Return the kind of a cluster: neutral, lithium, anion or ion_pair."""
    cation = CATION in names
    anion = any(name in IONS and molecule(name).charge < 0 for name in names)
    return "ion_pair" if cation and anion else "lithium" if cation else "anion" if anion else "neutral"


def random_small(generator: np.random.Generator, *, min_molecules: int = 1) -> Counts:
    """Draw a cluster of up to 60 atoms: solvents alone, or round a lithium ion, an anion, or an ion pair or triple.

    Three quarters have at most 30 atoms: they are cheap and teach the same pair interactions.
    """
    smallest, largest = (8, 30) if generator.random() < 0.72 else (31, MAX_SMALL_ATOMS)
    while True:
        family = str(generator.choice(["neutral", "lithium", "anion", "ion_pair"], p=[0.27, 0.33, 0.15, 0.25]))
        counts = _random_family(generator, family)
        n_atoms = sum(molecule(name).n_atoms * count for name, count in counts.items())
        if smallest <= n_atoms <= largest and sum(counts.values()) >= min_molecules:
            return counts


def random_pair(generator: np.random.Generator) -> tuple[str, str]:
    """Draw two molecules for a scan: the first is the one approached."""
    solvents = [str(name) for name in generator.choice(list(SOLVENTS), size=2)]
    anion = str(generator.choice(ANIONS))
    draw = generator.random()
    if draw < 0.20:
        return anion, CATION
    if draw < 0.52:
        return solvents[0], CATION
    return (solvents[0], anion) if draw < 0.72 else (solvents[0], solvents[1])


def random_liquid(
    generator: np.random.Generator, *, n_atoms: int, scale: tuple[float, float], max_solvents: int = 3
) -> tuple[Counts, float]:
    """Draw a liquid of about ``n_atoms`` atoms: one to three solvents and 0-1.5 mol salt per kg of solvent.

    Returns the counts and a density [g/cm3]: that of ideally mixing liquids times a factor drawn from ``scale``.
    """
    names = list(SOLVENTS)
    n_solvents = int(generator.integers(1, max_solvents + 1))
    chosen = [str(name) for name in generator.choice(names, size=n_solvents, replace=False)]
    fractions = generator.dirichlet(np.ones(n_solvents))
    mean_mass = sum(x * molecule(name).molar_mass for x, name in zip(fractions, chosen, strict=True))
    mean_atoms = sum(x * molecule(name).n_atoms for x, name in zip(fractions, chosen, strict=True))
    anion = str(generator.choice(ANIONS))
    molality = generator.uniform(0.0, 1.5)
    salt_per_solvent = molality * mean_mass / 1000.0
    n_solvent = n_atoms / (mean_atoms + salt_per_solvent * (1 + molecule(anion).n_atoms))
    # A small box holds a fraction of an ion pair on average: round at random, so that the mean is right.
    n_salt = int(n_solvent * salt_per_solvent + generator.random())
    rest = n_atoms - n_salt * (1 + molecule(anion).n_atoms)
    counts = {name: max(1, round(x * rest / mean_atoms)) for x, name in zip(fractions, chosen, strict=True)} | {
        name: n_salt for name in (CATION, anion) if n_salt
    }
    return counts, float(density_g_cm3(counts) * generator.uniform(*scale))


def density_g_cm3(counts: Counts) -> float:
    """Estimate the density of a neutral liquid [g/cm3] by ideal mixing of its solvents and lithium salts."""
    amounts = {name: float(n) for name, n in counts.items() if name in SOLVENTS}
    return ideal_density(amounts | {CATION + anion: float(counts[anion]) for anion in ANIONS if anion in counts})


def _random_family(generator: np.random.Generator, family: str) -> Counts:
    anion = str(generator.choice(ANIONS))
    if family == "neutral":
        return _random_solvents(generator, int(generator.integers(1, 6)))
    if family == "lithium":
        return {CATION: 1} | _random_solvents(generator, int(generator.integers(1, 6)))
    if family == "anion":
        return {anion: 1} | _random_solvents(generator, int(generator.integers(1, 4)))
    n_cations, n_anions = ((1, 1), (2, 1), (1, 2))[int(generator.choice(3, p=[0.7, 0.15, 0.15]))]
    return {CATION: n_cations, anion: n_anions} | _random_solvents(generator, int(generator.integers(0, 4)))


def _random_solvents(generator: np.random.Generator, n_molecules: int) -> Counts:
    """Draw solvents from a palette of one to three kinds, so that pure and mixed surroundings both occur."""
    palette = generator.choice(list(SOLVENTS), size=int(generator.integers(1, 4)), replace=False)
    drawn = [str(name) for name in generator.choice(palette, size=n_molecules)]
    return {name: drawn.count(name) for name in sorted(set(drawn))}
