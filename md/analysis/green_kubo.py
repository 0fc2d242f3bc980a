"""Transport coefficients as integrals of autocorrelation functions, estimated by STACIE."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtr, chdtrc

from bamboo import units
from md.analysis.estimate import LARGEST_RELATIVE_ERROR, Estimate, format_time, no_value, with_precision_advice
from md.trajectory import ThermoSeries

LONGEST_INTERVAL_PS = 0.01  # molecules vibrate: coarser sampling aliases the vibrations to zero frequency
MIN_CORRELATION_TIMES = 10.0
SEGMENT = 500.0  # correlation times: some 80 spectral points below 1 / (2 pi tau), where the spectrum turns
FEWEST_SAMPLES = 200
LOWEST_POINTS = 15  # at the low end of the spectrum; STACIE fits no fewer
REJECTION = 1.0e-4  # probability at which the lowest frequencies contradict a fit


def series_objection(thermo: ThermoSeries, quantity: str) -> str | None:
    """Why Green-Kubo integrals cannot be taken from this series, or None where they can."""
    if objection := thermo.ensemble.transport_objection:
        return f"refused: {objection}"
    if thermo.interval_ps > LONGEST_INTERVAL_PS * 1.001:
        return f"{quantity} sampled every {thermo.interval_ps * 1000.0:g} fs, Green-Kubo needs 10 fs or less"
    return None


def green_kubo(
    sequences: NDArray[np.float64], prefactor: float, *, interval_ps: float, unit: str, unit_size: float,
    models: tuple[str, ...],
) -> Estimate:  # fmt: skip
    """Return prefactor * integral_0^inf <x(0) x(t)> dt, averaged over independent sequences.

    sequences (n_replicas, n_components, n_samples) of zero mean, internal units, sampled every ``interval_ps``;
    unit_size is the size of ``unit`` in internal units; models are the shapes of the spectrum at low frequency that
    are tried: "lorentz" (a maximum at zero: correlations decay with one sign), "debye" (a minimum: carriers rattle).

    The integral is half the power spectrum at zero frequency. STACIE fits the low-frequency spectrum up to cutoffs that
    it weights by how well the fit holds, and gives the standard error (Toraman, Fauconnier, Verstraelen, J. Chem. Inf.
    Model. 65, 10445 (2025)). Long runs are cut into segments first: within one long spectrum, the points that STACIE
    looks at would all lie far below the frequency it has to resolve. No value where the run is shorter than ten
    correlation times, the error exceeds half the value, or the lowest frequencies of the whole run contradict the fit.
    """
    method = "Green-Kubo, STACIE"
    n_samples = sequences.shape[2]
    length_ps = n_samples * interval_ps
    if n_samples < FEWEST_SAMPLES or not sequences.any():
        what = "the series is zero" if n_samples >= FEWEST_SAMPLES else f"only {n_samples} samples"
        return no_value(f"not converged: {what}", unit=unit, method=method)
    flat = sequences.reshape(-1, n_samples)
    spectrum = _spectrum(flat, prefactor, interval_ps=interval_ps, n_segments=1)
    segment_ps = SEGMENT * _turning_time_ps(spectrum)
    n_segments = max(1, int(min(length_ps / segment_ps, n_samples / FEWEST_SAMPLES)))
    result = _fit(_spectrum(flat, prefactor, interval_ps=interval_ps, n_segments=n_segments), models)
    if result is None:
        failure = f"not converged: no low-frequency plateau in the spectrum of {format_time(length_ps)}; run longer"
        return no_value(failure, unit=unit, method=method)
    value, stderr, tau_ps = result.acint / unit_size, result.acint_std / unit_size, result.corrtime_exp
    n_effective = float(result.neff) * len(flat) * n_segments
    reason: str | None = None
    if length_ps < MIN_CORRELATION_TIMES * tau_ps:
        reason = (
            f"{format_time(length_ps)} is shorter than ten correlation times of {format_time(tau_ps)}: "
            f"run about {format_time(2.0 * MIN_CORRELATION_TIMES * tau_ps)}"
        )
    elif _contradicts(spectrum, result):
        reason = (
            f"the slowest motions of the {format_time(length_ps)} contradict the fit, {value:.3g} {unit}: "
            f"run at least {format_time(4.0 * length_ps)}"
        )
    elif not stderr < LARGEST_RELATIVE_ERROR * value:
        needed_ps = length_ps * (stderr / (0.1 * value)) ** 2
        reason = f"{value:.3g} ± {stderr:.2g} {unit}: run about {format_time(needed_ps)} for 10%"
    if reason is not None:
        return no_value(f"not converged: {reason}", unit=unit, method=method, n_effective=n_effective)
    notes = [
        f"STACIE: {name} z-score {score:.1f}, ideally below 2: the fitted shape is doubtful"
        for name in ("cost", "criterion")
        if (score := float(result.props[f"{name}_zscore"])) > 2.0
    ]
    estimate = Estimate(value, stderr, unit, n_effective, f"{method} ({result.model.name})", tuple(notes))
    return with_precision_advice(estimate, length_ps=length_ps)


def _spectrum(flat: NDArray[np.float64], prefactor: float, *, interval_ps: float, n_segments: int) -> Any:
    """Power spectrum of the sequences cut into segments; time in ps, amplitudes in internal units of the integral."""
    from stacie import compute_spectrum  # imported here: it loads matplotlib, and only transport needs it

    segment = flat.shape[1] // n_segments
    pieces = flat[:, : n_segments * segment].reshape(-1, segment)
    return compute_spectrum(
        pieces, prefactors=prefactor * units.PICOSECOND, timestep=interval_ps, include_zero_freq=True
    )


def _turning_time_ps(spectrum: Any) -> float:
    """Return 1 / (2 pi f) for the frequency where the spectrum leaves half to twice its level at zero.

    For a Lorentzian this is its correlation time, within the octaves over which the spectrum is averaged against noise.
    """
    amplitudes = spectrum.amplitudes[1:]
    n_octaves = int(np.log2(len(amplitudes) / LOWEST_POINTS))
    edges = np.concatenate([[0], LOWEST_POINTS * 2 ** np.arange(n_octaves + 1)])
    means = np.add.reduceat(amplitudes, edges)[:-1] / np.diff(edges)
    outside = np.flatnonzero(np.abs(np.log2(means / means[0])) > 1.0)
    return float(0.5 / np.pi / spectrum.freqs[edges[outside[0] if len(outside) else -1]])


def _fit(spectrum: Any, models: tuple[str, ...]) -> Any:
    """Return STACIE's result for the model with the best cutoff criterion, or None where no model fits."""
    from stacie import DebyeModel, LorentzModel, estimate_acint

    results = []
    for name in models:
        model = {"lorentz": LorentzModel, "debye": DebyeModel}[name]()
        with warnings.catch_warnings():
            # rounding inside the optimiser; what a failed fit means is decided on the results
            warnings.simplefilter("ignore")
            try:
                # four times STACIE's default spacing of cutoffs: answers agree to 0.1 % in a third of the time
                results.append(estimate_acint(spectrum, model, fcut_spacing=2.0))
            except (ValueError, RuntimeError, np.linalg.LinAlgError):
                continue  # no cutoff at which this model fits
    finite = [result for result in results if np.isfinite(result.acint_std) and result.acint > 0.0]
    return min(finite, key=lambda result: min(p["criterion"] for p in result.history), default=None)


def _contradicts(spectrum: Any, result: Any) -> bool:
    """Whether the lowest frequencies of the whole run are improbable under the fitted model.

    amplitude / model is chi-squared distributed with ndofs degrees of freedom, divided by them. A slow mode that the
    fit has taken for noise stands out in the first points; a correlation that turns negative late is missing there.
    """
    model = result.model.compute(spectrum.freqs[:LOWEST_POINTS], result.props["pars"])[0]
    ndofs = spectrum.ndofs[:LOWEST_POINTS]
    chi2, freedom = np.cumsum(ndofs * spectrum.amplitudes[:LOWEST_POINTS] / model), np.cumsum(ndofs)
    return bool((np.minimum(chdtr(freedom, chi2), chdtrc(freedom, chi2)) < REJECTION).any())
