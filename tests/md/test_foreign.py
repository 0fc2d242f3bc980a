"""Trajectories of other programs: the same motion written in every format must come out the same."""

import json
from collections.abc import Callable
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from typer.testing import CliRunner

from bamboo.errors import BambooError, InputError
from bamboo.structure.molecules import molecule
from bamboo.structure.packing import molecule_names, pack_box
from md.cli import app
from md.foreign import convert, define_molecules, file_options, read_frames, read_structure
from md.trajectory import Trajectory

COUNTS = {"DMC": 3, "Li": 2, "PF6": 2}
N_FRAMES = 40


class Motion:
    """Whole molecules that wander as rigid bodies, atoms in an order of their own, in a tilted or straight cell."""

    def __init__(self, *, tilt: float = 0.0, step: float = 0.4) -> None:
        self.box = pack_box(COUNTS, density_g_cm3=0.7, seed=4)
        length = self.box.cell[0, 0]
        self.cell = np.array([[length, 0.0, 0.0], [tilt, length, 0.0], [0.0, 0.0, length]])
        generator = np.random.default_rng(2)
        assert self.box.molecule is not None
        walk = np.cumsum(generator.normal(scale=step, size=(N_FRAMES, self.box.molecule.max() + 1, 3)), axis=0)
        walk -= walk[0]
        self.positions = self.box.positions + walk[:, self.box.molecule]  # whole, unwrapped, sorted by molecule
        self.order = generator.permutation(self.box.n_atoms)  # that of the file
        self.numbers = self.box.numbers[self.order]
        self.masses = ase.Atoms(self.numbers).get_masses()

    @property
    def wrapped(self) -> np.ndarray:
        inverse = np.linalg.inv(self.cell)
        return ((self.positions[:, self.order] @ inverse) % 1.0) @ self.cell

    def atoms(self, positions: np.ndarray) -> list[ase.Atoms]:
        return [ase.Atoms(self.numbers, frame, cell=self.cell, pbc=True) for frame in positions]


def write_dump(path: Path, motion: Motion, columns: str, *, stride: int = 100) -> Path:
    """A text dump as LAMMPS writes it, atoms scrambled, box at another origin; q is half of the formal charge."""
    origin, (a, b, c) = np.array([-3.0, 2.0, 1.0]), np.diag(motion.cell)
    tilt, inverse = motion.cell[1, 0], np.linalg.inv(motion.cell)
    unwrapped = motion.positions[:, motion.order]
    symbols = ase.Atoms(motion.numbers).get_chemical_symbols()
    types = np.unique(motion.numbers, return_inverse=True)[1] + 1
    scramble = np.random.default_rng(5).permutation(len(symbols))
    lines = []
    for index, frame in enumerate(unwrapped):
        images = np.floor(frame @ inverse)
        wrapped = frame - images @ motion.cell
        named = {
            "id": np.arange(len(symbols)) + 1, "type": types, "element": symbols,
            "q": np.where(motion.numbers == 3, 0.5, np.where(motion.numbers == 15, -0.5, 0.0)),
        }  # fmt: skip
        for axis, name in enumerate("xyz"):
            named |= {name: (wrapped + origin)[:, axis], f"{name}u": (frame + origin)[:, axis]}
            named |= {f"{name}s": (wrapped @ inverse)[:, axis], f"i{name}": images[:, axis].astype(int)}
        lines += ["ITEM: TIMESTEP", str(index * stride), "ITEM: NUMBER OF ATOMS", str(len(symbols))]
        if tilt:
            lines += [
                "ITEM: BOX BOUNDS xy xz yz pp pp pp",
                f"{origin[0] + min(0, tilt)} {origin[0] + a + max(0, tilt)} {tilt}",
            ]
        else:
            lines += ["ITEM: BOX BOUNDS pp pp pp", f"{origin[0]} {origin[0] + a}"]
        rest = " 0.0" if tilt else ""
        lines += [f"{origin[1]} {origin[1] + b}{rest}", f"{origin[2]} {origin[2] + c}{rest}"]
        lines.append(f"ITEM: ATOMS {columns}")
        lines += [" ".join(str(named[column][i]) for column in columns.split()) for i in scramble]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_data(path: Path, motion: Motion) -> Path:
    """A LAMMPS data file of style full, elements by mass."""
    kinds, types = np.unique(motion.numbers, return_inverse=True)
    masses = {n: ase.data.atomic_masses[n] for n in kinds}
    lines = ["box", "", f"{len(types)} atoms", f"{len(kinds)} atom types", ""]
    lines += [f"0.0 {edge} {axis}lo {axis}hi" for axis, edge in zip("xyz", np.diag(motion.cell), strict=True)]
    lines += ["", "Masses", "", *(f"{k + 1} {masses[n]}" for k, n in enumerate(kinds)), "", "Atoms # full", ""]
    for index, position in enumerate(motion.wrapped[0]):
        charge = {3: 0.8, 15: -0.8}.get(int(motion.numbers[index]), 0.0)
        lines.append(f"{index + 1} 1 {types[index] + 1} {charge} " + " ".join(f"{x:.8f}" for x in position))
    path.write_text("\n".join(lines) + "\n")
    return path


