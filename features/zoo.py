"""The published encoders, one row of facts each; data only.

A new encoder is a new row here, and its facts in the table of ``tests/features/test_zoo.py``. Facts are those of the
model's card or of its authors' code. Where tools that load a model disagree, the note says which reading this is.
A revision of None means that no commit is known to be the one the paper used: the newest is taken and recorded.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from features.encoder import EncoderSpec

__all__ = ["ALIASES", "ZOO"]

_Facts = Mapping[str, Any]
_IMAGENET: _Facts = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF: _Facts = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_BIOPTIMUS: _Facts = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}
_HIBOU: _Facts = {"mean": (0.7068, 0.5755, 0.722), "std": (0.195, 0.2316, 0.1816)}
_LUNIT: _Facts = {"mean": (0.70322989, 0.53606487, 0.66096631), "std": (0.21716536, 0.26081574, 0.20723464)}
_SWIGLU: _Facts = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}


def _kaiko(name: str, arch: str, dim: int, **kwargs: Any) -> EncoderSpec:
    return EncoderSpec(
        name=name,
        aliases=(name.replace("-", "_"),),
        hub_id=f"1aurent/{arch}.kaiko_ai_towards_large_pathology_fms",
        weights_file="model.safetensors",
        arch=arch,
        arch_kwargs={"img_size": 224, "dynamic_img_size": True, **kwargs},
        dim=dim,
        input_px=224,
        resize_px=224,
        tile_px=256,
        mpp=0.5,
        interpolation="bilinear",
        pooling="cls",
        licence="not verified; see the model card",
        source="kaiko.ai: Towards Large-Scale Training of Pathology Foundation Models, arXiv:2404.15217, 2024",
        **_HALF,
    )


def _lunit(name: str, arch: str, alias: str) -> EncoderSpec:
    return EncoderSpec(
        name=name,
        aliases=(name.replace("-", "_"), alias),
        hub_id=f"1aurent/{arch}.lunit_dino",
        weights_file="model.safetensors",
        arch=arch,
        arch_kwargs={"img_size": 224},
        dim=384,
        input_px=224,
        resize_px=224,
        tile_px=224,
        mpp=0.5,
        interpolation="bicubic",
        pooling="cls",
        licence="Lunit public licence (non-commercial)",
        source="Kang et al.: Benchmarking Self-Supervised Learning on Diverse Pathology Datasets, CVPR 2023",
        notes=(
            "mean and std are those of training, from the authors' release. The timm ports declare ImageNet's and a "
            "crop of 0.9, which TRIDENT follows: its features differ from these."
        ),
        **_LUNIT,
    )


_ROWS = (
    EncoderSpec(
        name="uni",
        aliases=("uni_v1", "uni1"),
        hub_id="MahmoodLab/UNI",
        weights_file="pytorch_model.bin",
        revision="77ffbca1ee1cdcee6e87f6deebd2db8a5888c721",
        gated=True,
        arch="vit_large_patch16_224",
        arch_kwargs={"img_size": 224, "patch_size": 16, "init_values": 1e-5, "dynamic_img_size": True},
        dim=1024,
        input_px=224,
        resize_px=224,
        tile_px=256,
        mpp=0.5,
        interpolation="bilinear",
        pooling="cls",
        licence="CC-BY-NC-ND-4.0",
        source="Chen et al.: Towards a general-purpose foundation model for computational pathology, Nat. Med. 2024",
        notes=(
            "Transform of the README; the hub's configuration says another, which STAMP and AtlasPatch follow. The "
            "revision is the one that STAMP pins."
        ),
        **_IMAGENET,
    ),
    EncoderSpec(
        name="uni2-h",
        aliases=("uni_v2", "uni2", "uni2_h"),
        hub_id="MahmoodLab/UNI2-h",
        weights_file="pytorch_model.bin",
        gated=True,
        arch="vit_giant_patch14_224",
        arch_kwargs={
            "img_size": 224,
            "patch_size": 14,
            "embed_dim": 1536,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        dim=1536,
        input_px=224,
        resize_px=224,
        tile_px=256,
        mpp=0.5,
        interpolation="bilinear",
        pooling="cls",
        licence="CC-BY-NC-ND-4.0",
        source="https://huggingface.co/MahmoodLab/UNI2-h; Chen et al., Nature Medicine 2024",
        **_IMAGENET,
    ),
    EncoderSpec(
        name="virchow2",
        aliases=("virchow_2",),
        hub_id="paige-ai/Virchow2",
        weights_file="model.safetensors",
        gated=True,
        arch="vit_huge_patch14_224",
        arch_kwargs={
            "img_size": 224,
            "init_values": 1e-5,
            "mlp_ratio": 5.3375,
            "reg_tokens": 4,
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        dim=2560,
        input_px=224,
        resize_px=224,
        tile_px=224,
        mpp=0.5,
        interpolation="bicubic",
        pooling="cls+mean",
        licence="CC-BY-NC-ND-4.0",
        source="Zimmermann et al.: Virchow2, arXiv:2408.00738, 2024",
        notes="The vector of the model card; the class token alone (1280), which STAMP returns, is its first half.",
        **_IMAGENET,
    ),
    EncoderSpec(
        name="h-optimus-0",
        aliases=("hoptimus0", "h_optimus_0"),
        hub_id="bioptimus/H-optimus-0",
        weights_file="pytorch_model.bin",
        arch="vit_giant_patch14_reg4_dinov2",
        arch_kwargs={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False},
        dim=1536,
        input_px=224,
        resize_px=224,
        tile_px=224,
        mpp=0.5,
        interpolation="bilinear",
        pooling="cls",
        licence="Apache-2.0",
        source="Saillard et al.: H-optimus-0, 2024, https://github.com/bioptimus/releases",
        notes="The card resizes nothing; other tiles are resized as in TRIDENT and STAMP (LazySlide: bicubic).",
        **_BIOPTIMUS,
    ),
    EncoderSpec(
        name="gigapath",
        aliases=("prov-gigapath", "prov_gigapath"),
        hub_id="prov-gigapath/prov-gigapath",
        weights_file="pytorch_model.bin",
        gated=True,
        arch="vit_giant_patch14_dinov2",
        arch_kwargs={
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
        },
        dim=1536,
        input_px=224,
        resize_px=256,
        tile_px=256,
        mpp=0.5,
        interpolation="bicubic",
        pooling="cls",
        licence="Apache-2.0, research use only by its terms",
        source="Xu et al.: A whole-slide foundation model for digital pathology from real-world data, Nature 2024",
        notes="The border of a tile is cut off: 256 px, then the middle 224. The tile encoder, not the slide encoder.",
        **_IMAGENET,
    ),
    EncoderSpec(
        name="phikon-v2",
        aliases=("phikon_v2", "phikonv2"),
        hub_id="owkin/phikon-v2",
        weights_file="model.safetensors",
        arch="vit_large_patch16_224",
        arch_kwargs={"img_size": 224, "init_values": 1e-5},
        dim=1024,
        input_px=224,
        resize_px=224,
        tile_px=224,
        mpp=0.5,
        interpolation="bilinear",
        pooling="cls",
        key_layout="hf_dinov2",
        licence="Owkin non-commercial",
        source="Filiot et al.: Phikon-v2, a large and public feature extractor, arXiv:2409.09173, 2024",
        notes=(
            "Resized as in TRIDENT. Were the file's positions for another input size, they would be resampled by timm, "
            "which smooths where transformers does not; the record of the weights would say so."
        ),
        **_IMAGENET,
    ),
    EncoderSpec(
        name="hibou-b",
        aliases=("hibou_b", "hiboub"),
        hub_id="histai/hibou-b",
        weights_file="model.safetensors",
        gated=True,
        arch="vit_base_patch14_reg4_dinov2",
        arch_kwargs={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, **_SWIGLU},
        dim=768,
        input_px=224,
        resize_px=224,
        tile_px=224,
        mpp=0.5,
        interpolation="bicubic",
        pooling="cls",
        key_layout="hf_dinov2",
        licence="Apache-2.0",
        source="Nechaev et al.: Hibou, a family of vision transformers for pathology, arXiv:2406.05074, 2024",
        notes=(
            "Shape (4 registers, SwiGLU of width 2048, a position for the class token) from the authors' code. Not "
            "verified against the hub's file: its name, and that its keys are those of transformers' "
            "Dinov2WithRegisters; if not, loading stops with the keys that differ. The authors' original file, in "
            "DINOv2's own names, loads with --weights."
        ),
        **_HIBOU,
    ),
    _kaiko("kaiko-vits8", "vit_small_patch8_224", 384),
    _kaiko("kaiko-vits16", "vit_small_patch16_224", 384),
    _kaiko("kaiko-vitb8", "vit_base_patch8_224", 768),
    _kaiko("kaiko-vitb16", "vit_base_patch16_224", 768),
    # Positions are stored for 518 px and resampled by timm at every forward pass of 224 px.
    _kaiko("kaiko-vitl14", "vit_large_patch14_reg4_dinov2", 1024, img_size=518),
    _lunit("lunit-vits8", "vit_small_patch8_224", "lunit-dino-s8"),
    _lunit("lunit-vits16", "vit_small_patch16_224", "lunit-dino-s16"),
    EncoderSpec(
        name="colour-stats",
        aliases=("color-stats", "colour_stats"),
        arch="colour-moments",
        dim=9,
        input_px=None,
        resize_px=None,
        tile_px=256,
        mpp=None,
        pooling="pooled",
        key_layout="none",
        licence="Apache-2.0",
        source="Stricker, Orengo: Similarity of color images, SPIE 1995",
        notes="Has no weights: a baseline, and a run on any machine.",
    ),
)

ZOO: Mapping[str, EncoderSpec] = MappingProxyType({row.name: row for row in _ROWS})
ALIASES: Mapping[str, str] = MappingProxyType({alias: row.name for row in _ROWS for alias in row.aliases})
