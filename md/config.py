"""The configuration of a run: what a YAML file may say, with units, defaults and the reasons for refusing it.

Quantities are text with a unit (``298 K``, ``20 ps``) and are kept in internal units (temperatures in K, wall times in
seconds). ``load_config`` reads a file; every problem found is reported as ``file:line: key.path: problem``.
"""

import io
import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from ruamel.yaml import YAML

from bamboo import units
from bamboo.errors import InputError
from bamboo.structure.molecules import IONS, SALTS, SOLVENTS, define, suggest_name
from md.boxes import read_box
from md.composition import Amount, Basis, Composition, parse_amount, parse_basis, parse_composition, ratio_note
from md.engine.minimiser import LIQUID_FORCE
from md.quantities import (
    COLDEST_LIQUID_K,
    MOST_SEVERAL,
    Damping,
    Density,
    DensityRange,
    Duration,
    Force,
    Length,
    Pressure,
    Ramp,
    Temperatures,
    Timestep,
    WallTime,
    refused_by_pydantic,
    validator,
)
from md.yaml_model import load_yaml
from md.yaml_source import Key, read_yaml

SaltAmount = Annotated[
    Amount,
    validator(lambda text: parse_amount(str(text))),
    PlainSerializer(lambda amount: f"{amount.value!r} {amount.unit}"),
    WithJsonSchema({"type": "string"}),
]
Property = Literal["density", "viscosity", "conductivity", "diffusion", "coordination", "dielectric"]


MOST_BOXES = 256  # of all conditions together


Molecules = Annotated[dict[str, str], AfterValidator(lambda names: _defined(names)), Field(max_length=50)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CompositionBlock(_Block):
    """The long form of ``electrolyte``: parts of solvents in a basis and amounts of salts, or exact counts."""

    solvents: dict[str, Annotated[float, Field(strict=True, gt=0.0, le=1.0e6)]] = {}
    basis: Annotated[
        Basis | None, BeforeValidator(lambda given: (isinstance(given, str) and parse_basis(given)) or given)
    ] = None
    salts: dict[str, SaltAmount] = {}
    counts: dict[str, Annotated[int, Field(strict=True, ge=1, le=10_000_000)]] = {}
    density: Density | None = None


class ConditionsBlock(_Block):
    """The long form of ``temperature`` (and ``pressure``)."""

    temperature: Temperatures = 298.15
    pressure: Pressure = units.BAR


class ModelBlock(_Block):
    """Which force field, and where it runs. ``name`` is a model of the zoo or a file.

    committee  further models, trained alike from other seeds: each runs the whole protocol, watched by all others, and
               every property gets its spread over the models
    untrained  run also molecules that the data of the model did not hold
    """

    name: str = "default"
    untrained: bool = False
    committee: Annotated[tuple[str, ...], Field(max_length=15)] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"


class BuildBlock(_Block):
    """How the box is packed: about ``atoms`` atoms at ``density``, by default 0.85 of ideal mixing.

    ``replicas`` boxes are packed from the seeds ``seed``, ``seed + 1``, ... and simulated together.
    """

    atoms: Annotated[int, Field(strict=True, ge=1, le=10_000_000)] = 1000
    replicas: Annotated[int, Field(strict=True, ge=1, le=MOST_BOXES)] = 1
    seed: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1000)] = 1
    density: Density | None = None
    tolerance: Length = 2.0


class Minimise(_Block):
    """Relax the packed box until the largest force is below ``force``, at most ``steps`` steps."""

    kind: Literal["minimise"]
    name: str | None = None
    steps: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 200
    force: Force = LIQUID_FORCE


class _Dynamics(_Block):
    name: str | None = None
    time: Duration
    timestep: Timestep = units.FEMTOSECOND
    temperature: Ramp | None = None


class NVE(_Dynamics):
    """Constant energy."""

    kind: Literal["nve"]


