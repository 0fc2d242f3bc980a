"""The loop: steps, guards, reports, checkpoints, signals."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bamboo.errors import GuardError, InputError
from bamboo.signals import StopSignals
from bamboo.units import BAR
from md.engine import restart
from md.engine.guards import CAUSE_BLOWUP, Guard, Violation, check_guards, guard_error
from md.engine.integrators import Integrator
from md.engine.reporters import ProgressDisplay, ProgressReport, Reporter
from md.engine.state import Evaluator, MDState
from md.engine.stepper import Stepper

PROGRESS_INTERVAL_S = 1.0


class Simulation:
    """One stage: a state that an integrator moves on, watched by guards, told by reporters, kept by checkpoints.

    state               owned by the simulation and changed by it
    resume              False: the stage starts here (``integrator.start``: clock at zero, first forces; old records of
                        the reporters dropped); True: the state comes from a checkpoint of this stage, later records
                        dropped
    restart_folder      two checkpoint slots; None keeps no checkpoints and leaves signals alone
    frame_folder        where blowup.extxyz goes when a guard stops the run
    checkpoint_minutes  wall time between checkpoints; None for one at the end only
    checkpoint_steps    checkpoints fall on multiples of this number of steps, where the evaluator forgets its past
                        whether or not one is written: so the trajectory does not depend on when they were, and a
                        restart, which begins without a past, is exact
    stage               name for messages
    info                notes for JSON, saved with every checkpoint
    """

    def __init__(
        self,
        state: MDState,
        evaluator: Evaluator,
        *,
        integrator: Integrator,
        reporters: Sequence[Reporter] = (),
        guards: Sequence[Guard] = (),
        progress: ProgressDisplay | None = None,
        resume: bool = False,
        restart_folder: Path | None = None,
        frame_folder: Path | None = None,
        checkpoint_minutes: float | None = 10.0,
        checkpoint_steps: int = 20,
        stage: str = "simulation",
        info: dict[str, Any] | None = None,
    ) -> None:
        self.state, self.evaluator, self.integrator = state, evaluator, integrator
        self.reporters, self.guards, self.progress = reporters, guards, progress
        self.restart_folder, self.frame_folder = restart_folder, frame_folder
        self.checkpoint_minutes, self.checkpoint_steps = checkpoint_minutes, checkpoint_steps
        self.stage, self.info = stage, info
        self._stepper = Stepper(state, evaluator, integrator=integrator)
        self._last_checkpoint = time.monotonic()
        self._reset_evaluator()
        if resume:
            self._check_continues()
        else:
            integrator.start(state, evaluator)
        self._fresh = not resume
        for reporter in reporters:
            reporter.truncate(state.step if resume else -1)

    def run(self, n_steps: int) -> None:
        """Take n_steps more steps.

        Raises GuardError where a guard, a non-finite number or an overlap stops the run; after SIGTERM or SIGUSR1,
        with a checkpoint saved, CheckpointedStop; after SIGINT (Ctrl-C) likewise KeyboardInterrupt.
        """
        first, last = self.state.step, self.state.step + n_steps
        started, shown = time.monotonic(), -1.0
        with StopSignals(active=self.restart_folder is not None) as stop:
            try:
                if self._fresh:
                    self._look()
                    self._fresh = False
                while self.state.step < last:
                    self._advance(last)
                    self._look()
                    elapsed = time.monotonic() - started
                    if self.progress is not None and (elapsed - shown > PROGRESS_INTERVAL_S or self.state.step == last):
                        self.progress.update(self._progress(first, last, elapsed))
                        shown = elapsed
                    if self.state.step == last or self.state.step % self.checkpoint_steps == 0:
                        self._pause(stop, last)
            finally:
                if self.progress is not None:
                    self.progress.close()

    def checkpoint(self) -> None:
        """Save the state if there is a restart folder; guards look first, so what is saved is sound."""
        if self.restart_folder is not None:
            self._stop_if(check_guards(self.state, self.guards))
            for reporter in self.reporters:
                reporter.flush()
            restart.save(self.restart_folder, self.state, info=self.info)
        self._reset_evaluator()
        self._last_checkpoint = time.monotonic()

    def _pause(self, stop: StopSignals, last: int) -> None:
        """Let the evaluator forget its past, save where that is due, and leave where a signal asks for it."""
        minutes = (time.monotonic() - self._last_checkpoint) / 60.0
        due = self.checkpoint_minutes is not None and minutes >= self.checkpoint_minutes
        if due or stop.received is not None or self.state.step == last:
            self.checkpoint()
        else:
            self._reset_evaluator()
        if stop.received is not None:
            stop.leave(f"{self.stage} stopped at step {self.state.step}, checkpoint saved")

    def _advance(self, last: int) -> None:
        """Take a step, or, where they are taken on the device alone, several, up to the next that anyone looks at."""
        step, n_steps = self.state.step, 1
        if self._stepper.layout is not None:
            strides = [self.checkpoint_steps, *(g.stride for g in self.guards), *(r.stride for r in self.reporters)]
            n_steps = min(last - step, *(stride - step % stride for stride in strides))
        try:
            self._stepper.advance(n_steps)
        except InputError as error:  # at this point atoms on top of each other are no fault of the input
            raise self._guard_error(Violation(None, str(error).rstrip("."), CAUSE_BLOWUP)) from error

    def _look(self) -> None:
        """Let the guards and reporters that are due see the state; forces are always looked at."""
        step = self.state.step
        guards = [guard for guard in self.guards if step % guard.stride == 0]
        reporters = [reporter for reporter in self.reporters if step % reporter.stride == 0]
        if guards or reporters or not bool(torch.isfinite(self.state.forces).all()):
            self._stop_if(check_guards(self.state, guards))
        if reporters:
            self.state.conserved_energy = self.integrator.conserved_energy(self.state)
        for reporter in reporters:
            reporter.report(self.state)

    def _stop_if(self, violation: Violation | None) -> None:
        if violation is not None:
            raise self._guard_error(violation)

    def _guard_error(self, violation: Violation) -> GuardError:
        folder = self.restart_folder if self.restart_folder and restart.exists(self.restart_folder) else None
        return guard_error(
            violation, self.state, stage=self.stage, frame_folder=self.frame_folder, restart_folder=folder
        )

    def _reset_evaluator(self) -> None:
        reset = getattr(self.evaluator, "reset", None)
        if reset is not None:
            reset()

    def _check_continues(self) -> None:
        """Refuse to continue with an integrator other than the one that wrote the checkpoint."""
        expected = {name: v.shape for name, v in self.integrator.initial_variables(self.state).items()}
        same_variables = expected == {name: v.shape for name, v in self.state.variables.items()}
        if not same_variables or self.state.centre_of_mass_fixed != self.integrator.centre_of_mass_fixed:
            raise InputError(
                f"{self.stage}: the checkpoint holds the variables {sorted(self.state.variables)}, not those of "
                f"{type(self.integrator).__name__}. Resume with the integrator that wrote it, or start a new stage."
            )

    def _progress(self, first: int, last: int, elapsed: float) -> ProgressReport:
        state = self.state
        rate = (state.step - first) / max(elapsed, 1.0e-9)
        return ProgressReport(
            stage=self.stage,
            step=state.step,
            last_step=last,
            time_ps=state.time_fs / 1000.0,
            temperature_K=float(state.temperature_K().mean()),
            pressure_bar=float(state.pressure().mean()) / BAR,
            density_g_cm3=float(state.density_g_cm3.mean()),
            ns_per_day=rate * self.integrator.timestep_fs * 86400.0 * 1.0e-6,
            eta_s=(last - state.step) / rate,
        )
