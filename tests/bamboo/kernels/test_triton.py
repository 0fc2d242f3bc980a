"""The Triton engine against the reference: on a GPU, or interpreted on a CPU (tests/conftest.py).

An evaluation in the interpreter takes seconds whatever the number of atoms: few evaluations, of batches that hold all.
"""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install bamboo-md[gpu]")

from bamboo import units
from bamboo.checkpoint import load
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.kernels import device_lists, engines, mesh, triton_engine, triton_network
from bamboo.neighbors import find_pairs
from bamboo.published import import_published
from bamboo.system import Batch, System
from bamboo.terms import electrostatics, ewald

DEVICE = "cpu" if triton_network.INTERPRETED else "cuda"
EXACT = 1e-10  # relative to the largest value
pytestmark = pytest.mark.skipif(bool(engines.triton_status(DEVICE)), reason=engines.triton_status(DEVICE))


@pytest.fixture
def exact_waves(monkeypatch):
    """Both engines sum reciprocal space to rounding: the reference wave by wave, the other on a very fine mesh."""
    monkeypatch.setattr(ewald, "REACH", 6.0)
    monkeypatch.setattr(electrostatics, "reciprocal_energy", ewald.reciprocal_energy)
    set_spacing(monkeypatch, 0.12)


def set_spacing(monkeypatch, spacing):
    monkeypatch.setattr(mesh, "SPACING", spacing)
    monkeypatch.setattr(mesh, "SMALLEST", 0.8 * spacing)
    monkeypatch.setattr(mesh, "LARGEST", 1.05 * spacing)


def evaluate(field, *systems, engine="triton", skin=1.0):
    device = DEVICE if engine == "triton" else "cpu"
    return on_cpu(Evaluator(field, engine=engine, skin=skin, device=device).evaluate(Batch.from_systems(systems)))


def on_cpu(output):
    """Return name -> tensor of everything an output holds, on the CPU."""
    names = ("energy", "forces", "virial", "charges", "dipole", "raw_charge")
    return {name: getattr(output, name).cpu() for name in names} | {k: v.cpu() for k, v in output.terms.items()}


def assert_same(actual, expected, *, tolerance=EXACT):
    assert actual.keys() == expected.keys()
    wrong = {}
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == value.dtype == torch.float64, name
        error = float((actual[name] - value).abs().max()) / max(1.0, float(value.abs().max()))
        if not error < tolerance:
            wrong[name] = error
    assert not wrong, wrong


@pytest.fixture(scope="module")
def structures(make_box, make_cluster):
    """Tilted, left-handed and charged boxes smaller than the cutoffs, with atoms outside; a crowded cluster."""
    tilted, charged = make_box(1), make_box(6, n_atoms=7, cell=np.diag([4.4, 6.3, 5.4]), total_charge=1.0)
    images = np.random.default_rng(0).integers(-3, 4, (tilted.n_atoms, 3))
    mirrored = System(tilted.numbers, tilted.positions + images @ tilted.cell, tilted.cell[[1, 0, 2]], pbc=True)
    crowded = make_cluster(5, closest=0.35, n_atoms=20)
    return tilted, charged, mirrored, crowded, make_cluster(2, n_atoms=3, total_charge=-1.0)


@pytest.mark.parametrize(
    ("attention", "response", "layers"), [("get", "full", 3), ("gedt", "full", 2), ("get", "frozen", 2)]
)
def test_boxes_and_clusters_in_one_batch(make_force_field, structures, exact_waves, attention, response, layers):
    field = make_force_field(attention=attention, charge_response=response, network={"layers": layers})
    expected = evaluate(field, *structures, engine="reference")
    assert float(expected["forces"].abs().max()) > 1e-2 and float(expected["repulsion"][3]) > 0.1
    assert_same(evaluate(field, *structures), expected)


def test_published_dispersion_and_no_repulsion(make_force_field, make_box, make_cluster):
    options = {"network": {"layers": 2}, "dispersion": {"smooth": False, "a1": 0.82, "cutoff": 6.0}}
    field, systems = make_force_field("dispersion", **options), (make_box(1), make_cluster(1, total_charge=0.0))
    expected = evaluate(field, *systems, engine="reference")
    assert "repulsion" not in expected and float(expected["dispersion"].abs().min()) > 1e-2
    assert_same(evaluate(field, *systems), expected)


