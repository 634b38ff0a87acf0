"""Cohort: slides with features, whose they are, and what is known of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.interop import feature_files, read_facts
from features.keys import readable_part, safe_name, slide_key
from features.selection import Selection, parse_selection
from features.store import FeatureStore
from mil.bag import Bag
from mil.sources import (
    ArraySource,
    BagSource,
    CachedSource,
    FolderSource,
    StoreSource,
    checked_bag,
    encoder_of,
    pool_bags,
)
from mil.table import SlideTable
from mil.target import Labels, Target, Task, infer_target, is_missing, parse_event, parse_value, with_horizons
from wsi.discover import SLIDE_SUFFIXES
from wsi.errors import CohortError, SlideNotFoundError, UsageError

__all__ = ["CACHE_BYTES", "Cases", "Cohort", "Fusion", "LeftOut", "SlideNames", "Targets"]

Fusion = Literal["late", "early", "none"]
Targets = str | Labels | Sequence[str | Labels]
CACHE_BYTES = 4 << 30


class LeftOut(NamedTuple):
    """A slide that takes no part, and why."""

    slide: str
    reason: str


@dataclass(frozen=True, eq=False)
class Cases:
    """Those who get one answer each, and the bags it is made from.

    Attributes:
        names: (n,) the patient, or the slide where each slide answers for itself.
        patients: (n,) whose it is; all cases of a patient stay in one fold.
        tasks: what is known of each for each target, the first target first.
        sites, splits: (n,) the patient's centre and own fold, where the table has them.
        bags: the slides of each bag; more than one where a patient's slides are pooled.
        owner: for each bag, the case it belongs to.
    """

    names: tuple[str, ...]
    patients: tuple[str, ...]
    tasks: tuple[Task, ...]
    sites: tuple[str, ...] | None
    splits: tuple[str, ...] | None
    bags: tuple[tuple[str, ...], ...]
    owner: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def y(self) -> NDArray[np.float64]:
        """(n,) class index, value or time of the first target; NaN where only another is known."""
        return self.tasks[0].y

    @property
    def event(self) -> NDArray[np.bool_]:
        """(n,) whether the event was seen; True for all but survival."""
        return self.tasks[0].event

    def bags_of(self, cases: Iterable[int]) -> NDArray[np.int64]:
        """Indices of the bags of these cases, in order."""
        return np.flatnonzero(np.isin(self.owner, list(cases)))


@dataclass(frozen=True, eq=False)
class Cohort:
    """Labelled slides with features.

    Attributes:
        name: where the labels came from, for messages.
        tasks: what is to be predicted, and what is known of it of each slide; usually one. Several are learned by one
            model; folds are stratified by the first.
        source: reads bags.
        slides: (S,) names of slides, as the source knows them; sorted.
        patients: (S,) whose each slide is.
        sites, splits: (S,) the table's columns of centres and own folds, if it has them.
        left_out: slides that have features but no label, or a label but no features.

    Raises:
        CohortError: no slide is left.
    """

    name: str
    tasks: tuple[Task, ...]
    source: BagSource
    slides: tuple[str, ...]
    patients: tuple[str, ...]
    sites: tuple[str, ...] | None = None
    splits: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.slides)
        columns = [self.patients, self.sites, self.splits, *(task.y for task in self.tasks)]
        lengths = {len(column) for column in columns if column is not None}
        if lengths != {n}:
            raise ValueError(f"{n} slides need as many patients, labels and events, got {sorted(lengths)}")
        if not n:
            raise CohortError(f"{self.name}: no slide has both features and a label{_reasons(self.left_out)}")
        files = [safe_name(task.target.name).casefold() for task in self.tasks]
        if len(set(files)) != len(files):
            names = ", ".join(task.target.name for task in self.tasks)
            raise CohortError(f"{self.name}: targets need names that differ, in letters a file may have, not {names}")
        object.__setattr__(self, "tasks", tuple(with_horizons(task, self.patients) for task in self.tasks))

    @property
    def target(self) -> Target:
        """What is to be predicted; of several, the first."""
        return self.tasks[0].target

    @property
    def y(self) -> NDArray[np.float64]:
        """(S,) class index, value or time of the first target; NaN where only another is known."""
        return self.tasks[0].y

    @property
    def event(self) -> NDArray[np.bool_]:
        """(S,) whether the event was seen; True for all but survival."""
        return self.tasks[0].event

    @classmethod
    def from_store(
        cls,
        root: str | Path,
        table: str | Path,
        target: Targets,
        *,
        encoder: str | Sequence[str] | None = None,
        select: str | Selection | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> "Cohort":
        """Join a feature store with a table of labels.

        Args:
            root: the store, as ``wsi extract`` writes it.
            table: CSV with a row a slide. Slides are named by store key, relative path, file name or stem.
            target: the column to predict, or ``Labels`` that say more; several of them for one model of several targets. A
                slide that lacks some of the labels counts for the others.
            encoder: whose features; several are put side by side. May be left out where the store has one.
            select: a few tiles of each slide in place of all, such as ``"mosaic:k=9,share=0.1"``; see
                ``features.selection``.
            cache_bytes: how many bytes of bags are kept in memory.

        Raises:
            CohortError: the table cannot be used.
            NotExtractedError: no store, or no such encoder.
        """
        store = FeatureStore(root)
        chosen = parse_selection(select) if isinstance(select, str) else select
        encoders = [encoder] if isinstance(encoder, str) else list(encoder or ()) or [encoder_of(store)]
        source = StoreSource(store, encoders, chosen)
        missing: dict[str, str] = {}
        for key in store.keys:
            if reason := source.lacks(key):
                missing[key] = reason
        names = SlideNames({key: readable_part(key) for key in store.keys})
        return _from_table(Path(table), _labels(target), CachedSource(source, cache_bytes), names, missing)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path | Sequence[str | Path],
        table: str | Path,
        target: Targets,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> "Cohort":
        """Join a folder of feature files of TRIDENT, CLAM or STAMP with a table of labels.

        Args:
            folder: one, or several whose vectors are put side by side where places of tiles agree.
            table, target, cache_bytes: as for ``from_store``.
        """
        folders = [folder] if isinstance(folder, str | Path) else list(folder)
        found = [feature_files(each) for each in folders]
        slides = [name for name in found[0] if all(name in files for files in found[1:])]
        if not slides:
            raise SlideNotFoundError(f"{folders[0]} and {folders[-1]}: have no slide in common; names must be the same")
        missing = {n: "no features in every folder" for files in found for n in files if n not in slides}
        missing |= {name: "no tiles" for name in slides if any(read_facts(f[name]).n_tiles == 0 for f in found)}
        usable = {name: [files[name] for files in found] for name in slides if name not in missing}
        if not usable:
            raise CohortError(f"{folders[0]}: none of its {len(slides)} feature files holds a tile")
        names = SlideNames({name: name for files in found for name in files})
        return _from_table(
            Path(table), _labels(target), CachedSource(FolderSource(usable), cache_bytes), names, missing
        )

    @classmethod
    def from_arrays(
        cls,
        bags: Sequence[Bag | NDArray[Any]],
        targets: Sequence[Any] | NDArray[Any] | Mapping[str, Sequence[Any] | NDArray[Any]],
        groups: Sequence[Any] | NDArray[Any] | None = None,
        *,
        labels: Labels | Sequence[Labels] | None = None,
    ) -> "Cohort":
        """A cohort of arrays in memory.

        Args:
            bags: (N, D) arrays, or Bags; a Bag without a key is called by its number.
            targets: (n,) labels; (n, 2) times and events for survival; or such by the name of each of several targets, where
                None or NaN says that a label is not known.
            groups: (n,) whose each bag is; each its own by default.
            labels: kind and classes, where they should not be guessed; for several targets those of any of them.
        """
        n = len(bags)
        said = {each.target: each for each in ([labels] if isinstance(labels, Labels) else labels or ())}
        if not isinstance(targets, Mapping):
            targets = {next(iter(said), "target"): targets}
        if unknown := said.keys() - targets.keys():
            raise UsageError(f"labels of {min(unknown)!r}, but the targets are {', '.join(targets)}")
        for column in (*targets.values(), *(() if groups is None else (groups,))):
            if len(column) != n:
                raise UsageError(f"{n} bags need as many targets and groups, got {len(column)}")
        made: dict[str, Bag] = {}
        for i, bag in enumerate(bags):
            key = bag.key if isinstance(bag, Bag) and bag.key else f"bag-{i:05d}"
            if key in made:
                raise UsageError(f"two bags are called {key!r}; give each a key of its own")
            if isinstance(bag, Bag):
                made[key] = bag if bag.key == key else Bag(bag.features, bag.xy, key)
            else:
                made[key] = checked_bag(np.asarray(bag), None, key, where=key)
        keys = list(made)
        tasks = tuple(_array_task(name, values, said.get(name)) for name, values in targets.items())
        if not np.any([task.known for task in tasks], axis=0).all():
            raise CohortError("the arrays: a bag has no label at all; leave it out")
        return cls(
            name="the arrays",
            tasks=tasks,
            source=ArraySource(made),
            slides=tuple(keys),
            patients=tuple(str(g) for g in (keys if groups is None else groups)),
        )

    def __len__(self) -> int:
        return len(self.slides)

    def read(self, slides: Sequence[str]) -> Bag:
        """One bag of these slides' tiles."""
        return pool_bags([self.source.read(slide) for slide in slides], "+".join(slides))

    def cases(self, fusion: Fusion = "late") -> Cases:
        """Who gets an answer.

        Args:
            fusion: several slides of a patient: ``"late"`` averages their predictions, ``"early"`` pools their tiles into one
                bag, ``"none"`` lets each slide answer for itself.

        Raises:
            CohortError: slides of a patient differ in what is the patient's.
        """
        slides_of: dict[str, list[int]] = {}
        for i, patient in enumerate(self.patients):
            slides_of.setdefault(patient, []).append(i)
        for patient, slides in slides_of.items():
            self._check_patient(patient, slides, labels=fusion != "none")
        members = [[i] for i in range(len(self))] if fusion == "none" else list(slides_of.values())
        firsts = [slides[0] for slides in members]
        labelled = [
            [next((i for i in slides if task.known[i]), slides[0]) for slides in members] for task in self.tasks
        ]
        bags = (
            [tuple(slides) for slides in members] if fusion == "early" else [(i,) for slides in members for i in slides]
        )
        owner = [k for k, slides in enumerate(members) for _ in ([0] if fusion == "early" else slides)]
        return Cases(
            names=tuple((self.slides if fusion == "none" else self.patients)[i] for i in firsts),
            patients=tuple(self.patients[i] for i in firsts),
            tasks=tuple(task.take(rows) for task, rows in zip(self.tasks, labelled, strict=True)),
            sites=None if self.sites is None else tuple(self.sites[i] for i in firsts),
            splits=None if self.splits is None else tuple(self.splits[i] for i in firsts),
            bags=tuple(tuple(self.slides[i] for i in bag) for bag in bags),
            owner=np.array(owner, np.int64),
        )

    def _check_patient(self, patient: str, slides: list[int], *, labels: bool) -> None:
        columns: list[tuple[str, dict[int, str], str]] = []
        if labels:
            for task in self.tasks:
                words = {i: task.word(i) for i in slides if task.known[i]}
                columns.append((task.target.name, words, "correct them, or let each slide answer with fusion none"))
                columns.append(("event", {i: str(task.event[i]) for i in words}, "correct them"))
        for what, column, remedy in (
            ("site", self.sites, "a patient in two sites cannot be held out with one; correct the column"),
            ("split", self.splits, "a patient in two folds would leak; correct the column"),
        ):
            columns.append((what, {i: column[i] for i in slides} if column is not None else {}, remedy))
        for what, said, remedy in columns:
            if len(set(said.values())) > 1:
                shown = ", ".join(f"{self.slides[i]}: {word}" for i, word in list(said.items())[:3])
                raise CohortError(f"{self.name}: slides of patient {patient} differ in {what} ({shown}); {remedy}")

    @property
    def fingerprint(self) -> str:
        """32 hex digits that change with any slide, label, patient, centre, own fold, or with what the features are."""
        facts: list[Any] = [
            self.slides,
            self.patients,
            self.sites,
            self.splits,
            dict(self.source.facts),
            self.source.dim,
        ]
        for task in self.tasks:
            target = task.target
            facts.append([target.name, target.kind, target.classes, task.y.tolist(), task.event.tolist()])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def describe(self) -> str:
        """One line for people: how many of what, and what was left out."""
        patients = len(set(self.patients))
        words = f"{len(self)} slides of {patients} patients" if patients != len(self) else f"{len(self)} slides"
        several = len(self.tasks) > 1
        of_tasks = [f"{task.target.name} {_counts(task)}" if several else _counts(task) for task in self.tasks]
        if any(of_tasks):
            words += ": " + "; ".join(of_tasks)
        return words + _reasons(self.left_out)

    def __repr__(self) -> str:
        return f"<Cohort {', '.join(task.target.name for task in self.tasks)} of {self.name}: {self.describe()}>"


