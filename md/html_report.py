"""``report.html``: one page that shows a run to a person: what was in the box, what came out, how far to believe it.

The page needs nothing but itself: figures are inlined, there are no scripts, and it reads on a phone. Everything comes
from the folder of the run, finished or not. The template is ``report.html.j2``; it escapes whatever it is given.
"""

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ase.io
import jinja2
from matplotlib.figure import Figure
from PIL import Image

from bamboo import units
from bamboo.checkpoint import describe
from bamboo.errors import BambooError, InputError
from bamboo.files import file_sha256, write_text
from bamboo.structure.molecules import molecule
from bamboo.system import System
from md import protocol
from md.analysis.density import UNITS as CONSTANT_PRESSURE
from md.analysis.estimate import NORMAL_95, Estimate, format_time
from md.citations import bibliography
from md.comparison import Comparison, comparisons, unmeasured
from md.composition import realise
from md.config import NVT, Minimise, Property, RunConfig, dump_config
from md.convergence import Window, density_window, production_window, running_estimates
from md.figures import box_figure, convergence_figure, series_figure, with_interval
from md.property_names import HEADINGS, answers, property_of, readable
from md.recording import build_topology, trajectory_path
from md.results import dynamics_folders
from md.run_folder import RunFolder
from md.run_length import ORDINARY_PRECISION, PRECISION, needed_ps, stage_of
from md.status import RunStatus, contents, run_of, run_status
from md.trajectory import ThermoSeries, Trajectory

FIGURE_BYTES = 2_000_000  # of all figures of a page; base64 makes a third more of it
PNG_COLOURS = 64
DPI = 130


@dataclass
class Picture:
    """A figure in the page: its PNG as base64 text, and a sentence on what it shows."""

    title: str
    caption: str
    data: str
    width: int
    height: int


@dataclass
class Row:
    """One estimate in the table, or several without a value for one reason: text as shown.

    kind  good, doubtful or none
    keys  names in properties.json
    """

    name: str
    keys: str
    value: str
    samples: str
    kind: str
    verdict: str
    notes: tuple[str, ...]


@dataclass
class Section:
    """One condition with one model; ``title`` is '' where the run has only one."""

    title: str
    config: RunConfig
    electrolyte: str
    amounts: list[tuple[str, str, str, str]]
    size: str
    properties: dict[str, Estimate]
    kinds: dict[str, str] = field(default_factory=dict)  # name of an estimate -> kind of its verdict
    groups: dict[str, list[Row]] = field(default_factory=dict)  # by heading
    compared: list[Comparison] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Album:
    """Turns figures into pictures until the page is full."""

    def __init__(self) -> None:
        self.n_bytes, self.full = 0, False

    def add(self, section: Section, figure: Figure | Path, *, title: str, caption: str) -> None:
        """Add a figure, or a PNG file, to a section; nothing once the page is full."""
        source: Path | io.BytesIO = io.BytesIO()
        if isinstance(figure, Path):
            source = figure
        else:
            figure.savefig(source, dpi=DPI)
        target = io.BytesIO()
        with Image.open(source) as image:
            # few colours: a third of the size, and lines and areas lose nothing
            small = image.convert("RGB").quantize(PNG_COLOURS, dither=Image.Dither.NONE)
            small.save(target, format="png", optimize=True)
            size = small.size
        self.n_bytes += target.tell()
        if self.n_bytes > FIGURE_BYTES:
            self.full = True
            return
        data = base64.b64encode(target.getvalue()).decode("ascii")
        section.pictures.append(Picture(title, caption, data, *size))


def write_report(folder: Path, *, output: Path | None = None) -> Path:
    """Write the report of a run and return its file.

    folder  of a run of one or several conditions or models, finished or not; or that of one condition
    output  default: report.html in the folder
    Raises InputError where the folder holds no run.
    """
    run = RunFolder(folder)
    config = protocol.resolve(run.read_config())
    status = run_status(folder)
    album = _Album()
    parts = list(_parts(run, config))
    sections = [_section(part, one, title=title, album=album) for title, part, one in parts]
    summaries: dict[Summary, list[str]] = {}
    for section in sections:
        if section.properties:
            summaries.setdefault(summary(section), []).append(section.title)
    page = _template().render(
        title=contents(config),
        summaries=summaries,
        command=run_of(folder / next(iter(config.each_member()))).manifest().get("command", ""),
        status=status,
        percent=f"{100.0 * status.progress:.0f}",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        folder=str(folder),
        pressure=f"{config.target_pressure / units.BAR:.4g} bar",
        progress=_stage_lines(config, status),
        sections=sections,
        overview=_overview(run, config, sections),
        models=[_model(RunFolder(folder / name)) for name in config.each_member()],
        facts=_facts(RunFolder(folder / next(iter(config.each_member())))),
        settings=dump_config(config),
        bibliography=bibliography(config),
        interval=with_interval,
        full=album.full,
    )
    path = output or folder / "report.html"
    write_text(path, page)
    return path


