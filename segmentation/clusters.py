"""PatchClusters: kinds of patches that nobody has named, told apart by what an encoder sees in them."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from features.encoder import Encoder
from features.extract import encode_batches
from features.runner import EncoderRunner
from segmentation.sampling import PatchIndex, read_patches
from wsi.errors import CohortError, UsageError

__all__ = ["ClusterOptions", "PatchClusters", "cluster_patches"]

_LEAST_DEVIATION: Final = 1e-6  # of a feature that hardly varies: it is left as it is


@dataclass(frozen=True)
class ClusterOptions:
    """How patches are told apart. The defaults are those of H2G-Net's cluster-guided variant.

    Attributes:
        k: how many kinds.
        variance: the share of it that the principal components keep.
        sample: patches, drawn by chance, that all of this is fitted on; bounds the memory.
        seed: of the draw and of k-means.
    """

    k: int = 10
    variance: float = 0.95
    sample: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.k <= self.sample or not 0 < self.variance < 1:
            raise UsageError(
                f"there are two clusters or more and as many patches, variance is a share; "
                f"got {self.k}, {self.sample}, {self.variance}"
            )


@dataclass(frozen=True, eq=False)
class PatchClusters:
    """Standardise, project, take the nearest centre.

    Attributes:
        mean, deviation: (D,) of each feature.
        components: (P, D) principal components of standardised features.
        centres: (K, P) the most common first.
    """

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    components: NDArray[np.float32]
    centres: NDArray[np.float32]

    @classmethod
    def fit(cls, vectors: NDArray[np.float32], options: ClusterOptions) -> "PatchClusters":
        """Clusters of (N, D) vectors; the same bits for the same seed, however many threads there are.

        Raises:
            CohortError: there are fewer vectors than clusters.
        """
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA

        if len(vectors) < options.k:
            raise CohortError(f"{len(vectors)} patches do not make {options.k} clusters; ask for fewer")
        mean, deviation = vectors.mean(axis=0), vectors.std(axis=0)
        deviation = np.where(deviation > _LEAST_DEVIATION, deviation, 1)
        with threadpool_limits(1):
            pca = PCA(options.variance, svd_solver="full").fit((vectors - mean) / deviation)
            projected = (vectors - mean) / deviation @ pca.components_.T
            found = KMeans(options.k, n_init=10, random_state=options.seed).fit(projected)
        order = np.argsort(-np.bincount(found.labels_, minlength=options.k), kind="stable")
        parts = (mean, deviation, pca.components_, found.cluster_centers_[order])
        return cls(*(np.asarray(part, np.float32) for part in parts))

    def assign(self, vectors: NDArray[np.float32]) -> NDArray[np.int16]:
        """(N,) cluster of each of (N, D) vectors; one that is not finite is in the first."""
        projected = (vectors - self.mean) / self.deviation @ self.components.T  # (N, P)
        distance = (self.centres**2).sum(axis=1) - 2 * projected @ self.centres.T  # (N, K), less what all share
        return np.where(np.isfinite(vectors).all(axis=1), distance.argmin(axis=1), 0).astype(np.int16)


def cluster_patches(
    index: PatchIndex, encoder: Encoder | EncoderRunner, options: ClusterOptions | None = None, *, batch_size: int = 64
) -> PatchIndex:
    """The same patches with clusters, found in what ``encoder`` sees in them.

    Memory is bounded by ``options.sample``; the patches of the sample are encoded twice.

    Raises:
        CohortError: there are fewer patches that can be read than clusters.
    """
    options = options or ClusterOptions()
    runner = encoder if isinstance(encoder, EncoderRunner) else EncoderRunner(encoder)
    n = min(options.sample, len(index))
    rows = np.sort(np.random.default_rng(options.seed).choice(len(index), n, replace=False))
    sample = [runner.encode(batch.pixels).vectors for batch in read_patches(index, rows, batch_size=batch_size)]
    vectors = np.concatenate(sample)
    clusters = PatchClusters.fit(vectors[np.isfinite(vectors).all(axis=1)], options)
    found = []
    for patches in index.slides:
        with patches.slide.open() as slide:
            parts = encode_batches(slide, patches.grid, runner, batch_size=batch_size)
            found += [clusters.assign(part) for _, part in parts]
    return index.with_clusters(np.concatenate(found))