def assert_same_motion(found: Trajectory, motion: Motion) -> None:
    """Displacements since the first frame and shapes of the molecules; species follow in the order of the file."""
    assert sorted(found.topology.molecule_names) == sorted(molecule_names(COUNTS))
    positions = found.positions
    for name, index in found.topology.species.items():
        assert found.topology.molecule_charges[index].tolist() == [{"DMC": 0.0, "Li": 1.0, "PF6": -1.0}[name]] * len(
            index
        )
        own = np.isin(motion.box.molecule, np.flatnonzero(np.array(molecule_names(COUNTS)) == name))
        expected = motion.positions[-1, own] - motion.positions[0, own]
        moved = (positions[-1] - positions[0])[found.topology.select(species=name)]
        np.testing.assert_allclose(np.sort(moved, axis=0), np.sort(expected, axis=0), atol=2e-4)
    centres = found.molecule_centres()
    gaps = positions - centres[:, found.topology.molecule]
    assert np.linalg.norm(gaps, axis=2).max() < 4.0  # molecules are whole in every frame
    assert np.abs(np.linalg.norm(gaps, axis=2) - np.linalg.norm(gaps[0], axis=1)).max() < 1e-3


def from_dump(columns: str, *, tilt: float = 0.0) -> Callable[[Path], tuple[Motion, Path, Path | None]]:
    def write(folder: Path) -> tuple[Motion, Path, Path | None]:
        motion = Motion(tilt=tilt)
        return motion, write_dump(folder / "run.dump", motion, columns), None

    return write


def from_ase(name: str) -> Callable[[Path], tuple[Motion, Path, Path | None]]:
    def write(folder: Path) -> tuple[Motion, Path, Path | None]:
        motion = Motion(tilt=2.0)
        ase.io.write(folder / name, motion.atoms(motion.wrapped))
        return motion, folder / name, None

    return write


def from_mdtraj(name: str) -> Callable[[Path], tuple[Motion, Path, Path | None]]:
    def write(folder: Path) -> tuple[Motion, Path, Path | None]:
        from mdtraj.formats import DCDTrajectoryFile, XTCTrajectoryFile

        motion = Motion()
        if name.endswith("dcd"):
            with DCDTrajectoryFile(str(folder / name), "w") as file:
                file.write(motion.wrapped.astype(np.float32), cell_lengths=np.tile(np.diag(motion.cell), (N_FRAMES, 1)),
                           cell_angles=np.full((N_FRAMES, 3), 90.0))  # fmt: skip
        else:
            with XTCTrajectoryFile(str(folder / name), "w") as file:
                file.write((0.1 * motion.wrapped).astype(np.float32), box=np.tile(0.1 * motion.cell, (N_FRAMES, 1, 1)))
        return motion, folder / name, write_data(folder / "run.data", motion)

    return write


