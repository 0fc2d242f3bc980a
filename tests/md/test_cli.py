"""The command line: exit codes, messages on standard error, JSON on standard output, and a fast start."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from bamboo.checkpoint import FORMAT, resolve, zoo
from bamboo.errors import BambooError, CheckpointedStop, GuardError, InputError, UnknownElementError
from md import cli

GOOD = "electrolyte: 1 m LiPF6 in EC:DMC 30:70 wt\nbuild: {atoms: 300}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_help_starts_without_heavy_imports() -> None:
    script = (
        "import sys; sys.argv = ['bamboo-md', '--help']\n"
        "from md.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'ase', 'rdkit', 'scipy', 'h5py', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Build, simulate and analyse" in result.stdout


def test_bad_input_is_one_message_and_code_2(here: Path) -> None:
    (here / "bad.yaml").write_text("electrolyte: EC:DMC 3:7\n")
    code, out, err = invoke("run", "bad.yaml")
    assert (code, out) == (2, "")
    assert err == 'bad.yaml:1: electrolyte: "EC:DMC 3:7" has no basis. Write 3:7 wt, 3:7 mol or 3:7 vol.\n'
    assert not (here / "runs").exists()


def test_missing_files_and_unknown_commands_are_code_2(here: Path) -> None:
    assert invoke("run", "nothing.yaml")[0] == 2
    assert invoke("analyze", "nothing")[0] == 2
    assert invoke("simulate")[0] == 2
    assert invoke("run")[0] == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x"), 2),
        (UnknownElementError("x"), 3),
        (GuardError("x"), 4),
        (CheckpointedStop("x"), 75),
        (PermissionError(13, "Permission denied", "runs"), 2),
        (KeyboardInterrupt("saved"), 130),
        (ValueError("x"), 1),
    ],
)
def test_exit_codes(here: Path, error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    @cli.reported
    def command() -> None:
        raise error

    with pytest.raises(cli.typer.Exit) as caught:
        command()
    assert caught.value.exit_code == code
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    known = isinstance(error, BambooError | KeyboardInterrupt | OSError)
    assert known or "Traceback" in next(here.glob("bamboo-md-error-*.log")).read_text()
    assert "Traceback" not in message


def test_schema_is_json() -> None:
    code, out, _ = invoke("schema")
    assert code == 0
    assert "electrolyte" in json.loads(out)["properties"]


def test_build_writes_the_box_and_prints_the_counts(here: Path) -> None:
    (here / "good.yaml").write_text(GOOD)
    code, out, _ = invoke("build", "good.yaml", "--output", "box.extxyz")
    assert code == 0
    assert "7 EC · 16 DMC · 2 LiPF6 = 278 atoms" in out
    assert (here / "box.extxyz").read_text().startswith("278\n")


def test_an_unknown_model_is_named(here: Path) -> None:
    (here / "good.yaml").write_text(GOOD + "model: nowhere.safetensors\n")
    code, _, err = invoke("check", "good.yaml")
    assert code == 2
    assert "No model 'nowhere.safetensors'" in err


def test_a_model_is_described_on_one_screen(here: Path) -> None:
    code, out, _ = invoke("model", "info", "default")
    header = json.loads(invoke("model", "info", "default", "--json")[1])
    card = header["card"]
    assert code == 0 and len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 120
    words = " ".join(out.split())
    assert card["description"] in words and card["caveat"] in words and "H Li C N O F P S" in words
    assert f"{card['held_out_force_rmse_kcal_mol_A']:.2f} pooled" in words
    after = card["alignment"]["mean_absolute_density_error_g_cm3"]["held_out"]["after"]
    assert f"{after:.3f} after for the {len(card['alignment']['held_out']['after'])} liquids it was not" in words
    assert f"{card['frames']['ion_pair']} ion_pair" in words
    assert hashlib.sha256(resolve("default").read_bytes()).hexdigest() in words


def test_a_card_with_little_in_it_is_shown_all_the_same(here: Path) -> None:
    tensors = {"x": torch.zeros(1)}
    header = {"format": FORMAT, "format_version": 1, "elements": ["H"], "card": {"molecules": ["EC", "Li"]}}
    save_file(tensors, "bare.safetensors", metadata={"bamboo": json.dumps(header)})
    code, out, err = invoke("model", "info", "bare.safetensors")
    assert code == 0, err
    assert "molecules    EC, Li" in out and "alignment" not in out


def test_the_list_of_models_says_what_each_is_for() -> None:
    lines = invoke("model", "list")[1].splitlines()
    assert len(lines) == len({path for path in zoo().values()})
    (default,) = [line for line in lines if "(default)" in line]
    assert "aligned to measured densities: for liquids" in default
    assert any(line.startswith("gfn2") and "learnt from GFN2-xTB, not aligned" in line for line in lines)
    assert set(json.loads(invoke("model", "list", "--json")[1])) == set(zoo())


def test_check_takes_one_member_of_each_composition_of_a_sweep(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "many.yaml").write_text("run: {}\nelectrolytes: [DMC, EC]\ntemperatures: [280 K, 25 °C]\nseeds: [1, 2]\n")
    monkeypatch.setattr("md.workflows.check", lambda config: f"checked {config.electrolyte}")
    code, out, _ = invoke("check", "many.yaml")
    assert code == 0
    assert out == (
        "DMC-280K-seed1\nchecked DMC\n\nEC-280K-seed1\nchecked EC\n\n"
        "8 members; `bamboo-md sweep many.yaml` runs all of them\n"
    )


def test_doctor_reports_versions() -> None:
    code, out, _ = invoke("doctor")
    assert code == 0
    assert "torch" in out and "processors" in out


def test_commands_exist() -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    for name in (
        "run",
        "check",
        "build",
        "analyze",
        "train",
        "validate",
        "evidence",
        "schema",
        "doctor",
        "bench",
        "model",
        "data",
    ):
        assert name in out
    assert {"import", "info", "list"} <= set(invoke("model", "--help")[1].split())
    assert {"import", "info", "merge", "sample", "label", "harvest", "select", "probes", "lift"} <= set(
        invoke("data", "--help")[1].split()
    )
    assert invoke("--version")[1].startswith("bamboo-md 0")


def test_extended_xyz_is_imported_and_described(here: Path) -> None:
    (here / "water.xyz").write_text(
        "3\nProperties=species:S:1:pos:R:3:forces:R:3 dft_energy=-1000.0 charge=0\n"
        "O 0 0 0 0.1 0 0\nH 0.96 0 0 -0.1 0 0\nH -0.24 0.93 0 0 0 0\n"
    )
    arguments = ("data", "import", "water.xyz", "water.h5", "--units", "eV,Å", "--level", "test")
    assert invoke(*arguments)[0] == 2  # no key `energy` in the file
    code, out, err = invoke(*arguments, "--key", "energy=dft_energy")
    assert code == 0, err
    assert "frames" in out
    assert "source: water.xyz" in invoke("data", "info", "water.h5")[1]
    assert invoke(*arguments, "--key", "energy")[2].startswith("--key energy: expected quantity=name")


def test_every_command_has_help() -> None:
    for command in cli.app.registered_commands + cli.model_app.registered_commands + cli.data_app.registered_commands:
        assert command.callback is not None and command.callback.__doc__


def test_the_error_classes_carry_their_codes() -> None:
    assert BambooError.exit_code == 2
