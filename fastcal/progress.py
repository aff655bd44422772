"""`Progress`: how far a calibration is, wherever it runs."""

from dataclasses import dataclass


@dataclass
class Progress:
    """How far a calibration is.

    Attributes:
        batches: Batches observed.
        images: Samples observed: the batches' first dimensions added up.
        total: Batches there will be; None where the feed does not know.
        seconds: Time since the first batch was asked for.
        waited: Seconds of these spent waiting for batches.
    """

    batches: int = 0
    images: int = 0
    total: int | None = None
    seconds: float = 0.0
    waited: float = 0.0
