"""``Estimate``: a property with its error bar, or the reason why there is none."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

NORMAL_95 = 1.959964  # 97.5 % quantile of the normal distribution
LARGEST_RELATIVE_ERROR = 0.5  # of a transport coefficient; above, the run is too short to report one


@dataclass(frozen=True)
class Estimate:
    """One property: its value, how well it is known, and how it was obtained.

    value        in ``unit``, or None where the run does not support one; ``warnings`` then starts with the reason
    stderr       half the 95 % confidence interval / 1.96, in ``unit``. It is widened by Student's t where the error bar
                 itself rests on few samples, so that value ± 1.96 stderr covers the truth in 95 % of runs.
    n_effective  number of independent samples behind the value
    method       how it was computed, for a reader
    warnings     what a reader must know before using the number
    spread_over_models  standard deviation of the value over a committee of models; None where one model was used. It
                 tells of the force field what ``stderr`` tells of the sampling, whose scatter it contains
    """

    value: float | None
    stderr: float | None
    unit: str
    n_effective: float | None
    method: str
    warnings: tuple[str, ...] = ()
    spread_over_models: float | None = None

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval in ``unit``, or None where there is no value or no error bar."""
        if self.value is None or self.stderr is None:
            return None
        return self.value - NORMAL_95 * self.stderr, self.value + NORMAL_95 * self.stderr

    def with_warning(self, text: str) -> "Estimate":
        """Return the same with one more warning."""
        return replace(self, warnings=(*self.warnings, text))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; the spread over models only where there is one."""
        fields = asdict(self) | {"warnings": list(self.warnings)}
        if self.spread_over_models is None:
            del fields["spread_over_models"]
        return fields

    def __str__(self) -> str:
        if self.value is None:
            return f"no value: {'; '.join(self.warnings)}"
        spread = "" if self.spread_over_models is None else f", spread over models {self.spread_over_models:.2g}"
        if not self.stderr or not math.isfinite(self.stderr):
            return f"{self.value:.4g} {self.unit}".strip() + spread
        text = f"{format_with_error(self.value, self.stderr)} {self.unit}".strip()
        return text + spread if self.n_effective is None else f"{text} (N_eff {self.n_effective:.0f}){spread}"


def format_with_error(value: float, stderr: float) -> str:
    """Return "value ± stderr", rounded to the first digit of the error, to two digits where that digit is 1.

    Very large and very small numbers share one power of ten: "(2.31 ± 0.04)e-06".
    """
    exponent = math.floor(math.log10(max(abs(value), stderr)))
    shared = exponent if exponent < -3 or exponent > 4 else 0
    value, stderr = value / 10.0**shared, stderr / 10.0**shared
    leading = math.floor(math.log10(stderr))
    decimals = max(0, -leading + (1 if stderr / 10.0**leading < 1.95 else 0))
    text = f"{value:.{decimals}f} ± {stderr:.{decimals}f}"
    return f"({text})e{shared:+03d}" if shared else text


def no_value(reason: str, *, unit: str, method: str, n_effective: float | None = None) -> Estimate:
    """Return an estimate without a value, carrying the reason."""
    return Estimate(value=None, stderr=None, unit=unit, n_effective=n_effective, method=method, warnings=(reason,))


def format_time(time_ps: float) -> str:
    """Return a time to two digits in the unit a reader expects: fs, ps, ns or µs."""
    for unit, size_ps in (("µs", 1.0e6), ("ns", 1.0e3), ("ps", 1.0)):
        if time_ps >= size_ps:
            return f"{float(f'{time_ps / size_ps:.2g}'):g} {unit}"
    return f"{float(f'{time_ps * 1.0e3:.2g}'):g} fs"


def with_precision_advice(estimate: Estimate, *, length_ps: float, target: float = 0.1) -> Estimate:
    """Add how much longer to run where the relative standard error exceeds ``target``.

    Errors fall with the square root of the run length: length needed = length (stderr / (target value))^2.
    """
    if not estimate.value or not estimate.stderr:
        return estimate
    relative = estimate.stderr / abs(estimate.value)
    if relative <= target:
        return estimate
    further = length_ps * ((relative / target) ** 2 - 1.0)
    advice = f"standard error {relative:.0%} of the value: run about {format_time(further)} more for {target:.0%}"
    return estimate.with_warning(advice)