def test_supercell(make_force_field, make_box, exact_waves):
    """Twice the box is twice the energy, on lists with several images of one pair and with one."""
    box, field = make_box(3), make_force_field(network={"layers": 2})
    twice = System(
        np.tile(box.numbers, 2), np.concatenate([box.positions, box.positions + box.cell[2]]),
        box.cell * [[1.0], [1.0], [2.0]], pbc=True,
    )  # fmt: skip
    output = evaluate(field, box, twice)
    assert float(output["energy"][1]) == pytest.approx(2.0 * float(output["energy"][0]), rel=1e-10)
    assert torch.allclose(output["forces"][16:32], output["forces"][:16], rtol=0.0, atol=1e-8)
    assert torch.allclose(output["virial"][1], 2.0 * output["virial"][0], rtol=0.0, atol=1e-8)


def test_single_precision(make_force_field, make_box, exact_waves):
    field, box = make_force_field(), make_box(4)
    expected = evaluate(field, box, engine="reference")
    assert_same(evaluate(field.to_dtype(torch.float32), box), expected, tolerance=1e-5)


def test_real_molecules_in_single_precision(published, exact_waves, tmp_path):
    """Forces in float32 within 1e-4 kcal/mol/Å RMS of the exact ones, 64 channels, packed as in a liquid."""
    import_published(published / "weights.safetensors", tmp_path / "published.safetensors")
    frame = np.load(published / "gas1.npz")
    cell = np.diag(np.ptp(frame["positions"], axis=0) + 2.3)
    system = System(frame["numbers"].astype(np.int64), frame["positions"], cell, pbc=True)
    exact_field, single_field = (
        load(tmp_path / "published.safetensors", dtype=dtype, charge_response="full")
        for dtype in (torch.float64, torch.float32)
    )
    exact = evaluate(exact_field, system, engine="reference")["forces"] / units.KCAL_PER_MOL
    single = evaluate(single_field, system)["forces"] / units.KCAL_PER_MOL
    assert float(exact.square().mean().sqrt()) > 10.0
    assert float((single - exact).square().mean().sqrt()) < 1e-4


def test_lists_hold_for_the_whole_skin_and_results_repeat(make_force_field, make_box, exact_waves):
    """Within the skin the old lists give what new ones give; after a reset the first numbers come back bit for bit."""
    field, system = make_force_field(network={"layers": 2}), make_box(6)
    evaluator = Evaluator(field, engine="triton", skin=1.0, device=DEVICE)
    first = on_cpu(evaluator.evaluate(Batch.from_systems([system])))
    built = evaluator._built
    step = np.random.default_rng(1).normal(size=(system.n_atoms, 3))
    step *= 0.38 / np.linalg.norm(step, axis=1)[:, None]
    strain = np.eye(3) + 0.004 * np.random.default_rng(2).normal(size=(3, 3))
    moved = System(system.numbers, (system.positions + step) @ strain, system.cell @ strain, pbc=True)
    batch = Batch.from_systems([moved])
    by_column = batch.positions.T.contiguous().T  # kernels must not mind how the caller keeps them
    kept = on_cpu(evaluator.evaluate(replace(batch, positions=by_column)))
    assert evaluator._built is built
    assert_same(kept, evaluate(field, moved, engine="reference", skin=0.0), tolerance=1e-9)
    evaluator.reset()
    again = on_cpu(evaluator.evaluate(Batch.from_systems([system])))
    if DEVICE == "cpu":  # on a GPU the charges are spread on the mesh in no fixed order
        assert all(torch.equal(again[name], value) for name, value in first.items())
    assert_same(again, first)


def test_changed_parameters_are_noticed_and_overlaps_named(make_force_field, make_cluster):
    field, system = make_force_field(network={"layers": 2}), make_cluster(1)
    evaluator = Evaluator(field, engine="triton", device=DEVICE)
    before = evaluator.evaluate(Batch.from_systems([system]))
    with torch.no_grad():
        field.energy_head[0].weight.mul_(1.5)
        field.reference_charge.add_(0.1)
    positions = system.positions.copy()
    after = evaluator.evaluate(Batch.from_systems([system]))
    assert abs(float(after.energy - before.energy)) > 1e-3
    assert_same(on_cpu(after), evaluate(field, system, engine="reference"))
    positions[9] = positions[4] + [0.0, 0.2, 0.0]
    broken = System(system.numbers, positions, system.cell, pbc=False)
    with pytest.raises(InputError, match=r"Atoms (4 and 9|9 and 4) are 0.200 Å apart"):
        evaluator.evaluate(Batch.from_systems([broken]))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device, and no interpreter")
