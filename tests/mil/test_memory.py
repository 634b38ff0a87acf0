"""A large bag in half precision is answered without ever holding it in float32, and to the same numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from features.keys import slide_key
from features.store import FeatureStore
from mil.bag import Bag, Batch, collate
from mil.member import Member, Scaling
from mil.objective import Joint, Objective
from mil.sources import StoreSource
from tests.mil.made_up import write_store

TILES, DIM = 9000, 96  # more than two chunks of tiles; wide, so that the bag is larger than what is made of it
NARROW: dict[str, dict[str, Any]] = {
    "abmil": {"embed_dim": 8, "attention_dim": 4},
    "abmil-gated": {"embed_dim": 8, "attention_dim": 4},
    "clam-sb": {"embed_dim": 8, "attention_dim": 4},
    "clam-mb": {"embed_dim": 8, "attention_dim": 4},
    "mean": {"embed_dim": 8},
    "linear": {},
    "max": {"embed_dim": 8},
}
models = pytest.mark.parametrize("name", NARROW)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Sees every tensor that an operation makes, and keeps the size of the largest in float32 or wider."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.float64):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


def member_of(name: str) -> Member:
    torch.manual_seed(0)
    scaling = Scaling(torch.linspace(-3, 3, DIM), torch.linspace(0.2, 4, DIM))
    joint = Joint({"label": Objective("cross_entropy", 2)}, {"label": 1.0})
    return Member({"model": name, "hyper": NARROW[name], "dim": DIM}, joint, scaling)


def half_bag() -> Bag:
    return Bag(np.random.default_rng(0).normal(0, 2, (TILES, DIM)).astype(np.float16))


def largest(*calls: Callable[[Bag], Any], bag: Bag) -> int:
    with Largest() as seen:  # type: ignore[no-untyped-call]  # torch's own
        for call in calls:
            call(bag)
    return int(seen.bytes)


@models
def test_no_float32_copy_of_a_half_precision_bag_is_made(name: str) -> None:
    member, bag = member_of(name), half_bag()
    assert largest(member.logits, member.attention, bag=bag) <= 4096 * DIM * 4  # a chunk of tiles
    assert largest(member.logits, bag=Bag(bag.features.float())) >= TILES * DIM * 4  # a copy would be seen


@models
def test_half_precision_bags_get_the_answers_of_their_float32_values(name: str) -> None:
    member, bag = member_of(name), half_bag()
    wide = Bag(bag.features.float())
    torch.testing.assert_close(member.logits(bag), member.logits(wide), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(member.attention(bag), member.attention(wide), atol=2e-3 / TILES, rtol=5e-3)


def test_scaling_in_half_precision_is_that_of_float32_rounded_and_never_infinite() -> None:
    member, bag = member_of("linear"), half_bag()
    padded = Batch(bag.features[None], torch.arange(TILES)[None] < TILES - 5)
    exact = member.scaling(Batch(padded.features.float(), padded.mask)).features
    with torch.no_grad():
        assert member.scaling(padded).features.equal(exact.half())
        assert not member.scaling(padded).features[0, -5:].any()
        rigid = Scaling(torch.zeros(DIM), torch.full((DIM,), 1e-6))
        assert rigid(collate([bag])).features.isfinite().all()
    assert member.scaling(padded).features.dtype == torch.float32  # where gradients are wanted


def test_a_bag_of_one_encoder_without_bad_tiles_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path, {"a.svs": np.ones((7, 3), np.float32)})
    source, key = StoreSource(FeatureStore(tmp_path), ["made-up"]), slide_key("a.svs")
    features = type(source.slide(key).features("made-up"))
    loaded = source.slide(key).features("made-up").numpy()
    monkeypatch.setattr(features, "numpy", lambda self: loaded)
    assert np.shares_memory(source.read(key).features.numpy(), loaded)
