"""The folder of a run: what is in it, who may work in it, and whether it fits the configuration.

input.yaml resolved.yaml manifest.json start.extxyz start.pdb log.txt
stages/NN-name/{traj.h5, thermo.h5, thermo.csv}  restart/  properties.json  figures/  CITATIONS.bib

A run of several conditions has a folder for each, named by it, that holds what belongs to that condition alone and can
be analysed as a run of its own; restart/, manifest.json and log.txt, of all together, stand above them.
"""

import fcntl
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bamboo.errors import InputError
from bamboo.files import held, write_json, write_text
from md.config import RunConfig, dump_config, load_config

RECORDED_VERSIONS = ("bamboo-md", "torch", "numpy", "ase", "h5py", "torch-pme", "vesin", "packmol", "stacie")
# keys that may differ when a run continues: they do not touch what was already computed
HARMLESS = ("properties", "guards", "checkpoint", "model.device")


class RunFolder:
    """Paths and bookkeeping of one run."""

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file, expected a folder for the run.")
        self.path = path
        self.restart = path / "restart"
        self.figures = path / "figures"
        self.start = path / "start.extxyz"
        self.log = path / "log.txt"
        self.properties = path / "properties.json"
        self._resolved, self._manifest = path / "resolved.yaml", path / "manifest.json"

    def stage(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.path / "stages" / name

    @property
    def is_packed(self) -> bool:
        """Whether the boxes of this run, or of a condition or model in it, are packed."""
        return next(self.path.rglob(self.start.name), None) is not None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; the lock vanishes with this process, however it ends."""
        with held(self.path / ".lock", what=f"{self.path}"):
            yield

    def read_config(self) -> RunConfig:
        """Return the configuration this folder was run with."""
        if not self._resolved.exists():
            raise InputError(f"{self.path}: not the folder of a run (no resolved.yaml).")
        return load_config(self._resolved)

    def accept(self, config: RunConfig, *, begun: int | None, model: dict[str, Any], source: Path | None) -> None:
        """Write the configuration, or refuse it where it contradicts what is already computed.

        config  with all stages written out
        begun   index of the stage in progress, -1 where only boxes are packed, None where nothing is there
        model   name and checksum of the force field
        source  the file it came from, copied as input.yaml
        Raises InputError with the differences.
        """
        if self._resolved.exists() and begun is not None:
            problems = differences(self.read_config(), config, begun=begun)
            before = self.manifest().get("model", {})
            if before.get("sha256") != model.get("sha256"):
                problems.append(f"model: {before.get('name')} -> {model.get('name')}, another file")
            if problems:
                listing = "\n".join(f"  {problem}" for problem in problems)
                raise InputError(
                    f"{self.path} was begun with other settings:\n{listing}\n"
                    "Restore them to continue, or choose another folder."
                )
        if source is not None:
            write_text(self.path / "input.yaml", source.read_text(encoding="utf-8"))
        self.write_config(config)

    def write_config(self, config: RunConfig) -> None:
        """Write resolved.yaml, which ``read_config`` reads."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self._resolved, dump_config(config))

    def manifest(self) -> dict[str, Any]:
        """Return the manifest, empty for a new folder."""
        if not self._manifest.exists():
            return {}
        try:
            return dict(json.loads(self._manifest.read_text(encoding="utf-8")))
        except ValueError:
            raise InputError(
                f"{self._manifest}: damaged. Remove it to continue; it holds the provenance only."
            ) from None

    def update_manifest(self, **entries: Any) -> None:
        """Add entries to manifest.json: what ran, with which versions, on what machine."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        base = {
            "started": now,
            "versions": {name: version(name) for name in RECORDED_VERSIONS} | {"python": sys.version.split()[0]},
            "platform": platform.platform(),
        }
        content = {**base, **self.manifest(), "updated": now, **entries}
        write_json(self._manifest, content)


def differences(old: RunConfig, new: RunConfig, *, begun: int) -> list[str]:
    """Return what a new configuration would change in stages already begun, as lines ``key: old -> new``.

    Accepted: keys in ``HARMLESS``, another length of the stage in progress, anything about later stages.
    """
    before, after = (flatten(config.model_dump(mode="json", exclude_none=True)) for config in (old, new))
    changed = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key) or key.startswith(HARMLESS):
            continue
        parts = key.split(".")
        if parts[0] == "stages":
            index = int(parts[1])
            if index > begun or (index == begun and parts[2] == "time"):
                continue
        changed.append(f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}")
    return changed


def flatten(value: Any, *, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts and lists as one dict with dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= flatten(inner, prefix=f"{prefix}.{key}" if prefix else str(key))
    return flat


def is_locked(folder: Path) -> bool:
    """Tell whether a process works in the folder of a run (``RunFolder.locked``).

    Asked for by trying a shared lock, which is given back at once.
    """
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never locked, or on a file system without locks
        return False
    return False
