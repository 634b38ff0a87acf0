"""The zoo: that every row builds the network its authors published."""

import json
from dataclasses import asdict
from typing import NamedTuple

import pytest
import torch

from features.custom import BACKBONES
from features.encoder import EncoderSpec, create_backbone, known_encoders
from features.zoo import ALIASES, ZOO


class Facts(NamedTuple):
    """What is known of a published network from elsewhere than the row."""

    params_m: float
    dim: int
    depth: int
    prefix: int  # class token and registers
    shapes: dict[str, tuple[int, ...]]


# Parameters in millions and shapes as in the published checkpoints. (1, N, C): N patches, with the prefix or not.
PUBLISHED = {
    "uni": Facts(303.4, 1024, 24, 1, {"pos_embed": (1, 197, 1024), "blocks.0.mlp.fc1.weight": (4096, 1024)}),
    "uni2-h": Facts(
        681.4,
        1536,
        24,
        9,
        {
            "pos_embed": (1, 256, 1536),
            "reg_token": (1, 8, 1536),
            "blocks.0.mlp.fc1.weight": (8192, 1536),
            "blocks.0.mlp.fc2.weight": (1536, 4096),
        },
    ),
    "virchow2": Facts(
        631.2,
        2560,
        32,
        5,
        {
            "pos_embed": (1, 261, 1280),
            "reg_token": (1, 4, 1280),
            "blocks.0.mlp.fc1.weight": (6832, 1280),
            "blocks.0.mlp.fc2.weight": (1280, 3416),
        },
    ),
    "h-optimus-0": Facts(
        1134.8,
        1536,
        40,
        5,
        {"pos_embed": (1, 256, 1536), "reg_token": (1, 4, 1536), "blocks.0.mlp.fc1.weight": (8192, 1536)},
    ),
    "gigapath": Facts(
        1135.0,
        1536,
        40,
        1,
        {
            "pos_embed": (1, 197, 1536),
            "patch_embed.proj.weight": (1536, 3, 16, 16),
            "blocks.39.mlp.fc1.weight": (8192, 1536),
        },
    ),
    "phikon-v2": Facts(303.4, 1024, 24, 1, {"pos_embed": (1, 197, 1024), "blocks.0.ls1.gamma": (1024,)}),
    "hibou-b": Facts(
        85.7,
        768,
        12,
        5,
        {
            "pos_embed": (1, 256, 768),
            "reg_token": (1, 4, 768),
            "blocks.0.mlp.fc1.weight": (4096, 768),
            "blocks.0.mlp.fc2.weight": (768, 2048),
        },
    ),
    "kaiko-vits8": Facts(21.7, 384, 12, 1, {"pos_embed": (1, 785, 384)}),
    "kaiko-vits16": Facts(21.7, 384, 12, 1, {"pos_embed": (1, 197, 384)}),
    "kaiko-vitb8": Facts(85.8, 768, 12, 1, {"pos_embed": (1, 785, 768)}),
    "kaiko-vitb16": Facts(85.8, 768, 12, 1, {"pos_embed": (1, 197, 768)}),
    "kaiko-vitl14": Facts(
        304.4,
        1024,
        24,
        5,
        {"pos_embed": (1, 1369, 1024), "reg_token": (1, 4, 1024), "blocks.0.ls1.gamma": (1024,)},
    ),
    "lunit-vits8": Facts(21.7, 384, 12, 1, {"pos_embed": (1, 785, 384)}),
    "lunit-vits16": Facts(21.7, 384, 12, 1, {"pos_embed": (1, 197, 384)}),
}

# Without layer scale: a gamma that the row asked for would find no tensor in the published file.
PLAIN = ("kaiko-vits8", "kaiko-vits16", "kaiko-vitb8", "kaiko-vitb16", "lunit-vits8", "lunit-vits16")


def test_every_row_with_weights_has_published_facts_to_be_held_against() -> None:
    assert {row.name for row in known_encoders() if row.key_layout != "none"} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_builds_the_published_network(name: str) -> None:
    row, facts = ZOO[name], PUBLISHED[name]
    with torch.device("meta"):
        network = create_backbone(row)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(facts.params_m, rel=0.005)
    assert {key: shapes.get(key) for key in facts.shapes} == facts.shapes
    assert sum(key.endswith(".norm1.weight") for key in shapes) == facts.depth
    assert network.num_prefix_tokens == facts.prefix
    assert any("gamma" in key for key in shapes) == (name not in PLAIN)
    assert not any(key.startswith(("head.", "fc_norm.")) for key in shapes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_gives_vectors_of_the_published_length(name: str) -> None:
    row = ZOO[name]
    assert row.input_px == 224
    with torch.device("meta"):
        tokens = create_backbone(row).forward_features(torch.zeros(1, 3, 224, 224))  # type: ignore[operator]  # timm's method
    channels = tokens.shape[2]
    assert row.dim == PUBLISHED[name].dim == (2 * channels if row.pooling == "cls+mean" else channels)


@pytest.mark.parametrize("row", known_encoders(), ids=lambda row: row.name)
def test_a_row_says_where_it_is_from_and_can_be_saved_with_results(row: EncoderSpec) -> None:
    saved = json.loads(json.dumps(asdict(row)))
    assert EncoderSpec(**saved | {key: tuple(saved[key]) for key in ("mean", "std", "aliases")}) == row
    assert row.licence != "unknown"
    assert row.source != "unknown"
    assert row.revision is None or (len(row.revision) == 40 and set(row.revision) <= set("0123456789abcdef"))


def test_names_and_aliases_are_lower_case_and_unambiguous() -> None:
    aliases = [alias for row in known_encoders() for alias in row.aliases]
    assert len(set(aliases)) == len(aliases) == len(ALIASES)
    assert ZOO.keys().isdisjoint(aliases)
    assert all(name == name.lower() for name in (*ZOO, *aliases))
    assert all(ALIASES[alias] == row.name for row in known_encoders() for alias in row.aliases)


def test_the_baseline_without_weights_is_built_in() -> None:
    assert {row.arch for row in known_encoders() if row.key_layout == "none"} == BACKBONES.keys()
