"""What an alignment did to densities: as a table, as one number, as a picture."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from md.analysis.estimate import NORMAL_95

MOMENTS = (("before", "o", "none", "0.55"), ("after", "s", "C0", "C0"))


def measurement_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return measured liquids as a table; pressures in bar, densities in g/cm3."""
    lines = [f"{'liquid':<44}{'rho exp':>9}{'P at rho exp':>20}{'density error':>22}  how"]
    for row in rows:
        pressure = f"{row['pressure_bar']:.0f} ± {row['pressure_stderr_bar']:.0f}" if "pressure_bar" in row else "-"
        error = f"{row['density_error']:+.4f} ± {row['density_stderr']:.4f}"
        drift = "; still drifts" if row["drifts"] else ""
        lines.append(f"{row['name']:<44}{row['density_measured']:>9.4f}{pressure:>20}{error:>22}  {row['how']}{drift}")
    return "\n".join(lines)


def mean_absolute_error(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean absolute density error [g/cm3], nan for no rows."""
    return float(np.mean([abs(row["density_error"]) for row in rows])) if rows else math.nan


def density_figure(report: Mapping[str, Any]) -> Figure:
    """Draw the density errors [g/cm3] of all liquids of a report of ``bamboo-md align``, with 95 % intervals.

    Liquids that were never aligned to stand above a line. What was not simulated with the parent has no point "before".
    """
    parts: dict[str, Mapping[str, Sequence[Mapping[str, Any]]]] = {
        part: report[part] for part in ("aligned", "held_out")
    }
    names = [row["name"] for part in parts.values() for row in part["after"]]
    figure = Figure(figsize=(8.0, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0.0, color="0.8", lw=0.8)
    for moment, marker, face, colour in MOMENTS:
        rows = [row for part in parts.values() for row in part[moment]]
        axes.errorbar(
            [row["density_error"] for row in rows],
            [names.index(row["name"]) for row in rows],
            xerr=[NORMAL_95 * row["density_stderr"] for row in rows],
            fmt=marker,
            markerfacecolor=face,
            color=colour,
            label=f"{moment} alignment",
        )
    n_aligned = len(parts["aligned"]["after"])
    if len(names) > n_aligned:
        axes.axhline(n_aligned - 0.5, color="0.5", lw=0.8, ls="--")
        axes.text(
            0.01, n_aligned - 0.4, "never aligned to", transform=axes.get_yaxis_transform(), va="bottom", fontsize=8
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("simulated minus measured density / g/cm³ (95 %)")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure
