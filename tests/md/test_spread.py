"""How far models are apart in liquids: of argon, and of numbers whose scatter is known."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import md.liquid
import md.spread
from bamboo.errors import GuardError, InputError
from bamboo.units import BAR
from md.spread import load_spread_config, shell_distances, spread, spread_table, standard_deviation
from md.topology import Topology
from md.trajectory import ThermoSeries

TEXT = """
molecules: {{argon: "[Ar]"}}
groups:
  weak: [{folder}/w0.safetensors, {folder}/w1.safetensors]
  strong: [{folder}/s0.safetensors, {folder}/s1.safetensors]
liquids:
- {{electrolyte: argon, temperature: 340 K, pressure: 2000 bar, density: 0.9 g/cm3, source: a toy}}
output: {folder}/spread
reference: {folder}/w0.safetensors
atoms: 24
equilibrate: 100 fs
starts: 3
settle: 50 fs
expand: 50 fs
time: 300 fs
hot_time: 200 fs
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argon_model: Callable[..., Path]) -> Path:
    monkeypatch.setattr(md.liquid, "guards", lambda *_: [])  # atoms of a gas that meet look like a new bond
    monkeypatch.setattr(md.liquid, "WARM_UP_STEPS", 50)
    monkeypatch.setattr("md.measurements.density_problem", lambda _: None)  # argon is in no table
    for seed in (0, 1):
        argon_model(tmp_path / f"w{seed}.safetensors", seed=seed, strength=0.1)
        argon_model(tmp_path / f"s{seed}.safetensors", seed=seed, strength=1000.0 - 2000.0 * seed)
    path = tmp_path / "spread.yaml"
    path.write_text(TEXT.format(folder=tmp_path))
    return path


