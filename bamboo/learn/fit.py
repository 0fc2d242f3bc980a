"""Fit a force field to quantum data: frames in, model file with a card out."""

import csv
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from bamboo import checkpoint, units
from bamboo.errors import InputError
from bamboo.files import held, replacing
from bamboo.forcefield import ForceField, ForceFieldConfig
from bamboo.learn.ensemble import ENSEMBLE
from bamboo.learn.evaluate import MODERATE_FORCE, MODERATE_TEMPERATURE, Errors, evaluate
from bamboo.learn.lift import LIFTED
from bamboo.learn.loop import Loop, LoopConfig, Progress
from bamboo.learn.losses import LossWeights
from bamboo.learn.samples import far_pairs, fit_references, make_samples, shift_references
from bamboo.nn.get import NetworkConfig
from bamboo.quantum.dataset import Frame, read_frames
from bamboo.structure.molecules import molecule
from bamboo.structure.recognition import recognise
from bamboo.terms.d3_table import fill_d3_table
from bamboo.terms.dispersion import DispersionConfig

BEYOND = ("compressed", "distorted", "failure")
N_REFERENCE_FRAMES = 400  # enough to fit one number per element


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkBlock(_Block):
    """Size and kind of the network; see ``NetworkConfig``."""

    channels: Annotated[int, Field(ge=4, le=512)] = NetworkConfig.channels
    heads: Annotated[int, Field(ge=1, le=64)] = NetworkConfig.heads
    layers: Annotated[int, Field(ge=2, le=8)] = NetworkConfig.layers
    n_radial: Annotated[int, Field(ge=4, le=128)] = NetworkConfig.n_radial
    attention: Literal["get", "gedt"] = "get"


class WeightsBlock(_Block):
    """Weights of the loss; see ``LossWeights``."""

    forces: Annotated[float, Field(ge=0)] = LossWeights.forces
    molecular_forces: Annotated[float, Field(ge=0)] = LossWeights.molecular_forces
    energy: Annotated[float, Field(ge=0)] = LossWeights.energy
    charges: Annotated[float, Field(ge=0)] = LossWeights.charges
    dipole: Annotated[float, Field(ge=0)] = LossWeights.dipole
    virial: Annotated[float, Field(ge=0)] = LossWeights.virial
    raw_charge: Annotated[float, Field(ge=0)] = LossWeights.raw_charge


