"""TiffReader: every way tiles are coded, against OpenSlide, and what it does with files it cannot vouch for."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from tests.wsi.test_readers import corrupt_one_tile, picture, write_tiff
from wsi.errors import NotASlideError, PixelsDifferError, ReadError
from wsi.phantom import Phantom, PhantomSpec, write_svs
from wsi.readers import open_reader
from wsi.readers._tiles import Coding, may_lack_data
from wsi.readers.openslide import OpenSlideReader
from wsi.readers.tiff import TiffReader, _File

SVS = ("jpeg", "jpeg-rgb", "jpeg2000", "jpeg2000-rgb")
PLAIN = ("plain-jpeg", "none", "lzw", "deflate", "zstd", "lzw-predictor", "deflate-predictor", "zstd-predictor")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A slide of each way of coding, 700 x 500 pixels, so that the last tiles stick out."""
    folder = tmp_path_factory.mktemp("slides")
    phantom = Phantom(PhantomSpec(700, 500, seed=4, tissue_fraction=0.5))
    for codec in SVS:
        write_svs(folder / codec, phantom, codec=codec, tile_px=128, levels=(1, 2, 4))  # type: ignore[arg-type]
    for name in PLAIN:
        compression, _, predictor = name.removeprefix("plain-").partition("-")
        pixels = phantom.render(0, 0, 700, 500)
        with tifffile.TiffWriter(folder / name) as tiff:
            for step in (1, 2, 4):
                tiff.write(
                    pixels[::step, ::step], tile=(128, 112), photometric="rgb", compression=compression,
                    predictor=bool(predictor), subfiletype=int(step > 1), metadata=None,
                )  # fmt: skip
    return {name: (TiffReader(folder / name), OpenSlideReader(folder / name)) for name in (*SVS, *PLAIN)}


def assert_same(ours: Any, theirs: Any, tolerance: int = 0) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max(initial=0) <= tolerance


@given(
    name=st.sampled_from((*SVS, *PLAIN)),
    level=st.integers(0, 2),
    place=st.tuples(st.integers(-150, 800), st.integers(-150, 600)),
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
)
def test_any_region_is_what_openslide_shows(slides: Any, name: str, level: int, place: Any, size: Any) -> None:
    ours, theirs = slides[name]
    assert theirs.native[level]
    tolerance = int("jpeg2000" in name)  # another OpenJPEG may round differently
    assert_same(ours.read(level, *place, *size), theirs.read(level, *place, *size), tolerance)


@pytest.mark.parametrize("name", [*SVS, *PLAIN])
def test_what_the_slide_is_comes_from_openslide(slides: Any, name: str) -> None:
    ours, theirs = slides[name]
    assert ours.properties == theirs.properties
    assert (ours.sizes, ours.bounds, ours.background) == (theirs.sizes, theirs.bounds, theirs.background)
    assert open_reader(ours.path).name == "tiff"


def test_aperio_rgb_is_not_taken_for_ycbcr(slides: Any) -> None:
    """Decoded as YCbCr it would be off by tens of grey levels; the truth is the phantom, not another decoder."""
    truth = Phantom(PhantomSpec(700, 500, seed=4, tissue_fraction=0.5)).render(0, 0, 700, 500).astype(int)
    for name in SVS:
        assert np.abs(slides[name][0].read(0, 0, 0, 700, 500) - truth).mean() < 6, name


def test_levels_openslide_would_interpolate_are_read_at_any_offset(tmp_path: Path) -> None:
    pixels = picture(701, 501)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for level in (pixels, pixels[:500:2, :700:2]):
            tiff.write(level, tile=(128, 128), photometric="rgb", compression="deflate", metadata=None,
                       subfiletype=int(level is not pixels))  # fmt: skip
    reader = open_reader(tmp_path / "a.tif")
    assert not OpenSlideReader(tmp_path / "a.tif").native[1]
    assert reader.native == (True, True)
    np.testing.assert_array_equal(reader.read(1, 33, 57, 203, 150), pixels[:500:2, :700:2][57:207, 33:236])


