"""Embedder: what every method is that turns a bag of any size into one vector, and SlideVectors, what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mil.bag import Bag, Batch
from mil.prototypes.rows import Rows, ScaledRows, TensorRows
from wsi.errors import UsageError

if TYPE_CHECKING:
    from mil.prototypes.prototypes import Prototypes

__all__ = ["Embedder", "SlideVectors", "hard_assignment", "one_hot"]

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class SlideVectors:
    """Vectors of B slides, in named parts.

    Attributes:
        parts: by name, each (B, …) float32; ``variance`` of PANTHER is (B, K, D), for example.
    """

    parts: Mapping[str, Tensor]

    def __getitem__(self, part: str) -> Tensor:
        return self.parts[part]

    def __len__(self) -> int:
        """Number of slides."""
        return len(next(iter(self.parts.values())))

    @cached_property
    def vector(self) -> Tensor:
        """(B, E): the parts one after the other, each flattened in row order."""
        return torch.cat([part.flatten(1) for part in self.parts.values()], dim=1)


class Embedder(ABC):
    """A method with its hyper-parameters; subclasses are frozen dataclasses, so ``asdict`` says how a vector was made.

    Attributes:
        name: by which it is asked for.
        needs_prototypes: whether it measures tiles against prototypes; methods that do not ignore those they are given.
    """

    name: ClassVar[str]
    needs_prototypes: ClassVar[bool] = True

    @abstractmethod
    def slide(self, rows: Rows, centres: Tensor) -> dict[str, Tensor]:
        """Parts of one slide's vector, float32; ``centres`` are (K, D) float32 on the device of the rows."""

    @abstractmethod
    def memberships(self, rows: Rows, centres: Tensor) -> Tensor:
        """(N, K) float32: how much of each tile belongs to each prototype; every row sums to one."""

    def both(self, rows: Rows, centres: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """``slide`` and ``memberships``, for methods whose work for the one is that for the other."""
        return self.slide(rows, centres), self.memberships(rows, centres)

    def embed(self, tiles: Batch | Bag | Tensor, prototypes: "Prototypes | Tensor | None" = None) -> SlideVectors:
        """The vector of each bag.

        Args:
            tiles: a batch, or one bag, or its (N, D) vectors.
            prototypes: fitted prototypes or (K, D) centres; None for a method that needs none.

        Returns:
            B vectors, one for a single bag; padding has no part in them, and neither do the bags beside a bag.

        Raises:
            UsageError: prototypes are missing, or are of vectors of another length.
        """
        return _stacked(self._each(self.slide, tiles, prototypes))

    def assign(self, tiles: Batch | Bag | Tensor, prototypes: "Prototypes | Tensor | None" = None) -> Tensor:
        """(B, N, K): how much of each tile belongs to each prototype; rows sum to one, those of padding are zero.

        Args and errors as for ``embed``. A method without prototypes has one, to which all tiles belong.
        """
        return _spread(self._each(self.memberships, tiles, prototypes), tiles)

    def describe(
        self, tiles: Batch | Bag | Tensor, prototypes: "Prototypes | Tensor | None" = None
    ) -> tuple[SlideVectors, Tensor]:
        """What ``embed`` and ``assign`` return, for less than both of them cost where they share work."""
        vectors, shares = zip(*self._each(self.both, tiles, prototypes), strict=True)
        return _stacked(vectors), _spread(shares, tiles)

    def _each(
        self,
        function: Callable[[Rows, Tensor], Found],
        tiles: Batch | Bag | Tensor,
        prototypes: "Prototypes | Tensor | None",
    ) -> list[Found]:
        slides = _slides(tiles)
        with torch.autocast(slides[0].device.type, enabled=False):  # sums of squares want more than half precision
            return [function(self.rows(TensorRows(x), prototypes), self.centres(x, prototypes)) for x in slides]

    def centres(self, x: Tensor, prototypes: "Prototypes | Tensor | None") -> Tensor:
        """(K, D) centres that fit the (N, D) vectors ``x``, where they are."""
        if not self.needs_prototypes:
            return x.new_zeros((1, x.shape[1]), dtype=torch.float32)
        if prototypes is None:
            raise UsageError(f"{self.name} needs prototypes; make them with fit_prototypes or wsi prototypes fit")
        found = prototypes if isinstance(prototypes, Tensor) else prototypes.tensor
        if found.ndim != 2 or found.shape[1] != x.shape[1]:
            raise UsageError(
                f"the prototypes are {tuple(found.shape)}, the tiles' vectors {x.shape[1]} long; are both of one encoder?"
            )
        found = found.float().to(x.device)
        scale = None if isinstance(prototypes, Tensor) else prototypes.scale_tensor
        return found if scale is None else found / scale.to(x.device)

    def rows(self, rows: Rows, prototypes: "Prototypes | Tensor | None") -> Rows:
        """The rows in the scale of the prototypes, where the method needs these and they have one."""
        if not self.needs_prototypes or prototypes is None or isinstance(prototypes, Tensor):
            return rows
        scale = prototypes.scale_tensor
        return rows if scale is None else ScaledRows(rows, scale)

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyper-parameters, as JSON holds them."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]


def hard_assignment(x: Tensor, centres: Tensor) -> Tensor:
    """(n,) index of the nearest of the (K, D) centres for each row of (n, D); of several equally near, the first."""
    # Distances less ‖x‖², about the centres' mean, where the numbers are small and float32 keeps most digits.
    origin = centres.mean(0)
    m = centres - origin
    nearest: Tensor = (m.square().sum(1) - 2 * (x - origin) @ m.T).argmin(1)
    return nearest


def one_hot(index: Tensor, k: int) -> Tensor:
    """(n,) indices as (n, k) float32."""
    return torch.nn.functional.one_hot(index, k).float()


def _stacked(slides: Sequence[Mapping[str, Tensor]]) -> SlideVectors:
    return SlideVectors({part: torch.stack([slide[part] for slide in slides]) for part in slides[0]})


def _spread(shares: Sequence[Tensor], tiles: Batch | Bag | Tensor) -> Tensor:
    """(N, K) of each bag as (B, N, K), zero at padding."""
    if not isinstance(tiles, Batch):
        return shares[0][None]
    spread = shares[0].new_zeros((*tiles.mask.shape, shares[0].shape[1]))
    spread[tiles.mask] = torch.cat(list(shares))
    return spread


def _slides(tiles: Batch | Bag | Tensor) -> list[Tensor]:
    """The (N, D) vectors of each bag without padding; views where its tiles come first."""
    if isinstance(tiles, Bag):
        return [tiles.features]
    if isinstance(tiles, Tensor):
        if tiles.ndim != 2 or not len(tiles):
            raise UsageError(
                f"the tiles of a slide are (N, D), at least one, not {tuple(tiles.shape)}; batch bags with collate"
            )
        return [tiles]
    lengths = tiles.mask.sum(1).tolist()
    return [
        x[:n] if bool(mask[:n].all()) else x[mask]
        for x, mask, n in zip(tiles.features, tiles.mask, lengths, strict=True)
    ]
