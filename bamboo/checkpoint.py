"""Model files: safetensors with a JSON header. Nothing in them is ever executed.

The safetensors metadata holds one entry, ``bamboo``, a JSON object:
    format          "bamboo-force-field"
    format_version  1; a file with a newer one is refused
    units           energy eV, length Å, charge e
    elements        symbols of the covered elements
    config          ForceFieldConfig as nested objects
    card            what a reader should know: data, level, metrics, provenance, caveats (free JSON object)
Tensors carry the parameter names of ``ForceField``.
"""

import json
import struct
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

import bamboo
from bamboo.errors import InputError, ModelFileError, suggest
from bamboo.files import replacing
from bamboo.forcefield import ForceField, ForceFieldConfig

FORMAT, FORMAT_VERSION = "bamboo-force-field", 1
UNITS = {"energy": "eV", "length": "Å", "charge": "e"}
ALIASES = {"default": "aligned"}


def zoo() -> dict[str, Path]:
    """Return the models that ship with the package, name -> file."""
    folder = Path(str(files("bamboo"))) / "zoo"
    models = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    return models | {alias: models[name] for alias, name in ALIASES.items() if name in models}


def resolve(name_or_path: str | Path) -> Path:
    """Return the file of a model given by zoo name or by path."""
    models = zoo()
    if str(name_or_path) in models:
        return models[str(name_or_path)]
    path = Path(name_or_path)
    if not path.exists():
        raise InputError(
            f"No model '{name_or_path}': neither a file nor one of {', '.join(models) or '(empty zoo)'}."
            + suggest(str(name_or_path), models)
        )
    return path


def save(force_field: ForceField, path: str | Path, *, card: dict[str, Any] | None = None) -> None:
    """Write a model file; parameters in float32, physical tables in float64."""
    parameters = {name for name, _ in force_field.named_parameters()}
    tensors = {
        name: (tensor.float() if name in parameters else tensor).detach().cpu().contiguous()
        for name, tensor in force_field.state_dict().items()
    }
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written_by": f"bamboo-md {bamboo.__version__}",
        "units": UNITS,
        "elements": force_field.elements,
        "config": force_field.config.to_dict(),
        "card": card or {},
    }
    try:
        with replacing(Path(path)) as draft:
            draft.touch()  # with the rights of a new file: safetensors alone gives them to the owner only
            rights = draft.stat().st_mode
            save_file(tensors, str(draft), metadata={"bamboo": json.dumps(header, ensure_ascii=False)})
            draft.chmod(rights)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: the model cannot be written: {error}.") from error


def describe(name_or_path: str | Path) -> dict[str, Any]:
    """Return the header of a model file after checking that the file is whole and of a known format."""
    path = resolve(name_or_path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise ModelFileError(f"{path}: not a readable safetensors file (damaged or truncated?): {error}.") from error
    if "bamboo" not in metadata:
        raise ModelFileError(
            f"{path}: a safetensors file, but not a bamboo model. "
            "Published checkpoints are converted with `bamboo-md model import`."
        )
    try:
        header = json.loads(metadata["bamboo"])
    except json.JSONDecodeError as error:
        raise ModelFileError(f"{path}: the JSON header is damaged: {error}.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ModelFileError(f"{path}: the header does not say '{FORMAT}'.")
    version = header.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ModelFileError(f"{path}: format_version is {version!r}, expected a positive integer.")
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: written in format {version}, this bamboo reads up to {FORMAT_VERSION}. Update bamboo-md."
        )
    return header


def load(
    name_or_path: str | Path = "default",
    *,
    dtype: torch.dtype = torch.float32,
    charge_response: str | None = None,
) -> ForceField:
    """Return the force field of a model file or zoo name.

    charge_response  overrides what the file says: "full" or "frozen"
    Raises ModelFileError for damaged, foreign or newer files.
    """
    path = resolve(name_or_path)
    try:
        config = ForceFieldConfig.from_dict(describe(path)["config"])
    except ModelFileError:
        raise
    except (KeyError, InputError) as error:
        raise ModelFileError(f"{path}: unusable settings in the header: {error}") from error
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    _check_tensors(path, tensors, config)
    if charge_response is not None:
        config = replace(config, charge_response=charge_response)
    force_field = ForceField(config)
    force_field.load_state_dict(tensors)
    return force_field.to_dtype(dtype).eval()


class _NoInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are: on the meta device, drawing them costs 1.6 s for importing torch._dynamo."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return function(*args, **kwargs)


def _check_tensors(path: Path, tensors: dict[str, torch.Tensor], config: ForceFieldConfig) -> None:
    """Raise ModelFileError unless the tensors are those the settings ask for, finite and physical."""
    if config.network.layers > len(tensors):  # absurd, and building them would take for ever
        raise ModelFileError(f"{path}: its tensors do not fit its settings of {config.network.layers} layers.")
    try:
        with torch.device("meta"), _NoInitialisation():  # shapes only
            expected = ForceField(config).state_dict()
    except RuntimeError as error:
        raise ModelFileError(f"{path}: no network can have the size in its settings.") from error
    odd = sorted(set(tensors) ^ set(expected))
    if odd:
        raise ModelFileError(f"{path}: its tensors do not fit its settings, for example '{odd[0]}'.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ModelFileError(
                f"{path}: tensor '{name}' has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(f"{path}: tensor '{name}' holds numbers that are not finite.")
    if bool((tensors["dispersion.c6"] < 0).any()):
        raise ModelFileError(f"{path}: tensor 'dispersion.c6' holds negative coefficients.")
