"""Collections of runs with known answers: means over seeds, scatter, concentrations, activation energies."""

import csv
import json
from collections.abc import Mapping
from math import exp, sqrt
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bamboo import units
from bamboo.errors import InputError
from bamboo.structure.densities import formula_mass
from md import cli, protocol
from md.analysis.arrhenius import arrhenius_fit
from md.analysis.estimate import Estimate, no_value
from md.collect import Collection, collect, table, together
from md.collect_figures import arrhenius_figure, concentration_figure, write_figures
from md.config import RunConfig
from md.results import write_properties
from md.run_folder import RunFolder
from md.sweep import load_sweep, members_of

GAS_CONSTANT = 8.314462618e-3  # kJ/mol/K, CODATA
TEN_CATIONS = "composition: {counts: {DMC: 100, Li: 10, PF6: 10}}"


def value(number: float, stderr: float, *, n: float = 100.0, unit: str = "mPa s") -> Estimate:
    return Estimate(number, stderr, unit, n, "Green-Kubo")


def finished(folder: Path, properties: Mapping[str, Estimate], **settings: object) -> Path:
    """Write what a finished run leaves."""
    config = RunConfig.model_validate({"electrolyte": "DMC", "temperature": "300 K"} | settings)
    run = RunFolder(folder)
    run.write_config(protocol.resolve(config))
    write_properties(run, dict(properties))
    return folder


def seed(number: int) -> dict[str, int]:
    return {"atoms": 100, "seed": number}


def test_seeds_are_averaged_by_their_independent_samples(tmp_path: Path) -> None:
    """Mean (100 * 2 + 300 * 3) / 400 = 2.75; error sqrt(0.25^2 0.4^2 + 0.75^2 0.3^2); scatter: chi2 = 5.6."""
    finished(tmp_path / "a", {"viscosity": value(2.0, 0.4, n=100.0)}, build=seed(1))
    finished(tmp_path / "b", {"viscosity": value(3.0, 0.3, n=300.0)}, build=seed(2))
    (group,) = collect(tmp_path).groups
    estimate = group.properties["viscosity"]
    chi2 = (0.75 / 0.4) ** 2 + (0.25 / 0.3) ** 2
    assert estimate.value == pytest.approx(2.75)
    assert estimate.stderr == pytest.approx(sqrt((0.25 * 0.4) ** 2 + (0.75 * 0.3) ** 2) * sqrt(chi2))
    assert estimate.n_effective == pytest.approx(400.0)


def test_scatter_between_seeds_covers_the_truth() -> None:
    """Errors claimed three times too small: the mean of five seeds still covers the truth about as often as it says."""
    generator, inside = np.random.default_rng(3), 0
    for _ in range(400):
        estimate = together([value(x, 0.1) for x in generator.normal(5.0, 0.3, size=5)])
        low, high = estimate.interval() or (0.0, 0.0)
        inside += low < 5.0 < high
    assert 0.82 < inside / 400 < 0.97  # of a normal interval with scatter from 5 values 0.88, claimed errors alone 0.49


def test_a_seed_without_value_is_counted_not_dropped(tmp_path: Path) -> None:
    none = no_value("not converged: 3 samples", unit="", method="")
    finished(tmp_path / "a", {"viscosity": none, "density": none}, build=seed(1))
    finished(tmp_path / "b", {"viscosity": value(3.0, 0.3), "density": none}, build=seed(2))
    finished(tmp_path / "c", {"viscosity": value(3.2, 0.3), "density": none}, build=seed(3))
    collection = collect(tmp_path)
    rows = {row["property"]: row for row in collection.rows()}
    assert rows["viscosity"]["value"] == pytest.approx(3.1)
    assert (rows["viscosity"]["runs"], rows["viscosity"]["runs_with_value"]) == (3, 2)
    assert rows["viscosity"]["warnings"].startswith("1 of 3 runs gave no value; not converged: 3 samples")
    assert rows["viscosity"]["unit"] == "mPa s" and rows["viscosity"]["method"].startswith("Green-Kubo")
    assert rows["density"]["value"] is None and rows["density"]["runs_with_value"] == 0
    text = table(collection)
    assert "3.1 ± 0.2 mPa s (2 of 3 runs)" in text
    assert "no value (0 of 3 runs)\n      3 of 3 runs gave no value; not converged: 3 samples" in text


