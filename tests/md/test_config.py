"""Configuration files: units, defaults, messages with file and line, and no traceback for any file whatever."""

import json
import random
from pathlib import Path

import ase
import ase.io
import pytest

from bamboo import units
from bamboo.errors import InputError
from bamboo.structure.packing import pack_box
from md.composition import realise
from md.config import NPT, NVT, RunConfig, dump_config, json_schema, load_config
from md.protocol import n_steps, resolve
from md.quantities import parse_quantity, quantity_text

MINIMAL = """\
electrolyte: 1 m LiPF6 in EC:DMC 30:70 wt
temperature: 298 K
model: default
properties: [density, viscosity, conductivity]
"""
FULL = """\
composition:
  solvents: {EC: 0.3, DMC: 0.7}
  basis: wt
  salts: {LiPF6: 1.0 mol/kg}
  density: 1.25 g/cm3
conditions: {temperature: 313 K, pressure: 1 bar}
model: {name: default, device: cpu, dtype: float64}
properties: [density]
build: {atoms: 500, seed: 7, density: 0.9 g/cm3, tolerance: 1.9 A}
stages:
  - {kind: minimise, steps: 50, force: 1 eV/A}
  - {kind: nvt, name: melt, time: 1 ps, timestep: 0.5 fs, thermostat: langevin, temperature: [50 K, 313 K]}
  - {kind: npt, time: 0.02 ns, barostat: c-rescale}
  - {kind: nvt, time: 1 ns, volume: mean, thermostat: nhc}
guards: {max_temperature: 4.0, density: [0.2 g/cm3, 2500 kg/m3], min_distance: 0.06 nm}
output: {trajectory_every: 1 ps, thermo_every: 100 fs, transport_every: 5 fs}
checkpoint: {every: 10 min, wall_time: 23 h}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "electrolyte.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    return str(caught.value).replace(str(path), "electrolyte.yaml")


def test_minimal_file_and_its_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.temperature_K == 298.0
    assert config.target_pressure == pytest.approx(units.BAR)
    assert config.model.name == "default"
    assert config.what().salts["LiPF6"].value == 1.0
    assert config.stages == ()


def test_full_file_is_converted_to_internal_units(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, FULL))
    assert config.temperature_K == 313.0
    _, melt, npt, nvt = config.stages
    assert isinstance(melt, NVT) and isinstance(npt, NPT) and isinstance(nvt, NVT)
    assert melt.temperature == (50.0, 313.0)
    assert npt.time / npt.timestep == pytest.approx(20_000)
    assert melt.time / units.PICOSECOND == pytest.approx(1.0)
    assert config.guards.min_distance == pytest.approx(0.6)
    assert config.guards.density[1] == pytest.approx(2.5 * units.GRAM_PER_CM3)
    assert config.checkpoint.every == 600.0
    assert config.what().density_g_cm3 == pytest.approx(1.25)


@pytest.mark.parametrize("text", [MINIMAL, FULL], ids=["minimal", "full"])
def test_resolved_file_reads_back_to_the_same_configuration(tmp_path: Path, text: str) -> None:
    config = load_config(write(tmp_path, text))
    again = load_config(write(tmp_path, dump_config(config)))
    assert dump_config(again) == dump_config(config)  # quantities agree to 12 digits
    assert again.what() == config.what()


def test_molecules_by_smiles_are_usable_wherever_names_are(tmp_path: Path) -> None:
    text = (
        "molecules: {FBz: Fc1ccccc1, TDI: 'FC(F)(F)C1=NC(C#N)=C(C#N)[N-]1'}\nelectrolyte: 1 m LiTDI in EC:FBz 1:1 wt\n"
    )
    config = load_config(write(tmp_path, text))
    box = realise(config.what(), n_atoms=400)
    assert set(box.counts) == {"EC", "FBz", "Li", "TDI"} and box.counts["Li"] == box.counts["TDI"]
    assert load_config(write(tmp_path, dump_config(config))).molecules == config.molecules
    bad = "molecules: {FBz: Fc1ccccc1, Bad: C1CC}\nelectrolyte: FBz\n"
    assert "electrolyte.yaml:1: molecules: Cannot read SMILES 'C1CC'" in refusal(tmp_path, bad)
    assert "stands for" in refusal(tmp_path, "molecules: {EC: CC}\nelectrolyte: EC\n")


def test_a_structure_file_names_the_molecules(tmp_path: Path) -> None:
    box = pack_box({"DMC": 3, "Li": 1, "PF6": 1}, density_g_cm3=0.8, seed=1)
    ase.io.write(tmp_path / "box.cif", box.to_atoms())
    config = load_config(write(tmp_path, f"structure: {tmp_path}/box.cif\n"))
    assert config.what().counts == {"DMC": 3, "Li": 1, "PF6": 1}
    assert "give either `electrolyte" in refusal(tmp_path, "structure: box.cif\nelectrolyte: DMC\n")
    (tmp_path / "bad.cif").write_text("data_x\n_cell_length_a oops\n")
    for name, problem in (("none.cif", "no such file"), ("bad.cif", "not a structure that ASE can read")):
        with pytest.raises(InputError, match=problem):
            load_config(write(tmp_path, f"structure: {tmp_path}/{name}\n")).what()
    ase.io.write(tmp_path / "cluster.xyz", ase.Atoms("OHH", [[0, 0, 0], [1, 0, 0], [0, 1, 0]]))
    with pytest.raises(InputError, match="expected a periodic box"):
        load_config(write(tmp_path, f"structure: {tmp_path}/cluster.xyz\n")).what()


def test_lists_make_conditions_and_one_value_makes_none(tmp_path: Path) -> None:
    text = (
        "electrolyte: [1 m LiPF6 in EC:DMC 3:7 wt, DMC]\nconditions: {temperature: [280 K, 313.15 K], pressure: 2 bar}"
    )
    config = load_config(write(tmp_path, text))
    runs = config.each_condition()
    first, second = "1-m-LiPF6-in-EC-DMC-3-7-wt", "DMC"
    assert list(runs) == [f"{first}-280K", f"{first}-313.15K", f"{second}-280K", f"{second}-313.15K"]
    last = runs["DMC-313.15K"]
    assert last.temperature_K == 313.15 and last.what().solvents == {"DMC": 1.0}
    assert last.target_pressure == pytest.approx(2.0 * units.BAR)
    assert load_config(write(tmp_path, dump_config(config))).each_condition().keys() == runs.keys()
    alone = load_config(write(tmp_path, dump_config(last)))
    assert alone.each_condition() == {"": alone}
    names = load_config(write(tmp_path, "electrolyte: DMC\ntemperature: [280 K, 320 K]")).each_condition()
    assert list(names) == ["280K", "320K"]
    names = load_config(write(tmp_path, "electrolyte: [DMC, EC]")).each_condition()
    assert list(names) == ["DMC", "EC"]


def test_quantities_round_trip_in_every_unit() -> None:
    assert parse_quantity("1 bar", dimension="pressure") == pytest.approx(
        0.1 * parse_quantity("1 MPa", dimension="pressure")
    )
    assert parse_quantity("1.5e3fs", dimension="time") == pytest.approx(parse_quantity("0.0015 ns", dimension="time"))
    assert parse_quantity("997 kg/m3", dimension="density") == pytest.approx(0.997 * units.GRAM_PER_CM3)
    for dimension, text in (("time", "20 ps"), ("pressure", "1.01325 bar"), ("temperature", "298.15 K")):
        assert quantity_text(parse_quantity(text, dimension=dimension), dimension=dimension) == text


def test_notes_tell_of_what_is_perhaps_not_meant(tmp_path: Path) -> None:
    short = load_config(write(tmp_path, "electrolyte: EC:DMC 30:60 w/w\ntemperature: [280 K, 25 K]\n"))
    cold, parts = short.notes
    assert cold.startswith("25 K is colder") and "sum to 90" in parts
    block = load_config(write(tmp_path, "composition: {solvents: {EC: 30, DMC: 60}, basis: wt%}\n"))
    assert block.what().basis == "wt" and block.notes == (parts,)
    assert load_config(write(tmp_path, FULL)).notes == ()


def test_a_sweep_is_recognised(tmp_path: Path) -> None:
    message = refusal(tmp_path, "run: {electrolyte: DMC}\nseeds: [1, 2]\n")
    assert message.startswith("electrolyte.yaml: is a sweep (it has a block `run`). `bamboo-md sweep ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("unit", [" °C", "°C", " C", " degC", " ℃"])
def test_temperatures_in_degrees_celsius(tmp_path: Path, unit: str) -> None:
    text = (
        f"electrolyte: DMC\ntemperature: [-20{unit}, 25{unit}, 300 K]\n"
        f"stages:\n  - {{kind: nvt, time: 1 ps, temperature: [0{unit}, 320 K]}}\n"
    )
    config = load_config(write(tmp_path, text))
    assert config.temperatures_K == pytest.approx((253.15, 298.15, 300.0))
    (ramp,) = config.stages
    assert isinstance(ramp, NVT) and ramp.temperature == (273.15, 320.0)
    assert list(config.each_condition()) == ["253.15K", "298.15K", "300K"]
    written = dump_config(config)
    assert "- 253.15 K\n" in written and dump_config(load_config(write(tmp_path, written))) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("electrolyte: EC:DMC 3:7", 'electrolyte.yaml:1: electrolyte: "EC:DMC 3:7" has no basis. Write 3:7 wt'),
        (
            "electrolyte: DMC\n\ntempurature: 298 K",
            "electrolyte.yaml:3: tempurature: unknown key 'tempurature'. Did you",
        ),
        (
            "electrolyte: DMC\ntemperature: 298",
            "electrolyte.yaml:2: temperature: 298 has no unit. Write, for example, '298 K'",
        ),
        (
            'electrolyte: DMC\ntemperature: "298"',
            "electrolyte.yaml:2: temperature: 298 has no unit. Write, for example, '298 K'",
        ),
        (
            "electrolyte: DMC\ntemperature: 25",
            "electrolyte.yaml:2: temperature: 25 has no unit. Write, for example, '25 °C' or '298.15 K'.",
        ),
        (
            "electrolyte: DMC\nstages:\n - {kind: nvt, time: 1 ps, temperature: 40}",
            "electrolyte.yaml:3: stages.0.temperature: 40 has no unit. Write, for example, '40 °C' or '313.15 K'.",
        ),
        (
            "electrolyte: DMC\ntemperature: 298 F",
            "electrolyte.yaml:2: temperature: unknown unit 'F'. Known units of temperature: K, °C, C",
        ),
        (
            "electrolyte: DMC\ntemperature: -300 C",
            "electrolyte.yaml:2: temperature: -300 C is out of range, expected more than 0 K",
        ),
        (
            "electrolyte: DMC\ntemperature: -3 K",
            "electrolyte.yaml:2: temperature: -3 K is out of range, expected more than 0 K",
        ),
        (
            "electrolyte: DMC\ntemperature: [280 K, 280.0 K]",
            "electrolyte.yaml:2: temperature: holds a temperature twice.",
        ),
        ("electrolyte: DMC\ntemperature: [280 K]", "expected one temperature or a list of 2 to 50, got 1."),
        ("electrolyte: DMC\ntemperature: [280 K, 9000 K]", "electrolyte.yaml:2: temperature: 9000 K is out of range"),
        ("electrolyte: [DMC, ' DMC']", "electrolyte.yaml:1: electrolyte: holds a composition twice."),
        ("electrolyte: [DMC, 3]", "electrolyte.yaml:1: electrolyte: '3' is not text such as"),
        ("electrolyte: [DMC, EC]\nbuild: {replicas: 200}", "build.replicas: 400 boxes in all, expected at most 256."),
        ("electrolyte: DMC\ntemperature: 0 K", "temperature: 0 K is out of range, expected more than 0 K"),
        ("electrolyte: DMC\ntemperature: 5001 K", "temperature: 5001 K is out of range, expected more than 0 K"),
        ("electrolyte: DMC\ntemperature: 1e999 K", "electrolyte.yaml:2: temperature: 1e999 K is out of range"),
        (
            "electrolyte: DMC\ntemperature: hot",
            "electrolyte.yaml:2: temperature: 'hot' is not a temperature with its unit",
        ),
        (
            "electrolyte: DMC\nproperties: [densty]",
            "electrolyte.yaml:2: properties.0: unknown value 'densty'. Did you mean",
        ),
        ("electrolyte: DMC\nmodel: {nam: x}", "electrolyte.yaml:2: model.nam: unknown key 'nam'. Did you mean 'name'?"),
        (
            "composition:\n  solvents: {DMC: 1}\n  salts:\n    LiPF: 1 m",
            "electrolyte.yaml:4: composition.salts.LiPF: unknown salt 'LiPF'. Did you mean 'LiPF6'?",
        ),
        (
            "composition:\n  solvents: {Dimethyl carbonate: 1}",
            "electrolyte.yaml:2: composition.solvents.Dimethyl carbonate: unknown solvent 'Dimethyl carbonate'. "
            "Did you mean 'DMC'?",
        ),
        ("composition:\n  solvents: {EC: 1, DMC: 1}", "composition: several solvents need a `basis`: wt, mol or vol."),
        ("composition: {counts: {EC: 0}}", "composition.counts.EC: expected greater than or equal to 1, got 0."),
        ("composition: {counts: {EC: 1}, salts: {LiPF6: 1 m}}", "exact `counts` already include the salts"),
        ("temperature: 298 K", "electrolyte.yaml:1: give either `electrolyte: "),
        (
            "electrolyte: DMC\ncomposition: {counts: {EC: 1}}",
            "electrolyte.yaml:2: composition: give either `electrolyte: ",
        ),
        (
            "electrolyte: DMC\nstages:\n - {kind: nvp}",
            "electrolyte.yaml:3: stages.0.kind: unknown kind 'nvp'. Did you mean",
        ),
        ("electrolyte: DMC\nstages:\n - {time: 1 ps}", "electrolyte.yaml:3: stages.0.kind: the key 'kind' is missing"),
        ("electrolyte: DMC\nstages:\n - {kind: npt}", "electrolyte.yaml:3: stages.0: the key 'time' is missing."),
        (
            "electrolyte: DMC\nstages:\n - {kind: npt,\n    time: 1 ps, thermstat: svr, barostatt: mtk}",
            "electrolyte.yaml:4: stages.0.barostatt: unknown key 'barostatt'. Did you mean 'barostat'?",
        ),
        (
            "electrolyte: DMC\nstages:\n - {kind: nvt, time: 1 ps, volume: mean}",
            "electrolyte.yaml:3: stages.0.volume: the mean volume needs an npt stage before this one.",
        ),
        (
            "electrolyte: DMC\nstages:\n - {kind: npt, time: 1 ps, coupling: anisotropic}",
            "electrolyte.yaml:3: stages.0.coupling: anisotropic coupling needs `barostat: mtk`.",
        ),
        ("electrolyte: DMC\nstages:\n - {kind: nvt, time: 0.1 fs}", "stages.0.time: shorter than one timestep."),
        ("electrolyte: DMC\nguards: {density: [1 g/cm3]}", "guards.density: expected one density or two, [from, to]"),
        ("electrolyte: DMC\nguards: {density: [2 g/cm3, 1 g/cm3]}", "guards.density: the lower limit is not below"),
        ("electrolyte: DMC\nbuild: {atoms: true}", "build.atoms: expected a valid integer, got True."),
        (
            "electrolyte: DMC\nbuild: {atoms: 99999999999999999999}",
            "build.atoms: expected less than or equal to 10000000",
        ),
        ("electrolyte: DMC\nbuild: {atoms: .nan}", "electrolyte.yaml:2: '.nan' is not a number that can be used here."),
        ("electrolyte: DMC\nelectrolyte: EC", "electrolyte.yaml:2: electrolyte: this key was already given on line 1."),
        (
            "electrolyte: !!python/object:os.system x",
            "electrolyte.yaml:1: the tag 'python/object:os.system' is not supported",
        ),
        ("electrolyte: DMC\n? [a]\n: 1", "electrolyte.yaml:2: a key must be one word, got a list."),
        ("a: [", "electrolyte.yaml:1: not valid YAML: expected the node content"),
        ("a: &x [*x]", "too large or too deeply nested"),
        ("- a", "electrolyte.yaml:1: expected `key: value` lines, got a list."),
        ("# nothing", "electrolyte.yaml: is empty. Start with, for example"),
    ],
)
def test_messages_say_where_and_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_the_same_fact_is_not_accepted_twice(tmp_path: Path) -> None:
    text = "electrolyte: DMC\nconditions: {temperature: 300 K}\ntemperature: 298 K"
    assert "electrolyte.yaml:3: temperature: given here and in `conditions`" in refusal(tmp_path, text)


def test_all_problems_are_reported_in_the_order_of_the_file(tmp_path: Path) -> None:
    message = refusal(tmp_path, "electrolyte: EC:DMC 3:7\nmodle: x\ntemperature: 3\n")
    assert [line.split(":")[1] for line in message.splitlines()] == ["1", "2", "3"]


def test_missing_files_folders_and_binaries(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    with pytest.raises(InputError, match=r"no such file\. Did you mean 'electrolyte.yaml'"):
        load_config(tmp_path / "electrolite.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"electrolyte: DMC\n\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary.yaml:2: not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_scientific_notation_and_no_are_yaml_1_2(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "composition: {solvents: {EC: 1e-1, DMC: 9e-1}, basis: mol}\n"))
    assert config.what().solvents == {"EC": 0.1, "DMC": 0.9}


def test_schema_is_json_and_knows_the_keys() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False


def mutate(text: str, generator: random.Random) -> str:
    """Damage a configuration as people and disks do: drop, double, swap and rewrite characters, words and lines."""
    odd = [
        "",
        "~",
        "nan",
        ".inf",
        "1e999",
        "-1",
        "[]",
        "{}",
        "'",
        '"',
        ": ",
        "\t",
        "\x00",
        "*a",
        "&a ",
        "!!set ",
        "🔋",
        "- ",
    ]
    lines = text.splitlines()
    for _ in range(generator.randint(1, 4)):
        row = generator.randrange(len(lines))
        line = lines[row]
        match generator.randrange(6):
            case 0:
                lines[row] = line[: generator.randrange(len(line) + 1)]
            case 1:
                place = generator.randrange(len(line) + 1)
                lines[row] = line[:place] + generator.choice(odd) + line[place:]
            case 2:
                words = line.split(" ")
                words[generator.randrange(len(words))] = generator.choice(odd)
                lines[row] = " ".join(words)
            case 3:
                lines.insert(row, generator.choice(lines))
            case 4:
                lines[row] = line.swapcase()
            case _:
                lines[row] = " " * generator.randrange(4) + line.strip()
    return "\n".join(lines)


def test_five_hundred_damaged_files_never_cause_a_traceback(tmp_path: Path) -> None:
    generator = random.Random(20250114)
    accepted = 0
    for index in range(500):
        path = write(tmp_path, mutate(generator.choice([MINIMAL, FULL]), generator))
        try:
            load_config(path)
        except InputError as error:
            assert str(path) in str(error), f"case {index} does not name the file: {error}"
        else:
            accepted += 1
    assert accepted < 250  # some damage is harmless; most must be noticed


def test_the_default_protocol_can_be_written_and_read(tmp_path: Path) -> None:
    config = resolve(load_config(write(tmp_path, MINIMAL)))
    assert [stage.kind for stage in config.stages] == ["minimise", "nvt", "npt", "nvt"]
    assert config.stages[1].temperature == (50.0, 298.0)  # type: ignore[union-attr]
    assert dump_config(load_config(write(tmp_path, dump_config(config)))) == dump_config(config)
    density_only = load_config(write(tmp_path, "electrolyte: DMC\nproperties: [density]\n"))
    assert [stage.kind for stage in resolve(density_only).stages] == ["minimise", "nvt", "npt"]


def test_the_shipped_example_is_valid_and_short() -> None:
    """At 20 us per atom and step, twice what the native engine takes on two cores, it stays within ten minutes."""
    config = load_config(Path(__file__).parents[2] / "examples/electrolyte.yaml")
    steps = sum(stage.steps if stage.kind == "minimise" else n_steps(stage) for stage in config.stages)
    assert steps * config.build.atoms * 20.0e-6 < 600.0