def test_reduced_pages_below_the_first_are_levels_of_an_ome_tiff(tmp_path: Path) -> None:
    pixels = picture()
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        options: Any = {"tile": (128, 128), "photometric": "rgb", "compression": "zstd"}
        tiff.write(pixels, subifds=2, **options)
        for step in (2, 4):
            tiff.write(pixels[::step, ::step], subfiletype=1, **options)
    reader = open_reader(tmp_path / "a.ome.tif")
    assert OpenSlideReader(tmp_path / "a.ome.tif").sizes == ((700, 500),)
    assert (reader.name, reader.sizes) == ("tiff", ((700, 500), (350, 250), (175, 125)))
    np.testing.assert_array_equal(reader.read(2, 11, 13, 140, 100), pixels[::4, ::4][13:113, 11:151])


def drop_tile(path: Path, index: int) -> None:
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page: Any = tiff.pages[0]
        counts = list(page.tags["TileByteCounts"].value)
        counts[index] = 0
        page.tags["TileByteCounts"].overwrite(counts)


def test_a_missing_tile_is_background(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(), compression="jpeg")
    drop_tile(path, 7)
    ours, theirs = TiffReader(path), OpenSlideReader(path)
    assert ours.read(0, 128, 128, 128, 128).min() == 255
    assert_same(ours.read(0, 60, 60, 300, 300), theirs.read(0, 60, 60, 300, 300))


def test_a_file_without_any_tile_is_all_background(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(128, 128), compression="jpeg")
    drop_tile(path, 0)
    assert TiffReader(path).read(0, 0, 0, 128, 128).min() == 255
    assert TiffReader(path).bounds is None


class TestDamage:
    @pytest.mark.parametrize("compression", ["jpeg", "deflate", "zstd", "lzw"])
    def test_a_corrupt_tile_is_an_error_there_and_nowhere_else(self, tmp_path: Path, compression: str) -> None:
        path = corrupt_one_tile(write_tiff(tmp_path / "a.tif", picture(), compression=compression))
        reader = open_reader(path)
        assert reader.name == "tiff"
        good = reader.read(0, 0, 0, 128, 128)
        for _ in range(3):
            with pytest.raises(ReadError, match=r"a\.tif: level 0, 50 x 50 .* at \(270, 140\) .*: tile \(2, 1\): "):
                reader.read(0, 270, 140, 50, 50)
            np.testing.assert_array_equal(reader.read(0, 0, 0, 128, 128), good)

    @pytest.mark.parametrize("lost", [0.8, 0.5, 0.2, 0.02])
    def test_a_jpeg_tile_whose_end_is_lost_is_an_error(self, tmp_path: Path, lost: float) -> None:
        path = write_tiff(tmp_path / "a.tif", picture(), compression="jpeg")
        reader = TiffReader(path)
        offset, count = reader._levels[0].offsets[7], reader._levels[0].counts[7]
        with path.open("r+b") as file:
            file.seek(offset + int(count * (1 - lost)))
            file.write(bytes(offset + count - file.tell()))
        with pytest.raises(ReadError, match=r"tile \(1, 1\): its JPEG data have no end"):
            reader.read(0, 140, 140, 50, 50)
        reader.read(0, 0, 0, 128, 128)

    @pytest.mark.parametrize("level", [0, 1])
    def test_a_jpeg_tile_that_holds_less_than_its_size_is_an_error(self, tmp_path: Path, level: int) -> None:
        """The decoder fills the rest with grey and keeps the warning to itself; OpenSlide is asked, at any level."""
        path = write_tiff(tmp_path / "a.tif", picture(701, 501), levels=2, compression="jpeg")
        assert OpenSlideReader(path).native == (True, False)
        reader = TiffReader(path)
        about = reader._levels[level]
        index = about.columns + 1
        end = about.offsets[index] + about.counts[index] - 2
        middle = end - about.counts[index] // 2
        data = bytearray(path.read_bytes())
        data[middle:end] = b"\xff\xd9".ljust(end - middle, b"\0")
        path.write_bytes(data)
        with pytest.raises(ReadError, match=r"tile \(1, 1\): .* JPEG data: premature end"):
            reader.read(level, 140, 140, 50, 50)
        reader.read(level, 0, 0, 128, 128)

    def test_plain_grey_that_was_scanned_is_read(self, tmp_path: Path) -> None:
        pixels = picture()
        pixels[100:300, 100:300] = 128
        reader = TiffReader(write_tiff(tmp_path / "a.tif", pixels, compression="jpeg"))
        assert_same(reader.read(0, 128, 128, 128, 128), np.full((128, 128, 3), 128))

    def test_a_file_that_became_shorter_is_an_error(self, tmp_path: Path) -> None:
        path = write_tiff(tmp_path / "a.tif", picture(), compression="none")
        reader = TiffReader(path)
        os.truncate(path, reader._levels[0].offsets[7] + 100)
        with pytest.raises(ReadError, match=r"only 100 of its 49152 bytes"):
            reader.read(0, 140, 140, 50, 50)

    def test_an_error_of_one_thread_is_not_an_error_of_the_others(self, tmp_path: Path) -> None:
        reader = TiffReader(corrupt_one_tile(write_tiff(tmp_path / "a.tif", picture(), compression="jpeg")))
        good = reader.read(0, 300, 300, 100, 100)

        def read(index: Any) -> None:
            if index % 3 == 0:
                with pytest.raises(ReadError, match=r"tile \(2, 1\)"):
                    reader.read(0, 270, 140, 50, 50)
            else:
                np.testing.assert_array_equal(reader.read(0, 300, 300, 100, 100), good)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(200)))