def test_what_differs_in_more_than_the_seed_stays_apart(tmp_path: Path) -> None:
    one = {"viscosity": value(1.0, 0.1)}
    finished(tmp_path / "base", one, build=seed(1))
    finished(tmp_path / "other-size", one, build={"atoms": 240, "seed": 2})
    finished(tmp_path / "other-temperature", one, build=seed(2), temperature="310 K")
    finished(tmp_path / "other-pressure", one, build=seed(2), pressure="100 bar")
    finished(tmp_path / "other-model", one, build=seed(2), model="gfn2")
    finished(tmp_path / "other-liquid", one, build=seed(2), electrolyte="EC")
    finished(tmp_path / "in" / "depth", one, build=seed(2), guards={"broken_bonds": "ignore"})
    finished(tmp_path / "same", one, build=seed(1))
    collection = collect(tmp_path)
    names = sorted(sorted(result.name for result in group.results) for group in collection.groups)
    assert ["base", "in/depth"] in names and len(names) == 6
    assert collection.missing == {"same": "has the seed of base, which is no independent run"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": {"name": "gfn2", "dtype": "float64"}}, "model.dtype: float64"),
        ({"stages": [{"kind": "nvt", "time": "9 ps", "timestep": "2 fs"}]}, "stages.0.timestep: 0.002 ps"),
        ({"stages": [{"kind": "nvt", "time": "9 ps", "temperature": "350 K"}]}, "stages.0.temperature.0: 350 K"),
        ({"stages": [{"kind": "nvt", "time": "9 ps", "temperature": "300 K"}]}, ""),  # that of the run
        ({"output": {"thermo_every": "1 ps"}, "checkpoint": {"every": "5 s"}}, ""),
    ],
)
def test_other_physics_are_rows_of_their_own_that_tell_it(
    tmp_path: Path, settings: dict[str, object], told: str
) -> None:
    one = {"viscosity": value(1.0, 0.1)}
    base: dict[str, object] = {"model": "gfn2", "stages": [{"kind": "nvt", "time": "9 ps"}]}
    for number in (1, 2):
        finished(tmp_path / f"base{number}", one, **base | {"build": seed(number)})
        finished(tmp_path / f"other{number}", one, **base | settings | {"build": seed(number + 2)})
    groups = collect(tmp_path).groups
    assert [len(group.results) for group in groups] == ([2, 2] if told else [4])
    assert told in groups[-1].differs_in and bool(told) == bool(groups[0].differs_in)
    text = table(collect(tmp_path))
    assert told in text and text.count("differs from others in") == (2 if told else 0)


def test_a_model_trained_anew_is_another_model(tmp_path: Path) -> None:
    """The manifest of a run keeps the checksum of its model; the same file by another name is the same."""
    names = {"a": "own.safetensors", "b": "own.safetensors", "c": "copy.safetensors"}
    for number, ((name, model), checksum) in enumerate(zip(names.items(), ("11", "22", "11"), strict=True)):
        finished(tmp_path / name, {"viscosity": value(1.0, 0.1)}, build=seed(number), model=model)
        RunFolder(tmp_path / name).update_manifest(model={"name": model, "sha256": checksum})
    groups = collect(tmp_path).groups
    assert [[result.name for result in group.results] for group in groups] == [["a", "c"], ["b"]]
    assert [group.differs_in for group in groups] == [f"model.sha256: {n} (own.safetensors)" for n in ("11", "22")]


