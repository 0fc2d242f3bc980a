"""Import of the published checkpoint: its numbers, look-alike archives built here, and archives that mean harm."""

import io
import json
import os
import pickle
import warnings
import zipfile

import ase
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bamboo import checkpoint, units
from bamboo.calculator import BambooCalculator
from bamboo.errors import InputError, ModelFileError
from bamboo.published import force_field_from_published, import_published, read_tensors

CHANNELS, RADIAL, HALF = 16, 8, 8
KCAL = units.KCAL_PER_MOL


class Basis(nn.Module):
    def __init__(self):
        super().__init__()
        self.means, self.betas = nn.Parameter(torch.rand(RADIAL)), nn.Parameter(1.0 + torch.rand(RADIAL))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(-self.betas * (x - self.means) ** 2)


class Attention(nn.Module):
    def __init__(self, parts: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(CHANNELS)
        self.qkv_proj = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.o_proj = nn.Linear(CHANNELS, parts * CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.layer_norm(x))


class MixingAttention(Attention):
    def __init__(self, parts: int):
        super().__init__(parts)
        self.vec_proj = nn.Linear(CHANNELS, parts * CHANNELS, bias=False)


def head():
    return nn.Sequential(nn.Linear(CHANNELS, HALF), nn.SiLU(), nn.Linear(HALF, HALF), nn.SiLU(), nn.Linear(HALF, 1))


class Likeness(nn.Module):
    """Modules under the names of the published checkpoint, small, with random numbers and plain attributes."""

    def __init__(self):
        super().__init__()
        self.cutoff, self.names, self.lengths = 5.0, ["a", "b"], [1.5, 2.5]
        self.atom_embtab = nn.Embedding(87, CHANNELS)
        self.dis_rbf = Basis()
        self.dv_proj = nn.Sequential(nn.Linear(RADIAL, CHANNELS, bias=False), nn.SiLU())
        self.first_attn, self.last_attn = Attention(1), MixingAttention(2)
        self.attns = nn.ModuleList([MixingAttention(3)])
        self.energy_mlp, self.charge_mlp = head(), head()
        self.pred_electronegativity_mlp, self.pred_electronegativity_hardness_mlp = head(), head()
        self.c6_emb, self.r0_emb = nn.Embedding(37, 1), nn.Embedding(37, 1)
        self.oplsaa_charge, self.electronegativity_table = nn.Embedding(18, 1), nn.Embedding(18, 1)
        for table in (self.c6_emb, self.r0_emb, self.electronegativity_table):
            table.weight.data.uniform_(1.0, 2.0)
        self.atom_embtab.weight.data[10:15] = 0.0  # elements that were never trained

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dv_proj(self.dis_rbf(x))


@pytest.fixture(scope="module")
def likeness(tmp_path_factory):
    """The look-alike as a TorchScript archive, and its tensors."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        module = Likeness()
        path = tmp_path_factory.mktemp("likeness") / "finetune.pt"
        torch.jit.script(module).save(str(path))
    return path, {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def rewritten(source, target, *, replace=None, compression=zipfile.ZIP_STORED):
    """Copy an archive, replacing members whose name ends in a key of ``replace``."""
    replace = replace or {}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = next((value for end, value in replace.items() if name.endswith(end)), old.read(name))
            new.writestr(name, content)
    return target


def test_archive_gives_the_tensors_it_was_made_of(likeness):
    path, expected = likeness
    found = read_tensors(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_archive_and_safetensors_import_alike(likeness, tmp_path):
    path, tensors = likeness
    save_file(tensors, str(tmp_path / "weights.safetensors"))
    import_published(path, tmp_path / "one.safetensors")
    import_published(tmp_path / "weights.safetensors", tmp_path / "two.safetensors")
    one, two = load_file(str(tmp_path / "one.safetensors")), load_file(str(tmp_path / "two.safetensors"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    header = checkpoint.describe(tmp_path / "one.safetensors")
    assert header["config"]["charge_response"] == "frozen"
    assert header["config"]["repulsion"] is False
    assert "fixed" in header["card"]["caveat"]


def test_numbers_are_converted_to_internal_units(likeness):
    _, tensors = likeness
    field = force_field_from_published(tensors).requires_grad_(False)
    assert torch.allclose(field.dispersion.c6[:37], tensors["c6_emb.weight"][:, 0].double() * KCAL)
    radius = tensors["r0_emb.weight"][:, 0].double()
    assert float(field.dispersion.radius[6, 8]) == pytest.approx(float(radius[6] + radius[8]) / 2)
    assert torch.allclose(field.energy_head[4].weight, tensors["energy_mlp.4.weight"] * KCAL)
    assert torch.allclose(
        field.hardness_head[4].bias, tensors["pred_electronegativity_hardness_mlp.4.bias"] * KCAL**0.5
    )
    assert torch.allclose(field.charge_head[4].weight, tensors["charge_mlp.4.weight"])
    assert torch.allclose(field.reference_charge[:18], tensors["oplsaa_charge.weight"][:, 0].double())
    chi = tensors["electronegativity_table.weight"][:, 0].double()
    assert torch.allclose(field.reference_electronegativity[:18] ** 2, chi * KCAL)
    assert torch.equal(field.network.layers[1].mix.weight, tensors["attns.0.vec_proj.weight"])
    assert torch.equal(field.network.layers[2].out.bias, tensors["last_attn.o_proj.bias"])
    assert "Ne" not in field.elements
    assert "H" in field.elements


def test_compressed_archive_reads_too(likeness, tmp_path):
    packed = rewritten(likeness[0], tmp_path / "packed.pt", compression=zipfile.ZIP_DEFLATED)
    assert set(read_tensors(packed)) == set(likeness[1])


# --- archives that are damaged or foreign -----------------------------------------------------------------------


def refused(path, message):
    with pytest.raises(ModelFileError, match=message) as caught:
        import_published(path, path.with_name("out.safetensors"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.with_name("out.safetensors").exists()


@pytest.mark.parametrize("keep", [0, 3, 50, 2000, -30])
def test_truncated_archive(likeness, tmp_path, keep):
    path = tmp_path / "cut.pt"
    path.write_bytes(likeness[0].read_bytes()[:keep])
    refused(path, "not a readable TorchScript archive|neither a TorchScript archive")


def test_every_flipped_byte_is_survived(likeness, tmp_path):
    """Whatever a damaged byte does, the answer is tensors or one ModelFileError."""
    with zipfile.ZipFile(likeness[0]) as archive:
        program = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    rng, outcomes = np.random.default_rng(0), set()
    for position in rng.integers(0, len(program), 80):
        damaged = bytearray(program)
        damaged[position] ^= int(rng.integers(1, 256))
        path = rewritten(likeness[0], tmp_path / "flipped.pt", replace={"/data.pkl": bytes(damaged)})
        try:
            outcomes.add(type(read_tensors(path)))
        except ModelFileError as error:
            outcomes.add(type(error))
    assert ModelFileError in outcomes


def test_damaged_compressed_archive(likeness, tmp_path):
    packed = rewritten(likeness[0], tmp_path / "packed.pt", compression=zipfile.ZIP_DEFLATED)
    content = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as archive:
        info = next(item for item in archive.infolist() if item.filename.endswith("/data.pkl"))
    start = info.header_offset + 30 + len(info.filename) + 5
    content[start : start + 40] = b"\xff" * 40
    packed.write_bytes(content)
    refused(packed, "not a readable TorchScript archive")


def test_foreign_zip(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday/beach.jpg", b"...")
    refused(path, "not a TorchScript model")


def test_foreign_safetensors_and_our_own(tmp_path, make_force_field):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, str(path))
    refused(path, "not those of the published checkpoint")
    ours = tmp_path / "ours.safetensors"
    checkpoint.save(make_force_field(), ours)
    refused(ours, "not those of the published checkpoint")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00.", b"PK\x05\x06"])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    refused(path, "neither a TorchScript archive nor a safetensors file|not a readable TorchScript archive")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("attns.0.qkv_proj.weight"), "nothing corresponds to 'network.layers.1.qkv.weight'"),
        (lambda t: t.pop("c6_emb.weight"), "c6_emb.weight"),
        (lambda t: t.pop("dv_proj.0.weight"), "dv_proj.0.weight"),
        (lambda t: t.update({"attns.0.x_proj.weight": torch.zeros(2)}), "'attns.0.x_proj.weight' of shape"),
        (lambda t: t.update({"dispersion.beta": torch.zeros(2)}), "'dispersion.beta' of shape"),
        (lambda t: t.update({"attns.one.o_proj.weight": torch.zeros(2)}), "published checkpoint"),
        (lambda t: t.update({"energy_mlp.0.weight": torch.zeros(CHANNELS, HALF)}), "'energy_mlp.0.weight' of shape"),
        (lambda t: t.update({"dv_proj.0.weight": torch.zeros(3)}), "published checkpoint"),
        (lambda t: t.update({"c6_emb.weight": torch.zeros(99, 1)}), "published checkpoint"),
        (lambda t: t.update({"c6_emb.weight": torch.zeros(37)}), "published checkpoint"),
        (lambda t: t["charge_mlp.2.bias"].fill_(float("nan")), "'charge_mlp.2.bias' holds numbers that are not finite"),
        (lambda t: t["r0_emb.weight"].fill_(float("inf")), "'r0_emb.weight' holds numbers that are not finite"),
        (lambda t: t["c6_emb.weight"].fill_(-1.0), "negative"),
        (lambda t: t["electronegativity_table.weight"].fill_(-1.0), "negative"),
    ],
)
def test_wrong_tensors(likeness, tmp_path, change, message):
    tensors = {name: tensor.clone() for name, tensor in likeness[1].items()}
    change(tensors)
    path = tmp_path / "weights.safetensors"
    save_file(tensors, str(path))
    refused(path, message)


def test_source_and_destination(likeness, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        import_published(tmp_path / "absent.pt", tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="no such file"):
        import_published(tmp_path, tmp_path / "out.safetensors")
    (tmp_path / "there.safetensors").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        import_published(likeness[0], tmp_path / "there.safetensors")
    assert (tmp_path / "there.safetensors").read_text() == "precious"
    with pytest.raises(InputError, match="cannot be written"):
        import_published(likeness[0], tmp_path / "there.safetensors" / "a file is no folder.safetensors")


# --- archives that mean harm --------------------------------------------------------------------------------------


def archive_of(path, program, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("finetune/data.pkl", program)
        for index, numbers in enumerate(storages):
            archive.writestr(f"finetune/data/{index}", np.asarray(numbers, dtype="<f4").tobytes())
    return path


class Harm:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_nothing_is_executed(tmp_path, protocol, function):
    canary = tmp_path / "executed"
    code = f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w')"
    program = pickle.dumps({"model": Harm(function, code)}, protocol=protocol)
    refused(archive_of(tmp_path / "harm.pt", program), "which no published checkpoint needs|damaged")
    assert not canary.exists()
    bare = tmp_path / "bare.pt"
    bare.write_bytes(program)
    refused(bare, "neither a TorchScript archive")
    assert not canary.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(Vtouch x\ntR.",  # GLOBAL, REDUCE
        b"(cos\nsystem\nVtouch x\no.",  # OBJ
        b"(Vtouch x\nios\nsystem\n.",  # INST
        b"\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x82\x01.",  # EXT1
        b"cbuiltins\n__import__\n(Vos\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",  # right function, no arguments
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch\ndevice\n)R.",
        b"0.",  # pop from an empty stack
        b"t.",  # no mark
        b"h\x05.",  # no such memo
        b"].",  # a list, not a module
        b"c__torch__\nA\n)\x81}",  # no STOP
        b"\x8a\xff" + b"\xff" * 10,  # a number that is cut off
        b"c__torch__\nA\n)\x81](K\x01K\x02es.",
    ],
)
def test_strange_programs(tmp_path, opcodes):
    refused(archive_of(tmp_path / "strange.pt", b"\x80\x02" + opcodes), None)


def tensor_opcodes(size, stride, *, offset=0, key="0"):
    """A module whose attribute ``t`` is a tensor over storage ``key`` of eight numbers."""
    program = io.BytesIO()

    def number(n):
        program.write(b"\x8a" + bytes([len(raw := n.to_bytes(12, "little", signed=True))]) + raw)

    def row(numbers):
        program.write(b"(")
        for n in numbers:
            number(n)
        program.write(b"t")

    program.write(b"\x80\x02c__torch__\nA\n)\x81}(X\x01\x00\x00\x00tctorch._utils\n_rebuild_tensor_v2\n((")
    program.write(b"X\x07\x00\x00\x00storagectorch\nFloatStorage\n")
    program.write(b"X" + len(key).to_bytes(4, "little") + key.encode() + b"X\x03\x00\x00\x00cpuK\x08tQ")
    number(offset)
    row(size)
    row(stride)
    program.write(b"\x89}tRub.")
    return program.getvalue()


def test_handwritten_tensor_is_read(tmp_path):
    path = archive_of(tmp_path / "good.pt", tensor_opcodes((2, 3), (1, 2), offset=1), [np.arange(8)])
    assert read_tensors(path)["t"].tolist() == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]


@pytest.mark.parametrize(
    ("size", "stride", "options"),
    [
        ((9,), (1,), {}),
        ((2, 3), (1, 4), {}),
        ((2,), (-1,), {"offset": 4}),
        ((-2,), (1,), {}),
        ((2,), (1,), {"offset": -3}),
        ((10**12,), (0,), {}),  # a petabyte out of four bytes
        ((10**6, 10**6), (0, 0), {}),
        ((1,), (2**80,), {}),
        ((2,), (2**80,), {}),
        ((1,), (1,), {"offset": 2**80}),
        ((2, 2), (1,), {}),
        ((4,), (1,), {"key": "1"}),
        ((4,), (1,), {"key": "../../0"}),
        ((4,), (1,), {"key": "/etc/passwd"}),
    ],
)
def test_tensors_that_reach_beyond_their_storage(tmp_path, size, stride, options):
    path = archive_of(tmp_path / "reach.pt", tensor_opcodes(size, stride, **options), [np.arange(8)])
    refused(path, None)


def test_module_that_contains_itself(tmp_path):
    loop = b"\x80\x02c__torch__\nA\n)\x81q\x01}(X\x01\x00\x00\x00ah\x01ub."
    refused(archive_of(tmp_path / "loop.pt", loop), "not those of the published checkpoint")


def test_module_that_doubles_at_every_level(tmp_path):
    """Forty levels, each holding the one below twice: a trillion paths, forty modules."""
    program = b"\x80\x02c__torch__\nA\n)\x81q\x00"
    for level in range(40):
        program += b"0c__torch__\nA\n)\x81q" + bytes([level + 1])
        program += b"}(X\x01\x00\x00\x00ah" + bytes([level]) + b"X\x01\x00\x00\x00bh" + bytes([level]) + b"ub"
    refused(archive_of(tmp_path / "double.pt", program.replace(b"\x00\x010c", b"\x00\x01c") + b"."), None)


def test_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr("bamboo.published.MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("finetune/data.pkl", b"\x80\x02N.")
        archive.writestr("finetune/data/0", b"\0" * 100_000)
    refused(tmp_path / "bomb.pt", "unpacks to more than")


# --- the published numbers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "published.safetensors"
    import_published(published / "weights.safetensors", path)
    return path


def compare(calculator, reference, *, cell=None, charge=0.0):
    """Compare energy, forces, virial and charges with the published ones, in kcal/mol, Å and e."""
    periodic = cell is not None
    atoms = ase.Atoms(reference["numbers"], reference["positions"], cell=cell, pbc=periodic)
    atoms.info["charge"] = charge
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy() / KCAL, atoms.get_forces() / KCAL
    expected = float(reference["total_energy"])
    assert energy == pytest.approx(expected, abs=0.02 + 1e-6 * abs(expected))
    error = forces - reference["total_forces"]
    assert np.abs(error).max() < 0.01
    assert np.sqrt((error**2).mean()) < 0.002
    charges = reference["pred_charge" if periodic else "charge"]
    assert np.abs(atoms.get_charges() - charges).max() < 1e-4
    virial = reference["total_virial"]
    ours = atoms.get_positions().T @ forces
    if periodic:
        ours = -atoms.get_stress(voigt=False) * atoms.get_volume() / KCAL
    assert np.linalg.norm(ours - virial) < 1e-3 * np.linalg.norm(virial)
    return atoms


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("name", ["gas0", "gas1", "gas2", "gas3"])
def test_published_clusters(published, imported, name, engine):
    reference = np.load(published / f"{name}.npz")
    calculator = BambooCalculator(imported, engine=engine)
    atoms = compare(calculator, reference, charge=float(reference["total_charge"]))
    terms = {key: value / KCAL for key, value in calculator.results["terms"].items()}
    for ours, theirs in (
        ("network", "nn_energy"), ("electrostatic", "coul_energy"),
        ("electronegativity", "electronegativity_energy"), ("dispersion", "dispersion_energy"),
    ):  # fmt: skip
        assert terms[ours] == pytest.approx(float(np.ravel(reference[theirs])[0]), abs=0.01)
    dipole = atoms.get_dipole_moment() / units.DEBYE
    # the published program has its own, five-digit, conversion to Debye
    assert np.abs(dipole - reference["dipole"].ravel()).max() < 1e-3 * max(1.0, np.abs(dipole).max())


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_published_liquid(published, imported, engine):
    """4116 atoms: 182 EC, 182 DMC, 14 LiPF6 in a box of 35.92 Å."""
    reference = np.load(published / "bulk_ec_dmc_lipf6.npz")
    compare(BambooCalculator(imported, engine=engine), reference, cell=reference["cell"])


def test_header_of_the_import_names_its_origin(published, imported):
    header = checkpoint.describe(imported)
    assert header["elements"] == ["H", "Li", "C", "N", "O", "F", "P", "S"]
    assert "GPL" in header["card"]["licence"]
    assert json.dumps(header["card"])