def test_models_whose_networks_are_weak_agree_and_others_do_not(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a tenth of the strength the networks of two seeds hardly change argon; what remains is chance."""
    said: list[str] = []
    report = spread(load_spread_config(toy), say=said.append)
    (weak,), (strong,) = (report["groups"][name]["liquids"].values() for name in ("weak", "strong"))
    for pressure in ("pressure_bar", "pressure_on_starts_bar"):
        assert strong[pressure]["spread"] > 1.5 * strong[pressure]["chance"]
        assert strong[pressure]["spread"] > 5.0 * weak[pressure]["spread"]
    assert report["groups"]["strong"]["spread"]["pressure_bar"] == strong["pressure_bar"]["spread"]  # of one liquid
    folder = tmp_path / "spread/liquid/s0/00-argon-340-K"
    known = strong["models"]["s0"]
    for k in range(3):
        virial = ThermoSeries.read(folder / f"0{k}/nvt/molecular/thermo.h5").pressure
        assert known["pressure_bar"][k] == pytest.approx(np.trace(virial, axis1=-2, axis2=-1).mean() / 3.0 / BAR)
        density = ThermoSeries.read(folder / f"0{k}/npt/thermo.h5").density_g_cm3
        assert known["density_g_cm3"][k] == pytest.approx(density.mean())
    starts = [
        [(tmp_path / f"spread/liquid/{name}/00-argon-340-K/0{k}/start.extxyz").read_text() for k in range(3)]
        for name in ("w0", "w1", "s0", "s1")
    ]
    assert starts[0] == starts[1] == starts[2] == starts[3] and len(set(starts[0])) == 3
    assert report["groups"]["weak"]["hot_ps"] == {"w0": pytest.approx(0.2), "w1": pytest.approx(0.2)}
    assert "s1 0" in said[-1] and "root mean square over liquids" in said[-1]

    monkeypatch.setattr(md.spread, "simulate", lambda *_: pytest.fail("simulated again"))
    assert spread(load_spread_config(toy), say=said.append) == report
    toy.write_text(toy.read_text().replace("hot_time: 200", "hot_time: 300"))
    with pytest.raises(InputError, match=r"begun with other settings \(hot_time\)"):
        spread(load_spread_config(toy), say=said.append)


def test_trips_are_counted_and_the_time_is_used_up(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A liquid stopped by a guard begins again, with another seed, for the time that is left; a limit ends that."""
    original, seeds = md.liquid.simulate, list[int]()

    def breaks(box: Any, stages: Any, *rest: Any) -> None:
        if stages[0].name == "equilibrate":
            return original(box, stages, *rest)
        if stages[0].name != "hot":
            raise GuardError("liquid stopped: broken\nsaved here")
        seeds.append(box.seed)
        halved = [md.liquid.Stage("hot", stages[0].time_ps / 2.0)]
        original(box, halved, *rest)
        if stages[0].time_ps > 0.03:
            raise GuardError("hot stopped: too hot\nsaved here")

    monkeypatch.setattr(md.spread, "simulate", breaks)
    report = spread(load_spread_config(toy), say=lambda _: None)
    (hot,) = report["groups"]["weak"]["hot"]["w0"]
    assert hot["trips"] == 3 and hot["reasons"] == ["hot stopped: too hot"] * 3  # 0.2, 0.1, 0.05, 0.025 ps
    assert hot["ran_ps"] == pytest.approx(0.2, abs=0.02) and seeds[:4] == [1, 2, 3, 4]
    (liquid,) = report["groups"]["weak"]["liquids"].values()
    assert liquid["models"]["w0"] == {"stopped": "liquid stopped: broken"} and "pressure_bar" not in liquid
    assert report["groups"]["weak"]["spread"] == {} and "w0 3" in spread_table(report)


def test_chance_is_taken_out_of_the_standard_deviation() -> None:
    """Models that scatter by 2, from four starts that share noise of 10 and add noise of 3: the variance is 4."""
    generator = np.random.default_rng(3)
    values = (
        generator.normal(scale=2.0, size=(4000, 4, 1))
        + generator.normal(scale=10.0, size=(4000, 1, 4))
        + generator.normal(scale=3.0, size=(4000, 4, 4))
    )
    found = [standard_deviation(group) for group in values]
    assert np.mean([each["variance"] for each in found]) == pytest.approx(4.0, rel=0.05)
    assert np.mean([each["chance"] ** 2 for each in found]) == pytest.approx(9.0 / 4.0, rel=0.02)
    spreads = np.array([each["spread"] for each in found])
    assert np.mean(spreads**2) == pytest.approx(4.0, rel=0.1)  # a little more: what would be negative is 0
    same = standard_deviation([[1.0, 2.1], [1.1, 2.0]])
    assert same["spread"] == 0.0 and same["variance"] == pytest.approx(-0.005)


def test_shell_of_lithium_is_the_mean_of_its_near_oxygens() -> None:
    class Frames:
        topology = Topology.__new__(Topology)
        positions = np.array([[[0, 0, 0], [1.9, 0, 0], [0, 9.9, 0], [0, 0, 2.9]]] * 2, dtype=float)
        cells = np.array([12.0 * np.eye(3)] * 2)

    object.__setattr__(Frames.topology, "numbers", np.array([3, 8, 8, 8]))
    Frames.positions[1, 1, 0] = 2.0
    np.testing.assert_allclose(shell_distances(Frames()), [(1.9 + 2.1) / 2, (2.0 + 2.1) / 2])  # one across the cell
    object.__setattr__(Frames.topology, "numbers", np.array([18, 8, 8, 8]))
    assert len(shell_distances(Frames())) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("density: 0.9 g/cm3, ", "viscosity: 1 mPa.s, use: test, ", "has no density"),
        ("s1.safetensors", "s2.safetensors", "s2.safetensors: no such file"),
        ("s1.safetensors", "w1.safetensors", "two models of one name"),
        (", {folder}/s1.safetensors", "", "at least 2 items"),
    ],
)
def test_bad_configurations_are_refused(toy: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    toy.write_text(toy.read_text().replace(old.format(folder=tmp_path), new))
    with pytest.raises(InputError, match=rf"spread.yaml:\d+: .*{message}"):
        load_spread_config(toy)


WORKER = """
import json, sys, time
from pathlib import Path
from bamboo.files import write_json
from md.liquid import share
folder, name = Path(sys.argv[1]), sys.argv[2]
places = [folder / f"{k}.json" for k in range(6)]
def compute(k):
    (folder / f"{k}.begun-{name}").touch()
    if name == "dies":
        time.sleep(60.0)
    time.sleep(0.3)
    write_json(places[k], name)
print("ready", flush=True)
sys.stdin.read(1)
share(places, compute)
print(json.dumps([json.loads(place.read_text()) for place in places]))
"""


def test_processes_share_work_and_take_over_what_a_killed_one_left(tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), name], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def tell(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None
        worker.stdin.write("x")
        worker.stdin.close()

    with ExitStack() as stack:
        workers = {name: stack.enter_context(start(name)) for name in ("dies", "one", "two")}
        stack.callback(lambda: [worker.kill() for worker in workers.values()])
        for worker in workers.values():
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        tell(workers["dies"])
        wait_for(lambda: bool(list(tmp_path.glob("*.begun-dies"))))
        tell(workers["one"])
        tell(workers["two"])
        wait_for(lambda: len(list(tmp_path.glob("?.json"))) == 5)  # all but what the first one holds
        workers["dies"].kill()
        found = [json.loads(workers[name].stdout.read()) for name in ("one", "two")]  # type: ignore[union-attr]
    assert found[0] == found[1] and set(found[0]) == {"one", "two"}
    assert len(list(tmp_path.glob("*.begun-one"))) + len(list(tmp_path.glob("*.begun-two"))) == 6  # none twice


def wait_for(happens: Callable[[], bool]) -> None:
    until = time.monotonic() + 60.0
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.02)
