"""Scalars: an observer that writes learning curves and fold metrics for TensorBoard.

::

    FOLDER/fold-0/            metrics of the fold's test part: test/auroc …
    FOLDER/fold-0/member-1/   loss/training, loss/validation, lr by epoch

``tensorboard --logdir FOLDER`` shows them one over the other.
"""

import math
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from features.keys import safe_name
from mil.splits import Fold
from mil.train import Epoch
from wsi.errors import EnvironmentFaultError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Scalars"]


class Scalars:
    """An ``Observer`` of ``mil.train``; a context, which closes its files.

    What a fold that begins anew had written before is deleted; a fold that was finished before keeps what it has.

    Raises:
        EnvironmentFaultError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401 - whether it is there
        except ImportError as error:
            raise EnvironmentFaultError(
                "scalars need TensorBoard, which is not installed: pip install 'wsi-engine[tensorboard]'"
            ) from error
        self.folder = Path(folder)
        self._fold: str | None = None
        self._member: tuple[int, SummaryWriter] | None = None

    def __enter__(self) -> "Scalars":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def fold_started(self, fold: Fold, number: int, total: int) -> None:
        self._close()
        self._fold = None

    def epoch_done(self, fold: Fold, epoch: Epoch) -> None:
        if self._fold is None:
            shutil.rmtree(self._folder(fold), ignore_errors=True)
            self._fold = fold.name
        if self._member is None or self._member[0] != epoch.member:
            self._close()
            self._member = (epoch.member, _writer(self._folder(fold) / f"member-{epoch.member}"))
        writer = self._member[1]
        _add(writer, "lr", epoch.lr, epoch.epoch)
        _add(writer, "loss/training", epoch.loss, epoch.epoch)
        _add(writer, "loss/validation", epoch.stop_loss, epoch.epoch)

    def fold_finished(self, fold: Fold, metrics: dict[str, float], *, resumed: bool) -> None:
        self._close()
        if not resumed:
            writer = _writer(self._folder(fold))
            for name, value in metrics.items():
                _add(writer, f"test/{name}", value, 0)
            writer.close()

    def _folder(self, fold: Fold) -> Path:
        return self.folder / f"fold-{safe_name(fold.name)}"

    def _close(self) -> None:
        if self._member is not None:
            self._member[1].close()
            self._member = None


def _writer(folder: Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _add(writer: "SummaryWriter", name: str, value: float, step: int) -> None:
    if not math.isnan(value):  # without a validation part there is no such loss
        writer.add_scalar(name, value, step)