def test_activation_energies_and_lines_do_not_mix_physics(tmp_path: Path) -> None:
    """Two timesteps, each with lines of two concentrations and three temperatures, and ramps that start there."""
    for molality in (0.5, 1.0):
        for temperature in (280, 300, 320):
            for timestep in (1, 2):
                ramp = {"kind": "nvt", "time": "9 ps", "temperature": ["50 K", f"{temperature} K"]}
                finished(
                    tmp_path / f"{molality}-{temperature}-{timestep}",
                    {"viscosity": value(exp(timestep * 1000.0 / temperature), 0.1)},
                    electrolyte=f"{molality} m LiPF6 in DMC",
                    temperature=f"{temperature} K",
                    build={"atoms": 600, "seed": 1},
                    stages=[ramp, {"kind": "nvt", "time": "9 ps", "timestep": f"{timestep} fs"}],
                )
    collection = collect(tmp_path)
    energies = {
        row["differs_in"]: row["value"] for row in collection.rows() if row["property"] == "viscosity_activation_energy"
    }
    assert energies == {
        f"stages.1.timestep: 0.00{timestep} ps": pytest.approx(timestep * 1000.0 * GAS_CONSTANT, rel=1e-4)
        for timestep in (1, 2)
    }
    figure = concentration_figure(collection, "viscosity")
    assert figure is not None
    labels = [str(container.get_label()) for container in figure.axes[0].containers]
    assert sorted(labels)[0].endswith("280 K\nstages.1.timestep: 0.001 ps") and len(set(labels)) == 6


def test_conditions_of_one_run_are_taken_apart(tmp_path: Path) -> None:
    """A batch of temperatures in one run, and the same liquid as a run of its own."""
    both = {f"{name}K/viscosity": value(number, 0.1) for name, number in (("280", 4.0), ("300", 3.0))}
    finished(tmp_path / "batch", both, temperature=["280 K", "300 K"], build=seed(1))
    finished(tmp_path / "single", {"viscosity": value(3.1, 0.1)}, build=seed(2))
    groups = {group.temperature_K: group for group in collect(tmp_path).groups}
    assert groups[280.0].properties["viscosity"].value == pytest.approx(4.0)
    assert groups[300.0].properties["viscosity"].value == pytest.approx(3.05)
    assert [result.name for result in groups[300.0].results] == ["batch/300K", "single"]


def test_concentrations_are_those_of_the_box(tmp_path: Path) -> None:
    """10 LiPF6 and 100 DMC: molality, mole fraction and, with the density, molarity, by hand."""
    settings = {"electrolyte": None, "composition": {"counts": {"DMC": 100, "Li": 10, "PF6": 10}}}
    density = {"density": value(1.2, 0.01, unit="g/cm3")}
    finished(tmp_path, density, **settings)
    concentration = collect(tmp_path).groups[0].concentration
    solvent, salt = 90.078, 151.905  # g/mol
    assert concentration["molality_mol_kg"] == pytest.approx(10.0 / (100.0 * solvent / 1000.0), rel=1e-4)
    assert concentration["mole_fraction"] == pytest.approx(10.0 / 110.0)
    litres = (100.0 * solvent + 10.0 * salt) / 1.2 / 1000.0
    assert concentration["molarity_mol_L"] == pytest.approx(10.0 / litres, rel=1e-4)
    assert formula_mass("LiPF6") == pytest.approx(salt, rel=1e-4)
    finished(tmp_path, {"density": no_value("short", unit="", method="")}, **settings)
    assert collect(tmp_path).groups[0].concentration["molarity_mol_L"] is None


