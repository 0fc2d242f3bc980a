"""The loop that finds holes, and the checks a model must pass in a liquid, in the smallest boxes that mean much."""

from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest

import md.harvest
import md.validation
from bamboo import checkpoint
from bamboo.errors import GuardError, InputError
from bamboo.quantum.campaign import structure_jobs
from bamboo.structure.packing import molecule_names, pack_box
from md.engine.simulation import Simulation
from md.harvest import HarvestConfig, harvest
from md.validation import ValidationConfig, ValidationReport, measure_conservation, validate


def test_harvest_yields_structures_the_labeller_reads_and_continues(tmp_path: Path) -> None:
    path = tmp_path / "liquid.extxyz"
    config = HarvestConfig(n_boxes=1, n_atoms=60, snapshots=1, interval_fs=20.0, seed=2)
    said: list[str] = []
    written = harvest(checkpoint.load("default"), config, path, say=said.append)
    frames = ase.io.read(path, index=":", format="extxyz")
    assert written == len(frames) >= 1
    for atoms in frames:
        assert atoms.pbc.all() and abs(atoms.info["charge"]) < 1e-9
        assert atoms.info["kind"] == "periodic" and atoms.info["sampling"] == "liquid"
        assert 250.0 < atoms.info["temperature_K"] < 500.0
    jobs = structure_jobs(path)
    structures = [structure for job in jobs for structure in job.structures]
    assert {structure.kind for structure in structures} == {"periodic"} and len(structures) == written
    assert harvest(checkpoint.load("default"), config, path, say=said.append) == 0


def test_exact_forces_conserve_energy_and_frozen_charges_do_not() -> None:
    """100 fs of NVE: the fluctuation with the exact gradient falls as dt^2; with frozen charges energy leaves."""
    config = ValidationConfig(conservation_atoms=60, conservation_ps=0.1, seeds=(1,))
    report = ValidationReport(model="default", electrolyte=config.electrolyte)
    measure_conservation("default", config, report, say=lambda _: None)
    coarse, fine = report.fluctuation_meV_atom["full 0.5 fs"], report.fluctuation_meV_atom["full 0.25 fs"]
    assert coarse / fine == pytest.approx(4.0, rel=0.35)
    frozen = report.deviation_meV_atom["frozen 0.5 fs"]
    assert frozen > 5.0 * report.deviation_meV_atom["full 0.5 fs"]
    assert np.isfinite(list(report.drift_meV_atom_ps.values())).all()


def test_run_that_stops_after_a_snapshot_keeps_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames that led to a failure are kept, but not those that are kept already as snapshots."""

    class Failing(Simulation):
        quarters = 0

        def run(self, n_steps: int) -> None:
            Failing.quarters += n_steps == 1  # the steps between snapshots; 30 and 200 lead up to them
            if Failing.quarters == 5:
                raise GuardError("too hot")

    monkeypatch.setattr(md.harvest, "Simulation", Failing)
    monkeypatch.setattr(md.harvest, "minimise", lambda *_, **__: None)
    path = tmp_path / "liquid.extxyz"
    config = HarvestConfig(n_boxes=1, n_atoms=60, snapshots=2, interval_fs=2.0, seed=2)
    said: list[str] = []
    assert harvest(checkpoint.load("default"), config, path, say=said.append) == 1
    assert "too hot" in said[0] and "1 boxes could not be packed or were stopped" in said[1]


def test_a_harvest_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while it writes leaves the file as it was; a file cut short is told, not a traceback."""
    path = tmp_path / "liquid.extxyz"
    atoms = ase.Atoms("OH", [[0, 0, 0], [1, 0, 0]], info={"trajectory": "harvest-2-60-0000"})
    md.harvest._append(path, [atoms])
    md.harvest._append(path, [atoms, atoms])
    before = path.read_text()
    assert before.count("harvest-2-60-0000") == 3

    def dies(target: str, *_: object, **__: object) -> None:
        with open(target, "a") as file:
            file.write("2\nProper")
        raise KeyboardInterrupt

    monkeypatch.setattr(ase.io, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        md.harvest._append(path, [atoms])
    assert path.read_text() == before
    for torn in ("2\nProper", "2\n" + before.splitlines()[1] + "\nO 0 0", "7", "2\n\nO 0 0 0\nH 0 0 1\n"):
        path.write_text(before + torn)
        with pytest.raises(InputError, match=r"liquid.extxyz: structure 4 is not one of a harvest, or was cut short"):
            harvest(checkpoint.load("default"), HarvestConfig(n_boxes=1, n_atoms=60, seed=2), path)


def test_validation_records_what_stops_and_raises_what_the_user_got_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fall_apart(*_: object, **__: object) -> None:
        raise GuardError("too hot")

    monkeypatch.setattr(md.validation, "_prepare", fall_apart)
    report = validate("default", ValidationConfig(seeds=(1, 2)), say=lambda _: None)
    assert report.stopped == ["energy conservation: too hot", "seed 1: too hot", "seed 2: too hot"]
    with pytest.raises(InputError, match="No model"):
        validate("no such model", ValidationConfig(seeds=(1,)), say=lambda _: None)


def test_large_boxes_are_cut_into_different_clusters_of_both_sizes() -> None:
    counts = {"Li": 3, "PF6": 3, "EC": 12, "DMC": 14}
    system = pack_box(counts, density_g_cm3=1.1, seed=1)
    config = HarvestConfig(large_per_snapshot=2, small_per_snapshot=60)  # more than there are different ones
    cut = md.harvest._structures(system, config, molecule_names(counts), np.random.default_rng(0))
    kinds = [atoms.info["kind"] for atoms in cut]
    assert kinds.count("large") == 2 and len(cut) > 8 and {"lithium", "neutral"} & set(kinds)
    for atoms in cut:
        smallest, largest = (90, 180) if atoms.info["kind"] == "large" else (5, 60)
        assert smallest <= len(atoms) <= largest and not atoms.pbc.any()
        n_lithium, n_phosphorus = (int((atoms.numbers == z).sum()) for z in (3, 15))
        assert atoms.info["charge"] == n_lithium - n_phosphorus  # whole molecules
        if atoms.info["kind"] != "large":
            ions = {
                (False, False): "neutral",
                (True, False): "lithium",
                (False, True): "anion",
                (True, True): "ion_pair",
            }
            assert atoms.info["kind"] == ions[n_lithium > 0, n_phosphorus > 0]
    # the same molecules are never labelled twice
    assert len({np.round(np.sort(atoms.get_all_distances(), None), 6).tobytes() for atoms in cut}) == len(cut)