class NVT(_Dynamics):
    """Constant volume; ``volume: mean`` takes the mean volume of the NPT stage before."""

    kind: Literal["nvt"]
    thermostat: Literal["svr", "nhc", "langevin"] = "svr"
    damping: Damping = units.PICOSECOND
    volume: Literal["current", "mean"] = "current"


class NPT(_Dynamics):
    """Constant pressure: stochastic cell and velocity rescaling, or Martyna-Tobias-Klein (for equilibrated boxes).

    coupling  anisotropic, with mtk: each box length follows the pressure along it; for solids, not for liquids
    """

    kind: Literal["npt"]
    pressure: Pressure | None = None
    barostat: Literal["c-rescale", "mtk"] = "c-rescale"
    coupling: Literal["isotropic", "anisotropic"] = "isotropic"
    damping: Damping = 0.1 * units.PICOSECOND
    barostat_damping: Damping = units.PICOSECOND


Stage = Annotated[Minimise | NVE | NVT | NPT, Field(discriminator="kind")]


class GuardsBlock(_Block):
    """Limits beyond which a run stops: the box boils or collapses, atoms fuse, molecules break.

    max_temperature is a multiple of the highest temperature the thermostat aims at in a stage; disagreement is the
    largest standard deviation of the force on an atom over the models of a committee.
    """

    max_temperature: Annotated[float, Field(strict=True, gt=1.0, le=100.0)] = 3.0
    density: DensityRange = (0.3 * units.GRAM_PER_CM3, 2.5 * units.GRAM_PER_CM3)
    min_distance: Length = 0.6
    broken_bonds: Literal["stop", "ignore"] = "stop"
    disagreement: Force = 1.0


class OutputBlock(_Block):
    """How often what is written: frames, lines of thermo.csv, and pressure tensor with charge current."""

    trajectory_every: Duration = units.PICOSECOND
    thermo_every: Duration = 0.1 * units.PICOSECOND
    transport_every: Duration = 5.0 * units.FEMTOSECOND


class CheckpointBlock(_Block):
    """Restart files are written every so often in wall time; at ``wall_time`` the run stops with exit code 75."""

    every: WallTime = 300.0
    wall_time: WallTime | None = None