class LoopBlock(_Block):
    """How to optimise; see ``LoopConfig``."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = LoopConfig.epochs
    edges_per_batch: Annotated[int, Field(ge=10)] = LoopConfig.edges_per_batch
    learning_rate: Annotated[float, Field(gt=0, le=1)] = LoopConfig.learning_rate
    warmup: Annotated[float, Field(ge=0, lt=1)] = LoopConfig.warmup
    weight_decay: Annotated[float, Field(ge=0)] = LoopConfig.weight_decay
    gradient_clip: Annotated[float, Field(gt=0)] = LoopConfig.gradient_clip
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = LoopConfig.ema_decay
    save_seconds: Annotated[float, Field(gt=0)] = LoopConfig.save_seconds


class TrainConfig(_Block):
    """What ``bamboo-md train train.yaml`` reads.

    data       HDF5 files of frames (``bamboo-md data import`` makes them); a file named n times counts n times, and
               errors are measured by held-out frames whose labels are not lifted, where there are such
    output     model file to write; its folder also takes the CSV log and the saved state
    start      zoo name or model file whose weights to begin from; without it, new weights
    max_force  eV/Å; frames with a larger force component are left out
    trained    which weights move: all, or only those of the MLP that reads energies off the last features
    far_pairs  share of constructed frames of two clusters far apart
    description, caveat   go into the card: what the model is for, and what it must not be used for
    """

    data: Annotated[list[Path], Field(min_length=1)]
    output: Path
    start: str | None = None
    network: NetworkBlock = NetworkBlock()
    weights: WeightsBlock = WeightsBlock()
    loop: LoopBlock = LoopBlock()
    trained: Literal["all", "energy_head"] = "all"
    seed: Annotated[int, Field(ge=0)] = 0
    max_force: Annotated[float, Field(gt=0)] = 20.0
    far_pairs: Annotated[float, Field(ge=0, le=1)] = 0.03
    description: str = ""
    caveat: str = ""


def largest_force(frame: Frame) -> float:
    """Return the largest force on an atom [eV/Å], nan where forces are not labelled."""
    forces = frame.labels.forces
    return float("nan") if forces is None else float(np.linalg.norm(forces, axis=1).max())


def held_out_group(frame: Frame) -> str:
    """Return the group in which a held-out frame is reported: its kind, "hot" (beyond the stated range) or "bulk"."""
    if frame.labels.level.startswith(ENSEMBLE):
        return "bulk"
    hot = largest_force(frame) >= MODERATE_FORCE * units.KCAL_PER_MOL or frame.temperature_K > MODERATE_TEMPERATURE
    return "hot" if hot or frame.sampling in BEYOND else frame.kind


def label_table(frames: Sequence[Frame]) -> str:
    """Return the start-up table: which labels are there, per kind of frame."""
    names = ("energy", "forces", "charges", "dipole", "virial")
    lines = [f"{'kind':<12}{'frames':>8}{'atoms':>9}" + "".join(f"{name:>9}" for name in names)]
    for kind, count in sorted(Counter(frame.kind for frame in frames).items()):
        members = [frame for frame in frames if frame.kind == kind]
        present = [sum(getattr(frame.labels, name) is not None for frame in members) for name in names]
        atoms = sum(frame.system.n_atoms for frame in members)
        lines.append(f"{kind:<12}{count:>8}{atoms:>9}" + "".join(f"{number:>9}" for number in present))
    return "\n".join(lines)


def _levels(frames: Sequence[Frame]) -> set[str]:
    """Return the levels of theory of frames; labels of an ensemble or lifted ones are on the zero of their level."""
    levels = {frame.labels.level for frame in frames if not frame.labels.level.startswith(ENSEMBLE)}
    return {level.removesuffix(LIFTED) for level in levels}


def _check_labels(frames: Sequence[Frame], weights: WeightsBlock) -> None:
    """Refuse energies that cannot be compared, and weights for labels that no frame has: they would do nothing."""
    levels = _levels(frames)
    if len(levels) > 1 and weights.energy > 0:
        raise InputError(
            f"The data mix levels of theory ({', '.join(sorted(levels))}), whose energies have different zeros. "
            "Train on one level, or set weights.energy: 0."
        )
    for name in sorted(weights.model_fields_set & {"forces", "charges", "dipole", "virial"}):
        if getattr(weights, name) > 0 and all(getattr(frame.labels, name) is None for frame in frames):
            raise InputError(f"weights.{name} > 0, but no frame has {name}. Set weights.{name}: 0 or add the label.")


def load_frames(paths: Sequence[Path], *, max_force: float, say: Callable[[str], None] = print) -> list[Frame]:
    """Return the frames of all files whose forces stay below ``max_force`` [eV/Å]; says how many do not."""
    frames = [frame for path in paths for frame in read_frames(path)]
    kept = [frame for frame in frames if not largest_force(frame) > max_force]
    if len(kept) < len(frames):
        say(f"{len(frames) - len(kept)} frames with forces above {max_force:g} eV/Å are left out, also of the test")
    return kept


def measured_by(frames: Sequence[Frame], split: str) -> list[Frame]:
    """Return the frames of a split that measure errors: each once, lifted ones only where there are no others."""
    members = {(f.trajectory, f.labels.level, f.system.positions.tobytes()): f for f in frames if f.split == split}
    return [f for f in members.values() if not f.labels.level.endswith(LIFTED)] or list(members.values())


def prepare_force_field(config: TrainConfig, frames: Sequence[Frame]) -> ForceField:
    """Return the force field to train: started from a model file, or new with the D3 table and fitted references."""
    torch.manual_seed(config.seed)
    if config.start is not None:
        if "network" in config.model_fields_set:
            raise InputError("`network` has no effect where `start` gives the weights: remove one of the two.")
        force_field = checkpoint.load(config.start)
        unknown = {int(z) for frame in frames for z in frame.system.numbers} - set(
            torch.nonzero(force_field.known).flatten().tolist()
        )
        if unknown:
            raise InputError(
                f"{config.start} does not know the elements {sorted(unknown)} of the data; train from scratch."
            )
        known = checkpoint.describe(config.start)["card"].get("levels", [])
        if _levels(frames) <= {level.removesuffix(LIFTED) for level in known}:
            return force_field.train()
        force_field = with_own_dispersion(force_field)
        chosen = np.random.default_rng(config.seed).permutation(len(frames))[:N_REFERENCE_FRAMES]
        shift_references(force_field, make_samples(force_field, [frames[k] for k in chosen]))
        return force_field.train()
    return new_force_field(NetworkConfig(**config.network.model_dump()), frames)


def choose_trained(force_field: ForceField, trained: str) -> None:
    """Let only some weights move: "all", or "energy_head", which leaves charges and features alone."""
    for name, parameter in force_field.named_parameters():
        parameter.requires_grad_(trained == "all" or name.startswith("energy_head."))


def held_out_errors(force_field: ForceField, frames: Sequence[Frame]) -> dict[str, Errors]:
    """Return the errors on those of the frames that are held out, by group; empty where none is."""
    test = measured_by(frames, "test")
    return evaluate(force_field, make_samples(force_field, test), [held_out_group(f) for f in test]) if test else {}


def with_own_dispersion(force_field: ForceField) -> ForceField:
    """Return the force field with the dispersion of a new one: its damping is fitted to levels without dispersion."""
    changed = ForceField(replace(force_field.config, dispersion=DispersionConfig())).to_dtype(force_field.dtype)
    changed.load_state_dict(force_field.state_dict())
    fill_d3_table(changed.dispersion, elements=changed.elements)
    return changed


def new_force_field(network: NetworkConfig, frames: Sequence[Frame]) -> ForceField:
    """Return an untrained force field with D3 table, reference energies and charges fitted to the frames."""
    force_field = ForceField(ForceFieldConfig(network=network))
    fit_references(force_field, frames)
    fill_d3_table(force_field.dispersion, elements=force_field.elements)
    return force_field.train()


def train(config: TrainConfig, *, say: Callable[[str], None] = print) -> dict[str, Errors]:
    """Train, write the model file with its card, return the held-out errors by group.

    Continues exactly where an interrupted run of the same settings stopped (its state lies beside the output).
    Raises LockedError where another process trains the same output, CheckpointedStop after SIGTERM.
    """
    with held(config.output.with_suffix(".lock"), what=str(config.output)):
        return _train(config, say=say)


def _train(config: TrainConfig, *, say: Callable[[str], None]) -> dict[str, Errors]:
    frames = load_frames(config.data, max_force=config.max_force, say=say)
    parts: dict[str, list[Frame]] = {
        "train": [frame for frame in frames if frame.split == "train"],
        "validation": measured_by(frames, "validation"),
        "test": measured_by(frames, "test"),
    }
    if not parts["train"]:
        raise InputError("No frames are left for training; check `data` and `max_force`.")
    _check_labels(parts["train"], config.weights)
    say(label_table(frames))
    force_field = prepare_force_field(config, parts["train"])
    pairs = far_pairs(parts["train"], round(config.far_pairs * len(parts["train"])), seed=config.seed)
    samples = make_samples(force_field, [*parts["train"], *pairs])
    validation = make_samples(force_field, parts["validation"])
    validation_groups = [held_out_group(frame) for frame in parts["validation"]]
    choose_trained(force_field, config.trained)
    say(f"{len(samples)} frames to train on ({len(pairs)} far pairs), {len(validation)} to choose by")

    loop = Loop(
        force_field,
        samples,
        weights=LossWeights(**config.weights.model_dump()),
        config=LoopConfig(seed=config.seed, **config.loop.model_dump()),
        state_path=config.output.with_suffix(".state.safetensors"),
    )
    best = _Best(loop, config.output.with_suffix(".best.safetensors"))
    log = config.output.with_suffix(".csv")
    _forget_after(log, loop.step)
    started = time.strftime("%Y-%m-%d")

    def listener(progress: Progress) -> None:
        line = (
            f"epoch {progress.epoch:7.2f}/{config.loop.epochs}  loss {progress.losses.get('loss', math.nan):.3e}  "
            f"forces {progress.losses.get('forces', math.nan):.3e}  lr {progress.learning_rate:.1e}  "
            f"eta {progress.seconds_left / 60:.0f} min"
        )
        if not progress.epoch_ended:
            say(line)
            return
        errors = evaluate(loop.averaged, validation, validation_groups) if validation else {}
        moderate = _pooled(errors)
        best.offer(moderate)
        say(f"{line}  validation forces {moderate:.4f} eV/Å ({moderate / units.KCAL_PER_MOL:.2f} kcal/mol/Å)")
        _log(log, progress, errors)

    loop.run(listener)
    final = best.force_field()
    errors = held_out_errors(final, parts["test"])
    checkpoint.save(final, config.output, card=_card(config, frames, errors, started))
    say(error_table(errors))
    return errors


def _pooled(errors: dict[str, Errors]) -> float:
    """Return the force RMSE over all groups but "hot" [eV/Å], nan where none of them has forces."""
    parts = [part for group, part in errors.items() if group not in ("all", "hot")]
    moderate = [part for part in parts if not math.isnan(part.forces)]
    atoms = sum(part.n_atoms for part in moderate)
    return math.sqrt(sum(part.forces**2 * part.n_atoms for part in moderate) / atoms) if atoms else math.nan


class _Best:
    """Keeps the averaged weights with the smallest validation error on disk, so that a restart still knows them."""

    def __init__(self, loop: Loop, path: Path) -> None:
        self.loop, self.path = loop, path
        resumed = path.exists() and loop.step > 0
        self.error = float(checkpoint.describe(path)["card"]["validation"]) if resumed else math.inf

    def offer(self, error: float) -> None:
        if error < self.error or math.isnan(error):
            self.error = error
            checkpoint.save(self.loop.averaged, self.path, card={"validation": error})

    def force_field(self) -> ForceField:
        return checkpoint.load(self.path)


def error_table(errors: dict[str, Errors]) -> str:
    """Return held-out errors as a table in kcal/mol, Å, e, Debye, bar."""
    lines = [
        f"{'group':<12}{'frames':>8}{'forces':>10}{'on whole':>10}{'energy/atom':>13}{'charges':>9}{'dipole':>8}"
        f"{'P mean':>9}{'P rms':>8}"
    ]
    kcal = units.KCAL_PER_MOL
    rows = {**errors, "pooled": None} if errors else {}
    for group, part in rows.items():
        if part is None:
            lines.append(f"{'pooled':<12}{'':>8}{_pooled(errors) / kcal:>10.3f}   (all groups but hot)")
            continue
        lines.append(
            f"{group:<12}{part.n_frames:>8}{part.forces / kcal:>10.3f}{part.molecular_forces / kcal:>10.3f}"
            f"{part.energy_per_atom / kcal:>13.4f}"
            f"{part.charges:>9.4f}{part.dipole / units.DEBYE:>8.3f}{part.pressure_mean / units.BAR:>9.0f}"
            f"{part.pressure / units.BAR:>8.0f}"
        )
    return "\n".join(
        [*lines, "(kcal/mol/Å on atoms and on whole molecules, kcal/mol, e, D, bar; held-out trajectories)"]
    )


def card_of_errors(errors: dict[str, Errors]) -> dict[str, Any]:
    """Return held-out errors as entries of a model card."""
    return {
        "held_out_force_rmse_kcal_mol_A": _number(_pooled(errors) / units.KCAL_PER_MOL),  # without "hot"
        "held_out": {
            group: {name: _number(value) for name, value in asdict(part).items()} for group, part in errors.items()
        },
        "held_out_units": "eV, Å, e; null: no such labels",
    }


def _card(config: TrainConfig, frames: Sequence[Frame], errors: dict[str, Errors], date: str) -> dict[str, Any]:
    return {
        "description": config.description,
        "caveat": config.caveat,
        "date": date,
        "levels": sorted({frame.labels.level for frame in frames}),
        "molecules": {name: molecule(name).smiles for name in sorted(_molecules(config, frames))},
        "frames": dict(Counter(frame.kind for frame in frames)),
        "settings": json.loads(config.model_dump_json(exclude={"data", "output", "description", "caveat"})),
        **card_of_errors(errors),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def _molecules(config: TrainConfig, frames: Sequence[Frame]) -> set[str]:
    """Return the names of the molecules in frames whose bonds are all as they should be, and of those ``start`` knew.

    One frame of each formula suffices: those that differ in their molecules only would have to be isomers.
    """
    names = set(checkpoint.describe(config.start)["card"].get("molecules", {})) if config.start is not None else set()
    told: set[bytes] = set()
    for frame in frames:
        formula = np.sort(frame.system.numbers).tobytes()
        if formula in told:
            continue
        try:
            names |= set(recognise(frame.system)[0])
        except InputError:  # a broken or crowded frame, or a molecule that has no name
            continue
        told.add(formula)
    return names


def _number(value: float) -> float | None:
    """Return None for nan, which JSON does not know."""
    return None if math.isnan(value) else value


def _forget_after(log: Path, step: int) -> None:
    """Drop rows of the log beyond a step, which are done again, or the log of an earlier training."""
    if step == 0 or not log.exists():
        log.unlink(missing_ok=True)
        return
    with open(log, newline="", encoding="utf-8") as file:
        first, *rows = csv.reader(file)
    with replacing(log) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([first, *(row for row in rows if int(row[first.index("step")]) <= step)])


def _log(path: Path, progress: Progress, errors: dict[str, Errors]) -> None:
    """Append one row per epoch to the CSV log, under the columns of its first row."""
    row: dict[str, Any] = {
        "epoch": round(progress.epoch),
        "step": progress.step,
        "learning_rate": progress.learning_rate,
    }
    row |= {f"train_{name}": value for name, value in sorted(progress.losses.items())}
    row |= {f"validation_forces_{group}_eV_A": part.forces for group, part in errors.items()}
    row["validation_forces_pooled_eV_A"] = _pooled(errors)
    columns = list(row)
    if path.exists():
        with path.open(newline="") as file:
            columns = next(csv.reader(file), columns)
    new = not path.exists()
    with path.open("a", newline="") as file:
        # resumed at the end of an epoch, there are no losses to report: empty fields
        writer = csv.DictWriter(file, fieldnames=columns, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(row)
