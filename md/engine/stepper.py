"""Many steps without a word from the host: one step as a CUDA graph, replayed."""

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch

from bamboo.kernels.capture import captured
from bamboo.system import Batch
from md.engine.integrators import Integrator
from md.engine.state import Evaluator, EvaluatorOutput, MDState

BLOCK = 4  # replays between two looks at the device: a look costs little, replays after a step that fails are lost


@runtime_checkable
class DeviceEvaluator(Evaluator, Protocol):
    """An evaluator that can work without the host; what the two mean stands at ``bamboo.evaluator.Evaluator``."""

    @property
    def layout(self) -> int | None: ...

    def evaluate_unchecked(self, batch: Batch) -> tuple[EvaluatorOutput, torch.Tensor]: ...


class Stepper:
    """Advances a state by whole steps of an integrator; by replays of a captured step wherever that is possible.

    It is possible where the evaluator works without the host (its ``layout`` is not None) and all steps are the same
    operations (no ramp). In a captured step nobody can look after the lists of neighbours: it goes by the lists at hand
    and notes on the device whether the result holds. Where it does not - an atom has left the lists, two overlap, a
    force is not finite - the state stops before that step, which is then taken in the ordinary way: ``integrator.step``
    builds the lists, or says what is wrong. So the trajectory is that of single steps, however many are asked for.
    """

    def __init__(self, state: MDState, evaluator: Evaluator, *, integrator: Integrator) -> None:
        self.state, self.evaluator, self.integrator = state, evaluator, integrator
        self._on_device = evaluator if isinstance(evaluator, DeviceEvaluator) else None
        self._captured: _CapturedStep | None = None

    @property
    def layout(self) -> int | None:
        """The evaluator's layout if the next steps are replays, and so best taken many at a time."""
        if self._on_device is None or not self.integrator.is_steady(self.state.time):
            return None
        return self._on_device.layout

    def advance(self, n_steps: int) -> None:
        """Take up to n_steps: all that hold on the present lists, and the first that does not; one where none can be
        replayed. Raises what the evaluator raises.
        """
        replayed = 0
        if self._on_device is not None and self.layout is not None:
            if self._captured is None or self._captured.layout != self.layout:
                self._captured = _CapturedStep(self.state, self._on_device, integrator=self.integrator)
            replayed = self._captured.run(n_steps)
            self.state.step += replayed
            self.state.time = self.state.step * self.integrator.timestep
        if replayed < n_steps:
            self.integrator.step(self.state, self.evaluator)


class _CapturedStep:
    """One step, on copies of the state's tensors that stay in place."""

    def __init__(self, state: MDState, evaluator: DeviceEvaluator, *, integrator: Integrator) -> None:
        self.layout = evaluator.layout
        self._state, self._integrator, self._evaluator = state, integrator, _Unchecked(evaluator)
        self._tensors = [tensor.clone() for tensor in state.moving()]
        self._copy = replace(state, variables=dict(state.variables))
        self._running = torch.ones((), dtype=torch.bool, device=state.device)
        self._done = torch.zeros((), dtype=torch.int64, device=state.device)
        self._replay = captured(self._step, state.device, generator=state.generator)

    def _step(self) -> None:
        """Take a step and keep it if it holds, and those before it did."""
        self._copy.move(self._tensors)
        self._evaluator.holds = self._running
        self._integrator.propagate(self._copy, self._evaluator)
        self._running.copy_(self._evaluator.holds)
        self._done.add_(self._running)
        for kept, value in zip(self._tensors, self._copy.moving(), strict=True):
            torch.where(self._running, value, kept, out=kept)

    def run(self, n_steps: int) -> int:
        """Advance the state until n_steps are done or one does not hold; return how many are done."""
        for kept, value in zip(self._tensors, self._state.moving(), strict=True):
            kept.copy_(value)
        self._running.fill_(True)
        self._done.zero_()
        generator, done = self._state.generator, 0
        random_states: list[torch.Tensor] = []
        while len(random_states) == done < n_steps:
            for _ in range(min(BLOCK, n_steps - done)):
                random_states.append(generator.get_state())
                self._replay()
            done = int(self._done)
        if done < len(random_states):
            generator.set_state(random_states[done])
        self._state.move([tensor.clone() for tensor in self._tensors])
        return done


class _Unchecked:
    """An evaluator that never waits for the device: ``holds`` stays true while every result does."""

    def __init__(self, evaluator: DeviceEvaluator) -> None:
        self._evaluator = evaluator
        self.holds = torch.empty(0)

    def evaluate(self, batch: Batch) -> EvaluatorOutput:
        output, holds = self._evaluator.evaluate_unchecked(batch)
        self.holds = self.holds & holds & torch.isfinite(output.forces).all()
        return output
