"""What reconstruction NLL is usual for a crouter: quantiles over held-out documents, and a chunk's grade."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers.utils.hub import cached_file

from ..crouter.loading import crouter_name
from ..errors import InputError
from ..utils.io import write_json
from ..utils.loading import from_pretrained_options

CALIBRATION_FILE = "calibration.json"
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
UNCALIBRATED = "uncalibrated"
ON_DISK = "residuals"  # what files call reconstruction NLLs since their first version


@dataclass(frozen=True)
class Calibration:
    """Quantiles of the reconstruction NLL of chunks that the crouter was not trained on.

    A grade says how far a chunk can be rebuilt from its latents, not whether a host reads them right.

    Attributes:
        quantiles: reconstruction NLL in nats/token by quantile (0 to 1).
        chunks: calibration chunks.
        documents: calibration documents that these chunks come from.
        fingerprint: fingerprint of the crouter that was measured.
    """

    quantiles: dict[float, float]
    chunks: int
    documents: int
    fingerprint: str

    @classmethod
    def fit(cls, reconstruction_nlls: Sequence[float] | np.ndarray, documents: int, fingerprint: str) -> Calibration:
        """Calibration from measured reconstruction NLLs.

        Args:
            reconstruction_nlls: one reconstruction NLL a chunk, nats/token; documents kept out of training and out of
                every test.
            documents: number of documents that the chunks come from.
            fingerprint: fingerprint of the crouter that was measured.

        Raises:
            InputError: no reconstruction NLL, or one that is not finite.
        """
        values = np.asarray(reconstruction_nlls, dtype=np.float64).ravel()
        if not values.size or not np.isfinite(values).all():
            raise InputError(
                f"calibration: expected finite reconstruction NLLs of at least one chunk, got {values.size} values"
            )
        quantiles = dict(zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True))
        return cls(quantiles, int(values.size), int(documents), fingerprint)

    def reconstruction_grade(self, reconstruction_nll: float) -> str:
        """`rebuildable` up to the 90% quantile, `uncertain` up to the 99% quantile, `foreign` above.

        Args:
            reconstruction_nll: nats/token of one chunk.
        """
        if reconstruction_nll <= self.quantiles[0.9]:
            return "rebuildable"
        return "uncertain" if reconstruction_nll <= self.quantiles[0.99] else "foreign"

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


def reconstruction_grade(calibration: Calibration | None, reconstruction_nll: float) -> str:
    """The grade of a chunk, `uncalibrated` without a calibration.

    Args:
        calibration: of the crouter at hand, if it has one.
        reconstruction_nll: nats/token of the chunk.
    """
    return calibration.reconstruction_grade(reconstruction_nll) if calibration else UNCALIBRATED


LEVELS = (0.0, *QUANTILES, 1.0)  # also the smallest and the largest value met


@dataclass(frozen=True)
class LengthCalibration:
    """What is usual for one expert on its own domain, by the length of the text: short texts rebuild more easily.

    Measured on documents kept out of its fitting and of every test.

    Attributes:
        reconstruction_nlls: nats/token under the expert, by length in tokens and by quantile (0 to 1).
        pieces: texts measured, by length.
        documents: documents that these texts come from.
        fingerprint: of the crouter, decoder included.
        weights: checksum of the expert's compressor adapter that was measured.
    """

    reconstruction_nlls: dict[int, dict[float, float]]
    pieces: dict[int, int]
    documents: int
    fingerprint: str
    weights: str

    @classmethod
    def fit(
        cls,
        reconstruction_nlls: Mapping[int, Sequence[float] | np.ndarray],
        documents: int,
        fingerprint: str,
        weights: str,
    ) -> LengthCalibration:
        """Calibration from measured reconstruction NLLs.

        Args:
            reconstruction_nlls: by length in tokens, one reconstruction NLL a text, nats/token.
            documents: number of documents that the texts come from.
            fingerprint: of the crouter, decoder included.
            weights: checksum of the compressor adapter.

        Raises:
            InputError: no length, a length without reconstruction NLLs, or one that is not finite.
        """
        if not reconstruction_nlls:
            raise InputError("calibration: expected reconstruction NLLs for at least one length of text, got none")
        pieces = {int(length): int(np.size(values)) for length, values in sorted(reconstruction_nlls.items())}
        return cls(
            quantiles_by_length(reconstruction_nlls, "reconstruction NLLs"),
            pieces,
            int(documents),
            fingerprint,
            weights,
        )

    def reconstruction_nll(self, tokens: int, quantile: float) -> float:
        """The reconstruction NLL that this share of the expert's own texts stays under, nats/token.

        Args:
            tokens: length of the text; the nearest measured length (by ratio) speaks for it.
            quantile: 0 to 1, interpolated between the measured ones.
        """
        return quantile_at(self.reconstruction_nlls, tokens, quantile)

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `calibration.json` into an expert's folder, whole or not at all; returns its path."""
        path = Path(folder) / CALIBRATION_FILE
        record = asdict(self)
        write_json(path, {ON_DISK: record.pop("reconstruction_nlls"), **record})
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> LengthCalibration:
        """Reads what `save` wrote.

        Raises:
            InputError: missing or damaged.
        """
        path = Path(folder) / CALIBRATION_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            reconstruction_nlls = _read_table(fields[ON_DISK])
            pieces = {int(length): int(count) for length, count in fields["pieces"].items()}
            fingerprint, weights = (str(fields[name]) for name in ("fingerprint", "weights"))
            calibration = cls(reconstruction_nlls, pieces, int(fields["documents"]), fingerprint, weights)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not an expert's calibration, or damaged ({error!r})") from error
        if not reconstruction_nlls:
            raise InputError(f"{path}: expected reconstruction NLLs for at least one length of text, got none")
        return calibration


