"""Slide keys: one file name per path, whatever the path."""

import unicodedata
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from features.keys import readable_part, safe_name, slide_key, slide_path

PATHS = st.text(min_size=1, max_size=300)


def test_same_names_in_two_folders_and_extensions_do_not_collide() -> None:
    keys = {slide_key(path) for path in ("a/x.svs", "b/x.svs", "x.svs", "x.tif", "X.svs", "a_x.svs", "a%2Fx.svs")}
    assert len({key.casefold() for key in keys}) == 7


@given(PATHS)
def test_a_key_is_a_plain_file_name_everywhere(path: Any) -> None:
    key = slide_key(path)
    assert len(key.encode()) <= 190
    assert not set(key) & set('/\\:*?"<>|\0\n ')
    assert key not in (".", "..")


@given(PATHS, PATHS)
def test_different_paths_have_different_keys_on_any_file_system(one: Any, other: Any) -> None:
    same = unicodedata.normalize("NFC", one.replace("\\", "/")) == unicodedata.normalize(
        "NFC", other.replace("\\", "/")
    )
    assert (slide_key(one).casefold() == slide_key(other).casefold()) == same


def test_composed_and_decomposed_letters_are_one_name() -> None:
    assert slide_key("Ünï.svs") == slide_key(unicodedata.normalize("NFD", "Ünï.svs"))


@given(st.text(min_size=1, max_size=40).filter(lambda t: "\\" not in t))
def test_the_path_can_be_read_in_the_key(path: Any) -> None:
    key = slide_key(path)
    if len(key) < 180:
        assert slide_path(key) == readable_part(key) == unicodedata.normalize("NFC", path)


def test_very_long_paths_keep_their_end() -> None:
    assert readable_part(slide_key("folder/" * 60 + "case-17.svs")).endswith("/case-17.svs")


def test_encoder_names_as_folders() -> None:
    assert safe_name("timm:vit_small_patch16_224.augreg_in21k") == "timm-vit_small_patch16_224.augreg_in21k"
    assert safe_name("my_encoder.py:build") == "my_encoder.py-build"
    assert safe_name("../../etc") == "etc"
    assert safe_name("::") == "encoder"