RESTARTS = b"\xff\xdd\x00\x04\x00\x08"


@pytest.mark.parametrize(
    ("data", "tables", "lacks"),
    [(b"", None, False), (b"", b"", False), (RESTARTS, None, True), (RESTARTS, b"", True), (b"", RESTARTS, True)],
)
def test_grey_within_a_tile_is_a_lack_only_where_decoding_takes_up_again(data: bytes, tables: Any, lacks: bool) -> None:
    tile = np.full((64, 64, 3), 200, np.uint8)
    tile[16:32, 24:40] = 128
    assert may_lack_data(tile, data, tables) is lacks
    tile[56:, 56:] = 128  # up to the end it always is one
    assert may_lack_data(tile, data, tables)


class TestDeclining:
    def test_wrong_pixels_are_declined_and_the_reason_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_tiff(tmp_path / "a.tif", picture(), compression="jpeg")
        right = Coding.decode
        monkeypatch.setattr(Coding, "decode", lambda *args: right(*args) ^ 1)
        with pytest.raises(PixelsDifferError, match=r"a\.tif: level 0, tile at .* differs from OpenSlide's by 1 grey"):
            TiffReader(path)
        reader = open_reader(path)
        assert reader.name == "openslide"
        assert "differs from OpenSlide's by 1" in str(reader.reason)

    def test_tiles_only_openslide_can_read_are_declined(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_tiff(tmp_path / "a.tif", picture(), compression="jpeg")

        def fail(*_: Any) -> None:
            raise ValueError("no")

        monkeypatch.setattr(Coding, "decode", fail)
        with pytest.raises(PixelsDifferError, match="OpenSlide reads them"):
            TiffReader(path)

    @pytest.mark.parametrize("coarse", [1, 2])
    def test_a_level_that_shows_something_else_is_found(self, tmp_path: Path, coarse: int, slides: Any) -> None:
        """Coded like the first and of the right size, so that only its pixels tell."""
        reader = TiffReader(slides["jpeg"][0].path)
        levels = list(reader._levels)
        index = len(levels[coarse].counts) - 1
        levels[coarse] = type(levels[coarse])(
            **{
                **vars(levels[coarse]),
                "offsets": levels[0].offsets[: index + 1],
                "counts": levels[0].counts[: index + 1],
            }
        )
        reader._levels = tuple(levels)
        with pytest.raises(PixelsDifferError, match=f"level {coarse}"):
            reader._compare_with_openslide()

    def test_not_eligible_is_no_reason(self, tmp_path: Path) -> None:
        rgba = np.dstack([picture(), np.full((500, 700), 255, np.uint8)])
        tifffile.imwrite(tmp_path / "a.tif", rgba, tile=(128, 128), photometric="rgb", extrasamples=["unassalpha"])
        with pytest.raises(NotASlideError, match="not 8-bit colour"):
            TiffReader(tmp_path / "a.tif")
        reader = open_reader(tmp_path / "a.tif")
        assert (reader.name, reader.reason) == ("openslide", None)

    def test_aperio_levels_with_missing_tiles_which_openslide_fills(self, tmp_path: Path) -> None:
        path = tmp_path / "a.svs"
        write_svs(path, PhantomSpec(700, 500, seed=4), tile_px=128, levels=(1, 2))
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tag: Any = tiff.pages[2].tags["TileByteCounts"]  # type: ignore[union-attr]
            tag.overwrite([0, *tag.value[1:]])
        with pytest.raises(NotASlideError, match="missing tiles"):
            TiffReader(path)
        assert open_reader(path).name == "openslide"

    def test_strips_and_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.tif").write_text("nothing")
        with pytest.raises(NotASlideError, match="no format OpenSlide knows"):
            TiffReader(tmp_path / "a.tif")


def test_neighbours_share_a_tile_and_threads_do_not_decode_it_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = TiffReader(write_tiff(tmp_path / "a.tif", picture(), compression="jpeg"))
    seen: list[bytes] = []
    right, gate = imagecodecs.jpeg8_decode, threading.Barrier(4)

    def noting(data: bytes, **options: Any) -> Any:
        seen.append(data)
        return right(data, **options)

    def read(box: Any) -> Any:
        gate.wait()
        return reader.read(0, *box)

    monkeypatch.setattr(imagecodecs, "jpeg8_decode", noting)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, [(0, 0, 100, 100), (20, 20, 100, 100), (100, 100, 28, 28), (0, 64, 64, 64)] * 5))
    assert len(seen) == 1


