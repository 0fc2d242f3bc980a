"""Densities to begin with: measured ones of pure liquids, and ideal mixing for everything else."""

from collections.abc import Mapping

from bamboo.structure.molecules import SALTS, molecule

# Densities of pure liquids [g/cm3] at a temperature [K] with their source: only a start for packing, and the volumes
# that ``vol`` and ``M`` need. EC is solid at room temperature.
PURE_DENSITY: dict[str, tuple[float, float, str]] = {
    "EC": (1.321, 313.15, "10.1021/cr030203g"),
    "PC": (1.200, 298.15, "10.1021/cr030203g"),
    "FEC": (1.477, 298.15, "10.1038/s42256-025-01009-7"),
    "VC": (1.355, 298.15, "10.1038/s42256-025-01009-7"),
    "DMC": (1.0633, 298.15, "10.1063/1.3664084"),
    "EMC": (1.006, 298.15, "10.1021/cr030203g"),
    "DEC": (0.9690, 298.15, "10.1021/je050414d"),
    "MF": (0.9663, 298.15, "10.1016/j.jct.2015.02.019"),
    "MA": (0.9270, 298.15, "10.1021/je0342825"),
    "EA": (0.8944, 298.15, "10.1021/je100832h"),
    "PA": (0.8822, 298.15, "10.1016/j.fluid.2018.01.026"),
    "MP": (0.9091, 298.15, "10.1021/je4009415"),
    "EP": (0.8843, 298.15, "10.1021/je800251v"),
    "MB": (0.8923, 298.15, "10.1021/acs.jced.5b00813"),
    "EB": (0.8735, 298.15, "10.1021/je300799f"),
    "GBL": (1.1296, 293.0, "10.1038/s41467-026-73566-3"),
    "ACN": (0.7767, 298.15, "10.1021/acs.jced.8b00176"),
    "DME": (0.8637, 298.0, "10.1038/s41467-026-73566-3"),
    "DEE": (0.8351, 298.0, "10.1038/s41467-026-73566-3"),
    "G2": (0.9398, 298.15, "10.1021/je500389t"),
    "G3": (0.9860, 293.0, "10.1038/s41467-026-73566-3"),
    "G4": (1.0114, 293.0, "10.1038/s41467-026-73566-3"),
    "DOL": (1.0586, 298.15, "10.1016/j.jct.2003.09.001"),
    "THF": (0.8833, 298.15, "10.1016/j.jct.2015.02.011"),
    "DMSO": (1.0954, 298.15, "10.1016/j.jct.2007.04.004"),
    "TMP": (1.2144, 293.0, "10.1038/s41467-026-73566-3"),
    "water": (0.9970, 298.15, "10.1063/1.1461829"),
}
UNKNOWN_DENSITY = 1.1  # g/cm3, for packing a liquid that is not in the table

# Volume a salt adds to its solvent [cm3/mol]: median over the solutions of LiPF6 in EC:DMC and of LiFSI in DMC of
# doi 10.1038/s42256-025-01009-7, ideal mixing of the solvents. Others: this mass density.
SALT_VOLUME = {"LiPF6": 51.0, "LiFSI": 78.0}
UNKNOWN_SALT_DENSITY = 2.3  # g/cm3


def ideal_density(amounts: Mapping[str, float]) -> float:
    """Return the density [g/cm3] by ideal mixing: total mass over the sum of pure volumes (1.1 g/cm3 if unknown).

    amounts  moles (or numbers) of solvents and salts by name
    """
    mass = volume = 0.0
    for name, amount in amounts.items():
        grams = amount * formula_mass(name)
        mass += grams
        if name in SALTS:
            volume += amount * salt_volume(name)
        else:
            volume += grams / (PURE_DENSITY[name][0] if name in PURE_DENSITY else UNKNOWN_DENSITY)
    return mass / volume


def formula_mass(name: str) -> float:
    """Return the molar mass of a molecule or salt [g/mol]."""
    return sum(n * molecule(part).molar_mass for part, n in SALTS.get(name, {name: 1}).items())


def salt_volume(name: str) -> float:
    """Return the volume a salt adds to its solvent [cm3/mol]."""
    return SALT_VOLUME.get(name, formula_mass(name) / UNKNOWN_SALT_DENSITY)
