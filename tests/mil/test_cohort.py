"""Cohorts: who takes part, whose they are, what is said of the others."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from features.interop import write_trident
from features.keys import slide_key
from features.store import UNREADABLE
from mil.bag import Bag
from mil.cohort import Cohort, SlideNames
from mil.target import Labels
from tests.mil.made_up import DIM, arrays, cohort, stored_cohort, write_store
from wsi.errors import BadFeaturesError, CohortError, NotExtractedError, SlideNotFoundError, UsageError


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "word", [slide_key("x/a.b.svs"), "x/a.b.svs", "x\\a.b.svs", "a.b.svs", "a.b", "/data/x/a.b.svs"]
)
def test_slides_are_found_by_key_path_name_or_stem(word: str) -> None:
    key = slide_key("x/a.b.svs")
    assert SlideNames({key: "x/a.b.svs", slide_key("x/a.svs"): "x/a.svs"}).find(word) == key


def test_an_ambiguous_name_is_refused_and_an_unknown_one_is_none() -> None:
    names = SlideNames({slide_key(path): path for path in ("x/a.svs", "y/a.svs")})
    with pytest.raises(CohortError, match="ambiguous"):
        names.find("a.svs")
    assert names.find("y/a.svs") == slide_key("y/a.svs")
    assert names.find("b") is None


def test_a_store_and_a_table_are_joined_and_the_rest_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    slides = {f"{name}.svs": rng.normal(size=(5, DIM)).astype(np.float32) for name in "abcde"}
    store = write_store(tmp_path / "OUT", slides)
    write_store(tmp_path / "OUT", {"empty.svs": np.empty((0, DIM), np.float32)})
    write_store(tmp_path / "OUT", {"other.svs": slides["a.svs"]}, encoder="another")
    rows = "slide;patient;grade\na;p1;1\nb;p1;1\nc;p2;2\nd;;2\ne.svs;p3;NA\nempty;p4;1\nother;p5;1\nf;p6;2\n"
    made = Cohort.from_store(store.root, table(tmp_path / "t.csv", rows), "grade", encoder="made-up")
    assert made.slides == tuple(slide_key(f"{name}.svs") for name in "abc")
    assert (made.patients, made.y.tolist(), made.target.classes) == (("p1", "p1", "p2"), [0, 0, 1], ("1", "2"))
    reasons = {each.slide: each.reason for each in made.left_out}
    assert reasons == {
        "d": "no patient", "e.svs": "no label", "empty": "no tiles", "other": "no features of made-up", "f": "no features",
    }  # fmt: skip
    assert "left out 1 (no patient)" in made.describe()
    np.testing.assert_array_equal(made.read(made.slides[:1]).features.numpy(), slides["a.svs"])


def test_rows_of_bad_tiles_are_left_out_of_the_bag_and_nan_in_its_place(tmp_path: Path) -> None:
    x = np.arange(4 * DIM, dtype=np.float32).reshape(4, DIM)
    status = np.array([0, UNREADABLE, 0, 0], np.uint8)
    store = write_store(tmp_path / "OUT", {"a.svs": x}, status=status)
    write_store(tmp_path / "OUT", {"b.svs": x})
    made = Cohort.from_store(store.root, table(tmp_path / "t.csv", "slide,y\na,0\nb,1\n"), "y")
    bag = made.source.read(slide_key("a.svs"))
    np.testing.assert_array_equal(bag.features.numpy(), x[[0, 2, 3]])
    assert bag.xy is not None
    assert bag.xy.tolist() == [[0, 0], [20, 0], [30, 0]]
    assert made.source.place(slide_key("a.svs")).rows.tolist() == [0, 2, 3]


def test_several_encoders_stand_side_by_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, z = (rng.normal(size=(4, n)).astype(np.float32) for n in (DIM, 3))
    write_store(tmp_path / "OUT", {"a.svs": x, "b.svs": x + 1})
    write_store(tmp_path / "OUT", {"a.svs": z, "b.svs": z + 1}, encoder="second")
    rows = table(tmp_path / "t.csv", "slide,y\na,0\nb,1\n")
    both = Cohort.from_store(tmp_path / "OUT", rows, "y", encoder=("made-up", "second"))
    assert both.source.dim == DIM + 3
    np.testing.assert_array_equal(both.source.read(slide_key("b.svs")).features.numpy(), np.hstack([x + 1, z + 1]))
    with pytest.raises(UsageError, match="made-up, second; say which with --encoder"):
        Cohort.from_store(tmp_path / "OUT", rows, "y")


@pytest.mark.parametrize(
    ("text", "labels", "message"),
    [
        ("slide,y\n", "y", "has no rows"),
        ("slide,label\ns000,1\n", "y", "has no column 'y'; it has slide, label"),
        ("image,y\ns000,1\n", "y", "has no column of slides"),
        ("slide,y\ns000,1\ns001,1\n", "y", "at least two classes are needed, and there is only '1'"),
        ("slide,y\ns000,1\ns000.svs,2\n", "y", "stands in two rows"),
        ("slide,y\nnone,1\n", "y", "no slide has both features and a label"),
        ("slide,y,y\ns000,1,2\n", "y", "two columns have one name"),
        ("slide,y\ns000,a\ns001,b\n", Labels("y", kind="regression"), "y is 'a', not a number"),
        ("slide,t,e\ns000,-1,1\ns001,3,1\n", Labels("t", event="e"), "not a time from 0"),
        ("slide,t,e\ns000,1,maybe\ns001,3,1\n", Labels("t", event="e"), "e is 'maybe'; write 1 or 0"),
        ("slide,y\ns000,a\ns001,c\n", Labels("y", classes=("a", "b")), "'c', which is none of the classes a, b"),
        ("slide,y\ns000,a\ns001,a\n", Labels("y", classes=("a", "b")), "no slide with features is of class 'b'"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_named_with_the_remedy(
    tmp_path: Path, text: Any, labels: Any, message: Any
) -> None:
    store, _ = stored_cohort(tmp_path, 2)
    path = table(tmp_path / "t.csv", text)
    with pytest.raises(CohortError, match=message) as error:
        Cohort.from_store(store, path, labels)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_store_and_no_table_are_said(tmp_path: Path) -> None:
    store, _ = stored_cohort(tmp_path, 2)
    with pytest.raises(CohortError, match="no such table"):
        Cohort.from_store(store, tmp_path / "none.csv", "y")
    with pytest.raises(NotExtractedError, match="no feature store here"):
        Cohort.from_store(tmp_path, tmp_path / "none.csv", "y")


def test_the_kind_of_target_is_seen_by_its_values() -> None:
    bags = [np.zeros((1, 2), np.float32)] * 4
    assert Cohort.from_arrays(bags, ["b", "a", "a", "b"]).target.classes == ("a", "b")
    assert Cohort.from_arrays(bags, [10, 9, 2, 2]).target.classes == ("2", "9", "10")
    assert Cohort.from_arrays(bags, [0.5, 1.5, 2.0, 3.25]).target.kind == "regression"
    survival = Cohort.from_arrays(bags, [[3.0, 1], [2.0, 0], [1.0, 1], [4.0, 1]])
    assert (survival.target.kind, survival.y.tolist(), survival.event.tolist()) == (
        "survival", [3, 2, 1, 4], [True, False, True, True]
    )  # fmt: skip
    ordinal = Cohort.from_arrays(
        bags, ["low", "mid", "high", "low"], labels=Labels("g", kind="ordinal", classes=("low", "mid", "high"))
    )
    assert ordinal.y.tolist() == [0, 1, 2, 0]


def test_censoring_is_the_event_turned_round(tmp_path: Path) -> None:
    store, _ = stored_cohort(tmp_path, 2)
    path = table(tmp_path / "t.csv", "slide,t,c\ns000,1,1\ns001,3,0.0\n")
    assert Cohort.from_store(store, path, Labels("t", censored="c")).event.tolist() == [False, True]


def test_a_patient_answers_once_late_or_early_or_each_slide_by_itself() -> None:
    made = cohort(8)
    late, early, none = (made.cases(fusion) for fusion in ("late", "early", "none"))
    assert len(late) == len(early) == 6
    assert len(none) == 8
    assert [len(bag) for bag in early.bags] == [1, 1, 2, 1, 1, 2]
    assert late.owner.tolist() == [0, 1, 2, 2, 3, 4, 5, 5]
    assert none.patients.count("2") == 2
    assert len(made.read(early.bags[2])) == 24


def test_slides_of_a_patient_that_contradict_each_other_are_refused() -> None:
    bags = [np.zeros((1, 2), np.float32)] * 4
    made = Cohort.from_arrays(bags, [0, 1, 0, 1], ["p", "p", "q", "r"])
    with pytest.raises(CohortError, match="slides of patient p differ in target"):
        made.cases("late")
    assert len(made.cases("none")) == 4


def test_a_patient_in_two_sites_is_refused(tmp_path: Path) -> None:
    store, _ = stored_cohort(tmp_path, 3)
    path = table(tmp_path / "t.csv", "slide,patient,site,y\ns000,p,A,1\ns001,p,B,1\ns002,q,A,0\n")
    with pytest.raises(CohortError, match=r"patient p differ in site .* two sites"):
        Cohort.from_store(store, path, Labels("y", site="site")).cases()


def test_vectors_that_are_not_finite_are_named_with_file_and_row(tmp_path: Path) -> None:
    with pytest.raises(BadFeaturesError, match=r"bag-00001: 1 of 3 vectors are not finite \(the first is row 2\)"):
        Cohort.from_arrays([np.zeros((3, 2)), np.array([[0, 0], [1, 1], [np.nan, 0]])], [0, 1])
    with pytest.raises(BadFeaturesError, match="bag-00000: no tiles"):
        Cohort.from_arrays([np.zeros((0, 2)), np.zeros((3, 2))], [0, 1])
    with pytest.raises(UsageError, match="one length"):
        Cohort.from_arrays([np.zeros((1, 2)), np.zeros((3, 4))], [0, 1])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.array([[0.0, np.inf]])
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"] = np.array([[0.0, 1.0]])
    made = Cohort.from_folder(tmp_path, table(tmp_path / "t.csv", "slide,y\na,0\nb,1\n"), "y")
    with pytest.raises(BadFeaturesError, match=r"a\.h5: 1 of 1 vectors"):
        made.source.read("a")


def test_a_folder_of_files_gives_the_same_bags_as_the_store_it_came_from(tmp_path: Path) -> None:
    store_path, labels = stored_cohort(tmp_path, 6)
    stored = Cohort.from_store(store_path, labels, "subtype")
    write_trident(stored.source.source.store, "made-up", tmp_path / "trident")  # type: ignore[attr-defined]
    read = Cohort.from_folder(tmp_path / "trident", labels, "subtype")
    assert read.source.facts["encoder"] == ["made-up"]
    assert (read.y.tolist(), read.patients) == (stored.y.tolist(), stored.patients)
    for mine, theirs in zip(read.slides, stored.slides, strict=True):
        a, b = read.source.read(mine), stored.source.read(theirs)
        assert a.features.equal(b.features)
        assert a.xy is not None
        assert b.xy is not None
        assert a.xy.equal(b.xy)
    with pytest.raises(SlideNotFoundError, match=r"holds no \.h5"):
        Cohort.from_folder(tmp_path / "OUT", labels, "subtype")


def test_the_cache_keeps_within_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, labels = stored_cohort(tmp_path, 6)
    one = 12 * DIM * 4 + 12 * 16
    made = Cohort.from_store(store, labels, "subtype", cache_bytes=2 * one)
    reads: list[str] = []
    inner = made.source.source  # type: ignore[attr-defined]
    original = inner.read

    def read(slide: str) -> Bag:
        reads.append(slide)
        bag: Bag = original(slide)
        return bag

    monkeypatch.setattr(inner, "read", read)
    for _ in range(3):
        for slide in made.slides:
            made.source.read(slide)
    assert len(reads) == 6 + 2 * 4


def test_the_fingerprint_changes_with_labels_and_features_but_not_with_the_cache() -> None:
    a, b = cohort(8), cohort(8)
    assert a.fingerprint == b.fingerprint
    bags, labels, patients = arrays(8)
    keyed = [Bag(x, None, f"s{i:03d}") for i, x in enumerate(bags)]
    assert Cohort.from_arrays(keyed, [1 - y for y in labels], patients).fingerprint != a.fingerprint
