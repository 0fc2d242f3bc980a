"""6. Density alignment: measure the pressure at the experimental density, correct the model, measure again.

python examples/6_align.py

The same from the shell:  bamboo-md align examples/6_align.yaml
"""

import os
from pathlib import Path

from bamboo import units
from md.align import align
from md.align_config import load_align_config

HERE = Path(__file__).parent
SMOKE = bool(os.environ.get("SMOKE"))

config = load_align_config(HERE / "6_align.yaml")
if SMOKE:
    femtoseconds = 1.0e-3 * units.PICOSECOND
    config = config.model_copy(
        update={
            "align": config.align[:1],
            "test": (),
            "atoms": 120,
            "equilibrate": 200 * femtoseconds,
            "time": 200 * femtoseconds,
            "frames": 2,
            "compressibility": 0.1e-9 / units.PASCAL,  # a box this young has some kbar, which else is refused
            "tolerance": 10 * units.GRAM_PER_CM3,  # reached at once: a look at the table, not a correction
        }
    )
align(config)
