"""Mpp: the chain of sources, what is believed, and what is refused."""

from typing import Any

import pytest

from wsi.errors import ImplausibleMppError, MissingMppError
from wsi.resolution import parse_mpp, resolve_mpp

CHAIN = [
    ("openslide.mpp", {"openslide.mpp-x": "0.251", "openslide.mpp-y": "0.252"}, (0.251, 0.252)),
    ("tiffslide.mpp", {"tiffslide.mpp-x": "0.3", "tiffslide.mpp-y": "0.3"}, (0.3, 0.3)),
    ("aperio.MPP", {"aperio.MPP": "0.4990"}, (0.499, 0.499)),
    (
        "mirax MICROMETER_PER_PIXEL",
        {f"mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_{a}": "0.2325" for a in "XY"},
        (0.2325, 0.2325),
    ),
    ("philips.DICOM_PIXEL_SPACING", {"philips.DICOM_PIXEL_SPACING": '"0.000252" "0.000250"'}, (0.25, 0.252)),  # y first
    (
        "TIFF resolution tags",
        {"tiff.XResolution": "20000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"},
        (0.5, 0.5),
    ),
]


@pytest.mark.parametrize(("source", "properties", "mpp"), CHAIN)
def test_each_source_is_read(source: Any, properties: Any, mpp: Any) -> None:
    found = resolve_mpp(properties, slide="a", flag=None)
    assert found.xy == pytest.approx(mpp)
    assert found.source == source
    assert not found.estimated


def test_the_first_source_of_the_chain_wins() -> None:
    everything = {"openslide.objective-power": "40"}
    for source, properties, mpp in reversed(CHAIN):
        everything |= properties
        found = resolve_mpp(everything, slide="a", flag=None)
        assert found.source == source
        assert found.xy == pytest.approx(mpp)
    assert resolve_mpp(everything, slide="a", flag=None, csv=(0.7, 0.7)).source == "csv"
    assert resolve_mpp(everything, slide="a", flag=(0.8, 0.9), csv=(0.7, 0.7)).xy == (0.8, 0.9)


def test_inches_are_not_centimetres() -> None:
    tags = {"tiff.XResolution": "50800", "tiff.YResolution": "50800", "tiff.ResolutionUnit": "inch"}
    assert resolve_mpp(tags, slide="a", flag=None).xy == pytest.approx((0.5, 0.5))
    with pytest.raises(MissingMppError):
        resolve_mpp(tags | {"tiff.ResolutionUnit": "none"}, slide="a", flag=None)


@pytest.mark.parametrize(("power", "mpp"), [("40", 0.25), ("20", 0.5), ("10", 1.0)])
def test_the_objective_power_gives_an_estimate_and_says_so(power: Any, mpp: Any) -> None:
    found = resolve_mpp({"openslide.objective-power": power}, slide="a", flag=None)
    assert found.xy == (mpp, mpp)
    assert found.estimated
    assert power in found.source


def test_a_silent_file_is_refused_with_the_flag_that_helps() -> None:
    with pytest.raises(MissingMppError, match=r"^a\.svs: .*--slide-mpp.*column mpp"):
        resolve_mpp({}, slide="a.svs", flag=None)
    with pytest.raises(MissingMppError):
        resolve_mpp({"aperio.MPP": "unknown"}, slide="a.svs", flag=None)


@pytest.mark.parametrize("value", ["0", "0.01", "1000", "-0.25", "nan"])
def test_what_no_scanner_has_is_refused_but_a_person_is_believed(value: Any) -> None:
    properties = {"openslide.mpp-x": value, "openslide.mpp-y": value, "openslide.objective-power": "40"}
    with pytest.raises(ImplausibleMppError, match=r"between 0\.05 and 10.*--slide-mpp"):
        resolve_mpp(properties, slide="a", flag=None)
    assert resolve_mpp(properties, slide="a", flag=(28.9, 28.9)).x == 28.9


def test_axes_that_differ_by_more_than_five_per_cent_are_refused() -> None:
    differ = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.27"}
    with pytest.raises(ImplausibleMppError, match="x and y differ"):
        resolve_mpp(differ, slide="a", flag=None)
    assert resolve_mpp(differ | {"openslide.mpp-y": "0.26"}, slide="a", flag=None).xy == (0.25, 0.26)


@pytest.mark.parametrize(("text", "mpp"), [("0.25", (0.25, 0.25)), ("0.25,0.26", (0.25, 0.26)), (" 0.5 ", (0.5, 0.5))])
def test_mpp_as_text(text: Any, mpp: Any) -> None:
    assert parse_mpp(text) == mpp


@pytest.mark.parametrize("text", ["", "20x40x2", "zero", "-1", "0", "inf", "1,2,3"])
def test_text_that_is_no_mpp(text: Any) -> None:
    with pytest.raises(ValueError, match=r"resolution|convert"):
        parse_mpp(text)
