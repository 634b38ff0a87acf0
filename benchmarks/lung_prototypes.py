"""Slide embeddings on real lung slides: linear probe, few labels, survival, stability, and why they come out as they do.

Adenocarcinoma or squamous, 5 folds that split no patient. Prototypes, the scale of vectors, and every penalty and setting
that is chosen come from the training part of a fold; a patient's answer is the mean over the slides. Intervals and
differences are of patients drawn with replacement, but for few labels, where they are of draws of labels. The encoder was
trained on these very slides without labels, so the numbers compare embeddings and are no claim about new patients.

    python benchmarks/lung_prototypes.py FOLDER      # with tcga-nsclc-hipt192.npz and tcga-nsclc.csv
    python benchmarks/lung_prototypes.py FOLDER --parts few-shot --picture docs/pictures/few-shot.png
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from figures import Figure, parser, report
from nsclc import mean_pool
from numpy.typing import NDArray
from probes import (
    COMPONENTS,
    PENALTIES,
    Probed,
    Survivors,
    aurocs,
    by_patient,
    comparable,
    concordance,
    cox,
    difference,
    interval,
    logistic,
    probe,
    resamples,
    rotated,
)
from real_bags import lung, lung_clinic
from rich.console import Console
from rich.table import Table
from sklearn.metrics import adjusted_mutual_info_score

from mil import Bag, Cohort, TrainConfig
from mil.cohort import Cases
from mil.metrics import Interval, measure
from mil.predictions import Predictions, stack
from mil.prototypes import (
    EMBEDDERS,
    Embedder,
    OptimalTransport,
    Panther,
    Prototypes,
    SlideSet,
    draw_tiles,
    fit_prototypes,
)
from mil.prototypes.choice import report_k
from mil.splits import Fold, make_folds, validation_parts
from mil.train import train_fold

PARTS = ("probe", "why", "few-shot", "survival", "stability")
KS = (4, 8, 16)
EPS = (0.1, 10.0, 30.0, 100.0)  # the features' mean variance is 4.5
POOL = 20_000  # regions that prototypes are fitted on
DRAWS = 1000
CONSOLE = Console(width=150)


Way = Literal["raw", "unit length", "centred"]


@dataclass(frozen=True)
class Method:
    """An embedding with its prototypes.

    Attributes:
        way: what is done to regions first: ``"raw"`` nothing; ``"unit length"``; ``"centred"`` takes the slide's mean off
            them, so that prototypes are of what differs within slides, and adds it to the embedding's means again.
        part: of the embedding that is used; all of it by default.
        beside_mean: the mean of the slide's regions is put beside it.
    """

    embedder: Embedder
    k: int = 0
    way: Way = "raw"
    part: str = ""
    beside_mean: bool = False

    @property
    def title(self) -> str:
        words = [self.embedder.name]
        if isinstance(self.embedder, Panther):
            words.append(f"τ={self.embedder.tau:g} ε={self.embedder.eps:g}")
        if isinstance(self.embedder, OptimalTransport):
            words.append(f"ε={self.embedder.eps:g}")
        words += [f"{self.part} alone"] * bool(self.part) + [self.way] * (self.way != "raw")
        words += [f"k={self.k}"] * bool(self.k)
        return ("mean ⊕ " if self.beside_mean else "") + ", ".join(words)


MEAN = Method(EMBEDDERS["mean"]())
SETTINGS = tuple(
    method
    for k in KS
    for method in (
        *(Method(Panther(eps=eps), k) for eps in EPS),
        Method(Panther(), k, way="centred"),
        Method(Panther(eps=30.0), k, part="mean"),
    )
)


@dataclass(frozen=True, eq=False)
class Lung:
    """The cohort with its folds; remembers prototypes and probes.

    Attributes:
        bags: of each slide, in the order of ``cases.bags``.
    """

    cohort: Cohort
    cases: Cases
    bags: tuple[Bag, ...]
    folds: tuple[Fold, ...]
    _fitted: dict[Any, Prototypes] = field(default_factory=dict)
    _probed: dict[Any, Probed] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Lung":
        cohort = lung(folder)
        cases = cohort.cases("late")
        folds = make_folds(cases, cohort.target, by="random", folds=5, seed=0)
        return cls(cohort, cases, tuple(cohort.read(bag) for bag in cases.bags), folds)

    @property
    def regions(self) -> NDArray[np.int64]:
        """(S,) how many regions each slide has."""
        return np.array([len(bag) for bag in self.bags])

    @property
    def y(self) -> NDArray[np.float64]:
        """(S,) class of each slide."""
        return self.cases.y[self.cases.owner]

    def prototypes(self, fold: Fold, k: int, way: Way = "raw") -> Prototypes:
        """Fitted on the slides of the training part."""
        key = fold.name, k, way
        if key not in self._fitted:
            bags = [_ready(self.bags[i], way) for i in self.cases.bags_of(fold.train)]
            self._fitted[key] = fit_prototypes(SlideSet.from_bags(bags), k, n_tiles=POOL)
        return self._fitted[key]

    def vectors(self, method: Method, fold: Fold, bags: Sequence[Bag] | None = None) -> NDArray[np.float32]:
        """(S, E) of all slides, or of ``bags`` in their place."""
        bags = self.bags if bags is None else bags
        prototypes = self.prototypes(fold, method.k, method.way) if method.embedder.needs_prototypes else None
        rows = []
        for bag in bags:
            parts = dict(method.embedder.embed(_ready(bag, method.way), prototypes).parts)
            if method.way == "centred":
                parts["mean"] = parts["mean"] + bag.features.mean(0)
            chosen = [parts[method.part]] if method.part else list(parts.values())
            rows.append(torch.cat([part.flatten() for part in chosen]).numpy())
        found = np.stack(rows)
        return np.concatenate([self.vectors(MEAN, fold, bags), found], 1) if method.beside_mean else found

    def probe(self, method: Method, fold: Fold) -> Probed:
        key = method.title, fold.name
        if key not in self._probed:
            found = probe(self.cases, self.cohort.target, fold, self.vectors(method, fold))
            CONSOLE.print(f"{method.title}, fold {fold.name}: {measure(found.predictions)['auroc']:.4f}", style="dim")
            self._probed[key] = found
        return self._probed[key]

    def probe_bags(self, method: Method, bags: Sequence[Bag]) -> Predictions:
        """Answers of probes on other bags of the same slides, with the same prototypes."""
        return stack(
            [
                probe(self.cases, self.cohort.target, fold, self.vectors(method, fold, bags)).predictions
                for fold in self.folds
            ]
        )


def _ready(bag: Bag, way: Way) -> Bag:
    if way == "unit length":
        return Bag(torch.nn.functional.normalize(bag.features, dim=1), None, bag.key)
    return Bag(bag.features - bag.features.mean(0), None, bag.key) if way == "centred" else bag


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def linear_probe(slides: Lung, quick: bool) -> list[Figure]:
    """Every embedding by a logistic regression, against the mean; then settings of PANTHER chosen on inner folds."""
    methods = [Method(EMBEDDERS["mean-variance"]()), Method(EMBEDDERS["quantiles"]())]
    for k in (8,) if quick else KS:
        methods += [
            Method(Panther(), k),
            Method(Panther(tau=1.0, eps=1.0), k),
            Method(Panther(), k, way="unit length"),
            Method(Panther(), k, way="centred"),
            Method(Panther(), k, beside_mean=True),
            Method(OptimalTransport(eps=1.0), k),
            Method(EMBEDDERS["h2t"](), k),
            Method(EMBEDDERS["protocounts"](), k),
        ]
    if quick:
        methods = [Method(Panther(), 8), Method(Panther(), 8, way="centred")]
    else:
        methods.append(Method(OptimalTransport(), 8))
    rows = [(method.title, [slides.probe(method, fold) for fold in slides.folds]) for method in (MEAN, *methods)]
    if not quick:
        settings: list[tuple[str, Sequence[Method]]] = [
            ("panther, k and ε chosen", [each for each in SETTINGS if not each.part and each.way == "raw"]),
            ("panther, k, ε, parts and centring chosen", SETTINGS),
            ("any of all these, chosen", (MEAN, *methods, *SETTINGS)),
        ]
        rows += [(title, _chosen(slides, title, among)) for title, among in settings]
    base = stack([each.predictions for each in rows[0][1]])
    table = table_of(
        "Linear probe, 5 folds", "embedding", "AUROC, folds", "inner folds", "AUROC, pooled [95 %]", "more than mean [95 %]", "p"
    )  # fmt: skip
    plain = mean_pool(slides.cohort, TrainConfig())[0]
    drawn = resamples(len(base), DRAWS)
    mean, means = _auroc_by_fold(base), aurocs(base, drawn)
    table.add_row("mean, C=1 as nsclc.py", _spread(_auroc_by_fold(plain)), "", str(_auroc(plain)), "", "")
    figures = [Figure("mean, C=1: AUROC, mean of folds", float(np.mean(_auroc_by_fold(plain))), "")]
    for title, probed in rows:
        predictions = stack([each.predictions for each in probed])
        folds, values = _auroc_by_fold(predictions), aurocs(predictions, drawn)
        pooled = interval(float(aurocs(predictions)[0]), values)
        figures.append(Figure(f"{title}: AUROC, mean of folds", float(np.mean(folds)), ""))
        figures.append(Figure(f"{title}: AUROC, pooled", pooled.value, "", interval=pooled[1:]))
        words = ("", "")
        if title != MEAN.title:
            more = difference(pooled.value - float(aurocs(base)[0]), values - means)
            words = (f"{more.value:+.3f} [{more.low:+.3f}, {more.high:+.3f}]", f"{more.p:.3f}")
            reach = 0.01 if title.startswith("panther") and "chosen" in title else None
            figures.append(
                Figure(f"{title}: more than mean, mean of folds", float(np.mean(folds) - np.mean(mean)), "", reach)
            )
            figures.append(Figure(f"{title}: more than mean, pooled", more.value, "", interval=(more.low, more.high)))
        inner = float(np.mean([each.inner for each in probed]))
        table.add_row(title, _spread(folds), f"{inner:.4f}", str(pooled), *words)
    CONSOLE.print(table)
    return figures


def _chosen(slides: Lung, title: str, among: Sequence[Method]) -> list[Probed]:
    """For each fold the probe whose inner folds were best."""
    found = []
    for fold in slides.folds:
        best = max(among, key=lambda method: slides.probe(method, fold).inner)
        CONSOLE.print(f"{title}: fold {fold.name} takes {best.title}")
        found.append(slides.probe(best, fold))
    return found


def why(slides: Lung, folder: Path, quick: bool) -> list[Figure]:
    """What prototypes of these regions are: how many of them a slide has, and whether they tell tissue or laboratory."""
    x = np.concatenate([bag.features.numpy() for bag in slides.bags]).astype(np.float64)
    n = slides.regions
    means = slides.vectors(MEAN, slides.folds[0]).astype(np.float64)
    total = float(x.var(0).sum())
    between = float((np.square(means - x.mean(0)) * n[:, None]).sum() / len(x)) / total
    few, many = np.quantile(n, [0.25, 0.75])
    figures = [
        Figure("regions a slide: median (quarters)", float(np.median(n)), "", interval=(float(few), float(many))),
        Figure("variance of regions that is between slides", between, "of all"),
    ]
    table = table_of(
        "What prototypes find (fold 0)", "prototypes", "variance explained", "with regions of a slide", "with < 2 regions",
        "pairs of slides with none in common", "agreement with site", "with type",
    )  # fmt: skip
    clinic = lung_clinic(folder)
    sites = [clinic[slides.cases.names[case]]["site"] for case in slides.cases.owner]
    fold = slides.folds[0]
    kinds: list[tuple[int, Way]] = [(k, "raw") for k in ((8,) if quick else KS)] + [(8, "centred")]
    for k, way in kinds:
        prototypes = slides.prototypes(fold, k, way)
        assigned = [Panther().assign(_ready(bag, way), prototypes)[0] for bag in slides.bags]
        counts = np.stack([each.sum(0).numpy() for each in assigned])  # (S, K) regions
        there = (counts > 0.5).astype(np.float64)
        main = counts.argmax(1)
        within = total * (1 - between) if way == "centred" else total
        found = {
            "variance of regions that they explain": 1 - float(prototypes.provenance["inertia"]) / within,
            "share that a slide has regions of": float(there.mean()),
            "share with less than two regions of a slide": float((counts < 2).mean()),
            "pairs of slides with none in common": float((there @ there.T == 0).mean()),
            "adjusted mutual information of a slide's main one and its site": adjusted_mutual_info_score(sites, main),
            "adjusted mutual information of a slide's main one and its type": adjusted_mutual_info_score(
                slides.y, main
            ),
        }
        title = f"k={k}" + ("" if way == "raw" else f", {way}")
        table.add_row(title, *(f"{value:.2f}" for value in found.values()))
        figures += [Figure(f"{title}: {name}", value, "") for name, value in found.items()]
    CONSOLE.print(table)
    return figures + _softness(slides, quick) + ([] if quick else _quartiles(slides) + _fewer(slides))


def _softness(slides: Lung, quick: bool) -> list[Figure]:
    """How soft the assignment is for each ε, and what the probe makes of it."""
    table = table_of("PANTHER, τ=0.001, k=8", "ε", "regions with a membership > 0.99", "< 2 regions", "AUROC, folds")
    figures = []
    for eps in (0.1, 30.0) if quick else EPS:
        method = Method(Panther(eps=eps), 8)
        fold = slides.folds[0]
        shares = [method.embedder.assign(bag, slides.prototypes(fold, 8))[0].numpy() for bag in slides.bags]
        hard = float((np.concatenate(shares).max(1) > 0.99).mean())
        few = float(np.mean([(each.sum(0) < 2).mean() for each in shares]))
        aurocs = [measure(slides.probe(method, each).predictions)["auroc"] for each in slides.folds]
        table.add_row(f"{eps:g}", f"{hard:.3f}", f"{few:.2f}", _spread(aurocs))
        figures += [
            Figure(f"{method.title}: regions with a membership above 0.99", hard, "of all"),
            Figure(f"{method.title}: AUROC, mean of folds", float(np.mean(aurocs)), ""),
        ]
    CONSOLE.print(table)
    return figures


COMPARED = (MEAN, Method(Panther(), 8), Method(Panther(), 8, way="centred"), Method(OptimalTransport(eps=1.0), 8))


def _quartiles(slides: Lung) -> list[Figure]:
    """The same answers, among patients with few regions a slide and among those with many."""
    owner = slides.cases.owner
    per_case = np.bincount(owner, slides.regions) / np.bincount(owner)
    of = dict(zip(slides.cases.names, per_case, strict=True))
    quarter_of = np.quantile(per_case, [0.25, 0.5, 0.75])
    table = table_of("AUROC by regions a slide", "embedding", *(f"quarter {i + 1}" for i in range(4)))
    table.add_row("regions a slide, at most", *(f"{each:.0f}" for each in (*quarter_of, per_case.max())))
    figures = []
    for method in COMPARED:
        predictions = stack([slides.probe(method, fold).predictions for fold in slides.folds])
        quarter = np.searchsorted(quarter_of, [of[name] for name in predictions.names])
        found = [_auroc(predictions.take(np.flatnonzero(quarter == i))) for i in range(4)]
        table.add_row(method.title, *(str(each) for each in found))
        figures += [
            Figure(f"{method.title}: AUROC, quarter {i + 1} of regions a slide", each.value, "", interval=each[1:])
            for i, each in enumerate(found)
        ]
    CONSOLE.print(table)
    return figures


def _fewer(slides: Lung) -> list[Figure]:
    """What happens when the slides have fewer regions still: at most so many of each, drawn at random."""
    sizes = (4, 16)
    rng = np.random.default_rng(0)
    order = [rng.permutation(n) for n in slides.regions]
    table = table_of("AUROC (pooled) of fewer regions", "embedding", *(f"at most {size}" for size in sizes), "all")
    figures = []
    for method in COMPARED[:2]:
        found = []
        for size in sizes:
            drawn = [
                Bag(bag.features[each[:size]], None, bag.key) for bag, each in zip(slides.bags, order, strict=True)
            ]
            found.append(measure(slides.probe_bags(method, drawn))["auroc"])
        found.append(measure(stack([slides.probe(method, fold).predictions for fold in slides.folds]))["auroc"])
        table.add_row(method.title, *(f"{each:.4f}" for each in found))
        figures += [
            Figure(f"{method.title}: AUROC, pooled, of at most {size} regions", value, "")
            for size, value in zip(sizes, found, strict=False)
        ]
    CONSOLE.print(table)
    return figures


FEW = (MEAN, Method(Panther(), 16), Method(Panther(), 16, way="centred"), Method(OptimalTransport(eps=1.0), 16))
ABMIL = TrainConfig(model="abmil-gated", members=1, epochs=50, average=0.9, device="cpu")


def few_shot(slides: Lung, quick: bool, picture: Path | None) -> list[Figure]:
    """A few labelled slides a class, of different patients of a fold's training part; tested on its test part.

    The rest of the training part lends its slides without labels: to prototypes, and to the scale of the vectors. Larger
    draws contain the smaller ones. Draws take the five folds in turn.
    """
    counts, draws = ((4, 16), 5) if quick else ((4, 8, 16, 32), 20)
    methods = FEW[:2] if quick else FEW
    names = [method.title for method in methods] + ([] if quick else ["gated ABMIL"])
    found = {name: np.zeros((len(counts), draws)) for name in names}
    picked = {draw: _shots(slides, slides.folds[draw % 5], max(counts), draw) for draw in range(draws)}
    for number, fold in enumerate(slides.folds):
        for method in methods:
            z = rotated(slides.vectors(method, fold), slides.cases.bags_of(fold.train))
            for draw in range(number, draws, 5):
                for row, count in enumerate(counts):
                    answers = logistic(z, picked[draw][:, :count].ravel(), slides.y, 1.0)
                    found[method.title][row, draw] = _test_auroc(slides, fold, answers)
    if not quick:
        for draw in range(draws):
            for row, count in enumerate(counts):
                fold = slides.folds[draw % 5]
                answers = _abmil(slides, fold, picked[draw][:, :count].ravel(), draw)
                found["gated ABMIL"][row, draw] = _test_auroc(slides, fold, answers)
    rng = np.random.default_rng(0)
    again = rng.integers(0, draws, (DRAWS, draws))
    columns = [f"{count} a class" for count in counts]
    table = table_of(f"Few labels: AUROC, mean of {draws} draws [95 %], and more than mean", "embedding", *columns)
    figures, curves = [], {}
    for name, values in found.items():
        means = [interval(float(row.mean()), row[again].mean(1)) for row in values]
        more = [difference(float(row.mean()), row[again].mean(1)) for row in values - found[MEAN.title]]
        curves[name] = means
        table.add_row(name, *(str(each) for each in means))
        if name != MEAN.title:
            table.add_row("", *(f"{each.value:+.3f} [{each.low:+.3f}, {each.high:+.3f}]" for each in more))
        for count, each, extra in zip(counts, means, more, strict=True):
            figures.append(Figure(f"{count} slides a class, {name}: AUROC", each.value, "", interval=each[1:]))
            if name != MEAN.title:
                figures.append(
                    Figure(f"{count} slides a class, {name}: more than mean", extra.value, "", interval=extra[1:3])
                )
    CONSOLE.print(table)
    if picture is not None:
        _draw_curves(counts, curves, picture)
    return figures


def _shots(slides: Lung, fold: Fold, count: int, draw: int) -> NDArray[np.int64]:
    """(2, count) slides of each class, one a patient, in an order of which any beginning is a draw."""
    rng = np.random.default_rng([0, draw])
    train = rng.permutation(np.array(fold.train))
    return np.stack(
        [
            [rng.choice(slides.cases.bags_of([case])) for case in train[slides.cases.y[train] == y][:count]]
            for y in (0, 1)
        ]
    )


def _abmil(slides: Lung, fold: Fold, train: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """(S, 2) answers of a model that was trained on these slides; NaN for slides that are not of the test part."""
    each = slides.cohort.cases("none")
    at = {bag: i for i, bag in enumerate(each.bags)}
    place = np.array([at[bag] for bag in slides.cases.bags])
    test = slides.cases.bags_of(fold.test)
    shots = Fold("shots", tuple(sorted(place[train].tolist())), tuple(sorted(place[test].tolist())))
    config = replace(ABMIL, batch_size=len(train) // 2, seed=seed)
    trained = train_fold(slides.cohort, each, shots, 0, config).tasks[0]
    answers = np.full((len(place), 2), np.nan)
    answers[np.argsort(place)[list(shots.test)]] = trained.answers
    return answers


def _test_auroc(slides: Lung, fold: Fold, answers: NDArray[np.float64]) -> float:
    return measure(by_patient(slides.cases, slides.cohort.target, fold, answers))["auroc"]


def _draw_curves(counts: Sequence[int], curves: dict[str, list[Interval]], picture: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, 4.2), layout="constrained")
    axes = canvas.subplots()
    for number, (name, values) in enumerate(curves.items()):
        x = np.array(counts) * 1.03 ** (number - len(curves) / 2)  # side by side, so that no bar hides another
        middle, low, high = np.array(values).T
        axes.errorbar(x, middle, (middle - low, high - middle), marker="o", ms=4, lw=1.4, capsize=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("labelled slides a class")
    axes.set_ylabel("AUROC, mean of draws and 95 %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    picture.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(picture, dpi=110)


def survival(slides: Lung, folder: Path, quick: bool) -> list[Figure]:
    """Cox regression with a ridge on the leading components of the patient's mean vector, for each type and for both.

    Both together have a baseline hazard for each type. Concordance counts pairs of patients of one type and one fold.
    """
    clinic = lung_clinic(folder)
    rows = [clinic[name] for name in slides.cases.patients]
    months = np.array([float(row["survival_months"]) for row in rows])
    died = np.array([float(row["censorship"]) == 0 for row in rows])
    everybody = Survivors(months, died, slides.cases.y.astype(np.int64))
    about = np.array([[float(row["age"] or "nan"), float(row["is_female"] or "nan")] for row in rows])
    methods = FEW[:1] if quick else FEW
    groups = {"both": np.arange(len(rows))}
    if not quick:
        groups |= {name: np.flatnonzero(everybody.stratum == i) for i, name in enumerate(slides.cohort.target.classes)}
    risks: dict[tuple[str, str], NDArray[np.float64]] = {}
    of_fold = np.zeros(len(rows), np.int64)
    for number, fold in enumerate(slides.folds):
        of_fold[list(fold.test)] = number
        age_sex = _standard(np.where(np.isnan(about), np.nanmedian(about[list(fold.train)], 0), about), fold)
        designs = {"age and sex": age_sex}
        for method in methods:
            components = _components(slides, method, fold)
            designs[method.title] = components
            if method is MEAN:
                designs[f"{method.title}, age and sex"] = np.concatenate([components, age_sex], 1)
        for group, members in groups.items():
            inside = np.zeros(len(rows), bool)
            inside[members] = True
            train, test = (np.array([i for i in part if inside[i]]) for part in (fold.train, fold.test))
            for name, design in designs.items():
                risk = risks.setdefault((group, name), np.zeros(len(rows)))
                risk[test] = _cox_chosen(design, everybody, train, slides.cases.patients, quick)[test]
    table = table_of(
        f"Survival, Cox on {COMPONENTS} components, 5 folds: concordance [95 %]", "group", "model", "c-index", "p of 0.5",
        "more than age and sex", "p",
    )  # fmt: skip
    figures = []
    for group, members in groups.items():
        there = everybody.take(members)
        pairs, drawn = comparable(there, of_fold[members]), resamples(len(members), DRAWS)
        base = None
        for name in designs:
            risk = risks[group, name][members]
            value, values = float(concordance(pairs, risk)[0]), concordance(pairs, risk, drawn)
            found, chance = interval(value, values), difference(value - 0.5, values - 0.5)
            words = ("", "")
            figures.append(Figure(f"survival, {group}, {name}: c-index", value, "", interval=found[1:]))
            if base is None:
                base = value, values
            else:
                more = difference(value - base[0], values - base[1])
                words = (f"{more.value:+.3f} [{more.low:+.3f}, {more.high:+.3f}]", f"{more.p:.3f}")
                figures.append(
                    Figure(f"survival, {group}, {name}: more than age and sex", more.value, "", interval=more[1:3])
                )
            who = f"{group}: {len(members)} patients, {int(there.event.sum())} deaths" if name == "age and sex" else ""
            table.add_row(who, name, str(found), f"{chance.p:.3f}", *words)
    CONSOLE.print(table)
    return figures


def _components(slides: Lung, method: Method, fold: Fold) -> NDArray[np.float64]:
    """(n, 16) leading components of the patients' mean vectors, of unit variance in sum as often as there are."""
    z = rotated(slides.vectors(method, fold), slides.cases.bags_of(fold.train))[:, :COMPONENTS]
    owner = slides.cases.owner
    means = np.stack([np.bincount(owner, column) for column in z.T], 1) / np.bincount(owner)[:, None]
    train = list(fold.train)
    return np.asarray((means - means[train].mean(0)) / np.sqrt(means[train].var(0).mean()))


