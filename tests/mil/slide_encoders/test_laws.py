"""The laws that slide encoders obey, and those of the scan that one of them is made of."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mil.slide_encoders.base
import mil.slide_encoders.cobra
from mil.bag import Bag, Batch, collate
from mil.slide_encoders import CHIEF, COBRA, MADELEINE, SlideEmbedding, SlideEncoder
from mil.slide_encoders.cobra import match_places
from mil.slide_encoders.madeleine import graph_transport, info_nce
from mil.slide_encoders.mamba import Mamba2, scan
from wsi.errors import BadFeaturesError, UsageError

DIM = 12
NAMES = ("cobra", "cobra-top", "madeleine", "chief")
every_encoder = pytest.mark.parametrize("name", NAMES)


def make(name: str) -> SlideEncoder:
    torch.manual_seed(3)
    made: SlideEncoder
    if name.startswith("cobra"):
        top_k = 5 if name == "cobra-top" else None
        made = COBRA((DIM, 7), width=16, heads=4, attention_dim=8, state=4, channels=8, top_k=top_k)
    elif name == "madeleine":
        made = MADELEINE(DIM, width=8, heads=3, attention_dim=6, token_dim=5)
    else:
        made = CHIEF(DIM, hidden=16, attention_dim=8, organs=3, text_dim=4)
    with torch.no_grad():
        for parameter in made.parameters():  # biases of zero and norms of one would hide what depends on them
            parameter.add_(0.1 * torch.randn_like(parameter))
        made.load_state_dict({key: value * (4 if "score" in key else 1) for key, value in made.state_dict().items()})
    return made.eval()


def bag(n_tiles: int, seed: int = 0, dim: int = DIM) -> Bag:
    generator = torch.Generator().manual_seed(seed)
    xy = 256 * torch.arange(2 * n_tiles).reshape(n_tiles, 2)
    return Bag(torch.randn(n_tiles, dim, generator=generator), xy, f"bag {seed}")


def near(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def same(actual: SlideEmbedding, expected: SlideEmbedding) -> None:
    for one, other in zip(actual, expected, strict=True):
        near(one, other)


@every_encoder
@pytest.mark.parametrize("place", ["end", "front", "between"])
@torch.no_grad()
def test_padding_changes_nothing_wherever_it_lies(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mil.slide_encoders.base, "_CHUNK_TILES", 7)  # so that a piece is padding alone
    model, features = make(name), bag(21).features
    rows = {"end": range(21), "front": range(9, 30), "between": range(0, 42, 2)}[place]
    padded = 100 * torch.randn(1, max(rows) + 10, DIM)
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    padded[0, list(rows)], mask[0, list(rows)] = features, True
    found, alone = model(Batch(padded, mask)), model(collate([Bag(features)]))
    near(found.vector, alone.vector)
    near(found.attention[0][:, mask[0]], alone.attention[0])
    assert (found.attention[0][:, ~mask[0]] == 0).all()
    assert (found.scores[0][:, ~mask[0]] == -torch.inf).all()


@every_encoder
@torch.no_grad()
def test_a_bag_gets_the_same_alone_and_beside_others(name: str) -> None:
    model, bags = make(name), [bag(n, seed) for seed, n in enumerate((21, 5, 13))]
    together = model(collate(bags))
    for i, each in enumerate(bags):
        alone = model.encode(each)
        near(together.vector[i], alone.vector)
        near(together.attention[i, :, : len(each)], alone.attention)


@every_encoder
@torch.no_grad()
def test_attention_sums_to_one_and_says_how_many_heads(name: str) -> None:
    model = make(name)
    found = model.encode(bag(21))
    assert found.attention.shape == (model.heads, 21)
    near(found.attention.sum(-1), torch.ones(model.heads))
    if name != "cobra-top":
        near(found.attention, found.scores.softmax(-1))


@pytest.mark.parametrize("name", ["madeleine", "chief"])
def test_the_order_of_tiles_does_not_matter_where_an_encoder_says_so(name: str) -> None:
    model, tiles, order = make(name), bag(21), torch.randperm(21)
    assert not model.order_matters
    found, shuffled = model.encode(tiles), model.encode(Bag(tiles.features[order]))
    near(shuffled.vector, found.vector)
    near(shuffled.attention, found.attention[:, order])


def test_cobra_reads_tiles_in_their_order() -> None:
    model, tiles = make("cobra"), bag(21)
    assert model.order_matters
    scores, turned = model.encode(tiles).scores[0], model.encode(Bag(tiles.features.flip(0))).scores[0]
    assert (scores - turned.flip(0)).abs().max() > 1e-3
    cut = model.encode(Bag(tiles.features[:11])).scores[0]
    near(cut, scores[:11])  # what comes later is not seen


@every_encoder
def test_pieces_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tiles = make(name), bag(50)
    whole = model.encode(tiles)
    monkeypatch.setattr(mil.slide_encoders.base, "_CHUNK_TILES", 7)
    monkeypatch.setattr(mil.slide_encoders.cobra, "_PIECE_TILES", 7)
    monkeypatch.setattr("mil.models.base._CHUNK_TILES", 7)
    same(model.encode(tiles), whole)
    with torch.enable_grad():
        batch = collate([tiles])
        trained = model(batch)
    near(trained.vector[0].detach(), whole.vector)


@every_encoder
def test_half_precision_gives_nearly_the_same(name: str) -> None:
    model, tiles = make(name), bag(50)
    found = model.encode(Bag(tiles.features.half()))
    assert found.vector.dtype == torch.float32
    near(found.vector, model.encode(Bag(tiles.features.half().float())).vector, atol=1e-5)


@every_encoder
def test_vectors_of_another_length_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not 9"):
        make(name).encode(bag(4, dim=9))


@every_encoder
def test_gradients_reach_every_parameter_that_the_vector_depends_on(name: str) -> None:
    model = make(name)
    model(collate([bag(21)])).vector.square().sum().backward()
    beside = ("embed.7.", "project_token", "organ", "classifier", *_score_biases(model))
    for key, parameter in model.named_parameters():
        if not key.startswith(beside):
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key


def _score_biases(model: SlideEncoder) -> list[str]:
    """A softmax does not see what is added to all of its scores."""
    return [key for key, _ in model.named_parameters() if key.endswith("score.bias")]


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 2), st.integers(1, 20), st.integers(0, 2**20))
def test_the_scan_is_the_recurrence(n_tokens: int, n_bags: int, heads: int, chunk: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n_bags, n_tokens, heads, 3, generator=draw)
    b, c = torch.randn(2, n_bags, n_tokens, 4, generator=draw)
    step = 2 * torch.rand(n_bags, n_tokens, heads, generator=draw)
    rate = -16 * torch.rand(heads, generator=draw)
    start = torch.randn(n_bags, heads, 3, 4, generator=draw)
    y, last = scan(x, step, rate, b, c, start, chunk=chunk)
    state = start.double()
    for t in range(n_tokens):  # S_t = exp(step a) S + step x ⊗ b, y = S c
        faded = (step[:, t] * rate).double().exp()[..., None, None]
        fed = torch.einsum("bh,bhp,bs->bhps", step[:, t].double(), x[:, t].double(), b[:, t].double())
        state = faded * state + fed
        near(y[:, t], torch.einsum("bhps,bs->bhp", state, c[:, t].double()).float(), atol=1e-4)
    near(last, state.float(), atol=1e-4)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
@torch.no_grad()
def test_a_sequence_in_pieces_is_the_sequence(sizes: list[int]) -> None:
    torch.manual_seed(1)
    block = Mamba2(8, state=4, head=4)
    u = torch.randn(2, sum(sizes), 8)
    whole, end = block(u)
    parts, carry = [], None
    for piece in torch.split(u, sizes, 1):
        part, carry = block(piece, carry)
        parts.append(part)
    near(torch.cat(parts, 1), whole)
    assert carry is not None
    near(carry.state, end.state)
    near(carry.tail, end.tail)


def test_two_encoders_are_pooled_over_the_tiles_that_both_have() -> None:
    model = make("cobra")
    assert isinstance(model, COBRA)
    weighed, averaged = bag(21), bag(21, seed=1, dim=5)
    assert weighed.xy is not None
    assert averaged.xy is not None
    some = [3, 4, 9, 17]
    shuffled = Bag(averaged.features[[9, 17, 3, 4]], averaged.xy[[9, 17, 3, 4]])
    found = model.encode_pair(weighed, shuffled)
    attention = model.encode(Bag(weighed.features[some])).attention
    near(found.attention, attention)
    near(found.vector, attention[0] @ averaged.features[some])


def test_tiles_without_a_common_place_cannot_be_pooled() -> None:
    model = make("cobra")
    assert isinstance(model, COBRA)
    far = Bag(bag(4).features, torch.tensor([[1, 1], [2, 2], [3, 3], [5, 5]]))
    with pytest.raises(BadFeaturesError, match="no tile in common"):
        model.encode_pair(bag(4), far)
    with pytest.raises(BadFeaturesError, match="places"):
        model.encode_pair(bag(4), Bag(bag(4).features))
    with pytest.raises(BadFeaturesError, match="one place"):
        match_places(np.array([[1, 2], [1, 2]]), np.array([[1, 2]]))


def test_only_the_heaviest_tiles_count_with_top_k() -> None:
    found = make("cobra-top").encode(bag(21))
    heaviest = found.scores[0].topk(5).indices
    assert set(found.attention[0].nonzero().flatten().tolist()) == set(heaviest.tolist())
    assert make("cobra-top").encode(bag(3)).attention.count_nonzero() == 3


def test_the_contrastive_loss_is_small_where_every_key_is_found() -> None:
    keys = torch.eye(6)
    assert info_nce(3 * keys, keys, temperature=0.05) < 1e-6
    assert info_nce(keys.roll(1, 0), keys, temperature=0.05) > 10


def test_transport_costs_nothing_between_equal_sets_and_more_between_others() -> None:
    torch.manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(2, 8, 6), dim=-1)
    equal, other = graph_transport(v, v[:, torch.randperm(8)]), graph_transport(v, torch.randn(2, 8, 6))
    assert (equal.wasserstein < 0.3 * other.wasserstein).all()
    assert (equal.gromov < other.gromov).all()


def test_a_hundred_thousand_tiles_need_little_memory_beside_them() -> None:
    code = """
import resource, torch
torch.set_num_threads(1)
from mil.bag import Bag
from mil.slide_encoders import CHIEF, COBRA, MADELEINE
bag = Bag(torch.randn(100_000, 64).half())
small = Bag(bag.features[:5_000])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, model in (
    ("cobra", COBRA((64,), width=64, heads=2, layers=1, attention_dim=16, state=16)),
    ("madeleine", MADELEINE(64, width=64, heads=4, attention_dim=16)),
    ("chief", CHIEF(64, hidden=64, attention_dim=16)),
):
    model.encode(small)
    before = peak()
    assert model.encode(bag).vector.isfinite().all()
    print(name, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    more = {line.split()[0]: int(line.split()[1]) / 1024 for line in done.stdout.splitlines()}  # MiB
    assert set(more) == {"cobra", "madeleine", "chief"}
    assert max(more.values()) < 20, more  # the tokens of all tiles would be 26 to 102
