"""Networks: what holds for each of them, and what its paper says of its shape."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segmentation.models import NETWORKS, SegmentationModel, build_network
from segmentation.models.blocks import BatchRenorm2d
from wsi.errors import UsageError

SMALL: dict[str, dict[str, Any]] = {
    "u-net": {"filters": (4, 6, 8)},
    "agu-net": {"filters": (4, 6, 8)},
    "dagu-net": {"filters": (4, 6, 8)},
    "dru-net": {"filters": (4, 6, 8, 8)},
}
REACH_PX = 40  # no pixel of these small networks sees further


def small(name: str, n_classes: int = 3) -> SegmentationModel:
    torch.manual_seed(0)
    network = build_network(name, 4, n_classes, **SMALL[name])
    for module in network.modules():  # as training would leave them: not all alike
        if isinstance(module, nn.BatchNorm2d | BatchRenorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def picture(height: int, width: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.rand(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def test_every_network_is_covered() -> None:
    assert set(SMALL) == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_shift_by_the_stride_shifts_the_answer(name: str) -> None:
    network = small(name)
    x = picture(128, 128)
    step = network.stride
    there = network(x).logits[..., REACH_PX:-REACH_PX, REACH_PX:-REACH_PX]
    shifted = network(x.roll((step, 2 * step), (2, 3))).logits
    back = shifted.roll((-step, -2 * step), (2, 3))[..., REACH_PX:-REACH_PX, REACH_PX:-REACH_PX]
    assert there.std() > 1e-2
    torch.testing.assert_close(there, back, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_tile_says_away_from_its_border_what_the_whole_picture_says(name: str) -> None:
    network = small(name)
    x = picture(144, 136)
    at = 2 * network.stride
    whole = network(x).logits[..., at : at + 112, at : at + 112]
    tile = network(x[..., at : at + 112, at : at + 112]).logits
    inner = slice(REACH_PX, -REACH_PX)
    torch.testing.assert_close(tile[..., inner, inner], whole[..., inner, inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(1, 1), (7, 30), (33, 16)])
@torch.no_grad()
def test_any_size_comes_back_as_it_went_in_and_filling_is_by_the_last_row_and_column(
    name: str, size: tuple[int, int]
) -> None:
    network = small(name)
    x = picture(*size)
    output = network(x)
    assert output.logits.shape == (1, 3, *size)
    step = network.stride
    rows = torch.arange(-(-size[0] // step) * step).clamp(max=size[0] - 1)
    columns = torch.arange(-(-size[1] // step) * step).clamp(max=size[1] - 1)
    filled = network(x[:, :, rows][..., columns])
    torch.testing.assert_close(output.logits, filled.logits[..., : size[0], : size[1]])
    for level, head in enumerate(output.deep, start=1):
        assert head.shape == (1, 3, -(-size[0] // 2**level), -(-size[1] // 2**level))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_reached_by_the_gradient(name: str) -> None:
    network = small(name).train()
    output = network(picture(32, 32, batch=3))
    generator = torch.Generator().manual_seed(2)
    sum((head * torch.rand(head.shape, generator=generator)).sum() for head in (output.logits, *output.deep)).backward()
    unreached = [key for key, p in network.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert unreached == []


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_what_a_picture_gets_does_not_depend_on_the_pictures_beside_it(name: str) -> None:
    network = small(name)
    x = picture(32, 32, batch=3)
    torch.testing.assert_close(network(x).logits[1:2], network(x[1:2]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_probability_map_is_looked_at(name: str) -> None:
    network = small(name)
    x = picture(32, 32)
    other = x.clone()
    other[:, 3] = 1 - other[:, 3]
    assert (network(x).logits - network(other).logits).abs().mean() > 1e-3


@torch.no_grad()
def test_shapes_are_those_of_the_papers() -> None:
    u_net = build_network("u-net", 4, 2)
    assert u_net.stride == 256
    widths = [block[0].out_channels for block in u_net.down]  # type: ignore[union-attr]
    assert widths == [8, 16, 32, 64, 128, 128, 256, 256]
    assert [block[-3].out_channels for block in u_net.up] == [256, 256, 128, 128, 64, 32, 16, 8]  # type: ignore[union-attr]
    dru = build_network("dru-net", 4, 2)
    assert dru.stride == 8
    pairs = [(block[0].out_channels, block[3].out_channels) for block in dru.down]  # type: ignore[union-attr]
    assert pairs == [(4, 8), (8, 16), (16, 32), (32, 64)]
    assert build_network("agu-net", 4, 2).stride == 64
    output = build_network("dagu-net", 4, 2).eval()(picture(64, 64))
    assert [head.shape[-1] for head in output.deep] == [32, 16, 8, 4, 2]


def test_renormalisation_is_batch_normalisation_at_first_and_that_of_inference_in_the_end() -> None:
    generator = torch.Generator().manual_seed(3)
    norm = BatchRenorm2d(2, eps=1e-5)
    x = torch.randn(4, 2, 8, 8, generator=generator) * 2 + 1
    torch.testing.assert_close(norm(x), nn.functional.batch_norm(x, None, None, training=True), atol=1e-4, rtol=0)
    for _ in range(600):
        norm(torch.randn(4, 2, 8, 8, generator=generator) * 2 + 1)
    x = torch.randn(4, 2, 8, 8, generator=generator) * 2 + 1
    plain = nn.functional.batch_norm(x, None, None, training=True)
    trained = norm(x)
    norm.eval()
    torch.testing.assert_close(norm.mean, torch.full((2,), 1.0), atol=0.1, rtol=0)
    torch.testing.assert_close(norm.deviation, torch.full((2,), 2.0), atol=0.1, rtol=0)
    assert (trained - norm(x)).abs().max() < 0.2 * (trained - plain).abs().max()


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(UsageError, match=r"no network 'unet'.*u-net"):
        build_network("unet", 4, 2)
    with pytest.raises(UsageError, match=r"has no hyper-parameter 'filter'.*filters"):
        build_network("u-net", 4, 2, filter=(1, 2))
    with pytest.raises(UsageError, match="3 channels hold none"):
        build_network("dru-net", 3, 2)
    with pytest.raises(UsageError, match=r"\(B, 4, H, W\), not \(1, 3, 8, 8\)"):
        small("u-net")(torch.zeros(1, 3, 8, 8))
