"""RunFolder: a training run on disk, fold by fold; what is finished is whole and never done again.

::

    RUN/
      run.json                what was trained on what: format, version, config, target, features, digest of the cohort
      cohort.csv              case, patient, slides, site, fold, label, event of each case
      left_out.csv            slides that took no part, and why
      splits.json             who is trained on and who is tested
      environment.json        versions, machine, threads
      folds/<fold>/           appears whole, by one rename
        metrics.json  predictions.csv  curve.csv  member-0.safetensors …
      predictions.csv         all folds' test parts, a row a case
      metrics.json            every metric with its interval over patients

With several targets there is a ``predictions-TARGET.csv`` for each, ``cohort.csv`` has the columns ``label TARGET`` and
``event TARGET`` for all but the first, and ``metrics.json`` holds by the name of the target what it else holds at once.
"""

import csv
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from features.keys import safe_name
from mil.cohort import Cases, Cohort
from mil.config import TrainConfig
from mil.member import Member
from mil.metrics import PRIMARY, measure, primary
from mil.models import build_model
from mil.predictions import Predictions, file_name
from mil.result import Result
from mil.splits import Fold, make_folds
from mil.target import Target, Task, parse_value
from mil.train import Epoch, Observer, TrainedFold, train_fold
from wsi._files import fsync_folder, fsync_tree, nan_as_none, write_atomically, write_table
from wsi._version import __version__
from wsi.errors import NotExtractedError, RunMismatchError, StoreFormatError

__all__ = ["FORMAT_VERSION", "RunFolder", "cross_validate", "run_folds"]

FORMAT_VERSION = 2  # 2: several targets
_PACKAGES = ("torch", "numpy", "scikit-learn", "lifelines", "scipy", "zarr")


def cross_validate(
    cohort: Cohort,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    observer: Observer | None = None,
) -> Result:
    """Train and test on each fold in turn.

    Args:
        out: the run's folder. Folds that are finished there are taken as they are, so that the same call goes on after a
            kill; without it nothing is kept on disk.

    Raises:
        CohortError: the cohort does not allow these folds.
        RunMismatchError: ``out`` holds a run of another cohort or configuration.
    """
    config = config or TrainConfig()
    build_model(config.model, cohort.source.dim, 2, **config.hyper)  # a wrong name is said before any bag is read
    cases = cohort.cases(config.fusion)
    folds = make_folds(cases, cohort.target, by=config.split_by, folds=config.folds, seed=config.seed)

    def train(fold: Fold, number: int) -> TrainedFold:
        return train_fold(cohort, cases, fold, number, config, observer)

    return run_folds(cohort, cases, folds, config, train, out=out, observer=observer)


def run_folds(
    cohort: Cohort,
    cases: Cases,
    folds: Sequence[Fold],
    config: TrainConfig,
    train: Callable[[Fold, int], TrainedFold],
    *,
    out: str | Path | None = None,
    observer: Observer | None = None,
) -> Result:
    """Each fold in turn by ``train(fold, number)``, but those that are finished in ``out``; as ``cross_validate``."""
    run = None if out is None else RunFolder.create(Path(out), cohort, cases, folds, config)
    trained = []
    for number, fold in enumerate(folds):
        if observer is not None:
            observer.fold_started(fold, number, len(folds))
        done = None if run is None else run.read_fold(fold)
        result = done or train(fold, number)
        if run is not None and done is None:
            run.write_fold(result)
        trained.append(result)
        if observer is not None:
            observer.fold_finished(fold, _headline(result), resumed=done is not None)
    result_of_all = Result(config, cohort.source.facts, tuple(trained), cases, cohort)
    if run is not None:
        run.write_summary(result_of_all)
    return result_of_all