class RunConfig(_Block):
    """A whole run: ``electrolyte``, ``composition`` or ``structure``, the rest has defaults (stages: ``md.protocol``).

    ``electrolyte`` and ``temperature`` may be lists: every composition at every temperature is a condition, all are
    advanced together in one batch and analysed apart.

    molecules   names for molecules and ions that are not built in: {FB: Fc1ccccc1}; usable wherever names are
    structure   file of a periodic box of known molecules, in any format that ASE reads: the start, not packed
    """

    molecules: Molecules = {}
    electrolyte: Annotated[str | tuple[str, ...], validator(lambda given: _checked_electrolyte(given))] | None = None
    composition: CompositionBlock | None = None
    structure: str | None = None
    temperature: Temperatures | None = None
    pressure: Pressure | None = None
    conditions: ConditionsBlock | None = None
    model: Annotated[
        ModelBlock, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    ] = ModelBlock()
    properties: tuple[Property, ...] = get_args(Property)
    build: BuildBlock = BuildBlock()
    stages: Annotated[tuple[Stage, ...], Field(max_length=50)] = ()
    guards: GuardsBlock = GuardsBlock()
    output: OutputBlock = OutputBlock()
    checkpoint: CheckpointBlock = CheckpointBlock()

    @property
    def temperatures_K(self) -> tuple[float, ...]:
        """Temperatures of the run [K]."""
        block = self.conditions or ConditionsBlock()
        given = self.temperature if self.temperature is not None else block.temperature
        return given if isinstance(given, tuple) else (given,)

    @property
    def temperature_K(self) -> float:
        """Temperature of a run of one condition [K]."""
        (temperature,) = self.temperatures_K
        return temperature

    @property
    def target_pressure(self) -> float:
        """Pressure of the run [eV/Å^3]."""
        block = self.conditions or ConditionsBlock()
        return float(self.pressure if self.pressure is not None else block.pressure)

    def each_member(self) -> dict[str, "RunConfig"]:
        """Return the run of every model of the committee alone, by the name of its file; '' if there is only one."""
        if not self.model.committee:
            return {"": self}
        models = [self.model.model_copy(update={"name": n, "committee": ()}) for n in self.model_names]
        return {folder_name(Path(m.name).stem): self.model_copy(update={"model": m}) for m in models}

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names or files of all models."""
        return self.model.name, *self.model.committee

    def each_condition(self) -> dict[str, "RunConfig"]:
        """Return the run of every condition alone, by name: ``280K``, ``1-m-LiPF6-in-DMC-280K``, '' if only one."""
        electrolytes = self.electrolyte if isinstance(self.electrolyte, tuple) else (self.electrolyte,)
        temperatures = self.temperatures_K
        if len(electrolytes) == len(temperatures) == 1:
            return {"": self}
        runs = {}
        for electrolyte, temperature in itertools.product(electrolytes, temperatures):
            words = [folder_name(electrolyte)] if electrolyte is not None and len(electrolytes) > 1 else []
            words += [f"{temperature:g}K"] if len(temperatures) > 1 else []
            update = {"electrolyte": electrolyte, "temperature": temperature, "pressure": self.target_pressure}
            runs["-".join(words)] = self.model_copy(update=update | {"conditions": None})
        return runs

    def what(self) -> Composition:
        """Return the composition of one condition: from its text, its block, or the molecules of the structure file."""
        if self.structure is not None:
            return Composition(counts=read_box(self.structure)[0])
        if isinstance(self.electrolyte, str):
            return parse_composition(self.electrolyte)
        block = self.composition or CompositionBlock()
        density = None if block.density is None else float(block.density) / units.GRAM_PER_CM3
        return Composition(
            solvents=dict(block.solvents),
            basis=block.basis or "wt",
            salts=dict(block.salts),
            counts=dict(block.counts),
            density_g_cm3=density,
            note=ratio_note(block.solvents),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is allowed and perhaps not meant, a line each."""
        compositions = [] if self.structure is not None else [one.what().note for one in self.each_condition().values()]
        temperatures = [
            f"{temperature:g} K is colder than any liquid electrolyte. For {temperature:g} degrees Celsius, "
            f"write '{temperature:g} °C'."
            for temperature in self.temperatures_K
            if temperature < COLDEST_LIQUID_K
        ]
        return tuple(dict.fromkeys([*temperatures, *filter(None, compositions)]))


def _defined(names: dict[str, str]) -> dict[str, str]:
    for name, smiles in names.items():
        refused_by_pydantic(lambda given: define(*given), (name, smiles))
    return names


def _checked_electrolyte(given: object) -> object:
    if not isinstance(given, list | tuple):
        given = _one_electrolyte(given)
    elif not 1 < len(given) <= MOST_SEVERAL:
        raise InputError(f"expected one electrolyte or a list of 2 to {MOST_SEVERAL}, got {len(given)}.")
    else:
        given = tuple(_one_electrolyte(text) for text in given)
    return given


def _one_electrolyte(text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"{str(text)[:60]!r} is not text such as '1 m LiPF6 in EC:DMC 30:70 wt'.")
    parse_composition(text)
    return text


def folder_name(text: str) -> str:
    """Return a text with everything replaced that a file name should not have."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-.")[:100]


def load_config(path: str | Path) -> RunConfig:
    """Read and check the configuration of a run; raises InputError that lists every problem, one per line."""
    if is_sweep(path):
        raise InputError(f"{path}: is a sweep (it has a block `run`). `bamboo-md sweep {path}` runs all of it.")
    return load_yaml(path, RunConfig, checks=_cross_checks)


def is_sweep(path: str | Path) -> bool:
    """Return whether a YAML file is a sweep: only those have a block ``run``."""
    data = read_yaml(Path(path)).data
    return isinstance(data, dict) and "run" in data


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML with all defaults; ``load_config`` reads it back (to 12 digits)."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(config.model_dump(mode="json", exclude_none=True), stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the configuration file, for editors."""
    return RunConfig.model_json_schema()


