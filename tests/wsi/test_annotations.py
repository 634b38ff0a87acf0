"""Annotation files: every kind lands in level-0 pixels, whatever was wrong is told, and files find their slides."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wsi._xml import parse_xml
from wsi.annotation import Annotation
from wsi.annotations import check_annotations, match_annotations, read_annotations
from wsi.asap import read_asap, write_asap
from wsi.errors import AnnotationError, UsageError
from wsi.geojson import Frame
from wsi.imagescope import read_imagescope
from wsi.mask import MaskOptions, read_mask

FRAME = Frame("slide.mrxs", (4000, 2000), (0.25, 0.25), (100, 50))
SQUARE = ((0, 0), (20, 0), (20, 20), (0, 20))


def _asap(path: Path, *annotations: str, groups: str = "") -> Path:
    path.write_text(
        f"<ASAP_Annotations><Annotations>{''.join(annotations)}</Annotations>"
        f"<AnnotationGroups>{groups}</AnnotationGroups></ASAP_Annotations>"
    )
    return path


Points = Sequence[tuple[object, object]]


def _item(kind: str, points: Points, group: str = "None") -> str:
    rows = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(points))
    head = f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}" Color="#010203">'
    return f"{head}<Coordinates>{rows}</Coordinates></Annotation>"


def _region(points: Points, *, tag: str = "Vertex", **attributes: object) -> str:
    rows = "".join(f'<{tag} X="{x}" Y="{y}"/>' for x, y in points)
    words = " ".join(f'{key}="{value}"' for key, value in attributes.items())
    return f"<Region {words}><Vertices>{rows}</Vertices></Region>"


def _scope(path: Path, *layers: str) -> Path:
    path.write_text(f'<Annotations MicronsPerPixel="0.25">{"".join(layers)}</Annotations>')
    return path


def _layer(*regions: str, name: str = "", color: int = 65280, attributes: str = "") -> str:
    return (
        f'<Annotation Name="{name}" LineColor="{color}"><Attributes>{attributes}</Attributes>'
        f"<Regions>{''.join(regions)}</Regions></Annotation>"
    )


# ASAP


def test_asap_groups_are_classes_with_their_colours(tmp_path: Path) -> None:
    groups = '<Group Name="Tumor" PartOfGroup="None" Color="#ff0000"/><Group Name="Inner" PartOfGroup="Tumor" Color="#00ff00"/>'
    path = _asap(
        tmp_path / "a.xml", *(_item("Polygon", SQUARE, g) for g in ("Tumor", "Inner", "None", "lost")), groups=groups
    )
    found, rejected, repaired = read_asap(path)
    assert (rejected, repaired) == ([], [])
    assert [a.class_name for a in found] == ["Tumor", "Tumor: Inner", None, "lost"]
    assert [a.color for a in found] == [(255, 0, 0), (0, 255, 0), (1, 2, 3), (1, 2, 3)]
    assert all(a.geometry.equals(shapely.box(0, 0, 20, 20)) for a in found)


def test_asap_points_come_in_their_order_and_kinds_become_geometries(tmp_path: Path) -> None:
    mixed = (
        '<Annotation Name="b" Type="Measurement" PartOfGroup="None"><Coordinates>'
        '<Coordinate Order="10" X="9" Y="9"/><Coordinate Order="2" X="1" Y="2"/></Coordinates></Annotation>'
    )
    path = _asap(
        tmp_path / "a.xml", mixed, _item("Dot", [(3, 4)]), _item("PointSet", [(3, 4), (5, 6)]), _item("Spline", SQUARE)
    )
    found, _, repaired = read_asap(path)
    assert [a.geometry.geom_type for a in found] == ["LineString", "Point", "MultiPoint", "Polygon"]
    assert list(found[0].geometry.coords) == [(1, 2), (9, 9)]
    assert [(r.index, "spline" in r.reason) for r in repaired] == [(3, True)]


def test_one_bad_asap_annotation_is_rejected_with_its_number_and_the_others_are_read(tmp_path: Path) -> None:
    bow_tie = [(0, 0), (10, 10), (10, 0), (0, 10)]
    path = _asap(
        tmp_path / "a.xml", _item("Polygon", [("x", 1), (2, 2), (3, 3)]), _item("Polygon", bow_tie),
        _item("Blob", SQUARE), _item("Polygon", [(1, 1)]), _item("Polygon", SQUARE),
    )  # fmt: skip
    found, rejected, repaired = read_asap(path)
    assert [r.index for r in rejected] == [0, 2, 3]
    assert [r.index for r in repaired] == [1]
    assert [a.geometry.area for a in found] == [50, 400]
    assert all(a.geometry.is_valid for a in found)


def test_asap_groups_that_contain_each_other_end(tmp_path: Path) -> None:
    groups = '<Group Name="A" PartOfGroup="B" Color="#ff0000"/><Group Name="B" PartOfGroup="A" Color="#00ff00"/>'
    (found,), _, _ = read_asap(_asap(tmp_path / "a.xml", _item("Polygon", SQUARE, "A"), groups=groups))
    assert found.class_name == "B: A"


@pytest.mark.parametrize("class_name", ["Tumor", None, 'a "quoted" & <odd> name'])
def test_what_is_written_for_asap_is_read_back_holes_included(tmp_path: Path, class_name: str | None) -> None:
    holed = shapely.Polygon(shapely.box(0, 0, 100, 100).exterior, [shapely.box(10, 10, 20.25, 30).exterior])
    annotations = [
        Annotation(holed, class_name, color=(1, 2, 3), name="one"),
        Annotation(shapely.Point(5, 6), "Cell"),
        Annotation(shapely.LineString([(0, 0), (3, 4)])),
    ]
    write_asap(tmp_path / "out.xml", annotations)
    found, rejected, _ = read_asap(tmp_path / "out.xml")
    assert rejected == []
    assert (found[0].class_name, found[0].name) == (class_name, "one")
    assert all(a.geometry.equals(b.geometry) for a, b in zip(annotations, found, strict=True))
    assert found[0].color == (1, 2, 3)


def test_a_hole_that_meets_nothing_is_told(tmp_path: Path) -> None:
    far = [(x + 500, y) for x, y in SQUARE]
    path = _asap(tmp_path / "a.xml", _item("Polygon", SQUARE, "T"), _item("Polygon", far, "T (hole)"))
    found, rejected, _ = read_asap(path)
    assert [a.class_name for a in found] == ["T"]
    assert [(r.index, "meets none" in r.reason) for r in rejected] == [(1, True)]


# ImageScope and HALO


def test_imagescope_layers_are_classes_whose_colours_have_red_in_the_lowest_byte(tmp_path: Path) -> None:
    path = _scope(
        tmp_path / "a.xml",
        _layer(_region(SQUARE, Text="here"), name="Tumor", color=255),
        _layer(_region(SQUARE), color=65535, attributes='<Attribute Name="Description" Value="Stroma"/>'),
        _layer(_region(SQUARE, Text="Fold")),
        _layer(_region(SQUARE, Text="null")),
    )
    found, rejected, _ = read_imagescope(path)
    assert rejected == []
    assert [(a.class_name, a.color, a.name) for a in found] == [
        ("Tumor", (255, 0, 0), "here"),
        ("Stroma", (255, 255, 0), None),
        ("Fold", (0, 255, 0), "Fold"),
        (None, (0, 255, 0), None),
    ]


def test_negative_regions_are_holes_of_their_own_layer_only(tmp_path: Path) -> None:
    hole = [(5, 5), (15, 5), (15, 15), (5, 15)]
    far = [(x + 500, y) for x, y in SQUARE]
    path = _scope(
        tmp_path / "a.xml",
        _layer(_region(SQUARE), _region(hole, NegativeROA=1), _region(far, NegativeROA=1), name="A"),
        _layer(_region(SQUARE), name="B"),
        _layer(_region(hole), _region(SQUARE, NegativeROA=1), name="C"),
    )
    found, rejected, _ = read_imagescope(path)
    assert [(a.class_name, a.geometry.area) for a in found] == [("A", 300), ("B", 400)]
    assert [r.index for r in rejected] == [2, 4]


def test_rectangles_of_two_points_ellipses_and_rulers_are_what_was_drawn(tmp_path: Path) -> None:
    path = _scope(
        tmp_path / "a.xml",
        _layer(
            _region([(1, 40), (10, 1)], tag="V", Type="Rectangle"),
            _region([(50, 0), (100, 20), (50, 40), (0, 20)], GeoShape="Ellipse", Type=0),
            _region([(0, 0), (5, 5)], Type=4),
            _region(SQUARE, Type=1),  # ImageScope says rectangle of free-hand regions too
        ),
    )
    found, rejected, repaired = read_imagescope(path)
    assert rejected == []
    assert found[0].geometry.equals(shapely.box(1, 1, 10, 40))
    assert found[1].geometry.area == pytest.approx(np.pi * 50 * 20, rel=1e-4)
    assert found[1].geometry.centroid.equals_exact(shapely.Point(50, 20), 1e-6)
    assert found[2].geometry.geom_type == "LineString"
    assert found[3].geometry.area == 400
    assert [r.index for r in repaired] == [1]


# XML from strangers


def test_entities_are_refused_before_they_unfold(tmp_path: Path) -> None:
    laughs = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(12))
    bomb = tmp_path / "bomb.xml"
    bomb.write_text(f'<!DOCTYPE x [<!ENTITY l0 "ha">{laughs}]><ASAP_Annotations>&l12;</ASAP_Annotations>')
    with pytest.raises(AnnotationError, match="declares entities"):
        read_annotations(bomb)
    outside = tmp_path / "outside.xml"
    outside.write_text('<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><ASAP_Annotations>&e;</ASAP_Annotations>')
    with pytest.raises(AnnotationError, match="declares entities"):
        read_annotations(outside)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<ASAP_Annotations><Annotations>", "not well-formed"),
        (b"<svg/>", "not of ImageScope"),
        (b"<a>" * 100 + b"</a>" * 100, "nested deeper"),
        (b"\xff\xd8\xff\xe0 jpeg", "is a JPEG"),
        (b"hello", "not JSON"),
        (b"\x89PNG\r\n\x1a\n broken", "cannot be read"),
        (b"II*\0broken", "cannot be read"),
    ],
)
def test_a_file_of_no_use_is_named_with_a_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "odd.xml"
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match=f"odd.xml: .*{reason}"):
        read_annotations(path, frame=FRAME)


def test_a_file_that_is_not_there_or_too_large_is_told(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="there is no such file"):
        read_annotations(tmp_path / "no.xml")
    path = _asap(tmp_path / "a.xml")
    with pytest.raises(AnnotationError, match="more than the limit of 10"):
        parse_xml(path, max_bytes=10)


@given(text=st.text(max_size=200), start=st.sampled_from(["", "<ASAP_Annotations>", "<Annotations>"]))
def test_no_text_makes_reading_fail_but_with_an_annotation_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, start: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.xml"
    path.write_bytes((start + text).encode("utf-8", "surrogatepass"))
    with suppress(AnnotationError):
        assert read_annotations(path, frame=FRAME).path == path


# Masks


def test_a_mask_is_outlined_at_its_downsample_and_place(tmp_path: Path) -> None:
    labels = np.zeros((50, 100), np.uint8)
    labels[10:20, 5:25] = 1
    labels[12:15, 10:20] = 2
    Image.fromarray(labels).save(tmp_path / "m.png")
    options = MaskOptions(downsample=4, origin=(1000, 500), classes={1: "Tumor", 2: "Necrosis"})
    tumor, necrosis = read_mask(tmp_path / "m.png", options)
    assert (tumor.class_name, necrosis.class_name) == ("Tumor", "Necrosis")
    assert tumor.geometry.bounds == (1020, 540, 1100, 580)
    assert necrosis.geometry.equals(shapely.box(1040, 548, 1080, 560))
    assert tumor.geometry.area == 16 * (200 - 30)


def test_a_mask_covers_the_slide_or_says_its_resolution(tmp_path: Path) -> None:
    labels = np.zeros((200, 400), np.uint16)
    labels[:100, :200] = 300
    tifffile.imwrite(tmp_path / "m.tif", labels, compression="zlib", tile=(64, 64))
    covering = read_annotations(tmp_path / "m.tif", frame=FRAME)
    assert (covering.kind, covering.annotations[0].class_name) == ("mask", "300")
    assert covering.annotations[0].geometry.equals(shapely.box(0, 0, 2000, 1000))
    finer = read_annotations(tmp_path / "m.tif", frame=FRAME, mask=MaskOptions(mpp=1.0))
    assert finer.annotations[0].geometry.equals(shapely.box(0, 0, 800, 400))


def test_masks_with_palettes_bits_and_equal_channels_are_read(tmp_path: Path) -> None:
    labels = np.zeros((4, 4), np.uint8)
    labels[1:3, 1:3] = 1
    picture = Image.fromarray(labels, mode="P")
    picture.putpalette([0, 0, 0, 200, 100, 50])
    picture.save(tmp_path / "p.png")
    Image.fromarray(labels > 0).save(tmp_path / "b.png")
    Image.fromarray(np.stack([labels * 255] * 3, axis=-1)).save(tmp_path / "rgb.png")
    found = [read_mask(tmp_path / name, MaskOptions(downsample=1)) for name in ("p.png", "b.png", "rgb.png")]
    assert [a.geometry.equals(shapely.box(1, 1, 3, 3)) for (a,) in found] == [True] * 3
    assert [(a.class_name, a.color) for (a,) in found] == [("1", (200, 100, 50)), ("1", None), ("255", None)]


def test_a_picture_that_is_no_mask_of_this_slide_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / "photo.png")
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((8, 8), np.float32))
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "square.png")
    for name, reason in (
        ("photo.png", "in colour"),
        ("float.tif", "holds float32"),
        ("square.png", "do not have the shape"),
    ):
        with pytest.raises(AnnotationError, match=reason):
            read_mask(tmp_path / name, frame=FRAME)
    with pytest.raises(UsageError, match="how large"):
        read_mask(tmp_path / "square.png")
    with pytest.raises(AnnotationError, match=r"labels \[1\]"):
        read_mask(tmp_path / "square.png", MaskOptions(downsample=1, classes={2: "x"}))
    with pytest.raises(UsageError, match="not by both"):
        MaskOptions(mpp=1, downsample=1)


# Frames


def test_geojson_counts_from_the_bounds_and_xml_from_the_full_frame(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"type": "Polygon", "coordinates": [[*map(list, SQUARE), list(SQUARE[0])]]})
    )
    _asap(tmp_path / "a.xml", _item("Polygon", SQUARE))
    geojson, asap = (read_annotations(tmp_path / name, frame=FRAME) for name in ("a.json", "a.xml"))
    assert geojson.annotations[0].geometry.bounds == (100, 50, 120, 70)
    assert (geojson.origin, asap.origin) == ((100, 50), (0, 0))
    assert asap.annotations[0].geometry.bounds == (0, 0, 20, 20)


def test_a_report_has_a_line_a_reason(tmp_path: Path) -> None:
    path = _asap(tmp_path / "a.xml", *[_item("Polygon", [(i, i)]) for i in range(5)], _item("Spline", SQUARE))
    lines = read_annotations(path).report()
    assert lines[0].startswith("a.xml: left out 5 (number 0, 1, 2 …): its Polygon has too few points")
    assert lines[1:] == ("a.xml: changed 1 (number 5): a spline is read as the polygon through its points",)


# Matching and checking


def test_files_find_their_slides_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "annotations" / "deeper"
    folder.mkdir(parents=True)
    names = (
        "case-1.geojson",
        "case-2.svs.json.gz",
        "case.3.xml",
        "case-4_mask.png",
        "casse-5.xml",
        "notes.txt",
        ".x.json",
    )
    for name in names:
        (folder / name).write_bytes(b"")
    slides = [f"/slides/{stem}" for stem in ("case-1.svs", "case-2.svs", "case.3.ndpi", "case-4.tif", "case-5.svs")]
    matches = match_annotations(slides, tmp_path / "annotations")
    assert {slide: path.name for slide, path in matches.files.items()} == dict(zip(slides, names[:4], strict=False))
    assert matches.without == ("/slides/case-5.svs",)
    assert [path.name for path in matches.unused] == ["casse-5.xml"]
    assert matches.report() == (
        "/slides/case-5.svs: no annotations",
        "casse-5.xml: belongs to no slide; does it mean /slides/case-5.svs?",
    )


def test_a_slide_beside_its_mask_is_not_its_own_annotation(tmp_path: Path) -> None:
    for name in ("case.tif", "case_mask.png"):
        (tmp_path / name).write_bytes(b"")
    matches = match_annotations([tmp_path / "case.tif"], tmp_path)
    assert matches.files == {str(tmp_path / "case.tif"): tmp_path / "case_mask.png"}
    assert matches.unused == ()


def test_two_files_for_a_slide_and_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    for name in ("case.json", "case.xml"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=r"case.json, .*case.xml"):
        match_annotations(["case.svs"], tmp_path)
    with pytest.raises(UsageError, match="it is not there"):
        match_annotations(["case.svs"], tmp_path / "no")


def _at(x: float, y: float, name: str | None = "Tumor") -> Annotation:
    return Annotation(shapely.box(x, y, x + 50, y + 50), name)


def test_annotations_that_fit_raise_no_line() -> None:
    assert check_annotations([_at(10, 10), _at(900, 300)], (1000, 400), ["Tumor"]) == ()


def test_swapped_axes_are_told_from_another_slide() -> None:
    (swapped,) = check_annotations([_at(10, 900), _at(300, 10)], (1000, 400))
    assert "x and y seem swapped" in swapped
    (other,) = check_annotations([_at(5000, 9000)], (1000, 400))
    assert "outside the slide" in other
    assert check_annotations([_at(10, 300), _at(300, 10)], (1000, 400)) == ()  # fits either way


def test_unknown_and_missing_classes_are_told_with_what_may_be_meant() -> None:
    found = [_at(0, 0, "tumour"), _at(900, 300, "tumour"), _at(0, 0, None), _at(0, 0, "Xyz"), _at(0, 0, "Stroma")]
    assert check_annotations(found, (1000, 400), ["Tumor", "Stroma"]) == (
        "2 shapes of the class 'tumour', which is none of Tumor, Stroma; did you mean 'Tumor'?",
        "1 shape without a class, none of Tumor, Stroma",
        "1 shape of the class 'Xyz', which is none of Tumor, Stroma",
        "no shape of the class 'Tumor'",
    )
    assert check_annotations([], (10, 10)) == ("no annotations",)


# Real files


@pytest.mark.shared
def test_real_xml_and_masks_are_read(shared: Path) -> None:
    folder = shared / "annotations"
    read = {
        path.name: read_annotations(path, frame=Frame("slide", (1000, 1000), (0.25, 0.25)))
        for path in [*folder.rglob("*.xml"), *folder.rglob("binary-*.png")]
        if path.name != "binary-noise-large.png"
    }
    assert all(a.geometry.is_valid for contents in read.values() for a in contents.annotations)
    assert not any(contents.rejected for contents in read.values())
    counts = {name: len(contents.annotations) for name, contents in read.items()}
    assert (counts["tumor_009.xml"], counts["tumor_036.xml"], counts["CMU-1-JP2K-33005.xml"]) == (6, 105, 4)
    assert counts["binary-noise-medium.png"] == 15_254
    assert {a.class_name for a in read["tumor_036.xml"].annotations} == {"metastasis", "negative"}
    ring = read["binary-ring.png"].annotations[0].geometry
    assert len(ring.interiors) == 1
