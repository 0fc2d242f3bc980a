"""Density alignment of argon: pressures are measured, corrected in either direction, measured again."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import md.align
import md.liquid
from bamboo import checkpoint, units
from bamboo.errors import CheckpointedStop, ConvergenceError, InputError
from bamboo.learn.fit import held_out_errors
from bamboo.quantum.dataset import read_frames
from md import cli
from md.align import align, density_error, strain, wanted_shift
from md.align_config import load_align_config
from md.align_report import density_figure
from md.engine.simulation import Simulation
from md.trajectory import ThermoSeries

TABLE = Path(__file__).parents[2] / "data" / "experiment" / "densities.yaml"
# kappa such that the pressures of a hot gas are small errors of density
TEXT = """
molecules: {{argon: "[Ar]"}}
model: {folder}/argon.safetensors
output: {folder}/{name}.safetensors
data: [{folder}/clusters.h5]
align:
- {{electrolyte: argon, temperature: 340 K, pressure: {pressure} bar, density: 0.9 g/cm3, source: a toy}}
atoms: 24
equilibrate: 100 fs
time: 500 fs
frames: 6
rounds: {rounds}
tolerance: {tolerance} g/cm3
compressibility: 1 1/GPa
loop: {{epochs: 60, edges_per_batch: 20000, learning_rate: 1.0e-2, weight_decay: 0.0, ema_decay: 0.9}}
weights: {{molecular_virial: 10.0, forces: 1.0, energy: 0.2, molecular_forces: 0.0}}
"""


@pytest.fixture
def toy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argon_model: Callable[..., Path],
    argon_clusters: Callable[..., Path],
) -> Callable[..., Path]:
    """Return a factory of configuration files, in a folder with a model and quantum data."""
    monkeypatch.setattr(md.liquid, "guards", lambda *_: [])  # atoms of a gas that meet look like a new bond
    monkeypatch.setattr(md.liquid, "WARM_UP_STEPS", 50)
    monkeypatch.setattr("md.measurements.density_problem", lambda _: None)  # argon is in no table
    argon_clusters(tmp_path / "clusters.h5", argon_model(tmp_path / "argon.safetensors"))

    def make(**options: Any) -> Path:
        values = {"folder": tmp_path, "name": "out", "pressure": 500, "rounds": 1, "tolerance": 0.02} | options
        path = tmp_path / "align.yaml"
        path.write_text(TEXT.format(**values))
        return path

    return make


def test_alignment_shrinks_the_density_error_in_both_directions(toy: Any, tmp_path: Path) -> None:
    """Up to 3000 bar and from there down to 1500: an error of more than 0.06 g/cm3 falls by 40 % or more, each time.

    A gas cannot be aligned to less than no pressure, so the way down starts from the model that was aligned upwards.
    """
    said: list[str] = []
    up = load_align_config(toy(name="up", pressure=3000, tolerance=0.13, rounds=2))
    down = load_align_config(toy(name="down", pressure=1500, tolerance=0.06, rounds=3))
    for config, sign in ((up, 1.0), (down.model_copy(update={"model": str(up.output)}), -1.0)):
        report = align(config, say=said.append)
        before, after = (report["aligned"][moment][0]["density_error"] for moment in ("before", "after"))
        assert sign * before > 0.06 and report["rounds"] >= 1  # too dense where the pressure is too low
        assert abs(after) < 0.6 * abs(before)
        card = checkpoint.describe(config.output)["card"]
        assert card["alignment"]["aligned"]["before"][0]["density_error"] == before
        errors = held_out_errors(checkpoint.load(config.output), read_frames(tmp_path / "clusters.h5"))
        assert card["held_out"]["neutral"]["forces"] == pytest.approx(errors["neutral"].forces)
        assert card["alignment"]["sources"] == {"argon, 340 K": "a toy"} and card["levels"] == ["toy"]
        errors = report["held_out_force_rmse_eV_A"]
        assert errors["after"]["all"] < errors["before"]["all"] + 0.3  # a large shift for so weak forces
        folder = config.output.with_suffix("")
        assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
        assert (folder / "densities.png").stat().st_size > 10_000
        (axes,) = density_figure(report).axes
        shown = [float(line.get_xdata()[0]) for line in axes.containers[0][:1] + axes.containers[1][:1]]
        assert shown == [before, after]
    assert "estimated with kappa = 1 1/GPa" in "\n".join(said)


def test_a_liquid_within_the_tolerance_leaves_the_weights_bit_for_bit(toy: Any, tmp_path: Path) -> None:
    config = load_align_config(toy(tolerance=0.2))
    assert align(config, say=lambda _: None)["rounds"] == 0
    parent, child = (checkpoint.load(tmp_path / f"{name}.safetensors").state_dict() for name in ("argon", "out"))
    assert all(torch.equal(value, child[name]) for name, value in parent.items())


def test_rounds_that_do_not_converge_fail_with_the_table(toy: Any) -> None:
    """One round at constant volume, then two corrections by densities at constant pressure, each nearer the truth."""
    config = load_align_config(toy(pressure=3000, tolerance=1e-6, rounds=1))
    with pytest.raises(ConvergenceError, match=r"(?s)1 rounds did not bring .*argon, 340 K") as caught:
        align(config, say=lambda _: None)
    course = re.search(r"by round: (.*) g/cm3", str(caught.value))
    assert course is not None
    errors = [float(number) for number in course[1].split(", ")]
    assert len(errors) == 4 and errors[3] < 0.5 * errors[1] < 0.5 * errors[0]


def test_a_stopped_alignment_continues_exactly(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at four fifths of its steps, in the second simulation, by a signal: the same numbers as never stopped."""
    original, steps, stop_after = Simulation._advance, 0, -1

    def step(self: Simulation, last: int) -> None:
        nonlocal steps
        original(self, last)
        steps += self.restart_folder is not None  # not in the warm-up, which is not kept
        if steps == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Simulation, "_advance", step)
    whole = align(load_align_config(toy(name="whole", pressure=3000, tolerance=0.2)), say=lambda _: None)
    assert whole["rounds"] == 1
    path, steps, stop_after = toy(name="parts", pressure=3000, tolerance=0.2), 0, 4 * steps // 5
    with pytest.raises(CheckpointedStop):
        align(load_align_config(path), say=lambda _: None)
    monkeypatch.setattr(Simulation, "_advance", original)
    parts = align(load_align_config(path), say=lambda _: None)
    for moment in ("before", "after"):
        assert parts["aligned"][moment] == whole["aligned"][moment]
    simulated: list[str] = []
    monkeypatch.setattr(md.align, "simulate", lambda *_: simulated.append("again"))
    align(load_align_config(path), say=lambda _: None)
    assert not simulated  # all was done before
    with pytest.raises(InputError, match=r"begun with other settings \(atoms\)"):
        align(load_align_config(path).model_copy(update={"atoms": 30}), say=lambda _: None)


