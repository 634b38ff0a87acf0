"""CLAM: gated attention pooling with a clustering loss on the tiles that attention ranks first and last.

Lu, Williamson, Chen, Chen, Barbieri, Mahmood: Data-efficient and weakly supervised computational pathology on
whole-slide images, Nature Biomedical Engineering 2021.
Differs from the authors' code: a bag of fewer than ``k_sample`` tiles samples all of them; the instance loss embeds the
sampled tiles again, so that with dropout it sees another draw of it; no tile is lost to padding.
"""

from abc import abstractmethod
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.bag import Batch
from mil.losses import smooth_top1_svm
from mil.models.abmil import AttentionScore, GatedAttentionScore
from mil.models.base import (
    MILModel,
    MILOutput,
    PublishedState,
    State,
    class_targets,
    in_chunks,
    load_published,
    masked_softmax,
    no_parts,
    pool,
)
from wsi.errors import UsageError

__all__ = ["CLAMMB", "CLAMSB"]


class _CLAM(MILModel):
    """What the two forms of CLAM share.

    Args:
        embed_dim: width of the tiles' embedding.
        attention_dim: hidden width of the attention; 256 is the authors' "small", 384 their "big".
        gated: gated attention, or plain.
        dropout: after the embedding; the attention's own is 0.25 unless this is 0, as in the authors' code.
        k_sample: tiles taken from either end of the ranking.
        subtyping: classes exclude each other: the top tiles of the other classes' attention are negative examples.
        instance_loss: ``"svm"`` smooth top-1 SVM as in the paper, ``"ce"`` cross-entropy.
        bag_weight: weight of the loss on the slide; the instance loss has the rest.
    """

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        embed_dim: int = 512,
        attention_dim: int = 256,
        gated: bool = True,
        dropout: float = 0.25,
        k_sample: int = 8,
        subtyping: bool = False,
        instance_loss: Literal["svm", "ce"] = "svm",
        bag_weight: float = 0.7,
    ) -> None:
        super().__init__(dim, n_classes)
        if instance_loss not in ("svm", "ce"):
            raise UsageError(f"instance_loss is svm or ce, not {instance_loss!r}")
        self.k_sample = k_sample
        self.subtyping = subtyping
        self.instance_loss = instance_loss
        self.bag_weight = bag_weight
        self.embed = nn.Sequential(nn.Linear(dim, embed_dim), nn.ReLU(), nn.Dropout(dropout))
        scorer = GatedAttentionScore if gated else AttentionScore
        branches = n_classes if self.attention_per_class else 1
        self.attention = scorer(embed_dim, attention_dim, branches, dropout=0.25 if dropout else 0.0)
        self.classifier: nn.Module = self._classifier(embed_dim)
        self.instance_classifiers = nn.ModuleList(nn.Linear(embed_dim, 2) for _ in range(n_classes))

    @abstractmethod
    def _classifier(self, embed_dim: int) -> nn.Module: ...

    def _attend(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Slide vectors (B, K, E), scores and attention (B, K, N)."""
        h = in_chunks(self.embed, batch.features, mask=batch.mask)  # (B, N, E)
        scores, attention = masked_softmax(
            in_chunks(self.attention, h, mask=batch.mask).transpose(1, 2), batch.mask
        )  # (B, K, N)
        return pool(attention, h), scores, attention

    def auxiliary_loss(self, batch: Batch, output: MILOutput, targets: Tensor) -> Tensor:
        """(1 − bag_weight) times the instance loss, mean over the bags.

        Raises:
            UsageError: targets are not class indices.
        """
        targets = class_targets(targets, output.logits.shape[1], "CLAM's instance loss")
        losses = [
            torch.stack(
                [self._judge(logits, labels) for logits, labels in self.sample(batch, output, targets, bag)]
            ).sum()
            for bag in range(len(batch))
        ]
        share = output.logits.shape[1] if self.subtyping else 1
        return (1 - self.bag_weight) * torch.stack(losses).mean() / share

    def sample(self, batch: Batch, output: MILOutput, targets: Tensor, bag: int) -> list[tuple[Tensor, Tensor]]:
        """Instance logits (n, 2) and labels (n,) of the tiles sampled from one bag, for each class that samples any."""
        k = min(self.k_sample, int(batch.mask[bag].sum()))
        samples = []
        for index in range(output.logits.shape[1]):  # of several tasks, the classes of one
            classifier = self.instance_classifiers[index]
            own = index == int(targets[bag])
            if not own and not self.subtyping:
                continue
            row = output.scores[bag, index if self.attention_per_class else 0].detach()  # (N,)
            tiles = row.topk(k).indices
            labels = torch.full_like(tiles, int(own))
            if own:
                lowest = (-row).masked_fill(~batch.mask[bag], -torch.inf).topk(k).indices
                tiles, labels = torch.cat([tiles, lowest]), torch.cat([labels, torch.zeros_like(lowest)])
            samples.append((classifier(self.embed(batch.features[bag, tiles].float())), labels))
        return samples

    def _judge(self, logits: Tensor, labels: Tensor) -> Tensor:
        return smooth_top1_svm(logits, labels) if self.instance_loss == "svm" else F.cross_entropy(logits, labels)

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of the CLAM repository, its versions with and without a dropout layer before the attention."""
        found = PublishedState(state)
        net = "attention_net.3" if found.has("attention_net.3.") else "attention_net.2"
        gated = not found.has(f"{net}.module.")
        names = {"embed.0": "attention_net.0"}
        names |= {
            "attention.content": f"{net}.attention_a.0" if gated else f"{net}.module.0",
            "attention.score": f"{net}.attention_c" if gated else f"{net}.module.3",
            "classifier": "classifiers",
        }
        if gated:
            names["attention.gate"] = f"{net}.attention_b.0"
        model = cls(
            found["attention_net.0.weight"].shape[1],
            found.count("instance_classifiers.{}."),
            embed_dim=len(found["attention_net.0.weight"]),
            attention_dim=len(found[f"{names['attention.content']}.weight"]),
            gated=gated,
            **hyper,
        )
        return load_published(model, found, names, unused=("instance_loss_fn.",))


class CLAMSB(_CLAM):
    """CLAM with a single attention branch for all classes."""

    def _classifier(self, embed_dim: int) -> nn.Module:
        return nn.Linear(embed_dim, self.n_classes)

    def forward(self, batch: Batch) -> MILOutput:
        """One slide vector, one classifier."""
        embedding, scores, attention = self._attend(batch)
        logits = self.classifier(embedding.squeeze(1))  # (B, C)
        return MILOutput(logits, attention, scores, embedding.flatten(1), no_parts(logits))


class CLAMMB(_CLAM):
    """CLAM with an attention branch, a slide vector and a classifier for each class."""

    attention_per_class = True
    classifier: nn.ModuleList

    def _classifier(self, embed_dim: int) -> nn.Module:
        return nn.ModuleList(nn.Linear(embed_dim, 1) for _ in range(self.n_classes))

    def forward(self, batch: Batch) -> MILOutput:
        """A slide vector and a logit for each class."""
        embedding, scores, attention = self._attend(batch)  # (B, C, E)
        logits = torch.cat([judge(embedding[:, c]) for c, judge in enumerate(self.classifier)], dim=1)  # (B, C)
        return MILOutput(logits, attention, scores, embedding.flatten(1), no_parts(logits))
