"""The sums over neighbours whose pairs cost a few numbers, in Triton: geometry, Coulomb, dispersion, repulsion.

A list of neighbours is ``start`` (n + 1), ``index`` and ``shift``: the neighbours of atom i, images included, are
index[start[i] : start[i + 1]]. Every list is full, j stands in the row of i and i in the row of j. So an atom collects
its own sums from its own row, and nothing is ever added to another atom's numbers: no atomics, the same bits each time.

A program works on A atoms and takes B neighbours of each at a time; all in float64. ``ledger`` (12, n) is what these
kernels add to, per atom: force (3), virial xx xy xz yy yz zz (6), dispersion, repulsion, potential of the charges.
"""

import triton
import triton.language as tl

FORCE, VIRIAL, DISPERSION, REPULSION, POTENTIAL = (tl.constexpr(row) for row in (0, 3, 9, 10, 11))
LEDGER_ROWS = 12
TWO_BY_ROOT_PI = tl.constexpr(1.1283791670955126)
SOFTPLUS_IS_LINEAR = tl.constexpr(20.0)  # as in torch


@triton.jit
def add(ledger, row, n_atoms, atom, inside, value):
    """Add one number per atom, value (A,), to a row of the ledger."""
    at = ledger + row * n_atoms + atom
    tl.store(at, tl.load(at, mask=inside) + value, mask=inside)


@triton.jit
def add_derivatives(ledger, n_atoms, atom, inside, fx, fy, fz, xx, xy, xz, yy, yz, zz):
    """Add the force F_i = sum_j p and the virial -1/2 sum_j vector (x) p, p = dE/d(r_j - r_i), from lanes (A, B).

    Half, because each pair stands in two rows; six numbers, because the total is symmetric.
    """
    add(ledger, FORCE, n_atoms, atom, inside, tl.sum(fx, 1))
    add(ledger, FORCE + 1, n_atoms, atom, inside, tl.sum(fy, 1))
    add(ledger, FORCE + 2, n_atoms, atom, inside, tl.sum(fz, 1))
    add(ledger, VIRIAL, n_atoms, atom, inside, -0.5 * tl.sum(xx, 1))
    add(ledger, VIRIAL + 1, n_atoms, atom, inside, -0.5 * tl.sum(xy, 1))
    add(ledger, VIRIAL + 2, n_atoms, atom, inside, -0.5 * tl.sum(xz, 1))
    add(ledger, VIRIAL + 3, n_atoms, atom, inside, -0.5 * tl.sum(yy, 1))
    add(ledger, VIRIAL + 4, n_atoms, atom, inside, -0.5 * tl.sum(yz, 1))
    add(ledger, VIRIAL + 5, n_atoms, atom, inside, -0.5 * tl.sum(zz, 1))


@triton.jit
def neighbour(position, cell, system, atom, inside, index, shift, slot, here):
    """Return j and r_j - r_i + shift @ cell of the neighbours in the slots (A, B); (1, 0, 0) where there is none."""
    i, s = atom[:, None], system[:, None]
    j = tl.load(index + slot, mask=here, other=0)
    a = tl.load(shift + 3 * slot, mask=here, other=0).to(tl.float64)
    b = tl.load(shift + 3 * slot + 1, mask=here, other=0).to(tl.float64)
    c = tl.load(shift + 3 * slot + 2, mask=here, other=0).to(tl.float64)
    first, second, third = cell + 9 * s, cell + 9 * s + 3, cell + 9 * s + 6
    x = a * tl.load(first) + b * tl.load(second) + c * tl.load(third)
    y = a * tl.load(first + 1) + b * tl.load(second + 1) + c * tl.load(third + 1)
    z = a * tl.load(first + 2) + b * tl.load(second + 2) + c * tl.load(third + 2)
    own = inside[:, None]
    x += tl.load(position + 3 * j, mask=here, other=1.0) - tl.load(position + 3 * i, mask=own & here, other=0.0)
    y += tl.load(position + 3 * j + 1, mask=here, other=0.0) - tl.load(position + 3 * i + 1, mask=own & here, other=0.0)
    z += tl.load(position + 3 * j + 2, mask=here, other=0.0) - tl.load(position + 3 * i + 2, mask=own & here, other=0.0)
    return j, x, y, z


