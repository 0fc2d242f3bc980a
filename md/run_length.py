"""How long a property takes: the one place of required times, for ``check``, the notes of results and the report.

The times are estimates for carbonates and their 1 m electrolytes near room temperature, for a standard error of 10 %
(0.5 % of the density). What they rest on:

density       A packed box drifts for some 100 ps; then 20 independent samples, some 4 ps apart (example_run).
viscosity     Shear stress forgets in some 5 ps, with salt in some 10 ps. STACIE's error of a Lorentzian spectrum is
              6 % of the value after 500 correlation times, so 10 % after 200.
diffusion     An MSD 6 D t + c is linear within the analysis's 10 % from t = 9 c / 6 D: with a cage of c = 1 Å^2 and
              D = 1.5e-5 cm^2/s after 10 ps, for ions of 0.3e-5 cm^2/s after 50 ps. The analysis wants that lag twice in
              the longest of a quarter of one of eight blocks: 64 lags.
conductivity  One box has one collective displacement, however large the box is: the relative error is
              1.4 sqrt(lag / length), from random walks put through the analysis. 10 % takes 200 lags of 50 ps.
coordination  A solvent stays at Li+ for some 200 ps; the analysis resolves a tenth of the run.
dielectric    The dipole of the box turns in tau = 40 ps (cyclic carbonates). Its square, in three components, has the
              relative error sqrt(2 tau / 3 length): 10 % takes 67 tau.

Replicas share what is averaged, up to the eight blocks of the analysis; what must pass in one box they do not.
"""

from dataclasses import dataclass

from bamboo.structure.molecules import molecule
from bamboo.units import PICOSECOND
from md import protocol
from md.analysis.density import SHORTEST_PS
from md.analysis.diffusion import N_BLOCKS
from md.analysis.estimate import NORMAL_95, format_time
from md.composition import Realisation
from md.config import NPT, Minimise, Property, RunConfig
from md.engine.reporters import duration_text

# relative standard error that counts as good enough, as in the advice that the analysis gives
PRECISION = {"density": 0.005}
ORDINARY_PRECISION = 0.1
# property -> what must pass in every box [ps], what replicas share [ps], the latter without ions and with them
_NEEDED: dict[Property, tuple[float, float, float]] = {
    "density": (100.0, 100.0, 100.0),
    "viscosity": (0.0, 1000.0, 2000.0),
    "conductivity": (0.0, 10_000.0, 10_000.0),
    "diffusion": (0.0, 640.0, 3200.0),
    "coordination": (2000.0, 0.0, 0.0),
    "dielectric": (0.0, 2700.0, 2700.0),
}
FEWEST_ION_PAIRS = 50  # of which one pair, bound or not, is 2 % of the carriers


def needed_ps(name: Property, *, ions: bool, replicas: int = 1) -> float:
    """Return the length that a stage needs for a property [ps], in every one of some replicas."""
    alone, without, with_ions = _NEEDED[name]
    return max(SHORTEST_PS, alone + (with_ions if ions else without) / min(replicas, N_BLOCKS))


Found = tuple[int, protocol.Dynamics] | None  # index of a stage, and the stage


def transport_stage(config: RunConfig) -> Found:
    """Return the stage that all but the density comes from: the last that supports transport, else the last."""
    dynamics = [(i, stage) for i, stage in enumerate(config.stages) if not isinstance(stage, Minimise)]
    suits = [found for found in dynamics if protocol.transport_objection(config, found[1]) is None]
    found = suits or dynamics
    return found[-1] if found else None


def density_stage(config: RunConfig) -> Found:
    """Return the stage that the density comes from."""
    return next(((i, s) for i, s in reversed(list(enumerate(config.stages))) if isinstance(s, NPT)), None)


def stage_of(name: Property, config: RunConfig) -> Found:
    """Return the stage that a property comes from."""
    return density_stage(config) if name == "density" else transport_stage(config)


@dataclass(frozen=True)
class Outlook:
    """What a configuration can give of a property; ``planned_ps`` and ``needed_ps`` are None where it gives none."""

    planned_ps: float | None
    needed_ps: float | None
    text: str


def outlook(config: RunConfig, box: Realisation, *, seconds_per_step: float) -> dict[Property, Outlook]:
    """Return what the stages of a run of one condition can give of every property that is asked for."""
    charges = {name: molecule(name).charge for name in box.counts}
    ions = any(charges.values())
    cations = sum(count for name, count in box.counts.items() if charges[name] > 0)
    found: dict[Property, Outlook] = {}
    for name in config.properties:
        stage_found = stage_of(name, config)
        reason = objection(name, config, ions=ions)
        if stage_found is None or reason is not None:
            found[name] = Outlook(None, None, f"not computed: {reason or 'there is no stage that gives it'}")
            continue
        index, stage = stage_found
        planned = round(stage.time / PICOSECOND, 6)
        needed = needed_ps(name, ions=ions, replicas=config.build.replicas)
        each = " in each replica" if config.build.replicas > 1 else ""
        where = f"{format_time(planned)} of {protocol.stage_name(index, stage)}{each}"
        if planned < needed:
            duration = duration_text(needed * PICOSECOND / stage.timestep * seconds_per_step)
            verb = "cannot give it" if planned < SHORTEST_PS else "may not be enough"
            text = f"{where} {verb}; some {format_time(needed)} needed, {duration} at the measured speed"
        elif name == "coordination":
            text = f"{where} should be enough"
        else:
            half = NORMAL_95 * PRECISION.get(name, ORDINARY_PRECISION) * (needed / planned) ** 0.5
            text = f"{where} should give it to about ± {100.0 * half:.2g} % (95 %), the model's own error aside"
        if name == "conductivity" and cations < FEWEST_ION_PAIRS:
            text += f"; {cations} cation{'s' if cations != 1 else ''} in the box, some {FEWEST_ION_PAIRS} wanted"
            text += f", in about {round(box.n_atoms * FEWEST_ION_PAIRS / cations, -2):.0f} atoms"
        found[name] = Outlook(planned, needed, text)
    return found


def objection(name: Property, config: RunConfig, *, ions: bool) -> str | None:
    """Why no length of a stage gives a property, or None where some length does."""
    if name in ("conductivity", "coordination") and not ions:
        return "there are no ions"
    if name == "dielectric" and ions:
        return "it is that of a liquid without ions"
    stage = transport_stage(config)
    if stage is None or name not in protocol.TRANSPORT:
        return None
    return protocol.transport_objection(config, stage[1])
