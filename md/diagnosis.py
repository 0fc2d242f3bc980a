"""Is this installation sound, and how fast is it?"""

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import bamboo
from bamboo import checkpoint
from bamboo.errors import InputError
from md.config import BuildBlock, ModelBlock, RunConfig
from md.model import load_model, seconds_per_step
from md.workflows import start_box

REQUIRED = ("torch", "numpy", "scipy", "ase", "h5py", "vesin", "torch-pme", "packmol", "rdkit", "stacie", "mdtraj")
EXTRAS = {"qm": ("tblite", "pyscf", "dftd3")}


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


def bench(model: str, *, atoms: int, device: str) -> str:
    """Return the wall time of one force evaluation of 1 m LiPF6 in EC:DMC 30:70 wt, as text."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"Unknown device '{device}', expected auto, cpu or cuda.")
    block = ModelBlock.model_validate({"name": model, "device": device})
    text = "1 m LiPF6 in EC:DMC 30:70 wt"
    config = RunConfig(electrolyte=text, model=block, build=BuildBlock(atoms=atoms))
    loaded = load_model(config)
    box, system = start_box(config)
    seconds = seconds_per_step(loaded.evaluator, system, repeats=5)
    ns_per_day = 86400.0 / seconds * 1.0e-6
    return (
        f"{loaded.description}\n{box}\n"
        f"{1e3 * seconds:.1f} ms per step, {1e6 * seconds / system.n_atoms:.1f} us per atom and step, "
        f"{ns_per_day:.3g} ns/day at 1 fs"
    )