@pytest.mark.gpu
def test_replayed_graph_follows_the_atoms(make_force_field, make_box):
    """The captured graph is replayed, not captured again, and gives what a new one gives."""
    field, box = make_force_field(), make_box(1)
    evaluator = Evaluator(field, engine="triton", device="cuda")
    evaluator.evaluate(Batch.from_systems([box]))
    graph = evaluator._engine._graph
    moved = System(box.numbers, box.positions + 0.01 * np.sin(np.arange(48.0)).reshape(16, 3), box.cell, pbc=True)
    output = evaluator.evaluate(Batch.from_systems([moved]))
    assert evaluator._engine._graph is graph is not None
    assert_same(on_cpu(output), evaluate(field, moved), tolerance=1e-9)


def test_evaluation_can_be_captured(make_force_field, make_box, make_cluster, monkeypatch, without_host):
    """The check of the lists included; where these lie changes with the atoms and the mesh, not with a new build."""
    for module in (triton_engine, triton_network):
        monkeypatch.setattr(module, "launch", lambda *arrays, **settings: None)
    systems = [make_box(1), make_cluster(1), make_box(2)]
    batch = Batch.from_systems(systems).to(DEVICE)
    evaluator = Evaluator(make_force_field(), engine="triton", device=DEVICE)
    assert evaluator.layout is None
    evaluator._build(batch)
    layout = evaluator.layout
    with torch.no_grad(), without_host():
        _, holds = evaluator.evaluate_unchecked(batch)
    assert holds.shape == () and holds.dtype == torch.bool and layout is not None
    evaluator.reset()
    assert evaluator.layout is None
    evaluator._build(batch)
    assert evaluator.layout == layout
    for other in (replace(batch, cell=1.3 * batch.cell), Batch.from_systems(systems[:2]).to(DEVICE)):
        evaluator._build(other)
        assert evaluator.layout > layout
        layout = evaluator.layout


def test_lists_equal_those_of_the_reference(make_box, make_cluster):
    """Small and large, tilted, long and left-handed boxes, atoms far outside, clusters of one bin and of many."""
    large = make_cluster(3, n_atoms=120)
    long_box = make_box(5, n_atoms=14, cell=np.array([[5.3, 0.0, 0.0], [2.0, 5.6, 0.0], [0.0, -3.0, 31.0]]))
    wide = make_box(2, n_atoms=30, cell=np.diag([13.0, 12.0, -14.0]))
    images = np.random.default_rng(0).integers(-3, 4, (wide.n_atoms, 3))
    outside = System(wide.numbers, wide.positions + images @ wide.cell, wide.cell, pbc=True)
    batch = Batch.from_systems([make_box(1), long_box, large, outside, make_cluster(2, n_atoms=3)])
    for cutoff in (2.5, 4.0, 6.5):
        i, j, shift = device_lists.find_pairs(batch, torch.full((batch.n_systems,), cutoff, dtype=torch.float64))
        expected = find_pairs(batch, cutoff, full=True)
        found = torch.cat([i[:, None], j[:, None], shift], dim=1).long()
        wanted = torch.cat([expected.index.T, expected.shift.long()], dim=1)
        assert (i.diff() >= 0).all() and len(found) == len(wanted)
        assert torch.equal(torch.unique(found, dim=0), torch.unique(wanted, dim=0))
    everything = torch.where(batch.pbc, 0.1, torch.inf).double()
    i, _, _ = device_lists.find_pairs(batch, everything)
    assert len(i) == 120 * 119 + 3 * 2