def test_the_activation_energy_is_recovered_within_its_error_bar() -> None:
    """x = A exp(+-E/RT) with 4 % noise; 300 times: the mean is E, the scatter is the error bar, 95 % are covered."""
    generator, energy = np.random.default_rng(5), 14.0
    temperatures = (270.0, 290.0, 310.0, 330.0)
    for rises, sign in ((True, -1.0), (False, 1.0)):
        found, errors = [], []
        for _ in range(300):
            estimates = {}
            for temperature in temperatures:
                x = 3.0e-6 * exp(sign * energy / (GAS_CONSTANT * temperature))
                estimates[temperature] = value(x * (1.0 + 0.04 * generator.normal()), 0.04 * x)
            fit = arrhenius_fit(estimates, rises=rises).energy
            assert fit.value is not None and fit.stderr is not None and fit.unit == "kJ/mol"
            found.append(fit.value)
            errors.append(fit.stderr)
        assert np.mean(found) == pytest.approx(energy, abs=4.0 * np.std(found) / sqrt(300.0))
        covered = np.mean(np.abs(np.array(found) - energy) < 1.96 * np.array(errors))
        assert 0.92 < covered < 1.0
        assert min(errors) == pytest.approx(np.std(found), rel=0.2)  # where chi2 does not widen it


def test_the_fit_weighs_its_points_and_admits_a_curve() -> None:
    line = {t: value(exp(-1000.0 / t), 0.01 * exp(-1000.0 / t)) for t in (250.0, 300.0, 350.0)}
    exact = arrhenius_fit(line, rises=True)
    assert exact.energy.value == pytest.approx(1000.0 * GAS_CONSTANT, rel=1e-5)
    assert (exact.intercept, exact.slope) == (pytest.approx(0.0, abs=1e-9), pytest.approx(-1.0))
    assert exact.energy.warnings == ()
    rough = {**line, 400.0: value(9.0, 900.0)}
    assert arrhenius_fit(rough, rises=True).energy.value == pytest.approx(1000.0 * GAS_CONSTANT, rel=1e-3)
    curved = {t: value(exp(-300.0 / (t - 150.0)), 0.001 * exp(-300.0 / (t - 150.0))) for t in (250.0, 300.0, 350.0)}
    bent = arrhenius_fit(curved, rises=True).energy
    assert "miss a straight line" in bent.warnings[0]
    assert bent.stderr is not None and bent.stderr > 10.0 * 0.001 * 1000.0 * GAS_CONSTANT
    few = {**{t: line[t] for t in (250.0, 300.0)}, 350.0: no_value("short", unit="", method="")}
    assert arrhenius_fit(few, rises=True).energy.value is None
    assert "2 temperatures with a value" in arrhenius_fit(few, rises=True).energy.warnings[0]


def series(folder: Path) -> Path:
    """Three concentrations at three temperatures, two seeds each; conductivity, viscosity, one without a value."""
    for molality in (0.5, 1.0, 1.5):
        for temperature in (280, 300, 320):
            for number in (1, 2):
                fast = exp(-12.0 / (GAS_CONSTANT * temperature))
                finished(
                    folder / f"{molality}m-{temperature}K-{number}",
                    {
                        "conductivity": value(900.0 * molality * fast, 9.0 * molality * fast, unit="mS/cm"),
                        "viscosity": value((1 + molality) / fast, 0.02 / fast),
                        "diffusion_Li": no_value("not converged", unit="cm2/s", method=""),
                    },
                    electrolyte=f"{molality} m LiPF6 in EC:DMC 30:70 wt",
                    temperature=f"{temperature} K",
                    build={"atoms": 600, "seed": number},
                )
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return collect(series(tmp_path_factory.mktemp("series")))


def test_a_series_gives_its_activation_energies(collection: Collection) -> None:
    rows = [row for row in collection.rows() if row["property"].endswith("_activation_energy")]
    assert len(rows) == 9 and all(row["temperature_K"] is None and row["runs"] == 6 for row in rows)
    for row in rows:
        if row["property"].startswith("diffusion"):
            assert row["value"] is None and "0 temperatures with a value" in row["warnings"]
        else:
            assert row["value"] == pytest.approx(12.0, rel=1e-4) and row["unit"] == "kJ/mol"


