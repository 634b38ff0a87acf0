"""Readers: one contract that every reader keeps, on the same pixels, and what each does beyond it."""

import io
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tifffile
from PIL import Image

from wsi.errors import (
    EmptyFileError,
    IncompleteSlideError,
    NotASlideError,
    ReadError,
    SlideNotFoundError,
    TruncatedSlideError,
    UnsupportedPixelError,
    UsageError,
)
from wsi.readers import ArrayReader, Reader, open_reader
from wsi.readers.base import flatten


def picture(width: Any = 700, height: Any = 500, seed: Any = 0) -> Any:
    """Smooth colours and noise: neighbours differ, so a shift by one pixel shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x % 256, y % 256, (x + 2 * y) % 256], axis=-1)
    return np.clip(base + rng.integers(-20, 20, base.shape), 0, 255).astype(np.uint8)


def write_tiff(path: Any, pixels: Any, levels: Any = 1, mpp: Any = 0.5, tile: Any = (128, 128), **options: Any) -> Any:
    """A tiled pyramidal TIFF whose pixels are kept exactly; level n is every 2^n-th pixel."""
    resolution = (10_000 / mpp, 10_000 / mpp)
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            tiff.write(
                pixels[:: 2**level, :: 2**level],
                tile=tile,
                photometric="rgb",
                compression=options.get("compression", "deflate"),
                resolution=resolution,
                resolutionunit="centimeter",
                subfiletype=1 if level else 0,
                metadata=None,
            )
    return path


def tiff_reader(folder: Any) -> Any:
    return open_reader(write_tiff(folder / "a.tif", picture(), levels=2), "tiff")


def openslide_reader(folder: Any) -> Any:
    return open_reader(write_tiff(folder / "a.tif", picture(), levels=2), "openslide")


def tiffslide_reader(folder: Any) -> Any:
    return open_reader(write_tiff(folder / "a.tif", picture(), levels=2), "tiffslide")


def memory_reader(folder: Any) -> Any:
    write_tiff(folder / "a.tif", picture(), levels=2)
    address = f"memory://{folder.name}/a.tif"
    with fsspec.open(address, "wb") as file:
        file.write((folder / "a.tif").read_bytes())
    return open_reader(address)


def picture_reader(folder: Any) -> Any:
    Image.fromarray(picture()).save(folder / "a.png")
    return open_reader(folder / "a.png")


def array_reader(folder: Any) -> Any:
    return ArrayReader([picture(), picture()[::2, ::2]])


@pytest.fixture(params=[tiff_reader, openslide_reader, tiffslide_reader, memory_reader, picture_reader, array_reader])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    opened = request.param(tmp_path)
    yield opened
    opened.close()


def test_contract_level_0_pixels_are_the_files_own(reader: Any) -> None:
    assert isinstance(reader, Reader)
    assert reader.sizes[0] == (700, 500)
    assert reader.native[0]
    np.testing.assert_array_equal(reader.read(0, 0, 0, 700, 500), picture())
    np.testing.assert_array_equal(reader.read(0, 101, 203, 131, 77), picture()[203:280, 101:232])


def test_contract_native_levels_are_read_at_any_offset_unchanged(reader: Any) -> None:
    for level in range(1, len(reader.sizes)):
        if reader.native[level]:
            step = 2**level
            expected = picture()[::step, ::step][51:80, 33:100]
            np.testing.assert_array_equal(reader.read(level, 33, 51, 67, 29), expected)


@pytest.mark.parametrize("box", [(-30, -20, 60, 50), (680, 480, 60, 50), (900, 900, 10, 20), (-50, -50, 20, 20)])
def test_contract_outside_is_background_colour_not_black(reader: Any, box: Any) -> None:
    x, y, w, h = box
    canvas = np.full((1200, 1200, 3), 255, np.uint8)
    canvas[100:600, 100:800] = picture()
    np.testing.assert_array_equal(reader.read(0, x, y, w, h), canvas[y + 100 : y + 100 + h, x + 100 : x + 100 + w])


def test_contract_pixels_own_their_memory_and_threads_get_the_same(reader: Any) -> None:
    boxes = [(x, y, 90, 70) for y in range(0, 430, 60) for x in range(0, 610, 80)]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda b: reader.read(0, *b), boxes))
    for (x, y, w, h), part in zip(boxes, parts, strict=True):
        np.testing.assert_array_equal(part, picture()[y : y + h, x : x + w])
        assert part.flags.c_contiguous
        assert part.dtype == np.uint8


def test_contract_closing_is_not_the_end(reader: Any) -> None:
    before = reader.read(0, 5, 6, 7, 8)
    reader.close()
    np.testing.assert_array_equal(reader.read(0, 5, 6, 7, 8), before)


@pytest.mark.parametrize("make", [tiff_reader, openslide_reader, tiffslide_reader, picture_reader])
def test_a_reader_pickles_as_its_path(make: Any, tmp_path: Path) -> None:
    reader = make(tmp_path)
    data = pickle.dumps(reader)
    assert len(data) < 500
    np.testing.assert_array_equal(pickle.loads(data).read(0, 3, 4, 50, 60), picture()[4:64, 3:53])


def test_tiffslide_levels_of_odd_sizes_are_read_at_their_own_pixels(tmp_path: Path) -> None:
    pixels = picture(701, 501)  # halves to 351 x 251: a ratio that is no whole number
    reader = open_reader(write_tiff(tmp_path / "a.tif", pixels, levels=2), "tiffslide")
    for x in range(0, 300, 7):
        np.testing.assert_array_equal(reader.read(1, x, x // 2, 9, 8), pixels[::2, ::2][x // 2 : x // 2 + 8, x : x + 9])
    reader.close()


def test_a_forked_child_opens_its_own_handle(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", picture())
    code = textwrap.dedent("""
        import os, sys, numpy as np
        from wsi.readers import open_reader
        reader = open_reader(sys.argv[1], "tiffslide")
        whole = reader.read(0, 0, 0, 700, 500)
        parent = reader._handles.get(lambda: None)
        children = []
        for seed in range(3):
            pid = os.fork()
            if not pid:
                rng = np.random.default_rng(seed)
                good = True
                for _ in range(40):
                    x, y = int(rng.integers(0, 600)), int(rng.integers(0, 400))
                    good &= np.array_equal(reader.read(0, x, y, 90, 80), whole[y:y + 80, x:x + 90])
                good &= reader._handles.get(lambda: None) is not parent
                os._exit(0 if good else 1)
            children.append(pid)
        sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
    """)
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.tif")], cwd=root, timeout=120, check=False)
    assert run.returncode == 0


def test_openslide_levels_it_would_interpolate_are_read_from_the_corner_only(tmp_path: Path) -> None:
    pixels = picture(701, 501)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for level in (pixels, pixels[:500:2, :700:2]):
            tiff.write(level, tile=(128, 128), photometric="rgb", compression="deflate", metadata=None,
                       subfiletype=int(level is not pixels))  # fmt: skip
    reader = open_reader(tmp_path / "a.tif", "openslide")
    assert reader.native == (True, False)
    np.testing.assert_array_equal(reader.read(1, 0, 0, 350, 250), pixels[:500:2, :700:2])
    with pytest.raises(ValueError, match="not native"):
        reader.read(1, 10, 0, 20, 20)


def corrupt_one_tile(path: Any) -> Any:
    """Overwrite the compressed bytes of the tile at (256, 128) with nonsense; others stay readable."""
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        index = 1 * -(-page.imagewidth // page.tilewidth) + 2
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(b"\x11" * count)
    return path


@pytest.mark.parametrize("name", ["tiff", "openslide", "tiffslide"])
def test_one_corrupt_tile_is_an_error_there_and_nowhere_else(name: Any, tmp_path: Path) -> None:
    path = corrupt_one_tile(write_tiff(tmp_path / "a.tif", picture(), compression="jpeg"))
    reader = open_reader(path, name)
    good = reader.read(0, 0, 0, 100, 100)
    for _ in range(3):
        with pytest.raises(ReadError, match=r"a\.tif: level 0, 50 x 50 pixels at \(270, 140\)"):
            reader.read(0, 270, 140, 50, 50)
        np.testing.assert_array_equal(reader.read(0, 0, 0, 100, 100), good)  # the handle was opened anew
    reader.close()


def test_an_error_of_one_thread_is_not_an_error_of_the_others(tmp_path: Path) -> None:
    reader = open_reader(corrupt_one_tile(write_tiff(tmp_path / "a.tif", picture(), compression="jpeg")), "openslide")
    good = reader.read(0, 300, 300, 100, 100)

    def read(index: Any) -> None:
        if index % 5 == 0:
            with pytest.raises(ReadError):
                reader.read(0, 270, 140, 50, 50)
        else:
            np.testing.assert_array_equal(reader.read(0, 300, 300, 100, 100), good)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(200)))


def test_transparent_pixels_take_the_background_colour() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (100, 100, 100, 128)
    flat = flatten(rgba, (240, 230, 220))
    assert flat[0, 0].tolist() == [10, 20, 30]
    assert flat[1, 1].tolist() == [240, 230, 220]
    assert flat[0, 1].tolist() == [170, 165, 160]


def test_missing_tiles_are_background_not_black(tmp_path: Path) -> None:
    pixels = picture(512, 512)
    path = write_tiff(tmp_path / "a.tif", pixels, compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        tags = page.tags
        counts, where = list(tags[325].value), tags[325].valueoffset
        kind = "<u4" if tags[325].dtype.name == "LONG" else "<u2"
    counts[0] = 0
    with path.open("r+b") as file:
        file.seek(where)
        file.write(np.array(counts, kind).tobytes())
    for name in ("tiff", "openslide"):
        assert open_reader(path, name).read(0, 10, 10, 50, 50).min() == 255


class TestChoosing:
    def test_content_decides_not_the_extension(self, tmp_path: Path) -> None:
        write_tiff(tmp_path / "a.jpg", picture())
        assert open_reader(tmp_path / "a.jpg").name == "tiff"
        Image.fromarray(picture()).save(tmp_path / "b.svs", "PNG")
        assert open_reader(tmp_path / "b.svs").name == "picture"

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(SlideNotFoundError, match="no such file"):
            open_reader(tmp_path / "a.svs")
        with pytest.raises(SlideNotFoundError, match="nothing at this address"):
            open_reader("memory://nowhere/a.svs")

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.svs").touch()
        with pytest.raises(EmptyFileError, match=r"a\.svs: .*no bytes"):
            open_reader(tmp_path / "a.svs")

    def test_text_under_a_slides_name_says_what_each_reader_said(self, tmp_path: Path) -> None:
        (tmp_path / "a.svs").write_text("not found\n")
        with pytest.raises(NotASlideError, match=r"no reader accepts it \(OpenSlide says.*Pillow"):
            open_reader(tmp_path / "a.svs")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(NotASlideError, match="this is a folder"):
            open_reader(tmp_path)

    def test_mirax_without_its_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8\xff\xe0")
        with pytest.raises(IncompleteSlideError, match="a/ with Slidedat"):
            open_reader(tmp_path / "a.mrxs")

    def test_grey_and_16_bit_pictures(self, tmp_path: Path) -> None:
        Image.fromarray(picture()[..., 0]).save(tmp_path / "grey.png")
        with pytest.raises(UnsupportedPixelError, match="grey"):
            open_reader(tmp_path / "grey.png")
        tifffile.imwrite(tmp_path / "deep.tif", picture().astype(np.uint16) * 200, tile=(128, 128), photometric="rgb")
        with pytest.raises(UnsupportedPixelError, match="16 bits a channel"):
            open_reader(tmp_path / "deep.tif")

    def test_an_unknown_reader(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="choose one of auto, tiff, openslide"):
            open_reader(tmp_path, "vips")

    @pytest.mark.parametrize("bigtiff", [False, True])
    @pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
    def test_a_partial_copy_is_found_before_any_work(self, tmp_path: Path, bigtiff: Any, kept: Any) -> None:
        data = io.BytesIO()
        tifffile.imwrite(data, picture(), tile=(128, 128), photometric="rgb", bigtiff=bigtiff)
        path = tmp_path / "a.tif"
        path.write_bytes(data.getvalue())
        open_reader(path).close()
        path.write_bytes(data.getvalue()[: int(len(data.getvalue()) * kept)])
        with pytest.raises(TruncatedSlideError, match=r"a\.tif: the file ends at byte .* fetch it again"):
            open_reader(path)

    def test_a_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        path = write_tiff(tmp_path / "a.tif", picture())
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(SlideNotFoundError, match="permissions"):
            open_reader(path)


class RangeHandler(BaseHTTPRequestHandler):
    """Serves one file, in parts, as object stores do."""

    path_served: Path

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, *, body: bool) -> None:
        data = self.path_served.read_bytes()
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), len(data) - 1)) if wanted else (0, len(data) - 1)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])

    def log_message(self, *args: Any) -> None:
        """Be quiet."""


def test_a_slide_on_a_web_server_is_read_in_parts(tmp_path: Path) -> None:
    RangeHandler.path_served = write_tiff(tmp_path / "a.tif", picture(), levels=2)
    with ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reader = open_reader(f"http://127.0.0.1:{server.server_port}/a.tif")
        assert reader.name == "tiffslide"
        np.testing.assert_array_equal(reader.read(0, 33, 44, 200, 100), picture()[44:144, 33:233])
        np.testing.assert_array_equal(reader.read(1, 10, 20, 30, 40), picture()[::2, ::2][20:60, 10:40])
        reader.close()
        server.shutdown()


def test_files_and_memory_do_not_leak_over_many_openings(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", picture())
    fds = Path("/proc/self/fd")
    if not fds.exists():
        pytest.skip("needs /proc")
    for name in ("tiff", "openslide", "tiffslide"):
        for _ in range(3):
            open_reader(path, name).close()
        before = len(list(fds.iterdir()))
        for _ in range(40):
            reader = open_reader(path, name)
            reader.read(0, 0, 0, 64, 64)
            reader.close()
        assert len(list(fds.iterdir())) <= before


@pytest.mark.shared
class TestRealSlides:
    def test_sparse_scn_is_white_where_nothing_was_scanned(self, shared: Path) -> None:
        reader = open_reader(shared / "slides" / "leica_cmu1.scn")
        assert reader.bounds is not None
        assert (reader.bounds.x, reader.bounds.y) == (4000, 4000)
        assert reader.read(0, 9000, 9000, 300, 300).min() == 255

    def test_dicom_series_and_aperio_file_of_one_slide_show_the_same_place(self, shared: Path) -> None:
        dicom = next(p for p in (shared / "slides" / "dicom-cmu-1-small").iterdir())
        a = open_reader(dicom).read(0, 700, 900, 400, 300).astype(int)
        aperio = open_reader(shared / "slides" / "cmu-1-small-region.svs")
        here, beside = (np.abs(a - aperio.read(0, x, 900, 400, 300)).mean() for x in (700, 702))
        assert here < beside / 2  # the one is a JPEG of the other's pixels

    def test_truncated_svs_is_named_so(self, shared: Path, tmp_path: Path) -> None:
        data = (shared / "slides" / "cmu-1-small-region.svs").read_bytes()
        (tmp_path / "a.svs").write_bytes(data[: len(data) // 2])
        with pytest.raises(TruncatedSlideError):
            open_reader(tmp_path / "a.svs")
