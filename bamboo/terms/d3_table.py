"""The dispersion coefficients of our own models: D3 values, one C6 and one radius per element.

The numbers are in ``d3_table.json`` with their provenance; ``data/dispersion/make_d3_table.py`` makes them.
"""

import json
from collections.abc import Iterable
from importlib.resources import files

import torch

from bamboo.elements import numbers_of
from bamboo.errors import InputError
from bamboo.terms.dispersion import Dispersion


def d3_elements() -> list[str]:
    """Return the symbols of the elements in the table; all others are left without dispersion."""
    return list(_elements())


def fill_d3_table(dispersion: Dispersion, *, elements: Iterable[str] = ()) -> None:
    """Fill ``dispersion.c6`` [eV Å^6] and ``dispersion.radius`` [Å], R_ij = sqrt(R_i R_j), in place.

    Alkali cations have C6 = 0: D3 describes the neutral atoms. Elements that the table lacks are left without
    dispersion; InputError where one of the ``elements`` of the model is among them.
    """
    table = _elements()
    if missing := sorted(set(elements) - set(table)):
        raise InputError(
            f"The dispersion table holds {', '.join(sorted(table))}, but not {', '.join(missing)}: without C6 they "
            "would not attract. Add molecules with them to data/dispersion/make_d3_table.py or drop them from the data."
        )
    numbers = torch.tensor(numbers_of(table))
    c6 = torch.tensor([row["c6"] for row in table.values()], dtype=torch.float64)
    radius = torch.tensor([row["radius"] for row in table.values()], dtype=torch.float64)
    dispersion.c6.zero_()
    dispersion.radius.fill_(1.0)
    dispersion.c6[numbers] = c6.to(dispersion.c6.device)
    pair_radius = (radius[:, None] * radius[None, :]).sqrt()
    dispersion.radius[numbers[:, None], numbers[None, :]] = pair_radius.to(dispersion.radius.device)


def _elements() -> dict[str, dict[str, float]]:
    text = (files("bamboo.terms") / "d3_table.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, float]] = json.loads(text)["elements"]
    return table