def test_figures_show_what_the_table_says(collection: Collection, tmp_path: Path) -> None:
    names = {path.name for path in write_figures(collection, tmp_path)}
    assert names == {f"{name}-{kind}.png" for name in ("conductivity", "viscosity") for kind in KINDS}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    figure = concentration_figure(collection, "conductivity")
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xlabel() == "molality / (mol/kg)" and axes.get_ylabel() == "conductivity / (mS/cm)"
    lines = {container.get_label(): container.lines[0].get_xydata() for container in axes.containers}
    assert set(lines) == {"280 K", "300 K", "320 K"}
    for label, points in lines.items():
        fast = exp(-12.0 / (GAS_CONSTANT * float(str(label).split()[0])))
        np.testing.assert_allclose(points[:, 1], 900.0 * np.array([0.5, 1.0, 1.5]) * fast)
        np.testing.assert_allclose(points[:, 0], [0.5, 1.0, 1.5], rtol=0.12)  # as realised
        assert (np.diff(points[:, 0]) > 0.0).all()
    fits = [(groups, fit) for name, groups, fit in collection.arrhenius() if name == "viscosity"]
    (axes,) = arrhenius_figure("viscosity", fits).axes
    assert axes.get_yscale() == "log" and len(axes.containers) == 3
    line = next(line for line in axes.lines if len(line.get_xydata()) == 2)
    slope = np.diff(np.log(line.get_ydata())) / np.diff(line.get_xdata())
    assert slope == pytest.approx(12.0 / GAS_CONSTANT / 1000.0, rel=1e-4)


def test_other_salts_and_solvents_are_other_lines(tmp_path: Path) -> None:
    """From 0.5 to 10 mol/kg, in this order; LiPF6 and NaPF6 in DMC, LiPF6 in two mixtures."""
    for salt, solvent in (("LiPF6", "DMC"), ("NaPF6", "DMC"), ("LiPF6", "EC:DMC 1:1 wt"), ("LiPF6", "EC:DMC 3:7 wt")):
        for molality in ("10", "0.5", "2"):
            text = f"{molality} m {salt} in {solvent}"
            settings = {"electrolyte": text, "build": {"atoms": 600, "seed": 1}}
            finished(tmp_path / text.replace(" ", "-"), {"conductivity": value(5.0, 0.1)}, **settings)
    collection = collect(tmp_path)
    figure = concentration_figure(collection, "conductivity")
    assert figure is not None
    assert {str(container.get_label()) for container in figure.axes[0].containers} == {
        "DMC Li PF6, 1 DMC wt 300 K",
        "DMC EC Li PF6, 0.5 EC, 0.5 DMC wt 300 K",
        "DMC EC Li PF6, 0.3 EC, 0.7 DMC wt 300 K",
        "DMC Na PF6, 1 DMC wt 300 K",
    }
    assert [len(container.lines[0].get_xydata()) for container in figure.axes[0].containers] == [3, 3, 3, 3]
    molality = [group.concentration["molality_mol_kg"] for group in collection.groups]
    assert molality == sorted(molality)
    single = next(groups for groups in collection.systems().values())
    assert len(single) == 1 and not collection.arrhenius()


def test_mixtures_without_salt_are_drawn_against_the_mole_fraction(tmp_path: Path) -> None:
    for ratio in ("1:3", "1:1", "3:1"):
        settings = {"electrolyte": f"EC:DMC {ratio} mol", "build": {"atoms": 440, "seed": 1}}
        finished(tmp_path / ratio.replace(":", "-"), {"viscosity": value(1.0, 0.1)}, **settings)
    figure = concentration_figure(collect(tmp_path), "viscosity")
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "mole fraction of EC"
    np.testing.assert_allclose(figure.axes[0].containers[0].lines[0].get_xydata()[:, 0], [0.25, 0.5, 0.75], atol=0.01)


