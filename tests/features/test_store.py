"""The store: what is there is whole and verified; damage is found; interrupted work goes on."""

import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zarr.storage._local
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from features import arrays, writing
from features.lease import Lease
from features.store import GOOD, NONFINITE, UNREADABLE, FeatureStore
from features.writing import (
    FeatureWriter,
    check_encoder,
    check_writable,
    collect_garbage,
    replace_slide,
    sweep,
    write_slide,
)
from wsi.errors import (
    DiskFullError,
    EncoderChangedError,
    NotExtractedError,
    OutputNotWritableError,
    SlideBusyError,
    StoreCorruptError,
    StoreFormatError,
    UsageError,
)
from wsi.grid import TileGrid, Tiling

DIM = 5
ENCODER = {"name": "timm:tiny", "dim": DIM, "weights_sha256": "ab" * 32}
HOW = {"precision": "fp32"}
ABOUT = {"slide": {"key": "a.svs-1", "relpath": "a.svs"}, "tissue": {"source": "found"}}
SHARD = 8


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 8 rows, so that a few rows are many shards."""
    monkeypatch.setattr(arrays, "CHUNK_ROWS", 4)
    monkeypatch.setattr(arrays, "SHARD_ROWS", SHARD)
    monkeypatch.setattr(writing, "SHARD_ROWS", SHARD)


def grid(n: Any = 21, seed: Any = 0) -> Any:
    rng = np.random.default_rng(seed)
    xy = np.stack([np.arange(n) % 7 * 10, np.arange(n) // 7 * 10], axis=1)
    tissue = rng.uniform(0.3, 1, n).astype(np.float32)
    return TileGrid(xy=xy, tile_px=5, side=(10, 10), stride=(10, 10), mpp=(0.5, 0.5), tissue=tissue)


def vectors(n: Any = 21, seed: Any = 1) -> Any:
    return np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)


def good(n: Any) -> Any:
    return np.zeros(n, np.uint8)


def make(root: Any, n: Any = 21, rows: Any = None, status: Any = None, dtype: Any = "float32", batch: Any = 5) -> Any:
    """A store of one slide with one encoder's features."""
    store = FeatureStore.create(root, Tiling())
    slide = store.find("a.svs-1") or write_slide(store, "a.svs-1", grid(n), ABOUT)
    writer = FeatureWriter(store, slide, ENCODER, HOW, dtype=dtype)
    rows = vectors(n) if rows is None else rows
    status = good(n) if status is None else status
    for start in range(writer.rows_done, n, batch):
        writer.write(rows[start : start + batch], status[start : start + batch])
    writer.finish({"seconds": 1.0})
    return store


@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 8, 9, 16, 21])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_what_is_read(tmp_path: Path, n: Any, dtype: Any) -> None:
    store = make(tmp_path, n, dtype=dtype)
    slide = store.slide("a.svs")
    assert slide.grid == grid(n)
    np.testing.assert_array_equal(slide.grid.tissue, grid(n).tissue)
    features = slide.features("timm:tiny")
    expected = vectors(n).astype(dtype)
    np.testing.assert_array_equal(features.numpy(), expected)
    np.testing.assert_array_equal(features.torch().numpy(), expected)
    np.testing.assert_array_equal(features.dask().compute(), expected)
    np.testing.assert_array_equal(features.array[2:5], expected[2:5])
    assert features.shape == (n, DIM)
    assert store.verify(deep=True) == []
    assert list((tmp_path / ".staging").iterdir()) == []


def test_plain_zarr_opens_it(tmp_path: Path) -> None:
    make(tmp_path)
    group: Any = zarr.open_group(tmp_path / "slides" / "a.svs-1.zarr", mode="r")
    np.testing.assert_array_equal(group["encoders/timm-tiny/features"][:], vectors())
    assert group["coords"][20].tolist() == [60, 20]


