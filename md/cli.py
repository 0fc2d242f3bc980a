"""``bamboo-md``: parse, call, print. No physics, and nothing heavy is imported before a command needs it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bamboo.errors import GuardError, InputError
from md import cli_batch
from md.cli_data import data_app
from md.command import reported

app = typer.Typer(
    name="bamboo-md",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Model files.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see `bamboo-md schema`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, everything else on standard error.")]


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


@app.command()
@reported
def run(
    config: ConfigFile,
    folder: Annotated[Path | None, typer.Option(help="Where results go; default: runs/<name of the file>.")] = None,
    as_json: Json = False,
) -> None:
    """Build, simulate and analyse an electrolyte. The same command again continues an unfinished run."""
    from rich.console import Console

    from bamboo.signals import end_with_parent

    end_with_parent()

    from md.config import load_config
    from md.workflows import run as run_workflow

    properties = run_workflow(
        load_config(config),
        folder or Path("runs") / config.stem,
        source=config,
        console=Console(stderr=as_json),
    )
    if as_json:
        _print_json({name: estimate.to_dict() for name, estimate in properties.items()})


@app.command()
@reported
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file to write.")] = Path("electrolyte.yaml"),
    electrolyte: Annotated[str | None, typer.Option(help="'1 m LiPF6 in EC:DMC 30:70 wt'.")] = None,
    temperature: Annotated[str | None, typer.Option(help="'298.15 K'.")] = None,
    pressure: Annotated[str | None, typer.Option(help="'1 bar'.")] = None,
    properties: Annotated[str | None, typer.Option(help="With commas: density,viscosity; default: all.")] = None,
    model: Annotated[str | None, typer.Option(help="Model of the zoo or file.")] = None,
    atoms: Annotated[int | None, typer.Option(help="Approximate size of the box.")] = None,
) -> None:
    """Write a commented configuration to start from; asks for what it needs where no option is given."""
    from md.init import ask_all, check_free, write_template

    check_free(path)
    options = {"electrolyte": electrolyte, "temperature": temperature, "pressure": pressure, "properties": properties,
               "model": model, "atoms": None if atoms is None else str(atoms)}  # fmt: skip
    given = {key: text for key, text in options.items() if text is not None}
    if not given and sys.stdin.isatty() and sys.stdout.isatty():
        given = ask_all(lambda question, default: str(typer.prompt(question, default=default)), given, say=_say)
    elif "electrolyte" not in given:
        raise InputError("What is to be simulated? Give --electrolyte '1 m LiPF6 in EC:DMC 30:70 wt'.")
    write_template(path, given)
    print(f"wrote {path}; next: bamboo-md check {path}")


@app.command()
@reported
def check(config: ConfigFile, as_json: Json = False) -> None:
    """Validate a file, pack its box, time the force field and estimate how long the run takes; no dynamics.

    Of a sweep, one member of each composition.
    """
    from md.config import is_sweep, load_config
    from md.workflows import check as check_workflow

    if is_sweep(config):
        from md.sweep import load_sweep

        sweep = load_sweep(config)
        results = {name: check_workflow(one) for name, one in sweep.one_of_each().items()}
        if as_json:
            _print_json({name: result.to_dict() for name, result in results.items()})
            return
        for name, result in results.items():
            print(f"{name}\n{result}\n")
        print(f"{len(sweep.members())} members; `bamboo-md sweep {config}` runs all of them")
        return
    result = check_workflow(load_config(config))
    if as_json:
        _print_json(result.to_dict())
    else:
        print(result)


@app.command()
@reported
def build(
    config: ConfigFile,
    output: Annotated[Path, typer.Option(help="Structure file to write (extended XYZ).")] = Path("start.extxyz"),
) -> None:
    """Pack the box of a configuration and write it."""
    import ase.io

    from md.conditions import start_box
    from md.config import load_config

    box, system = start_box(load_config(config))
    ase.io.write(output, system.to_atoms(), format="extxyz")
    print(f"{box}\nwrote {output}, {system.volume ** (1 / 3):.2f} Å box")


@app.command()
@reported
def analyze(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folder of a run, or files of trajectories.")],
    interval: Annotated[str | None, typer.Option(help="Files: time between frames, '1 ps'.")] = None,
    temperature: Annotated[str | None, typer.Option(help="Files: '298 K'.")] = None,
    ensemble: Annotated[str, typer.Option(help="Files: nve, nvt, langevin or npt.")] = "nvt",
    structure: Annotated[Path | None, typer.Option(help="Files: structure with elements, if they lack them.")] = None,
    charges: Annotated[str, typer.Option(help="Files: formal, or file, those in it.")] = "formal",
    molecule: Annotated[list[str] | None, typer.Option(help="Files: NAME=SMILES of what has no name yet.")] = None,
    since: Annotated[str, typer.Option(help="Files: leave out what comes before.")] = "0 ps",
    folder: Annotated[Path | None, typer.Option(help="Files: where results go; default: NAME-analysis.")] = None,
    as_json: Json = False,
) -> None:
    """Compute properties again from trajectories; writes properties.json, figures and the report where there is one.

    RUN is the folder of a run, finished or not; or trajectories of other programs (LAMMPS dump, DCD, XTC, extended XYZ,
    whatever ASE reads), one file per replica, of molecules that are known by name.
    """
    if len(paths) == 1 and paths[0].is_dir():
        from md.workflows import analyse_folder

        properties, table = analyse_folder(paths[0])
    else:
        from md.foreign import analyse_files, define_molecules, file_options

        options = file_options(interval, temperature=temperature, ensemble=ensemble, charges=charges, since=since)
        define_molecules(molecule or [])
        target = folder or paths[0].with_name(f"{paths[0].stem}-analysis")
        properties, table = analyse_files(paths, target, structure=structure, **options)
    if as_json:
        _print_json({name: estimate.to_dict() for name, estimate in properties.items()})
    else:
        print("\n".join(table))


@app.command()
@reported
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one condition in it.")],
    output: Annotated[Path | None, typer.Option(help="HTML file to write; default: report.html in the folder.")] = None,
) -> None:
    """Write one HTML page about a run, finished or not: properties with error bars, figures, provenance."""
    from md.html_report import write_report

    print(f"wrote {write_report(folder, output=output)}")


@app.command()
@reported
def status(
    folder: Annotated[Path, typer.Argument(help="Folder in and below which runs are looked for.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs: what they are of, how far they have come, and whether they are at work."""
    from md.status import find_runs, run_status, status_table

    found = [run_status(path) for path in find_runs(folder)]
    if as_json:
        _print_json([run.to_dict() for run in found])
    else:
        print(status_table(found))


