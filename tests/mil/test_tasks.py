"""Several targets of one model: each is learned, who lacks one label counts for the others, and each stands for itself."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from features.keys import slide_key
from features.store import FeatureStore
from mil import Cohort, Labels, Predictor, Result, TrainConfig, cross_validate
from mil.bag import Bag, collate
from mil.explain import integrated_gradients
from mil.member import Member
from mil.objective import Joint, Objective, fit_joint
from mil.predict import read_patients
from mil.sources import StoreSource
from mil.splits import make_folds
from mil.target import Target, Task
from mil.train import _with_auxiliary, answer_cases
from tests.mil.made_up import DIM, QUICK, arrays, bag_of, write_store
from wsi.errors import CohortError, UsageError

JOINT = Joint(
    {"months": Objective("cox", 1), "subtype": Objective("cross_entropy", 2), "grade": Objective("ordinal", 2)},
    {"months": 0.25, "subtype": 0.5, "grade": 0.25},
)
NAN = float("nan")


def several(n: int = 60, seed: int = 0) -> Cohort:
    """Subtype shows in the first feature, months in the second; every third case lacks the months, two the subtype."""
    rng = np.random.default_rng(seed)
    subtype, slow = rng.permutation(np.arange(n) % 2), rng.permutation(np.arange(n) % 2)
    bags = []
    for one, other in zip(subtype, slow, strict=True):
        x = bag_of(one, rng, n=16)
        x[:, 1] += 3 * other
        bags.append(x)
    months = np.stack([10 + 20 * slow + rng.uniform(0, 5, n), rng.uniform(size=n) < 0.8], axis=1)
    months[np.arange(n) % 3 == 0] = NAN
    names: list[Any] = ["luad" if one else "lusc" for one in subtype]
    names[1] = names[4] = None
    return Cohort.from_arrays(
        [Bag(x, None, f"s{i:03d}") for i, x in enumerate(bags)], {"subtype": names, "months": months}
    )


def test_each_of_several_targets_is_learned_by_one_model() -> None:
    made = several()
    result = cross_validate(made, replace(QUICK, inner=1, epochs=40, loss="cox"))
    assert list(result.tasks) == ["subtype", "months"]
    subtype, months = result.tasks.values()
    assert subtype.intervals()["auroc"].value > 0.9
    assert months.intervals()["c_index"].value > 0.7
    assert [objective.loss for objective in result.folds[0].members[0].joint.tasks.values()] == ["cross_entropy", "cox"]
    assert len(result.predictions) == len(months.predictions) == 60  # who lacks a label is answered all the same
    assert (len(subtype.predictions.known), len(months.predictions.known)) == (58, 40)
    first, second = result.summary(draws=20).split("\n\n")
    assert first.startswith("abmil-gated for subtype (binary): 3 folds, 58 cases")
    assert second.startswith("abmil-gated for months (survival): 3 folds, 40 cases")
    assert {len(each.members) for each in result.folds} == {1}


@given(st.integers(0, 2**32 - 1))
def test_the_loss_is_the_weighted_sum_of_each_tasks_own_over_those_whose_label_is_known(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(6, 5))).float().requires_grad_()
    y = torch.from_numpy(np.stack([rng.uniform(1, 9, 6), rng.integers(0, 2, 6), rng.integers(0, 3, 6)], axis=1))
    y[torch.from_numpy(rng.random((6, 3)) < 0.4)] = NAN
    y[0, 1] = 1.0
    event = torch.ones(6, 3, dtype=torch.bool)
    loss = JOINT(logits, y, event)
    expected = 0.0
    for i, (name, columns) in enumerate((("months", [0]), ("subtype", [1, 2]), ("grade", [3, 4]))):
        known = ~y[:, i].isnan()
        if known.any():
            own = JOINT.tasks[name](logits.detach()[known][:, columns], y[known, i], event[known, i])
            expected += JOINT.weights[name] * float(own)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    for i, columns in enumerate(([0], [1, 2], [3, 4])):
        assert (logits.grad[y[:, i].isnan()][:, columns] == 0).all()


def test_weights_and_losses_go_to_the_tasks_they_are_named_for() -> None:
    tasks = [
        Task(Target("subtype", "binary", ("a", "b")), np.array([0, 1, NAN]), np.ones(3, bool)),
        Task(Target("months", "survival"), np.array([NAN, 2.0, 5.0]), np.ones(3, bool)),
    ]
    assert dict(fit_joint(tasks, TrainConfig(task_weights={"months": 3})).weights) == {"subtype": 0.25, "months": 0.75}
    found = fit_joint(tasks, TrainConfig(loss="focal", class_weights="balanced"))
    assert [each.loss for each in found.tasks.values()] == ["focal", "nll"]
    assert found.tasks["subtype"].class_weights == (1.0, 1.0)  # of the two that are known
    with pytest.raises(UsageError, match="task_weights has 'grade', but the targets are subtype, months"):
        fit_joint(tasks, TrainConfig(task_weights={"grade": 3}))
    with pytest.raises(UsageError, match="mse is for none of the targets"):
        fit_joint(tasks, TrainConfig(loss="mse"))
    with pytest.raises(UsageError, match="a number above 0, not 0 for 'grade'"):
        TrainConfig(task_weights={"grade": 0})
    with pytest.raises(CohortError, match="subtype: nobody in a training part has a label"):
        fit_joint([tasks[0].take([2]), tasks[1].take([2])], TrainConfig())


@pytest.mark.parametrize("model", ["clam-mb", "dsmil"])
def test_a_models_own_loss_belongs_to_the_first_task_of_classes_and_to_the_bags_it_is_known_of(model: str) -> None:
    torch.manual_seed(0)
    hyper: Any = {"subtyping": True, "dropout": 0.0} if model == "clam-mb" else {}
    joint = replace(JOINT, weights={"months": 0.0, "subtype": 1.0, "grade": 0.0})
    member = Member({"model": model, "hyper": hyper, "dim": DIM}, joint, None)
    rng = np.random.default_rng(0)
    bags = [Bag(bag_of(i % 2, rng)) for i in range(3)]
    y = torch.tensor([[3.0, 1, 2], [NAN, 0, 1], [4.0, NAN, 0]], dtype=torch.float64)
    event = torch.ones(3, 3, dtype=torch.bool)
    batch = collate(bags)
    loss = _with_auxiliary(member, batch, member.model(batch), y, event)
    two = collate(bags[:2])  # the third has no subtype
    whole = member.model(two)
    output = member.speaking_for("subtype").narrow(whole)
    for ours, all_of_them in zip(output[:3], whole[:3], strict=True):  # logits, attention, scores: a row a class
        assert ours.equal(all_of_them[:, 1:3])
    expected = member.model.bag_weight * F.cross_entropy(output.logits, torch.tensor([1, 0]))
    expected = expected + member.model.auxiliary_loss(two, output, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    of_others = member.model.get_submodule("attention.score" if model == "clam-mb" else "tile_classifier")
    gradient = of_others.get_parameter("weight").grad
    assert gradient is not None
    assert (gradient[[0, 3, 4]] == 0).all()
    assert (gradient[1:3] != 0).any()


def table_of(folder: Path) -> Any:
    """A store and a table in which labels are missing here and there."""
    bags, labels, patients = arrays(24)
    write_store(folder / "OUT", {f"x/s{i:03d}.svs": x for i, x in enumerate(bags)})
    lines = ["slide,patient,subtype,months,died"]
    for i, (label, patient) in enumerate(zip(labels, patients, strict=True)):
        kind = "" if i in (2, 5) else ["luad", "lusc"][label]
        months = "NA" if i in (2, 6) else str(10 + patient)
        lines.append(f"s{i:03d},p{patient},{kind},{months},{'' if i == 9 else patient % 2}")
    (folder / "cohort.csv").write_text("\n".join(lines))
    return folder / "OUT", folder / "cohort.csv"


BOTH: list[Any] = ["subtype", Labels("months", event="died")]


def test_a_slide_that_lacks_one_label_takes_part_and_one_that_lacks_all_does_not(tmp_path: Path) -> None:
    store, table = table_of(tmp_path)
    made = Cohort.from_store(store, table, BOTH)
    assert len(made) == 23
    assert [each.slide for each in made.left_out] == ["s002"]
    unknown = [{made.slides[i] for i in np.flatnonzero(~task.known)} for task in made.tasks]
    assert unknown == [{slide_key("x/s005.svs")}, {slide_key("x/s006.svs"), slide_key("x/s009.svs")}]
    assert "subtype 10 luad, 12 lusc, 1 unknown; months 10 events, 2 unknown" in made.describe()
    cases = made.cases()
    patient = cases.names.index("p5")  # s006 and s007, of which one has the months
    assert cases.tasks[1].y[patient] == 15
    assert made.fingerprint != Cohort.from_store(store, table, BOTH[::-1]).fingerprint
    folds = make_folds(cases, made.target, by="random", folds=3, seed=0)
    assert sorted(i for fold in folds for i in fold.test) == list(
        range(len(cases))
    )  # those without the first label too
    with pytest.raises(CohortError, match="all targets have one column of patients, not patient, slide"):
        Cohort.from_store(store, table, [Labels("subtype", patient="patient"), Labels("months", patient="slide")])
    with pytest.raises(CohortError, match="names that differ"):
        Cohort.from_store(store, table, ["subtype", "subtype"])


def test_slides_of_a_patient_that_contradict_each_other_in_the_second_target_are_refused() -> None:
    bags = [np.zeros((1, 2), np.float32)] * 4
    targets: dict[str, Any] = {"a": [0, 1, None, 0], "b": [None, 0.5, 1.5, 2.25]}
    assert len(Cohort.from_arrays(bags, targets, ["p", "q", "s", "p"]).cases()) == 3
    with pytest.raises(CohortError, match=r"slides of patient q differ in b \(bag-00001: 0.5, bag-00002: 1.5\)"):
        Cohort.from_arrays(bags, targets, ["p", "q", "q", "r"]).cases()
    with pytest.raises(CohortError, match="no label at all"):
        Cohort.from_arrays(bags, {"a": [0, 1, None, 0], "b": [1, 2, None, 3]})


def test_a_run_of_several_targets_reads_back_and_answers_for_each(tmp_path: Path) -> None:
    store, table = table_of(tmp_path)
    made = Cohort.from_store(store, table, BOTH)
    config = replace(QUICK, epochs=3, model="clam-mb", hyper={})
    result = cross_validate(made, config, out=tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"predictions-subtype.csv", "predictions-months.csv"} <= names
    assert "predictions.csv" not in names
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_bytes())) == {"subtype", "months"}
    read = Result.load(tmp_path / "run", made)
    for name, task in result.tasks.items():
        np.testing.assert_array_equal(read.tasks[name].predictions.answers, task.predictions.answers)
        np.testing.assert_array_equal(read.tasks[name].predictions.y, task.predictions.y)
        assert read.tasks[name].intervals() == task.intervals()
        assert read.tasks[name].cases.tasks[0].target == task.target
    again = cross_validate(made, config, out=tmp_path / "run")
    np.testing.assert_array_equal(again.predictions.answers, result.predictions.answers)
    heats = [result.tasks[name].heatmap("s003", kind="importance").values for name in ("subtype", "months")]
    np.testing.assert_array_equal(heats[0], result.heatmap("s003", kind="importance").values)
    assert np.abs(heats[0] - heats[1]).max() > 0
    predictor = Predictor.load(tmp_path / "run")
    patients = read_patients(table, FeatureStore(store))
    for name, speaker in predictor.tasks.items():
        answers, tested = speaker.predict(store, patients=patients).predictions, result.tasks[name].predictions
        assert answers.columns == tested.columns
        for i, case in enumerate(tested.names):
            if case != "p2":  # of its slides one had no label at all, and is answered now
                np.testing.assert_allclose(answers.answers[answers.names.index(case)], tested.answers[i], rtol=1e-12)
    rows = list(csv.DictReader((tmp_path / "run" / "cohort.csv").read_text().splitlines()))
    assert {"label", "event", "label months", "event months"} <= set(rows[0])


def test_a_bag_is_read_and_run_once_for_all_targets_and_the_answers_are_those_of_each_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, table = table_of(tmp_path)
    made = Cohort.from_store(store, table, BOTH, cache_bytes=0)
    result = cross_validate(made, replace(QUICK, epochs=2, members=2, inner=2), out=tmp_path / "run")
    members, cases, which = result.folds[0].members, made.cases(), [0, 1]
    n_bags = len(cases.bags_of(which))
    expected = {
        name: np.stack([
            torch.stack([
                speaker.answer(speaker.logits(made.read(cases.bags[index]))[None])[0]
                for index in cases.bags_of([case]) for speaker in speakers
            ]).mean(0).numpy() for case in which
        ]) for name in ("subtype", "months") for speakers in [[member.speaking_for(name) for member in members]]
    }  # fmt: skip
    read: list[Any] = []
    run: list[Any] = []
    monkeypatch.setattr(StoreSource, "read", counted(StoreSource.read, read))
    monkeypatch.setattr(Member, "every_logit", counted(Member.every_logit, run))
    found = answer_cases(members, made, cases, which)
    assert list(found) == ["subtype", "months"]
    for name, answers in found.items():
        np.testing.assert_array_equal(answers, expected[name])
    assert (len(read), len(run)) == (n_bags, 2 * n_bags)
    read.clear()
    predictor = Predictor.load(tmp_path / "run")
    every = predictor.predict_tasks(store)
    assert sorted(read) == sorted(set(read)) == sorted(FeatureStore(store).keys)
    for name, speaker in predictor.tasks.items():
        alone = speaker.predict(store)
        np.testing.assert_array_equal(every[name].predictions.answers, alone.predictions.answers)
        assert (every[name].doubt is None) == (name == "months")


def counted(function: Any, told: list[Any]) -> Any:
    """The function, which tells its first argument but the object at each call."""

    def counting(self: Any, argument: Any) -> Any:
        told.append(argument)
        return function(self, argument)

    return counting


def test_each_task_of_classes_has_a_temperature_of_its_own(tmp_path: Path) -> None:
    made = several(48)
    made = replace(made, tasks=made.tasks[::-1])  # the months first
    result = cross_validate(made, replace(QUICK, epochs=10))
    member = result.folds[0].members[0]
    assert member.temperatures["subtype"] != 1
    assert member.temperatures["months"] == 1
    member.save(tmp_path / "m.safetensors")
    read = Member.load(tmp_path / "m.safetensors")
    assert (read.joint, read.temperatures) == (member.joint, member.temperatures)
    bag = made.source.read("s003")
    for task in made.tasks:
        mine, theirs = (each.speaking_for(task.target.name) for each in (member, read))
        assert mine.answer(mine.logits(bag)[None]).equal(theirs.answer(theirs.logits(bag)[None]))
    for name in ("subtype", "months"):  # gradients sum to what the task's own logits change by from the mean tile
        speaker = member.speaking_for(name)
        scaled = speaker.scaling(collate([bag]))
        with torch.no_grad():
            of_mean = speaker.narrow(speaker.model(replace(scaled, features=scaled.features * 0))).logits[0]
        change = speaker.logits(bag) - of_mean
        expected = change.sum() if name == "months" else change[int(speaker.logits(bag).argmax())]
        shares = integrated_gradients([speaker], bag, steps=128)
        assert shares.sum() == pytest.approx(expected.item(), rel=0.02, abs=0.01)
    assert torch.cat([member.speaking_for(t.target.name).logits(bag) for t in made.tasks]).equal(
        member.every_logit(bag)
    )