def _standard(x: NDArray[np.float64], fold: Fold) -> NDArray[np.float64]:
    train = x[list(fold.train)]
    return np.asarray((x - train.mean(0)) / train.std(0))


def _cox_chosen(
    x: NDArray[np.float64], patients: Survivors, train: NDArray[np.int64], names: Sequence[str], quick: bool
) -> NDArray[np.float64]:
    """Log risk of all from a fit on ``train``, whose penalty is the best of three on inner folds."""
    if quick:
        return cox(x, patients, train, PENALTIES[1])
    strata = patients.stratum * 2 + patients.event
    scores = dict.fromkeys(PENALTIES, 0.0)
    for fit, held in validation_parts(strata, names, train.tolist(), parts=3, seed=0):
        others = np.array(held)
        pairs = comparable(patients.take(others), np.zeros(len(others), np.int64))
        for penalty in scores:
            scores[penalty] += float(concordance(pairs, cox(x, patients, np.array(fit), penalty)[others])[0])
    return cox(x, patients, train, max(scores, key=scores.__getitem__))


def stability(slides: Lung, quick: bool) -> list[Figure]:
    """How much alike prototypes come out of disjoint halves of the patients, and of other seeds."""
    first = np.unique(slides.cases.owner, return_index=True)[
        1
    ]  # a slide a patient, so that no patient is in both halves
    figures = []
    ways: tuple[Way, ...] = ("raw", "centred")
    for way in ways:
        bags = [_ready(slides.bags[i], way) for i in first]
        pool = draw_tiles(SlideSet.from_bags(bags), 5000 if quick else 10_000)
        found = report_k(
            pool, (4, 16) if quick else (4, 8, 16, 32), repeats=2 if quick else 5, restarts=1 if quick else 3
        )
        CONSOLE.print(f"Prototypes of regions, {way}\n{found}")
        for row in found.rows:
            title = f"k={row.k}" + ("" if way == "raw" else f", {way}")
            figures += [
                Figure(f"{title}: adjusted Rand, disjoint halves of patients", row.halves, ""),
                Figure(f"{title}: its deviation over draws of halves", row.halves_sd, ""),
                Figure(f"{title}: adjusted Rand, other seeds", row.seeds, ""),
                Figure(f"{title}: silhouette", row.silhouette, ""),
            ]
    return figures


