"""What ``bamboo-md align`` is told: a model, measured liquids, how long to simulate and how to correct."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from bamboo import units
from bamboo.errors import suggest
from bamboo.learn.fit import LoopBlock, WeightsBlock
from md.config import Molecules
from md.measurements import Measurement, load_measurements, problems
from md.quantities import Compressibility, Density, Duration
from md.yaml_model import Problem, load_yaml


class AlignWeights(WeightsBlock):
    """Weights of the loss: what must stay weighs more than in training, or clusters pay for the liquids.

    The sum of raw charges is measured against the total charge, not against the present model: it has no weight, or
    the charges would move although no pressure asks for it.
    """

    forces: Annotated[float, Field(ge=0)] = 10.0
    energy: Annotated[float, Field(ge=0)] = 2.0
    molecular_forces: Annotated[float, Field(ge=0)] = 2.0
    molecular_virial: Annotated[float, Field(gt=0)] = 1.0
    raw_charge: Annotated[float, Field(ge=0)] = 0.0


class AlignConfig(BaseModel):
    """What ``bamboo-md align`` reads.

    model      zoo name or model file to align
    parent     model whose densities and errors the report and the card show as those before; default: ``model``
    output     model file to write; the folder of the same name without ending takes the simulations
    data       quantum data the model learnt from: up to ``clusters`` of its frames hold the model to their labels, and
               its held-out frames tell what the alignment did to the errors
    align, test  measured liquids; or ``table``, a file of them, where ``use`` says which is which
    species    rows of the table made of these solvents and salts only are taken; default: every row
    atoms, equilibrate, time   size of a box, the part of the run that is not looked at (half of it in later rounds),
               and the rest, at most: a pressure that is wrong by ten of its standard errors is known well enough after
               a quarter or half of it
    frames     taken from each run to train on
    rounds     most corrections before the alignment fails
    tolerance  of every density
    compressibility   kappa, by which density errors are estimated from P_sim - P_exp (``density_error``)
    trained    "all" weights or "energy_head"; for 5200 bar in DMC the latter cost clusters up to 4 % of their force
               error, all weights 0.5 % (docs/alignment.md)
    description, caveat   of the new model's card; default: what its parent's says
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    molecules: Molecules = {}
    model: str
    parent: str = ""
    output: Path
    data: Annotated[tuple[Path, ...], Field(min_length=1)]
    table: Path | None = None
    species: tuple[str, ...] = ()
    align: tuple[Measurement, ...] = ()
    test: tuple[Measurement, ...] = ()
    atoms: Annotated[int, Field(ge=20, le=100_000)] = 400
    equilibrate: Duration = 20.0 * units.PICOSECOND
    time: Duration = 40.0 * units.PICOSECOND
    frames: Annotated[int, Field(ge=1, le=10_000)] = 20
    rounds: Annotated[int, Field(ge=1, le=100)] = 6
    tolerance: Density = 0.01 * units.GRAM_PER_CM3
    compressibility: Compressibility = 1.0e-9 / units.PASCAL
    clusters: Annotated[int, Field(ge=1)] = 2000
    trained: Literal["energy_head", "all"] = "all"
    weights: AlignWeights = AlignWeights()
    loop: LoopBlock = LoopBlock(epochs=10, edges_per_batch=20_000, learning_rate=1.0e-3, weight_decay=0.0)
    seed: Annotated[int, Field(ge=0, le=10**6)] = 1
    description: str = ""
    caveat: str = ""

    def aligned_rows(self) -> tuple[Measurement, ...]:
        """Return the liquids to align to."""
        return self.align or tuple(row for row in self._table() if row.use == "align")

    def test_rows(self) -> tuple[Measurement, ...]:
        """Return the liquids that only test: those with a density."""
        return self.test or tuple(row for row in self._table() if row.use == "test" and row.density is not None)

    def _table(self) -> tuple[Measurement, ...]:
        rows = load_measurements(self.table) if self.table is not None else ()
        return tuple(row for row in rows if not self.species or row.species <= set(self.species))


def load_align_config(path: Path) -> AlignConfig:
    """Read and check the configuration; raises InputError that lists every problem as ``file:line: key: problem``."""
    return load_yaml(path, AlignConfig, checks=_checks)


def _checks(config: AlignConfig) -> list[Problem]:
    if bool(config.table) == bool(config.align):
        return [(("align",) if config.align else (), "give either `align`, a list of liquids, or a `table` of them.")]
    if config.table and config.test:
        return [(("test",), "the `table` says which liquids test. Remove one of the two.")]
    if config.species and not config.table:
        return [(("species",), "chooses rows of a `table`, and there is none.")]
    if config.table:
        listed = set().union(*(row.species for row in load_measurements(config.table)))
        if unknown := [(("species", k), f"no row of the table has {name}.{suggest(name, listed)}")
                       for k, name in enumerate(config.species) if name not in listed]:  # fmt: skip
            return list[Problem](unknown)
    found = problems(config.align, ("align",)) + problems(config.test, ("test",))
    found += [(("align", k), "its `use` is not align.") for k, row in enumerate(config.align) if row.use != "align"]
    found += [(("test", k), "has no density.") for k, row in enumerate(config.test) if row.density is None]
    if not config.aligned_rows():
        found.append((("table",), "no row of the table aligns."))
    return found
