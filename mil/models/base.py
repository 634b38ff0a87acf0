"""MILModel: what every multiple-instance model is, and MILOutput, the one thing that it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mil.bag import Bag, Batch
from wsi.errors import ModelMismatchError, UsageError

__all__ = [
    "Bags",
    "MILModel",
    "MILOutput",
    "PublishedState",
    "State",
    "class_targets",
    "each_bag",
    "in_chunks",
    "join",
    "load_published",
    "masked_softmax",
    "no_parts",
    "pool",
]

State = Mapping[str, Tensor | NDArray[Any]]
AnyModel = TypeVar("AnyModel", bound=nn.Module)

_CHUNK_TILES = 4096  # tiles whose hidden activations are held at once when no gradient is wanted


class Bags(Protocol):
    """Bags that may be read only when they are asked for; a list of bags is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Bag: ...


class MILOutput(NamedTuple):
    """What a model says of a batch of B bags of up to N tiles, C classes; all float32.

    Attributes:
        logits: (B, C), before softmax or sigmoid.
        attention: (B, K, N), ``softmax(scores)`` over the tiles: sums to one, 0 at padding. K is C for a model with
            ``attention_per_class``, 1 otherwise; heads are averaged.
        scores: (B, K, N), the attention before it is normalised; −inf at padding and where the method gives no weight.
            A method that normalises in several steps (heads, pseudo-bags) has log attention here.
        embedding: (B, E), the slide's vector: what the classifier sees; rows of several branches one after the other.
        part_logits: (B, M, C), logits of the parts which the method also classifies: tiles (DSMIL, additive MIL; M = N,
            0 at padding) or pseudo-bags (DTFD). M = 0 for all other methods.
    """

    logits: Tensor
    attention: Tensor
    scores: Tensor
    embedding: Tensor
    part_logits: Tensor


class MILModel(nn.Module, ABC):
    """A bag of vectors in, slide logits out.

    The constructor of every model is ``(dim, n_classes, *, hyper-parameters with the paper's defaults)``.

    Attributes:
        order_matters: whether the order of the tiles is information: it is made into a grid, or drawn lots by.
        attention_per_class: whether attention has one row a class, or one row in all.
        quadratic: whether time (never memory at inference) grows with the square of the number of tiles.
        learning_rate: of AdamW, where ``TrainConfig`` names none; found with its other defaults.
        bag_weight: weight of the loss on ``logits`` beside ``auxiliary_loss``, which has its own weight in it.
    """

    order_matters: ClassVar[bool] = False
    attention_per_class: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    bag_weight: float = 1.0

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        if dim < 1 or n_classes < 1:
            raise UsageError(f"a model needs a feature width and classes, not dim={dim}, n_classes={n_classes}")
        self.dim = dim
        self.n_classes = n_classes

    def prepare(self, bags: Bags, seed: int) -> None:
        """Fit what the method fits without labels, such as prototypes; most methods have nothing of the kind.

        Called once before training with the bags that the model is to be trained on, and no others, scaled as it will see
        them. What is fitted belongs to the model's state.
        """

    @abstractmethod
    def forward(self, batch: Batch) -> MILOutput:
        """Logits, attention and embedding of every bag; what a bag gets does not depend on the bags beside it."""

    def auxiliary_loss(self, batch: Batch, output: MILOutput, targets: Tensor) -> Tensor:
        """What the method adds to the loss on ``logits``, weighted as in the paper: a scalar, 0 for most methods.

        ``targets`` are class indices (B,), int64. The total is ``bag_weight * loss(logits) + auxiliary_loss``. Of a model
        of several tasks ``output`` holds the logits of one.
        """
        return output.logits.new_zeros(())

    @classmethod
    @abstractmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """A model in eval mode with the authors' weights, in the authors' layout.

        ``state`` is the authors' ``state_dict`` (tensors or arrays). Sizes are deduced from it; ``hyper`` says what it
        cannot tell (heads, activation). A prefix ``model.`` or ``module.`` on all keys is taken off.

        Raises:
            ModelMismatchError: keys are missing or unexpected, or a shape does not fit; one line names them.
        """


class PublishedState(dict[str, Tensor]):
    """A published state dict as float32 tensors by name; asking for what it lacks is a ModelMismatchError."""

    def __init__(self, state: State) -> None:
        for prefix in ("model.", "module."):
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
        super().__init__({key: _float(value) for key, value in state.items()})

    def __missing__(self, key: str) -> Tensor:
        raise ModelMismatchError(f"the published weights lack {key!r}; they hold {_some(self) or 'nothing'}")

    def has(self, prefix: str) -> bool:
        """Whether any key starts with ``prefix``."""
        return any(key.startswith(prefix) for key in self)

    def count(self, pattern: str) -> int:
        """How many of ``pattern.format(0)``, ``pattern.format(1)``, … begin a key."""
        number = 0
        while self.has(pattern.format(number)):
            number += 1
        return number


