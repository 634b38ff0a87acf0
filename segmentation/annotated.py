"""AnnotatedCohort: slides with what people drew on them, found by name in two folders and checked against each other."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from segmentation.sampling import IGNORED, REGION, AnnotatedSlide
from wsi.annotation import Annotation
from wsi.annotations import AnnotationFile, check_annotations, check_places, match_annotations, read_annotations
from wsi.discover import SlideSource
from wsi.errors import AnnotationError, CohortError, SlideError
from wsi.slide import Slide

__all__ = ["AnnotatedCohort", "annotated_slides", "with_class"]


@dataclass(frozen=True)
class AnnotatedCohort:
    """Slides that can be learned from, and lines about what stood in the way.

    Attributes:
        slides: with their annotations and tissue.
        notes: a line for each slide or file that was left out, and for each that is used but seems odd.
    """

    slides: tuple[AnnotatedSlide, ...]
    notes: tuple[str, ...] = ()


def annotated_slides(
    sources: Sequence[SlideSource],
    annotations: str | os.PathLike[str],
    classes: Sequence[str],
    *,
    mpp: tuple[float, float] | None = None,
) -> AnnotatedCohort:
    """Bring slides and annotations together; files find each other by name.

    A slide is left out, with a note, that has no file, cannot be read, or whose shapes lie elsewhere or are of none of the
    wanted classes. A file without any shape says that there is nothing on its slide: all of it is background.

    Args:
        sources: as ``wsi.discover.discover`` finds them; other columns of their table become facts.
        annotations: a folder of files of any kind that ``read_annotations`` knows.
        classes: the wanted ones.
        mpp: (x, y) of level 0 of all slides, where files are silent or wrong.

    Raises:
        CohortError: no slide is left.
        UsageError: there is no such folder, or two files could belong to one slide.
    """
    by_name = {str(source.location): source for source in sources}
    matches = match_annotations(by_name, annotations)
    notes = [f"{line}; left out" if line.endswith("no annotations") else line for line in matches.report()]
    slides = []
    for name, path in matches.files.items():
        try:
            slide, lines = _annotated(by_name[name], path, tuple(classes), mpp)
        except (SlideError, AnnotationError) as error:
            notes.append(f"{error}; left out")
            continue
        notes += [f"{by_name[name].relpath}: {line}" for line in lines]
        slides += [] if slide is None else [slide]
    if not slides:
        raise CohortError(f"{annotations}: no slide has annotations to learn from: {'; '.join(notes) or 'no slides'}")
    return AnnotatedCohort(tuple(slides), tuple(notes))


def _annotated(
    source: SlideSource, path: Path, classes: tuple[str, ...], mpp: tuple[float, float] | None
) -> tuple[AnnotatedSlide | None, list[str]]:
    with Slide.open(source.location, mpp=mpp, csv_mpp=source.mpp) as slide:
        contents = read_annotations(path, frame=slide.frame)
        shapes = with_class(contents, classes)
        lines = list(contents.report())
        if not shapes and contents.rejected:
            return None, [*lines, "no shape could be read; left out"]
        if shapes:
            lines += check_annotations(
                [shape for shape in shapes if shape.class_name not in (IGNORED, REGION)], slide.size, classes
            )
            misplaced = check_places(shapes, slide.size)
            if misplaced or not {shape.class_name for shape in shapes} & {*classes, REGION}:
                return None, [*lines, "left out"]
        else:
            lines.append("nothing is drawn on it: all of it counts as background")
        made = AnnotatedSlide(source.location, shapes, dict(source.table), slide.mpp.xy, slide.tissue())
        return made, lines


def with_class(contents: AnnotationFile, classes: tuple[str, ...]) -> tuple[Annotation, ...]:
    """Shapes of a file that tells no classes apart, or of a mask with a single label, are of the only class asked for."""
    names = {annotation.class_name for annotation in contents.annotations}
    if len(classes) != 1 or (names != {None} and not (contents.kind == "mask" and len(names) == 1)):
        return contents.annotations
    return tuple(replace(annotation, class_name=classes[0]) for annotation in contents.annotations)