def quantiles_by_length(
    values: Mapping[int, Sequence[float] | np.ndarray], what: str
) -> dict[int, dict[float, float]]:
    """Quantiles (`LEVELS`) of the values measured at each length of text.

    Raises:
        InputError: a length without values, or one that is not finite.
    """
    table = {}
    for length, row in sorted(values.items()):
        row = np.asarray(row, dtype=np.float64).ravel()
        if length < 1 or not row.size or not np.isfinite(row).all():
            raise InputError(f"calibration: expected finite {what} of {length} tokens, got {row.size} values")
        table[int(length)] = dict(zip(LEVELS, np.quantile(row, LEVELS).tolist(), strict=True))
    return table


def _read_table(table: dict[str, dict[str, float]]) -> dict[int, dict[float, float]]:
    """Quantiles by length, as JSON holds them; ValueError where they are not that."""
    found = {int(length): {float(k): float(value) for k, value in row.items()} for length, row in table.items()}
    for length, row in found.items():
        values = list(row.values())
        if length < 1 or tuple(row) != LEVELS or not np.isfinite(values).all() or sorted(values) != values:
            raise ValueError(f"expected finite, rising quantiles {LEVELS} at {length} tokens")
    return found


def nearest_length(table: Mapping[int, object], tokens: int) -> int:
    """The measured length that is nearest by ratio."""
    return min(table, key=lambda length: abs(math.log(max(tokens, 1) / length)))


def quantile_at(table: Mapping[int, Mapping[float, float]], tokens: int, quantile: float) -> float:
    """A quantile at the measured length that is nearest by ratio, interpolated between the measured quantiles."""
    row = table[nearest_length(table, tokens)]
    return float(np.interp(quantile, list(row), list(row.values())))


def load_calibration(name_or_path: str | os.PathLike | None = None) -> Calibration | None:
    """The calibration in a crouter's folder, or None where it has none.

    Args:
        name_or_path: local folder or hub name; the shipped crouter by default.

    Raises:
        InputError: it is damaged.
    """
    name = crouter_name(name_or_path)
    path = cached_file(
        name, CALIBRATION_FILE, _raise_exceptions_for_missing_entries=False, **from_pretrained_options(name, "crouter")
    )
    return Calibration.load(Path(path).parent) if path else None
