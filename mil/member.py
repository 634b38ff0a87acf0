"""Member: one trained model with all it needs to answer: scaling, objectives, temperatures. A safetensors file on disk."""

import json
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mil.bag import Bag, Batch, collate
from mil.models import MILOutput, build_model
from mil.models.base import in_chunks
from mil.objective import Joint, Objective
from wsi._files import write_atomically
from wsi.errors import ModelMismatchError

__all__ = ["Member", "Scaling"]

_FORMAT = "wsi-mil-member"
_VERSION = 2
_LARGEST = torch.finfo(torch.float16).max


class Scaling(nn.Module):
    """Features less their mean, by their deviation; padding stays zero.

    Where no gradient is wanted, features in half precision stay so: they are scaled in float32, some tiles at a time, and
    rounded again. That adds no more than storing them so did, and a bag of 100,000 tiles needs no copy of twice its size.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", deviation.float())

    def forward(self, batch: Batch) -> Batch:
        if batch.features.dtype == torch.float16 and not torch.is_grad_enabled():
            scaled = in_chunks(self._rounded, batch.features, batch.mask[..., None])  # (B, N, D)
        else:
            scaled = self._scaled(batch.features.float(), batch.mask[..., None])
        return Batch(scaled, batch.mask, batch.xy)

    def _scaled(self, features: Tensor, mask: Tensor) -> Tensor:
        scaled = (features - self.mean).div_(self.deviation)
        return scaled if bool(mask.all()) else scaled.mul_(mask)

    def _rounded(self, features: Tensor, mask: Tensor) -> Tensor:
        """In half precision; what lies beyond its range, as a feature that hardly varied in training may, is its end."""
        return self._scaled(features, mask).clamp(-_LARGEST, _LARGEST).half()


class Member(nn.Module):
    """Scaling and model; a bag in, answers out. Of several tasks it speaks for one, at first for the first.

    Without a scaling features are taken as they are.

    Attributes:
        facts: what the model is: ``model``, ``hyper``, ``dim``, and of which features it was trained.
        joint: the objectives of its tasks, and which logits are whose.
        task: the one it speaks for.
        temperatures: by which the logits of each task are divided.
    """

    def __init__(self, facts: Mapping[str, Any], joint: Joint, scaling: Scaling | None) -> None:
        super().__init__()
        self.facts = dict(facts)
        self.joint = joint
        self.task = next(iter(joint.tasks))
        self.temperatures = dict.fromkeys(joint.tasks, 1.0)
        self.scaling = nn.Identity() if scaling is None else scaling
        self.model = build_model(facts["model"], facts["dim"], joint.n_outputs, **facts["hyper"])

    def speaking_for(self, task: str) -> "Member":
        """This model, weights and all, speaking for another of its tasks."""
        other = copy(self)
        other.task = task
        return other

    @property
    def objective(self) -> Objective:
        """How the logits of its task become answers."""
        return self.joint.tasks[self.task]

    @property
    def temperature(self) -> float:
        """By which the logits of its task are divided."""
        return self.temperatures[self.task]

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.temperatures[self.task] = value

    def forward(self, batch: Batch) -> MILOutput:
        """The model's output for raw features, as far as it is of its task."""
        return self.narrow(self.model(self.scaling(batch)))

    def narrow(self, output: MILOutput) -> MILOutput:
        """What of the model's output is of its task: its logits, and their rows where each has an attention of its own."""
        columns = self.joint.columns(self.task)
        rows = columns if self.model.attention_per_class else slice(None)
        return output._replace(
            logits=output.logits[:, columns],
            attention=output.attention[:, rows],
            scores=output.scores[:, rows],
            part_logits=output.part_logits[..., columns],
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def logits(self, bag: Bag) -> Tensor:
        """(n_outputs,) of its task, of one bag, all of its tiles, on the CPU."""
        return self._output(bag).logits[0].float().cpu()

    @torch.no_grad()
    def every_logit(self, bag: Bag) -> Tensor:
        """(n_outputs,) of all tasks."""
        output: MILOutput = self.eval().model(self.scaling(collate([bag]).to(self.device)))
        return output.logits[0].float().cpu()

    def answers(self, bag: Bag) -> dict[str, Tensor]:
        """Calibrated answers (P,) of each task, float64, of one bag, all of its tiles, on the CPU."""
        logits = self.every_logit(bag)[None]
        return {
            name: objective.answer(logits[:, self.joint.columns(name)], self.temperatures[name])[0]
            for name, objective in self.joint.tasks.items()
        }

    @torch.no_grad()
    def attention(self, bag: Bag) -> Tensor:
        """(K, N) attention over the tiles of one bag; each row sums to one."""
        return self._output(bag).attention[0].float().cpu()

    def _output(self, bag: Bag) -> MILOutput:
        output: MILOutput = self.eval()(collate([bag]).to(self.device))
        return output

    def answer(self, logits: Tensor) -> Tensor:
        """(B, P) calibrated answers of (B, n_outputs) logits, float64."""
        return self.objective.answer(logits, self.temperature)

    def save(self, path: Path) -> None:
        """Write the member as one file, which holds no code."""
        from safetensors.torch import save

        about = {
            "format": _FORMAT,
            "version": _VERSION,
            "facts": self.facts,
            "joint": self.joint.to_facts(),
            "temperatures": self.temperatures,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # One key: safetensors writes several in an order of its own, and equal models should be equal files.
        write_atomically(path, save(tensors, {"wsi": json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Member":
        """Read a member.

        Raises:
            ModelMismatchError: the file is none of ours, damaged, or of a model this release does not know so.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device="cpu") as file:
                about = json.loads((file.metadata() or {})["wsi"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            if (about["format"], about["version"]) != (_FORMAT, _VERSION):
                raise ModelMismatchError(f"{path}: not a model of this release, which reads {_FORMAT} {_VERSION}")
            facts = about["facts"]
            scaling = (
                Scaling(tensors["scaling.mean"], tensors["scaling.deviation"]) if "scaling.mean" in tensors else None
            )
            member = cls(facts, Joint.from_facts(about["joint"]), scaling)
            member.temperatures = {name: float(about["temperatures"][name]) for name in member.joint.tasks}
            member.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ModelMismatchError(f"{path}: cannot be used as a model ({error}); train it again") from error
        return member.to(device).eval()
