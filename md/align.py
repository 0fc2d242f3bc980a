"""``bamboo-md align config.yaml``: measure the pressure at the experimental density, correct it, measure again.

Each round simulates every liquid at its measured density (NVT), from where the round before left it: a packed liquid
loses its excess pressure within 20 ps or more, so the first rounds are coarse. It takes the mean of the molecular
pressure, which has the mean of the atomic one and a fraction of its noise, with its error bar, and fine-tunes the model
so that its molecular pressure shifts by P_exp - P_sim, less noise and a bit more than that, as liquids evade part of a
shift (``wanted_shift``, ``bamboo/learn/align.py``).
The rounds end when every density error is below the tolerance or they are used up. Then the liquids are simulated at
constant pressure, where the density is an answer and no estimate. Where neither is within the tolerance, what is left
is one more measurement of the excess pressure: up to ``REFINEMENTS`` times the model is corrected by it and simulated
again, before it fails with the table. Liquids that only test are simulated likewise. The densities of the parent are
estimated from its pressures, as in the rounds.

All work lies in a folder named after the output: the same command again continues, and started more than once at the
same time its processes share the work.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bamboo import checkpoint, units
from bamboo.errors import ConvergenceError, InputError
from bamboo.evaluator import Evaluator, best_device
from bamboo.files import file_sha256, write_json
from bamboo.learn.align import Liquid, molecular_pressure, shift_pressures
from bamboo.learn.evaluate import Errors
from bamboo.learn.fit import card_of_errors, error_table, held_out_errors, load_frames
from bamboo.learn.loop import LoopConfig
from bamboo.learn.losses import LossWeights
from bamboo.quantum.dataset import Frame
from bamboo.system import System
from md.align_config import AlignConfig
from md.align_report import density_figure, mean_absolute_error, measurement_table
from md.analysis.statistics import equilibrated_mean
from md.liquid import Box, Stage, accept_settings, box_name, frames, nvt, share, simulate
from md.measurements import Measurement
from md.trajectory import ThermoSeries

Say = Callable[[str], None]
SHARES = (0.25, 0.5, 1.0)  # of ``time``, after which the pressure is looked at
SETTLED = 0.5  # of ``equilibrate``, for a liquid that goes on from where another model left it
SURE = 0.1  # standard error over excess, below which a longer run would not change the correction by much
STIFFENING = 10.0  # dK/dP of organic liquids, 1/C - 1 of Tait's C = 0.087 (Dymond, Int. J. Thermophys. 9, 941, 1988)
# what may change between calls
FREE = {"output", "parent", "rounds", "tolerance", "align", "test", "table", "species", "description", "caveat"}
RESPONSE = 0.7  # of a shift that is left when the liquid has answered; 0.45 to 0.7 by linear response, -cov(P, dU)/kT
UNSURE = 0.5  # of a correction: liquids answered 1800 to 7800 bar with 67 to 98 %, some 500 bar with far less
REFINEMENTS = 2  # most corrections by what is simulated at constant pressure
MEASURED = "measured.json"
BROKEN = 0.25  # a density error this large, relative, is an error of input or a broken model


def align(config: AlignConfig, *, say: Say = print) -> dict[str, Any]:
    """Align, write the model with its card and return the report, also written to the working folder, with a figure.

    Raises ConvergenceError with the table where the rounds do not bring every density within the tolerance,
    InputError where a density or the model cannot be right, GuardError where a simulation does not stay sound.
    """
    work = config.output.with_suffix("")
    source, parent = checkpoint.resolve(config.model), checkpoint.resolve(config.parent or config.model)
    settings = config.model_dump(mode="json", exclude=FREE)
    settings["model_sha256"] = file_sha256(source)
    settings["rows"] = [[row.name, row.pressure, row.density] for row in config.aligned_rows()]
    accept_settings(work, settings)
    quantum = load_frames(config.data, max_force=20.0, say=say)
    history: list[list[dict[str, Any]]] = []
    model = source

    def shifts_wanted() -> list[float]:
        return [wanted_shift(rounds) for rounds in zip(*history, strict=True)]

    for number in range(config.rounds):
        folder = work / f"round-{number:02d}"
        rows = measure_all(
            model,
            config.aligned_rows(),
            folder,
            config=config,
            seed=config.seed + 1000 * number,
            after=work / f"round-{number - 1:02d}" if number else None,
            say=say,
        )
        history.append(rows)
        say(f"round {number}, {model.name}\n{measurement_table(rows)}")
        if _within(config, rows):
            break
        model = _corrected(model, rows, shifts_wanted(), folder, config=config, quantum=quantum, say=say)
    common: dict[str, Any] = {"config": config, "seed": config.seed + 500, "say": say}

    def estimated(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
        return measure_all(parent, rows, work / f"pressure-{file_sha256(parent)[:12]}", **common)

    def density_folder() -> Path:
        return work / f"density-{file_sha256(model)[:12]}"  # nothing is taken for the result of another model

    def simulated(rows: Sequence[Measurement], after: Path) -> list[dict[str, Any]]:
        return measure_all(model, rows, density_folder(), act=measure_density, after=after, **common)

    settled, n_rounds = _within(config, rows), len(history) - _within(config, rows)
    for left in reversed(range(REFINEMENTS + 1)):
        after, folder = simulated(config.aligned_rows(), folder), density_folder()
        history.append(after)
        say(f"at constant pressure, {model.name}\n{measurement_table(after)}")
        if settled or _within(config, after):
            break
        if not left:
            raise ConvergenceError(_failure(config, history))
        model = _corrected(model, after, shifts_wanted(), folder, config=config, quantum=quantum, say=say)
        n_rounds += 1
    aligned = {"after": after}
    aligned["before"] = history[0] if parent == source else estimated(config.aligned_rows())
    tests = {"before": estimated(config.test_rows())}
    tests["after"] = simulated(config.test_rows(), work / f"pressure-{file_sha256(parent)[:12]}")
    return _report(config, parent, model, n_rounds=n_rounds, aligned=aligned, tests=tests, quantum=quantum, say=say)


def measure_all(
    model: Path,
    rows: Sequence[Measurement],
    place: Path,
    *,
    config: AlignConfig,
    seed: int,
    act: Callable[..., dict[str, Any]] | None = None,
    after: Path | None = None,
    say: Say,
) -> list[dict[str, Any]]:
    """Simulate liquids, each in a folder of its name, from where they were ``after`` an earlier place; say results.

    ``act`` is ``measure``, the default, after which nonsense is refused, or ``measure_density``.
    """
    places = [place / box_name(k, row.name) / MEASURED for k, row in enumerate(rows)]
    begun, n_open = time.monotonic(), sum(not known.exists() for known in places)

    def compute(k: int) -> None:
        before = None if after is None else after / places[k].parent.name
        found = (act or measure)(model, rows[k], places[k].parent, config=config, seed=seed + k, after=before)
        write_json(places[k], found)
        if act is None:
            _refuse_broken(found)
        still = sum(not known.exists() for known in places)
        left = (time.monotonic() - begun) / max(n_open - still, 1) * still / 60.0
        say(
            f"{place.name}, {len(rows) - still} of {len(rows)}: {rows[k].name}, density off by "
            f"{found['density_error']:+.4f} ± {found['density_stderr']:.4f} g/cm3"
            + (f"; {left:.0f} min left of these" if left >= 0.5 else "")
        )

    share(places, compute)
    results = [json.loads(known.read_text()) for known in places]
    for row, known, result in zip(rows, places, results, strict=True):
        if result["density_measured"] != row.density_g_cm3 or result["pressure_measured"] != row.pressure / units.BAR:
            raise InputError(
                f"{known.parent}: measured when the table said otherwise of {row.name}. Remove this folder."
            )
        if act is None:
            _refuse_broken(result)
    return results


def measure(
    model: Path, row: Measurement, folder: Path, *, config: AlignConfig, seed: int, after: Path | None = None
) -> dict[str, Any]:
    """Simulate one liquid at its measured density, from where it was in another folder; return what is off."""
    evaluator = Evaluator(checkpoint.load(model), device=best_device())
    start = None if after is None else str(after)
    box = Box(row.electrolyte, row.temperature, config.atoms, seed, row.density_g_cm3, start)
    target_bar = row.pressure / units.BAR
    stages = [nvt("equilibrate", config.equilibrate * (1.0 if after is None else SETTLED))]
    frame_ps = SHARES[0] * config.time / units.PICOSECOND / config.frames
    for part in SHARES:  # the same stage, made longer
        sample = Stage("sample", part * config.time / units.PICOSECOND, frame_ps=frame_ps)
        simulate(box, [*stages, sample], evaluator, folder)
        series = ThermoSeries.read(folder / "sample" / "molecular" / "thermo.h5")
        known = series.time_ps < sample.time_ps * (1.0 + 1.0e-9)  # a run that was stopped may be longer already
        values = np.trace(series.pressure[known], axis1=-2, axis2=-1)[:, 0] / 3.0 / units.BAR
        pressure, drifts = equilibrated_mean(values)
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


def measure_density(
    model: Path, row: Measurement, folder: Path, *, config: AlignConfig, seed: int, after: Path
) -> dict[str, Any]:
    """Simulate one liquid at constant pressure, from where it was in another folder; return its density's error."""
    evaluator = Evaluator(checkpoint.load(model), device=best_device())
    box = Box(row.electrolyte, row.temperature, config.atoms, seed, row.density_g_cm3, str(after))
    settle, time = SETTLED * config.equilibrate / units.PICOSECOND, config.time / units.PICOSECOND
    pressure = row.pressure / units.BAR
    stages = [
        Stage("equilibrate", settle),
        Stage("expand", settle, pressure),
        Stage("sample", time, pressure, frame_ps=time / config.frames),
    ]
    simulate(box, stages, evaluator, folder)
    series = ThermoSeries.read(folder / "sample" / "thermo.h5").density_g_cm3[:, 0]
    density, drifts = equilibrated_mean(series)
    error, kappa = density.value - row.density_g_cm3, config.compressibility * units.BAR
    middle, *around = (strain(row.density_g_cm3, error + k * density.sigma) / kappa for k in (0.0, 1.0, -1.0))
    return {
        "name": row.name,
        "density_measured": row.density_g_cm3,
        "pressure_measured": pressure,
        "excess_bar": middle,
        "pressure_sigma_bar": (around[1] - around[0]) / 2.0,
        "density_error": error,
        "density_stderr": density.stderr,
        "how": "at constant pressure",
        "drifts": drifts,
    }


