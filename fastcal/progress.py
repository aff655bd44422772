"""`Progress`: the progress of a calibration."""

from dataclasses import dataclass


@dataclass
class Progress:
    """The progress of a calibration.

    Attributes:
        batches: Batches observed.
        images: Samples observed: the sum of the batches' first dimensions.
        total: Batches in all; None if the feed does not know.
        seconds: Time since the first batch was asked for.
        waited: The part of these seconds spent waiting for batches.
    """

    batches: int = 0
    images: int = 0
    total: int | None = None
    seconds: float = 0.0
    waited: float = 0.0