def test_bad_tiles_are_marked_nan_and_never_hidden(tmp_path: Path) -> None:
    rows, status = vectors(), good(21)
    status[3], rows[3] = UNREADABLE, 0.0  # whatever stood there is not kept
    rows[10, 2] = np.inf  # nobody said so, but it is not finite
    store = make(tmp_path, rows=rows, status=status)
    features = store.slide("a").features("timm:tiny")
    expected = good(21)
    expected[3], expected[10] = UNREADABLE, NONFINITE
    assert features.status.tolist() == expected.tolist()
    assert np.isnan(features.numpy()[[3, 10]]).all()
    assert features.numpy(good_only=True).shape == (19, DIM)
    assert features.torch(good_only=True).isfinite().all()
    assert (features.manifest["n_unreadable"], features.manifest["n_nonfinite"]) == (1, 1)
    assert store.verify(deep=True) == []


def test_a_value_too_large_for_float16_is_marked_not_stored_as_infinity(tmp_path: Path) -> None:
    rows = vectors()
    rows[4, 0] = 1e6
    features = make(tmp_path, rows=rows, dtype="float16").slide("a").features("timm:tiny")
    assert features.status.tolist() == [GOOD] * 4 + [NONFINITE] + [GOOD] * 16


def test_manifests_say_what_made_them(tmp_path: Path) -> None:
    slide = make(tmp_path).slide("a")
    for manifest in (slide.manifest, slide.features("timm:tiny").manifest):
        assert {"wsi-engine", "python", "torch", "zarr", "openslide-bin"} <= set(manifest["software"])
    assert slide.features("timm:tiny").manifest["encoder"] == ENCODER
    assert slide.features("timm:tiny").manifest["provenance"] == HOW


def test_several_encoders_share_one_grid(tmp_path: Path) -> None:
    store = make(tmp_path)
    other = FeatureWriter(store, store.slide("a"), ENCODER | {"name": "other", "dim": 2}, HOW, dtype="float16")
    other.write(np.ones((21, 2), np.float32), good(21))
    other.finish({})
    assert store.slide("a").encoders == ("other", "timm:tiny")
    assert store.verify(deep=True) == []


def test_features_are_not_there_before_they_are_finished(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path, Tiling())
    slide = write_slide(store, "a.svs-1", grid(), ABOUT)
    writer = FeatureWriter(store, slide, ENCODER, HOW, dtype="float32")
    writer.write(vectors(), good(21))
    assert not slide.encoders
    with pytest.raises(NotExtractedError, match="there are: none yet"):
        slide.features("timm:tiny")
    writer.finish({})
    assert slide.encoders == ("timm:tiny",)


@pytest.mark.parametrize("rows", [0, 3, 8, 15, 16, 20, 21])
def test_an_interrupted_writer_goes_on_behind_the_last_whole_shard(tmp_path: Path, rows: Any) -> None:
    store = FeatureStore.create(tmp_path, Tiling())
    slide = write_slide(store, "a.svs-1", grid(), ABOUT)
    status = good(21)
    status[6] = UNREADABLE
    first = FeatureWriter(store, slide, ENCODER, HOW, dtype="float32")
    first.write(vectors()[:rows], status[:rows])
    del first  # as a kill would: nothing is told
    second = FeatureWriter(store, slide, ENCODER, HOW, dtype="float32")
    assert second.rows_done == (rows if rows == 21 else rows // SHARD * SHARD)
    second.write(vectors()[second.rows_done :], status[second.rows_done :])
    second.finish({})
    expected = vectors()
    expected[6] = np.nan
    np.testing.assert_array_equal(slide.features("timm:tiny").numpy(), expected)
    assert slide.features("timm:tiny").status.tolist() == status.tolist()
    assert store.verify(deep=True) == []


def staged(root: Any) -> Any:
    (folder,) = (root / ".staging").iterdir()
    return folder


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "journal"])
def test_a_staged_shard_that_is_damaged_is_done_again(tmp_path: Path, damage: Any) -> None:
    store = FeatureStore.create(tmp_path, Tiling())
    slide = write_slide(store, "a.svs-1", grid(), ABOUT)
    FeatureWriter(store, slide, ENCODER, HOW, dtype="float32").write(vectors()[:16], good(16))
    shard = staged(tmp_path) / "group" / "features" / "c" / "1" / "0"
    if damage == "flip":
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 4
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "delete":
        shard.unlink()
    else:
        (staged(tmp_path) / "journal.json").write_text('{"facts": ')
    writer = FeatureWriter(store, slide, ENCODER, HOW, dtype="float32")
    assert writer.rows_done == (0 if damage == "journal" else SHARD)
    writer.write(vectors()[writer.rows_done :], good(21 - writer.rows_done))
    writer.finish({})
    np.testing.assert_array_equal(slide.features("timm:tiny").numpy(), vectors())


