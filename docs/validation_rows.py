"""One row of the validation page."""

Row = dict[str, str]


def row(check: str, measured: str, expected: str, *, passed: bool) -> Row:
    return {"check": check, "measured": measured, "expected": expected, "verdict": "yes" if passed else "NO"}