class SlideNames:
    """Finds slides by what people call them: key, relative path, file name, or stem, in this order.

    Args:
        paths: the path of each slide's file below the cohort's root, by its key.
    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._exact = {key: key for key in paths} | {path: key for key, path in paths.items()}
        self._loose: dict[str, list[str]] = {}
        for key, path in paths.items():
            file = PurePosixPath(path.replace("\\", "/"))
            for name in {file.name, _stem(file.name)}:
                self._loose.setdefault(name, []).append(key)

    def find(self, word: str) -> str | None:
        """The key of the slide called so, or None.

        Raises:
            CohortError: several are.
        """
        path = word.replace("\\", "/")
        for name in (word, path, slide_key(path)):
            if name in self._exact:
                return self._exact[name]
        file = PurePosixPath(path).name
        for name in (file, _stem(file)):
            keys = self._loose.get(name, [])
            if len(keys) > 1:
                raise CohortError(f"slide {word!r} is ambiguous: {', '.join(keys[:3])}; give the relative path")
            if keys:
                return keys[0]
        return None

    def __iter__(self) -> Any:
        return iter(dict.fromkeys(self._exact.values()))


def _from_table(
    table: Path, asked: tuple[Labels, ...], source: BagSource, names: SlideNames, missing: Mapping[str, str]
) -> Cohort:
    """Join the rows of a table with the slides that have features; ``missing`` says why some have none to use."""
    read = SlideTable.read(table)
    slide, patient, site, split = (_common(table, asked, what) for what in ("slide", "patient", "site", "split"))
    slide_column = read.column("slide", slide)
    patient_column = read.usual("patient") if patient is None else read.named(patient)
    for wanted in (*(column for labels in asked for column in labels.columns), site, split):
        if wanted is not None:
            read.named(wanted)
    left_out: list[LeftOut] = []
    kept: dict[str, dict[str, str]] = {}
    named: set[str] = set()
    for row in read.rows:
        word = row[slide_column]
        try:
            key = names.find(word)
        except CohortError as error:
            raise CohortError(f"{table}: {error}") from None
        if key is None:
            left_out.append(LeftOut(word, "no features"))
            continue
        if key in named:
            raise CohortError(f"{table}: slide {word!r} stands in two rows; keep one")
        named.add(key)
        empty = [next((column for column in labels.columns if is_missing(row[column])), None) for labels in asked]
        needed = next((column for column in (site, split, patient_column) if column and is_missing(row[column])), None)
        if None not in empty:
            left_out.append(LeftOut(word, "no label" if empty[0] == asked[0].target else f"no {empty[0]}"))
        elif needed is not None:
            left_out.append(LeftOut(word, f"no {needed}"))
        elif key in missing:
            left_out.append(LeftOut(word, missing[key]))
        else:
            kept[key] = row
    left_out += [LeftOut(key, "not in the table") for key in names if key not in named]
    slides = sorted(kept)
    if not slides:
        raise CohortError(f"{table}: no slide has both features and a label{_reasons(left_out)}")

    def column_of(column: str | None) -> tuple[str, ...] | None:
        return None if column is None else tuple(kept[key][column] for key in slides)

    return Cohort(
        name=str(table),
        tasks=tuple(_table_task(table, labels, slides, kept) for labels in asked),
        source=source,
        slides=tuple(slides),
        patients=column_of(patient_column) or tuple(slides),
        sites=column_of(site),
        splits=column_of(split),
        left_out=tuple(left_out),
    )


def _table_task(table: Path, labels: Labels, slides: Sequence[str], rows: Mapping[str, dict[str, str]]) -> Task:
    """What a table says of one target; a slide that lacks its label, or its event, has NaN."""
    known = [not any(is_missing(rows[key][column]) for column in labels.columns) for key in slides]
    words = [rows[key][labels.target] for key, there in zip(slides, known, strict=True) if there]
    target = infer_target(labels, words, where=str(table))
    y, event = np.full(len(slides), np.nan), np.ones(len(slides), bool)
    for i in np.flatnonzero(known).tolist():
        row, where = rows[slides[i]], f"{table}, slide {slides[i]}"
        y[i], event[i] = parse_value(target, row[labels.target], where=where), parse_event(labels, row, where=where)
    return Task(target, y, event)


def _array_task(name: str, values: Sequence[Any] | NDArray[Any], labels: Labels | None) -> Task:
    """What an array says of one target."""
    table = np.asarray(values, object)
    survival = table.ndim == 2
    labels = labels or Labels(name, kind="survival" if survival else "auto", event="event" if survival else None)
    words = [str(value) for value in (table[:, 0] if survival else table).tolist()]
    known = np.array([not is_missing(word) for word in words])
    target = infer_target(labels, [words[i] for i in np.flatnonzero(known)], where="the arrays")
    y = [
        parse_value(target, word, where="the arrays") if there else np.nan
        for word, there in zip(words, known, strict=True)
    ]
    event = table[:, 1].astype(float) != 0 if survival else np.ones(len(words), bool)
    return Task(target, np.array(y), np.where(known, event, True))


def _counts(task: Task) -> str:
    """How many of what; a value needs no count, unless some lack it."""
    known = int(task.known.sum())
    parts = []
    if task.target.is_classes:
        counts = Counter(task.y[task.known].astype(int).tolist())
        parts = [f"{counts[i]} {name}" for i, name in enumerate(task.target.classes)]
    elif task.target.kind == "survival":
        parts = [f"{int(task.event[task.known].sum())} events"]
    return ", ".join(parts + ([f"{len(task.y) - known} unknown"] if known < len(task.y) else []))


def _common(table: Path, asked: Sequence[Labels], what: str) -> str | None:
    """The one column that all targets share: of slides, patients, sites or own folds."""
    said = {column for labels in asked if (column := getattr(labels, what)) is not None}
    if len(said) > 1:
        raise CohortError(f"{table}: all targets have one column of {what}s, not {', '.join(sorted(said))}")
    return next(iter(said), None)


def _labels(target: Targets) -> tuple[Labels, ...]:
    each = [target] if isinstance(target, str | Labels) else target
    if not each:
        raise UsageError("name at least one target")
    return tuple(one if isinstance(one, Labels) else Labels(one) for one in each)


def _stem(name: str) -> str:
    """A file name without the suffix of a slide; other dots belong to the name, as in TCGA's."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in SLIDE_SUFFIXES else name


def _reasons(left_out: Iterable[LeftOut]) -> str:
    counts = Counter(each.reason for each in left_out)
    return "; left out " + ", ".join(f"{n} ({reason})" for reason, n in counts.most_common()) if counts else ""