@pytest.mark.parametrize(
    "write",
    [
        from_dump("id type element x y z"),
        from_dump("id type element x y z ix iy iz"),
        from_dump("id element xu yu zu", tilt=3.0),
        from_dump("element xs ys zs id", tilt=-3.0),
        from_ase("run.traj"),
        from_ase("run.extxyz"),
        from_mdtraj("run.dcd"),
    ],
)
def test_every_format_gives_the_same_motion(write, tmp_path: Path) -> None:
    motion, path, structure = write(tmp_path)
    found = convert(path, tmp_path / "traj.h5", interval_ps=0.5, structure=structure)
    assert found.n_frames == N_FRAMES and found.interval_ps == pytest.approx(0.5)
    assert_same_motion(found, motion)


def test_xtc_to_its_precision(tmp_path: Path) -> None:
    """XTC keeps 0.01 Å."""
    motion, path, structure = from_mdtraj("run.xtc")(tmp_path)
    found = convert(path, tmp_path / "traj.h5", interval_ps=0.5, structure=structure)
    expected = motion.positions[-1] - motion.positions[0]
    moved = found.positions[-1] - found.positions[0]
    np.testing.assert_allclose(np.sort(moved, axis=0), np.sort(expected, axis=0), atol=0.02)


def test_large_steps_of_wrapped_coordinates_are_refused_and_of_unwrapped_ones_taken(tmp_path: Path) -> None:
    motion = Motion(step=3.0)
    wrapped = write_dump(tmp_path / "wrapped.dump", motion, "id element x y z")
    with pytest.raises(InputError, match=r"images cannot be told.*xu yu zu"):
        convert(wrapped, tmp_path / "traj.h5", interval_ps=1.0)
    assert not (tmp_path / "traj.h5").exists()
    for columns in ("id element xu yu zu", "id element x y z ix iy iz"):
        path = write_dump(tmp_path / "run.dump", motion, columns)
        assert_same_motion(convert(path, tmp_path / "traj.h5", interval_ps=1.0), motion)


def charges_of(found: Trajectory) -> dict[str, set[float]]:
    return {name: set(found.topology.molecule_charges[i].tolist()) for name, i in found.topology.species.items()}


def test_charges_of_the_file(tmp_path: Path) -> None:
    motion = Motion()
    path = write_dump(tmp_path / "run.dump", motion, "id element q x y z")
    found = convert(path, tmp_path / "traj.h5", interval_ps=1.0, charges="file")
    assert charges_of(found) == {"DMC": {0.0}, "Li": {0.5}, "PF6": {-0.5}}
    bare = write_dump(tmp_path / "bare.dump", motion, "id type x y z")
    data = write_data(tmp_path / "run.data", motion)
    np.testing.assert_allclose(read_structure(data)[1].sum(), 0.0, atol=1e-12)
    found = convert(bare, tmp_path / "traj.h5", interval_ps=1.0, charges="file", structure=data)
    assert charges_of(found) == {"DMC": {0.0}, "Li": {0.8}, "PF6": {-0.8}}
    with pytest.raises(InputError, match="no charges"):
        plain = write_dump(tmp_path / "plain.dump", motion, "id element x y z")
        convert(plain, tmp_path / "traj.h5", interval_ps=1.0, charges="file")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    motion = Motion()
    path = write_dump(tmp_path / "run.dump", motion, "id type x y z")
    target = tmp_path / "traj.h5"
    with pytest.raises(InputError, match=r"which elements.*--structure"):
        convert(path, target, interval_ps=1.0)
    blind = tmp_path / "blind.dump"
    blind.write_text(path.read_text().replace("x y z\n", "vx vy vz\n"))
    with pytest.raises(InputError, match="no coordinates among the columns id type vx"):
        convert(blind, target, interval_ps=1.0)
    clusters = tmp_path / "clusters.extxyz"
    ase.io.write(clusters, [ase.Atoms(motion.numbers, frame) for frame in motion.wrapped[:2]])
    with pytest.raises(InputError, match="periodic box"):
        convert(clusters, target, interval_ps=1.0)
    other = tmp_path / "other.extxyz"
    ase.io.write(other, motion.atoms(motion.wrapped)[0][:5])
    with pytest.raises(InputError, match="5 atoms, but"):
        convert(path, target, interval_ps=1.0, structure=other)
    with pytest.raises(InputError, match="no such file"):
        convert(tmp_path / "none.dump", target, interval_ps=1.0)
    damaged = tmp_path / "damaged.dcd"
    damaged.write_bytes(b"no trajectory")
    with pytest.raises(InputError, match=r"damaged\.dcd"):
        convert(damaged, target, interval_ps=1.0, structure=other)