def _cross_checks(config: RunConfig) -> list[tuple[Key, str]]:
    """Rules that join several keys; each problem with the key it belongs to."""
    problems: list[tuple[Key, str]] = []
    given = [name for name in ("electrolyte", "composition", "structure") if getattr(config, name) is not None]
    if len(given) != 1:
        problems.append(((given[-1],) if given else (), _ONE_COMPOSITION))
    if config.conditions is not None:
        for name in ("temperature", "pressure"):
            if getattr(config, name) is not None:
                problems.append(((name,), f"given here and in `conditions`. Keep `conditions.{name}` or this one."))
    if config.composition is not None:
        problems += _check_block(config.composition)
    seen_npt = False
    for index, stage in enumerate(config.stages):
        if isinstance(stage, NVT) and stage.volume == "mean" and not seen_npt:
            problems.append((("stages", index, "volume"), "the mean volume needs an npt stage before this one."))
        if not isinstance(stage, Minimise) and stage.time < stage.timestep:
            problems.append((("stages", index, "time"), "shorter than one timestep."))
        if isinstance(stage, NPT) and stage.coupling == "anisotropic" and stage.barostat != "mtk":
            problems.append((("stages", index, "coupling"), "anisotropic coupling needs `barostat: mtk`."))
        seen_npt = seen_npt or isinstance(stage, NPT)
    problems += _check_conditions(config)
    if len(config.each_member()) < len({*config.model_names}) or len({*config.model_names}) < len(config.model_names):
        problems.append((("model", "committee"), "two models have the same name, which is that of their folders."))
    low, high = config.guards.density
    if low >= high:
        problems.append((("guards", "density"), "the lower limit is not below the upper one."))
    return problems


def _check_conditions(config: RunConfig) -> list[tuple[Key, str]]:
    """Every condition once, and no more boxes than a batch is meant for."""
    problems: list[tuple[Key, str]] = []
    temperatures = [f"{temperature:g}" for temperature in config.temperatures_K]
    if len(set(temperatures)) < len(temperatures):
        key: Key = ("temperature",) if config.temperature is not None else ("conditions", "temperature")
        problems.append((key, "holds a temperature twice."))
    electrolytes = config.electrolyte if isinstance(config.electrolyte, tuple) else ()
    if len({folder_name(text) for text in electrolytes}) < len(electrolytes):
        problems.append((("electrolyte",), "holds a composition twice."))
    n_boxes = len(temperatures) * max(1, len(electrolytes)) * config.build.replicas
    if n_boxes > MOST_BOXES:
        problems.append((("build", "replicas"), f"{n_boxes} boxes in all, expected at most {MOST_BOXES}."))
    return problems


_ONE_COMPOSITION = (
    "give either `electrolyte: 1 m LiPF6 in EC:DMC 30:70 wt`, or a `composition:` block with `solvents` or `counts`, "
    "or the file of a `structure:`."
)


def _check_block(block: CompositionBlock) -> list[tuple[Key, str]]:
    problems: list[tuple[Key, str]] = []
    if bool(block.counts) == bool(block.solvents):
        problems.append((("composition",), "give either `solvents` (with `basis` and `salts`) or `counts`."))
    if block.counts and block.salts:
        problems.append((("composition", "salts"), "exact `counts` already include the salts. Remove one of them."))
    if len(block.solvents) > 1 and block.basis is None:
        problems.append((("composition",), "several solvents need a `basis`: wt, mol or vol."))
    tables: list[tuple[str, dict[str, Any], str]] = [
        ("solvents", {**SOLVENTS, **SALTS}, "solvent"),
        ("salts", {**SALTS}, "salt"),
        ("counts", {**SOLVENTS, **SALTS, **IONS}, "molecule"),
    ]
    for field, table, noun in tables:
        for name in getattr(block, field):
            if name not in table:
                hint = suggest_name(name, table) or f" Known: {', '.join(table)}."
                problems.append((("composition", field, name), f"unknown {noun} '{name}'.{hint}"))
    return problems