def _auroc(predictions: Predictions) -> Interval:
    value = float(aurocs(predictions)[0])
    return interval(value, aurocs(predictions, resamples(len(predictions), DRAWS)))


def _auroc_by_fold(predictions: Predictions) -> list[float]:
    folds = np.array(predictions.folds)
    return [float(aurocs(predictions.take(np.flatnonzero(folds == name)))[0]) for name in dict.fromkeys(folds.tolist())]


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--parts", default=",".join(PARTS), help="names with commas; all by default")
    options.add_argument("--picture", type=Path, help="of few labels, PNG")
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    slides = Lung.read(chosen.folder)
    parts = {
        "probe": lambda: linear_probe(slides, chosen.quick),
        "why": lambda: why(slides, chosen.folder, chosen.quick),
        "few-shot": lambda: few_shot(slides, chosen.quick, chosen.picture),
        "survival": lambda: survival(slides, chosen.folder, chosen.quick),
        "stability": lambda: stability(slides, chosen.quick),
    }
    wanted = chosen.parts.split(",")
    if unknown := set(wanted) - set(parts):
        raise SystemExit(f"no part {min(unknown)!r}; there are {', '.join(parts)}")
    figures = []
    for name in wanted:
        began = time.perf_counter()
        figures += parts[name]()
        CONSOLE.print(f"{name}: {time.perf_counter() - began:.0f} s")
    report("Slide embeddings on lung", figures, chosen.json)


if __name__ == "__main__":
    main()