@pytest.mark.parametrize(
    ("encoder", "how", "dtype"),
    [
        (ENCODER | {"weights_sha256": "cd" * 32}, HOW, "float32"),
        (ENCODER, {"precision": "bf16"}, "float32"),
        (ENCODER, HOW, "float16"),
    ],
)
def test_work_of_another_kind_is_never_continued(tmp_path: Path, encoder: Any, how: Any, dtype: Any) -> None:
    store = FeatureStore.create(tmp_path, Tiling())
    slide = write_slide(store, "a.svs-1", grid(), ABOUT)
    FeatureWriter(store, slide, ENCODER, HOW, dtype="float32").write(vectors()[:16], good(16))
    assert FeatureWriter(store, slide, encoder, how, dtype=dtype).rows_done == 0


def test_rows_of_one_file_are_never_continued_with_another_files(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path, Tiling())
    slide = write_slide(store, "a.svs-1", grid(), ABOUT)
    FeatureWriter(store, slide, ENCODER, HOW, dtype="float32").write(vectors()[:16], good(16))
    replace_slide(store, "a.svs-1")
    other = ABOUT | {"slide": {"key": "a.svs-1", "relpath": "a.svs", "file": "another"}}
    again = write_slide(store, "a.svs-1", grid(), other)  # the same grid on another file
    assert FeatureWriter(store, again, ENCODER, HOW, dtype="float32").rows_done == 0


def test_features_of_another_encoder_under_the_same_name_are_refused(tmp_path: Path) -> None:
    slide = make(tmp_path).slide("a")
    assert check_encoder(slide, ENCODER)
    assert not check_encoder(slide, ENCODER | {"name": "new"})
    with pytest.raises(EncoderChangedError, match=r"other weights_sha256.*--name"):
        check_encoder(slide, ENCODER | {"weights_sha256": "cd" * 32})


def test_another_tiling_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UsageError, match=r"mpp 0\.5 there, 1\.0 asked"):
        FeatureStore.create(tmp_path, Tiling(mpp=1.0))


def test_two_writers_at_once_leave_one_good_result(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path, Tiling())
    slide = write_slide(store, "a.svs-1", grid(), ABOUT)
    assert write_slide(store, "a.svs-1", grid(), ABOUT).grid == slide.grid
    one = FeatureWriter(store, slide, ENCODER, HOW, dtype="float32")
    one.write(vectors(), good(21))
    two = FeatureWriter(store, slide, ENCODER | {"note": 1}, HOW, dtype="float32")  # another journal: not taken over
    two.write(vectors(), good(21))
    two.finish({})
    one = FeatureWriter(store, slide, ENCODER, HOW, dtype="float32")
    one.write(vectors(), good(21))
    one.finish({})
    assert store.verify(deep=True) == []


def test_a_writer_whose_staging_was_taken_over_cannot_publish(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path, Tiling())
    slide = write_slide(store, "a.svs-1", grid(), ABOUT)
    slow = FeatureWriter(store, slide, ENCODER, HOW, dtype="float32")
    slow.write(vectors()[:16], good(16))
    fast = FeatureWriter(store, slide, ENCODER, HOW, dtype="float32")
    assert fast.rows_done == 16
    with pytest.raises((StoreCorruptError, OSError)):
        slow.write(vectors()[16:], good(5))
        slow.finish({})
    fast.write(vectors()[16:], good(5))
    fast.finish({})
    np.testing.assert_array_equal(slide.features("timm:tiny").numpy(), vectors())
    assert store.verify(deep=True) == []


