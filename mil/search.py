"""SlideSearch: the slides of a store that are most like a slide, by their embeddings; and how often they are of its kind.

>>> search = SlideSearch.of(Embeddings.from_store("OUT", "panther-uni2-h"), "prototypes")
>>> for hit in search.nearest("slide-7", top=5):
...     print(hit.slide, hit.similarity)

Similarities are inner products of vectors of length one, so that one index serves all of them. HNSW: Malkov, Yashunin:
Efficient and Robust Approximate Nearest Neighbor Search, TPAMI 2020, as FAISS has it. Leaving the patient out as Kalra et al.
(Yottixel), Medical Image Analysis 2020.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from features.keys import slide_path
from mil.cohort import SlideNames
from mil.metrics import Interval
from mil.prototypes.embeddings import Embeddings
from wsi.errors import EnvironmentFaultError, NotExtractedError, UsageError

__all__ = ["INDEX_SLIDES", "Hit", "IndexKind", "Metric", "SearchReport", "SlideSearch", "evaluate_search"]

Metric = Literal["cosine", "centred", "prototypes"]
IndexKind = Literal["auto", "exact", "hnsw"]

INDEX_SLIDES = 10_000  # more than these are looked up in an index, where there is one
_BLOCK_ROWS = 512
_LINKS, _BUILD, _LOOK = 32, 200, 256  # of HNSW: links of a slide, candidates while building, and while searching


class Hit(NamedTuple):
    """A slide that was found, and its similarity, from −1 to 1."""

    slide: str
    similarity: float


@dataclass(frozen=True, eq=False)
class SlideSearch:
    """Slides as points that are alike where their inner product is large.

    Attributes:
        slides: (S,) keys.
        points: (S, E) float32, of length one (or zero, of a slide that is the mean of all).
        metric: what ``similarity`` means.
        index: ``"exact"`` or ``"hnsw"``, which may miss a few.
    """

    slides: tuple[str, ...]
    points: NDArray[np.float32]
    metric: Metric
    index: IndexKind
    _lookup: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, embeddings: Embeddings, metric: Metric = "cosine", *, index: IndexKind = "auto") -> "SlideSearch":
        """Make slides searchable.

        Args:
            metric: ``"cosine"`` of the vectors as they are; ``"centred"``, of the vectors less their mean over slides, which
                tells apart what vectors of a common direction hide; ``"prototypes"``, for PANTHER: Σ √(π·π') cos(μ, μ') over
                prototypes, each μ less the mean of all tissue: what both slides have much of counts most.
            index: ``"exact"`` compares with every slide; ``"hnsw"`` needs the optional FAISS; ``"auto"`` takes it past 10⁴
                slides where it is installed.

        Raises:
            UsageError: the embedding has not the parts that the metric needs.
            EnvironmentFaultError: HNSW is asked for, and FAISS is not installed.
        """
        for value, allowed in ((metric, get_args(Metric)), (index, get_args(IndexKind))):
            if value not in allowed:
                raise UsageError(f"{value!r} is none of {', '.join(allowed)}")
        points = _POINTS[metric](embeddings)
        kind: IndexKind = index
        if index == "auto":
            kind = "hnsw" if len(points) > INDEX_SLIDES and _faiss(needed=False) is not None else "exact"
        return cls(embeddings.slides, points, metric, kind, _hnsw(points) if kind == "hnsw" else None)

    def __len__(self) -> int:
        """Number of slides."""
        return len(self.slides)

    def key_of(self, slide: str) -> str:
        """The key of the slide that is called so: by key, relative path, file name or stem.

        Raises:
            NotExtractedError: none has a vector.
            CohortError: several are called so.
        """
        key = SlideNames({name: slide_path(name) for name in self.slides}).find(slide)
        if key is None:
            raise NotExtractedError(f"no slide {slide!r} among the {len(self)} with this embedding")
        return key

    def nearest(self, slide: str, top: int = 5, *, without: Collection[str] = ()) -> tuple[Hit, ...]:
        """The slides most like one, the most alike first, itself left out; equally alike ones in the order of their keys.

        Args:
            slide: key, relative path, file name or stem.
            top: how many at most.
            without: keys of slides to leave out, such as those of the same patient.
        """
        if top < 1:
            raise UsageError(f"top is a whole number from 1, not {top}")
        key = self.key_of(slide)
        point = self.points[self.slides.index(key)]
        hidden = {key, *without}
        if self._lookup is None:
            similarity = self.points @ point
            order = np.argsort(-similarity, kind="stable")
        else:
            wanted = min(len(self), top + len(hidden))
            found, rows = self._lookup.search(point[None], wanted)
            order = rows[0][rows[0] >= 0]
            similarity = np.zeros(len(self), np.float32)
            similarity[order] = found[0][rows[0] >= 0]
        kept = [int(row) for row in order[: top + len(hidden)] if self.slides[row] not in hidden][:top]
        return tuple(Hit(self.slides[row], float(similarity[row])) for row in kept)


@dataclass(frozen=True)
class SearchReport:
    """How good a search is, asked with every slide, its own patient left out.

    Attributes:
        metrics: ``precision@k`` (share of the k most alike that are of the query's class) and ``mAP`` (mean average precision
            over the whole ranking), each with its 95% interval over patients who ask; those who are found stay the same.
        chance: precision of slides drawn by chance.
        n_queries, n_patients: who asked.
        n_alone: slides whose class no other patient has; they do not ask.
    """

    metrics: Mapping[str, Interval]
    chance: float
    n_queries: int
    n_patients: int
    n_alone: int

    def __str__(self) -> str:
        lines = [f"{name:14}{interval}" for name, interval in self.metrics.items()]
        alone = f"; {self.n_alone} slides are alone in their class" if self.n_alone else ""
        about = f"{self.n_queries} slides of {self.n_patients} patients asked, 95% over patients; chance {self.chance:.3f}{alone}"
        return "\n".join((*lines, about))


def evaluate_search(
    search: SlideSearch,
    labels: Mapping[str, str],
    patients: Mapping[str, str],
    *,
    ks: Sequence[int] = (1, 3, 5),
    draws: int = 1000,
    seed: int = 0,
) -> SearchReport:
    """Ask with every labelled slide for labelled slides of other patients; always exact.

    Args:
        labels, patients: class and patient of each slide, by its key; slides without a label neither ask nor are found.
        ks: how many of the most alike to look at.
        draws, seed: of the bootstrap over patients.

    Raises:
        UsageError: no class is shared by two patients, or fewer slides of others than some k are left.
    """
    rows = [row for row, slide in enumerate(search.slides) if slide in labels]
    label = np.array([labels[search.slides[row]] for row in rows], object)
    patient = np.array([patients[search.slides[row]] for row in rows], object)
    points = search.points[rows]
    scores: list[list[float]] = []  # of each query: precision at each k, average precision, chance
    owners: list[str] = []
    for start in range(0, len(rows), _BLOCK_ROWS):
        similarity = points[start : start + _BLOCK_ROWS] @ points.T
        for row, line in enumerate(similarity, start):
            others = np.flatnonzero(patient != patient[row])
            ranked = others[np.argsort(-line[others], kind="stable")]
            right = label[ranked] == label[row]
            if not right.any():
                continue
            if len(right) < max(ks):
                raise UsageError(
                    f"{search.slides[rows[row]]}: only {len(right)} slides of others, fewer than k = {max(ks)}"
                )
            precision = np.cumsum(right) / np.arange(1, len(right) + 1)
            scores.append([*(float(precision[k - 1]) for k in ks), float(precision[right].mean()), float(right.mean())])
            owners.append(patient[row])
    if not scores:
        raise UsageError("no class is shared by slides of two patients; there is nothing to find")
    table = np.array(scores)
    intervals = _over_patients(table, owners, draws, seed)
    names = [*(f"precision@{k}" for k in ks), "mAP"]
    metrics = dict(zip(names, intervals[:-1], strict=True))
    return SearchReport(metrics, float(table[:, -1].mean()), len(table), len(set(owners)), len(rows) - len(table))


def _over_patients(table: NDArray[np.float64], owners: Sequence[str], draws: int, seed: int) -> list[Interval]:
    """Mean of each column with the percentile interval over patients drawn with replacement."""
    _, owner = np.unique(np.asarray(owners), return_inverse=True)
    n = int(owner.max()) + 1
    sums, counts = np.zeros((n, table.shape[1])), np.bincount(owner, minlength=n)
    np.add.at(sums, owner, table)
    picked = np.random.default_rng(seed).integers(0, n, (draws, n))
    drawn = sums[picked].sum(axis=1) / counts[picked].sum(axis=1)[:, None]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Interval(*map(float, each)) for each in zip(table.mean(axis=0), low, high, strict=True)]


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length one; a row of zeros stays."""
    length = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    return np.asarray(x / np.where(length > 0, length, 1), np.float32)


