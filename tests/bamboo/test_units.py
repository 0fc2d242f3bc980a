"""Conversion factors against the defining constants of the SI."""

import math

import pytest

from bamboo import units

# exact since 2019; ase.units follows CODATA 2014, which differs by up to 4e-7
CHARGE, AVOGADRO, BOLTZMANN = 1.602176634e-19, 6.02214076e23, 1.380649e-23
SMALL = 5e-7


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (units.KCAL_PER_MOL, 4184.0 / (AVOGADRO * CHARGE)),
        (units.KJ_PER_MOL, 1000.0 / (AVOGADRO * CHARGE)),
        (units.BOLTZMANN, BOLTZMANN / CHARGE),
        (units.HARTREE, 27.211386245988),
        (units.BOHR, 0.529177210903),
        (units.DEBYE, 1e-21 / 299792458 / CHARGE * 1e10),
        (units.COULOMB_CONSTANT, 8.9875517923e9 * CHARGE * 1e10),
        (units.PASCAL, 1e-30 / CHARGE),
        (units.BAR, 1e5 * 1e-30 / CHARGE),
        (units.GRAM_PER_CM3, 1e-24 * AVOGADRO),
        (units.NANOMETRE, 10.0),
        (units.CENTIMETRE, 1e8),
    ],
)
def test_against_codata(factor, expected):
    assert factor == pytest.approx(expected, rel=SMALL)


def test_time_follows_from_length_energy_and_mass():
    amu = 1e-3 / AVOGADRO
    internal = 1e-10 * math.sqrt(amu / CHARGE)  # s
    assert 1e-15 / internal == pytest.approx(units.FEMTOSECOND, rel=SMALL)
    assert units.PICOSECOND == 1e3 * units.FEMTOSECOND
    assert units.NANOSECOND == 1e6 * units.FEMTOSECOND
    assert pytest.approx(1e15 * units.FEMTOSECOND) == units.SECOND


def test_viscosity_and_conductivity():
    """1 mPa s = 1e-3 N s / m^2 and 1 mS/cm = 0.1 A / (V m), written in Å, eV, amu, e."""
    assert pytest.approx(1e-3 * units.PASCAL * units.SECOND) == units.MILLIPASCAL_SECOND
    current = 1.0 / (CHARGE * units.SECOND)  # one ampere in e per internal time
    assert pytest.approx(0.1 * current / 1e10, rel=SMALL) == units.MILLISIEMENS_PER_CENTIMETRE


def test_ideal_gas_molar_volume():
    """k T / P at 273.15 K and 1 bar is 22.711 litres per mole."""
    volume = units.BOLTZMANN * 273.15 / units.BAR  # Å^3 per molecule
    assert volume / units.CENTIMETRE**3 * AVOGADRO == pytest.approx(22711.0, rel=1e-4)


def test_diffusion_coefficient_of_water():
    diffusion = 2.3e-5 * units.CM2_PER_SECOND
    assert diffusion * units.PICOSECOND == pytest.approx(0.23, rel=1e-9)  # Å^2/ps
