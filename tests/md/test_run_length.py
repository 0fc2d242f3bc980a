"""Required times: what they rest on holds, and a configuration is told what its stages can give before it runs."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from md.analysis.diffusion import msd_slopes
from md.composition import realise
from md.config import RunConfig, load_config
from md.run_length import needed_ps, outlook, transport_stage
from md.workflows import check

STAGES = """\
stages:
  - {kind: minimise}
  - {kind: npt, time: 400 ps}
  - {kind: nvt, time: 1 ps, volume: mean}
"""
SALTY = "electrolyte: 1 m LiPF6 in EC:DMC 30:70 wt\n"


def configured(folder: Path, text: str) -> RunConfig:
    (folder / "x.yaml").write_text(text)
    return load_config(folder / "x.yaml")


def outlooks(config: RunConfig, *, seconds_per_step: float = 0.1) -> dict[str, str]:
    box = realise(config.what(), n_atoms=config.build.atoms)
    return {name: one.text for name, one in outlook(config, box, seconds_per_step=seconds_per_step).items()}


def test_every_property_is_told_what_its_stage_can_give(tmp_path: Path) -> None:
    found = outlooks(configured(tmp_path, SALTY + STAGES + "build: {atoms: 300}\n"))
    assert found["density"] == "400 ps of 02-npt should give it to about ± 0.69 % (95 %), the model's own error aside"
    assert found["conductivity"] == (  # 1e7 steps of 0.1 s
        "1 ps of 03-nvt cannot give it; some 10 ns needed, 11 d 14 h at the measured speed; "
        "2 cations in the box, some 50 wanted, in about 7000 atoms"
    )
    assert found["dielectric"] == "not computed: it is that of a liquid without ions"
    longer = outlooks(configured(tmp_path, SALTY + STAGES.replace("1 ps", "100 ps")))
    assert longer["viscosity"].startswith("100 ps of 03-nvt may not be enough; some 2 ns needed")
    exact = outlooks(configured(tmp_path, SALTY + STAGES.replace("1 ps", "2 ns")))
    assert exact["viscosity"] == "2 ns of 03-nvt should give it to about ± 20 % (95 %), the model's own error aside"
    solvent = outlooks(configured(tmp_path, "electrolyte: DMC\n" + STAGES))
    assert solvent["conductivity"] == solvent["coordination"] == "not computed: there are no ions"
    assert "some 1 ns needed" in solvent["viscosity"]


def test_the_stage_is_the_one_that_the_results_use(tmp_path: Path) -> None:
    config = configured(tmp_path, SALTY + STAGES + "  - {kind: npt, time: 1 ps}\n")
    found = transport_stage(config)
    assert found is not None and found[0] == 2
    assert outlooks(config)["density"].startswith("1 ps of 04-npt cannot give it")
    only = configured(tmp_path, SALTY + "stages: [{kind: npt, time: 1 ns}]\n")
    assert "barostat" in outlooks(only)["viscosity"] and "enough" in outlooks(only)["coordination"]
    assert outlooks(configured(tmp_path, SALTY + "stages: [{kind: minimise}]\n"))["density"] == (
        "not computed: there is no stage that gives it"
    )


def test_replicas_share_what_is_averaged() -> None:
    assert needed_ps("conductivity", ions=True, replicas=4) == pytest.approx(2500.0)
    assert needed_ps("coordination", ions=True, replicas=4) == needed_ps("coordination", ions=True)
    assert needed_ps("conductivity", ions=True, replicas=64) == needed_ps("conductivity", ions=True, replicas=8)
    assert needed_ps("density", ions=False, replicas=8) > 100.0


def test_the_error_of_a_collective_displacement_is_the_one_the_times_rest_on() -> None:
    generator = np.random.default_rng(0)
    lag, n_frames = 4, 512
    walks = np.cumsum(generator.normal(size=(300, n_frames, 1, 3)), axis=1)
    found = [msd_slopes([walk]) for walk in walks]
    values = np.array([each.values[each.lags == lag][0] for each in found])
    assert values.std() / values.mean() == pytest.approx(1.4 * sqrt(lag / n_frames), rel=0.15)


def test_check_prints_the_warnings_of_a_run(tmp_path: Path) -> None:
    config = configured(tmp_path, SALTY + STAGES + "build: {atoms: 60}\ntemperature: [298 K, 320 K]\n")
    result = check(config)
    text = str(result)
    assert text.count("this box is too small for what was asked") == 2
    assert text.count("conductivity: 1 ps of 03-nvt cannot give it") == 1  # the same for both temperatures
    (condition, _) = result.to_dict()["conditions"].values()
    assert "too small" in condition["warning"]
    assert condition["properties"]["viscosity"]["needed_ps"] == 2000.0
