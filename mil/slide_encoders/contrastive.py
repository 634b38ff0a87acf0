"""Training a COBRA of one's own: without labels, on the features of one's own stores.

Lenz et al., CVPR 2025, with the loss of Chen, Xie, He: An Empirical Study of Training Self-Supervised Vision Transformers
(MoCo v3), ICCV 2021. Two views of a patient are some tiles of a slide by one encoder, and some of a slide by another; the
network learns to tell that they belong together. What it compares are pooled tokens; what it is used for is the weights.
Differs from the paper: all slides of a batch have the same two encoders, so that an encoder never gives a slide away; a
view has at most half of a slide's tiles, so that two views of a small slide differ; defaults are for hundreds of slides.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from features.store import FeatureStore
from features.training import cosine_schedule, follow, half_precision, parameter_groups
from features.weights import WeightsRecord, state_sha256
from mil.bag import Bag, Batch, collate
from mil.cohort import CACHE_BYTES
from mil.slide_encoders.cobra import COBRA
from mil.slide_encoders.loading import LoadedSlideEncoder, SlideEncoderRequest, load_slide_encoder, save_slide_encoder
from mil.slide_encoders.madeleine import info_nce
from mil.slide_encoders.zoo import SlideEncoderSpec, TileFeatures
from mil.sources import BagSource, CachedSource, StoreSource
from mil.train import pick_device
from wsi._files import write_atomically, write_table
from wsi.errors import CohortError, DivergedError, RunMismatchError, UsageError

__all__ = ["SlideTrainConfig", "TrainingEpoch", "train_slide_encoder"]

ENCODER_FILE = "encoder.safetensors"
_FORMAT, _VERSION = "wsi-slide-encoder-run", 1


@dataclass(frozen=True)
class SlideTrainConfig:
    """How a slide encoder is trained. The network's sizes are COBRA II's, the optimisation COBRA's but for its length.

    Attributes:
        width, layers, heads, attention_dim, state, channels, dropout: of ``COBRA``.
        hidden, projection: widths of the heads that are thrown away in the end.
        tiles: of a slide in a view, at most.
        epochs, warmup_epochs: length of the cosine schedule and of the linear rise before it.
        batch_size: patients a step; each is told from the others.
        lr: of AdamW for a batch of 256; grows with the batch.
        weight_decay: of matrices.
        temperature: of the contrastive loss.
        momentum: by which the key encoder follows at the start; it rises to 1 along a cosine.
        checkpoint_epochs: after so many, what is needed to go on is written.
        device, precision: where and how it is computed; on a CPU ``"auto"`` is float32, which repeats to the bit.
        seed: of everything.
    """

    width: int = 768
    layers: int = 1
    heads: int = 4
    attention_dim: int = 256
    state: int = 128
    channels: int = 64
    dropout: float = 0.2
    hidden: int = 3072
    projection: int = 256
    tiles: int = 768
    epochs: int = 200
    warmup_epochs: int = 5
    batch_size: int = 64
    lr: float = 5e-4
    weight_decay: float = 0.1
    temperature: float = 0.2
    momentum: float = 0.99
    checkpoint_epochs: int = 10
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 2, "warmup_epochs": 0, "seed": 0}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type is int and (not isinstance(value, int) or value < least.get(each.name, 1)):
                raise UsageError(f"{each.name} is a whole number from {least.get(each.name, 1)}, not {value!r}")
        for name, below in (("lr", math.inf), ("temperature", math.inf)):
            if not 0 < getattr(self, name) < below:
                raise UsageError(f"{name} is above 0, not {getattr(self, name)!r}")
        for name, most in (("dropout", 1.0), ("momentum", 1.0), ("weight_decay", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is from 0 to {most:g}, not {getattr(self, name)!r}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise UsageError(f"precision is auto, fp32, bf16 or fp16, not {self.precision!r}")


class TrainingEpoch(NamedTuple):
    """One line of the learning curve; ``found`` is how often a view finds its partner first among those of its batch."""

    epoch: int
    lr: float
    loss: float
    found: float


@dataclass(frozen=True, eq=False)
class _Views:
    """Draws two views of each patient of a batch."""

    sources: Sequence[BagSource]
    slides: Sequence[Sequence[str]]  # of each patient
    config: SlideTrainConfig

    @property
    def steps(self) -> int:
        """Batches of an epoch; none has a single patient, who could not be told from anybody."""
        n = len(self.slides)
        return min(math.ceil(n / self.config.batch_size), n // 2)

    def batches(self, rng: np.random.Generator) -> Iterator[tuple[Batch, Batch]]:
        """An epoch: every patient once, in batches of nearly one size."""
        for chosen in np.array_split(rng.permutation(len(self.slides)), self.steps):
            yield self._view(chosen, rng), self._view(chosen, rng)

    def _view(self, patients: np.ndarray, rng: np.random.Generator) -> Batch:
        source = self.sources[int(rng.integers(len(self.sources)))]
        return collate([self._some(source, self.slides[patient], rng) for patient in patients])

    def _some(self, source: BagSource, slides: Sequence[str], rng: np.random.Generator) -> Bag:
        bag = source.read(slides[int(rng.integers(len(slides)))])
        n = max(1, min(self.config.tiles, len(bag) // 2))
        rows = torch.from_numpy(np.sort(rng.choice(len(bag), n, replace=False)))
        return Bag(bag.features[rows], None, bag.key)


class _Projected(nn.Module):
    """An encoder with the head that its pooled tokens go through: (B, projection)."""

    def __init__(self, encoder: COBRA, config: SlideTrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = _head(config.width, config)

    def forward(self, batch: Batch) -> Tensor:
        projected: Tensor = self.head(self.encoder.pooled_tokens(batch))
        return projected


def train_slide_encoder(
    store: FeatureStore | str | Path,
    encoders: Sequence[str],
    config: SlideTrainConfig | None = None,
    *,
    out: str | Path | None = None,
    patients: Mapping[str, str] | None = None,
    name: str = "own-cobra",
    done: Callable[[TrainingEpoch], None] | None = None,
) -> LoadedSlideEncoder:
    """Train a slide encoder on all slides of a store that have features of all of these encoders.

    The same store, configuration and seed give the same bits on a CPU with the same number of threads, however often the
    run was interrupted.

    Args:
        encoders: patch encoders in the store; two or more teach it what does not depend on the encoder.
        out: the run's folder: ``run.json``, ``curve.csv``, ``encoder.safetensors``, and what an interrupted run goes on
            from. A run that is finished there is taken as it is; without it nothing is kept on disk.
        patients: whose each slide is, by key; by default each slide is a patient's only one.
        name: what the encoder is called.
        done: is told each epoch.

    Raises:
        CohortError: fewer than two patients have features of all encoders.
        RunMismatchError: ``out`` holds a run of other slides or settings.
    """
    config = config or SlideTrainConfig()
    store = store if isinstance(store, FeatureStore) else FeatureStore(store)
    stored = [StoreSource(store, [encoder]) for encoder in dict.fromkeys(encoders)]
    if not stored:
        raise UsageError("which patch encoders? name at least one whose features the store holds")
    of_patient = _slides_of_patients(store, stored, patients or {})
    spec = _spec(name, stored, store, len(of_patient))
    about = {
        "config": asdict(config), "features": [dict(source.facts) for source in stored], "name": name,
        "patients": len(of_patient), "cohort": _digest(of_patient),
    }  # fmt: skip
    folder = None if out is None else _Folder(Path(out), json.loads(json.dumps(about)))
    if folder is not None and (folder.root / ENCODER_FILE).exists():
        return load_slide_encoder(SlideEncoderRequest(str(folder.root / ENCODER_FILE), device=config.device))
    views = _Views([CachedSource(source, CACHE_BYTES // len(stored)) for source in stored], of_patient, config)
    encoder = _trained(views, sorted({tile.dim for tile in spec.tiles}), config, folder, done)
    if folder is not None:
        save_slide_encoder(folder.root / ENCODER_FILE, encoder, spec, about)
        folder.checkpoint.unlink(missing_ok=True)
    frozen = encoder.eval().requires_grad_(False)
    return LoadedSlideEncoder(spec, frozen, WeightsRecord("file", state_sha256(frozen.state_dict())))


def _trained(
    views: _Views,
    widths: list[int],
    config: SlideTrainConfig,
    folder: "_Folder | None",
    done: Callable[[TrainingEpoch], None] | None,
) -> COBRA:
    """The loop. The key encoder, which follows the query encoder slowly, is what is kept."""
    device = pick_device(config.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # whoever calls keeps his own luck
        torch.manual_seed(config.seed)
        query = _Projected(_cobra(widths, config), config).to(device)
        predict = _head(config.projection, config).to(device)
        key = deepcopy(query).requires_grad_(False)
        trained = nn.ModuleList([query, predict])
        peak = config.lr * config.batch_size / 256
        optimizer = torch.optim.AdamW(parameter_groups(trained, config.weight_decay), lr=peak)
        autocast, scaler = half_precision(config.precision, device)
        factor = cosine_schedule(config.warmup_epochs * views.steps, config.epochs * views.steps)
        state = nn.ModuleDict({"query": query, "predict": predict, "key": key})
        curve = [] if folder is None else folder.resume(state, optimizer, scaler)
        for epoch in range(len(curve), config.epochs):
            # What is drawn depends on seed and epoch alone, so that an interrupted run draws the same.
            rng = np.random.default_rng([config.seed, epoch])
            torch.manual_seed(int(rng.integers(2**62)))
            losses, found = [], []
            for i, views_of in enumerate(views.batches(rng)):
                step = epoch * views.steps + i
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor(step)
                one, other = (view.to(device) for view in views_of)
                with autocast:
                    q1, q2 = predict(query(one)), predict(query(other))  # (B, projection)
                    with torch.no_grad():
                        k1, k2 = key(one), key(other)
                loss = _loss(q1, k2, config.temperature) + _loss(q2, k1, config.temperature)
                if not torch.isfinite(loss):
                    raise DivergedError(f"the loss is {loss.item()} in epoch {epoch + 1}: training diverged; lower lr")
                optimizer.zero_grad()
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                scaler.step(optimizer)
                scaler.update()
                follow(key, query, 1 - (1 - config.momentum) * _half_cosine(step / (config.epochs * views.steps)))
                losses.append(float(loss.detach()))
                found.append(_found(q1, k2))
            curve.append(TrainingEpoch(epoch + 1, peak * factor(step), float(np.mean(losses)), float(np.mean(found))))
            if folder is not None and (len(curve) % config.checkpoint_epochs == 0 or len(curve) == config.epochs):
                folder.write(state, optimizer, scaler, curve)
            if done is not None:
                done(curve[-1])
    return key.encoder.cpu()


def _cobra(widths: list[int], config: SlideTrainConfig) -> COBRA:
    names = ("width", "layers", "heads", "attention_dim", "state", "channels", "dropout")
    return COBRA(widths, **{name: getattr(config, name) for name in names})


def _head(width: int, config: SlideTrainConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, config.hidden, bias=False),
        nn.BatchNorm1d(config.hidden),
        nn.ReLU(),
        nn.Linear(config.hidden, config.projection, bias=False),
        nn.BatchNorm1d(config.projection, affine=False),
    )


def _loss(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    return 2 * temperature * info_nce(query, key, temperature=temperature, symmetric=False)


@torch.no_grad()
def _found(query: Tensor, key: Tensor) -> float:
    nearest = (nn.functional.normalize(query.float()) @ nn.functional.normalize(key.float()).T).argmax(1)
    return float((nearest.cpu() == torch.arange(len(query))).float().mean())


def _half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


class _Folder:
    """A run on disk."""

    def __init__(self, root: Path, about: dict[str, Any]) -> None:
        self.root, self.checkpoint = root, root / "checkpoint.pt"
        whole = {"format": _FORMAT, "version": _VERSION, **about}
        file = root / "run.json"
        if file.exists():
            there = json.loads(file.read_bytes())
            changed = [key for key in whole if there.get(key) != whole[key]]
            if changed:
                raise RunMismatchError(
                    f"{root}: holds a run with other {', '.join(changed)}; train into another folder, or ask for the same"
                )
        else:
            root.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(whole, indent=1).encode())

    def resume(
        self, state: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> list[TrainingEpoch]:
        """Fill these from the last checkpoint, if there is one; the epochs that are done."""
        if not self.checkpoint.exists():
            return []
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        state.load_state_dict(saved["state"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        return [TrainingEpoch(*row) for row in saved["curve"]]

    def write(
        self,
        state: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        curve: Sequence[TrainingEpoch],
    ) -> None:
        """Put a checkpoint in the place of the last one, and the learning curve beside it."""
        file = io.BytesIO()
        rows = [list(row) for row in curve]
        parts = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "curve": rows}
        torch.save({"state": state.state_dict(), **parts}, file)
        write_atomically(self.checkpoint, file.getvalue())
        write_table(self.root / "curve.csv", TrainingEpoch._fields, rows)


def _slides_of_patients(
    store: FeatureStore, sources: Sequence[StoreSource], patients: Mapping[str, str]
) -> list[list[str]]:
    found: dict[tuple[bool, str], list[str]] = {}
    for slide in store:
        if all(source.lacks(slide.key) is None for source in sources):
            owner = (True, patients[slide.key]) if slide.key in patients else (False, slide.key)
            found.setdefault(owner, []).append(slide.key)
    if len(found) < 2:
        names = " and ".join(encoder for source in sources for encoder in source.encoders)
        raise CohortError(
            f"{store.root}: {len(found)} patients have features of {names}; at least two are needed, to be told apart"
        )
    return list(found.values())


def _spec(name: str, sources: Sequence[StoreSource], store: FeatureStore, patients: int) -> SlideEncoderSpec:
    facts = [source.facts for source in sources]
    return SlideEncoderSpec(
        name=name,
        kind="cobra",
        tiles=tuple(TileFeatures(str(each["encoder"][0]).lower(), int(each["dim"][0])) for each in facts),
        dim=None,
        mpp=store.tiling.mpp,
        tile_px=store.tiling.tile_px,
        licence="your own",
        source=f"trained on {patients} patients",
    )


def _digest(slides: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256(json.dumps(slides).encode()).hexdigest()
