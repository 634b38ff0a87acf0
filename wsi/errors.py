"""Every error raised on purpose.

::

    WsiError
     ├── UsageError                    USAGE                what was asked makes no sense; exit code 2
     │    ├── UnknownEncoderError      MODEL_UNKNOWN
     │    ├── CohortError              BAD_COHORT
     │    ├── RunMismatchError         RUN_MISMATCH
     │    └── DivergedError            DIVERGED
     ├── SlideError                    a slide cannot be used as it is
     │    ├── SlideNotFoundError       NOT_FOUND
     │    ├── EmptyFileError           EMPTY_FILE
     │    ├── NotASlideError           NOT_A_SLIDE
     │    ├── PixelsDifferError        PIXELS_DIFFER
     │    ├── TruncatedSlideError      TRUNCATED
     │    ├── IncompleteSlideError     INCOMPLETE_SLIDE
     │    ├── UnsupportedPixelError    UNSUPPORTED_PIXEL
     │    ├── NeedsConversionError     NEEDS_CONVERSION
     │    ├── ReadError                READ_FAILED
     │    ├── TooManyBadTilesError     TOO_MANY_BAD_TILES
     │    ├── SourceChangedError       SOURCE_CHANGED
     │    ├── WorkerDiedError          WORKER_DIED
     │    └── ResolutionError
     │         ├── MissingMppError     MPP_MISSING
     │         ├── ImplausibleMppError MPP_IMPLAUSIBLE
     │         └── TooCoarseError      MPP_TOO_COARSE
     ├── AnnotationError               BAD_ANNOTATION       a GeoJSON file that cannot be understood
     ├── StoreError                    what is on disk is not what was promised
     │    ├── StoreFormatError         STORE_FORMAT
     │    ├── StoreCorruptError        STORE_CORRUPT
     │    ├── NotExtractedError        NOT_EXTRACTED
     │    ├── EncoderChangedError      ENCODER_CHANGED
     │    ├── BadFeaturesError         BAD_FEATURES
     │    └── SlideBusyError           BUSY
     └── EnvironmentFaultError         this machine cannot do the work; exit code 5
          ├── OutputNotWritableError   OUTPUT_NOT_WRITABLE
          ├── DiskFullError            DISK_FULL
          ├── DeviceError              DEVICE
          ├── MissingWeightsError      MODEL_MISSING
          ├── ModelMismatchError       MODEL_MISMATCH
          └── UnsafePickleError        MODEL_UNSAFE

A message is one line: which file, what is wrong, what to do. ``code`` is stable: it stands in ``report.jsonl`` and is
what scripts may rely on.
"""

from typing import ClassVar

__all__ = [
    "AnnotationError",
    "BadFeaturesError",
    "CohortError",
    "DeviceError",
    "DiskFullError",
    "DivergedError",
    "EmptyFileError",
    "EncoderChangedError",
    "EnvironmentFaultError",
    "ImplausibleMppError",
    "IncompleteSlideError",
    "MissingMppError",
    "MissingWeightsError",
    "ModelMismatchError",
    "NeedsConversionError",
    "NotASlideError",
    "NotExtractedError",
    "OutputNotWritableError",
    "PixelsDifferError",
    "ReadError",
    "ResolutionError",
    "RunMismatchError",
    "SlideBusyError",
    "SlideError",
    "SlideNotFoundError",
    "SourceChangedError",
    "StoreCorruptError",
    "StoreError",
    "StoreFormatError",
    "TooCoarseError",
    "TooManyBadTilesError",
    "TruncatedSlideError",
    "UnknownEncoderError",
    "UnsafePickleError",
    "UnsupportedPixelError",
    "UsageError",
    "WorkerDiedError",
    "WsiError",
]


class WsiError(Exception):
    """Base of every error this project raises on purpose; ``code`` is stable."""

    code: ClassVar[str] = "ERROR"


class UsageError(WsiError):
    """What was asked for contradicts itself or what is already on disk."""

    code = "USAGE"


class SlideError(WsiError):
    """A slide cannot be used as it is."""

    code = "SLIDE"


class SlideNotFoundError(SlideError):
    """There is no file of this name, or it went away."""

    code = "NOT_FOUND"


class EmptyFileError(SlideError):
    """The file has no bytes."""

    code = "EMPTY_FILE"


class NotASlideError(SlideError):
    """The content is of no format that any reader knows."""

    code = "NOT_A_SLIDE"