KINDS = ("concentration", "arrhenius")
SWEEP = "run: {electrolyte: DMC, build: {atoms: 100}}\ntemperatures: [280 K, 300 K, 320 K, 340 K, 360 K]\n"


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["collect", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_members_without_results_are_listed_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SWEEP)
    members = members_of(load_sweep(Path("s.yaml")), Path("runs/s"))
    good = {"viscosity": value(2.0, 0.1)}
    outcomes = [
        (0, "", members[0].settings),
        (4, "the box boils", members[1].settings),
        (0, "", "other settings"),
        None,
    ]
    for member, outcome in zip(members, outcomes, strict=False):
        finished(member.folder, good, build=seed(1), temperature=f"{member.config.temperature_K} K")
        if outcome is not None:
            record = dict(zip(("code", "reason", "settings"), outcome, strict=True))
            (member.folder / "outcome.json").write_text(json.dumps(record))
    (members[3].folder / "properties.json").write_text('{"viscosity": 3}')
    code, out, err = invoke("s.yaml")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("without results")]
    assert lines == [
        "without results: DMC-300K-seed1: the box boils",
        "without results: DMC-320K-seed1: its settings have changed since it ran",
        "without results: DMC-340K-seed1: properties.json cannot be read (TypeError). Analyse the run again.",
        "without results: DMC-360K-seed1: not begun",
    ]
    assert "280 K" in out and "2.00 ± 0.10 mPa s (1 of 1 runs)" in out
    code, out, _ = invoke("runs", "--json")
    content = json.loads(out)
    assert [row["temperature_K"] for row in content["table"] if row["property"] == "viscosity"] == [280.0, 320.0]
    with open(content["files"][0], newline="") as file:
        (first, *_) = csv.DictReader(file)
    assert (first["property"], float(first["value"]), float(first["stderr"])) == ("viscosity", 2.0, 0.1)


def test_a_member_that_failed_and_was_finished_alone_counts(tmp_path: Path) -> None:
    """`bamboo-md run member.yaml` leaves the outcome.json of the sweep as it is; a half-done run may be analysed."""
    (tmp_path / "s.yaml").write_text("run: {electrolyte: DMC, stages: [{kind: nvt, time: 9 fs}]}\nseeds: [1, 2]\n")
    members = members_of(load_sweep(tmp_path / "s.yaml"), tmp_path / "runs")
    for member, step in zip(members, (9, 8), strict=True):
        RunFolder(member.folder).write_config(member.config)
        write_properties(RunFolder(member.folder), {"viscosity": value(2.0, 0.1)})
        (member.folder / "stages/01-nvt").mkdir(parents=True)
        (member.folder / "stages/01-nvt/thermo.csv").write_text(f"step\n{step}\n")
        outcome = {"code": 137, "reason": "ended by SIGKILL", "settings": member.settings}
        (member.folder / "outcome.json").write_text(json.dumps(outcome))
    for source in (tmp_path / "runs", tmp_path / "s.yaml"):
        collection = collect(source, folder=tmp_path / "runs")
        assert [result.name for group in collection.groups for result in group.results] == [members[0].name]
        assert collection.missing == {members[1].name: "ended by SIGKILL"}
    (tmp_path / "s.yaml").write_text((tmp_path / "s.yaml").read_text().replace("9 fs", "7 fs"))
    with pytest.raises(InputError, match="its settings have changed since it ran"):
        collect(tmp_path / "s.yaml", folder=tmp_path / "runs")


def test_nothing_to_collect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run in it"):
        collect(tmp_path)
    finished(tmp_path / "a", {})
    with pytest.raises(InputError, match="asked for no properties"):
        collect(tmp_path)
    finished(tmp_path / "a", {"viscosity": value(1.0, 0.1)}, electrolyte=None, structure="gone.cif")
    with pytest.raises(InputError, match=r"no run is finished.\n  a: .*gone\.cif"):
        collect(tmp_path)
    (finished(tmp_path / "a", {}) / "properties.json").unlink()
    with pytest.raises(InputError, match=r"no run is finished\.\n  a: not finished"):
        collect(tmp_path)


def test_kilojoules_are_those_of_the_gas_constant() -> None:
    assert pytest.approx(GAS_CONSTANT, rel=1e-6) == units.BOLTZMANN / units.KJ_PER_MOL
