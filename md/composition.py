"""What is in the box: from ``1 m LiPF6 in EC:DMC 30:70 wt`` to integer counts of molecules and ions.

Amounts: m = mol per kg of solvent, M = mol per litre of solution. Ratios of solvents by mass (wt), amount of substance
(mol) or volume of the pure liquids (vol); without that word a ratio has no meaning and is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from bamboo.errors import InputError, suggest
from bamboo.structure.densities import PURE_DENSITY, formula_mass, ideal_density, salt_volume
from bamboo.structure.molecules import FULL_NAMES, SALTS, SOLVENTS, molecule, salt, with_short_names

Basis = Literal["wt", "mol", "vol"]
BASES: tuple[Basis, ...] = get_args(Basis)
_SPELLINGS: dict[str, Basis] = {"wt": "wt", "w/w": "wt", "mol": "mol", "vol": "vol", "v/v": "vol"}
UNITS = {"m": "mol/kg", "mol/kg": "mol/kg", "M": "mol/L", "mol/L": "mol/L"}
MAX_AMOUNT = 50.0  # mol/kg or mol/L; beyond any electrolyte (21 m water-in-salt is the record people simulate)

SIZE_WINDOW = 0.1  # how far the number of atoms may leave what was asked, to meet the composition
SIZE_WEIGHT = 0.1  # a size off by 10 % weighs as much as an amount off by 1 %


@dataclass(frozen=True)
class Amount:
    """An amount of salt: a value in ``mol/kg`` of solvent or ``mol/L`` of solution."""

    value: float
    unit: str


@dataclass(frozen=True)
class Composition:
    """What was asked for: parts of each solvent in a basis, an amount of each salt; or exact ``counts`` instead.

    ``density_g_cm3`` is the density of the solution where the user knows it; ``note`` tells of parts that look like
    percentages and are none.
    """

    solvents: dict[str, float] = field(default_factory=dict)
    basis: Basis = "wt"
    salts: dict[str, Amount] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    density_g_cm3: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Realisation:
    """Integer counts that stand for a composition in a box.

    formula: solvents and salts as named by the user; counts: molecules and ions as packed; density_g_cm3: estimate by
    ideal mixing, unless ``density_is_given``; asked and got: {(name, unit): value} of every amount, for the user to
    compare. A salt asked for in mol/L was not asked for in mol/kg.
    """

    formula: dict[str, int]
    counts: dict[str, int]
    n_atoms: int
    density_g_cm3: float
    asked: dict[tuple[str, str], float]
    got: dict[tuple[str, str], float]
    density_is_given: bool = False

    @property
    def litre(self) -> str:
        """What a litre of solution is taken to weigh."""
        return f"at {self.density_g_cm3:.4g} g/cm3 {'as given' if self.density_is_given else 'by ideal mixing'}"

    @property
    def worst(self) -> tuple[str, float]:
        """What deviates most from the amount that was asked, and its relative deviation."""
        deviations = {name: abs(self.got[name, unit] / asked - 1.0) for (name, unit), asked in self.asked.items()}
        return max(deviations.items(), key=lambda item: item[1], default=("", 0.0))

    def __str__(self) -> str:
        parts = " · ".join(f"{count} {name}" for name, count in self.formula.items())
        text = f"{parts} = {self.n_atoms} atoms"
        for (name, unit), value in self.got.items():
            asked = f" (asked {self.asked[name, unit]:.3g})" if (name, unit) in self.asked else ""
            text += f", {name} {value:.3g} {unit}{asked}"
            if unit == "mol/L":
                text += f" {self.litre}"
        return text


def molecules_of(composition: Composition) -> set[str]:
    """Return the names of the molecules and ions of a composition."""
    ions = {ion for name in composition.salts for ion in salt(name)}
    names = {*composition.solvents, *composition.counts}
    return ions | {part for name in names for part in (salt(name) if name in SALTS else (name,))}


def parse_composition(text: str) -> Composition:
    """Read ``<amount> <m|M|mol/kg|mol/L> SALT [+ ...] in SOLVENT[:SOLVENT...] a:b[...] <wt|mol|vol>``.

    The salt part may be absent (``EC:DMC 3:7 wt``), a single solvent needs no ratio (``1 m LiPF6 in DMC``), and a salt
    may stand in the ratio instead (``LiFSI:DME:TTE 1:1.2:3 mol``). Full names (``FULL_NAMES``) will do.
    Additives follow as percentages of the whole solvent (``EC:EMC 3:7 vol + 2 wt% VC``); all is then in their basis.
    Raises InputError that names the part in error, the nearest known name and the accepted forms.
    """
    text = with_short_names(" ".join(text.split()))
    salt_text, separator, solvent_text = text.rpartition(" in ")
    if not solvent_text or solvent_text[0].isdigit() or (separator and not salt_text):
        raise InputError(f'"{text}" is incomplete. Write, for example, "1 m LiPF6 in EC:DMC 30:70 wt" or "DMC".')
    salts: dict[str, Amount] = {}
    for part in salt_text.split("+") if separator else ():
        name, amount = _parse_salt(part.strip())
        if name in salts:
            raise InputError(f"Salt '{name}' is given twice.")
        salts[name] = amount
    ratio, *additives = re.split(r"\s\+|\+\s", solvent_text)
    solvents, basis = _parse_solvents(ratio.strip())
    note = ratio_note(solvents)
    if additives:
        solvents, basis = _with_additives(solvents, basis, [_parse_additive(part.strip()) for part in additives])
    return Composition(solvents=solvents, basis=basis, salts=salts, note=note)


def parse_basis(text: str) -> Basis | None:
    """Read a basis in any usual spelling, ``wt``, ``wt%``, ``wt.%``, ``w/w``, ``(v/v)``; None if it is none."""
    return _SPELLINGS.get(re.sub(r"[\s.%()]", "", text))


def ratio_note(parts: Mapping[str, float]) -> str:
    """Return a line about parts that look like percentages and do not sum to 100 (33:33:33 does), else nothing."""
    total = sum(parts.values())
    if not 80.0 <= total <= 120.0 or abs(total - 100.0) <= 1.001:
        return ""
    written = ":".join(f"{part:g}" for part in parts.values())
    shares = ":".join(f"{100.0 * part / total:.3g}" for part in parts.values())
    return f"{':'.join(parts)} {written}: the parts sum to {total:g}, not 100, and are taken as a ratio, {shares}."


def parse_amount(text: str) -> Amount:
    """Read ``1 m``, ``0.8 mol/kg``, ``1.2 M`` or ``1.2 mol/L``; raises InputError."""
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?\d+)?)\s*([A-Za-z/]+)", text.strip())
    if match is None:
        raise InputError(f'"{text}" is not an amount. Write, for example, "1 m" (mol/kg solvent) or "1 M" (mol/L).')
    value, unit = _number(match[1]), match[2]
    if unit not in UNITS:
        raise InputError(f"Unknown unit '{unit}' in \"{text}\".{suggest(unit, UNITS)} Known units: {', '.join(UNITS)}.")
    if not 0.0 < value <= MAX_AMOUNT:
        raise InputError(
            f'"{text}": the amount must lie in 0..{MAX_AMOUNT:g} {UNITS[unit]}. Leave out a salt you do not want.'
        )
    return Amount(value, UNITS[unit])


def _parse_salt(text: str) -> tuple[str, Amount]:
    match = re.fullmatch(r"(.*[^A-Za-z/]\s*(?:mol/kg|mol/L|[A-Za-z/]+))\s+(\S+)", text)
    if match is None:
        raise InputError(f'"{text}" is not an amount of salt. Write, for example, "1 m LiPF6" or "1.2 M LiFSI".')
    salt(match[2])
    return match[2], parse_amount(match[1])


def _parse_solvents(text: str) -> tuple[dict[str, float], Basis]:
    words = text.split(maxsplit=1)
    names = words[0].split(":")
    for name in names:
        if name not in SOLVENTS and (name not in SALTS or len(names) == 1):
            if name in SALTS:
                hint = " A salt needs an amount and ' in ' before the solvent."
            else:  # a full name may have several words
                written = re.split(r"[:\d]", text[text.index(name) :])[0].strip()
                full = [full for full, short in FULL_NAMES.items() if short in SOLVENTS]
                hint = suggest(written, [*SOLVENTS, *full]) or f" Known solvents: {', '.join(SOLVENTS)}."
            raise InputError(f"Unknown solvent '{name}'.{hint}")
    if len(set(names)) < len(names):
        raise InputError(f'"{words[0]}" names a solvent twice.')
    if len(words) == 1 and len(names) == 1:
        return {names[0]: 1.0}, "wt"
    rest = re.sub(r"[(),]", " ", words[1] if len(words) > 1 else "").strip()  # as papers write it: (3:7, v/v)
    match = re.fullmatch(r"([0-9.:eE+-]*)\s*(.*)", rest)
    ratio, spelling = (match[1], match[2].strip()) if match else ("", "")
    shares = ratio or ":".join("1" * len(names))
    if not ratio:
        raise InputError(f'"{text}" has no ratio. Write, for example, {words[0]} {shares} wt.')
    if not spelling:
        raise InputError(f'"{text}" has no basis. Write {ratio} wt, {ratio} mol or {ratio} vol.')
    if (basis := parse_basis(spelling)) is None:
        raise InputError(
            f"Unknown basis '{spelling}'.{suggest(spelling, BASES)} Write {ratio} wt, {ratio} mol or {ratio} vol."
        )
    parts = [_number(part) for part in ratio.split(":")]
    if len(parts) != len(names):
        raise InputError(f'"{text}" names {len(names)} solvents and gives {len(parts)} parts.')
    if not all(0.0 < part <= 1.0e6 for part in parts):
        raise InputError(f'"{ratio}": every part must lie in 0..1e6. Leave out a solvent you do not want.')
    return dict(zip(names, parts, strict=True)), basis


def _parse_additive(text: str) -> tuple[str, float, Basis]:
    match = re.fullmatch(r"([0-9.]+)\s*([^%]*%(?:\s*\S+)?)\s+(\S+)", text)
    if match is None:
        raise InputError(f'"{text}" is not an additive. Write, for example, + 2 wt% VC, of the whole solvent.')
    percent, name = _number(match[1]), match[3]
    if name in SALTS:
        raise InputError(f"{name} is a salt: give its amount before ' in ', as in \"1 m LiPF6 + 0.1 m {name} in DMC\".")
    if name not in SOLVENTS:
        hint = suggest(name, SOLVENTS) or f" Known solvents: {', '.join(SOLVENTS)}."
        raise InputError(f"Unknown solvent '{name}'.{hint}")
    if (basis := parse_basis(match[2])) is None:
        raise InputError(f'"{text}" has no basis. Write + {match[1]} wt% {name}, by weight of the whole solvent.')
    if not 0.0 < percent < 100.0:
        raise InputError(f'"{text}": an additive must lie in 0..100 % of the whole solvent.')
    return name, percent, basis


def _with_additives(
    solvents: dict[str, float], basis: Basis, additives: list[tuple[str, float, Basis]]
) -> tuple[dict[str, float], Basis]:
    """Return percentages of solvents and additives in the basis of the additives."""
    percent = {name: amount for name, amount, _ in additives}
    if len(percent) < len(additives) or percent.keys() & solvents.keys():
        raise InputError("A solvent is named twice, in the ratio or among the additives.")
    if len({each for *_, each in additives}) > 1:
        raise InputError("The additives have several bases. Give all in one, wt% for example.")
    if any(name in SALTS for name in solvents):
        raise InputError("A salt in the ratio and additives: give the additives in the ratio, too.")
    left = 100.0 - sum(percent.values())
    if left <= 0.0:
        raise InputError("The additives leave no room for the solvents: together they must be below 100 %.")
    target = additives[0][2]
    if target != basis:
        solvents = {name: part * _grams(name, basis) / _grams(name, target) for name, part in solvents.items()}
    total = sum(solvents.values())
    return {name: left * part / total for name, part in solvents.items()} | percent, target


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"'{text}' is not a number.") from None


def realise(composition: Composition, *, n_atoms: int) -> Realisation:
    """Return the integer counts nearest to a composition in a box of about ``n_atoms`` atoms.

    Minimised over box sizes within 10 % of the asked one: the largest relative deviation of any amount plus a tenth of
    that of the size; every component keeps at least one molecule. Salts enter as formula units, so the box is neutral.
    Raises InputError for exact counts that carry a net charge, and for volumes of liquids without a known density.
    """
    if composition.counts:
        formula, asked = dict(composition.counts), {}
    else:
        moles = moles_per_kg_solvent(composition)
        formula = _nearest_counts(moles, {name: _formula_atoms(name) for name in moles}, n_atoms)
        asked = _amounts(composition, moles)
        for name, unit in list(asked):
            if unit == "mol/L":
                del asked[name, "mol/kg"]
    counts: dict[str, int] = {}
    for name, count in formula.items():
        for part, multiple in _parts(name).items():
            counts[part] = counts.get(part, 0) + multiple * count
    charges = {name: count * molecule(name).charge for name, count in counts.items()}
    if (net := sum(charges.values())) != 0:
        ions = " ".join(f"{counts[name]} {name}" for name, charge in charges.items() if charge)
        raise InputError(f"The box is not neutral: {ions} make {net:+d} e. Change the counts.")
    return Realisation(
        formula=formula,
        counts=counts,
        n_atoms=sum(count * molecule(name).n_atoms for name, count in counts.items()),
        density_g_cm3=composition.density_g_cm3 or ideal_density({k: float(v) for k, v in formula.items()}),
        asked=asked,
        got=_amounts(composition, {name: float(count) for name, count in formula.items()}),
        density_is_given=composition.density_g_cm3 is not None,
    )


def moles_per_kg_solvent(composition: Composition) -> dict[str, float]:
    """Return mol of every solvent and salt per kg of solvent.

    A molarity c follows from V = m_solvent / rho_solvent + sum_s n_s V_s = 1 L with the densities of the pure liquids
    and the volumes of the salts, or from the density of the solution where that is given.
    """
    parts = composition.solvents
    if composition.salts and any(name in SALTS for name in parts):
        raise InputError("A salt in the ratio and an amount of salt: give all salts in the ratio, or all as amounts.")
    weight = {name: part * _grams(name, composition.basis) for name, part in parts.items()}
    total = sum(weight.values())
    moles = {name: 1000.0 * weight[name] / total / formula_mass(name) for name in parts}
    molal = {name: a.value for name, a in composition.salts.items() if a.unit == "mol/kg"}
    molar = {name: a.value for name, a in composition.salts.items() if a.unit == "mol/L"}
    if not molar:
        return moles | molal
    salt_mass = {name: formula_mass(name) / 1000.0 for name in composition.salts}  # kg/mol
    if composition.density_g_cm3 is not None:
        left = composition.density_g_cm3 - sum(c * salt_mass[name] for name, c in molar.items())  # kg/L
        per_kg = 1.0 + sum(b * salt_mass[name] for name, b in molal.items())
    else:
        left = 1.0 - sum(c * salt_volume(name) for name, c in molar.items()) / 1000.0  # L
        solvent_volume = sum(w / total / _density(name) for name, w in weight.items())  # L/kg
        per_kg = solvent_volume + sum(b * salt_volume(name) for name, b in molal.items()) / 1000.0
    kg_per_litre = left / per_kg
    if kg_per_litre <= 0.0:
        amounts = " + ".join(f"{c:g} M {name}" for name, c in molar.items())
        raise InputError(f"{amounts} leaves no room for solvent in a litre. Give molality (m) instead.")
    return moles | molal | {name: c / kg_per_litre for name, c in molar.items()}


def _nearest_counts(moles: dict[str, float], atoms: dict[str, int], n_atoms: int) -> dict[str, int]:
    names = list(moles)
    x = np.array([moles[name] for name in names])
    size = np.array([atoms[name] for name in names])
    middle = n_atoms / float(x @ size)
    low, high = middle * (1.0 - SIZE_WINDOW), middle * (1.0 + SIZE_WINDOW)
    # scales at which some component is a whole number are the ones worth trying
    scales = [np.array([middle])]
    for share in x:
        whole = np.arange(np.ceil(low * share), np.floor(high * share) + 1.0)
        scales.append(whole[:: max(1, len(whole) // 200)] / share)
    scale = np.concatenate(scales)
    counts = np.maximum(np.rint(scale[:, None] * x), 1.0)  # (n_scales, n_components)
    logs = np.log(counts / x)
    deviation = np.abs(logs - logs.mean(axis=1, keepdims=True)).max(axis=1)
    off_size = np.abs(counts @ size / n_atoms - 1.0)
    best = counts[int(np.argmin(deviation + SIZE_WEIGHT * off_size))]
    return {name: int(count) for name, count in zip(names, best, strict=True)}


def _amounts(composition: Composition, formula: dict[str, float]) -> dict[tuple[str, str], float]:
    """Salts in mol/kg solvent, and in mol/L if asked for so; solvents as percentages of the basis."""
    solvents = {name: n for name, n in formula.items() if name not in SALTS and _charge(name) == 0}
    kg = sum(n * formula_mass(name) for name, n in solvents.items()) / 1000.0
    amounts: dict[tuple[str, str], float] = {}
    for name, n in formula.items():
        if name in composition.salts and composition.salts[name].unit == "mol/L":
            grams = sum(m * formula_mass(each) for each, m in formula.items())
            litres = grams / (composition.density_g_cm3 or ideal_density(formula)) / 1000.0
            amounts[name, "mol/L"] = n / litres
        if name not in solvents and kg > 0.0:
            amounts[name, "mol/kg"] = n / kg
    if len(solvents) > 1:
        share = {name: n * formula_mass(name) / _grams(name, composition.basis) for name, n in solvents.items()}
        total = sum(share.values())
        amounts |= {(name, f"% {composition.basis}"): 100.0 * part / total for name, part in share.items()}
    return amounts


def _parts(name: str) -> dict[str, int]:
    return salt(name) if name in SALTS else {name: 1}


def _formula_atoms(name: str) -> int:
    return sum(n * molecule(part).n_atoms for part, n in _parts(name).items())


def _charge(name: str) -> int:
    return sum(n * molecule(part).charge for part, n in _parts(name).items())


def _grams(name: str, basis: Basis) -> float:
    """Return the mass [g] of one part of a solvent: 1 g, 1 mol or 1 cm3 of the pure liquid."""
    return 1.0 if basis == "wt" else formula_mass(name) if basis == "mol" else _density(name)


def _density(name: str) -> float:
    if name not in PURE_DENSITY:
        known = ", ".join(PURE_DENSITY)
        raise InputError(
            f"The density of pure {name} is not tabulated (known: {known}). Use wt or mol, and m for salts."
        )
    return PURE_DENSITY[name][0]