def test_a_changing_volume_needs_npt(tmp_path: Path) -> None:
    motion = Motion()
    frames = motion.atoms(motion.wrapped)
    for index, atoms in enumerate(frames):
        atoms.set_cell(atoms.cell * (1.0 + 1.0e-4 * index), scale_atoms=True)
    ase.io.write(tmp_path / "run.traj", frames)
    with pytest.raises(InputError, match="no nvt run but npt"):
        convert(tmp_path / "run.traj", tmp_path / "traj.h5", interval_ps=1.0)
    found = convert(tmp_path / "run.traj", tmp_path / "traj.h5", interval_ps=1.0, ensemble="npt")
    assert found.ensemble.transport_objection is not None
    assert abs(np.linalg.det(found.cells[-1] / found.cells[0].max())) > 0.0


def test_dumps_cut_off_or_uneven(tmp_path: Path) -> None:
    motion = Motion()
    path = write_dump(tmp_path / "run.dump", motion, "id element x y z")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-10]) + "\n")
    assert len(list(read_frames(path))) == N_FRAMES - 1
    per_frame = len(lines) // N_FRAMES
    path.write_text("\n".join(lines[:per_frame] + lines[2 * per_frame :]) + "\n")
    with pytest.raises(InputError, match="not evenly spaced"):
        list(read_frames(path))


def test_options_are_checked() -> None:
    given = {"temperature": "298 K", "ensemble": "nvt", "charges": "formal", "since": "0 ps"}
    assert file_options("2 fs", **given)["interval_ps"] == pytest.approx(0.002)
    for change, text in (
        ({"temperature": None}, "--temperature"),
        ({"ensemble": "nph"}, "not one of nve"),
        ({"charges": "partial"}, "not one of formal"),
        ({"temperature": "0 K"}, "out of range"),
    ):
        with pytest.raises(InputError, match=text):
            file_options("2 fs", **given | change)


