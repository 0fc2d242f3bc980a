"""Molecules and ions of electrolytes by name or SMILES, with checked geometries.

Neutral molecules and most ions come from RDKit (ETKDG conformers, MMFF94 or UFF). RDKit has no parameters for the
hypervalent fluorides: its PF6- has two fluorine atoms 0.9 Å apart. Those ions are built from their point group, and
every geometry, whatever its source, passes ``check_geometry``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamboo.elements import ATOMIC_MASSES, COVALENT_RADII, numbers_of
from bamboo.errors import InputError, suggest

SOLVENTS = {
    "EC": "C1COC(=O)O1",
    "PC": "CC1COC(=O)O1",
    "FEC": "C1C(F)OC(=O)O1",
    "DFEC": "C1(F)C(F)OC(=O)O1",
    "VC": "C1=COC(=O)O1",
    "VEC": "C=CC1COC(=O)O1",
    "DMC": "COC(=O)OC",
    "EMC": "CCOC(=O)OC",
    "DEC": "CCOC(=O)OCC",
    "FEMC": "COC(=O)OCC(F)(F)F",
    "MF": "COC=O",
    "MA": "COC(C)=O",
    "EA": "CCOC(C)=O",
    "PA": "CCCOC(C)=O",
    "MP": "COC(=O)CC",
    "EP": "CCOC(=O)CC",
    "MB": "COC(=O)CCC",
    "EB": "CCOC(=O)CCC",
    "GBL": "C1CC(=O)OC1",
    "ACN": "CC#N",
    "SN": "N#CCCC#N",
    "DME": "COCCOC",
    "DEE": "CCOCCOCC",
    "G2": "COCCOCCOC",
    "G3": "COCCOCCOCCOC",
    "G4": "COCCOCCOCCOCCOC",
    "DOL": "C1COCO1",
    "THF": "C1CCOC1",
    "TTE": "FC(F)C(F)(F)COC(F)(F)C(F)F",  # tetrafluoroethyl tetrafluoropropyl ether
    "DMSO": "CS(C)=O",
    "SL": "O=S1(=O)CCCC1",
    "DTD": "C1COS(=O)(=O)O1",
    "PS": "C1COS(=O)(=O)C1",
    "TMP": "COP(=O)(OC)OC",
    "water": "O",
}
IONS = {
    "Li": "[Li+]",
    "Na": "[Na+]",
    "K": "[K+]",
    "PF6": "F[P-](F)(F)(F)(F)F",
    "BF4": "[B-](F)(F)(F)F",
    "FSI": "[N-](S(=O)(=O)F)S(=O)(=O)F",
    "TFSI": "[N-](S(=O)(=O)C(F)(F)F)S(=O)(=O)C(F)(F)F",
    "OTf": "[O-]S(=O)(=O)C(F)(F)F",
    "ClO4": "[O-]Cl(=O)(=O)=O",
    "NO3": "[O-][N+](=O)[O-]",
    "DFP": "[O-]P(=O)(F)F",
    "DFOB": "[B-]1(F)(F)OC(=O)C(=O)O1",
    "BOB": "[B-]12(OC(=O)C(=O)O1)OC(=O)C(=O)O2",
}
# Full names, in small letters, of solvents and anions; capitals do not matter.
FULL_NAMES = {
    "ethylene carbonate": "EC",
    "propylene carbonate": "PC",
    "fluoroethylene carbonate": "FEC",
    "difluoroethylene carbonate": "DFEC",
    "vinylene carbonate": "VC",
    "vinylethylene carbonate": "VEC",
    "vinyl ethylene carbonate": "VEC",
    "dimethyl carbonate": "DMC",
    "ethyl methyl carbonate": "EMC",
    "methyl ethyl carbonate": "EMC",
    "diethyl carbonate": "DEC",
    "methyl trifluoroethyl carbonate": "FEMC",
    "methyl 2,2,2-trifluoroethyl carbonate": "FEMC",
    "methyl formate": "MF",
    "methyl acetate": "MA",
    "ethyl acetate": "EA",
    "propyl acetate": "PA",
    "methyl propionate": "MP",
    "ethyl propionate": "EP",
    "methyl butyrate": "MB",
    "ethyl butyrate": "EB",
    "gamma-butyrolactone": "GBL",
    "γ-butyrolactone": "GBL",
    "acetonitrile": "ACN",
    "succinonitrile": "SN",
    "1,2-dimethoxyethane": "DME",
    "dimethoxyethane": "DME",
    "monoglyme": "DME",
    "1,2-diethoxyethane": "DEE",
    "diglyme": "G2",
    "triglyme": "G3",
    "tetraglyme": "G4",
    "1,3-dioxolane": "DOL",
    "tetrahydrofuran": "THF",
    "dimethyl sulfoxide": "DMSO",
    "sulfolane": "SL",
    "ethylene sulfate": "DTD",
    "1,3-propane sultone": "PS",
    "trimethyl phosphate": "TMP",
    "hexafluorophosphate": "PF6",
    "tetrafluoroborate": "BF4",
    "bis(fluorosulfonyl)imide": "FSI",
    "bis(trifluoromethanesulfonyl)imide": "TFSI",
    "bis(trifluoromethylsulfonyl)imide": "TFSI",
    "triflate": "OTf",
    "trifluoromethanesulfonate": "OTf",
    "perchlorate": "ClO4",
    "nitrate": "NO3",
    "difluorophosphate": "DFP",
    "difluoro(oxalato)borate": "DFOB",
    "bis(oxalato)borate": "BOB",
}
_CATIONS = ("Li", "Na", "K")
SALTS: dict[str, dict[str, int]] = {
    cation + anion: {cation: 1, anion: 1} for cation in _CATIONS for anion in IONS if anion not in _CATIONS
}
_SHORT_NAMES = {full: name for full, name in FULL_NAMES.items() if name in SOLVENTS} | {
    f"{metal} {full}": cation + name
    for metal, cation in zip(("lithium", "sodium", "potassium"), _CATIONS, strict=True)
    for full, name in FULL_NAMES.items()
    if name in IONS
}
_LONGEST_FIRST = "|".join(re.escape(full) for full in sorted(_SHORT_NAMES, key=len, reverse=True))
_ANY_FULL_NAME = re.compile(rf"(?<![\w-])({_LONGEST_FIRST})(?![\w-])", re.ASCII | re.IGNORECASE)

# Directions from the centre and bond length [Å] of ions that RDKit builds wrongly (bond lengths: B3LYP/def2-SVPD).
_OCTAHEDRON = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
_TETRAHEDRON = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
_TEMPLATES: dict[str, tuple[str, tuple[tuple[int, int, int], ...], float]] = {
    "PF6": ("P", _OCTAHEDRON, 1.63),
    "BF4": ("B", _TETRAHEDRON, 1.41),
}

MAX_ATOMS = 200  # of one molecule; embedding larger ones takes minutes
N_CONFORMERS = 10  # embedded by RDKit; the lowest in force-field energy is kept
BOND_RANGE = (0.75, 1.25)  # bonded distance / sum of covalent radii
MIN_NONBONDED = 1.15  # smallest non-bonded distance / sum of covalent radii (S...S of the imides: 1.25)


@dataclass(frozen=True, eq=False)
class Molecule:
    """One molecule or ion with a checked geometry.

    name, smiles; symbols (n_atoms) chemical symbols; positions (n_atoms, 3) Å; charge e (formal);
    bonds pairs of atom indices, each (smaller, larger).
    """

    name: str
    symbols: tuple[str, ...]
    positions: NDArray[np.float64]
    charge: int
    bonds: tuple[tuple[int, int], ...]
    smiles: str

    @property
    def n_atoms(self) -> int:
        return len(self.symbols)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Atomic numbers, (n_atoms,)."""
        return np.array(numbers_of(self.symbols), dtype=np.int64)

    @property
    def molar_mass(self) -> float:
        """Molar mass [g/mol], which is the mass of one molecule [amu]."""
        return float(ATOMIC_MASSES[self.numbers].sum())


