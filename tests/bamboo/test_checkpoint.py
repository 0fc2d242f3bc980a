"""Model files: what is written is what is read; what is damaged or foreign is refused in one sentence."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bamboo import checkpoint
from bamboo.errors import InputError, ModelFileError
from bamboo.neighbors import find_neighbors
from bamboo.system import Batch


@pytest.fixture
def model(make_force_field, tmp_path):
    """A model file and the single-precision field in it."""
    field = make_force_field().to_dtype(torch.float32)
    path = tmp_path / "model.safetensors"
    checkpoint.save(field, path, card={"level": "none", "note": "größer"})
    return path, field


def rewritten(path, *, header=None, tensors=None):
    """Write the file again with a changed header (function of the old) or changed tensors."""
    with safe_open(str(path), framework="pt") as file:
        old = json.loads(file.metadata()["bamboo"])
    text = header(old) if header else old
    stored = load_file(str(path))
    if tensors:
        tensors(stored)
    save_file(stored, str(path), metadata={"bamboo": text if isinstance(text, str) else json.dumps(text)})
    return path


def test_round_trip(model, make_cluster, make_box):
    path, field = model
    again = checkpoint.load(path)
    assert again.config == field.config
    assert again.elements == field.elements
    assert not again.training
    for name, tensor in field.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    batch = Batch.from_systems([make_cluster(1), make_box(1)])
    neighbors = find_neighbors(batch, 5.0, field.config.dispersion.cutoff)
    assert torch.equal(again(batch, neighbors).forces, field(batch, neighbors).forces)
    assert checkpoint.load(path, dtype=torch.float64).dtype == torch.float64


def test_header(model):
    header = checkpoint.describe(model[0])
    assert header["format"] == "bamboo-force-field"
    assert header["format_version"] == checkpoint.FORMAT_VERSION
    assert header["units"] == {"energy": "eV", "length": "Å", "charge": "e"}
    assert header["card"] == {"level": "none", "note": "größer"}
    assert header["elements"][:2] == ["H", "Li"]


def test_charge_response_can_be_overridden(model):
    assert checkpoint.load(model[0]).config.charge_response == "full"
    assert checkpoint.load(model[0], charge_response="frozen").config.charge_response == "frozen"
    with pytest.raises(InputError, match="expected 'full' or 'frozen'"):
        checkpoint.load(model[0], charge_response="half")


def change(**values):
    return lambda header: header | values


def settings(**values):
    return lambda header: header | {"config": header["config"] | values}


def network(**values):
    return lambda header: header | {"config": header["config"] | {"network": header["config"]["network"] | values}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (lambda header: "{not json", "JSON header is damaged"),
        (lambda header: "[1, 2]", "does not say 'bamboo-force-field'"),
        (change(format="something else"), "does not say 'bamboo-force-field'"),
        (change(format_version=2), "written in format 2, this bamboo reads up to 1. Update bamboo-md"),
        (change(format_version="1"), "expected a positive integer"),
        (change(format_version=0), "expected a positive integer"),
        (change(config=None), "unusable settings"),
        (change(config={}), "unusable settings"),
        (settings(colour="blue"), "colour"),
        (settings(charge_response="half"), "charge_response"),
        (settings(dispersion=3), "unusable settings"),
        (network(cutoff=-5.0), "network.cutoff"),
        (network(layers=4), "do not fit its settings"),
        (network(layers=10**9), "do not fit its settings"),
        (network(channels=4 * 10**12), "no network can have the size"),
        (network(channels=32), "has shape"),
        (network(n_radial=16), "has shape"),
        (network(attention="gedt"), "do not fit its settings"),
    ],
)
def test_wrong_header(model, header, message):
    path = rewritten(model[0], header=header)
    with pytest.raises(ModelFileError, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def missing(tensors):
    del tensors["energy_head.4.weight"]


def extra(tensors):
    tensors["spare"] = torch.zeros(2)


def transposed(tensors):
    tensors["network.edge.weight"] = tensors["network.edge.weight"].T.contiguous()


def not_a_number(tensors):
    tensors["charge_head.0.weight"][0, 0] = float("nan")


def infinite_table(tensors):
    tensors["dispersion.c6"][6] = float("inf")


def negative_c6(tensors):
    tensors["dispersion.c6"][6] = -1.0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (missing, "energy_head.4.weight"),
        (extra, "spare"),
        (transposed, r"'network.edge.weight' has shape \(8, 16\), expected \(16, 8\)"),
        (not_a_number, "'charge_head.0.weight' holds numbers that are not finite"),
        (infinite_table, "'dispersion.c6' holds numbers that are not finite"),
        (negative_c6, "'dispersion.c6' holds negative"),
    ],
)
def test_wrong_tensors(model, tensors, message):
    with pytest.raises(ModelFileError, match=message):
        checkpoint.load(rewritten(model[0], tensors=tensors))


@pytest.mark.parametrize("keep", [0, 4, 100, 3000])
def test_truncated_file(model, keep):
    content = model[0].read_bytes()
    model[0].write_bytes(content[:keep])
    with pytest.raises(ModelFileError, match="damaged or truncated"):
        checkpoint.load(model[0])


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"\xff" * 200, b"{}", b"\x80\x04K\x01."])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="not a readable safetensors file"):
        checkpoint.load(path)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, str(path))
    with pytest.raises(ModelFileError, match="not a bamboo model"):
        checkpoint.load(path)


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(ModelFileError):
        checkpoint.load(tmp_path)


def test_unknown_name(monkeypatch, model, tmp_path):
    monkeypatch.setattr(checkpoint, "zoo", lambda: {"gfn2": model[0], "default": model[0]})
    assert checkpoint.resolve("default") == model[0]
    with pytest.raises(InputError, match="Did you mean 'default'"):
        checkpoint.load("defualt")
    with pytest.raises(InputError, match="neither a file"):
        checkpoint.load(tmp_path / "absent.safetensors")


def test_shipped_models_load():
    for name in checkpoint.zoo():
        header = checkpoint.describe(name)
        assert checkpoint.load(name).elements == header["elements"]


def test_save_where_nothing_can_be_written(model):
    with pytest.raises(InputError, match="cannot be written"):
        checkpoint.save(model[1], model[0] / "a file is no folder.safetensors")


def test_file_holds_no_code(model):
    """Eight bytes of length, one JSON object, raw numbers."""
    content = model[0].read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    end = max(item["data_offsets"][1] for name, item in header.items() if name != "__metadata__")
    assert len(content) == 8 + size + end


def test_copied_file_is_the_same_model(model, tmp_path):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(model[0], copy)
    assert checkpoint.describe(copy) == checkpoint.describe(model[0])


def test_loading_stays_light() -> None:
    """Reading a model does not pull in torch's compiler, which would cost every start of the program 1.6 s."""
    code = "import sys, bamboo.checkpoint as c; c.load('gfn2'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
