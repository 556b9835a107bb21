"""How the texts of one domain look to all experts: the pattern that a chunk is held against.

One reconstruction NLL says little about texts of no domain: a table of numbers rebuilds more easily than any prose.
Reconstruction NLLs under all experts and under the crouter alone, taken together, say much more: a play is rebuilt
like a novel by the novels' expert, and unlike one by all others.

Axes: `N` texts, `n` experts; the last of `n + 1` is the crouter without any adapter.
"""

from __future__ import annotations

import hashlib
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
from ..utils.io import replaced_file
from .calibration import ON_DISK, nearest_length, quantile_at, quantiles_by_length

EVIDENCE_FILE = "evidence.safetensors"
FLOOR = 0.01  # nats that are added to a token's before its logarithm is taken
NLL, LOG_NLL = 0, 1  # the columns of `summary`
USUAL = 0.9  # quantile that distances are measured by
_SHRINK, _RIDGE = 0.03, 1e-3
_FOLDS = 5


def summary(token_reconstruction_nll: torch.Tensor) -> torch.Tensor:
    """Mean and mean logarithm of what rebuilding each token costs, `[..., T]` to `[..., 2]`, nats/token and its log.

    The logarithm tells easy tokens apart, which the mean, ruled by the few hard ones, does not.
    """
    return torch.stack([token_reconstruction_nll.mean(-1), (token_reconstruction_nll + FLOOR).log().mean(-1)], dim=-1)