def test_a_liquid_whose_density_was_corrected_since_is_not_taken_as_measured(toy: Any, tmp_path: Path) -> None:
    config = load_align_config(toy(name="a", pressure=3000, tolerance=0.5))
    model, (row,), common = tmp_path / "argon.safetensors", config.aligned_rows(), {"config": config, "seed": 1}
    found = md.align.measure_all(model, [row], tmp_path / "place", say=lambda _: None, **common)
    assert md.align.measure_all(model, [row], tmp_path / "place", say=lambda _: None, **common) == found
    for change in ({"density": 1.01 * row.density}, {"pressure": 2.0 * row.pressure}):
        with pytest.raises(InputError, match=r"the table said otherwise of argon, 340 K"):
            md.align.measure_all(model, [row.model_copy(update=change)], tmp_path / "place", say=print, **common)


def test_what_lies_beyond_the_part_that_is_looked_at_does_not_count(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is longer already, because it was stopped later, gives the number of one that is not."""
    config = load_align_config(toy(name="long", pressure=500, tolerance=0.5))
    config = config.model_copy(update={"time": 4.0 * config.time})
    model, (row,) = tmp_path / "argon.safetensors", config.aligned_rows()
    whole = md.align.measure(model, row, tmp_path / "long", config=config, seed=1)
    monkeypatch.setattr(md.align, "SURE", 1.0e9)  # the first look suffices
    early = [md.align.measure(model, row, tmp_path / name, config=config, seed=1) for name in ("fresh", "long")]
    assert early[0] == early[1] != whole


def test_a_pressure_that_is_plainly_wrong_is_not_measured_to_the_end(toy: Any, tmp_path: Path) -> None:
    """2500 bar away a quarter of the run suffices; next to the wanted pressure it takes the whole."""
    lengths = {}
    for name, pressure in (("far", 3000), ("near", 500)):
        config = load_align_config(toy(name=name, pressure=pressure, tolerance=0.5))
        config, folder = config.model_copy(update={"time": 4.0 * units.PICOSECOND}), tmp_path / name
        measured = md.align.measure(
            tmp_path / "argon.safetensors", *config.aligned_rows(), folder, config=config, seed=1
        )
        sure = measured["pressure_stderr_bar"] < 0.1 * abs(measured["excess_bar"]) and not measured["drifts"]
        lengths[name] = ThermoSeries.read(folder / "sample/thermo.h5").time_ps[-1], sure
    assert lengths == {"far": (pytest.approx(1.0, abs=0.01), True), "near": (pytest.approx(4.0, abs=0.01), False)}


def test_tests_are_those_of_the_model_that_came_out(toy: Any) -> None:
    """A finished alignment that goes on to a smaller tolerance tests its new model, not the old one again."""
    path = toy(pressure=3000, tolerance=0.24)
    row = "{electrolyte: argon, temperature: 300 K, pressure: 3000 bar, density: 0.9 g/cm3, source: a toy, use: test}"
    path.write_text(path.read_text() + f"test: [{row}]\n")
    first = align(load_align_config(path), say=lambda _: None)
    assert first["rounds"] == 0
    path.write_text(path.read_text().replace("tolerance: 0.24", "tolerance: 0.2"))
    second = align(load_align_config(path), say=lambda _: None)
    assert second["rounds"] == 1 and second["held_out"]["before"] == first["held_out"]["before"]
    assert abs(second["held_out"]["after"][0]["density_error"]) < abs(first["held_out"]["after"][0]["density_error"])


def test_the_density_of_the_aligned_model_is_simulated_at_constant_pressure(toy: Any, tmp_path: Path) -> None:
    """At the pressure that a liquid has at a density it keeps the density; under 2000 bar more it shrinks."""
    (row,) = (config := load_align_config(toy(pressure=500))).aligned_rows()
    config = config.model_copy(update={"time": 5.0 * units.PICOSECOND})
    model, common = tmp_path / "argon.safetensors", {"config": config, "seed": 3}
    there = md.align.measure(model, row, tmp_path / "first", **common)["pressure_bar"] * units.BAR
    same, denser = (
        md.align.measure_density(
            model, row.model_copy(update={"pressure": pressure}), tmp_path / name, after=tmp_path / "first", **common
        )
        for name, pressure in (("same", there), ("denser", there + 2000.0 * units.BAR))
    )
    assert abs(same["density_error"]) < min(4.0 * same["density_stderr"], 0.2)
    assert denser["density_error"] > 0.4  # more than twice what the other may be off by
    assert same["how"] == "at constant pressure" and denser["density_measured"] == row.density_g_cm3


def test_before_is_what_the_parent_says(toy: Any, tmp_path: Path) -> None:
    """A second alignment begins with the result of a first, and its report compares with the parent of both."""
    first = align(load_align_config(toy(name="first", pressure=3000, tolerance=0.2)), say=lambda _: None)
    models = {"model": str(tmp_path / "first.safetensors"), "parent": str(tmp_path / "argon.safetensors")}
    again = load_align_config(toy(name="again", pressure=3000, tolerance=0.5)).model_copy(update=models)
    second = align(again, say=lambda _: None)
    assert second["rounds"] == 0 and second["parent_sha256"] == first["parent_sha256"]
    errors = [
        [report["aligned"][moment][0]["density_error"] for moment in ("before", "after")] for report in (first, second)
    ]
    assert errors[1] == pytest.approx(errors[0], abs=0.25 * abs(errors[0][0] - errors[0][1]))
    changes = [report["held_out_force_rmse_eV_A"]["before"] for report in (first, second)]
    assert changes[0] == changes[1] != second["held_out_force_rmse_eV_A"]["after"]


def test_every_liquid_gives_the_same_number_of_frames() -> None:
    systems = list(range(80))
    assert md.align._spread_out(systems, 5) == [0, 20, 40, 59, 79]
    assert md.align._spread_out(systems[:3], 5) == [0, 1, 2]


def test_noise_of_measurements_is_not_asked_for() -> None:
    """The best linear estimate of what three rounds tell, by regression of what is true on what is measured."""
    generator, noise = np.random.default_rng(2), (120.0, 250.0, 150.0)
    rounds: list[dict[str, np.ndarray]] = []
    true, asked = generator.normal(scale=1.0e6, size=20_000), np.zeros(20_000)
    for sigma in noise:
        true = true + asked * (1.0 + 0.5 * generator.normal(size=true.size))  # a correction is 50 % off
        rounds.append({"excess_bar": true + generator.normal(scale=sigma, size=true.size), "pressure_sigma_bar": sigma})
        if len(rounds) == 1:  # a first excess of 1000 bar for all
            true, rounds[0]["excess_bar"] = true - rounds[0]["excess_bar"] + 1000.0, np.full(true.size, 1000.0)
        each = [
            [{name: v if np.isscalar(v) else v[k] for name, v in row.items()} for row in rounds]
            for k in range(true.size)
        ]
        asked = 0.7 * np.array([wanted_shift(one) for one in each])  # of which the liquid evades the rest
    measured = rounds[-1]["excess_bar"]
    slope = (measured @ true) / (measured @ measured)
    assert np.std(-asked - slope * measured) < 0.12 * np.std(asked)
    assert -(asked @ measured) / (measured @ measured) == pytest.approx(slope, rel=0.03)
    assert np.std(true + asked) < 0.92 * noise[-1]
    assert wanted_shift([{"excess_bar": 500.0, "pressure_sigma_bar": 250.0}]) == -500.0 / 0.7  # nothing else is known


def test_density_error_follows_a_liquid_that_stiffens() -> None:
    """Integrated step by step: d ln rho = kappa dP, 1/kappa growing by ten times the pressure; DMC's own numbers."""
    kappa, density, pressure = 1.0e-4, 1.0633, 5000.0  # 1/bar, bar
    steps = np.linspace(0.0, pressure, 20001)
    loss = np.trapezoid(kappa / (1.0 + 10.0 * kappa * steps), steps)
    assert density_error(density, kappa * pressure) == pytest.approx(density * (np.exp(-loss) - 1.0), rel=1e-6)
    assert density_error(density, 1e-6) == pytest.approx(-1e-6 * density, rel=1e-4)
    assert density_error(density, -0.02) == pytest.approx(0.02 * density)
    for excess in (-0.03, -1e-3, 1e-3, 0.05, 0.5):
        assert strain(density, density_error(density, excess)) == pytest.approx(excess)


def test_a_pressure_beyond_sense_is_an_error_of_input(toy: Any) -> None:
    config = load_align_config(toy(pressure=60000))
    with pytest.raises(InputError, match="either the measured density is wrong, or the model is broken"):
        align(config, say=lambda _: None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("electrolyte: argon", "electrolyte: argone", "unknown|Unknown solvent 'argone'"),
        ("temperature: 340 K", "temperature: -3 K", "out of range"),
        ("align:\n", "table: nowhere.yaml\nalign:\n", "give either `align`"),
        ("frames: 6", "frame: 6", "Did you mean 'frames'"),
        ("source: a toy}", "source: a toy, use: test}", "its `use` is not align"),
    ],
)
def test_bad_configurations_are_refused(toy: Any, old: str, new: str, message: str) -> None:
    path = toy()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=rf"align.yaml:\d+: .*({message})"):
        load_align_config(path)


