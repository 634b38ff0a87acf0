"""Tuned: settings found by a search, and what a model is worth whose settings were found so.

A search tries settings by cross-validation inside the patients it is given. The score of the best of many trials is
flattering, and so is any test on patients that the search has seen: they helped to choose. ``tune`` therefore searches
anew inside the training part of each fold and tests what it found on the fold's test part, which neither the search nor
the models saw (nested cross-validation: Varma, Simon: Bias in error estimation when using cross-validation for model
selection, BMC Bioinformatics 2006; Cawley, Talbot, JMLR 2010). **That result is the one to report.** A last search on
everybody gives the settings for the model to be used; no figure of it, nor of ``cross_validate`` with its settings on the
same patients, is one to report. The price is ``folds`` + 1 searches; ``search`` alone is the last of them.

With Optuna (``pip install 'wsi-engine[tune]'``): Akiba et al., KDD 2019; the tree-structured Parzen estimator proposes,
and the median rule stops trials that are worse than half of those before.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mil.cohort import Cases, Cohort
from mil.config import TrainConfig
from mil.metrics import primary
from mil.result import Result
from mil.run import run_folds
from mil.splits import Fold, make_folds, validation_parts
from mil.train import Observer, TrainedFold, train_fold
from wsi._files import write_atomically, write_table
from wsi.errors import DivergedError, EnvironmentFaultError, RunMismatchError, StoreFormatError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna

__all__ = ["DEFAULT_SPACE", "Between", "Space", "Trial", "Tuned", "read_space", "search", "tune"]

_PARTS = 3  # into which a search cuts its patients; each is judged by models of the others
_FIXED = ("folds", "split_by", "fusion", "members", "draws", "device", "precision", "seed")
_EVERYBODY = "everybody"


@dataclass(frozen=True)
class Between:
    """A range to search: whole numbers where both ends are; ``log`` for what is compared by its ratio."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or not math.isfinite(self.high) or (self.log and self.low <= 0):
            raise UsageError(f"a range goes from a lower to a higher number, of a log above 0, not {self}")


Space = Mapping[str, Between | Sequence[Any]]

# What decides most for attention pooling on frozen features; a setting named hyper.x is an argument of the model.
DEFAULT_SPACE: Space = {
    "lr": Between(1e-4, 5e-3, log=True),
    "weight_decay": Between(1e-2, 10.0, log=True),
    "tile_dropout": Between(0.0, 0.8),
    "feature_dropout": Between(0.0, 0.5),
    "epochs": (10, 15, 30),
    "batch_size": (8, 16, 32),
}


class Trial(NamedTuple):
    """Settings that were tried.

    Attributes:
        search: the fold in whose training part, or ``everybody``.
        number: from 0, of those that came to an end.
        score: mean of the target's first metric over the parts and targets; NaN where training diverged.
        parts: on how many parts it was judged before it was stopped for being poor.
        settings: what was tried.
    """

    search: str
    number: int
    score: float
    parts: int
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Tuned:
    """What ``tune`` found.

    Attributes:
        config: settings for the model to be used: the best of the search on everybody.
        trials: of all searches.
        result: the figures to report: each fold tested by a model whose settings were found in its training part.
    """

    config: TrainConfig
    trials: tuple[Trial, ...]
    result: Result


def tune(
    cohort: Cohort,
    config: TrainConfig | None = None,
    *,
    trials: int = 30,
    space: Space | None = None,
    out: str | Path | None = None,
    observer: Observer | None = None,
    told: Callable[[Trial], None] | None = None,
) -> Tuned:
    """Search settings inside each fold and test them on it; then search on everybody.

    The same cohort, settings, space and seed try and find the same, also after a kill, with the same Optuna.

    Args:
        config: what is not searched.
        trials: of each search.
        out: folder of ``config.json`` (for ``wsi train --config``), ``trials.csv``, the trials as they end
            (``trials.log``, from which an interrupted call goes on), and ``nested``, a run to report and to predict with.
        observer: is told of the folds' final training.
        told: is told each trial as it ends.

    Raises:
        EnvironmentFaultError: Optuna is not installed.
        RunMismatchError: ``out`` holds another search.
        UsageError: the space names what cannot be searched, or every trial diverged.
    """
    config = config or TrainConfig()
    study = _Searches(cohort, config, trials, DEFAULT_SPACE if space is None else space, out, told)
    cases = study.cases
    folds = make_folds(cases, cohort.target, by=config.split_by, folds=config.folds, seed=config.seed)

    def train(fold: Fold, number: int) -> TrainedFold:
        found = study.run(fold.name, number + 1, fold.train)
        return train_fold(cohort, cases, fold, number, found, observer)

    nested = None if out is None else Path(out) / "nested"
    result = run_folds(cohort, cases, folds, config, train, out=nested, observer=observer)
    best = study.run(_EVERYBODY, 0, range(len(cases)))
    names = [fold.name for fold in folds]
    return Tuned(best, study.finish([*names, _EVERYBODY], best), result)