@cache
def molecule(name: str) -> Molecule:
    """Return a molecule or ion of ``SOLVENTS`` or ``IONS``; ions may carry their sign, ``Li+``.

    Raises InputError for an unknown name; ``molecule_from_smiles`` builds anything else.
    """
    known = {**SOLVENTS, **IONS}
    key = name if name in known else name.rstrip("+-")
    if key not in known:
        ions = f" '{name}' is a salt; its ions are {' and '.join(SALTS[name])}." if name in SALTS else ""
        hint = ions or suggest_name(name, known)
        raise InputError(f"Unknown molecule '{name}'.{hint} Known names: {', '.join(known)}. Or give its SMILES.")
    if key in _TEMPLATES:
        return _from_template(key, smiles=known[key])
    return molecule_from_smiles(known[key], name=key)


def define(name: str, smiles: str) -> None:
    """Give a molecule or ion a name for the rest of the process; an anion of charge -1 also makes salts, ``Li<name>``.

    Raises InputError where the name has another meaning already or is not letters and digits, and for bad SMILES.
    """
    known = {**SOLVENTS, **IONS}
    if known.get(name) == smiles:
        return
    if name in known or name in SALTS:
        raise InputError(f"The name '{name}' stands for {known.get(name, 'a salt')} already. Choose another.")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]{0,19}", name):
        raise InputError(f"'{name[:30]}' is not a name: up to 20 letters and digits, the first a letter.")
    charge = molecule_from_smiles(smiles, name=name).charge
    (IONS if charge else SOLVENTS)[name] = smiles
    if charge == -1:
        SALTS.update({cation + name: {cation: 1, name: 1} for cation in _CATIONS})


