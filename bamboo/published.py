"""Import of the force field published with BAMBOO (2024 checkpoint ``benchmark.pt``, a TorchScript archive).

The archive is a zip whose ``data.pkl`` is a pickle program. It is not unpickled: its opcodes are read one by one by
the small interpreter below, which knows only containers, numbers, text and tensors; modules become plain attribute
tables, everything else is refused. Nothing in the file is executed.
"""

import math
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bamboo import units
from bamboo.checkpoint import save
from bamboo.errors import InputError, ModelFileError
from bamboo.forcefield import ForceField, ForceFieldConfig
from bamboo.nn.get import NetworkConfig
from bamboo.terms.dispersion import DispersionConfig

# pair dispersion of the 2024 checkpoint; lengths in Å (Gong et al. 2025 and its supplement)
PUBLISHED_DISPERSION = DispersionConfig(
    s6=0.85, a1=0.82, a2=2.5, damping_length=4.5, steepness=1.0, cutoff=10.0, smooth=False
)
HEADS_CHANNELS = 4  # channels per head in every published checkpoint
MAX_BYTES = 256 * 1024 * 1024


class _Module:
    """A scripted module: its class name, and its attributes once BUILD has run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.attributes: dict[str, Any] = {}


class _Symbol(str):
    """A global named by the archive; only a name, never looked up."""


_MARK = object()


def _storage(reference: Any, archive: zipfile.ZipFile, root: str) -> np.ndarray:
    """Return the numbers of a persistent reference ("storage", type, key, device, size)."""
    dtypes = {
        "torch FloatStorage": "<f4", "torch DoubleStorage": "<f8", "torch LongStorage": "<i8",
        "torch IntStorage": "<i4", "torch BoolStorage": "?",
    }  # fmt: skip
    if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
        raise ModelFileError("unexpected persistent reference in data.pkl")
    _, kind, key, _, size = reference
    if str(kind) not in dtypes or not str(key).isdigit():
        raise ModelFileError(f"storage of type {kind} is not known")
    numbers = np.frombuffer(archive.read(f"{root}data/{key}"), dtype=dtypes[str(kind)])
    if len(numbers) < int(size):
        raise ModelFileError(f"storage {key} is shorter than announced")
    return numbers


def _rebuild(arguments: tuple[Any, ...]) -> torch.Tensor:
    """Return the tensor of ``torch._utils._rebuild_tensor_v2`` (storage, offset, size, stride, …)."""
    numbers, offset, size, stride = arguments[:4]
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if not isinstance(numbers, np.ndarray) or min((offset, *size, *stride), default=0) < 0 or last >= len(numbers):
        raise ModelFileError("a tensor reaches beyond its storage")
    if math.prod(size) > len(numbers):
        raise ModelFileError("a tensor is larger than its storage")
    strides = [s * numbers.itemsize for s in stride]
    return torch.from_numpy(np.lib.stride_tricks.as_strided(numbers[offset:], size, strides).copy())


def _call(function: Any, arguments: Any) -> Any:
    """Do what one of the few known functions would do."""
    name = str(function)
    if name == "torch._utils _rebuild_tensor_v2":
        return _rebuild(arguments)
    if name in ("torch.jit._pickle restore_type_tag", "torch.jit._pickle build_doublelist",
                "torch.jit._pickle build_intlist", "torch.jit._pickle build_tensorlist"):  # fmt: skip
        return arguments[0]
    if name == "collections OrderedDict":
        return {}
    if name == "torch device":
        return arguments[0]
    raise ModelFileError(f"data.pkl asks for '{name}', which no published checkpoint needs")


def _interpret(program: bytes, archive: zipfile.ZipFile, root: str) -> Any:
    """Return the object that the opcodes of data.pkl describe, modules as ``_Module``."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def pop_mark() -> list[Any]:
        start = max(place for place, item in enumerate(stack) if item is _MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "GLOBAL":
                stack.append(_Symbol(argument))
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                items = tuple(stack[-count:])
                del stack[-count:]
                stack.append(items)
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items_list = pop_mark()
                stack[-1].extend(items_list)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                flat = pop_mark()
                stack[-1].update(zip(flat[::2], flat[1::2], strict=True))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), archive, root))
            case "NEWOBJ":
                stack.pop()
                stack.append(_Module(str(stack.pop())))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Module) and isinstance(state, dict):
                    stack[-1].attributes.update(state)
            case "STOP":
                return stack.pop()
            case unknown:
                raise ModelFileError(f"data.pkl holds the opcode {unknown}, which no published checkpoint needs")
    raise ModelFileError("data.pkl ends before it is complete")


