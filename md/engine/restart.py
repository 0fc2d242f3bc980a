"""Checkpoints on disk: two slots, written in turn, each a safetensors file and a JSON file with its checksum.

A slot is valid only while the checksum fits, so a crash in the middle of a write costs one checkpoint, never the run.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from bamboo.errors import InputError
from bamboo.files import replacing, write_json
from bamboo.system import Batch
from md.engine.state import MDState

FORMAT_VERSION = 1
SLOTS = ("a", "b")
STATE_TENSORS = ("masses", "momenta", "energy", "forces", "virial", "charges", "conserved_energy")
STATE_SCALARS = ("step", "time", "centre_of_mass_fixed")


@dataclass(frozen=True)
class Checkpoint:
    """A state read back, and the notes that were saved with it."""

    state: MDState
    info: dict[str, Any]


def save(folder: Path, state: MDState, *, info: dict[str, Any] | None = None) -> Path:
    """Write the state, and notes that JSON can hold, to the older slot of a folder; return the slot's JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = {slot: _valid_header(folder, slot) for slot in SLOTS}
    serials = {slot: header["serial"] if header else 0 for slot, header in headers.items()}
    slot = min(SLOTS, key=lambda name: serials[name])
    data = write_tensors(_state_to_tensors(state))
    header = {
        "format_version": FORMAT_VERSION,
        "serial": max(serials.values()) + 1,
        "device": state.device.type,
        "state": {name: getattr(state, name) for name in STATE_SCALARS},
        "info": info or {},
    }
    header["sha256"] = _digest(header, data)
    with replacing(folder / f"{slot}.safetensors") as draft:
        draft.write_bytes(data)
    write_json(folder / f"{slot}.json", header)
    return folder / f"{slot}.json"


def load(folder: Path, *, device: torch.device | str = "cpu") -> Checkpoint | None:
    """Read the newest valid slot; None where the folder holds no checkpoint.

    Warns, in one line, where a damaged slot is passed over. Raises InputError where all slots are damaged or of a newer
    format. On another kind of device the random numbers take a new, equally reproducible course.
    """
    present = [slot for slot in SLOTS if (folder / f"{slot}.json").exists()]
    headers = {slot: header for slot in present if (header := _valid_header(folder, slot))}
    for slot in present:
        if slot not in headers:
            warnings.warn(f"Checkpoint {folder / slot} is damaged (checksum) and passed over.", stacklevel=2)
    if not present:
        return None
    if not headers:
        raise InputError(f"{folder}: no undamaged checkpoint. Delete the folder to start afresh.")
    slot = max(headers, key=lambda name: headers[name]["serial"])
    header = headers[slot]
    if header["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{folder}: checkpoint format {header['format_version']}; this version reads {FORMAT_VERSION}."
        )
    tensors = read_tensors((folder / f"{slot}.safetensors").read_bytes())
    return Checkpoint(_state_from_tensors(tensors, header, torch.device(device)), header["info"])


def exists(folder: Path) -> bool:
    """Tell whether the folder holds an undamaged checkpoint."""
    return any(_valid_header(folder, slot) for slot in SLOTS)


def _state_to_tensors(state: MDState) -> dict[str, torch.Tensor]:
    tensors = {f"batch.{item.name}": getattr(state.batch, item.name) for item in fields(Batch)}
    tensors |= {name: getattr(state, name) for name in STATE_TENSORS}
    tensors |= {f"variables.{name}": tensor for name, tensor in state.variables.items()}
    tensors["generator"] = state.generator.get_state()
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items() if tensor is not None}


def _state_from_tensors(tensors: dict[str, torch.Tensor], header: dict[str, Any], device: torch.device) -> MDState:
    generator = torch.Generator(device=device)
    random_state = tensors.pop("generator")
    if header["device"] == device.type:
        generator.set_state(random_state)
    else:  # generators of CPU and GPU have states of different kinds; derive a seed from the old one
        digest = hashlib.sha256(random_state.numpy().tobytes()).digest()
        generator.manual_seed(int.from_bytes(digest[:7], "big"))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return MDState(
        batch=Batch(**{item.name: tensors.get(f"batch.{item.name}") for item in fields(Batch)}),  # type: ignore[arg-type]
        generator=generator,
        variables={name[10:]: tensor for name, tensor in tensors.items() if name.startswith("variables.")},
        **{name: tensors[name] for name in STATE_TENSORS},  # type: ignore[arg-type]
        **header["state"],
    )


def _valid_header(folder: Path, slot: str) -> dict[str, Any] | None:
    """Return the JSON of a slot, or None where it is missing, unreadable, or does not fit the tensors."""
    try:
        header = json.loads((folder / f"{slot}.json").read_bytes())
        data = (folder / f"{slot}.safetensors").read_bytes()
    except (OSError, ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) and header.get("sha256") == _digest(header, data) else None


def _digest(header: dict[str, Any], data: bytes) -> str:
    """Checksum of a slot: the tensors and all of the JSON but the checksum itself."""
    notes = json.dumps({name: value for name, value in header.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(notes.encode() + data).hexdigest()