def _cosine(embeddings: Embeddings) -> NDArray[np.float32]:
    return _unit(embeddings.matrix)


def _centred(embeddings: Embeddings) -> NDArray[np.float32]:
    if len(embeddings) < 2:
        raise UsageError(f"{embeddings.name}: the mean of a single slide leaves nothing; take the metric cosine")
    return _unit(embeddings.matrix - embeddings.matrix.mean(axis=0, dtype=np.float64).astype(np.float32))


def _by_prototype(embeddings: Embeddings) -> NDArray[np.float32]:
    """√π times the direction of μ from the mean of all tissue, prototype by prototype, (S, K·D).

    From the mean of all tissue, not of its own prototype: of that only the noise would be left where slides differ by how much
    they have of what, and a prototype of few tiles is all noise.
    """
    shapes = embeddings.shapes
    if len(shapes.get("importance", ())) != 1 or len(shapes.get("mean", ())) != 2:
        raise UsageError(
            f"{embeddings.name}: the metric prototypes needs importance and mean, as panther writes them; this embedding has "
            f"{', '.join(shapes)}: take cosine or centred"
        )
    importance = embeddings.part("importance").astype(np.float64)  # (S, K)
    mean = embeddings.part("mean")  # (S, K, D)
    centre = np.einsum("sk,skd->d", importance, mean) / importance.sum()
    direction = _unit(mean - centre.astype(np.float32))
    share = np.sqrt(importance / importance.sum(axis=1, keepdims=True))
    return np.asarray(direction * share[..., None], np.float32).reshape(len(embeddings), -1)


_POINTS: Mapping[Metric, Callable[[Embeddings], NDArray[np.float32]]] = {
    "cosine": _cosine,
    "centred": _centred,
    "prototypes": _by_prototype,
}


def _faiss(*, needed: bool) -> Any:
    try:
        import faiss
    except ImportError as error:
        if not needed:
            return None
        raise EnvironmentFaultError(
            "an index needs FAISS, which is not installed: pip install 'wsi-engine[search]', or search with --index exact"
        ) from error
    return faiss


def _hnsw(points: NDArray[np.float32]) -> Any:
    faiss = _faiss(needed=True)
    index = faiss.IndexHNSWFlat(points.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = _BUILD, _LOOK
    index.add(np.ascontiguousarray(points))
    return index
