"""How the texts of one domain look to all experts: the pattern of their residuals, against which a chunk is held.

One residual says little about texts of no domain: a table of numbers rebuilds more easily than any prose. Residuals
under all experts and under the crouter alone, taken together, say much more: a play is rebuilt like a novel by the
novels' expert, and unlike one by all others.

Axes: `N` texts, `n` experts; the last of `n + 1` is the crouter without any adapter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import InputError
from ..storage import replaced_file
from .calibration import nearest_length, quantile_at, quantiles_by_length

EVIDENCE_FILE = "evidence.safetensors"
FLOOR = 0.01  # nats that are added to a token's before its logarithm is taken
NATS, LOGS = 0, 1  # what `summary` holds
USUAL = 0.9  # quantile that distances are measured by
_SHRINK, _RIDGE = 0.03, 1e-3
_FOLDS = 5


def summary(token_nats: torch.Tensor) -> torch.Tensor:
    """Mean and mean logarithm of what rebuilding each token costs, `[..., T]` to `[..., 2]`, nats/token and its log.

    The logarithm tells easy tokens apart, which the mean, ruled by the few hard ones, does not.
    """
    return torch.stack([token_nats.mean(-1), (token_nats + FLOOR).log().mean(-1)], dim=-1)


@dataclass(frozen=True, eq=False)
class Profile:
    """Where the texts of one expert's domain lie among the residuals under all experts of a set, by length.

    Attributes:
        among: checksums of the compressors of the set's experts, in its order; among others it does not hold.
        means: of log residuals, `[n + 1]`, by length in tokens.
        precisions: inverse covariance, `[n + 1, n + 1]`.
        distances: quantiles of the squared Mahalanobis distance of texts whose documents took no part in the fit.
        margins: quantiles of how much worse the best other expert rebuilt them, nats/token; empty for a lone expert.
    """

    among: tuple[str, ...]
    means: dict[int, np.ndarray]
    precisions: dict[int, np.ndarray]
    distances: dict[int, dict[float, float]]
    margins: dict[int, dict[float, float]]

    @classmethod
    def fit(
        cls,
        among: Sequence[str],
        number: int,
        residuals: Mapping[int, np.ndarray],
        documents: Mapping[int, Sequence[int] | np.ndarray],
    ) -> Profile | None:
        """Profile of an expert's held-out texts; None where some length has too few to tell their pattern.

        Args:
            among: checksums of the n experts' compressors.
            number: the expert's place among them.
            residuals: `[N, n + 1, 2]` by length, see `summary`.
            documents: `[N]` by length, which document each text comes from.

        Raises:
            InputError: residuals that are not finite, or no length.
        """
        if not residuals or not all(np.isfinite(values).all() for values in residuals.values()):
            raise InputError("profile: expected finite residuals for at least one length of text")
        means, precisions, distances, margins = {}, {}, {}, {}
        for length, values in residuals.items():
            logs, nats = values[..., LOGS].astype(np.float64), values[:, :-1, NATS]
            away = distances_across(logs, documents[length])
            if away is None:
                return None
            (means[length], precisions[length]), distances[length] = gaussian(logs), away
            others = np.delete(nats, number, axis=1)
            if others.shape[1]:
                margins[length] = others.min(1) - nats[:, number]
        return cls(
            tuple(among), means, precisions, quantiles_by_length(distances, "distances"),
            quantiles_by_length(margins, "margins") if margins else {},
        )  # fmt: skip

    def distance(self, logs: np.ndarray, tokens: int) -> float:
        """How far a text lies from the expert's own: 1 is what nine of ten of those stay under; no unit.

        Args:
            logs: log residuals, `[n + 1]`.
            tokens: the text's length; the nearest measured length (by ratio) speaks for it.
        """
        length = nearest_length(self.means, tokens)
        away = squared_distance(np.asarray(logs, np.float64)[None], self.means[length], self.precisions[length])[0]
        return float(away / quantile_at(self.distances, tokens, USUAL))

    def limit(self, tokens: int, quantile: float) -> float:
        """The distance that this share of the expert's own texts stays under."""
        return quantile_at(self.distances, tokens, quantile) / quantile_at(self.distances, tokens, USUAL)

    def margin(self, tokens: int, quantile: float) -> float:
        """The margin that this share of the expert's own texts stays under; minus infinity for a lone expert."""
        return quantile_at(self.margins, tokens, quantile) if self.margins else float("-inf")