def search(
    cohort: Cohort,
    config: TrainConfig | None = None,
    *,
    trials: int = 30,
    space: Space | None = None,
    out: str | Path | None = None,
    told: Callable[[Trial], None] | None = None,
) -> TrainConfig:
    """The best settings on everybody, and no figure to report: every patient has helped to choose. As for ``tune``."""
    study = _Searches(cohort, config or TrainConfig(), trials, DEFAULT_SPACE if space is None else space, out, told)
    best = study.run(_EVERYBODY, 0, range(len(study.cases)))
    study.finish([_EVERYBODY], best)
    return best


def read_space(path: str | Path) -> Space:
    """A space from JSON: ``{"lr": {"low": 1e-4, "high": 1e-2, "log": true}, "model": ["abmil", "transmil"]}``.

    Raises:
        UsageError: it cannot be read, or is no such thing.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: Between(**value) if isinstance(value, dict) else tuple(value) for key, value in found.items()}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a space: settings with a list, or with low and high ({error})") from error


class _Searches:
    """The searches of one call, and where they are kept."""

    def __init__(
        self,
        cohort: Cohort,
        config: TrainConfig,
        trials: int,
        space: Space,
        out: str | Path | None,
        told: Callable[[Trial], None] | None,
    ) -> None:
        if trials < 1:
            raise UsageError(f"at least one trial is needed, not {trials}")
        _check_space(space, config)
        self.optuna = _load_optuna()
        self.cohort, self.config, self.trials, self.space, self.told = cohort, config, trials, space, told
        self.cases: Cases = cohort.cases(config.fusion)
        self.out = None if out is None else Path(out)
        if self.out is not None:
            self._claim(self.out)
        with _quiet(self.optuna):
            self.storage = (
                self.optuna.storages.InMemoryStorage()
                if self.out is None
                else self.optuna.storages.JournalStorage(
                    self.optuna.storages.journal.JournalFileBackend(str(self.out / "trials.log"))
                )
            )

    def run(self, name: str, number: int, train: Sequence[int]) -> TrainConfig:
        """The best settings by validation inside these cases alone."""
        with _quiet(self.optuna):
            study = self._study(name)
            for unfinished in study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,)):
                study.tell(unfinished.number, state=self.optuna.trial.TrialState.FAIL)  # of a call that was killed
            while (done := len(_ended(study))) < self.trials:
                # A sampler anew for each trial: what it proposes hangs on the trials before, not on when they were run.
                seed = np.random.SeedSequence([self.config.seed, number, done]).generate_state(1)
                study.sampler = self.optuna.samplers.TPESampler(seed=int(seed[0]))
                self._try(study, name, number, list(train))
                if self.told is not None:
                    self.told(self._table(name)[-1])
            judged = study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.COMPLETE,))
        if not judged:
            raise UsageError(
                f"no trial could be judged on all of its parts ({name}); search a lower lr, or more patients"
            )
        return _with(self.config, max(judged, key=lambda trial: (trial.value, -trial.number)).user_attrs["settings"])

    def finish(self, names: Sequence[str], best: TrainConfig) -> tuple[Trial, ...]:
        """The trials of all searches; written down, with the settings, where there is a folder."""
        with _quiet(self.optuna):
            found = tuple(trial for name in names for trial in self._table(name))
        if self.out is not None:
            rows = [(*trial[:4], *(trial.settings[key] for key in self.space)) for trial in found]
            write_table(self.out / "trials.csv", (*Trial._fields[:4], *self.space), rows)
            write_atomically(self.out / "config.json", best.to_json().encode())
        return found

    def _study(self, name: str) -> "optuna.Study":
        pruner = self.optuna.pruners.MedianPruner(n_startup_trials=5)
        study: optuna.Study = self.optuna.create_study(
            storage=self.storage, study_name=name, direction="maximize", pruner=pruner, load_if_exists=True
        )
        return study

    def _try(self, study: "optuna.Study", name: str, number: int, train: list[int]) -> None:
        """One trial: cross-validation in ``_PARTS`` parts of these cases, one model each."""
        trial = study.ask()
        settings = {key: _suggest(trial, key, span) for key, span in self.space.items()}
        trial.set_user_attr("settings", settings)
        config = replace(_with(self.config, settings), members=1)
        target, cases = self.cohort.target, self.cases
        seed = int(np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0])
        cuts = validation_parts(target.strata(cases.y, cases.event), cases.patients, train, parts=_PARTS, seed=seed)
        scores: list[float] = []
        for part, (fit, judged) in enumerate(cuts):
            fold = Fold(f"{name}, part {part}", tuple(fit), tuple(judged))
            try:
                scores.append(_score(train_fold(self.cohort, cases, fold, part, config)))
            except DivergedError:
                study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
                return
            trial.set_user_attr("parts", part + 1)
            if np.isnan(scores[-1]):  # a part that allows no metric, such as one without an event
                continue
            trial.report(float(np.nanmean(scores)), part)
            if part + 1 < len(cuts) and trial.should_prune():
                study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
                return
        if np.isnan(scores).all():
            study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, float(np.nanmean(scores)))

    def _table(self, name: str) -> list[Trial]:
        return [
            Trial(
                name,
                i,
                trial.intermediate_values.get(max(trial.intermediate_values, default=0), math.nan),
                trial.user_attrs.get("parts", 0),
                trial.user_attrs["settings"],
            )
            for i, trial in enumerate(_ended(self._study(name)))
        ]

    def _claim(self, out: Path) -> None:
        """Say in ``out`` what is searched; where there is a search already, it has to be the same."""
        spans = {k: asdict(span) if isinstance(span, Between) else list(span) for k, span in self.space.items()}
        about = {
            "config": asdict(self.config),
            "space": spans,
            "trials": self.trials,
            "cohort": self.cohort.fingerprint,
        }
        about = json.loads(json.dumps(about))  # as it reads back
        path = out / "tune.json"
        try:
            there = json.loads(path.read_bytes()) if path.exists() else about
        except ValueError as error:
            raise StoreFormatError(f"{path}: is damaged ({error}); tune into another folder") from error
        differ = [key for key in about if there.get(key) != about[key]]
        if differ:
            raise RunMismatchError(f"{out}: holds a search that differs ({', '.join(differ)}); give another --out")
        write_atomically(path, json.dumps(about, indent=1).encode())


def _load_optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise EnvironmentFaultError(
            "tuning needs Optuna, which is not installed: pip install 'wsi-engine[tune]'"
        ) from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> "Iterator[None]":
    """Optuna tells of every study on stderr; its level is global, so it is given back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _ended(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials that came to a score, or to nothing, in order; those of a call that was killed are not among them."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _score(trained: TrainedFold) -> float:
    """The first metric of each target, their mean; NaN where the part allows none."""
    return float(np.mean([primary(each) for each in trained.tasks]))


def _suggest(trial: "optuna.Trial", key: str, span: Between | Sequence[Any]) -> Any:
    if not isinstance(span, Between):
        # By place: a choice may be what Optuna cannot keep, such as a list.
        return span[trial.suggest_categorical(key, list(range(len(span))))]
    if isinstance(span.low, int) and isinstance(span.high, int):
        return trial.suggest_int(key, span.low, span.high, log=span.log)
    return trial.suggest_float(key, span.low, span.high, log=span.log)


def _with(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The configuration with these settings; ``hyper.x`` goes into ``hyper``."""
    hyper = {key.removeprefix("hyper."): value for key, value in settings.items() if key.startswith("hyper.")}
    plain = {key: value for key, value in settings.items() if not key.startswith("hyper.")}
    return replace(config, **plain, hyper={**config.hyper, **hyper})


def _check_space(space: Space, config: TrainConfig) -> None:
    known = [each.name for each in fields(TrainConfig) if each.name not in (*_FIXED, "hyper", "task_weights")]
    if not space:
        raise UsageError("the space is empty; name a setting to search")
    for key, span in space.items():
        if key not in known and not key.startswith("hyper."):
            raise UsageError(f"{key!r} cannot be searched; take of {', '.join(known)}, or hyper.NAME of the model")
        if not isinstance(span, Between) and (isinstance(span, str) or not len(span)):
            raise UsageError(f"{key}: give a list of choices, or a range with low and high, not {span!r}")
        for value in (span.low, span.high) if isinstance(span, Between) else span:
            _with(config, {key: value})  # refuses what is out of range, before anything is trained