def test_species_choose_the_rows_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "align.yaml"
    start = f"model: default\noutput: a.safetensors\ndata: [d.h5]\ntable: {TABLE}\n"
    path.write_text(start + "species: [EC, EMC, DMC]\n")
    config = load_align_config(path)
    assert {row.electrolyte for row in config.aligned_rows()} == {"EC", "EMC", "DMC"}
    tested = {row.electrolyte for row in config.test_rows()}
    assert tested == {"DMC", "EC:EMC 0.299:0.701 mol", "EC:EMC 0.693:0.307 mol"}
    path.write_text(start + "species: [EC, ECM, DMC]\n")
    with pytest.raises(InputError, match=r"align.yaml:5: species.1: no row of the table has ECM. Did you mean"):
        load_align_config(path)
    path.write_text(start.replace(f"table: {TABLE}", "align:\n- {electrolyte: DMC, temperature: 298 K, density: "
                                  "1.063 g/cm3, source: here}") + "species: [DMC]\n")  # fmt: skip
    with pytest.raises(InputError, match=r"species: chooses rows of a `table`, and there is none"):
        load_align_config(path)


def test_densities_far_from_the_liquid_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "align.yaml"
    path.write_text(
        "model: default\noutput: a.safetensors\ndata: [d.h5]\nalign:\n"
        "- {electrolyte: DMC, temperature: 298 K, density: 1.6 g/cm3, source: typo}\n"
    )
    with pytest.raises(InputError, match=r"align.yaml:5: align.0.density: 1.6 g/cm3 is \+50% off"):
        load_align_config(path)


@pytest.mark.parametrize("command", ["align", "distill"])
def test_commands_report_bad_input_with_code_2(tmp_path: Path, command: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("outputs: here\n")
    result = CliRunner().invoke(cli.app, [command, str(path)])
    assert result.exit_code == 2 and "unknown key 'outputs'. Did you mean 'output'?" in result.stderr
