"""Discovery: what is a slide, what is part of one, and what is neither."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tests.wsi.test_readers import picture, write_tiff
from wsi.discover import discover
from wsi.errors import SlideNotFoundError, UsageError


def paths(found: Any) -> Any:
    return [source.relpath for source in found.sources]


def reasons(found: Any) -> Any:
    return {item.relpath: item.reason for item in found.unlisted}


def tiff(path: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tiff(path, picture(64, 64))


def dicom(path: Any, series: Any, kind: Any, columns: Any) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{columns}"
    facts = pydicom.Dataset()
    facts.file_meta = meta
    facts.SeriesInstanceUID = series
    facts.ImageType = ["ORIGINAL", "PRIMARY", kind, "NONE"]
    facts.TotalPixelMatrixColumns = columns
    path.parent.mkdir(parents=True, exist_ok=True)
    facts.save_as(path, enforce_file_format=True)


def test_content_decides_and_other_files_are_passed_over_with_a_reason(tmp_path: Path) -> None:
    tiff(tmp_path / "b" / "no-extension")
    tiff(tmp_path / "a.svs")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden.svs").write_bytes(b"II*\0")
    found = discover(tmp_path)
    assert paths(found) == ["a.svs", "b/no-extension"]
    assert reasons(found) == {"notes.txt": "not a picture", "empty.txt": "an empty file"}
    assert found.sources[0].bytes == (tmp_path / "a.svs").stat().st_size


def test_a_file_named_as_a_slide_is_never_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_text("<html>login</html>")
    (tmp_path / "b.ndpi").touch()
    assert paths(discover(tmp_path)) == ["a.svs", "b.ndpi"]


def test_a_dicom_series_is_one_slide_and_its_volume_stands_for_it(tmp_path: Path) -> None:
    for series in ("1.1", "1.2"):
        dicom(tmp_path / f"case{series}" / "0-label.dcm", series, "LABEL", 99_999)
        dicom(tmp_path / f"case{series}" / "1-level1", series, "VOLUME", 500)
        dicom(tmp_path / f"case{series}" / "2-level0", series, "VOLUME", 2000)
    found = discover(tmp_path)
    assert paths(found) == ["case1.1/2-level0", "case1.2/2-level0"]
    assert found.sources[0].bytes == sum(f.stat().st_size for f in (tmp_path / "case1.1").iterdir())


def test_companions_are_not_slides(tmp_path: Path) -> None:
    (tmp_path / "m.mrxs").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "Slidedat.ini").write_text("[GENERAL]")
    (tmp_path / "m" / "Data0000.dat").write_bytes(b"\xff\xd8\xff\xe0" * 100)
    (tmp_path / "v.vms").write_text(
        "[Virtual Microscope Specimen]\nImageFile=v.jpg\nImageFile(1,0)=v(1,0).jpg\nMapFile=v_map2.jpg\n"
    )
    for name in ("v.jpg", "v(1,0).jpg", "v_map2.jpg", "photo.jpg"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff\xe0")
    found = discover(tmp_path)
    assert paths(found) == ["m.mrxs", "photo.jpg", "v.vms"]
    assert found.sources[0].bytes == 4 + 400 + 9


def test_loops_broken_links_and_second_names_do_no_harm(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif")
    (tmp_path / "b.tif").symlink_to(tmp_path / "a.tif")
    os.link(tmp_path / "a.tif", tmp_path / "c.tif")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "up").symlink_to(tmp_path / "folder")
    found = discover(tmp_path)
    assert paths(found) == ["a.tif"]
    assert reasons(found)["gone.txt"] == "a link that leads nowhere"
    assert "another name" in reasons(found)["b.tif"]
    assert "another name" in reasons(found)["folder/up"]


def test_stores_and_zarr_images_are_not_searched(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "wsi-store.json").write_text("{}")
    tiff(tmp_path / "out" / "thumbnails" / "a.jpg")
    (tmp_path / "image.zarr").mkdir()
    (tmp_path / "image.zarr" / ".zgroup").write_text("{}")
    found = discover(tmp_path)
    assert paths(found) == ["a.tif", "image.zarr"]  # the image is named, and fails with a reason
    assert reasons(found) == {"out": "a feature store"}


@pytest.mark.parametrize(
    "name", ["ünïcode.svs", "spaces in name.svs", "new\nline.svs", "a#b%20c.svs", "x" * 240 + ".svs", "😐.svs"]
)
def test_odd_names_are_kept_as_they_are(tmp_path: Path, name: Any) -> None:
    tiff(tmp_path / "deep" / name)
    assert paths(discover(tmp_path)) == [f"deep/{name}"]


def test_a_name_that_is_not_text_is_no_obstacle(tmp_path: Path) -> None:
    shutil.copy(tiff(tmp_path / "a.tif"), os.fsencode(tmp_path) + b"/\xff\xfe.tif")
    assert len(paths(discover(tmp_path))) == 2


def test_one_slide_an_address_and_a_pattern(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif")
    tiff(tmp_path / "b" / "c.svs")
    assert paths(discover(tmp_path / "a.tif")) == ["a.tif"]
    assert paths(discover("s3://bucket/a.svs")) == ["s3://bucket/a.svs"]
    assert paths(discover(tmp_path, pattern="*.svs")) == ["b/c.svs"]
    assert paths(discover(tmp_path, pattern="b/*")) == ["b/c.svs"]
    with pytest.raises(SlideNotFoundError, match="no such file or folder"):
        discover(tmp_path / "nowhere")


def test_what_is_meant_to_be_a_slide_fails_by_name_even_when_it_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "gone.svs").symlink_to(tmp_path / "nowhere")
    assert paths(discover(tmp_path)) == ["gone.svs"]


def test_a_store_is_not_searched_for_slides(tmp_path: Path) -> None:
    (tmp_path / "wsi-store.json").write_text("{}")
    with pytest.raises(UsageError, match="is a feature store"):
        discover(tmp_path)


class TestTable:
    def write(self, folder: Any, text: Any) -> Any:
        path = folder / "list.csv"
        path.write_text(text, encoding="utf-8")
        return path

    def test_columns_are_read_and_kept(self, tmp_path: Path) -> None:
        tiff(tmp_path / "x" / "a.svs")
        path = self.write(tmp_path, '\ufeffslide;mpp;label\nx/a.svs;0.25;tumour\nmissing.svs;"0.25,0.26";\n')
        a, missing = discover(path).sources
        assert (a.relpath, a.mpp, dict(a.table)) == ("x/a.svs", (0.25, 0.25), {"label": "tumour"})
        assert a.bytes > 0
        assert (missing.relpath, missing.mpp) == ("missing.svs", (0.25, 0.26))

    @pytest.mark.parametrize("header", ["slide, mpp", " Slide ,MPP", "slide\t mpp"])
    def test_spaces_and_case_in_the_header_lose_nothing(self, tmp_path: Path, header: str) -> None:
        separator = "\t" if "\t" in header else ", "
        (source,) = discover(self.write(tmp_path, f"{header}\na.svs{separator}0.25\n")).sources
        assert (source.relpath, source.mpp) == ("a.svs", (0.25, 0.25))

    def test_paths_are_below_the_folder_absolute_or_addresses(self, tmp_path: Path) -> None:
        tiff(tmp_path / "slides" / "a.svs")
        path = self.write(tmp_path, f"slide\n{tmp_path}/slides/a.svs\nhttps://host/b.svs\n")
        found = discover(tmp_path / "slides", table=path)
        assert paths(found) == ["a.svs", "https://host/b.svs"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("file,mpp\na,1\n", "needs one column 'slide', and one 'mpp' at most; it has: file, mpp"),
            ("slide,mpp\na.svs,wide\n", "line 2: column mpp"),
            ("slide\na.svs\nb.svs\n./a.svs\n", "line 4: slide ./a.svs is listed twice"),
            ("", "needs one column 'slide'"),
            ("slide,mpp,MPP\na,1,1\n", "one 'mpp' at most"),
        ],
    )
    def test_what_is_wrong_is_said_with_the_line(self, tmp_path: Path, text: Any, words: Any) -> None:
        with pytest.raises(UsageError, match=words.replace("(", r"\(")):
            discover(self.write(tmp_path, text))


@pytest.mark.shared
def test_the_real_folder(shared: Path) -> None:
    found = discover(shared / "slides")
    dicoms = [p for p in paths(found) if p.startswith("dicom-cmu-1-small/")]
    assert dicoms == ["dicom-cmu-1-small/1.2.826.0.1.3680043.8.498.58740178995208579534253317996600852419.dcm"]
    assert set(reasons(found)) == {"MANIFEST.md", "glas_composite_testB.json", "glas_composite_train.json"}
    assert np.all([s.bytes > 0 for s in found.sources if not s.relpath.endswith(".zarr")])


def test_results_below_the_slides_are_no_slides(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif")
    for name in ("out", "earlier"):
        tiff(tmp_path / name / "a.ome.tif")
        (tmp_path / name / "report.jsonl").touch()
    (tmp_path / "earlier" / "run.json").touch()
    found = discover(tmp_path, out=tmp_path / "out")
    assert paths(found) == ["a.tif"]
    assert reasons(found) == {"out": "the folder of results", "earlier": "results of a segmentation"}
    with pytest.raises(UsageError, match="OUT must be another folder than SLIDES"):
        discover(tmp_path, out=tmp_path)
