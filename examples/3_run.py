"""3. A whole run from one YAML file: pack, relax, heat, simulate, compute density and transport with error bars.

python examples/3_run.py

The same from the shell, and what people usually type:  bamboo-md run examples/electrolyte.yaml
Interrupt it whenever you like: the same command continues where it stopped, bit for bit.
"""

import os
from pathlib import Path

from md.config import RunConfig, load_config
from md.workflows import run

HERE = Path(__file__).parent
SMOKE = bool(os.environ.get("SMOKE"))

config = load_config(HERE / "electrolyte.yaml")
if SMOKE:
    box = {"build": {"atoms": 130}, "output": {"trajectory_every": "10 fs", "thermo_every": "5 fs"}}
    stages = [
        {"kind": "minimise", "steps": 10},
        {"kind": "nvt", "time": "100 fs", "temperature": ["50 K", "298 K"], "thermostat": "langevin"},
        {"kind": "npt", "time": "100 fs"},
        {"kind": "nvt", "time": "100 fs"},
    ]
    config = RunConfig.model_validate({"electrolyte": config.electrolyte, "stages": stages, **box})

properties = run(config, Path("runs") / ("smoke" if SMOKE else "electrolyte"))
for name, estimate in properties.items():
    print(f"{name:24s} {estimate}")