class RunFolder:
    """A run on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            about = json.loads((root / "run.json").read_bytes())
            kind, format_version = about["format"], about["version"]
        except FileNotFoundError as error:
            raise NotExtractedError(
                f"{root}: no training run here (run.json is missing); make one with wsi train"
            ) from error
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise StoreFormatError(f"{root}: run.json is damaged ({error}); train into another folder") from error
        if (kind, format_version) != ("wsi-mil-run", FORMAT_VERSION):
            raise StoreFormatError(f"{root}: a {kind} of version {format_version}; this release reads {FORMAT_VERSION}")
        self.about: dict[str, Any] = about
        self.config = TrainConfig.from_json(json.dumps(about["config"]), where=f"{root / 'run.json'}")
        self.targets = tuple(Target(**each) for each in about["targets"])

    @classmethod
    def create(
        cls, root: Path, cohort: Cohort, cases: Cases, folds: Sequence[Fold], config: TrainConfig
    ) -> "RunFolder":
        """The run at ``root``, made where there is none.

        Raises:
            RunMismatchError: there is one, of another cohort or configuration.
        """
        about = {
            "format": "wsi-mil-run",
            "version": FORMAT_VERSION,
            "config": asdict(config),
            "targets": [asdict(task.target) for task in cohort.tasks],
            "features": dict(cohort.source.facts),
            "dim": cohort.source.dim,
            "cohort": cohort.fingerprint,
            "labels": cohort.name,
            "created_by": f"wsi-engine {__version__}",
        }
        about = json.loads(json.dumps(about))  # as it reads back
        if (root / "run.json").exists():
            run = cls(root)
            for what in ("config", "targets", "features", "cohort"):
                if run.about[what] != about[what]:
                    changed = (
                        _changes(run.about[what], about[what]) if what in ("config", "features") else f"another {what}"
                    )
                    raise RunMismatchError(
                        f"{root}: holds a run that differs ({changed}); give another --out, or what it was made with"
                    )
        else:
            root.mkdir(parents=True, exist_ok=True)
            _write_cases(root / "cohort.csv", cases)
            write_table(root / "left_out.csv", ("slide", "reason"), cohort.left_out)
            names = {
                fold.name: {part: [cases.names[i] for i in getattr(fold, part)] for part in ("train", "test")}
                for fold in folds
            }
            write_atomically(root / "splits.json", json.dumps(names, indent=1).encode())
            write_atomically(root / "environment.json", json.dumps(_environment(), indent=1).encode())
            write_atomically(root / "run.json", json.dumps(about, indent=1).encode())  # last: with it the run is there
        for left_over in (root / "folds").glob(".*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
        return cls(root)

    def folder(self, fold: str) -> Path:
        """Where a fold is, or will be."""
        return self.root / "folds" / safe_name(fold)

    def write_fold(self, trained: TrainedFold) -> None:
        """Put a finished fold into place, whole. Where another process was faster, theirs stays."""
        final = self.folder(trained.fold.name)
        staging = final.with_name(f".{uuid.uuid4().hex}.partial")
        staging.mkdir(parents=True)
        try:
            for i, member in enumerate(trained.members):
                member.save(staging / f"member-{i}.safetensors")
            for predictions in trained.tasks:
                predictions.write(staging / file_name(predictions.target, len(trained.tasks)))
            write_table(staging / "curve.csv", Epoch._fields, trained.curve)
            about = {
                "fold": trained.fold.name,
                "members": len(trained.members),
                "metrics": _by_task(self.targets, [nan_as_none(measure(each)) for each in trained.tasks]),
            }
            write_atomically(staging / "metrics.json", json.dumps(about, indent=1).encode())
            fsync_tree(staging)
            if not final.exists():
                staging.rename(final)
                fsync_folder(final.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def read_fold(self, fold: Fold, *, device: torch.device | str = "cpu") -> TrainedFold | None:
        """A finished fold, or None where it is not there yet."""
        folder = self.folder(fold.name)
        if not folder.is_dir():
            return None
        members = tuple(Member.load(path, device) for path in sorted(folder.glob("member-*.safetensors"), key=_number))
        curve = tuple(_epoch(row) for row in _rows(folder / "curve.csv"))
        names = [file_name(target, len(self.targets)) for target in self.targets]
        tasks = (Predictions.read(folder / name, each) for name, each in zip(names, self.targets, strict=True))
        return TrainedFold(fold, members, curve, tuple(tasks))

    def read_all(self) -> Result:
        """The whole run as a result; without its cohort, so that heatmaps need a store.

        Raises:
            NotExtractedError: a fold is not finished.
        """
        rows = _rows(self.root / "cohort.csv")
        index = {row["case"]: i for i, row in enumerate(rows)}
        trained = []
        for name, parts in json.loads((self.root / "splits.json").read_bytes()).items():
            fold = Fold(name, *(tuple(index[case] for case in parts[part]) for part in ("train", "test")))
            done = self.read_fold(fold)
            if done is None:
                raise NotExtractedError(f"{self.root}: fold {name} is not finished; run the same wsi train again")
            trained.append(done)
        return Result(self.config, self.about["features"], tuple(trained), _cases(rows, self.targets), None)

    def write_summary(self, result: Result) -> None:
        """Predictions and metrics of all folds together."""
        summaries = []
        for each in result.tasks.values():
            each.predictions.write(self.root / file_name(each.target, len(self.targets)))
            folds = {fold: nan_as_none(metrics) for fold, metrics in each.metrics().items()}
            pooled = {name: nan_as_none(value._asdict()) for name, value in each.intervals().items()}
            summaries.append({"folds": folds, "pooled": pooled})
        write_atomically(self.root / "metrics.json", json.dumps(_by_task(self.targets, summaries), indent=1).encode())


def _by_task(targets: Sequence[Target], of_each: Sequence[Any]) -> Any:
    """What is said of the only target, or of each by its name."""
    if len(targets) == 1:
        return of_each[0]
    return {target.name: said for target, said in zip(targets, of_each, strict=True)}


def _headline(trained: TrainedFold) -> dict[str, float]:
    """What an observer is told of a fold: all metrics, or of several targets the first of each."""
    if len(trained.tasks) == 1:
        return measure(trained.predictions)
    return {f"{each.target.name} {PRIMARY[each.target.kind]}": primary(each) for each in trained.tasks}


def _changes(there: dict[str, Any], asked: dict[str, Any]) -> str:
    keys = sorted(key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key))
    return ", ".join(f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked" for key in keys)


def _environment() -> dict[str, Any]:
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "wsi-engine": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _write_cases(path: Path, cases: Cases) -> None:
    slides: list[list[str]] = [[] for _ in cases.names]
    for owner, bag in zip(cases.owner, cases.bags, strict=True):
        slides[owner].extend(bag)
    targets = [task.target for task in cases.tasks]
    head = ["case", "patient", "slides", "site", "split", *(column for pair in _columns(targets) for column in pair)]
    rows = [
        (
            name,
            cases.patients[i],
            json.dumps(slides[i]),
            cases.sites[i] if cases.sites else "",
            cases.splits[i] if cases.splits else "",
            *(cell for task in cases.tasks for cell in (task.word(i), int(task.event[i]))),
        )
        for i, name in enumerate(cases.names)
    ]
    write_table(path, head, rows)


def _columns(targets: Sequence[Target]) -> list[tuple[str, str]]:
    """The columns of label and event of each target."""
    return [("label", "event"), *((f"label {target.name}", f"event {target.name}") for target in targets[1:])]


def _cases(rows: list[dict[str, str]], targets: Sequence[Target]) -> Cases:
    """Cases as ``_write_cases`` wrote them; each slide is a bag of its own, for whoever only wants to know whose it is."""
    import numpy as np

    slides = [json.loads(row["slides"]) for row in rows]
    return Cases(
        names=tuple(row["case"] for row in rows),
        patients=tuple(row["patient"] for row in rows),
        tasks=tuple(
            Task(
                target,
                np.array(
                    [parse_value(target, row[label], where="cohort.csv") if row[label] else np.nan for row in rows]
                ),
                np.array([row[event] == "1" for row in rows]),
            )
            for target, (label, event) in zip(targets, _columns(targets), strict=True)
        ),
        sites=None,
        splits=None,
        bags=tuple((slide,) for each in slides for slide in each),
        owner=np.array([i for i, each in enumerate(slides) for _ in each], np.int64),
    )


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise StoreFormatError(
            f"{path}: cannot be read ({error.strerror}); the run is damaged, train it again"
        ) from error


def _epoch(row: dict[str, str]) -> Epoch:
    lr, loss, stop_loss = (float(row[key] or "nan") for key in ("lr", "loss", "stop_loss"))
    member, epoch, planned = (int(row[key]) for key in ("member", "epoch", "planned"))
    return Epoch(member, epoch, planned, lr, loss, stop_loss, row["kept"] == "True")


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