def _within(config: AlignConfig, rows: Sequence[Mapping[str, Any]]) -> bool:
    return all(abs(row["density_error"]) * units.GRAM_PER_CM3 <= config.tolerance for row in rows)


def _refuse_broken(result: Mapping[str, Any]) -> None:
    """Raise InputError where a density error is so large that the measured density or the model is broken."""
    if abs(result["density_error"]) > BROKEN * result["density_measured"]:
        raise InputError(
            f"{result['name']}: the model's density is off by {result['density_error']:+.2f} g/cm3 from the measured "
            f"{result['density_measured']:.4g} ({result['how']}). Alignment "
            "mends a few percent: either the measured density is wrong, or the model is broken for this liquid."
        )


def wanted_shift(rounds: Sequence[Mapping[str, Any]]) -> float:
    """Return the change of pressure to ask for [bar], given the same liquid in all rounds.

    After a correction of -e the excess is expected to be 0, with the variance v + (UNSURE e)^2 of what is known. A
    measurement m ± s then makes it e = v m / (v + s^2), of variance v s^2 / (v + s^2): noise is not put into the model,
    and rounds add up to one long measurement. -e / RESPONSE is asked for, as liquids partly evade a correction.
    """
    excess, variance = 0.0, math.inf
    for row in rounds:
        noise = row["pressure_sigma_bar"] ** 2
        trust = 1.0 if math.isinf(variance) else variance / (variance + noise)
        excess = trust * row["excess_bar"]
        variance = trust * noise + (UNSURE * excess) ** 2
    return -float(excess) / RESPONSE