def load_published(
    model: AnyModel,
    state: PublishedState,
    names: Mapping[str, str],
    unused: tuple[str, ...] = (),
    new: str | None = None,
) -> AnyModel:
    """Fill ``model`` from ``state`` and put it in eval mode.

    Args:
        names: the beginning of our name of a tensor → of the authors'; the longest that fits counts.
        unused: beginnings of keys that the authors' forward pass never reads.
        new: a module of ours that keeps the weights it has.

    Raises:
        ModelMismatchError: keys are missing or unexpected, or a shape does not fit.
    """
    ours = {key: tensor for key, tensor in model.state_dict().items() if new is None or not key.startswith(f"{new}.")}
    theirs: dict[str, str] = {}
    for key in ours:
        begin = max((name for name in names if key == name or key.startswith(f"{name}.")), key=len, default=None)
        theirs[key] = key if begin is None else names[begin] + key[len(begin) :]
    missing = sorted(set(theirs.values()) - state.keys())
    unexpected = sorted(key for key in state.keys() - set(theirs.values()) if not key.startswith(unused or ("\0",)))
    if missing or unexpected:
        wrong = [f"{what} {_some(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise ModelMismatchError(f"the published weights do not fit {type(model).__name__}: {'; '.join(wrong)}")
    for key, tensor in ours.items():
        found = state[theirs[key]]
        if found.shape != tensor.shape:
            raise ModelMismatchError(
                f"the published weights do not fit {type(model).__name__}: {theirs[key]} is {tuple(found.shape)}, "
                f"not {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for key, tensor in ours.items():
            tensor.copy_(state[theirs[key]])
    return model.eval()


def in_chunks(function: Callable[..., Tensor], *inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """``function`` of inputs (B, N, …) in float32, where it takes each tile by itself.

    Without gradients it is applied to a few thousand tiles at a time, so that neither a float32 copy of a bag in half
    precision nor wide hidden activations are ever held for all tiles. With gradients it is applied to real tiles only if
    ``mask`` (B, N) says which they are, as bags of a batch differ in length and much of it may be padding; there it is 0.
    """
    n_tiles = inputs[0].shape[1]
    if mask is not None and torch.is_grad_enabled() and not bool(mask.all()):
        of_real = function(*(x[mask].float() for x in inputs))  # (tiles, …)
        return of_real.new_zeros((*mask.shape, *of_real.shape[1:])).masked_scatter(
            mask.view(*mask.shape, *[1] * (of_real.ndim - 1)), of_real
        )
    if torch.is_grad_enabled() or n_tiles <= _CHUNK_TILES:
        return function(*(x.float() for x in inputs))
    result = None
    for start in range(0, n_tiles, _CHUNK_TILES):
        piece = function(*(x[:, start : start + _CHUNK_TILES].float() for x in inputs))  # (B, n, …)
        if result is None:
            result = piece.new_empty((len(piece), n_tiles, *piece.shape[2:]))
        result[:, start : start + _CHUNK_TILES] = piece
    assert result is not None
    return result


def masked_softmax(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, K, N) with −inf where ``mask`` (B, N) is False, and their softmax over the tiles, both float32."""
    scores = scores.float().masked_fill(~mask[:, None], -torch.inf)
    return scores, scores.softmax(-1)


def pool(attention: Tensor, x: Tensor) -> Tensor:
    """Attention-weighted sums of the tiles: (B, K, N), (B, N, D) → (B, K, D); x may be half precision."""
    if x.dtype == torch.float32:
        with torch.autocast(x.device.type, enabled=False):  # its copy in half precision would cost more than it saves
            return attention.float() @ x
    pooled = attention.new_zeros((*attention.shape[:2], x.shape[2]))
    for start in range(0, x.shape[1], _CHUNK_TILES):
        part = slice(start, start + _CHUNK_TILES)
        pooled = pooled + attention[..., part] @ x[:, part].float()
    return pooled


def each_bag(batch: Batch) -> Iterator[Batch]:
    """The bags of a batch one by one, without their padding."""
    for index in range(len(batch)):
        mask = batch.mask[index]
        if bool(mask.all()):
            keep: slice | Tensor = slice(None)
        else:
            length = int(mask.sum())
            keep = slice(length) if bool(mask[:length].all()) else mask
        xy = None if batch.xy is None else batch.xy[index, keep][None]
        yield Batch(batch.features[index, keep][None], mask[keep][None], xy)


def join(outputs: Iterable[MILOutput], batch: Batch) -> MILOutput:
    """Outputs of ``each_bag(batch)`` as one, with the padding back in its places."""
    alone = list(outputs)
    if len(alone) == 1 and alone[0].scores.shape[-1] == batch.mask.shape[1]:
        return alone[0]
    first = alone[0]
    shape = (len(alone), first.scores.shape[1], batch.mask.shape[1])
    places = batch.mask[:, None].expand(shape)
    scores = first.scores.new_full(shape, -torch.inf).masked_scatter(
        places, torch.cat([o.scores.flatten() for o in alone])
    )
    attention = first.attention.new_zeros(shape).masked_scatter(
        places, torch.cat([o.attention.flatten() for o in alone])
    )
    return MILOutput(
        logits=torch.cat([o.logits for o in alone]),
        attention=attention,
        scores=scores,
        embedding=torch.cat([o.embedding for o in alone]),
        part_logits=torch.cat([o.part_logits for o in alone]),
    )


def no_parts(logits: Tensor) -> Tensor:
    """``part_logits`` of a method that classifies nothing but bags: (B, 0, C)."""
    return logits.new_zeros((len(logits), 0, logits.shape[1]))


def class_targets(targets: Tensor, n_classes: int, why: str) -> Tensor:
    """Class indices (B,) checked, for a loss that cannot do with anything else.

    Raises:
        UsageError: targets are not class indices below ``n_classes``.
    """
    if targets.ndim != 1 or targets.is_floating_point():
        raise UsageError(f"{why} needs class indices (B,), not {targets.dtype} {tuple(targets.shape)}")
    if bool(((targets < 0) | (targets >= n_classes)).any()):
        raise UsageError(f"{why} needs classes 0 to {n_classes - 1}, not {sorted(set(targets.tolist()))}")
    return targets


def _float(value: Any) -> Tensor:
    # A copy, as PyTorch warns of sharing a read-only array.
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return tensor.float() if tensor.is_floating_point() else tensor


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