def gaussian(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[d]` and inverse of the shrunk covariance `[d, d]` of points `[N, d]`."""
    covariance = np.atleast_2d(np.cov(points.T))
    diagonal = np.diag(np.diag(covariance))
    shrunk = (1 - _SHRINK) * covariance + _SHRINK * diagonal + _RIDGE * np.eye(len(covariance))
    return points.mean(0), np.linalg.inv(shrunk)


def squared_distance(points: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance `[N]` of points `[N, d]`."""
    away = points - mean
    return np.einsum("ij,jk,ik->i", away, precision, away)


def distances_across(points: np.ndarray, documents: Sequence[int] | np.ndarray) -> np.ndarray | None:
    """Distance of each point `[N, d]` from a Gaussian of other documents' points; None where these are too few."""
    groups = np.unique(np.asarray(documents), return_inverse=True)[1]
    folds = groups % min(_FOLDS, groups.max() + 1)
    rest = [points[folds != fold] for fold in np.unique(folds)]
    if len(rest) < 2 or min(map(len, rest)) < 2 * points.shape[1]:
        return None
    away = np.empty(len(points))
    for fold, some in zip(np.unique(folds), rest, strict=True):
        away[folds == fold] = squared_distance(points[folds == fold], *gaussian(some))
    return away


@dataclass(frozen=True, eq=False)
class Evidence:
    """Residuals of held-out texts of every expert under all experts of a set: what profiles are fitted on.

    Attributes:
        weights: checksum of each expert's compressor that was measured, by name; its order is that of the columns.
        residuals: by expert and length, `[N, n + 1, 2]` (see `summary`), float32; nan where a text was not measured.
        documents: by expert and length, `[N]`, int64: which document each text comes from.
    """

    weights: dict[str, str]
    residuals: dict[str, dict[int, np.ndarray]]
    documents: dict[str, dict[int, np.ndarray]]

    def profiles(self, weights: Mapping[str, str]) -> dict[str, Profile | None]:
        """Profile of each expert of a set, all among each other; None where its texts were not measured under all.

        Args:
            weights: checksum of each expert's compressor, in the set's order.
        """
        same = {name for name, checksum in weights.items() if self.weights.get(name) == checksum}
        found: dict[str, Profile | None] = dict.fromkeys(weights)
        if same != set(weights):
            return found
        columns = [*(list(self.weights).index(name) for name in weights), len(self.weights)]
        for number, name in enumerate(weights):
            rows = {length: values[:, columns] for length, values in self.residuals.get(name, {}).items()}
            if rows and all(np.isfinite(values).all() for values in rows.values()):
                found[name] = Profile.fit(tuple(weights.values()), number, rows, self.documents[name])
        return found

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `evidence.safetensors` into a set's folder, whole or not at all; returns its path."""
        tensors = {}
        for name, lengths in self.residuals.items():
            for length, values in lengths.items():
                tensors[f"{name}/{length}/residuals"] = np.ascontiguousarray(values, np.float32)
                tensors[f"{name}/{length}/documents"] = np.asarray(self.documents[name][length], np.int64)
        path = Path(folder) / EVIDENCE_FILE
        with replaced_file(path) as part:
            save_file(tensors, part, {"weights": json.dumps(self.weights)})
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Evidence | None:
        """What `save` wrote; None where there is none.

        Raises:
            InputError: damaged.
        """
        path = Path(folder) / EVIDENCE_FILE
        if not path.exists():
            return None
        residuals: dict[str, dict[int, np.ndarray]] = {}
        documents: dict[str, dict[int, np.ndarray]] = {}
        try:
            with safe_open(path, "np") as file:
                weights = {str(name): str(v) for name, v in json.loads(file.metadata()["weights"]).items()}
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    name, length, what = key.split("/")
                    table = {"residuals": residuals, "documents": documents}[what]
                    table.setdefault(name, {})[int(length)] = file.get_tensor(key)
            for name, lengths in residuals.items():
                for length, values in lengths.items():
                    shape = (len(documents[name][length]), len(weights) + 1, 2)
                    if values.shape != shape:
                        raise ValueError(f"expected residuals of shape {list(shape)}, got {list(values.shape)}")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not a set's evidence, or damaged ({error!r})") from error
        return cls(weights, residuals, documents)
