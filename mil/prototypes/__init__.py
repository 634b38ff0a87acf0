"""Prototypes: typical tiles of a cohort, and what they make of a slide: one vector, without labels.

>>> from mil.prototypes import Panther, SlideSet, fit_prototypes
>>> prototypes = fit_prototypes(SlideSet.from_store("OUT", "uni2-h", "train.csv"), k=16)
>>> prototypes.save("prototypes.zarr")
>>> Panther().embed(bag, prototypes)["importance"]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mil.embedding import EmbedReport
    from mil.prototypes.choice import KReport, report_k
    from mil.prototypes.counts import ProtoCounts
    from mil.prototypes.embedder import Embedder, SlideVectors
    from mil.prototypes.embedders import EMBEDDERS, build_embedder
    from mil.prototypes.embeddings import Embeddings, embed_slides
    from mil.prototypes.fitting import fit_prototypes
    from mil.prototypes.h2t import H2T
    from mil.prototypes.maps import PrototypeMap, map_slide
    from mil.prototypes.moments import Mean, MeanVariance
    from mil.prototypes.ot import OptimalTransport
    from mil.prototypes.outcomes import OutcomeTable, outcome_table
    from mil.prototypes.panther import Mixture, Panther
    from mil.prototypes.prototypes import Prototypes
    from mil.prototypes.quantiles import Quantiles
    from mil.prototypes.survey import Survey, survey_slides
    from mil.prototypes.tiles import SlideSet, TilePool, draw_tiles

__all__ = [
    "EMBEDDERS",
    "H2T",
    "EmbedReport",
    "Embedder",
    "Embeddings",
    "KReport",
    "Mean",
    "MeanVariance",
    "Mixture",
    "OptimalTransport",
    "OutcomeTable",
    "Panther",
    "ProtoCounts",
    "PrototypeMap",
    "Prototypes",
    "Quantiles",
    "SlideSet",
    "SlideVectors",
    "Survey",
    "TilePool",
    "build_embedder",
    "draw_tiles",
    "embed_slides",
    "fit_prototypes",
    "map_slide",
    "outcome_table",
    "report_k",
    "survey_slides",
]

# Loaded when first asked for, so that `import mil.prototypes` does not wait for torch.
_HOME = {
    **dict.fromkeys(("KReport", "report_k"), "mil.prototypes.choice"),
    "ProtoCounts": "mil.prototypes.counts",
    **dict.fromkeys(("Embedder", "SlideVectors"), "mil.prototypes.embedder"),
    **dict.fromkeys(("EMBEDDERS", "build_embedder"), "mil.prototypes.embedders"),
    "EmbedReport": "mil.embedding",
    **dict.fromkeys(("Embeddings", "embed_slides"), "mil.prototypes.embeddings"),
    "fit_prototypes": "mil.prototypes.fitting",
    "H2T": "mil.prototypes.h2t",
    **dict.fromkeys(("Mean", "MeanVariance"), "mil.prototypes.moments"),
    **dict.fromkeys(("PrototypeMap", "map_slide"), "mil.prototypes.maps"),
    "OptimalTransport": "mil.prototypes.ot",
    **dict.fromkeys(("OutcomeTable", "outcome_table"), "mil.prototypes.outcomes"),
    **dict.fromkeys(("Mixture", "Panther"), "mil.prototypes.panther"),
    "Prototypes": "mil.prototypes.prototypes",
    "Quantiles": "mil.prototypes.quantiles",
    **dict.fromkeys(("Survey", "survey_slides"), "mil.prototypes.survey"),
    **dict.fromkeys(("SlideSet", "TilePool", "draw_tiles"), "mil.prototypes.tiles"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mil.prototypes' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