class PixelsDifferError(SlideError):
    """A reader decodes the slide's pixels into others than OpenSlide shows."""

    code = "PIXELS_DIFFER"


class TruncatedSlideError(SlideError):
    """The file ends before the pixels it promises."""

    code = "TRUNCATED"


class IncompleteSlideError(SlideError):
    """A slide of several files lacks some of them."""

    code = "INCOMPLETE_SLIDE"


class UnsupportedPixelError(SlideError):
    """The pixels are not 8-bit colour."""

    code = "UNSUPPORTED_PIXEL"


class NeedsConversionError(SlideError):
    """The file can be read, but not in tiles."""

    code = "NEEDS_CONVERSION"


class ReadError(SlideError):
    """The pixels of one region could not be read."""

    code = "READ_FAILED"


class TooManyBadTilesError(SlideError):
    """More tiles than allowed could not be read."""

    code = "TOO_MANY_BAD_TILES"


class SourceChangedError(SlideError):
    """The slide file is not the one the store was made from."""

    code = "SOURCE_CHANGED"


class WorkerDiedError(SlideError):
    """A process died more than once with this slide at work."""

    code = "WORKER_DIED"


class ResolutionError(SlideError):
    """The slide's microns per pixel do not allow what was asked."""

    code = "RESOLUTION"


class MissingMppError(ResolutionError):
    """The file does not say its microns per pixel."""

    code = "MPP_MISSING"


class ImplausibleMppError(ResolutionError):
    """The file says microns per pixel that no slide scanner has."""

    code = "MPP_IMPLAUSIBLE"


class TooCoarseError(ResolutionError):
    """The scan is coarser than the resolution asked for, and upsampling was not allowed.

    Attributes:
        fact: without what helps, which hangs on what the slide is wanted for.
    """

    code = "MPP_TOO_COARSE"

    def __init__(self, fact: str, remedy: str = "") -> None:
        super().__init__(f"{fact}: {remedy}" if remedy else fact)
        self.fact = fact
        self.remedy = remedy


class AnnotationError(WsiError):
    """An annotation file cannot be understood."""

    code = "BAD_ANNOTATION"


class StoreError(WsiError):
    """What is on disk is not what was promised."""

    code = "STORE"


class StoreFormatError(StoreError):
    """The folder is not a feature store, or one of a version this release does not know."""

    code = "STORE_FORMAT"


class StoreCorruptError(StoreError):
    """Bytes on disk differ from those that were written."""

    code = "STORE_CORRUPT"


class NotExtractedError(StoreError):
    """The store holds no such slide, or no features of this encoder for it."""

    code = "NOT_EXTRACTED"


class EncoderChangedError(StoreError):
    """The store holds features under this name that were made by something else."""

    code = "ENCODER_CHANGED"


class SlideBusyError(StoreError):
    """Another process is working on this slide."""

    code = "BUSY"


class EnvironmentFaultError(WsiError):
    """This machine cannot do the work."""

    code = "ENVIRONMENT"


class OutputNotWritableError(EnvironmentFaultError):
    """The output folder does not take what the store needs: write, rename, fsync."""

    code = "OUTPUT_NOT_WRITABLE"


class DiskFullError(EnvironmentFaultError):
    """No space is left."""

    code = "DISK_FULL"


class DeviceError(EnvironmentFaultError):
    """The device asked for is not there, or failed."""

    code = "DEVICE"


class UnknownEncoderError(UsageError):
    """No encoder of this name."""

    code = "MODEL_UNKNOWN"


class MissingWeightsError(EnvironmentFaultError):
    """The weights are not on this machine and may not, or cannot, be fetched."""

    code = "MODEL_MISSING"


class ModelMismatchError(EnvironmentFaultError):
    """The weights do not fit the model, or are not the ones expected."""

    code = "MODEL_MISMATCH"


class UnsafePickleError(EnvironmentFaultError):
    """The weight file would run code when loaded."""

    code = "MODEL_UNSAFE"


class CohortError(UsageError):
    """A table of labels cannot be used: a column is missing, a class has too few patients, sites contradict."""

    code = "BAD_COHORT"


class RunMismatchError(UsageError):
    """A trained run does not fit what it is applied to: another encoder, cohort or configuration."""

    code = "RUN_MISMATCH"


class DivergedError(UsageError):
    """The loss is no longer a number: the settings do not train."""

    code = "DIVERGED"


class BadFeaturesError(StoreError):
    """A feature file cannot be understood, or holds vectors that are not finite."""

    code = "BAD_FEATURES"
