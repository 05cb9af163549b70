"""Estimate the variance of a sum of ordered, dependent values by blocks of neighbors, or of few values by waves.

Neighboring windows of a text are alike, so resampling them one by one gives intervals that are too narrow. The circular
block bootstrap (Politis & Romano 1992) draws blocks of neighbors instead. Its variance needs no drawing: it is that of
the sum of one block, over all places where a block can begin, times the number of blocks.

The length comes from the data (Politis & White 2004, with the correction of Patton, Politis & White 2009). That length
gives the variance the least mean squared error, but leaves it biased downwards, so that intervals cover too little. For
coverage, blocks must be longer (Sun, Phillips & Jin 2008): twice as long here, starting from at least the cube root of
the number of values, for what a short series cannot show. The rest of the bias follows from the same estimates and is
corrected.

A short series has too few blocks for that. Its variance is the mean square of the series' projections on its slowest
cosine waves, which memory hardly touches, with one degree of freedom per wave (Lazarus, Lewis, Stock & Watson 2018).
`benchmarks/coverage.py` measures the coverage of both.
"""

from dataclasses import dataclass

import numpy

LONGER = 2  # times the length with the least mean squared error
FEWEST_BLOCKS = 5
FEWEST_FOR_BLOCKS = 60  # values; a shorter series takes waves
LARGEST_BIAS = 0.5  # of the variance; more than that says that the series is too short to correct it


@dataclass(frozen=True)
class Blocks:
    """Blocks of `length` neighbors in a series, and the share `bias` of the variance that they miss."""

    length: int
    bias: float


def blocks_of(series: numpy.ndarray) -> Blocks | None:
    """Return the blocks to resample a series [n] in, or None if it is too short for blocks."""
    count = len(series)
    if count < FEWEST_FOR_BLOCKS:
        return None
    best, memory = optimal_length(series)
    length = min(int(LONGER * max(best, count ** (1 / 3))), count // FEWEST_BLOCKS)
    return Blocks(length, min(max(memory, 0.0) / length, LARGEST_BIAS))


def optimal_length(series: numpy.ndarray) -> tuple[float, float]:
    """Return the block length with the least mean squared error, and what a block misses of the variance.

    The latter is the sum of |lag| * autocovariance over the long-run variance: blocks of length b miss this share of
    the variance divided by b. Autocovariances count up to twice the lag from which on five in a row are noise, with a
    flat-top window, as in `arch.bootstrap.optimal_block_length`. Equal values have length 1 and miss nothing.
    """
    count = len(series)
    deviations = series - series.mean()
    needed = max(5, int(numpy.log10(count)))  # how many negligible lags in a row end the search
    furthest = min(int(numpy.ceil(numpy.sqrt(count))) + needed, count - 2)
    lagged = numpy.array([deviations[lag:] @ deviations[: count - lag] / count for lag in range(furthest + 1)])
    if lagged[0] < numpy.finfo(float).tiny:
        return 1.0, 0.0
    negligible = numpy.abs(lagged[1:] / lagged[0]) < 2 * numpy.sqrt(numpy.log10(count) / count)
    runs = numpy.convolve(negligible, numpy.ones(needed), mode="valid") if len(negligible) >= needed else []
    ends = numpy.flatnonzero(numpy.asarray(runs) > needed - 0.5)
    last = min(2 * (int(ends[0]) + 1), furthest) if len(ends) else furthest
    lags = numpy.arange(1, last + 1)
    window = numpy.minimum(1, 2 * (1 - lags / last))
    spread = lagged[0] + 2 * (window * lagged[1 : last + 1]).sum()
    slope = 2 * (window * lags * lagged[1 : last + 1]).sum()
    largest = numpy.ceil(min(3 * numpy.sqrt(count), count / 3))
    if spread <= 0:  # the estimate of the long-run variance failed
        return float(largest), 0.0
    memory = slope / spread
    return float(min((1.5 * memory**2 * count) ** (1 / 3), largest)), float(memory)


def covariance(series: numpy.ndarray) -> tuple[numpy.ndarray, float]:
    """Return the covariance [k, k] of the sums of several series [k, n] over the same places, whose means are zero.

    The second value is the degrees of freedom of that covariance. The last series decides the length of blocks.
    """
    drawn = blocks_of(series[-1])
    if drawn is None:
        return of_waves(series)
    return of_blocks(series, drawn), series.shape[1] / drawn.length - 1


def of_blocks(series: numpy.ndarray, blocks: Blocks) -> numpy.ndarray:
    """Return that covariance, estimated by blocks."""
    count, length = series.shape[1], blocks.length
    circle = numpy.concatenate([series, series[:, : length - 1]], axis=1)
    sums = numpy.concatenate([numpy.zeros((len(series), 1)), circle.cumsum(axis=1)], axis=1)
    sums = sums[:, length:] - sums[:, :-length]
    # count / (count - length): the deviations are from the series' own mean, as for the usual n / (n - 1)
    return sums @ sums.T / length * count / (count - length) / (1 - blocks.bias)


def of_waves(series: numpy.ndarray) -> tuple[numpy.ndarray, int]:
    """Return that covariance, estimated by slow cosine waves, and their number, which is its degrees of freedom."""
    count = series.shape[1]
    waves = min(max(int(0.4 * count ** (2 / 3)), 2), count - 1)
    angles = numpy.pi * numpy.arange(1, waves + 1)[:, None] * (numpy.arange(count) + 0.5) / count
    projected = series @ (numpy.sqrt(2) * numpy.cos(angles)).T
    return projected @ projected.T / waves, waves
