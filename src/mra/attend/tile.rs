//! Tiles of queries.

use std::ops::Range;

use crate::mra::problem::Problem;
use crate::simd::Scalar;

/// Queries of a tile, at most: with 64 channels the packed queries of a tile take a quarter of a first-level cache.
pub(crate) const TILE_QUERIES: usize = 32;

/// Lanes of a tile of the largest size.
pub(crate) fn tile_columns<T: Scalar>(problem: &Problem<'_>) -> usize {
    problem.padded::<T>(TILE_QUERIES.min(problem.block_size))
}

/// Lanes of a tile of pooled queries.
pub(crate) fn coarse_tile_columns<T: Scalar>(problem: &Problem<'_>) -> usize {
    problem.padded::<T>(TILE_QUERIES)
}

/// Tile `index` of `0..len`.
pub(crate) fn nth_tile(index: usize, len: usize) -> Range<usize> {
    index * TILE_QUERIES..((index + 1) * TILE_QUERIES).min(len)
}

/// Cuts a range into tiles.
pub(crate) fn tiles(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(TILE_QUERIES).map(move |start| start..(start + TILE_QUERIES).min(end))
}
