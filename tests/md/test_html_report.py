"""The report of a run: every number with its error bar, what was discarded, what was measured, and nothing invented.

The run is made up: series with a known start of equilibrium and random walks, written by the writers of real runs.
"""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bamboo.errors import InputError
from bamboo.structure.molecules import molecule
from bamboo.system import System
from md.analysis.estimate import Estimate, format_with_error, no_value
from md.comparison import comparisons, matches, unmeasured
from md.config import RunConfig, load_config
from md.convergence import Window, density_window, production_window, running_estimates
from md.figures import box_figure, frame_figures, series_figure
from md.html_report import Section, summary, verdict, write_report
from md.measurements import Measurement
from md.property_names import answers, property_of, readable
from md.recording import build_topology
from md.run_folder import RunFolder
from md.trajectory import THERMO, Ensemble, ThermoWriter, TrajectoryWriter
from md.workflows import analyse_folder, write_results

N_MOLECULES, SIDE_A = 5, 9.0
CONFIG = """\
composition: {counts: {DMC: 5}}
temperature: 298.15 K
properties: [density, viscosity, diffusion]
stages:
  - {kind: npt, time: 100 ps}
  - {kind: nvt, time: 100 ps, volume: mean}
"""
SEVERAL = CONFIG.replace("298.15 K", "[298.15 K, 320 K]")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Text, tags and addresses of a page; complains about tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.loose_tables = 0
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.loose_tables += tag == "table" and self.open[-1] != "div"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def fill(folder: Path, *, seed: int = 1, n_npt: int = 1001, nvt: bool = True) -> None:
    """Write the files of both stages: densities 1.05 g/cm3 after a decay over 2 ps, molecules that walk at random."""
    generator = np.random.default_rng(seed)
    atoms = molecule("DMC")
    numbers = np.tile(atoms.numbers, N_MOLECULES)
    member = np.repeat(np.arange(N_MOLECULES), len(atoms.numbers))
    start = np.concatenate([atoms.positions + 3.0 * k for k in range(N_MOLECULES)])
    cell = SIDE_A * np.eye(3)
    topology = build_topology(System(numbers, start, cell, pbc=True, molecule=member), {"DMC": N_MOLECULES})
    for name, ensemble, n_samples in (
        ("01-npt", Ensemble("npt", "svr", "c-rescale", 1.0, 1.0), n_npt),
        ("02-nvt", Ensemble("nvt", "svr", "none", 1.0), 1001 if nvt else 0),
    ):
        if n_samples == 0:
            continue
        stage = folder / "stages" / name
        stage.mkdir(parents=True)
        time_ps = 0.1 * np.arange(n_samples)
        density = 1.05 + 0.004 * generator.normal(size=n_samples) + 0.2 * np.exp(-time_ps / 2.0)
        thermo = ThermoWriter(stage / "thermo.h5", n_replicas=1, ensemble=ensemble, buffer=2000)
        noise = generator.normal(size=n_samples)
        for step, (time, rho) in enumerate(zip(time_ps, density, strict=True)):
            values = {key: np.zeros((1, *column.shape)) for key, column in THERMO.items()}
            constants = {"temperature_K": 300.0 + noise[step], "density_g_cm3": rho, "potential_energy": noise[step]}
            values |= {key: np.array([value]) for key, value in constants.items()}
            thermo.append(step, time, values=values | {"volume": np.array([SIDE_A**3 * 1.05 / rho])})
        thermo.close()
        lines = "".join(f"{step},0\n" for step in range(0, 1000 * n_samples // 10, 100))
        (stage / "thermo.csv").write_text("step,time_ps\n" + lines)
        frames = TrajectoryWriter(stage / "traj.h5", topology, ensemble=ensemble, buffer=1000)
        walk = np.cumsum(generator.normal(scale=0.3, size=(n_samples, N_MOLECULES, 3)), axis=0)
        for step, time in enumerate(time_ps):
            frames.append(step, time, positions=start + walk[step][member], cell=cell)
        frames.close()


def make_run(folder: Path, text: str = CONFIG) -> RunConfig:
    source = folder.parent / f"{folder.name}.yaml"
    source.write_text(text)
    config = load_config(source)
    RunFolder(folder).write_config(config)
    RunFolder(folder).update_manifest(command="bamboo-md run x.yaml", model={"name": "toy", "sha256": "f" * 64})
    return config


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """Folder of a run that has been analysed, and its configuration."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    config = make_run(folder)
    fill(folder)
    write_results(RunFolder(folder), config)
    write_report(folder)
    return folder, config


def test_every_property_has_its_number_or_its_reason(measured: tuple[Path, RunConfig]) -> None:
    folder, _ = measured
    text = Page(folder / "report.html").text
    properties = json.loads((folder / "properties.json").read_text())
    valued = {name: p for name, p in properties.items() if p["value"] is not None}
    assert {"density", "diffusion_DMC_box"} <= valued.keys() and len(valued) < len(properties)
    for name, found in properties.items():
        if found["value"] is None:
            assert readable(name) in text and name in text and found["warnings"][0] in text
        else:
            number = format_with_error(found["value"], 1.959964 * found["stderr"])
            assert f"{readable(name)} {number} {found['unit']} {found['n_effective']:.0f} " in text, name
    assert "converged to ± " in text and "5 DMC; 60 atoms" in text
    assert "toy" in text and "f" * 64 in text and "bamboo-md run x.yaml" in text and "PACKMOL" in text


def test_the_top_says_what_is_usable_and_how_to_go_on(measured: tuple[Path, RunConfig], tmp_path: Path) -> None:
    text = Page(measured[0] / "report.html").text
    assert "2 of 3 properties have a value; diffusion: wide error bars; viscosity: no value, see below" in text
    folder = tmp_path / "short"
    shutil.copytree(measured[0], folder)
    properties = json.loads((folder / "properties.json").read_text())
    properties["viscosity"]["warnings"] = ["not converged: 02-nvt lasted 100 ps"]
    (folder / "properties.json").write_text(json.dumps(properties))
    text = Page(write_report(folder)).text
    assert "2 of 3 properties have a value; viscosity: too short, see below; diffusion: wide error bars" in text
    assert "Set the time of the last stage, 02-nvt, to 1 ns" in text
    assert "then give the same command again: bamboo-md run x.yaml" in text
    assert text.index("2 of 3 properties") < text.index("finished") < text.index("Model toy")


@pytest.mark.parametrize(
    ("density", "stages", "expected"),
    [
        (
            "not converged: drifts",
            "{kind: nvt, time: 1 ns, volume: mean}",
            "npt, time: 200 ps}, then {kind: nvt, time: 1",
        ),
        ("not converged: drifts", "{kind: npt, time: 300 ps}", "Set the time of the last stage, 02-npt, to 600 ps"),
        ("there is no npt stage", "{kind: nvt, time: 1 ns}", ""),
    ],
)
def test_a_density_that_drifts_is_measured_again_at_the_end(
    density: str, stages: str, expected: str, tmp_path: Path
) -> None:  # fmt: skip
    text = CONFIG.split("properties")[0] + "properties: [density]\nstages:\n"
    config = configured(tmp_path, f"{text}  - {{kind: npt, time: 100 ps}}\n  - {stages}\n")
    properties = {"density": no_value(density, unit="g/cm3", method="")}
    section = Section("", config, "", [], "", properties, kinds={"density": "none"})
    found = summary(section)
    assert found.text.startswith("0 of 1 properties have a value; density: ") and expected in found.remedy
    assert bool(expected) == bool(found.remedy) and not found.complete


def test_names_are_those_of_people() -> None:
    assert readable("transference_PF6_barycentric") == "PF6- transference number (barycentric frame)"
    assert readable("diffusion_EC_box") == "self-diffusion of EC (as in the box)"
    assert readable("coordination_Li_O_DMC") == "number of O of DMC around Li+"
    assert readable("coordination_Li_F") == "number of F around Li+"
    assert readable("residence_time_Li_PF6") == "residence time of PF6- around Li+"
    assert readable("density") == "density" and property_of("ion_pairing_contact") == "coordination"
    assert property_of("thermal_expansion") == "density" and property_of("ionicity") == "conductivity"
    names = ["conductivity", "ionicity", "diffusion_EC", "diffusion_EC_box"]
    assert answers("conductivity", names) == ["conductivity"] and answers("diffusion", names) == names[2:]


def stamped(path: Path) -> bool:
    """Whether "not converged" stands across a figure, in its red on white."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return bool((np.abs(pixels - [233, 172, 177]).max(axis=2) < 4).sum() > 100)


def test_figures_of_what_is_withheld_say_so(measured: tuple[Path, RunConfig], tmp_path: Path) -> None:
    folder, config = measured
    assert stamped(folder / "figures/viscosity.png")
    assert not stamped(folder / "figures/density.png") and not stamped(folder / "figures/msd.png")
    data = production_window(RunFolder(folder), config)[0]  # type: ignore[index]
    for name, one, value in (
        ("withheld", data, None),
        ("drifting", replace(data, drifts=True), 1.0),
        ("short", replace(data, thermo=data.thermo.since(60.0)), 1.0),
    ):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        (path,) = frame_figures(run, one, {"diffusion_DMC_box": Estimate(value, 0.1, "", None, "")})
        assert stamped(path), name


def test_the_page_stands_alone(measured: tuple[Path, RunConfig]) -> None:
    folder, _ = measured
    page = Page(folder / "report.html")
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.tags.count("img") == 5  # box, series, convergence, viscosity, displacements
    assert page.loose_tables == 0  # each in a container that scrolls
    source = (folder / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width' in source and "url(" not in source
    assert len(source) < 600_000


def test_what_is_discarded_is_what_the_estimate_discards(measured: tuple[Path, RunConfig]) -> None:
    folder, config = measured
    run = RunFolder(folder)
    npt, used = density_window(run, config), production_window(run, config)
    assert npt is not None and used is not None
    assert 4.0 < npt[1].start_ps < 15.0  # 0.2 exp(-t / 2 ps) sinks into noise of 0.004 after 8 ps
    note = json.loads(run.properties.read_text())["density"]["warnings"][0]
    assert note.startswith("first ") and note in str(npt[1]) and note in Page(folder / "report.html").text
    series = [(w.stage, data.thermo) for data, w in (npt, used)]
    figure = series_figure(series, [npt[1], used[1]], n_atoms=60)
    whole = 100.0 + 100.0
    grey = [sorted((p.get_x(), p.get_x() + p.get_width()) for p in axes.patches) for axes in figure.axes]
    np.testing.assert_allclose(grey[1], [(0.0, npt[1].start_ps), (100.0, whole)])
    assert grey[2][0] == pytest.approx((0.0, 100.0 + used[1].start_ps))
    assert grey[0][0] == pytest.approx((0.0, npt[1].start_ps))


def test_running_estimates_narrow_towards_the_final_value(measured: tuple[Path, RunConfig]) -> None:
    folder, config = measured
    run = RunFolder(folder)
    points = running_estimates(config, npt=density_window(run, config), used=production_window(run, config))
    assert {"density", "diffusion_DMC_box"} <= points.keys() and "viscosity" not in points
    lengths = [length for length, _ in points["density"]]
    assert lengths == sorted(lengths) and lengths[-1] == pytest.approx(100.0, rel=0.15)
    assert lengths[0] >= 50.0  # no value is given for less
    final = json.loads(run.properties.read_text())["density"]
    first, last = points["density"][0][1], points["density"][-1][1]
    assert last.value == pytest.approx(final["value"], abs=0.3 * final["stderr"])
    assert (first.stderr or 0.0) > (last.stderr or 0.0)


def test_user_text_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<i>run & co"
    make_run(folder)
    RunFolder(folder).update_manifest(command="<script>alert(1)</script>", model={"name": "<b>bold", "sha256": "&amp;"})
    page = Page(write_report(folder))
    assert not {"script", "b", "i"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text and "<b>bold" in page.text and "&amp;" in page.text
    assert "<i>run & co" in page.text


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "new")
    text = Page(write_report(tmp_path / "new")).text
    assert "interrupted at preparation, 0 % of the steps done" in text and "This run is not finished" in text
    assert "No properties yet" in text and "Nothing to draw yet" in text
    make_run(tmp_path / "half")
    fill(tmp_path / "half", n_npt=501, nvt=False)
    with RunFolder(tmp_path / "half").locked():
        page = Page(write_report(tmp_path / "half", output=tmp_path / "half.html"))
    assert "running at 01-npt, 25 % of the steps done" in page.text and "No properties yet" in page.text
    assert page.tags.count("img") == 2 and not (tmp_path / "half/report.html").exists()
    with pytest.raises(InputError, match="not the folder of a run"):
        write_report(tmp_path)


def test_damaged_files_cost_only_their_part(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    fill(tmp_path / "run", n_npt=20, nvt=False)
    (tmp_path / "run/stages/01-npt/thermo.h5").write_bytes(b"no HDF5")
    text = Page(write_report(tmp_path / "run")).text
    assert "thermo.h5: not a complete bamboo-md file" in text and "5 DMC; 60 atoms" in text


def test_several_conditions_stand_side_by_side(tmp_path: Path) -> None:
    folder = tmp_path / "several"
    config = make_run(folder, SEVERAL)
    RunFolder(folder).update_manifest(conditions={name: {} for name in config.each_condition()})
    for seed, (name, one) in enumerate(config.each_condition().items()):
        fill(folder / name, seed=seed)
        RunFolder(folder / name).write_config(one)
    write_results(RunFolder(folder), config)
    page = Page(write_report(folder))
    assert "property 298.15K 320K" in page.text and page.tags.count("img") == 10
    for name in ("298.15K", "320K"):
        found = json.loads((folder / name / "properties.json").read_text())["density"]
        number = format_with_error(found["value"], 1.959964 * found["stderr"])
        assert page.text.count(f"{number} g/cm3") >= 2  # in the table of all, and in its own
    assert page.text.count("DMC at 298.15 K") == 2  # its density and viscosity are measured there, not at 320 K
    alone = Page(write_report(folder / "320K")).text
    assert "No measurement of the density, viscosity of this liquid" in alone
    assert "320K" in alone and "298.15K" not in alone and "f" * 64 in alone


def test_a_committee_shows_each_model_and_the_spread(tmp_path: Path) -> None:
    folder = tmp_path / "committee"
    models = "model: {name: a.safetensors, committee: [b.safetensors]}\n"
    config = make_run(folder, CONFIG.replace("[density, viscosity, diffusion]", "[density]") + models)
    for seed, (name, one) in enumerate(config.each_member().items()):
        fill(folder / name, seed=seed, n_npt=801, nvt=False)
        RunFolder(folder / name).write_config(one)
        RunFolder(folder / name).update_manifest(model={"name": f"model {name}", "sha256": name * 64})
    write_results(RunFolder(folder), config)
    text = Page(write_report(folder)).text
    assert "property a b mean of models density" in text
    found = json.loads((folder / "properties.json").read_text())["density"]
    number = format_with_error(found["value"], 1.959964 * found["stderr"])
    assert f"{number} g/cm3; spread over models {found['spread_over_models']:.2g}" in text
    assert "a" * 64 in text and "b" * 64 in text and "Model model b." in text


def configured(tmp_path: Path, text: str) -> RunConfig:
    (tmp_path / "x.yaml").write_text(text)
    return load_config(tmp_path / "x.yaml")


def test_measurements_match_in_all_conditions_or_not_at_all(tmp_path: Path) -> None:
    row = Measurement.model_validate(
        {"electrolyte": "1 m LiPF6 in EC:DMC 30:70 wt", "temperature": "298.15 K", "density": "1.2 g/cm3",
         "source": "10.1/x"}
    )  # fmt: skip
    base = "electrolyte: 1 m LiPF6 in EC:DMC 3:7 wt\ntemperature: 298 K\n"
    assert matches(row, configured(tmp_path, base))
    for old, new in (
        ("298 K", "299 K"),
        ("298 K", "298 K\npressure: 50 bar"),
        ("3:7", "1:1"),
        ("3:7 wt", "3:7 mol"),
        ("1 m", "1.1 m"),
        ("LiPF6", "LiFSI"),
        ("EC:DMC 3:7", "EC:DMC:EMC 3:6:1"),
        ("1 m LiPF6 in ", ""),
    ):
        assert not matches(row, configured(tmp_path, base.replace(old, new))), new
    estimate = Estimate(1.26, 0.01, "g/cm3", 30.0, "NPT")
    (found,) = comparisons(configured(tmp_path, base), {"density": estimate, "viscosity": estimate}, table=[row])
    assert found.measured == pytest.approx(1.2) and found.deviation == pytest.approx(0.05) and found.agrees is False
    nothing = no_value("too short", unit="g/cm3", method="")
    (found,) = comparisons(configured(tmp_path, base), {"density": nothing}, table=[row])
    assert found.deviation is None and found.agrees is None


def test_the_curated_table_is_installed_and_shown(measured: tuple[Path, RunConfig]) -> None:
    folder, config = measured
    text = Page(folder / "report.html").text
    assert "density 1.0633 g/cm3" in text and "10.1063/1.3664084" in text and "DMC at 298.15 K" in text
    value = json.loads((folder / "properties.json").read_text())["density"]["value"]
    assert f"{100.0 * (value / 1.0633 - 1.0):+.1f} %, outside the 95 % interval" in text
    rows = comparisons(config, {"viscosity": no_value("short", unit="mPa s", method="")})
    assert [row.measured for row in rows] == [pytest.approx(0.585)]
    warm = config.model_copy(update={"temperature": 320.0})
    assert comparisons(warm, {"density": Estimate(1, 1, "", 1, "")}) == []
    assert unmeasured(warm, ["viscosity", "density", "diffusion"]) == ["density", "viscosity"]
    assert unmeasured(config, ["density", "viscosity", "conductivity"]) == ["conductivity"]
    assert "No measurement of" not in text


def test_a_new_analysis_makes_a_new_report_where_there_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_run(folder, CONFIG.replace("density, viscosity, diffusion", "density"))
    fill(folder, nvt=False, n_npt=301)
    analyse_folder(folder)
    assert not (folder / "report.html").exists()
    (folder / "report.html").write_text("of the last analysis")
    properties, _ = analyse_folder(folder)
    assert properties["density"].warnings[0] in Page(folder / "report.html").text


def test_verdicts() -> None:
    window = Window("02-nvt", "potential energy", 5.0, 1005.0, True)
    good = Estimate(1.0, 0.004, "g/cm3", 50.0, "NPT")
    assert verdict(good, name="density", window=window) == ("good", "converged to ± 0.78 %")
    # 30 % standard error; for 10 % nine times the 1 ns
    rough = Estimate(1.0, 0.3, "mPa s", 50.0, "")
    assert verdict(rough, name="viscosity", window=window) == (
        "doubtful",
        "not converged: ± 59 %; about 9 ns instead of 1 ns would give ± 20 %",
    )
    drifting = Window("02-nvt", "potential energy", 5.0, 1005.0, False)
    assert "drifts to the end of 02-nvt" in verdict(good, name="density", window=drifting)[1]
    assert verdict(Estimate(0.0, None, "", None, ""), name="x", window=window) == ("doubtful", "no error bar")
    assert verdict(no_value("no ions", unit="", method=""), name="x", window=None) == ("none", "no value: no ions")


def test_the_box_shows_every_species_and_wraps_molecules() -> None:
    names = {"DMC": 2, "Li": 1, "PF6": 1}
    parts = [molecule(name) for name, count in names.items() for _ in range(count)]
    positions = np.concatenate([part.positions + 20.0 * k for k, part in enumerate(parts)])
    numbers = np.concatenate([part.numbers for part in parts])
    member = np.repeat(np.arange(4), [len(part.numbers) for part in parts])
    cell = 12.0 * np.eye(3)
    topology = build_topology(System(numbers, positions, cell, pbc=True, molecule=member), names)
    axes = box_figure(topology, positions, cell).axes[0]
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["DMC", "Li", "PF6"]
    points = np.concatenate([np.asarray(c.get_offsets()) for c in axes.collections if len(c.get_offsets()) > 0])
    drawn = [p for p in points if p.any()]
    assert len(points) >= int((numbers != 1).sum()) and np.min(drawn) > -4.0 and np.max(drawn) < 16.0
