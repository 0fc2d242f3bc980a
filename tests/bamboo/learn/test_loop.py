"""The training loop: resuming is exact, and nothing that is not finite reaches the weights."""

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from springs import FRAMES, run_loop, small_force_field

from bamboo.errors import CheckpointedStop, InputError
from bamboo.learn.fit import (
    _forget_after,
    _log,
)
from bamboo.learn.loop import Loop, LoopConfig, Progress, _moving_average
from bamboo.learn.losses import LossWeights
from bamboo.learn.samples import (
    fit_references,
    make_samples,
)


def test_resume_is_exact(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch and continued = never stopped, bit for bit."""
    whole = run_loop(None)
    whole.run(lambda _: None)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run_loop(path, stop_after=7).run(lambda _: None)
    resumed = run_loop(path)
    assert resumed.step == 7
    resumed.run(lambda _: None)
    assert resumed.step == whole.step
    for name, value in whole.averaged.state_dict().items():
        assert torch.equal(value, resumed.averaged.state_dict()[name]), name


def test_a_signal_saves_the_state_of_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What batch systems send before they kill: nothing is lost, and the command may be repeated."""
    path, step = tmp_path / "state.safetensors", Loop._step

    def signalled(self: Loop, data: Any) -> dict[str, float]:
        losses = step(self, data)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    loop = run_loop(path)
    loop.config = replace(loop.config, save_seconds=1.0e9)
    monkeypatch.setattr(Loop, "_step", signalled)
    with pytest.raises(CheckpointedStop, match="stopped at step 5, state saved; the same command continues it"):
        loop.run(lambda _: None)
    assert run_loop(path).step == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_resume_refuses_other_settings_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    run_loop(None).save(path)
    force_field = small_force_field()
    samples = make_samples(force_field, FRAMES[:2])
    with pytest.raises(InputError, match="learning_rate"):
        Loop(
            force_field,
            samples,
            weights=LossWeights(),
            config=LoopConfig(epochs=4, edges_per_batch=60, learning_rate=1.0),
            state_path=path,
        )
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["training"])
    del header["weights"]["molecular_forces"]  # a state from before that part of the loss was there
    save_file(load_file(path), path, metadata={"training": json.dumps(header)})
    config = LoopConfig(epochs=4, edges_per_batch=60, save_seconds=0.0)
    with pytest.raises(InputError, match=r"other settings \(molecular_forces\)"):
        Loop(force_field, samples, weights=LossWeights(), config=config, state_path=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        Loop(force_field, samples, weights=LossWeights(), config=LoopConfig(), state_path=path)


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    """The saved reference energies belong to the old labels: with other data every total energy would be wrong."""
    path = tmp_path / "state.safetensors"
    run_loop(path).save(path)
    config = LoopConfig(epochs=4, edges_per_batch=60, save_seconds=0.0)
    force_field = small_force_field()
    fit_references(force_field, FRAMES)
    samples = make_samples(force_field, FRAMES)
    Loop(force_field, samples, weights=LossWeights(), config=config, state_path=path)
    with pytest.raises(InputError, match=r"other data \(.*frames"):
        Loop(force_field, samples[:-1], weights=LossWeights(), config=config, state_path=path)
    samples[3].forces = 2.0 * samples[3].forces
    with pytest.raises(InputError, match=r"other data \(forces\)"):
        Loop(force_field, samples, weights=LossWeights(), config=config, state_path=path)


def test_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    loop = run_loop(None)
    bias = loop.force_field.energy_head[0].bias
    bias.register_hook(lambda gradient: gradient * torch.nan)
    before = bias.detach().clone()
    with pytest.raises(InputError, match="gradient is not finite at step 0"):
        loop.run(lambda _: None)
    assert torch.equal(bias.detach(), before)


def test_log_keeps_its_columns_when_resumed_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for epoch, losses in ((1.0, {"loss": 0.5, "forces": 0.25}), (2.0, {})):
        _log(path, Progress(epoch, 10, 20, 1.0e-3, losses, 0.0, True), {})
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["train_loss"] for row in rows] == ["0.5", ""]
    assert [row["validation_forces_pooled_eV_A"] for row in rows] == ["nan", "nan"]


def test_epochs_that_are_done_again_stand_in_the_log_once(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for step in (10, 20, 30):
        _log(path, Progress(step / 10, step, 40, 1.0e-3, {"loss": 1.0 / step}, 0.0, True), {})
    _forget_after(path, 25)
    assert [row["step"] for row in csv.DictReader(path.read_text().splitlines())] == ["10", "20"]
    _forget_after(path, 0)
    assert not path.exists()


def test_learning_rate_rises_in_a_line_and_falls_as_half_a_cosine() -> None:
    loop = run_loop(None)
    peak, n_steps, warmup = loop.config.learning_rate, loop.n_steps, loop.config.warmup
    rates = []
    for loop.step in range(n_steps + 1):
        rates.append(loop.learning_rate())
    assert rates[0] == pytest.approx(peak / (warmup * n_steps + 1.0)) and rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert max(rates) <= peak
    half = round((warmup + 0.5 * (1.0 - warmup)) * n_steps)
    fraction = (half / n_steps - warmup) / (1.0 - warmup)
    assert rates[half] == pytest.approx(peak * np.cos(0.5 * np.pi * fraction) ** 2)
    assert rates[half] == pytest.approx(0.5 * peak, rel=0.2)


def test_averaged_weights_forget_their_start_and_then_decay_evenly() -> None:
    """Of weights 1, 2, 3, ... the average after n updates, written out: it keeps (1 + n) / (10 + n), then ``decay``."""
    update, averaged, expected = _moving_average(0.5), [torch.zeros(3, dtype=torch.float64)], 0.0
    for n in range(1, 30):
        update(averaged, [torch.full((3,), float(n), dtype=torch.float64)], n)
        keep = min(0.5, (1.0 + n) / (10.0 + n))
        expected = keep * expected + (1.0 - keep) * n
        assert averaged[0] == pytest.approx(np.full(3, expected), rel=1e-12)
    assert expected == pytest.approx(29.0 - 1.0, abs=1e-3)  # of a line the average lags by decay / (1 - decay)
