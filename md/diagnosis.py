"""Is this installation sound, and how fast is it?"""

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import bamboo
from bamboo import checkpoint
from bamboo.kernels.engines import native_status, triton_status

REQUIRED = ("torch", "numpy", "scipy", "ase", "h5py", "vesin", "torch-pme", "packmol", "rdkit", "stacie", "mdtraj",
            "psutil")  # fmt: skip
EXTRAS = {"qm": ("tblite", "pyscf", "dftd3"), "gpu": ("triton",)}


def diagnose() -> tuple[str, bool]:
    """Return a report on versions, devices, models and optional parts, and whether everything required is there."""
    lines = [f"bamboo-md {bamboo.__version__}, Python {sys.version.split()[0]}, {platform.platform()}"]
    lines.append(f"processors: {os.cpu_count()}, threads of PyTorch: {torch.get_num_threads()}")
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (CPU only)"
    lines.append(f"CUDA device: {cuda}")
    healthy = True
    for name in REQUIRED:
        found = _version(name)
        healthy = healthy and found is not None
        lines.append(f"{name:<12s} {found or 'MISSING: pip install ' + name}")
    for extra, names in EXTRAS.items():
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        state = f"not installed: pip install bamboo-md[{extra}]" if missing else "ok"
        lines.append(f"extra {extra:<6s} {state}{' (' + ', '.join(missing) + ')' if missing else ''}")
    for engine, place, reason in (("native", "the CPU", native_status()), ("triton", "the GPU", triton_status())):
        lines.append(f"engine {engine:<6s} {'not in use: ' + reason if reason else 'in use on ' + place}")
    models = checkpoint.zoo()
    lines.append(f"models: {', '.join(models) or 'none'}")
    if "default" not in models:
        lines.append("no default model is installed: give `model: path/to/model.safetensors`")
    return "\n".join(lines), healthy


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