def test_mesh_against_the_direct_sum(monkeypatch, make_box):
    """Energy, potential, forces and virial of two boxes on meshes of equal size."""
    monkeypatch.setattr(ewald, "REACH", 6.0)
    boxes, cutoff = [make_box(1), make_box(2, cell=np.diag([7.0, 8.0, 7.5]))], 5.0
    alpha = electrostatics.splitting(cutoff)
    charges = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch.from_systems(boxes)
    inverse, volume = torch.linalg.inv(batch.cell).transpose(1, 2), torch.linalg.det(batch.cell).abs()
    energy, virial, potential, gradient = mesh.TorchMesh((60, 64, 60), alpha, torch.device("cpu"))(
        charges, batch.positions, batch.system_index, inverse=inverse, volume=volume
    )
    for box in range(2):
        atoms = slice(16 * box, 16 * box + 16)
        q, r = charges[atoms].clone().requires_grad_(), batch.positions[atoms].clone().requires_grad_()
        strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        cell = batch.cell[box] + batch.cell[box] @ strain
        expected = ewald.reciprocal_energy(q, r + r @ strain, cell, cutoff=cutoff)
        on_q, on_r, on_strain = torch.autograd.grad(expected, (q, r, strain))
        own = units.COULOMB_CONSTANT * alpha / np.sqrt(np.pi)
        expected, q, total = expected.detach(), q.detach(), q.detach().sum()
        uniform = units.COULOMB_CONSTANT * np.pi / (2.0 * alpha**2 * volume[box]) * total
        assert float(energy[box]) == pytest.approx(float(expected + own * q.square().sum() + uniform * total), abs=1e-9)
        assert torch.allclose(potential[atoms], on_q + 2.0 * own * q + 2.0 * uniform, rtol=0.0, atol=1e-9)
        assert torch.allclose(q[:, None] * gradient[atoms], on_r, rtol=0.0, atol=1e-9)
        assert torch.allclose(virial[box], -on_strain + uniform * total * torch.eye(3).double(), rtol=0.0, atol=1e-8)


def test_choice_of_engine(make_force_field, monkeypatch):
    odd = make_force_field(network={"channels": 24, "heads": 3})
    with pytest.raises(InputError, match="both must be powers of two"):
        Evaluator(odd, engine="triton", device=DEVICE)
    monkeypatch.setattr(triton_network, "INTERPRETED", False)
    with pytest.raises(InputError, match=r"engine 'triton' cannot be used: it needs a CUDA device\."):
        Evaluator(make_force_field(), engine="triton", device="cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(InputError, match=r"pip install bamboo-md\[gpu\]"):
        Evaluator(make_force_field(), engine="triton", device=DEVICE)


COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from bamboo.forcefield import ForceField, ForceFieldConfig
from bamboo.kernels import triton_engine
from bamboo.nn.get import NetworkConfig
from bamboo.system import Batch, System

class NoDriver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

def compile_only(kernel, *arguments, grid, warmup, **settings):
    compiled = run(kernel, *arguments, grid=grid, warmup=True, **settings)
    print(kernel.fn.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared)

triton.runtime.driver.set_active(NoDriver())
run, JITFunction.run = JITFunction.run, compile_only
triton_engine.INTERPRETED = True  # allows tensors on the CPU
network = NetworkConfig(attention=sys.argv[1], heads=8, layers=2)
field = ForceField(ForceFieldConfig(network=network))
numbers = torch.tensor([8, 1, 1]).numpy()
box = System(numbers, torch.rand(3, 3).double().numpy(), 9.0 * torch.eye(3).double().numpy(), pbc=True)
batch, engine = Batch.from_systems([box]), triton_engine.TritonEngine(field)
engine.rebuild(batch, 1.0)
engine._plan.compute(batch.positions, batch.cell, batch.total_charge)
"""


@pytest.mark.parametrize("attention", ["get", "gedt"])
def test_kernels_compile_for_a_gpu(attention, tmp_path):
    """Every kernel, as the engine launches it for 64 channels in float32, becomes machine code of an H100."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, attention]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in lines} == {
        "edges_kernel", "messages_kernel", "coulomb_kernel", "messages_backward_kernel", "edge_forces_kernel",
        "fixed_kernel",
    }  # fmt: skip
    assert all(int(size) > 1000 for _, size, _ in lines)


def test_package_works_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None; from bamboo.kernels.engines import triton_status as s; print(s())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "not installed" in done.stdout
