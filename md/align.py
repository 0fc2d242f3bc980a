"""``bamboo-md align config.yaml``: measure the pressure at the experimental density, correct it, measure again.

Each round simulates every liquid at its measured density (NVT), takes the mean of the molecular pressure, which has the
mean of the atomic one and a fraction of its noise, with its error bar, and fine-tunes the model so that its molecular
pressure shifts by P_exp - P_sim, less what is noise (``wanted_shift``, ``bamboo/learn/align.py``). It ends when
every density error is below the tolerance, or fails with the table when the rounds are used up. Liquids that only test
are simulated with the first and the last model.

All work lies in a folder named after the output: the same command again continues, and started more than once at the
same time its processes share the work.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bamboo import checkpoint, units
from bamboo.errors import ConvergenceError, InputError, suggest
from bamboo.evaluator import Evaluator, best_device
from bamboo.files import file_sha256, write_json
from bamboo.learn.align import Liquid, molecular_pressure, shift_pressures
from bamboo.learn.evaluate import Errors
from bamboo.learn.fit import LoopBlock, WeightsBlock, card_of_errors, error_table, held_out_errors, load_frames
from bamboo.learn.loop import LoopConfig
from bamboo.learn.losses import LossWeights
from bamboo.quantum.dataset import Frame
from bamboo.system import System
from md.align_report import density_figure, mean_absolute_error, measurement_table
from md.analysis.statistics import equilibrated_mean
from md.config import Molecules
from md.experiment import Measurement, load_measurements, problems
from md.liquid import Box, Stage, accept_settings, box_name, frames, nvt, share, simulate
from md.quantities import Compressibility, Density, Duration
from md.trajectory import ThermoSeries
from md.yaml_model import Problem, load_yaml

Say = Callable[[str], None]
SHARES = (0.25, 0.5, 1.0)  # of ``time``, after which the pressure is looked at
SURE = 0.1  # standard error over excess, below which a longer run would not change the correction by much
STIFFENING = 10.0  # dK/dP of organic liquids, 1/C - 1 of Tait's C = 0.087 (Dymond, Int. J. Thermophys. 9, 941, 1988)
FREE = {"output", "rounds", "tolerance", "align", "test", "table", "species", "description", "caveat"}  # may change
UNSURE = 0.3  # of a correction: liquids answered 1800 to 7800 bar with 67 to 98 % of it
MEASURED = "measured.json"
BROKEN = 0.25  # a density error this large, relative, is an error of input or a broken model


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
    output     model file to write; the folder of the same name without ending takes the simulations
    data       quantum data the model learnt from: ``clusters`` of its structures hold the model in place, and its
               held-out frames tell what the alignment did to the errors
    align, test  measured liquids; or ``table``, a file of them, where ``use`` says which is which
    species    rows of the table made of these solvents and salts only are taken; default: every row
    atoms, equilibrate, time   size of a box, the part of the run that is not looked at, and the rest, at most: a
               pressure that is wrong by ten of its standard errors is known well enough after a quarter or half of it
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
    output: Path
    data: Annotated[tuple[Path, ...], Field(min_length=1)]
    table: Path | None = None
    species: tuple[str, ...] = ()
    align: tuple[Measurement, ...] = ()
    test: tuple[Measurement, ...] = ()
    atoms: Annotated[int, Field(ge=20, le=100_000)] = 400
    equilibrate: Duration = 10.0 * units.PICOSECOND
    time: Duration = 40.0 * units.PICOSECOND
    frames: Annotated[int, Field(ge=1, le=10_000)] = 20
    rounds: Annotated[int, Field(ge=1, le=100)] = 6
    tolerance: Density = 0.01 * units.GRAM_PER_CM3
    compressibility: Compressibility = 1.0e-9 / units.PASCAL
    clusters: Annotated[int, Field(ge=1)] = 1200
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


def align(config: AlignConfig, *, say: Say = print) -> dict[str, Any]:
    """Align, write the model with its card and return the report, also written to the working folder, with a figure.

    Raises ConvergenceError with the table where the rounds do not bring every density within the tolerance,
    InputError where a density or the model cannot be right, GuardError where a simulation does not stay sound.
    """
    work = config.output.with_suffix("")
    source = checkpoint.resolve(config.model)
    settings = config.model_dump(mode="json", exclude=FREE)
    settings["model_sha256"] = file_sha256(source)
    settings["rows"] = [[row.name, row.pressure, row.density] for row in config.aligned_rows()]
    accept_settings(work, settings)
    quantum = load_frames(config.data, max_force=20.0, say=say)
    history: list[list[dict[str, Any]]] = []
    model = source
    for number in range(config.rounds + 1):
        folder = work / f"round-{number:02d}"
        rows = measure_all(
            model, config.aligned_rows(), folder, config=config, seed=config.seed + 1000 * number, say=say
        )
        history.append(rows)
        say(f"round {number}, {model.name}\n{measurement_table(rows)}")
        if all(abs(row["density_error"]) * units.GRAM_PER_CM3 <= config.tolerance for row in rows):
            break
        if number == config.rounds:
            raise ConvergenceError(_failure(config, history))
        shifts = [wanted_shift(row, *(before[k] for before in history[-2:-1])) for k, row in enumerate(rows)]
        model = _corrected(model, rows, shifts, folder, config=config, quantum=quantum, say=say)
    tests = {
        moment: measure_all(
            file,
            config.test_rows(),
            work / f"test-{file_sha256(file)[:12]}",  # of another model nothing is taken over
            config=config,
            seed=config.seed + 500,
            say=say,
        )
        for moment, file in (("before", source), ("after", model))
    }
    return _report(config, source, model, history=history, tests=tests, quantum=quantum, say=say)


def measure_all(
    model: Path, rows: Sequence[Measurement], place: Path, *, config: AlignConfig, seed: int, say: Say
) -> list[dict[str, Any]]:
    """Simulate liquids, each in a folder of its name; say results and the time left."""
    places = [place / box_name(k, row.name) / MEASURED for k, row in enumerate(rows)]
    begun, n_open = time.monotonic(), sum(not known.exists() for known in places)

    def compute(k: int) -> None:
        found = measure(model, rows[k], places[k].parent, config=config, seed=seed + k)
        write_json(places[k], found)
        _refuse_broken(found)
        still = sum(not known.exists() for known in places)
        left = (time.monotonic() - begun) / max(n_open - still, 1) * still / 60.0
        say(
            f"{place.name}, {len(rows) - still} of {len(rows)}: {rows[k].name}, {found['pressure_bar']:.0f} ± "
            f"{found['pressure_stderr_bar']:.0f} bar at the measured density"
            + (f"; {left:.0f} min left of these" if left >= 0.5 else "")
        )

    share(places, compute)
    results = [json.loads(known.read_text()) for known in places]
    for row, known, result in zip(rows, places, results, strict=True):
        if result["density_measured"] != row.density_g_cm3 or result["pressure_measured"] != row.pressure / units.BAR:
            raise InputError(
                f"{known.parent}: measured when the table said otherwise of {row.name}. Remove this folder."
            )
        _refuse_broken(result)
    return results


def measure(model: Path, row: Measurement, folder: Path, *, config: AlignConfig, seed: int) -> dict[str, Any]:
    """Simulate one liquid at its measured density; return pressure and density error."""
    evaluator = Evaluator(checkpoint.load(model), device=best_device())
    box = Box(row.electrolyte, row.temperature, config.atoms, seed, row.density_g_cm3)
    target_bar = row.pressure / units.BAR
    stages = [nvt("equilibrate", config.equilibrate)]
    frame_ps = SHARES[0] * config.time / units.PICOSECOND / config.frames
    for part in SHARES:  # the same stage, made longer
        sample = Stage("sample", part * config.time / units.PICOSECOND, frame_ps=frame_ps)
        simulate(box, [*stages, sample], evaluator, folder)
        series = ThermoSeries.read(folder / "sample" / "molecular" / "thermo.h5")
        known = series.time_ps < sample.time_ps * (1.0 + 1.0e-9)  # a run that was stopped may be longer already
        tensor = series.pressure[known]
        pressure, drifts = equilibrated_mean(np.trace(tensor, axis1=-2, axis2=-1)[:, 0] / 3.0 / units.BAR)
        excess_bar = pressure.value - target_bar
        if not drifts and pressure.is_converged and pressure.stderr < SURE * abs(excess_bar):
            break
    kappa, density = config.compressibility * units.BAR, row.density_g_cm3
    low, middle, high = (density_error(density, kappa * (excess_bar + k * pressure.stderr)) for k in (-1.0, 0.0, 1.0))
    return {
        "name": row.name,
        "density_measured": row.density_g_cm3,
        "pressure_measured": target_bar,
        "pressure_bar": pressure.value,
        "pressure_stderr_bar": pressure.stderr,
        "pressure_sigma_bar": pressure.sigma,
        "excess_bar": excess_bar,
        "density_error": middle,
        "density_stderr": (low - high) / 2.0,
        "how": f"estimated with kappa = {config.compressibility * 1e9 * units.PASCAL:g} 1/GPa",
        "drifts": drifts,
    }


def _refuse_broken(result: Mapping[str, Any]) -> None:
    """Raise InputError where a density error is so large that the measured density or the model is broken."""
    if abs(result["density_error"]) > BROKEN * result["density_measured"]:
        raise InputError(
            f"{result['name']}: the model's pressure at the measured {result['density_measured']:.4g} g/cm3 is "
            f"{result['pressure_bar']:.0f} bar, a density error of {result['density_error']:+.2f} g/cm3. Alignment "
            "mends a few percent: either the measured density is wrong, or the model is broken for this liquid."
        )


def wanted_shift(row: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> float:
    """Return the change of pressure to ask for [bar], given the same liquid in the round before.

    After a correction of -e_0 the excess is expected to be 0 with the variance v = s_0^2 + (UNSURE e_0)^2, s_0 the
    standard error it was based on. The measured e ± s makes it v e / (v + s^2): noise is not put into the model.
    """
    if before is None:
        return -float(row["excess_bar"])
    expected = before["pressure_sigma_bar"] ** 2 + (UNSURE * before["excess_bar"]) ** 2
    return -float(row["excess_bar"] * expected / (expected + row["pressure_sigma_bar"] ** 2))


def density_error(density: float, strain: float) -> float:
    """Return the density at which the excess pressure is gone, minus the given one; strain = kappa P_excess.

    Along the isotherm 1/kappa grows with pressure by K' = ``STIFFENING``: ln(rho / rho_0) = ln(1 + K' kappa P) / K'
    (Murnaghan); under tension, where that ends at -1/K', it is taken as linear.
    """
    if strain < 0.0:
        return -density * strain
    return density * math.expm1(-math.log1p(STIFFENING * strain) / STIFFENING)


def _corrected(
    model: Path,
    rows: Sequence[dict[str, Any]],
    shifts: Sequence[float],
    folder: Path,
    *,
    config: AlignConfig,
    quantum: Sequence[Frame],
    say: Say,
) -> Path:
    """Fine-tune the model on the frames of a round, to shifts in bar, and return the new model file."""
    path = folder / "corrected.safetensors"

    def compute(_: int) -> None:
        liquids = [
            Liquid(_spread_out(frames(folder / box_name(k, row["name"]), "sample"), config.frames), shift * units.BAR)
            for k, (row, shift) in enumerate(zip(rows, shifts, strict=True))
        ]
        force_field = checkpoint.load(model)
        before = [molecular_pressure(force_field, liquid.systems).mean() for liquid in liquids]
        corrected = shift_pressures(
            force_field,
            liquids,
            clusters=[frame.system for frame in anchors(quantum, config.clusters, seed=config.seed)],
            trained=config.trained,
            weights=LossWeights(**config.weights.model_dump()),
            config=LoopConfig(seed=config.seed, **config.loop.model_dump()),
            state_path=folder / "state.safetensors",
            listener=lambda progress: say(
                f"  correction, epoch {progress.epoch:.1f} of {config.loop.epochs}; "
                f"{progress.seconds_left / 60:.0f} min"
            ),
        )
        for row, shift, liquid, old in zip(rows, shifts, liquids, before, strict=True):
            gained = molecular_pressure(corrected, liquid.systems).mean() - old
            say(f"  {row['name']}: asked {shift:+.0f} bar, on its frames {gained / units.BAR:+.0f} bar")
        checkpoint.save(corrected, path, card=checkpoint.describe(model)["card"])

    share([path], compute)
    return path


def _spread_out(systems: Sequence[System], count: int) -> list[System]:
    """Return ``count`` of the frames, evenly spaced: every liquid weighs the same, however long it ran."""
    return [systems[k] for k in np.linspace(0, len(systems) - 1, min(count, len(systems))).round().astype(int)]


def anchors(quantum: Sequence[Frame], count: int, *, seed: int) -> list[Frame]:
    """Return up to ``count`` frames of the training part, at random, that shall stay as they are."""
    known = [frame for frame in quantum if frame.split == "train"]
    if not known:
        raise InputError("`data` holds no frames for training; they keep the model in place.")
    chosen = np.random.default_rng(seed).permutation(len(known))[:count]
    return [known[index] for index in chosen]


def _failure(config: AlignConfig, history: Sequence[Sequence[dict[str, Any]]]) -> str:
    course = ", ".join(f"{mean_absolute_error(rows):.4f}" for rows in history)
    return (
        f"{config.rounds} rounds did not bring every density within {config.tolerance / units.GRAM_PER_CM3:g} g/cm3; "
        f"mean absolute error by round: {course} g/cm3.\n{measurement_table(history[-1])}\n"
        "Raise `rounds` and run again to continue; or lengthen `time` where error bars are wide."
    )


def _report(
    config: AlignConfig,
    source: Path,
    model: Path,
    *,
    history: Sequence[Sequence[dict[str, Any]]],
    tests: dict[str, list[dict[str, Any]]],
    quantum: Sequence[Frame],
    say: Say,
) -> dict[str, Any]:
    """Write the aligned model with its card, figure and report, and return the report."""
    force_field = checkpoint.load(model)
    errors: dict[str, dict[str, Errors]] = {
        "before": held_out_errors(checkpoint.load(source), quantum),
        "after": held_out_errors(force_field, quantum),
    }
    report: dict[str, Any] = {
        "parent": config.model,
        "parent_sha256": file_sha256(source),
        "rounds": len(history) - 1,
        "aligned": {"before": history[0], "after": history[-1]},
        "held_out": tests,
        "mean_absolute_density_error_g_cm3": {
            part: {moment: mean_absolute_error(rows) for moment, rows in (("before", first), ("after", last)) if rows}
            for part, first, last in (
                ("aligned", history[0], history[-1]),
                ("held_out", tests["before"], tests["after"]),
            )
        },
        "sources": {row.name: row.source for row in (*config.aligned_rows(), *config.test_rows())},
        "held_out_force_rmse_eV_A": {
            moment: {group: part.forces for group, part in by_group.items() if not math.isnan(part.forces)}
            for moment, by_group in errors.items()
        },
    }
    card = checkpoint.describe(source)["card"] | card_of_errors(errors["after"]) | {"alignment": report}
    card |= {name: text for name in ("description", "caveat") if (text := getattr(config, name))}
    checkpoint.save(force_field, config.output, card=card)
    work = config.output.with_suffix("")
    density_figure(report).savefig(work / "densities.png", dpi=150)
    for moment in ("before", "after"):
        if tests[moment]:
            say(f"held-out liquids {moment}\n{measurement_table(tests[moment])}")
        say(f"errors to quantum labels {moment}\n{error_table(errors[moment])}")
    write_json(work / "report.json", report)
    say(f"wrote {config.output}")
    return report