@dataclass(frozen=True, eq=False)
class Profile:
    """Where the texts of one expert's domain lie among the reconstruction NLLs under the experts of a set, by length.

    Attributes:
        among: checksums of the compressors of the set's experts, in its order; in another set it does not hold.
        axes: which of the n + 1 its texts were measured under, `n` for the crouter alone; experts that joined the set
            since may be missing.
        means: of log reconstruction NLLs, `[axes]`, by length in tokens.
        precisions: inverse covariance, `[axes, axes]`.
        distances: quantiles of the squared Mahalanobis distance of texts whose documents took no part in the fit.
        margins: quantiles of the best other expert's log reconstruction NLL less this one's; empty for a lone expert.
    """

    among: tuple[str, ...]
    axes: tuple[int, ...]
    means: dict[int, np.ndarray]
    precisions: dict[int, np.ndarray]
    distances: dict[int, dict[float, float]]
    margins: dict[int, dict[float, float]]

    @classmethod
    def fit(
        cls,
        among: Sequence[str],
        number: int,
        reconstruction_nlls: Mapping[int, np.ndarray],
        documents: Mapping[int, Sequence[int] | np.ndarray],
    ) -> Profile | None:
        """Profile of an expert's held-out texts; None where these are too few at every length to tell their pattern.

        Args:
            among: checksums of the n experts' compressors.
            number: the expert's position among them.
            reconstruction_nlls: `[N, n + 1, 2]` by length, see `summary`; nan under experts that did not measure them.
            documents: `[N]` by length, which document each text comes from.

        Raises:
            InputError: no length, or reconstruction NLLs under the expert itself or the crouter alone that are not
                finite.
        """
        measured = [np.isfinite(values).all((0, 2)) for values in reconstruction_nlls.values()]
        axes = np.flatnonzero(np.all(measured, axis=0)) if measured else np.array([], dtype=int)
        if not {number, len(among)} <= set(axes.tolist()):
            raise InputError(
                "profile: expected finite reconstruction NLLs under the expert and under the crouter alone"
            )
        means, precisions, distances, margins = {}, {}, {}, {}
        others = [axis for axis in axes[:-1] if axis != number]
        for length, values in reconstruction_nlls.items():
            log_reconstruction_nll = values[:, axes, LOG_NLL].astype(np.float64)
            away = distances_across(log_reconstruction_nll, documents[length])
            if away is None:
                continue
            (means[length], precisions[length]), distances[length] = gaussian(log_reconstruction_nll), away
            if others:
                margins[length] = values[:, others, LOG_NLL].min(1) - values[:, number, LOG_NLL]
        if not means:
            return None
        return cls(
            tuple(among), tuple(axes.tolist()), means, precisions, quantiles_by_length(distances, "distances"),
            quantiles_by_length(margins, "margins") if margins else {},
        )  # fmt: skip

    @property
    def digest(self) -> str:
        """Checksum of what the profile says."""
        content = hashlib.sha256(repr((self.axes, self.distances, self.margins)).encode())
        for table in (self.means, self.precisions):
            for values in table.values():
                content.update(np.ascontiguousarray(values).tobytes())
        return content.hexdigest()

    def distance(self, log_reconstruction_nll: np.ndarray, tokens: int) -> float:
        """How far a text lies from the expert's own: 1 is what nine of ten of those stay under; no unit.

        Args:
            log_reconstruction_nll: under every expert and the crouter alone, `[n + 1]`.
            tokens: the text's length; the nearest measured length (by ratio) speaks for it.
        """
        length = nearest_length(self.means, tokens)
        point = np.asarray(log_reconstruction_nll, np.float64)[None, self.axes]
        away = squared_distance(point, self.means[length], self.precisions[length])[0]
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
    """Reconstruction NLLs of held-out texts of every expert under all experts of a set: what profiles are fitted on.

    Attributes:
        weights: checksum of each expert's compressor that was measured, by name; its order is that of the columns.
        texts: checksum of each expert's texts that were measured (`Texts.checksum`), by name.
        reconstruction_nlls: by expert and length, `[N, n + 1, 2]` (see `summary`), float32; nan where a text was not
            measured.
        documents: by expert and length, `[N]`, int64: which document each text comes from.
    """

    weights: dict[str, str]
    texts: dict[str, str]
    reconstruction_nlls: dict[str, dict[int, np.ndarray]]
    documents: dict[str, dict[int, np.ndarray]]

    def profiles(self, weights: Mapping[str, str]) -> dict[str, Profile | None]:
        """Profile of each expert of a set, among those that measured its texts; None where it has too few of them.

        Args:
            weights: checksum of each expert's compressor, in the set's order.
        """
        columns = {name: i for i, name in enumerate(self.weights) if weights.get(name) == self.weights[name]}
        found: dict[str, Profile | None] = {}
        for number, name in enumerate(weights):
            rows = {}
            for length, values in self.reconstruction_nlls.get(name, {}).items() if name in columns else ():
                rows[length] = np.full((len(values), len(weights) + 1, 2), np.nan, np.float32)
                rows[length][:, -1] = values[:, -1]
                for column, other in enumerate(weights):
                    if other in columns:
                        rows[length][:, column] = values[:, columns[other]]
            whole = rows and all(np.isfinite(values[:, [number, -1]]).all() for values in rows.values())
            found[name] = Profile.fit(tuple(weights.values()), number, rows, self.documents[name]) if whole else None
        return found

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `evidence.safetensors` into a set's folder, whole or not at all; returns its path."""
        tensors = {}
        for name, lengths in self.reconstruction_nlls.items():
            for length, values in lengths.items():
                tensors[f"{name}/{length}/{ON_DISK}"] = np.ascontiguousarray(values, np.float32)
                tensors[f"{name}/{length}/documents"] = np.asarray(self.documents[name][length], np.int64)
        path = Path(folder) / EVIDENCE_FILE
        with replaced_file(path) as part:
            save_file(tensors, part, {"measured": json.dumps({"weights": self.weights, "texts": self.texts})})
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
        reconstruction_nlls: dict[str, dict[int, np.ndarray]] = {}
        documents: dict[str, dict[int, np.ndarray]] = {}
        try:
            with safe_open(path, "np") as file:
                about = json.loads(file.metadata()["measured"])
                weights, texts = ({str(name): str(value) for name, value in about[key].items()}
                                  for key in ("weights", "texts"))  # fmt: skip
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    name, length, what = key.split("/")
                    table = {ON_DISK: reconstruction_nlls, "documents": documents}[what]
                    table.setdefault(name, {})[int(length)] = file.get_tensor(key)
            for name, lengths in reconstruction_nlls.items():
                for length, values in lengths.items():
                    shape = (len(documents[name][length]), len(weights) + 1, 2)
                    if values.shape != shape:
                        raise ValueError(
                            f"expected reconstruction NLLs of shape {list(shape)}, got {list(values.shape)}"
                        )
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not a set's evidence, or damaged ({error!r})") from error
        return cls(weights, texts, reconstruction_nlls, documents)
