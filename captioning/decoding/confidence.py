"""The confidence of a caption: the share of its content words that people are expected to say of the image too.

A caption's log-probability ranks captions, but it is no share of anything. Isotonic regression on the validation images
turns it into one. Knows nothing of models; the content words are those of `captioning.scoring.words`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from captioning.scoring.words import unsupported_counts

# Chosen on the validation images of Flickr8k (docs/lab/log.md). What consensus expects of its own caption ranks no better.
LENGTH_EXPONENT = 0.7
FEWEST = 100  # validation images: with fewer the confidence is five points off and more
GROUP = 10  # captions that count as one in the regression
BINS = 10  # of a reliability diagram
# Each has a table of its own: consensus takes less probable captions, which for their probability are better.
BEAM, CONSENSUS = "beam", "consensus"


class Bin(NamedTuple):
    """Captions of about the same confidence."""

    low: float  # the least confidence that the bin takes
    captions: int
    confidence: float  # mean
    supported: float  # mean share of supported words


def score_of(log_probabilities: Sequence[float]) -> float:
    """Return by what captions are ranked. Args: log_probabilities: of each word and the end, as in `Hypothesis`."""
    return sum(log_probabilities) / len(log_probabilities) ** LENGTH_EXPONENT


def table_of(calibration: Mapping[str, Any] | None, consensus: bool) -> Mapping[str, Any] | None:
    """Return the table that `calibrate` made for captions of the beam alone or by consensus; None without one."""
    return (calibration or {}).get(CONSENSUS if consensus else BEAM)


def confidence_of(table: Mapping[str, Any] | None, log_probabilities: Sequence[float]) -> float | None:
    """Return the confidence of a caption, 0 .. 1; None without a table. Args: as `table_of` and `score_of`."""
    if table is None:
        return None
    return float(np.interp(score_of(log_probabilities), table["scores"], table["shares"]))


def confidence_text(confidence: float | None, table: Mapping[str, Any] | None) -> str:
    """Return 0.62 -> "0.62", None -> ""; "under 0.4" where the table, whose lowest share is 0.38, knows no more."""
    if confidence is None:
        return ""
    lowest = table["shares"][0] if table else 0.0
    return f"under {math.ceil(10 * lowest) / 10:g}" if 0 < lowest >= confidence else f"{confidence:.2f}"


def supported_shares(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the share of each caption's content words that a reference of its image has (n,); 0 without any word."""
    unsupported, content = unsupported_counts(captions, references).T
    return (content - unsupported) / np.maximum(1, content)


def calibrate(scores: np.ndarray, supported: np.ndarray) -> dict[str, Any]:
    """Fit the expected share, as it rises with the score, by pooling adjacent violators (Ayer et al., 1955).

    Between the middles of the pools it is linear (Oron and Flournoy, 2017), beyond the outermost it is constant. The
    lowest pool has captions of which nothing is right: it lies a standard deviation below every score.

    Args:
        scores: (n,) `score_of` each caption.
        supported: (n,) `supported_shares`.

    Returns:
        a table: `scores` and `shares`, lists of equal length that rise, and `images`, n. A checkpoint keeps it under the
        way of decoding.
    """
    pools: list[np.ndarray] = []
    for group in np.array_split(np.argsort(scores, kind="stable"), max(1, len(scores) // GROUP)):
        pools.append(group)
        while len(pools) > 1 and supported[pools[-2]].mean() >= supported[pools[-1]].mean():
            pools[-2:] = [np.concatenate(pools[-2:])]
    middles, shares = ([round(float(values[pool].mean()), 6) for pool in pools] for values in (scores, supported))
    if shares[0] > 0:
        middles, shares = [round(float(scores.min() - scores.std()), 6), *middles], [0.0, *shares]
    return {"scores": middles, "shares": shares, "images": len(scores)}


def is_calibration(value: Any) -> bool:
    """Whether this, from outside, is a table for one or both ways of decoding."""
    return (
        type(value) is dict
        and 0 < len(value.keys() & {BEAM, CONSENSUS}) == len(value)
        and all(map(is_table, value.values()))
    )


def is_table(value: Any) -> bool:
    if type(value) is not dict or type(value.get("images")) is not int or value["images"] < 1:
        return False
    scores, shares = value.get("scores"), value.get("shares")
    if not (type(scores) is type(shares) is list and 0 < len(scores) == len(shares) <= value["images"]):
        return False
    if not all(type(each) is float and abs(each) < 1e30 for each in scores + shares):
        return False
    return scores == sorted(scores) and shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1


def reliability(confidence: np.ndarray, supported: np.ndarray) -> list[Bin]:
    """Sort captions into BINS ranges of confidence of equal width; ranges without captions are left out.

    Args:
        confidence, supported: (n,) of each caption.
    """
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    groups = {place / BINS: np.flatnonzero(places == place) for place in np.unique(places).tolist()}
    return [
        Bin(low, len(each), float(confidence[each].mean()), float(supported[each].mean()))
        for low, each in groups.items()
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error (Guo et al., 2017): the mean distance of a caption's bin from the truth."""
    total = sum(each.captions for each in bins)
    return sum(each.captions * abs(each.confidence - each.supported) for each in bins) / total
