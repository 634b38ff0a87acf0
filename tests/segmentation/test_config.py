"""Settings of a whole segmentation: they fit each other, and come back from JSON as they were."""

import json
from dataclasses import replace
from typing import Any

import pytest

from segmentation.config import METHODS, SegmentationConfig
from segmentation.heat import HeatOptions
from segmentation.refine import RefineConfig
from tests.segmentation.trained import CONFIG
from wsi.errors import UsageError
from wsi.settings import changed

TWO = SegmentationConfig.of_classes(("tumour", "stroma"))


@pytest.mark.parametrize("config", [TWO, CONFIG, CONFIG.with_method("picture")])
def test_what_was_saved_gives_the_same_settings_again(config: SegmentationConfig) -> None:
    values = json.loads(json.dumps(config.as_json()))
    again = changed(SegmentationConfig.of_classes(config.classes, config.method), values, where="model.json")
    assert json.dumps(again.as_json()) == json.dumps(config.as_json())


def test_what_patches_are_is_what_the_classifier_tells_apart() -> None:
    assert CONFIG.facts.classes == ("background", "tumour")
    assert (CONFIG.facts.mpp, CONFIG.facts.patch_px) == (1.0, 16)
    assert TWO.classes == ("tumour", "stroma")


@pytest.mark.parametrize("method", METHODS)
def test_the_second_network_sees_a_map_in_a_cascade_alone(method: Any) -> None:
    assert SegmentationConfig.of_classes(("a",), method).refinement.heat == (method == "cascade")
    there_and_back = TWO.with_method(method).with_method("cascade")
    assert there_and_back == TWO
    assert TWO.with_method(method).refinement.in_channels == 3 + 2 * (method == "cascade")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "both"}, "method is one of cascade, patches, picture, dense, not 'both'"),
        ({"method": "picture"}, "in a cascade alone, not in picture"),
        ({"refinement": RefineConfig(("stroma", "tumour"))}, "of the same classes"),
        ({"refinement": RefineConfig(("tumour", "stroma"), heat=False)}, "in a cascade alone"),
        ({"heat": HeatOptions(steps=3)}, "cannot be laid in 3 equal steps"),
        ({"folds": 1}, "folds are 2 or more"),
        ({"validation": 1.0}, "validation is from 0 to below 1"),
        ({"seed": -1}, "seed from 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(TWO, **wrong)