def density_error(density: float, strain: float) -> float:
    """Return the density at which the excess pressure is gone, minus the given one; strain = kappa P_excess.

    Along the isotherm 1/kappa grows with pressure by K' = ``STIFFENING``: ln(rho / rho_0) = ln(1 + K' kappa P) / K'
    (Murnaghan); under tension, where that ends at -1/K', it is taken as linear.
    """
    if strain < 0.0:
        return -density * strain
    return density * math.expm1(-math.log1p(STIFFENING * strain) / STIFFENING)


def strain(density: float, error: float) -> float:
    """Return kappa P_excess at the density, where the liquid at rest is off by ``error``: ``density_error`` solved."""
    if error > 0.0:
        return -error / density
    return math.expm1(-STIFFENING * math.log1p(error / density)) / STIFFENING


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
            clusters=anchors(quantum, config.clusters, seed=config.seed),
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
    """Return up to ``count`` frames of the training part, at random, which hold the model to their labels."""
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
    parent: Path,
    model: Path,
    *,
    n_rounds: int,
    aligned: dict[str, list[dict[str, Any]]],
    tests: dict[str, list[dict[str, Any]]],
    quantum: Sequence[Frame],
    say: Say,
) -> dict[str, Any]:
    """Write the aligned model with its card, figure and report, and return the report."""
    force_field = checkpoint.load(model)
    errors: dict[str, dict[str, Errors]] = {
        "before": held_out_errors(checkpoint.load(parent), quantum),
        "after": held_out_errors(force_field, quantum),
    }
    report: dict[str, Any] = {
        "parent": config.parent or config.model,
        "parent_sha256": file_sha256(parent),
        "rounds": n_rounds,
        "aligned": aligned,
        "held_out": tests,
        "mean_absolute_density_error_g_cm3": {
            part: {moment: mean_absolute_error(rows) for moment, rows in found.items() if rows}
            for part, found in (("aligned", aligned), ("held_out", tests))
        },
        "sources": {row.name: row.source for row in (*config.aligned_rows(), *config.test_rows())},
        "held_out_force_rmse_eV_A": {
            moment: {group: part.forces for group, part in by_group.items() if not math.isnan(part.forces)}
            for moment, by_group in errors.items()
        },
    }
    card = checkpoint.describe(parent)["card"] | card_of_errors(errors["after"]) | {"alignment": report}
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
