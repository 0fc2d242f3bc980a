"""The papers behind a run, as BibTeX."""

from md.config import NPT, NVT, Minimise, RunConfig

_ENTRIES = {
    "bamboo": ("Gong, Sheng and others", "A predictive machine learning force-field framework for liquid "
               "electrolyte development", "Nature Machine Intelligence", "7", "543", "2025",
               "10.1038/s42256-025-01009-7"),
    "packmol": ("Mart{\\'i}nez, L. and Andrade, R. and Birgin, E. G. and Mart{\\'i}nez, J. M.",
                "PACKMOL: A package for building initial configurations for molecular dynamics simulations",
                "Journal of Computational Chemistry", "30", "2157", "2009", "10.1002/jcc.21224"),
    "d3cso": ("Schr{\\\"o}der, Heiner and Creon, Anne and Schwabe, Tobias",
              "Reformulation of the D3(Becke-Johnson) dispersion correction without resorting to higher than C6 "
              "dispersion coefficients", "Journal of Chemical Theory and Computation", "11", "3163", "2015",
              "10.1021/acs.jctc.5b00400"),
    "fire": ("Bitzek, Erik and Koskinen, Pekka and G{\\\"a}hler, Franz and Moseler, Michael and Gumbsch, P.",
             "Structural relaxation made simple", "Physical Review Letters", "97", "170201", "2006",
             "10.1103/PhysRevLett.97.170201"),
    "langevin": ("Leimkuhler, Benedict and Matthews, Charles",
                 "Robust and efficient configurational molecular sampling via Langevin dynamics",
                 "The Journal of Chemical Physics", "138", "174102", "2013", "10.1063/1.4802990"),
    "svr": ("Bussi, Giovanni and Donadio, Davide and Parrinello, Michele",
            "Canonical sampling through velocity rescaling", "The Journal of Chemical Physics", "126", "014101", "2007",
            "10.1063/1.2408420"),
    "nhc": ("Martyna, Glenn J. and Tuckerman, Mark E. and Tobias, Douglas J. and Klein, Michael L.",
            "Explicit reversible integrators for extended systems dynamics", "Molecular Physics", "87", "1117", "1996",
            "10.1080/00268979600100761"),
    "c-rescale": ("Bernetti, Mattia and Bussi, Giovanni", "Pressure control using stochastic cell rescaling",
                  "The Journal of Chemical Physics", "153", "114107", "2020", "10.1063/5.0020514"),
    "mtk": ("Martyna, Glenn J. and Tobias, Douglas J. and Klein, Michael L.",
            "Constant pressure molecular dynamics algorithms", "The Journal of Chemical Physics", "101", "4177",
            "1994", "10.1063/1.467468"),
    "equilibration": ("Chodera, John D.", "A simple method for automated equilibration detection in "
                      "molecular simulations", "Journal of Chemical Theory and Computation", "12", "1799", "2016",
                      "10.1021/acs.jctc.5b00784"),
    "yeh-hummer": ("Yeh, In-Chul and Hummer, Gerhard", "System-size dependence of diffusion coefficients "
                   "and viscosities from molecular dynamics simulations with periodic boundary conditions",
                   "The Journal of Physical Chemistry B", "108", "15873", "2004", "10.1021/jp0477147"),
    "dielectric": ("Neumann, Martin", "Dipole moment fluctuation formulas in computer simulations of polar systems",
                   "Molecular Physics", "50", "841", "1983", "10.1080/00268978300102721"),
}  # fmt: skip
_FIELDS = ("author", "title", "journal", "volume", "pages", "year", "doi")


def bibliography(config: RunConfig) -> str:
    """Return BibTeX entries for what a run used: force field, packing, thermostats, barostats, analysis."""
    used = ["bamboo", "d3cso", "packmol"]
    for stage in config.stages:
        if isinstance(stage, Minimise):
            used.append("fire")
        elif isinstance(stage, NPT):
            used += ["c-rescale", "svr"] if stage.barostat == "c-rescale" else ["mtk", "nhc"]
        elif isinstance(stage, NVT):
            used.append(stage.thermostat)
    if "density" in config.properties:
        used.append("equilibration")
    if "diffusion" in config.properties or "conductivity" in config.properties:
        used.append("yeh-hummer")
    if "dielectric" in config.properties:
        used.append("dielectric")
    return "\n".join(_entry(key) for key in dict.fromkeys(used))


def _entry(key: str) -> str:
    values = _ENTRIES[key]
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in zip(_FIELDS, values, strict=True))
    return f"@article{{{key},\n{body}\n}}\n"