def test_the_command_gives_the_diffusion_of_random_walkers(tmp_path: Path) -> None:
    """Lithium and sodium walkers of 0.03 and 0.06 Å^2/ps, <dx^2> = 2 D t per axis, two files as two replicas.

    Relative to the centre of mass, r_i - sum_j w_j r_j, lithium has D (1 - 2 w_i) + sum_j w_j^2 D_j.
    """
    n, n_frames, diffusion = 12, 1200, np.array([0.03] * 12 + [0.06] * 12)
    for replica in (1, 2):
        generator = np.random.default_rng(replica)
        grid = 9.0 * np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)[: 2 * n]
        steps = generator.normal(size=(n_frames, 2 * n, 3)) * np.sqrt(2.0 * diffusion)[:, None]
        positions = (grid + np.cumsum(steps, axis=0)) % 27.0
        frames = [ase.Atoms("Li" * n + "Na" * n, frame, cell=[27.0] * 3, pbc=True) for frame in positions]
        ase.io.write(tmp_path / f"run-{replica}.traj", frames)
    command = ["analyze", *(str(tmp_path / f"run-{r}.traj") for r in (1, 2)), "--interval", "1 ps"]
    result = CliRunner().invoke(app, [*command, "--temperature", "300 K", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run-1-analysis" / "properties.json").read_text())
    weight = np.array([6.94] * n + [22.99] * n) / (n * (6.94 + 22.99))
    truth = 1.0e-4 * (0.03 * (1.0 - 2.0 * weight[0]) + float(weight**2 @ diffusion))
    low, high = (found["diffusion_Li_box"]["value"] + s * 2.5 * found["diffusion_Li_box"]["stderr"] for s in (-1, 1))
    assert low < truth < high and found["diffusion_Li_box"]["stderr"] < 0.2 * 0.03e-4
    assert found["density"]["value"] == pytest.approx(12 * (6.94 + 22.99) / 27.0**3 * 1.66054, rel=1e-3)
    assert "must be neutral" in found["conductivity"]["warnings"][0]
    assert (tmp_path / "run-1-analysis" / "figures" / "msd.png").exists()
    assert (tmp_path / "run-1-analysis" / "traj-2.h5").exists()
    missing = CliRunner().invoke(app, command)
    assert missing.exit_code == 2 and "--temperature" in missing.output


def test_molecules_are_named_on_the_command_line() -> None:
    define_molecules(["FOREIGNFB=Fc1ccccc1"])
    assert molecule("FOREIGNFB").n_atoms == 12
    for text in ("FB", "=C", "FB="):
        with pytest.raises(InputError, match="NAME=SMILES"):
            define_molecules([text])


def test_a_cell_of_any_orientation_is_turned_with_its_atoms(tmp_path: Path) -> None:
    motion = Motion(tilt=2.0)
    frames = motion.atoms(motion.wrapped)
    for atoms in frames:
        atoms.rotate(40.0, (1.0, 2.0, 0.5), rotate_cell=True)
    ase.io.write(tmp_path / "run.traj", frames)
    found = convert(tmp_path / "run.traj", tmp_path / "traj.h5", interval_ps=1.0)
    np.testing.assert_allclose(found.cells[0], motion.cell, atol=1e-4)
    inverse = np.linalg.inv(found.cells[0])
    for name in ("Li", "PF6"):
        own = np.isin(motion.box.molecule, np.flatnonzero(np.array(molecule_names(COUNTS)) == name))
        expected = np.linalg.inv(motion.cell).T @ (motion.positions[-1, own] - motion.positions[0, own]).T
        moved = (found.positions[-1] - found.positions[0])[found.topology.select(species=name)] @ inverse
        np.testing.assert_allclose(np.sort(moved, axis=0), np.sort(expected.T, axis=0), atol=1e-4)
    assert_same_motion(found, motion)


def test_damaged_files_end_in_one_line(tmp_path: Path) -> None:
    """Dumps and data files with bytes replaced, removed, repeated: a trajectory or one line, nothing else."""
    motion = Motion()
    dump = write_dump(tmp_path / "run.dump", motion, "id type x y z").read_text().splitlines()[: 3 * 60]
    data = write_data(tmp_path / "run.data", motion).read_text().splitlines()
    generator = np.random.default_rng(7)
    outcomes = {"read": 0, "refused": 0}
    for round_ in range(300):
        texts = []
        for lines in (dump, data):
            lines = list(lines)
            for _ in range(generator.integers(0, 3)):
                line = int(generator.integers(0, min(len(lines), 40)))
                words = lines[line].split(" ")
                words[generator.integers(0, len(words))] = generator.choice(
                    ["", "nan", "-1", "1e300", "x", "0", "9" * 12]
                )
                lines[line] = " ".join(words)
            if generator.random() < 0.2:
                del lines[generator.integers(0, len(lines)) :]
            texts.append("\n".join(lines) + "\n")
        (tmp_path / "run.dump").write_text(texts[0])
        (tmp_path / "run.data").write_text(texts[1])
        try:
            convert(tmp_path / "run.dump", tmp_path / "traj.h5", interval_ps=1.0, structure=tmp_path / "run.data")
            outcomes["read"] += 1
        except BambooError as error:
            assert len(str(error).splitlines()) == 1, round_
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes
