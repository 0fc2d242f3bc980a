"""``bamboo-md init``: what it writes is a configuration that loads, says what was answered, and overwrites nothing."""

from pathlib import Path

import pytest

from bamboo import units
from bamboo.errors import InputError
from md import protocol
from md.config import load_config
from md.init import QUESTIONS, ask_all, write_template

ANSWERS = {
    "electrolyte": "1.2 M LiFSI in DMC:EMC 1:2 mol",
    "temperature": "280 K",
    "pressure": "2 MPa",
    "properties": "viscosity, density",
    "model": "models/own: one.safetensors",
    "atoms": "640",
}


def test_what_is_written_says_what_was_answered(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    write_template(path, ANSWERS)
    config = load_config(path)
    assert config.electrolyte == ANSWERS["electrolyte"] and config.temperature_K == 280.0
    assert config.target_pressure == pytest.approx(20.0 * units.BAR)
    assert config.properties == ("viscosity", "density") and config.build.atoms == 640
    assert config.model.name == ANSWERS["model"] and config.stages == ()
    assert f"bamboo-md run {path.name}" in path.read_text()


@pytest.mark.parametrize("properties", ["density", "density, viscosity", QUESTIONS["properties"][1]])
def test_the_stages_in_comments_are_the_standard_protocol(tmp_path: Path, properties: str) -> None:
    path = tmp_path / "new.yaml"
    config = write_template(path, {"properties": properties})
    head, stages = path.read_text().split("# stages:\n")
    lines = [line.removeprefix("#") for line in stages.splitlines()]
    path.write_text(f"{head}stages:\n" + "\n".join(lines))
    found, expected = load_config(path).stages, protocol.default_stages(config)
    assert [stage.kind for stage in found] == [stage.kind for stage in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.model_dump(mode="json") == other.model_dump(mode="json")


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("electrolyte: DMC\n")
    with pytest.raises(InputError, match="exists already"):
        write_template(path, {})
    assert path.read_text() == "electrolyte: DMC\n"
    for key, text, problem in (
        ("electrolyte", "1 m LiPF7 in EC", "electrolyte: Unknown salt 'LiPF7'"),
        ("temperature", "298", "temperature: 298 has no unit"),
        ("properties", "density, colour", "properties"),
        ("atoms", "many", "build.atoms"),
        ("pressure", "1 bar\nmodel: other", "pressure"),
    ):
        with pytest.raises(InputError, match=problem) as caught:
            write_template(tmp_path / "bad.yaml", {key: text})
        assert "answers.yaml" not in str(caught.value)
    assert not (tmp_path / "bad.yaml").exists()
    with pytest.raises(InputError, match="no such folder"):
        write_template(tmp_path / "nowhere" / "x.yaml", {})


def test_a_person_is_asked_until_the_answer_is_one() -> None:
    answers = iter(["EC:DMC", "EC:DMC 1:1 wt", "warm", "300 K"])
    said: list[str] = []
    asked: list[str] = []

    def ask(question: str, default: str) -> str:
        asked.append(question)
        return next(answers, default)

    found = ask_all(ask, {"pressure": "5 bar"}, said.append)
    assert found["electrolyte"] == "EC:DMC 1:1 wt" and found["temperature"] == "300 K" and found["pressure"] == "5 bar"
    assert asked.count("Electrolyte") == asked.count("Temperature") == 2 and "Pressure" not in asked
    assert len(said) == 2 and "has no ratio" in said[0]
    assert found.keys() == QUESTIONS.keys()


def test_a_template_asks_for_what_its_liquid_has(tmp_path: Path) -> None:
    """With ions no dielectric constant, without them no conductivity; what is named is kept."""
    salty = write_template(tmp_path / "a.yaml", {})
    assert "dielectric" not in salty.properties and "conductivity" in salty.properties
    solvent = write_template(tmp_path / "b.yaml", {"electrolyte": "DMC"})
    assert solvent.properties == ("density", "viscosity", "diffusion", "dielectric")
    assert write_template(tmp_path / "c.yaml", {"properties": "dielectric"}).properties == ("dielectric",)
