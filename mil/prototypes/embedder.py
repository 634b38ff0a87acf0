"""Embedder: what every method is that turns a bag of any size into one vector, and SlideVectors, what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mil.bag import Bag, Batch
from mil.prototypes.rows import Rows, TensorRows
from wsi.errors import UsageError

if TYPE_CHECKING:
    from mil.prototypes.prototypes import Prototypes

__all__ = ["Embedder", "SlideVectors", "hard_assignment", "one_hot"]


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
        slides = _slides(tiles)
        with torch.autocast(slides[0].device.type, enabled=False):  # sums of squares want more than half precision
            rows = [self.slide(TensorRows(x), self.centres(x, prototypes)) for x in slides]
        return SlideVectors({part: torch.stack([each[part] for each in rows]) for part in rows[0]})

    def assign(self, tiles: Batch | Bag | Tensor, prototypes: "Prototypes | Tensor | None" = None) -> Tensor:
        """(B, N, K): how much of each tile belongs to each prototype; rows sum to one, those of padding are zero.

        Args and errors as for ``embed``. A method without prototypes has one, to which all tiles belong.
        """
        slides = _slides(tiles)
        with torch.autocast(slides[0].device.type, enabled=False):
            found = [self.memberships(TensorRows(x), self.centres(x, prototypes)) for x in slides]
        if not isinstance(tiles, Batch):
            return found[0][None]
        spread = found[0].new_zeros((*tiles.mask.shape, found[0].shape[1]))
        spread[tiles.mask] = torch.cat(found)
        return spread

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
        return found.float().to(x.device)

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
