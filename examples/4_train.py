"""4. Train on your own data: extended XYZ in, a model file with its card of held-out errors out.

python examples/4_train.py

The same from the shell: see the first lines of 4_train.yaml.
"""

import os
from pathlib import Path

from bamboo import checkpoint
from bamboo.learn.fit import TrainConfig, error_table, held_out_errors, train
from bamboo.quantum.dataset import read_frames, write_frames
from bamboo.quantum.importers import import_extxyz
from md.yaml_model import load_yaml

HERE = Path(__file__).parent
SMOKE = bool(os.environ.get("SMOKE"))

config = load_yaml(HERE / "4_train.yaml", TrainConfig)
if SMOKE:
    config = config.model_copy(update={"loop": config.loop.model_copy(update={"epochs": 2})})

(data,) = config.data
data.parent.mkdir(parents=True, exist_ok=True)
write_frames(data, import_extxyz(HERE / "own_data.extxyz", units="eV,Å,Debye", level="B3LYP/def2-SVPD"))

print("before, on the held-out trajectories:")
print(error_table(held_out_errors(checkpoint.load(config.start or "gfn2"), read_frames(data))))
print("training:")
train(config)