def with_short_names(text: str) -> str:
    """Return a text with full names of solvents and salts, ``Dimethyl carbonate``, made short, ``DMC``."""
    taken = {**SOLVENTS, **SALTS}  # a user may have given a full name, in ``define``, to something else
    return _ANY_FULL_NAME.sub(lambda found: found[0] if found[0] in taken else _SHORT_NAMES[found[0].lower()], text)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest of some names of molecules or salts, else an empty string."""
    short, known = with_short_names(name), list(known)
    return f" Did you mean '{short}'?" if short != name and short in known else suggest(name, known)


def salt(name: str) -> dict[str, int]:
    """Return the ions of a salt and how many of each, ``LiPF6 -> {"Li": 1, "PF6": 1}``; InputError if unknown."""
    if name not in SALTS:
        raise InputError(f"Unknown salt '{name}'.{suggest_name(name, SALTS)} Known salts: {', '.join(SALTS)}.")
    return dict(SALTS[name])


@cache
def canonical_smiles(smiles: str) -> str:
    """Return the one SMILES that all SMILES of a molecule lead to (RDKit's)."""
    from rdkit import Chem

    return str(Chem.CanonSmiles(smiles))  # type: ignore[no-untyped-call]


@cache
def molecule_from_smiles(smiles: str, *, name: str | None = None) -> Molecule:
    """Build a molecule from SMILES: ETKDG conformers, relaxed by MMFF94 (UFF where it lacks parameters), lowest kept.

    The same SMILES gives the same geometry (fixed seed); stereocentres left open get one arbitrary configuration.
    Raises InputError for SMILES that cannot be read, embedded, or give an unphysical geometry.
    """
    from rdkit import Chem, RDLogger  # importing RDKit takes a while, so only here

    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None or parsed.GetNumAtoms() == 0:
        raise InputError(f"Cannot read SMILES '{smiles}'. Expected a single molecule, for example 'COC(=O)OC'.")
    if len(Chem.GetMolFrags(parsed)) > 1:
        raise InputError(f"SMILES '{smiles}' holds several molecules; give one per molecule (salts: one per ion).")
    full = Chem.AddHs(parsed)
    if full.GetNumAtoms() > MAX_ATOMS:
        raise InputError(f"SMILES '{smiles[:60]}' has {full.GetNumAtoms()} atoms, expected at most {MAX_ATOMS}.")
    built = Molecule(
        name=name or smiles,
        symbols=tuple(atom.GetSymbol() for atom in full.GetAtoms()),
        positions=_relaxed_conformers(full, N_CONFORMERS)[0],
        charge=Chem.GetFormalCharge(full),
        bonds=tuple(sorted(_ordered(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in full.GetBonds())),
        smiles=smiles,
    )
    check_geometry(built)
    return built


def conformers(name: str, n: int) -> list[NDArray[np.float64]]:
    """Return up to ``n`` force-field conformers of a known molecule, (n_atoms, 3) Å each, lowest energy first."""
    from rdkit import Chem

    member = molecule(name)
    if member.name in _TEMPLATES:
        return [member.positions]
    return _relaxed_conformers(Chem.AddHs(Chem.MolFromSmiles(member.smiles)), n)


def check_geometry(checked: Molecule) -> None:
    """Raise InputError unless bonds lie within ``BOND_RANGE`` and other pairs beyond ``MIN_NONBONDED`` radii."""
    radii = COVALENT_RADII[checked.numbers]
    bonded = set(checked.bonds)
    for i, j in combinations(range(checked.n_atoms), 2):
        distance = float(np.linalg.norm(checked.positions[i] - checked.positions[j]))
        ratio = distance / (radii[i] + radii[j])
        pair = f"{checked.symbols[i]}{i}-{checked.symbols[j]}{j} of '{checked.name}' is {distance:.2f} Å"
        if (i, j) in bonded and not BOND_RANGE[0] < ratio < BOND_RANGE[1]:
            raise InputError(f"Bond {pair}, {ratio:.2f} of the covalent radii; expected {BOND_RANGE}.")
        if (i, j) not in bonded and ratio < MIN_NONBONDED:
            raise InputError(f"Non-bonded pair {pair}, {ratio:.2f} of the covalent radii; expected > {MIN_NONBONDED}.")


def _relaxed_conformers(full: Any, n: int) -> list[NDArray[np.float64]]:
    """Embed conformers of an RDKit molecule with hydrogens, relax them by force field, and sort them by energy."""
    from rdkit.Chem import MolToSmiles, rdDistGeom
    from rdkit.Chem import rdForceFieldHelpers as fields

    if full.GetNumAtoms() == 1:
        return [_centred(np.zeros((1, 3)))]
    parameters = rdDistGeom.ETKDGv3()
    parameters.randomSeed = 2025  # type: ignore[assignment]
    if len(rdDistGeom.EmbedMultipleConfs(full, n, parameters)) == 0:
        raise InputError(f"RDKit found no geometry for '{MolToSmiles(full)}'. Check valences and ring strain.")
    merck = fields.MMFFHasAllMoleculeParams(full)
    relax = fields.MMFFOptimizeMoleculeConfs if merck else fields.UFFOptimizeMoleculeConfs
    energies = [energy for _, energy in relax(full, maxIters=2000)]
    positions = [np.asarray(shape.GetPositions(), dtype=np.float64) for shape in full.GetConformers()]
    return [_centred(positions[k]) for k in np.argsort(energies, kind="stable")]


def _from_template(name: str, *, smiles: str) -> Molecule:
    """Build an ion of known point group: centre first, then its fluorine atoms."""
    centre, directions, length = _TEMPLATES[name]
    units = np.array(directions, dtype=np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    built = Molecule(
        name=name,
        symbols=(centre, *("F",) * len(units)),
        positions=_centred(np.vstack([np.zeros(3), length * units])),
        charge=-1,
        bonds=tuple((0, k + 1) for k in range(len(units))),
        smiles=smiles,
    )
    check_geometry(built)
    return built


def _ordered(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


def _centred(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    centred: NDArray[np.float64] = positions - positions.mean(axis=0)
    centred.flags.writeable = False  # molecules are cached and shared
    return centred
