"""``bamboo-md init``: the first configuration file, commented, from a few answers."""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from bamboo.errors import InputError
from bamboo.structure.molecules import molecule
from md import protocol
from md.composition import realise
from md.config import Property, RunConfig, load_config
from md.run_length import objection

QUESTIONS = {  # key -> what it asks, and the answer that return alone gives
    "electrolyte": ("Electrolyte", "1 m LiPF6 in EC:DMC 30:70 wt"),
    "temperature": ("Temperature", "298.15 K"),
    "pressure": ("Pressure", "1 bar"),
    "properties": ("Properties, with commas", ", ".join(get_args(Property))),
    "model": ("Model (of the zoo, or a file)", "default"),
    "atoms": ("Atoms in the box, about", "1000"),
}

_TEXT = """\
# A run of bamboo-md: `bamboo-md check {name}` tells how long it takes, `bamboo-md run {name}` does it.
# Quantities carry their units. Every key that may stand here: `bamboo-md schema`.

# amount of salt: m (mol per kg of solvent) or M (mol per litre); ratio of solvents: wt, mol or vol;
# additives by share of the whole solvent: EC:EMC 3:7 wt + 2 wt% VC
electrolyte: {electrolyte}
temperature: {temperature}   # a list, [280 K, 300 K], runs all of them side by side
pressure: {pressure}

# `bamboo-md model list` names the models that are installed, `bamboo-md model info` their limits
model: {model}

# of {known}
properties: [{properties}]

build:
  atoms: {atoms}     # about so many; more atoms come closer to the composition and cost in proportion
  replicas: 1     # independent boxes side by side: error bars shrink with their number
  seed: 1

# The standard protocol for these properties. Uncomment to change it: longer stages give narrower error bars.
{stages}
"""


def write_template(path: Path, answers: Mapping[str, str]) -> RunConfig:
    """Write a commented configuration and return what it says.

    answers  by the keys of ``QUESTIONS``; those that are missing take their default
    Raises InputError, with nothing written, where the file exists or an answer is not accepted.
    """
    check_free(path)
    given = {key: answers.get(key, default) for key, (_, default) in QUESTIONS.items()}
    config = accepted(given)
    if given["properties"] == QUESTIONS["properties"][1]:
        given["properties"] = ", ".join(usual_properties(config))
        config = accepted(given)
    text = _text(given, config, name=path.name)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no such folder. Make it first.") from None
    return config


def check_free(path: Path) -> None:
    """Raise InputError where something is at a path: no file is ever overwritten."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: exists already. Choose another name, or remove it.")


def accepted(given: Mapping[str, str]) -> RunConfig:
    """Return the configuration that some answers make; InputError that names the key and what is expected."""
    lines = [f"{key}: {_value(key, text)}" for key, text in given.items() if key != "atoms"]
    if "atoms" in given:
        lines.append(f"build: {{atoms: {_value('atoms', given['atoms'])}}}")
    if "electrolyte" not in given:
        lines.append("electrolyte: DMC")
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "answers.yaml"
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            return load_config(draft)
        except InputError as error:
            raise InputError("\n".join(_without_place(line) for line in str(error).splitlines())) from None


def ask_all(ask: Callable[[str, str], str], given: Mapping[str, str], say: Callable[[str], None]) -> dict[str, str]:
    """Return the answers: those given, and for the rest what a person says, asked again until it is accepted.

    ask  shows a question and its default and returns the answer
    """
    answers = dict(given)
    for key, (question, default) in QUESTIONS.items():
        while key not in answers:
            answer = ask(question, default).strip()
            try:
                accepted({key: answer})
                answers[key] = answer
            except InputError as error:
                say(str(error))
    return answers


def _value(key: str, text: str) -> str:
    """Return an answer as YAML; text is quoted as JSON does it, which YAML reads."""
    if key == "properties":
        return f"[{', '.join(json.dumps(word.strip()) for word in text.split(','))}]"
    if key != "electrolyte" and re.fullmatch(r"\d+(\.\d+)?", text.strip(), re.ASCII):
        return text.strip()  # a number: the messages on atoms, and on quantities without a unit, depend on it
    return json.dumps(text.strip(), ensure_ascii=False)


def _without_place(line: str) -> str:
    """Return a problem without the file and line of the draft, which the user never sees."""
    return line.split(": ", 1)[1] if "answers.yaml" in line.split(": ", 1)[0] and ": " in line else line


def usual_properties(config: RunConfig) -> list[str]:
    """Return every property that the liquid has."""
    ions = any(molecule(name).charge for name in realise(config.what(), n_atoms=config.build.atoms).counts)
    return [name for name in get_args(Property) if objection(name, config, ions=ions) is None]


def _text(given: Mapping[str, str], config: RunConfig, *, name: str) -> str:
    return _TEXT.format(
        name=name,
        electrolyte=_value("electrolyte", given["electrolyte"]),
        temperature=given["temperature"].strip(),
        pressure=given["pressure"].strip(),
        model=_value("model", given["model"]),
        known=", ".join(get_args(Property)),
        properties=", ".join(config.properties),
        atoms=config.build.atoms,
        stages=_stages(config),
    )


def _stages(config: RunConfig) -> str:
    """Return the standard protocol as comments."""
    lines = ["# stages:"]
    for stage in protocol.default_stages(config):
        keys = stage.model_dump(mode="json", exclude_unset=True)
        lines.append(f"#   - kind: {keys.pop('kind')}")
        for key, value in keys.items():
            lines.append(f"#     {key}: {'[' + ', '.join(value) + ']' if isinstance(value, list) else value}")
    return "\n".join(lines)
