"""How a property with its error bar reads."""

import json

import pytest

from md.analysis.estimate import Estimate, format_time, no_value, with_precision_advice


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (1.28412, 0.00312, "1.284 ± 0.003 g/cm3 (N_eff 41)"),
        (3.4312, 0.0142, "3.431 ± 0.014 g/cm3 (N_eff 41)"),
        (298.2, 13.0, "298 ± 13 g/cm3 (N_eff 41)"),
        (2.31e-6, 4.2e-8, "(2.31 ± 0.04)e-06 g/cm3 (N_eff 41)"),
        (-0.2, 0.96, "-0.2 ± 1.0 g/cm3 (N_eff 41)"),
        (0.0, 0.02, "0.00 ± 0.02 g/cm3 (N_eff 41)"),
    ],
)
def test_digits_follow_the_error(value: float, stderr: float, text: str) -> None:
    assert str(Estimate(value, stderr, "g/cm3", 41.2, "mean")) == text


def test_a_missing_value_says_why() -> None:
    estimate = no_value("not converged: run about 3.2 ns", unit="mPa s", method="Green-Kubo")
    assert str(estimate) == "no value: not converged: run about 3.2 ns"
    assert estimate.interval() is None
    assert json.loads(json.dumps(estimate.to_dict())) == {
        "value": None,
        "stderr": None,
        "unit": "mPa s",
        "n_effective": None,
        "method": "Green-Kubo",
        "warnings": ["not converged: run about 3.2 ns"],
    }


def test_interval_is_the_error_times_the_normal_quantile() -> None:
    assert Estimate(1.0, 0.5, "", 10.0, "mean").interval() == pytest.approx((0.02, 1.98), abs=1.0e-4)


def test_length_for_a_precision() -> None:
    """Errors fall with the square root: from 20 % to 10 % takes four times the length, so three more."""
    advised = with_precision_advice(Estimate(2.0, 0.4, "mPa s", 9.0, "x"), length_ps=1000.0)
    assert advised.warnings == ("standard error 20% of the value: run about 3 ns more for 10%",)
    precise = Estimate(2.0, 0.1, "mPa s", 9.0, "x")
    assert with_precision_advice(precise, length_ps=1000.0) is precise


def test_times_read_in_their_unit() -> None:
    times = [format_time(time_ps) for time_ps in (0.005, 1.25, 320.0, 3210.0, 4.0e6)]
    assert times == ["5 fs", "1.2 ps", "320 ps", "3.2 ns", "4 µs"]