def _tensors_of(top: _Module) -> dict[str, torch.Tensor]:
    """Return all tensors below a module by attribute path; a module that is met again counts once."""
    found: dict[str, torch.Tensor] = {}
    seen, waiting = {id(top)}, [("", top)]
    while waiting:
        prefix, module = waiting.pop()
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Module) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value))
    return found


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a TorchScript archive by attribute path, without executing anything in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
                raise ModelFileError(f"{path}: unpacks to more than {MAX_BYTES} bytes.")
            programs = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(programs) != 1:
                raise ModelFileError(f"{path}: a zip archive, but not a TorchScript model (no data.pkl).")
            root = programs[0].removesuffix("data.pkl")
            top = _interpret(archive.read(programs[0]), archive, root)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError) as error:
        raise ModelFileError(f"{path}: not a readable TorchScript archive: {error}.") from error
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, struct.error) as error:
        raise ModelFileError(f"{path}: data.pkl is damaged ({type(error).__name__}: {error}).") from error
    if not isinstance(top, _Module):
        raise ModelFileError(f"{path}: data.pkl does not describe a module.")
    return _tensors_of(top)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the published tensors from a TorchScript archive or a safetensors file of them."""
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        return read_torchscript(path)
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{path}: neither a TorchScript archive nor a safetensors file: {error}.") from error


_LAYER_PARTS = {"layer_norm": "norm", "qkv_proj": "qkv", "o_proj": "out", "vec_proj": "mix"}
_HEADS = {
    "energy_mlp": "energy_head", "charge_mlp": "charge_head",
    "pred_electronegativity_mlp": "electronegativity_head",
    "pred_electronegativity_hardness_mlp": "hardness_head",
}  # fmt: skip


_TABLES = ("c6_emb.weight", "r0_emb.weight", "oplsaa_charge.weight", "electronegativity_table.weight")


def _rename(name: str, last: int) -> str | None:
    """Return our name of a published tensor, None for one that we do not know."""
    direct = {
        "atom_embtab.weight": "embedding.weight", "dis_rbf.means": "network.radial.means",
        "dis_rbf.betas": "network.radial.betas", "dv_proj.0.weight": "network.edge.weight",
    }  # fmt: skip
    if name in direct:
        return direct[name]
    head, _, rest = name.partition(".")
    if head in _HEADS:
        return f"{_HEADS[head]}.{rest}"
    if head == "attns":
        index, _, rest = rest.partition(".")
        layer = int(index) + 1
    elif head in ("first_attn", "last_attn"):
        layer = 0 if head == "first_attn" else last
    else:
        return None
    part, _, kind = rest.partition(".")
    return f"network.layers.{layer}.{_LAYER_PARTS.get(part, part)}.{kind}"


def force_field_from_published(tensors: dict[str, torch.Tensor]) -> ForceField:
    """Return our force field with the published numbers, converted from kcal/mol to eV.

    The last layers of the heads absorb the conversion (E scales with kcal/mol, chi and J with its square root). The
    tables q0 and chi0 are read by atomic number itself, as the published program does. Charges are held fixed in the
    forces. The covered elements are those whose embedding was trained (untrained rows decayed to zero).
    """
    try:
        channels, n_radial = tensors["dv_proj.0.weight"].shape
        middle = {name.split(".")[1] for name in tensors if name.startswith("attns.")}
        network = NetworkConfig(
            channels=channels, heads=channels // HEADS_CHANNELS, layers=len(middle) + 2, n_radial=n_radial
        )
        config = ForceFieldConfig(
            network=network,
            dispersion=PUBLISHED_DISPERSION,
            repulsion=False,
            charge_response="frozen",
            charge_limit=2.0,
        )
        force_field = ForceField(config)
        state = force_field.state_dict()
        open_names = {name for name, _ in force_field.named_parameters()}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ModelFileError(f"tensor '{name}' holds numbers that are not finite")
            if name in _TABLES:
                continue
            ours = _rename(name, network.layers - 1)
            if ours not in open_names or tensor.shape != state[ours].shape:
                raise ModelFileError(f"tensor '{name}' of shape {tuple(tensor.shape)} is not expected")
            open_names.remove(ours)
            state[ours] = tensor.to(state[ours].dtype, copy=True)
        if open_names:
            raise ModelFileError(f"nothing corresponds to '{min(open_names)}'")
        kcal = units.KCAL_PER_MOL
        for head, factor in (("energy", kcal), ("electronegativity", kcal**0.5), ("hardness", kcal**0.5)):
            for kind in ("weight", "bias"):
                state[f"{head}_head.4.{kind}"] *= factor
        _fill(state["reference_charge"], tensors.get("oplsaa_charge.weight"))
        _fill(state["reference_electronegativity"], tensors.get("electronegativity_table.weight"))
        state["reference_electronegativity"] = (state["reference_electronegativity"] * kcal).sqrt()
        _fill(state["dispersion.c6"], tensors["c6_emb.weight"])
        state["dispersion.c6"] *= kcal
        radius = torch.ones(len(state["known"]), dtype=torch.float64)
        _fill(radius, tensors["r0_emb.weight"])
        state["dispersion.radius"] = (radius[:, None] + radius[None, :]) / 2.0
        for table in ("dispersion.c6", "reference_electronegativity"):
            if not bool((state[table] >= 0).all()):  # nan where the square root failed
                raise ModelFileError(f"the table of {table} holds negative numbers")
        state["known"] = tensors["atom_embtab.weight"].abs().sum(1) > 1.0e-3
        force_field.load_state_dict(state)
    except (ModelFileError, LookupError, RuntimeError, ValueError, TypeError, InputError) as error:
        raise ModelFileError(f"The tensors are not those of the published checkpoint: {error}.") from error
    return force_field


def _fill(table: torch.Tensor, rows: torch.Tensor | None) -> None:
    """Copy the first rows of a published (n, 1) table into ours, in place."""
    if rows is not None:
        table[: len(rows)] = rows[:, 0].to(table.dtype)


def import_published(source: str | Path, destination: str | Path) -> None:
    """Convert a published checkpoint into a bamboo model file.

    Raises ModelFileError where the source is anything else, InputError where the destination exists.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists():
        raise InputError(f"{destination} exists already; give another name or remove it.")
    tensors = read_tensors(source)
    try:
        force_field = force_field_from_published(tensors)
    except ModelFileError as error:
        raise ModelFileError(f"{source}: {error}") from error
    card = {
        "name": "published BAMBOO checkpoint (2024)",
        "source": f"imported from {source.name}",
        "reference": "Gong et al., Nature Machine Intelligence 7, 543 (2025)",
        "licence": "GPL-2.0, the BAMBOO authors",
        "caveat": "Forces hold the charges fixed, as published: they are not the gradient of the energy.",
    }
    save(force_field, destination, card=card)