def read_properties(run: RunFolder) -> dict[str, Estimate]:
    """Return what properties.json holds, nothing where there is none yet."""
    if not run.properties.exists():
        return {}
    try:
        content = json.loads(run.properties.read_text(encoding="utf-8"))
        return {name: Estimate(**fields | {"warnings": tuple(fields["warnings"])}) for name, fields in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = "Write it again with `bamboo-md analyze`."
        raise InputError(f"{run.properties}: not a table of properties ({error}). {remedy}") from error


def verdict(estimate: Estimate, *, name: str, window: Window | None) -> tuple[str, str]:
    """Return good, doubtful or none, and in words whether a property is converged, else what run length would help.

    Errors fall with the square root of the length: length needed = length (stderr / (precision value))^2, where
    ``window`` tells the length. The precision stated is half the 95 % interval.
    """
    if estimate.value is None:
        reason = "; ".join(estimate.warnings) or "no reason given"
        return "none", reason if reason.startswith("not converged") else f"no value: {reason}"
    if not estimate.stderr or not math.isfinite(estimate.stderr):
        return "doubtful", "no error bar"
    if window is not None and not window.found:
        return "doubtful", f"not converged: the {window.judged} drifts to the end of {window.stage}"
    if estimate.value == 0.0:
        return "doubtful", "zero within its error bar"
    target = PRECISION.get(name, ORDINARY_PRECISION)
    relative = estimate.stderr / abs(estimate.value)
    if relative <= target:
        return "good", f"converged to ± {_percent(NORMAL_95 * relative)}"
    text = f"not converged: ± {_percent(NORMAL_95 * relative)}"
    if window is not None and window.length_ps > 0.0:
        needed = format_time(window.length_ps * (relative / target) ** 2)
        text += f"; about {needed} instead of {format_time(window.length_ps)} would give ± "
        text += _percent(NORMAL_95 * target)
    return "doubtful", text


def _percent(share: float) -> str:
    return f"{100.0 * share:.0f} %" if share >= 0.1 else f"{100.0 * share:.2g} %"


def _parts(run: RunFolder, config: RunConfig) -> Iterator[tuple[str, RunFolder, RunConfig]]:
    """Yield every condition of every model: its name, folder and configuration."""
    for member, one in config.each_member().items():
        for condition, alone in one.each_condition().items():
            title = "/".join(word for word in (member, condition) if word)
            yield title, RunFolder(run.path / member / condition), alone


def _section(part: RunFolder, config: RunConfig, *, title: str, album: _Album) -> Section:
    box = realise(config.what(), n_atoms=config.build.atoms)
    amounts = []
    for (name, unit), got in box.got.items():
        asked = box.asked.get((name, unit))
        unit = f"{unit} {box.litre}" if unit == "mol/L" else unit
        amounts.append((name, unit, "" if asked is None else f"{asked:.4g}", f"{got:.4g}"))
    replicas = f", {config.build.replicas} replicas" if config.build.replicas > 1 else ""
    section = Section(
        title=title,
        config=config,
        electrolyte=contents(config),
        amounts=amounts,
        size=f"{', '.join(f'{count} {name}' for name, count in box.counts.items())}; {box.n_atoms} atoms{replicas}",
        properties=read_properties(part),
    )
    try:
        _add_data(section, part, album=album, counts=box.counts)
    except InputError as error:  # data cut short or damaged: the rest of the report is still worth having
        section.problems.append(str(error))
    section.compared = comparisons(config, section.properties)
    measurable = [name for name in config.properties if name != "conductivity" or any(_charges(box.counts))]
    section.unmeasured = unmeasured(config, measurable)
    _add_rows(section)
    return section


def _charges(counts: Mapping[str, int]) -> list[int]:
    return [molecule(name).charge for name in counts]


def _add_rows(section: Section) -> None:
    windows = {window.judged: window for window in section.windows}
    missing: dict[tuple[str, str], list[str]] = {}
    for name, estimate in section.properties.items():
        heading = HEADINGS[property_of(name)]
        rows = section.groups.setdefault(heading, [])
        window = windows.get("density" if name in CONSTANT_PRESSURE else "potential energy")
        kind, text = verdict(estimate, name=name, window=window)
        section.kinds[name] = kind
        if kind == "none":
            missing.setdefault((heading, text), []).append(name)
            continue
        samples = "" if estimate.n_effective is None else f"{estimate.n_effective:.0f}"
        notes = (*estimate.warnings, f"method: {estimate.method}") if estimate.method else estimate.warnings
        rows.append(Row(readable(name), name, with_interval(estimate), samples, kind, text, notes))
    for (heading, text), names in missing.items():
        title = "; ".join(readable(name) for name in names)
        section.groups[heading].append(Row(title, ", ".join(names), "no value", "", "none", text, ()))


@dataclass(frozen=True)
class Summary:
    """What the top of the page says of the properties: whether all have a value, in words, and how to go on."""

    complete: bool
    text: str
    remedy: str


def summary(section: Section) -> Summary:
    """Return how many properties of a condition have a value, which are not converged, and which stage to lengthen."""
    states = {name: _state(name, section) for name in section.config.properties}
    n_values = sum(state in ("converged", "wide") for state in states.values())
    parts = [f"{n_values} of {len(states)} properties have a value"]
    words = {"short": "too short, see below", "wide": "wide error bars", "none": "no value, see below"}
    for state, what in words.items():
        names = [_plain(name) for name, one in states.items() if one == state]
        if names:
            parts.append(f"{', '.join(names)}: {what}")
    wanting: list[Property] = [name for name, state in states.items() if state in ("short", "wide")]
    return Summary(set(states.values()) == {"converged"}, "; ".join(parts), _remedy(wanting, section.config))


def _plain(name: Property) -> str:
    return "dielectric constant" if name == "dielectric" else name


def _state(name: Property, section: Section) -> str:
    """Return converged, wide (values with doubt), short (a longer run would give one) or none."""
    found = answers(name, section.properties)
    kinds = {section.kinds[one] for one in found} - {"none"}
    if kinds:
        return "converged" if kinds == {"good"} else "wide"
    reasons = [warning for one in found for warning in section.properties[one].warnings[:1]]
    return "short" if any(reason.startswith("not converged") for reason in reasons) else "none"


def _remedy(wanting: Sequence[Property], config: RunConfig) -> str:
    """Return what to change in the stages of a finished run, '' where nothing is wanting.

    A run goes on from its end (``run_folder.differences``): its last stage may become longer, or others may follow.
    """
    ions = any(_charges(realise(config.what(), n_atoms=config.build.atoms).counts))
    lengths: dict[int, float] = {}
    for name in wanting:
        if found := stage_of(name, config):
            index, stage = found
            needed = needed_ps(name, ions=ions, replicas=config.build.replicas)
            had = stage.time / units.PICOSECOND
            # where the rule was too optimistic, twice as long
            lengths[index] = max(lengths.get(index, 0.0), needed if needed > had else 2.0 * had)
    if not lengths:
        return ""
    last = len(config.stages) - 1
    if set(lengths) == {last}:
        stage_name = protocol.stage_name(last, config.stages[last])
        return f"Set the time of the last stage, {stage_name}, to {format_time(lengths[last])}"
    added = []
    for index in sorted(lengths | ({last: 0.0} if isinstance(config.stages[last], NVT) else {})):
        again = config.stages[index]
        planned = 0.0 if isinstance(again, Minimise) else again.time / units.PICOSECOND
        mean = ", volume: mean" if isinstance(again, NVT) and again.volume == "mean" else ""
        length = format_time(lengths.get(index, 0.0) or planned)
        added.append(f"{{kind: {again.kind}, time: {length}{mean}}}")
    return f"Add at the end of the stages: {', then '.join(added)}"


def _add_data(section: Section, part: RunFolder, *, album: _Album, counts: dict[str, int]) -> None:
    """Add what the files of a condition show: the box, the series, the running estimates, the figures."""
    config = section.config
    stages = [(path.name, path) for _, path in dynamics_folders(part, config)]
    series = [(name, ThermoSeries.read(path / "thermo.h5")) for name, path in stages]
    series = [(name, thermo) for name, thermo in series if thermo.n_samples > 1]
    _add_box(section, part, [path for _, path in stages], album=album, counts=counts)
    if not series:
        return
    npt, used = density_window(part, config), production_window(part, config)
    section.windows = [found[1] for found in (npt, used) if found is not None]
    n_atoms = realise(config.what(), n_atoms=config.build.atoms).n_atoms
    figure = series_figure(series, section.windows, n_atoms=n_atoms)
    caption = "Grey: not used. " + ". ".join(str(window) for window in section.windows)
    album.add(section, figure, title="The run in time", caption=caption + ".")
    if points := running_estimates(config, npt=npt, used=used):
        figure = convergence_figure(points, section.properties)
        caption = (
            "What the same analysis says of the first part of the data, with 95 % intervals; line: the final value."
        )
        album.add(section, figure, title="Convergence", caption=caption)
    for name, caption in _FIGURES.items():
        for path in sorted(part.figures.glob(f"{name}.png")):
            album.add(section, path, title=path.stem, caption=caption)


_FIGURES = {
    "viscosity": "Running Green-Kubo integral: it should reach a plateau at the value.",
    "msd": "Mean squared displacements: diffusion is where they run parallel to the dotted line of slope 1.",
    "rdf-*": "Oxygen around the cation: radial distribution and, to the right, the running coordination number.",
}


def _add_box(
    section: Section, part: RunFolder, stages: Sequence[Path], *, album: _Album, counts: dict[str, int]
) -> None:
    """Add a picture of the last frame there is, else of the box as packed."""
    for path in reversed(stages):
        if not trajectory_path(path, 0).exists():
            continue
        trajectory = Trajectory.read(trajectory_path(path, 0))
        if trajectory.n_frames and trajectory.cells is not None:
            last = trajectory.n_frames - 1
            positions = trajectory.read_positions(slice(last, last + 1))[0]
            figure = box_figure(trajectory.topology, positions, trajectory.cells[last])
            caption = f"{path.name} at {format_time(float(trajectory.time_ps[last]))}; hydrogen is left out."
            album.add(section, figure, title="The box", caption=caption)
            return
    if part.start.exists():
        (atoms,) = ase.io.read(part.start, index=slice(0, 1), format="extxyz")
        system = System.from_atoms(atoms)
        figure = box_figure(build_topology(system, counts), system.positions, system.cell)
        album.add(section, figure, title="The box", caption="As packed; hydrogen is left out.")


def _overview(run: RunFolder, config: RunConfig, sections: Sequence[Section]) -> dict[str, Any] | None:
    """Return the table of all conditions and models: columns, and for each property a cell in each."""
    if len(sections) < 2:
        return None
    columns: dict[str, Mapping[str, Estimate]] = {section.title: section.properties for section in sections}
    if config.model.committee:
        every = read_properties(run)
        for condition in config.each_condition():
            prefix = f"{condition}/" if condition else ""
            means = {name.removeprefix(prefix): e for name, e in every.items() if name.startswith(prefix)}
            columns[f"mean of models {condition}".strip()] = means
    names = dict.fromkeys(name for found in columns.values() for name, e in found.items() if e.value is not None)
    rows = {readable(name): [_cell(found.get(name)) for found in columns.values()] for name in names}
    return {"columns": list(columns), "rows": rows}


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return "–"
    spread = estimate.spread_over_models
    return with_interval(estimate) + ("" if spread is None else f"; spread over models {spread:.2g}")


def _stage_lines(config: RunConfig, status: RunStatus) -> list[tuple[str, str, bool]]:
    """Return every stage: its name, what it does, and whether it is the one the run is at."""
    lines = []
    for index, stage in enumerate(config.stages):
        name = protocol.stage_name(index, stage)
        if isinstance(stage, Minimise):
            what = f"at most {stage.steps} steps"
        else:
            what = f"{stage.kind}, {format_time(stage.time / units.PICOSECOND)}"
        lines.append((name, what, status.stage.endswith(name)))
    return lines


def _model(member: RunFolder) -> dict[str, Any]:
    """Return what the manifest tells of a model, and what its card warns of."""
    record = dict(run_of(member.path).manifest().get("model", {}))
    try:
        path = Path(str(record.get("file", "")))
        if not path.is_file():
            record["caveat"] = "The model file is not at hand, so its card is not shown."
        elif file_sha256(path) != record.get("sha256"):
            record["caveat"] = "The model file has changed since, so its card is not shown."
        else:
            card = describe(path).get("card", {})
            record["caveat"] = card.get("caveat") or "The model's card states no caveat."
            record["description"] = card.get("description", "")
    except (BambooError, OSError) as error:
        record["caveat"] = f"The model file cannot be read: {error}"
    return record


def _facts(member: RunFolder) -> list[tuple[str, str]]:
    """Return the rest of the manifest as a table."""
    manifest = run_of(member.path).manifest()
    names = ("command", "started", "updated", "platform", "seed")
    facts = [(name, str(manifest[name])) for name in names if manifest.get(name) is not None]
    return facts + [(f"version of {name}", str(text)) for name, text in manifest.get("versions", {}).items()]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