class TestDamage:
    def files(self, store: Any) -> Any:
        return sorted(path for path in store.path_of("a.svs-1").rglob("*") if path.is_file())

    def test_every_flipped_byte_is_found_and_never_read_as_data(self, tmp_path: Path) -> None:
        store = make(tmp_path)
        rng = np.random.default_rng(3)
        for path in self.files(store):
            original = path.read_bytes()
            for place in {0, len(original) - 1, *rng.integers(0, len(original), 6).tolist()}:
                data = bytearray(original)
                data[place] ^= 1 << int(rng.integers(0, 8))
                path.write_bytes(data)
                assert FeatureStore(tmp_path).verify(deep=True), f"{path} byte {place}"
                try:
                    slide = FeatureStore(tmp_path).slide("a")
                    read = slide.features("timm:tiny").numpy(), slide.grid.xy
                except (StoreCorruptError, NotExtractedError):
                    pass
                else:
                    np.testing.assert_array_equal(read[0], vectors())
                    np.testing.assert_array_equal(read[1], grid().xy)
            path.write_bytes(original)
        assert FeatureStore(tmp_path).verify(deep=True) == []

    @pytest.mark.parametrize("deep", [False, True])
    def test_every_missing_or_shortened_file_is_found(self, tmp_path: Path, deep: Any) -> None:
        store = make(tmp_path)
        for path in self.files(store):
            original = path.read_bytes()
            for content in (None, b"", original[: len(original) // 2], original[:-1]):
                path.unlink() if content is None else path.write_bytes(content)
                problems = FeatureStore(tmp_path).verify(deep=deep)
                if path == store.path_of("a.svs-1") / "encoders" / "timm-tiny" / "zarr.json":
                    assert "timm-tiny" in {problem.part for problem in problems}
                assert problems, f"{path} as {content!r}"
                path.write_bytes(original)

    def reseal(self, folder: Path, **changes: Any) -> None:
        """A manifest that agrees with itself and the files, but not with the rest of the store."""
        manifest = arrays.manifest_of(folder)
        assert manifest is not None
        arrays.seal(folder, manifest | {"files": arrays.file_facts(folder)} | changes)

    def test_features_of_another_grid_are_found(self, tmp_path: Path) -> None:
        store = make(tmp_path)
        self.reseal(store.slide("a").features("timm:tiny").path, grid_fingerprint="0" * 32)
        assert "features belong to another grid" in [p.what for p in store.verify()]

    def test_a_grid_that_is_not_the_one_promised_is_found_and_never_used(self, tmp_path: Path) -> None:
        store = make(tmp_path)
        path = store.path_of("a.svs-1")
        coords = zarr.open_array(path / "coords", mode="r+")
        coords[0:8] = np.zeros((8, 2), np.int32)
        manifest = arrays.manifest_of(path)
        assert manifest is not None
        facts = manifest["arrays"] | {"coords": arrays.array_facts(coords)}
        self.reseal(
            path, arrays=facts, files={k: v for k, v in arrays.file_facts(path).items() if "encoders/timm" not in k}
        )
        assert any("grid on disk is not the one" in p.what for p in store.verify(deep=True))
        with pytest.raises(StoreCorruptError, match="grid on disk is not the one"):
            _ = store.slide("a").grid

    def test_a_nan_that_status_does_not_confess_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = make(tmp_path)
        features = store.slide("a").features("timm:tiny")
        facts = dict(features.manifest["arrays"])
        array = zarr.open_array(features.path / "features", mode="r+")
        array[0:8] = np.full((8, DIM), np.nan, np.float32)
        facts["features"] = arrays.array_facts(array)  # even a manifest that agrees with it does not help
        manifest = features.manifest | {"arrays": facts, "files": arrays.file_facts(features.path)}
        arrays.seal(features.path, manifest)
        assert [p.what for p in store.verify(deep=True)] == ["vectors are not finite exactly where status says so"]


class TestFaults:
    def test_no_space_at_any_moment_leaves_nothing_half_done(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every write, sync and rename fails once, in turn; then the same work is done again."""
        for moment in range(1, 400):
            root = tmp_path / str(moment)
            store = FeatureStore.create(root, Tiling())
            with monkeypatch.context() as patch:
                calls = fail_at(patch, moment)
                try:
                    make(root)
                except DiskFullError as error:
                    assert str(root) in str(error)  # noqa: PT017 - most moments raise, the last does not
                else:
                    assert calls[0] < moment
                    break
            assert store.verify(deep=True) == [], moment
            make(root)
            assert store.verify(deep=True) == []
            np.testing.assert_array_equal(store.slide("a").features("timm:tiny").numpy(), vectors())
            shutil.rmtree(root)
        else:
            pytest.fail("the work never came through")
        assert moment > 20

    def test_a_full_disk(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("this user may not mount a small disk")
        try:
            (disk / "ballast").write_bytes(b"x" * 150_000)
            with pytest.raises(DiskFullError, match="no space left"):
                make(disk / "out")
                make_many(disk / "out")
            (disk / "ballast").unlink()
            store = make(disk / "out") if not FeatureStore(disk / "out").keys else FeatureStore(disk / "out")
            assert store.verify(deep=True) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def test_a_folder_that_cannot_be_written_is_said_at_the_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check_writable(tmp_path / "new" / "out")
        assert list((tmp_path / "new" / "out").iterdir()) == []
        (tmp_path / "file").touch()
        with pytest.raises(OutputNotWritableError, match="choose another OUT"):
            check_writable(tmp_path / "file" / "out")

        def cannot(self: Any, target: Any) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(Path, "rename", cannot)
        with pytest.raises(OutputNotWritableError, match="Operation not permitted"):
            check_writable(tmp_path)


def make_many(root: Any) -> None:
    for seed in range(200):
        store = FeatureStore(root)
        write_slide(store, f"b{seed}", grid(21, seed), ABOUT | {"slide": {"key": f"b{seed}", "relpath": "b"}})


def fail_at(patch: Any, moment: Any) -> Any:
    """Make the moment-th write, sync or rename fail with 'no space left'."""
    calls, lock = [0], threading.Lock()

    def failing(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                calls[0] += 1
                mine = calls[0]
            if mine == moment:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    patch.setattr(zarr.storage._local, "_put", failing(zarr.storage._local._put))
    patch.setattr(os, "fsync", failing(lambda descriptor: None))
    patch.setattr(Path, "write_bytes", failing(Path.write_bytes))
    patch.setattr(Path, "rename", failing(Path.rename))
    patch.setattr(Path, "replace", failing(Path.replace))
    return calls


class TestHousekeeping:
    def test_a_replaced_slide_is_kept_until_it_is_collected(self, tmp_path: Path) -> None:
        store = make(tmp_path)
        aside = replace_slide(store, "a.svs-1")
        assert store.keys == ()
        assert (aside / "encoders" / "timm-tiny" / "zarr.json").is_file()
        make(tmp_path)
        assert collect_garbage(store, staging=True) > 1000
        assert not aside.exists()
        assert store.verify(deep=True) == []

    def test_staged_work_is_kept_unless_asked(self, tmp_path: Path) -> None:
        store = FeatureStore.create(tmp_path, Tiling())
        slide = write_slide(store, "a.svs-1", grid(), ABOUT)
        FeatureWriter(store, slide, ENCODER, HOW, dtype="float32").write(vectors()[:16], good(16))
        (tmp_path / ".staging" / "half-made-grid").mkdir()
        assert sweep(store) == 0  # too young to be left over
        os.utime(tmp_path / ".staging" / "half-made-grid", (1, 1))
        sweep(store)
        assert FeatureWriter(store, slide, ENCODER, HOW, dtype="float32").rows_done == 16
        collect_garbage(store, staging=True)
        assert FeatureWriter(store, slide, ENCODER, HOW, dtype="float32").rows_done == 0

    def test_nothing_is_collected_while_somebody_works(self, tmp_path: Path) -> None:
        store = make(tmp_path)
        with Lease(tmp_path / ".locks", "a.svs-1"), pytest.raises(SlideBusyError):
            collect_garbage(store, staging=True)

    def test_slides_are_found_by_key_path_name_and_stem(self, tmp_path: Path) -> None:
        store = FeatureStore.create(tmp_path, Tiling())
        for path in ("x/a.svs", "y/a.svs", "y/b.tif"):
            key = writing_key(path)
            write_slide(store, key, grid(), ABOUT | {"slide": {"key": key, "relpath": path}})
        for name in ("y/b.tif", "b.tif", "b", writing_key("y/b.tif")):
            assert store.slide(name).relpath == "y/b.tif"
        assert store.slide("x/a.svs").relpath == "x/a.svs"
        with pytest.raises(NotExtractedError, match=r"'a' is ambiguous: x/a\.svs, y/a\.svs"):
            store.slide("a")
        with pytest.raises(NotExtractedError, match="holds no slide 'c'"):
            store.slide("c")
        assert [slide.relpath for slide in store] == ["x/a.svs", "y/a.svs", "y/b.tif"]

    def test_a_folder_that_is_no_store_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(NotExtractedError, match="make one with wsi-extract"):
            FeatureStore(tmp_path)
        (tmp_path / "wsi-store.json").write_text("{}")
        with pytest.raises(StoreFormatError, match="not the description"):
            FeatureStore(tmp_path)
        (tmp_path / "wsi-store.json").write_text('{"format": "wsi-store", "version": 99, "tiling": {}}')
        with pytest.raises(StoreFormatError, match="version 99; this release reads version 1"):
            FeatureStore(tmp_path)


def writing_key(path: Any) -> Any:
    from features.keys import slide_key

    return slide_key(path)


class StoreMachine(RuleBasedStateMachine):
    """Any order of beginning, writing, dying, finishing, damaging what is staged, and collecting garbage."""

    writer: Any

    @initialize(n=st.integers(0, 40))
    def begin(self, n: Any) -> None:
        import tempfile

        self.root = Path(tempfile.mkdtemp())
        self.n = n
        self.store = FeatureStore.create(self.root, Tiling())
        self.slide = write_slide(self.store, "a.svs-1", grid(n), ABOUT)
        self.writer = None
        self.rows = 0

    @precondition(lambda self: self.writer is None)
    @rule()
    def open(self) -> None:
        self.writer = FeatureWriter(self.store, self.slide, ENCODER, HOW, dtype="float32")
        self.rows = self.writer.rows_done

    @precondition(lambda self: self.writer is not None and self.rows < self.n)
    @rule(count=st.integers(1, 20))
    def write(self, count: Any) -> None:
        stop = min(self.n, self.rows + count)
        self.writer.write(vectors(self.n)[self.rows : stop], good(stop - self.rows))
        self.rows = stop

    @precondition(lambda self: self.writer is not None)
    @rule()
    def die(self) -> None:
        self.writer = None

    @precondition(lambda self: self.writer is not None and self.rows == self.n)
    @rule()
    def finish(self) -> None:
        self.writer.finish({})
        self.writer = None

    @precondition(lambda self: self.writer is None)
    @rule(place=st.integers(0, 10_000), how=st.sampled_from(["flip", "cut", "delete"]))
    def damage_staging(self, place: Any, how: Any) -> None:
        files = sorted(p for p in (self.root / ".staging").rglob("*") if p.is_file())
        if files:
            path = files[place % len(files)]
            data = bytearray(path.read_bytes())
            if how == "delete" or not data:
                path.unlink()
            elif how == "cut":
                path.write_bytes(data[: place % len(data)])
            else:
                data[place % len(data)] ^= 1 << place % 8
                path.write_bytes(data)

    @precondition(lambda self: self.writer is None)
    @rule()
    def collect(self) -> None:
        collect_garbage(self.store, staging=True)

    @invariant()
    def whole_or_absent(self) -> None:
        if hasattr(self, "store"):
            assert self.store.verify(deep=True) == []
            if check_encoder(self.slide, ENCODER):
                np.testing.assert_array_equal(self.slide.features("timm:tiny").numpy(), vectors(self.n))

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


def test_any_history_leaves_the_store_whole(small_shards: Any) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=25, stateful_step_count=12, deadline=None))
