"""What residual is usual for a crouter: quantiles over held-out documents, and the verdict they give on a chunk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..storage import write_json

CALIBRATION_FILE = "calibration.json"
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
UNCALIBRATED = "uncalibrated"


@dataclass(frozen=True)
class Calibration:
    """Quantiles of the residual of chunks that the crouter was not trained on.

    A verdict says how far a chunk can be rebuilt from its latents, not whether a host reads them right.

    Attributes:
        quantiles: residual in nats/token by quantile (0 to 1).
        chunks: calibration chunks.
        documents: calibration documents that these chunks come from.
        fingerprint: fingerprint of the crouter that was measured.
    """

    quantiles: dict[float, float]
    chunks: int
    documents: int
    fingerprint: str

    @classmethod
    def fit(cls, residuals: Sequence[float] | np.ndarray, documents: int, fingerprint: str) -> Calibration:
        """Calibration from measured residuals.

        Args:
            residuals: one residual a chunk, nats/token; documents kept out of training and out of every test.
            documents: number of documents that the chunks come from.
            fingerprint: fingerprint of the crouter that was measured.

        Raises:
            InputError: no residual, or one that is not finite.
        """
        values = np.asarray(residuals, dtype=np.float64).ravel()
        if not values.size or not np.isfinite(values).all():
            raise InputError(f"calibration: expected finite residuals of at least one chunk, got {values.size} values")
        quantiles = dict(zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True))
        return cls(quantiles, int(values.size), int(documents), fingerprint)

    def verdict(self, residual: float) -> str:
        """`rebuildable` up to the 90% quantile, `uncertain` up to the 99% quantile, `foreign` above.

        Args:
            residual: nats/token of one chunk.
        """
        if residual <= self.quantiles[0.9]:
            return "rebuildable"
        return "uncertain" if residual <= self.quantiles[0.99] else "foreign"

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `calibration.json` into a crouter's folder, whole or not at all; returns its path."""
        path = Path(folder) / CALIBRATION_FILE
        write_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Calibration | None:
        """Calibration in a crouter's folder, or None where there is none.

        Raises:
            InputError: the file is damaged or not a calibration.
        """
        path = Path(folder) / CALIBRATION_FILE
        if not path.exists():
            return None
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            quantiles = {float(key): float(value) for key, value in fields["quantiles"].items()}
            calibration = cls(quantiles, int(fields["chunks"]), int(fields["documents"]), str(fields["fingerprint"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not a calibration, or damaged ({error!r})") from error
        values = [quantiles.get(key, float("nan")) for key in QUANTILES]
        if not np.isfinite(values).all() or sorted(values) != values:
            raise InputError(f"{path}: expected finite, rising quantiles {QUANTILES}")
        return calibration


def verdict(calibration: Calibration | None, residual: float) -> str:
    """The verdict on a chunk, `uncalibrated` without a calibration.

    Args:
        calibration: of the crouter at hand, if it has one.
        residual: nats/token of the chunk.
    """
    return calibration.verdict(residual) if calibration else UNCALIBRATED
