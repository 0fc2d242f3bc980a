"""5. Ensemble distillation: teachers of different seeds simulate liquids, a student learns what they say on average.

python examples/4_train.py && python examples/5_distill.py

The same from the shell:  bamboo-md distill examples/5_distill.yaml
"""

import os
from pathlib import Path

from bamboo import units
from md.distill import distill, load_distill_config

HERE = Path(__file__).parent
SMOKE = bool(os.environ.get("SMOKE"))

config = load_distill_config(HERE / "5_distill.yaml")
if SMOKE:
    femtoseconds = 1.0e-3 * units.PICOSECOND
    config = config.model_copy(
        update={
            "electrolytes": config.electrolytes[:1],
            "atoms": 120,
            "npt": 10 * femtoseconds,
            "nvt": 20 * femtoseconds,
            "frames": 4,
            "loop": config.loop.model_copy(update={"epochs": 1}),
        }
    )
distill(config)