def test_the_tiles_kept_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi.readers.tiff._CACHE_BYTES", 3 * 128 * 128 * 3)
    reader = TiffReader(write_tiff(tmp_path / "a.tif", picture(), compression="deflate"))
    np.testing.assert_array_equal(reader.read(0, 0, 0, 700, 500), picture())
    file: _File = reader._file()
    assert len(file._tiles) == 3
    assert file._bytes == 3 * 128 * 128 * 3


def test_closing_while_threads_read_gives_no_wrong_pixels(tmp_path: Path) -> None:
    reader = TiffReader(write_tiff(tmp_path / "a.tif", picture(), compression="deflate"))

    def read(index: int) -> bool:
        if index % 7 == 0:
            reader.close()
        x, y = (37 * index) % 600, (53 * index) % 400
        return np.array_equal(reader.read(0, x, y, 90, 80), picture()[y : y + 80, x : x + 90])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(300)))


def test_a_fork_in_the_middle_of_reading_neither_hangs_nor_shares(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", picture(), compression="jpeg")
    code = textwrap.dedent("""
        import os, sys, threading, numpy as np
        from wsi.readers import open_reader
        reader = open_reader(sys.argv[1], "tiff")
        whole = reader.read(0, 0, 0, 700, 500)
        parent = reader._file()
        going = True
        def busy():
            while going:
                reader._file()._tiles.clear()
                reader.read(0, 0, 0, 700, 500)
        threads = [threading.Thread(target=busy) for _ in range(2)]
        [thread.start() for thread in threads]
        children = []
        for seed in range(6):
            pid = os.fork()
            if not pid:
                rng = np.random.default_rng(seed)
                good = True
                for _ in range(40):
                    x, y = int(rng.integers(0, 600)), int(rng.integers(0, 400))
                    good &= np.array_equal(reader.read(0, x, y, 90, 80), whole[y:y + 80, x:x + 90])
                good &= reader._file() is not parent
                os._exit(0 if good else 1)
            children.append(pid)
        codes = [os.waitpid(pid, 0)[1] for pid in children]
        going = False
        [thread.join() for thread in threads]
        sys.exit(any(codes))
    """)
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.tif")], cwd=root, timeout=120, check=False)
    assert run.returncode == 0


def test_descriptors_do_not_leak_also_when_declined_or_damaged(tmp_path: Path) -> None:
    good = write_tiff(tmp_path / "a.tif", picture(), compression="jpeg")
    bad = corrupt_one_tile(write_tiff(tmp_path / "b.tif", picture(), compression="jpeg"))
    tifffile.imwrite(tmp_path / "c.tif", picture()[..., 0], tile=(128, 128))
    fds = Path("/proc/self/fd")
    if not fds.exists():
        pytest.skip("needs /proc")

    def use() -> None:
        TiffReader(good).read(0, 0, 0, 64, 64)  # not closed
        reader = TiffReader(bad)
        with pytest.raises(ReadError):
            reader.read(0, 270, 140, 50, 50)
        reader.close()
        with pytest.raises(NotASlideError):
            TiffReader(tmp_path / "c.tif")

    use()
    gc.collect()
    before = len(list(fds.iterdir()))
    for _ in range(20):
        use()
    gc.collect()
    assert len(list(fds.iterdir())) <= before


def test_importing_wsi_loads_no_codecs() -> None:
    code = "import sys, wsi; sys.exit('tifffile' in sys.modules or 'imagecodecs' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.shared
class TestRealSlides:
    @pytest.mark.parametrize(
        ("name", "tolerance"),
        [
            ("cmu-1-small-region.svs", 0),
            ("1065626.svs", 1),
            ("philips_cmu1.tiff", 0),
            ("glas_composite_train.tif", 0),
            ("edge-cases/boxes.tiff", 0),
            ("edge-cases/yb10kx5k.zstd.tiff", 0),
        ],
    )
    def test_every_level_is_what_openslide_shows(self, shared: Path, name: str, tolerance: int) -> None:
        ours, theirs = TiffReader(shared / "slides" / name), OpenSlideReader(shared / "slides" / name)
        assert ours.max_difference == tolerance
        assert open_reader(shared / "slides" / name, "tiff").name == "tiff"
        chosen = open_reader(shared / "slides" / name)
        assert chosen.name == ("openslide" if tolerance else "tiff")
        assert ("by 1 grey level" in (chosen.reason or "")) == bool(tolerance)
        assert ours.sizes == theirs.sizes
        rng = np.random.default_rng(0)
        for level, (width, height) in enumerate(ours.sizes):
            boxes = [(0, 0, min(width, 1000), min(height, 1000))]
            if theirs.native[level]:
                boxes += [(width - 200, height - 150, 400, 300), (-50, height // 2, 200, 200)]
                boxes += [(int(rng.integers(width)), int(rng.integers(height)), 300, 200) for _ in range(8)]
            for box in boxes:
                assert_same(ours.read(level, *box), theirs.read(level, *box), tolerance)

    @pytest.mark.parametrize("name", ["leica_cmu1.scn", "fluorescence-dapi.ndpi", "dicom-camelyon-jpeg.dcm"])
    def test_formats_that_are_more_than_tiles_stay_with_openslide(self, shared: Path, name: str) -> None:
        with pytest.raises(NotASlideError, match="read directly: aperio"):
            TiffReader(shared / "slides" / name)
        assert open_reader(shared / "slides" / name).reason is None