@app.command()
@reported
def train(config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a training.")]) -> None:
    """Fit a force field to quantum data; run again to resume."""
    from bamboo.learn.fit import TrainConfig
    from bamboo.learn.fit import train as fit
    from md.yaml_model import load_yaml

    fit(load_yaml(config, TrainConfig))


@app.command()
@reported
def distill(config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a distillation.")]) -> None:
    """Let several models simulate liquids and train one on their mean; run again to continue."""
    from md.distill import distill as run_distillation
    from md.distill import load_distill_config

    run_distillation(load_distill_config(config), say=_say)


@app.command()
@reported
def align(config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of an alignment.")]) -> None:
    """Correct a model until its liquids have the measured densities; run again to continue."""
    from md.align import align as run_alignment
    from md.align_config import load_align_config

    run_alignment(load_align_config(config), say=_say)


@app.command()
@reported
def spread(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of models and liquids.")],
) -> None:
    """Measure how far models that should agree are apart in liquids; run again, or twice at once, to continue."""
    from md.spread import load_spread_config
    from md.spread import spread as run_spread

    run_spread(load_spread_config(config), say=_say)


def _say(line: str) -> None:
    print(line, flush=True)


@app.command()
@reported
def schema() -> None:
    """Print the JSON schema of the configuration file, for completion and checks in editors."""
    from md.config import json_schema

    _print_json(json_schema())


@app.command()
@reported
def doctor() -> None:
    """Report versions, devices and what is missing."""
    from md.diagnosis import diagnose

    report, healthy = diagnose()
    print(report)
    if not healthy:
        raise typer.Exit(2)


@app.command()
@reported
def bench(
    parts: Annotated[list[str] | None, typer.Argument(help="model, md, training, analysis; all without.")] = None,
    model: Annotated[str, typer.Option(help="Model of the zoo or file.")] = "default",
    largest: Annotated[int, typer.Option(min=1000, help="Atoms of the largest box.")] = 100_000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Measure speed and memory; every ratio within one run. Let the machine do nothing else meanwhile."""
    from md.bench import PARTS, table, to_json
    from md.bench import bench as measure

    rows = []
    for row in measure(tuple(parts or PARTS), model=model, largest=largest, device=device):
        rows.append(row)
        print(table([row]), file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        _print_json(to_json(rows))


@app.command()
@reported
def evidence(
    models: Annotated[list[str], typer.Argument(help="Models of the zoo or files.")],
    labels: Annotated[list[Path], typer.Option(help="HDF5 files of labelled probes; the first is the reference.")],
    figure: Annotated[Path, typer.Option(help="Picture to write.")] = Path("evidence.png"),
) -> None:
    """Compare models with quantum chemistry: binding curves, shells, rotations, dipoles (see `data probes`)."""
    from bamboo.learn.evidence import compare

    print(compare(models, labels, figure=figure))
    print(f"wrote {figure}")


@app.command()
@reported
def validate(
    model: Annotated[str, typer.Argument(help="Model of the zoo or file.")],
    electrolyte: Annotated[str, typer.Option(help="Composition.")] = "1 m LiPF6 in EC:DMC 30:70 wt",
    atoms: Annotated[int, typer.Option(min=100, help="Approximate size of the box.")] = 320,
    as_json: Json = False,
) -> None:
    """Test a model in a liquid: energy conservation, stability, pressure at the experimental density."""
    from md.validation import ValidationConfig
    from md.validation import validate as run_validation

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    report = run_validation(model, ValidationConfig(electrolyte=electrolyte, n_atoms=atoms), say=say)
    if as_json:
        _print_json(report.to_dict())
    if report.stopped:
        raise GuardError(f"{len(report.stopped)} of the runs did not stay sound; see above.")


@model_app.command("list")
@reported
def model_list(as_json: Json = False) -> None:
    """List the models that come with the package and what each is for."""
    from bamboo.checkpoint import describe, zoo
    from md.model_card import model_lines

    if as_json:
        _print_json({name: {"elements": describe(file)["elements"], "file": str(file)} for name, file in zoo().items()})
    else:
        print("\n".join(model_lines()))


@model_app.command("info")
@reported
def model_info(
    name: Annotated[str, typer.Argument(help="Model of the zoo or file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole header as JSON.")] = False,
) -> None:
    """Print what a model is for, what it learnt from, its errors and caveats."""
    from bamboo.checkpoint import describe
    from md.model_card import model_card

    if as_json:
        _print_json(describe(name))
    else:
        print(model_card(name))


@model_app.command("import")
@reported
def model_import(
    source: Annotated[Path, typer.Argument(help="Published checkpoint, benchmark.pt.")],
    destination: Annotated[Path, typer.Argument(help="Model file to write, .safetensors.")],
) -> None:
    """Convert a published BAMBOO checkpoint (TorchScript) to a model file; nothing in it is executed."""
    from bamboo.published import import_published

    import_published(source, destination)
    print(f"wrote {destination}")


cli_batch.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from bamboo import __version__

        print(f"bamboo-md {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Molecular dynamics of liquid electrolytes: from a line of text to density, viscosity and conductivity."""


def main() -> None:
    """Entry point of ``bamboo-md``."""
    app()


if __name__ == "__main__":
    main()
