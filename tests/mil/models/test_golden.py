"""Golden numbers of the models: with the authors' weights ours puts out what theirs does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mil.bag import Batch
from mil.losses import binary_cross_entropy, cross_entropy
from mil.models import MILModel, MILOutput
from mil.models.abmil import ABMIL, GatedABMIL
from mil.models.additive import AdditiveMIL
from mil.models.attention import MultiHeadAttention
from mil.models.clam import CLAMMB, CLAMSB
from mil.models.dsmil import DSMIL
from mil.models.dtfd import DTFDMIL
from mil.models.ilra import ILRAMIL
from mil.models.nystrom import NystromAttention, apply_pseudo_inverse
from mil.models.pooling import LinearProbe, MaxMIL, MeanMIL
from mil.models.rrt import RRTMIL
from mil.models.stamp_vit import STAMPViT
from mil.models.transformer import TransformerMIL
from mil.models.transmil import TransMIL
from mil.models.wikg import WiKG
from tests.mil import golden
from tests.mil.golden import assert_near, number
from wsi.errors import ModelMismatchError

Reading = Callable[[MILOutput], Tensor]


@dataclass(frozen=True)
class Case:
    """One model of one golden file: where its weights and input lie, and which output is which array."""

    file: str
    tag: str
    model: type[MILModel]
    reads: Mapping[str, str | Reading]
    hyper: Mapping[str, Any] = field(default_factory=dict)
    x: tuple[str, str] = ("bags", "x_64x32")
    rows: int | None = None
    weights: str | None = None
    atol: float = 1e-5

    def __str__(self) -> str:
        return f"{self.file}-{self.tag}"

    def load(self) -> MILModel:
        return self.model.from_published(
            golden.state(self.file, self.tag if self.weights is None else self.weights), **self.hyper
        )

    def check(self) -> None:
        output = self.load()(golden.batch(number(*self.x)[: self.rows]))
        for name, reading in self.reads.items():
            expected = number(self.file, f"{self.tag}/{name}" if self.tag else name)
            value = getattr(output, reading) if isinstance(reading, str) else reading(output)
            if reading == "attention":
                assert_near(value, expected, atol=1e-7, rtol=1e-4)
            else:
                assert_near(value, expected, atol=self.atol)


BIG = ("bags", "x_1000x1024")
POOLED: Mapping[str, str | Reading] = {
    "logits": "logits",
    "attn_raw": "scores",
    "attn": "attention",
    "slide_feats": "embedding",
}
SLIDE: Mapping[str, str | Reading] = {"logits": "logits", "slide_feats": "embedding"}
ILSE: Mapping[str, str | Reading] = {"Y_prob": lambda out: out.logits.sigmoid(), "A": "attention", "Z": "embedding"}
CLAM: Mapping[str, str | Reading] = {
    "logits": "logits",
    "attn_raw": "scores",
    "attn": "attention",
    "features": "embedding",
}
DUAL: Mapping[str, str | Reading] = {
    "bag_logits": "logits",
    "inst_logits": "part_logits",
    "A": lambda out: out.attention[0].T,
    "B": "embedding",
    "max_logits": lambda out: out.part_logits.amax(1),
}
RRT: Mapping[str, str | Reading] = {"logits": "logits", "attn": "attention", "slide_feats": "embedding"}

CASES = [
    Case("abmil_millab", "small_gated", GatedABMIL, POOLED),
    Case("abmil_millab", "small_plain", ABMIL, POOLED),
    Case("abmil_millab", "small_gated_fc3", GatedABMIL, POOLED),
    Case("abmil_millab", "base_gated", GatedABMIL, POOLED, x=BIG),
    Case("abmil_ilse", "plain", ABMIL, ILSE, x=("abmil_ilse", "plain/H")),
    Case("abmil_ilse", "gated", GatedABMIL, ILSE, x=("abmil_ilse", "gated/H")),
    Case("clam", "sb_small_gated", CLAMSB, CLAM),
    Case("clam", "sb_small_plain", CLAMSB, CLAM),
    Case("clam", "mb_small_gated", CLAMMB, CLAM),
    Case("dsmil", "c1_nonlinear", DSMIL, DUAL),
    Case("dsmil", "c2_nonlinear_v", DSMIL, DUAL),
    Case("dsmil", "c2_linear_v", DSMIL, DUAL),
    Case("dsmil", "c2_1000x1024", DSMIL, DUAL, x=BIG),
    Case(
        "dsmil",
        "millab",
        DSMIL,
        {
            "logits": "logits",
            "inst_logits": "part_logits",
            "attn": lambda out: out.attention[0].T,
            "B": "embedding",
            "bag_logits": lambda out: 2 * out.logits - out.part_logits.amax(1),
        },
    ),
    Case("transmil", "d64_64x32", TransMIL, SLIDE, atol=2e-5),
    Case("transmil", "d64_50x32", TransMIL, SLIDE, weights="d64_64x32", rows=50, atol=2e-5),
    Case("transmil", "d64_1000x1024", TransMIL, SLIDE, x=BIG, atol=2e-5),
    Case("transmil_millab", "n50", TransMIL, SLIDE, weights="", rows=50, atol=2e-5),
    Case("transformer_millab", "nomlp", TransformerMIL, SLIDE, {"heads": 4}),
    Case("transformer_millab", "mlp64", TransformerMIL, SLIDE, {"heads": 4}),
    Case("stamp_vit", "plain", STAMPViT, {"logits": "logits"}, {"heads": 4}),
    Case("rrt", "default", RRTMIL, RRT, {"regions": 4}, x=("rrt", "x_200x32")),
    Case("rrt", "shortcut_mlp", RRTMIL, RRT, {"regions": 4, "shortcut": True}, x=("rrt", "x_200x32")),
    Case(
        "rrt", "n50_tanh_ffn", RRTMIL, RRT, {"regions": 4, "pooling_activation": "tanh"}, x=("rrt", "x_200x32"), rows=50
    ),
    Case("wikg", "bi_interaction", WiKG, SLIDE),
    Case("wikg", "gcn", WiKG, SLIDE),
    Case("wikg", "sage", WiKG, SLIDE),
    Case("wikg", "millab", WiKG, SLIDE, {"neighbours": 4}),
    Case("ilra", "topk4", ILRAMIL, SLIDE, {"heads": 4}),
    Case("ilra", "topk8_ln", ILRAMIL, SLIDE, {"heads": 4}),
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_the_authors_weights_ours_puts_out_what_theirs_does(case: Case) -> None:
    case.check()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_that_do_not_fit_are_refused_in_one_line_that_names_the_keys(case: Case) -> None:
    weights = golden.state(case.file, case.tag if case.weights is None else case.weights)
    never_read = ("feature_extractor", "instance_loss_fn", "gate_", "b_classifier.fcc", "online_encoder.layers")
    lost = max(key for key in weights if key.endswith("bias") and not key.startswith(never_read))
    changed = {**{key: value for key, value in weights.items() if key != lost}, "surplus.weight": weights[lost]}
    with pytest.raises(ModelMismatchError, match=rf"missing {lost}; unexpected surplus\.weight$") as refused:
        case.model.from_published(changed, **case.hyper)
    assert "\n" not in str(refused.value)


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(ModelMismatchError, match=r"lack 'global_attn\.module\.0\.weight'"):
        ABMIL.from_published(golden.state("abmil_millab", "small_gated"))
    with pytest.raises(ModelMismatchError, match="they hold nothing"):
        TransMIL.from_published({})


def test_weights_of_another_shape_are_refused() -> None:
    weights = golden.state("abmil_millab", "small_gated")
    cut = {**weights, "global_attn.attention_b.0.weight": weights["global_attn.attention_b.0.weight"][:5]}
    with pytest.raises(ModelMismatchError, match=r"global_attn\.attention_b\.0\.weight is \(5, 24\), not \(16, 24\)"):
        GatedABMIL.from_published(cut)


def test_a_prefix_on_all_keys_is_taken_off() -> None:
    weights = {f"model.{key}": value for key, value in golden.state("abmil_millab", "small_gated").items()}
    output = GatedABMIL.from_published(weights)(golden.batch(number("bags", "x_64x32")))
    assert_near(output.logits, number("abmil_millab", "small_gated/logits"))


@pytest.mark.parametrize("has_classifier", [True, False])
def test_a_slide_encoder_gets_a_new_classifier_if_asked(has_classifier: bool) -> None:
    weights = golden.state("abmil_millab", "small_gated")
    if not has_classifier:
        weights = {key: value for key, value in weights.items() if not key.startswith("classifier")}
    model = GatedABMIL.from_published(weights, n_classes=7)
    output = model(golden.batch(number("bags", "x_64x32")))
    assert_near(output.embedding, number("abmil_millab", "small_gated/slide_feats"))
    assert_near(output.logits, model.classifier(output.embedding))
    assert output.logits.shape == (1, 7)


def test_abmil_masks_as_millab_does() -> None:
    model = GatedABMIL.from_published(golden.state("abmil_millab", "small_gated"))
    mask = number("abmil_millab", "small_gated_masked/mask").bool()
    output = model(Batch(number("bags", "x_64x32")[None], mask))
    for name, value in (("logits", output.logits), ("attn", output.attention), ("slide_feats", output.embedding)):
        assert_near(value, number("abmil_millab", f"small_gated_masked/{name}"))
    assert_near(output.scores[..., mask[0]], number("abmil_millab", "small_gated_masked/attn_raw")[..., mask[0]])


def test_abmil_takes_two_bags_as_millab_does() -> None:
    x = number("bags", "x_64x32")
    output = GatedABMIL.from_published(golden.state("abmil_millab", "small_gated"))(golden.batch(x, 0.5 * x.flip(0)))
    assert_near(output.logits, number("abmil_millab", "small_gated_batch2/logits"))
    assert_near(output.scores, number("abmil_millab", "small_gated_batch2/attn_raw"))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("name", "model"), [("mean", MeanMIL), ("max", MaxMIL)])
def test_pooling_is_that_of_torchmil(name: str, model: type[MeanMIL] | type[MaxMIL], masked: bool) -> None:
    x, mask = number("pooling", "x"), number("pooling", "mask").bool()
    batch = Batch(x, mask if masked else torch.ones_like(mask))
    pooled = model(32, 2, embed_dim=None)(batch).embedding
    assert_near(pooled, number("pooling", name if masked else f"{name}_nomask"), atol=1e-6)


def test_pooling_models_load_the_layouts_they_say() -> None:
    weights = golden.state("abmil_millab", "small_gated")
    kept = {key: torch.from_numpy(value.copy()) for key, value in weights.items() if not key.startswith("global_attn")}
    x = number("bags", "x_64x32")
    h = torch.relu(x @ kept["patch_embed.0.weight"].T + kept["patch_embed.0.bias"]).mean(0)
    expected = h @ kept["classifier.weight"].T + kept["classifier.bias"]
    assert_near(MeanMIL.from_published(kept)(golden.batch(x)).logits, expected[None])
    probe = {"weight": kept["patch_embed.0.weight"], "bias": kept["patch_embed.0.bias"]}
    expected = x.mean(0) @ probe["weight"].T + probe["bias"]
    assert_near(LinearProbe.from_published(probe)(golden.batch(x)).logits, expected[None])
    head_only = {key: value for key, value in kept.items() if key.startswith("classifier")}
    assert MaxMIL.from_published(head_only).dim == 24


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("loss", ["ce", "svm"])
@pytest.mark.parametrize(
    ("tag", "model"), [("sb_small_gated", CLAMSB), ("sb_small_plain", CLAMSB), ("mb_small_gated", CLAMMB)]
)
def test_clam_samples_and_judges_tiles_as_the_authors_do(
    tag: str, model: type[CLAMSB] | type[CLAMMB], loss: str, subtyping: bool
) -> None:
    clam = model.from_published(golden.state("clam", tag), subtyping=subtyping, instance_loss=loss)
    batch, label = golden.batch(number("bags", "x_64x32")), number("clam", f"{tag}/label")
    output = clam(batch)
    auxiliary = clam.auxiliary_loss(batch, output, label)
    assert_near(auxiliary / 0.3, number("clam", f"{tag}/inst_loss_{loss}_subtyping{int(subtyping)}"))
    total = clam.bag_weight * cross_entropy(output.logits, label) + auxiliary
    assert_near(total, number("clam", f"{tag}/total_loss_{loss}_subtyping{int(subtyping)}"))
    samples = clam.sample(batch, output, label, 0)
    labels = torch.cat([labels for _, labels in samples])
    predictions = torch.cat([logits.argmax(1) for logits, _ in samples])
    assert torch.equal(labels, number("clam", f"{tag}/inst_labels_subtyping{int(subtyping)}"))
    assert torch.equal(predictions, number("clam", f"{tag}/inst_preds_subtyping{int(subtyping)}"))


def test_clam_loads_checkpoints_from_before_the_dropout_layer() -> None:
    weights = golden.state("clam", "sb_small_gated")
    old = {key.replace("attention_net.3.", "attention_net.2."): value for key, value in weights.items()}
    output = CLAMSB.from_published(old)(golden.batch(number("bags", "x_64x32")))
    assert_near(output.logits, number("clam", "sb_small_gated/logits"))


@pytest.mark.parametrize("tag", ["c1_nonlinear", "c2_nonlinear_v", "c2_linear_v", "c2_1000x1024"])
def test_dsmil_weighs_both_streams_losses_alike(tag: str) -> None:
    model = DSMIL.from_published(golden.state("dsmil", tag))
    batch = golden.batch(number("bags", "x_1000x1024" if "1000" in tag else "x_64x32"))
    targets = number("dsmil", f"{tag}/y")
    output = model(batch)
    total = model.bag_weight * binary_cross_entropy(output.logits, targets) + model.auxiliary_loss(
        batch, output, targets
    )
    assert_near(total, number("dsmil", f"{tag}/loss"))
    assert torch.equal(output.part_logits[0].argmax(0), number("dsmil", f"{tag}/crit"))


def test_transmil_is_that_of_the_authors_stage_by_stage() -> None:
    model = TransMIL.from_published(golden.state("transmil", "d64_64x32"))
    for tag, n_tiles in (("d64_64x32", 64), ("d64_50x32", 50)):
        first = model.first_layer(number("bags", "x_64x32")[None, :n_tiles])
        assert_near(first, number("transmil", f"{tag}/tok_after_layer1"), atol=2e-5)
        assert_near(model.encode_positions(first), number("transmil", f"{tag}/tok_after_ppeg"), atol=2e-5)


def test_transmil_gives_a_bag_the_same_answer_in_a_batch_as_alone() -> None:
    x = number("bags", "x_64x32")
    output = TransMIL.from_published(golden.state("transmil", "d64_64x32"))(golden.batch(x, 3 * x.flip(0)))
    assert_near(output.logits, number("transmil", "d64_batch2/logits_each_alone"), atol=2e-5)


def test_transmil_of_millab_has_its_attention_after_the_first_layer() -> None:
    model = TransMIL.from_published(golden.state("transmil_millab"))
    tokens = model.first_layer(number("bags", "x_64x32")[None, :50])
    likeness = tokens[:, 1:] @ tokens[:, 0, :, None]
    assert_near(likeness, number("transmil_millab", "n50/attention"), atol=5e-5)


@pytest.mark.parametrize("n_tokens", [64, 50, 10])
def test_nystrom_attention_is_that_of_the_package(n_tokens: int) -> None:
    x = number("bags", "x_64x32_clustered")[None, :n_tokens]
    expected = number("nystrom", f"n{n_tokens}/out")
    assert_near(_nystrom()(x), expected, atol=2e-5)
    assert_near(_nystrom().of_first(x)[0], expected[:, :1], atol=2e-5)


def _nystrom() -> NystromAttention:
    ours = {"to_qkv": "qkv", "to_out": "out", "res_conv": "residual"}
    attention = NystromAttention(32, 4, landmarks=16)
    weights = golden.state("nystrom")
    attention.load_state_dict({ours[k.split(".")[0]] + k[k.index(".") :]: torch.tensor(v) for k, v in weights.items()})
    return attention.eval()


@pytest.mark.parametrize("unformed", [0, 1, 2])
@pytest.mark.parametrize("iterations", [6, 12])
def test_the_pseudo_inverse_is_that_of_the_package(iterations: int, unformed: int) -> None:
    # There the scale is that of the whole batch; as heads of one bag the six matrices share theirs, too.
    a = number("nystrom", "pinv/in").flatten(0, 1)[None]
    inverse = apply_pseudo_inverse(a, torch.eye(16).expand_as(a), iterations=iterations, unformed=unformed)
    assert_near(inverse, number("nystrom", f"pinv/out{iterations}"), atol=1e-4, rtol=1e-4)


def test_in_training_the_pseudo_inverse_and_its_gradient_are_the_same_but_for_rounding() -> None:
    a = number("nystrom", "pinv/in").flatten(0, 1)[None]
    x, weights = torch.rand(2, *a.shape[:-1], 3, generator=torch.Generator().manual_seed(0))

    def textbook(given: torch.Tensor) -> torch.Tensor:
        z, eye = given.mT / (given.sum(-1).amax() * given.sum(-2).amax()), torch.eye(16)
        for _ in range(6):
            y = given @ z
            z = z @ (13 * eye - y @ (15 * eye - y @ (7 * eye - y))) / 4
        found: torch.Tensor = z @ x
        return found

    def with_gradient(inverse: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        given = a.clone().requires_grad_()
        found = inverse(given)
        (found * weights).sum().backward()
        assert given.grad is not None
        return found.detach(), given.grad

    with torch.enable_grad():
        pairs = zip(with_gradient(lambda a: apply_pseudo_inverse(a, x)), with_gradient(textbook), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


def test_the_pseudo_inverse_stays_in_float32_under_autocast() -> None:
    a = number("nystrom", "pinv/in").flatten(0, 1)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inverse = apply_pseudo_inverse(a, torch.eye(16).expand_as(a))
    assert_near(inverse, number("nystrom", "pinv/out6"), atol=1e-4)


def test_the_transformers_first_attention_is_that_of_millab() -> None:
    for tag in ("nomlp", "mlp64"):
        model = TransformerMIL.from_published(golden.state("transformer_millab", tag), heads=4)
        tokens = torch.cat([model.class_token, model.embed(number("bags", "x_64x32"))[None]], dim=1)
        block = model.get_submodule("blocks.0")
        normed = block.get_submodule("norm")(tokens)
        attention = block.get_submodule("attention")
        assert isinstance(attention, MultiHeadAttention)
        q, k, _ = attention.project(normed, normed, normed)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        assert_near(weights, number("transformer_millab", f"{tag}/attention_layer0"), atol=1e-7, rtol=1e-4)


def test_stamp_without_its_padding_is_stamp_on_the_tiles_alone() -> None:
    model = STAMPViT.from_published(golden.state("stamp_vit", "plain"), heads=4)
    mask = ~number("stamp_vit", "plain/pad_mask").bool()
    assert int(mask.sum()) == 48
    output = model(Batch(number("bags", "x_64x32")[None], mask))
    assert_near(output.logits, number("stamp_vit", "plain/logits_truncated48"))


def test_stamp_with_distances_is_that_of_the_authors() -> None:
    model = STAMPViT.from_published(golden.state("stamp_vit", "alibi"))
    x, xy = number("bags", "x_64x32")[None], number("stamp_vit", "coords")
    output = model(Batch(x, torch.ones(1, 64, dtype=torch.bool), xy))
    assert_near(output.logits, number("stamp_vit", "alibi/logits"))


@pytest.mark.parametrize("distil", ["AFS", "MaxS", "MaxMinS"])
def test_dtfd_distils_as_the_authors_do(distil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DTFDMIL.from_published(golden.state("dtfd"), distil=distil.lower())
    monkeypatch.setattr(model, "partitions", lambda n_tiles: [list(number("dtfd", "chunks"))])
    output = model(golden.batch(number("bags", "x_64x32_clustered")))
    assert_near(output.logits, number("dtfd", f"{distil}/tier2_logits"))
    assert_near(output.part_logits, number("dtfd", "AFS/tier1_logits"))
    # Slide vector and attention follow from what the authors' second tier sees.
    rows = number("dtfd", f"{distil}/distilled")
    weights = model.slide_attention(rows)[:, 0].softmax(0)
    assert_near(output.embedding, weights @ rows)
    if distil == "AFS":
        raw, chunks = number("dtfd", "AFS/attn_raw"), number("dtfd", "chunks")
        expected = torch.zeros(64).scatter(0, chunks.flatten(), (weights[:, None] * raw[chunks].softmax(1)).flatten())
        assert_near(output.attention, expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("tag", ["default", "shortcut_mlp", "n50_tanh_ffn"])
def test_rrt_is_that_of_the_authors_stage_by_stage(tag: str) -> None:
    n_tiles = 50 if tag.startswith("n50") else 200
    model = RRTMIL.from_published(golden.state("rrt", tag), regions=4, shortcut=tag == "shortcut_mlp")
    x = number("rrt", "x_200x32")[:n_tiles]
    within = model.layers[0](model.embed(x))
    assert_near(within, number("rrt", f"{tag}/after_rmsa"))
    assert_near(model.layers[1](within), number("rrt", f"{tag}/after_crmsa"))
    assert_near(model.reembed(x[None]), number("rrt", f"{tag}/reemb"))


@pytest.mark.parametrize("tag", ["bi_interaction", "gcn", "sage"])
def test_wikg_embeds_nodes_as_the_authors_do(tag: str) -> None:
    model = WiKG.from_published(golden.state("wikg", tag))
    assert_near(model.nodes(number("bags", "x_64x32")[None]), number("wikg", f"{tag}/node_embed"))


def test_additive_contributions_are_those_of_the_authors() -> None:
    model = AdditiveMIL.from_published(golden.state("additive_mil"))
    x = number("bags", "x_64x32")
    output = model(golden.batch(x[:40], x[40:]))
    assert_near(output.logits, number("additive_mil", "logits"))
    real = torch.cat([output.part_logits[0], output.part_logits[1, :24]])
    assert_near(real, number("additive_mil", "patch_logits"))
    attention = torch.cat([output.attention[0, 0], output.attention[1, 0, :24]])
    assert_near(attention, number("additive_mil", "attention"), atol=1e-7, rtol=1e-4)
