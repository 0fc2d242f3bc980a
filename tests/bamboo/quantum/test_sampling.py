"""Sampling covers what it says, and a campaign that is stopped continues without losing or repeating anything."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tblite")

from ase.io import write as write_ase

from bamboo.errors import InputError
from bamboo.quantum import campaign, sampling
from bamboo.quantum.campaign import Job, finished_jobs, plan_jobs, run_campaign, structure_jobs, summary
from bamboo.quantum.compositions import (
    ANIONS,
    CATION,
    SOLVENTS,
    density_g_cm3,
    kind_of,
    random_liquid,
    random_small,
)
from bamboo.quantum.conformers import Library, build_library
from bamboo.quantum.dataset import read_frames, round_positions
from bamboo.quantum.probes import ester_torsion
from bamboo.quantum.xtb import UnconvergedError, label_xtb
from bamboo.structure.molecules import molecule
from bamboo.structure.packing import formal_bonds, pack_box, pack_cluster


@pytest.fixture(scope="module")
def library():
    """Built-in geometries instead of thermal ones: what matters here is how they are used."""
    return Library({name: [molecule(name).positions] for name in campaign.NAMES})


def test_small_compositions_cover_every_kind_within_60_atoms():
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(400):
        counts = random_small(rng)
        assert 8 <= sum(molecule(name).n_atoms * count for name, count in counts.items()) <= 60
        seen.append(kind_of(list(counts)))
    for kind in ("neutral", "lithium", "anion", "ion_pair"):
        assert seen.count(kind) > 30, kind


def test_liquids_have_the_density_of_experiment():
    # measured at 25 °C: EC:DMC 1:1 wt 1.20; 1 m LiPF6 in EC:DMC 3:7 wt 1.24 (ideal mixing is good to 2 %)
    assert density_g_cm3({"EC": 100, "DMC": 98}) == pytest.approx(1.20, rel=0.02)
    assert density_g_cm3({"EC": 341, "DMC": 777, "Li": 100, "PF6": 100}) == pytest.approx(1.24, rel=0.02)


def test_random_liquids_have_the_size_and_salt_asked_for():
    rng = np.random.default_rng(1)
    sizes, molalities = [], []
    for _ in range(300):
        counts, density = random_liquid(rng, n_atoms=95, scale=(0.9, 1.1))
        sizes.append(sum(molecule(name).n_atoms * count for name, count in counts.items()))
        solvent_kg = sum(molecule(name).molar_mass * counts[name] for name in counts if name in SOLVENTS) / 1e3
        molalities.append(counts.get(CATION, 0) / solvent_kg)
        assert counts.get(CATION, 0) == sum(counts.get(anion, 0) for anion in ANIONS)
        assert 0.9 <= density / density_g_cm3(counts) <= 1.1
    assert np.mean(sizes) == pytest.approx(95, abs=3)
    assert np.mean(molalities) == pytest.approx(0.75, abs=0.12)  # uniform in 0-1.5; rounding adds noise


def test_scaling_moves_molecules_rigidly():
    cluster = pack_cluster({"EC": 3}, seed=1)
    scaled = sampling.scale_centres(cluster, 0.8)
    old, new = (np.stack([c.positions[c.molecule == m].mean(axis=0) for m in range(3)]) for c in (cluster, scaled))
    assert new - new.mean(axis=0) == pytest.approx(0.8 * (old - old.mean(axis=0)), abs=1e-9)
    for m in range(3):
        shift = scaled.positions[cluster.molecule == m] - cluster.positions[cluster.molecule == m]
        assert np.ptp(shift, axis=0) == pytest.approx(0.0, abs=1e-9)


def test_broken_and_fused_molecules_are_noticed():
    pair = pack_cluster({"EC": 2}, seed=1)
    bonds = formal_bonds(("EC", "EC"))
    assert sampling.is_intact(pair, bonds)
    hydrogen = int(np.flatnonzero(pair.numbers == 1)[-1])
    carbonyl = int(np.flatnonzero(pair.numbers == 8)[1])
    broken, fused = pair.positions.copy(), pair.positions.copy()
    broken[hydrogen] += [9.0, 0.0, 0.0]
    outward = broken[carbonyl] - broken[:10].mean(axis=0)
    # the second molecule moves as a whole, one hydrogen to 0.95 Å from an oxygen of the first: all old bonds remain
    fused[10:] += fused[carbonyl] + 0.95 * outward / np.linalg.norm(outward) - fused[hydrogen]
    assert not sampling.is_intact(replace(pair, positions=broken), bonds)
    assert not sampling.is_intact(replace(pair, positions=fused), bonds)


def test_dynamics_gives_frames_whose_labels_belong_to_the_stored_positions(library, monkeypatch):
    monkeypatch.setattr(sampling, "random_small", lambda _: {"VC": 1, "Li": 1})
    monkeypatch.setattr(sampling, "N_KEPT", (3, 3))
    monkeypatch.setattr(sampling, "BURN_IN_STEPS", 5)
    outcome = sampling.Outcome("test")
    sampling.sample_dynamics(np.random.default_rng(0), library, outcome)
    assert len(outcome.frames) == 3 and outcome.unconverged == outcome.reacted == outcome.rejected == 0
    frame = outcome.frames[-1]
    assert np.array_equal(frame.system.positions, round_positions(frame.system.positions))
    assert frame.kind == "lithium" and frame.sampling == "dynamics" and 300.0 <= frame.temperature_K <= 800.0
    fresh = label_xtb(frame.system)
    assert frame.labels.energy == pytest.approx(fresh.energy, abs=1e-4)
    assert frame.labels.forces == pytest.approx(fresh.forces, abs=5e-3)  # electrons converged from another start


def test_scans_reach_from_the_wall_to_beyond_the_cutoff(library, monkeypatch):
    monkeypatch.setattr(sampling, "random_pair", lambda _: ("VC", "Li"))
    built = library.geometries["VC"][0].copy()
    shape = np.linalg.norm(built[:, None] - built[None], axis=2)
    for seed in range(3):
        outcome = sampling.Outcome("test")
        sampling.sample_scan(np.random.default_rng(seed), library, outcome)
        contacts = []
        for frame in outcome.frames:
            first, second = (frame.system.positions[frame.system.molecule == m] for m in (0, 1))
            contacts.append(np.linalg.norm(first[:, None] - second[None], axis=2).min())
        assert contacts[0] == pytest.approx(8.0, abs=0.1) or outcome.unconverged
        assert contacts[-1] < 1.75 and np.all(np.diff(contacts) < 1e-6)
        first = outcome.frames[0].system.positions[:8]  # rigid: the solvent keeps its shape
        assert np.linalg.norm(first[:, None] - first[None], axis=2) == pytest.approx(shape, abs=1e-5)


def test_every_other_recipe_runs(library, monkeypatch):
    """Labels are faked: the quantum method has its own tests, here the geometry counts."""

    def fake(system_or_atoms):
        n_atoms = len(system_or_atoms.numbers)
        return sampling.Labels("fake", 0.0, forces=np.zeros((n_atoms, 3)), charges=np.zeros(n_atoms))

    monkeypatch.setattr(sampling, "evaluate_atoms", fake)
    monkeypatch.setattr(sampling, "label_xtb", fake)
    monkeypatch.setattr(sampling, "relax", lambda atoms, n_steps: None)
    large, periodic, distorted = (sampling.Outcome(name) for name in ("large", "periodic", "distorted"))
    sampling.sample_large(np.random.default_rng(1), library, large)
    sampling.sample_periodic(np.random.default_rng(1), library, periodic)
    sampling.sample_distorted(np.random.default_rng(1), library, distorted)
    assert len(large.frames) == 4 and all(90 <= f.system.n_atoms <= 180 and not f.system.pbc for f in large.frames)
    assert len(periodic.frames) == 2 and all(80 <= f.system.n_atoms <= 110 and f.system.pbc for f in periodic.frames)
    # the second frame is the first with every atom displaced by 0.03-0.05 Å rms
    shift = periodic.frames[1].system.positions - periodic.frames[0].system.positions
    assert 0.025 < np.sqrt((shift**2).sum(axis=1).mean()) < 0.055
    assert len(distorted.frames) == 16


def test_rotated_carbonates_keep_their_bonds_and_leave_the_wells(library, monkeypatch):
    """Dynamics stays within 60 degrees of cis; turned at random, two thirds of the torsions lie beyond."""

    def fake(system):
        return sampling.Labels("fake", 0.0, forces=np.zeros((system.n_atoms, 3)), charges=np.zeros(system.n_atoms))

    monkeypatch.setattr(sampling, "label_xtb", fake)
    widest = []
    for seed in range(6):
        outcome = sampling.Outcome("rotated")
        sampling.sample_rotated(np.random.default_rng(seed), library, outcome)
        assert len(outcome.frames) == 8
        for frame in outcome.frames:
            name = next(n for n in sampling.LINEAR_CARBONATES if molecule(n).n_atoms == frame.system.n_atoms)
            lengths = [np.linalg.norm(np.subtract(*frame.system.positions[list(b)])) for b in molecule(name).bonds]
            assert max(lengths) < 1.65
            widest.append(max(abs(ester_torsion(name, frame.system.positions, side=side)) for side in (0, 1)))
    assert 0.45 < np.mean(np.array(widest) > 60.0) < 0.9


def test_isolated_ions_carry_their_formal_charge(library):
    outcome = sampling.Outcome("test")
    sampling.sample_isolated(np.random.default_rng(0), library, outcome)
    assert [frame.system.n_atoms for frame in outcome.frames] == [molecule(name).n_atoms for name in library.names]
    for frame, name in zip(outcome.frames, library.names, strict=True):
        assert frame.labels.charges.sum() == pytest.approx(molecule(name).charge, abs=1e-6)
    assert {1.0} <= {frame.system.total_charge for frame in outcome.frames if frame.system.n_atoms == 1}


def test_unconverged_structures_are_counted_not_kept(library, monkeypatch):
    def fail(_):
        raise UnconvergedError("no")

    monkeypatch.setattr(sampling, "label_xtb", fail)
    outcome = sampling.Outcome("test")
    sampling.sample_distorted(np.random.default_rng(0), library, outcome)
    assert outcome.frames == [] and outcome.unconverged == 16


def test_library_of_conformers_is_thermal_and_survives_its_file(tmp_path):
    library = build_library(["VC", "Li"], seed=1, n_starts=1, per_start=2)
    library.save(tmp_path / "a.npz")
    back = Library.load(tmp_path / "a.npz")
    assert back.names == ["VC", "Li"] and len(back.geometries["VC"]) == 2
    assert np.array_equal(back.geometries["VC"][1], library.geometries["VC"][1])
    assert 0.02 < np.abs(back.geometries["VC"][1] - back.geometries["VC"][0]).max() < 1.0


def test_plan_is_shuffled_and_balanced_at_any_moment():
    jobs = plan_jobs({"scan": 300, "large": 100}, seed=1)
    assert jobs[0].name == plan_jobs({"scan": 300, "large": 100}, seed=1)[0].name
    prefix = [job.recipe for job in jobs[:100]]
    assert prefix.count("scan") == pytest.approx(75, abs=18)  # 4 standard errors of drawing 100 of 400
    with pytest.raises(InputError, match="Unknown recipe"):
        plan_jobs({"scam": 1}, seed=1)


def test_a_stopped_campaign_continues(tmp_path):
    """Two structures to label; the first run has done one of them, with its record lost as a kill would lose it."""
    boxes = [pack_cluster({"VC": 1}, seed=1), pack_box({"VC": 2}, density_g_cm3=1.0, seed=2)]
    for k, system in enumerate(boxes):
        atoms = system.to_atoms()
        atoms.info |= {"trajectory": "md", "kind": "periodic" if system.pbc else "neutral", "temperature_K": 300.0}
        write_ase(tmp_path / "in.xyz", atoms, format="extxyz", append=k > 0)
    jobs = structure_jobs(tmp_path / "in.xyz")
    first, second = (job.name for job in jobs)
    assert first.startswith("md/") and first != second and structure_jobs(tmp_path / "in.xyz")[0].name == first
    folder = tmp_path / "out"
    run_campaign(jobs[:1], folder, workers=1, seed=1, library=False)
    record = folder / "finished.jsonl"
    record.write_text(record.read_text()[:20])  # cut short
    assert finished_jobs(folder) == {first}
    run_campaign(jobs, folder, workers=1, seed=1, library=False)
    frames = read_frames(folder / "shard-000.h5")
    assert [frame.trajectory for frame in frames] == [first, second]
    assert "label" in summary(folder) and finished_jobs(folder) == {first, second}  # a new line after the one cut short
    boxes[0].positions[0, 0] += 0.1
    write_ase(tmp_path / "in.xyz", boxes[0].to_atoms(), format="extxyz")
    assert structure_jobs(tmp_path / "in.xyz")[0].name not in finished_jobs(folder)  # edited: another job
    other = [Job("md/other", "label", jobs[0].structures, "dft")]
    with pytest.raises(InputError, match=r"holds labels of GFN2-xTB.*another method"):
        run_campaign(other, folder, workers=1, seed=1, library=False)
    assert summary(tmp_path / "empty").splitlines()[-1].startswith("recipe")
    assert frames[1].kind == "periodic" and frames[1].labels.virial is not None and frames[1].temperature_K == 300.0
    assert frames[0].system.molecule is not None and frames[0].sampling == "liquid"


def test_summary_counts_what_was_dropped(tmp_path):
    folder = tmp_path / "out"
    outcome = sampling.Outcome("scan-1-00000", unconverged=2)
    system = pack_cluster({"VC": 1}, seed=1)
    outcome.add(system, sampling.Labels("x", 0.0, np.zeros((8, 3))), kind="neutral", sampling="scan")
    folder.mkdir()
    campaign._record(folder, Job("scan-1-00000", "scan"), outcome, 1.5)
    assert json.loads((folder / "finished.jsonl").read_text())["unconverged"] == 2
    assert summary(folder).splitlines()[-1].split() == ["scan", "1", "1", "2", "0", "0", "1.5"]