@triton.jit
def edges_kernel(
    position, cell, system_of, start, index, shift,
    kept, sender, interval, place, nearest, nearest_atom, n_atoms,
    CUTOFF: tl.constexpr, INTERVALS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Keep the neighbours within the cutoff, at the front of each row: the edges i <- j.

    kept (n,) how many; per edge sender j, the interval of the radial table that r lies in, and place (4):
    u = (r_j - r_i) / r and how far into the interval. nearest (n,), nearest_atom (n,): the closest neighbour.
    """
    atom = tl.program_id(0) * A + tl.arange(0, A)
    inside = atom < n_atoms
    system = tl.load(system_of + atom, mask=inside, other=0)
    first = tl.load(start + atom, mask=inside, other=0)
    count = tl.load(start + atom + 1, mask=inside, other=0) - first
    closest = tl.full((A,), CUTOFF, tl.float64)
    closest_atom = tl.full((A,), -1, tl.int32)
    found = tl.full((A,), 0, tl.int32)
    for block in range(0, tl.max(count, 0), B):
        lane = block + tl.arange(0, B)[None, :]
        here = lane < count[:, None]
        j, x, y, z = neighbour(position, cell, system, atom, inside, index, shift, first[:, None] + lane, here)
        r = tl.sqrt(x * x + y * y + z * z)
        near = here & (r < CUTOFF)
        slot = (first + found)[:, None] + tl.cumsum(near.to(tl.int32), 1) - 1
        in_widths = r * (INTERVALS / CUTOFF)
        of_table = tl.minimum(in_widths.to(tl.int32), INTERVALS - 1)
        kind = place.dtype.element_ty
        inverse = 1.0 / tl.maximum(r, 1.0e-12)
        tl.store(sender + slot, j, mask=near)
        tl.store(interval + slot, of_table, mask=near)
        tl.store(place + 4 * slot, (x * inverse).to(kind), mask=near)
        tl.store(place + 4 * slot + 1, (y * inverse).to(kind), mask=near)
        tl.store(place + 4 * slot + 2, (z * inverse).to(kind), mask=near)
        tl.store(place + 4 * slot + 3, (in_widths - of_table).to(kind), mask=near)
        found += tl.sum(near.to(tl.int32), 1)
        distance = tl.where(near, r, CUTOFF)
        smallest = tl.min(distance, 1)
        which = tl.max(tl.where(near & (distance == smallest[:, None]), j, -1), 1)
        closest_atom = tl.where(smallest < closest, which, closest_atom)
        closest = tl.minimum(smallest, closest)
    tl.store(kept + atom, found, mask=inside)
    tl.store(nearest + atom, closest, mask=inside)
    tl.store(nearest_atom + atom, closest_atom, mask=inside)


@triton.jit
def edge_forces_kernel(
    start, kept, interval, place, gradient, ledger, n_atoms,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Forces along the edges from gradient (4) = dE/du, dE/dr: p = dE/dr u + (dE/du - (dE/du . u) u) / r."""
    atom = tl.program_id(0) * A + tl.arange(0, A)
    inside = atom < n_atoms
    first = tl.load(start + atom, mask=inside, other=0)
    count = tl.load(kept + atom, mask=inside, other=0)
    zero = tl.full((A, B), 0.0, tl.float64)
    fx, fy, fz = zero, zero, zero
    xx, xy, xz, yy, yz, zz = zero, zero, zero, zero, zero, zero
    for block in range(0, tl.max(count, 0), B):
        lane = block + tl.arange(0, B)[None, :]
        here = lane < count[:, None]
        slot = first[:, None] + lane
        ux = tl.load(place + 4 * slot, mask=here, other=0.0).to(tl.float64)
        uy = tl.load(place + 4 * slot + 1, mask=here, other=0.0).to(tl.float64)
        uz = tl.load(place + 4 * slot + 2, mask=here, other=0.0).to(tl.float64)
        t = tl.load(place + 4 * slot + 3, mask=here, other=1.0).to(tl.float64)
        r = (tl.load(interval + slot, mask=here, other=0) + t) * WIDTH
        gx = tl.load(gradient + 4 * slot, mask=here, other=0.0).to(tl.float64)
        gy = tl.load(gradient + 4 * slot + 1, mask=here, other=0.0).to(tl.float64)
        gz = tl.load(gradient + 4 * slot + 2, mask=here, other=0.0).to(tl.float64)
        along = tl.load(gradient + 4 * slot + 3, mask=here, other=0.0).to(tl.float64)
        along -= (gx * ux + gy * uy + gz * uz) / r
        px, py, pz = along * ux + gx / r, along * uy + gy / r, along * uz + gz / r
        x, y, z = r * ux, r * uy, r * uz
        fx, fy, fz = fx + px, fy + py, fz + pz
        xx, xy, xz = xx + x * px, xy + x * py, xz + x * pz
        yy, yz, zz = yy + y * py, yz + y * pz, zz + z * pz
    add_derivatives(ledger, n_atoms, atom, inside, fx, fy, fz, xx, xy, xz, yy, yz, zz)


@triton.jit
def coulomb(r, screened, STRENGTH: tl.constexpr, CONTACT: tl.constexpr, SHARPNESS: tl.constexpr, ALPHA: tl.constexpr):
    """Return k_e / (r0 (1 + softplus_beta((r - r0) / r0))) - screened k_e erf(alpha r) / r, and its derivative."""
    x = (r - CONTACT) / CONTACT
    scaled = x * SHARPNESS
    linear = scaled > SOFTPLUS_IS_LINEAR
    rising = tl.exp(tl.minimum(scaled, SOFTPLUS_IS_LINEAR))
    length = CONTACT * (1.0 + tl.where(linear, x, tl.log(1.0 + rising) / SHARPNESS))
    value = STRENGTH / length
    slope = -value / length * tl.where(linear, 1.0, rising / (1.0 + rising))
    smooth = STRENGTH * tl.erf(ALPHA * r) / r
    smooth_slope = (STRENGTH * TWO_BY_ROOT_PI * ALPHA * tl.exp(-ALPHA * ALPHA * r * r) - smooth) / r
    return value - screened * smooth, slope - screened * smooth_slope


@triton.jit
def coulomb_kernel(
    position, cell, system_of, start, index, shift, charge, periodic, ledger, n_atoms,
    CUTOFF: tl.constexpr, STRENGTH: tl.constexpr, CONTACT: tl.constexpr, SHARPNESS: tl.constexpr,
    ALPHA: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Potential phi_i = sum_j q_j E(r_ij) of unit charges and forces at fixed charges; E as in ``coulomb``.

    periodic (n_systems,) 1.0: screened, within the cutoff; 0.0: all pairs of a cluster.
    """
    atom = tl.program_id(0) * A + tl.arange(0, A)
    inside = atom < n_atoms
    system = tl.load(system_of + atom, mask=inside, other=0)
    screened = tl.load(periodic + system)[:, None]
    q_i = tl.load(charge + atom, mask=inside, other=0.0)[:, None]
    first = tl.load(start + atom, mask=inside, other=0)
    count = tl.load(start + atom + 1, mask=inside, other=0) - first
    zero = tl.full((A, B), 0.0, tl.float64)
    fx, fy, fz = zero, zero, zero
    xx, xy, xz, yy, yz, zz = zero, zero, zero, zero, zero, zero
    potential = zero
    for block in range(0, tl.max(count, 0), B):
        lane = block + tl.arange(0, B)[None, :]
        here = lane < count[:, None]
        j, x, y, z = neighbour(position, cell, system, atom, inside, index, shift, first[:, None] + lane, here)
        r = tl.sqrt(x * x + y * y + z * z)
        near = here & ((r < CUTOFF) | (screened == 0.0))
        q_j = tl.load(charge + j, mask=near, other=0.0)
        value, slope = coulomb(r, screened, STRENGTH, CONTACT, SHARPNESS, ALPHA)
        potential += q_j * value
        pull = q_i * q_j * slope / r
        px, py, pz = pull * x, pull * y, pull * z
        fx, fy, fz = fx + px, fy + py, fz + pz
        xx, xy, xz = xx + x * px, xy + x * py, xz + x * pz
        yy, yz, zz = yy + y * py, yz + y * pz, zz + z * pz
    add_derivatives(ledger, n_atoms, atom, inside, fx, fy, fz, xx, xy, xz, yy, yz, zz)
    add(ledger, POTENTIAL, n_atoms, atom, inside, tl.sum(potential, 1))


@triton.jit
def switch_off(x):
    """Return 1 - S and its derivative for the quintic step S = 6x^5 - 15x^4 + 10x^3, x clamped to [0, 1]."""
    x = tl.minimum(tl.maximum(x, 0.0), 1.0)
    return 1.0 - x * x * x * (x * (6.0 * x - 15.0) + 10.0), -30.0 * x * x * (1.0 - x) * (1.0 - x)


@triton.jit
def dispersion(
    r, c6, onset, S6: tl.constexpr, A1: tl.constexpr, STEEPNESS: tl.constexpr, DAMPING: tl.constexpr,
    SWITCH_START: tl.constexpr, CUTOFF: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Return E = -C6 / (r^6 + a4^6) (s6 + a1 / (1 + exp(k (r - a2 R)))), switched or shifted, and its derivative.

    onset a2 R; DAMPING a4.
    """
    r5 = r * r * r * r * r
    inverse = 1.0 / (r5 * r + DAMPING * DAMPING * DAMPING * DAMPING * DAMPING * DAMPING)
    far = 1.0 / (1.0 + tl.exp(STEEPNESS * (r - onset)))
    energy = -c6 * inverse * (S6 + A1 * far)
    slope = -6.0 * r5 * inverse * energy + c6 * inverse * A1 * STEEPNESS * far * (1.0 - far)
    if SMOOTH:
        off, off_slope = switch_off((r - SWITCH_START) / (CUTOFF - SWITCH_START))
        slope = slope * off + energy * off_slope / (CUTOFF - SWITCH_START)
        energy = energy * off
    else:
        energy += c6 / (CUTOFF * CUTOFF * CUTOFF * CUTOFF * CUTOFF * CUTOFF)
    return energy, slope


@triton.jit
def repulsion(r, product, decay, radius, screening, INNER: tl.constexpr, OUTER: tl.constexpr, TERMS: tl.constexpr):
    """Return E = k_e Z_i Z_j / r phi(r / a) (1 - S((r / R - inner) / (outer - inner))) and its derivative.

    product k_e Z_i Z_j, decay 1 / a, radius R; screening (TERMS, 2) c_k and d_k of phi(x) = sum c_k exp(-d_k x).
    """
    phi, phi_slope = tl.full(r.shape, 0.0, r.dtype), tl.full(r.shape, 0.0, r.dtype)
    for k in tl.static_range(TERMS):
        d = tl.load(screening + 2 * k + 1) * decay
        part = tl.load(screening + 2 * k) * tl.exp(-d * r)
        phi += part
        phi_slope -= d * part
    off, off_slope = switch_off((r / radius - INNER) / (OUTER - INNER))
    bare = product / r
    energy = bare * phi * off
    return energy, bare * (phi_slope * off + phi * off_slope / (radius * (OUTER - INNER))) - energy / r


@triton.jit
def fixed_kernel(
    position, cell, system_of, start, index, shift, number, c6, onset, radius, product, decay, screening, ledger,
    n_atoms,
    ROWS: tl.constexpr, CUTOFF: tl.constexpr, S6: tl.constexpr, A1: tl.constexpr, STEEPNESS: tl.constexpr,
    DAMPING: tl.constexpr, SWITCH_START: tl.constexpr, SMOOTH: tl.constexpr, WALL: tl.constexpr, INNER: tl.constexpr,
    OUTER: tl.constexpr, TERMS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Dispersion and, with WALL, repulsion; c6, onset, radius, product, decay are tables (ROWS, ROWS) by element."""
    atom = tl.program_id(0) * A + tl.arange(0, A)
    inside = atom < n_atoms
    system = tl.load(system_of + atom, mask=inside, other=0)
    row = tl.load(number + atom, mask=inside, other=0)[:, None] * ROWS
    first = tl.load(start + atom, mask=inside, other=0)
    count = tl.load(start + atom + 1, mask=inside, other=0) - first
    zero = tl.full((A, B), 0.0, tl.float64)
    fx, fy, fz = zero, zero, zero
    xx, xy, xz, yy, yz, zz = zero, zero, zero, zero, zero, zero
    attraction, repelled = zero, zero
    for block in range(0, tl.max(count, 0), B):
        lane = block + tl.arange(0, B)[None, :]
        here = lane < count[:, None]
        j, x, y, z = neighbour(position, cell, system, atom, inside, index, shift, first[:, None] + lane, here)
        r = tl.sqrt(x * x + y * y + z * z)
        near = here & (r < CUTOFF)
        pair = row + tl.load(number + j, mask=here, other=0)
        strength = tl.load(c6 + pair, mask=near, other=0.0)
        energy, slope = dispersion(
            r, strength, tl.load(onset + pair), S6, A1, STEEPNESS, DAMPING, SWITCH_START, CUTOFF, SMOOTH
        )
        attraction += energy
        if WALL:
            contact = tl.load(radius + pair, mask=near, other=1.0)
            touching = near & (r < OUTER * contact)
            if tl.max(tl.max(touching.to(tl.int32), 1), 0) > 0:  # rare
                wall, wall_slope = repulsion(
                    r, tl.load(product + pair), tl.load(decay + pair), contact, screening, INNER, OUTER, TERMS
                )
                repelled += tl.where(touching, wall, 0.0)
                slope += tl.where(touching, wall_slope, 0.0)
        pull = slope / r
        px, py, pz = pull * x, pull * y, pull * z
        fx, fy, fz = fx + px, fy + py, fz + pz
        xx, xy, xz = xx + x * px, xy + x * py, xz + x * pz
        yy, yz, zz = yy + y * py, yz + y * pz, zz + z * pz
    add_derivatives(ledger, n_atoms, atom, inside, fx, fy, fz, xx, xy, xz, yy, yz, zz)
    add(ledger, DISPERSION, n_atoms, atom, inside, 0.5 * tl.sum(attraction, 1))
    add(ledger, REPULSION, n_atoms, atom, inside, 0.5 * tl.sum(repelled, 1))
