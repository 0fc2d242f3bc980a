"""From the files of a run to its properties: which stage answers which question, and how the answers are shown."""

import json
import math
from pathlib import Path

from md import protocol
from md.analysis.density import density
from md.analysis.estimate import Estimate, format_time, no_value
from md.analysis.statistics import equilibration_start
from md.config import NPT, Minimise, RunConfig
from md.run_folder import RunFolder
from md.trajectory import ThermoSeries


def dynamics_folders(folder: RunFolder, config: RunConfig) -> list[tuple[protocol.Dynamics, Path]]:
    """Return the stages of dynamics that have written results, in order, each with its folder."""
    stages = [
        (stage, folder.stage(protocol.stage_name(index, stage)))
        for index, stage in enumerate(config.stages)
        if not isinstance(stage, Minimise)
    ]
    return [(stage, path) for stage, path in stages if (path / "thermo.h5").exists()]


def analyse(folder: RunFolder, config: RunConfig) -> dict[str, Estimate]:
    """Return the properties that were asked for, each a value with its error bar or the reason why there is none."""
    ran = dynamics_folders(folder, config)
    properties: dict[str, Estimate] = {}
    if "density" in config.properties:
        npt = [path for stage, path in ran if isinstance(stage, NPT)]
        if npt:
            properties |= density(ThermoSeries.read(npt[-1] / "thermo.h5"))
        else:
            properties["density"] = no_value("there is no npt stage", unit="g/cm3", method="NPT average")
    return properties


def mean_volume(folder: Path) -> tuple[float, str]:
    """Return the mean volume [Å^3] of an NPT stage after equilibration, and a sentence on how good it is.

    A transport run needs a volume whatever happens: where the density still drifts, the second half is taken.
    """
    series = ThermoSeries.read(folder / "thermo.h5")
    start = equilibration_start(series.density_g_cm3.T)
    length = format_time(series.n_samples * series.interval_ps)
    if start is None:
        half = series.n_samples // 2
        return float(series.volume[half:].mean()), f"mean of the second half of {length} NPT, not equilibrated"
    discarded = format_time(start * series.interval_ps) if start else "nothing"
    return float(series.volume[start:].mean()), f"mean of {length} NPT, {discarded} discarded"


def write_properties(folder: RunFolder, properties: dict[str, Estimate]) -> None:
    """Write properties.json."""
    content = {name: _finite(estimate.to_dict()) for name, estimate in properties.items()}
    folder.properties.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def property_table(properties: dict[str, Estimate]) -> list[str]:
    """Return one line per property: value with error bar, or "not converged" with the reason; warnings beneath."""
    if not properties:
        return ["no properties asked for"]
    width = max(len(name) for name in properties) + 2
    lines = []
    for name, estimate in properties.items():
        first, *rest = estimate.warnings if estimate.value is None else ("", *estimate.warnings)
        shown = f"no value: {first}" if estimate.value is None else str(estimate)
        lines.append(f"{name:<{width}s}{shown}")
        lines += [f"{'':<{width}s}  {warning}" for warning in rest]
    return lines


def _finite(fields: dict[str, object]) -> dict[str, object]:
    """JSON knows no NaN: what is not a number becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
