"""A model file on one screen: what it is for, what it learnt from, how wrong it is."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bamboo.checkpoint import describe, resolve, zoo
from bamboo.files import file_sha256
from bamboo.units import KCAL_PER_MOL

WIDTH = 100
ROWS = {"aligned": "it was aligned to", "held_out": "it was not"}  # of the alignment's mean errors


def model_card(name: str) -> str:
    """Return the card of a model for people; ModelFileError and InputError for what is none. Missing keys are left out.

    name  of the zoo, or a file
    """
    header, path = describe(name), resolve(name)
    card = header.get("card", {})
    entries = {
        "file": str(path),
        "sha256": file_sha256(path),
        "elements": " ".join(header["elements"]),
        "molecules": ", ".join(card.get("molecules", ())),
        "learnt from": "; ".join(dict.fromkeys(card.get("levels", ()))),
        "frames": ", ".join(f"{count} {group}" for group, count in card.get("frames", {}).items()),
        "force error": _force_errors(card),
        "alignment": _alignment(card.get("alignment", {})),
    }
    paragraphs = [_filled(text) for text in (card.get("description"), card.get("caveat")) if text]
    rows = [_filled(text, title=key) for key, text in entries.items() if text]
    return "\n".join([*(f"{text}\n" for text in paragraphs), *rows, "everything else: --json"])


def model_lines() -> list[str]:
    """Return a line for each model of the zoo: its names, its elements, what it learnt from and is for."""
    names: dict[Path, list[str]] = {}
    for name, path in zoo().items():
        names.setdefault(path, []).append(name)
    lines = []
    for path, (name, *aliases) in names.items():
        header = describe(path)
        title = name + (f" ({', '.join(aliases)})" if aliases else "")
        lines.append(f"{title:<20s} {' '.join(header['elements'])}  {_purpose(header.get('card', {}))}")
    return lines


def _purpose(card: Mapping[str, Any]) -> str:
    levels = list(card.get("levels", ()))
    origin = f"learnt from {levels[0].split(',')[0]}" if levels else "of unknown origin"
    if "alignment" in card:
        return f"{origin}, aligned to measured densities: for liquids"
    return f"{origin}, not aligned: to train or align from"


def _force_errors(card: Mapping[str, Any]) -> str:
    """Return the error of the forces on the frames held out, pooled and by group."""
    errors = [(group, found.get("forces")) for group, found in card.get("held_out", {}).items()]
    parts = [f"{error / KCAL_PER_MOL:.2f} {group}" for group, error in errors if error is not None]
    if pooled := card.get("held_out_force_rmse_kcal_mol_A"):
        parts.insert(0, f"{pooled:.2f} pooled without hot frames")
    return f"{', '.join(parts)} (kcal/mol/Å, component RMSE of frames held out)" if parts else ""


def _alignment(alignment: Mapping[str, Any]) -> str:
    found = alignment.get("mean_absolute_density_error_g_cm3", {})
    parts = [
        f"{errors['before']:.3f} before, {errors['after']:.3f} after "
        f"for the {len(alignment[key]['after'])} liquids {what}"
        for key, what in ROWS.items()
        if (errors := found.get(key))
    ]
    return f"mean absolute error of the density, g/cm3: {'; '.join(parts)}" if parts else ""


def _filled(text: str, *, title: str = "") -> str:
    start = f"{title:<12s} " if title else ""
    return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False)
