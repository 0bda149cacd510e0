//! The queries of a range that compute a block, cut into tiles: what backward goes through.

use super::queries_of_block::QueriesOfBlocks;
use crate::mra::attend::TILE_QUERIES;

/// Queries that are computed together.
pub(crate) struct QueryTile<'a> {
    /// The queries, counted from the start of the range.
    pub(crate) queries: &'a [u32],
    /// Whether some of them may not see all keys of the block.
    pub(crate) partly: bool,
    /// The queries of the tile after this one: time to prefetch their rows, since nothing else says which come next.
    pub(crate) next: &'a [u32],
}

/// Calls `body` with the tiles of the queries that compute a block, given by its place among those present: first those that may not see all of its keys.
pub(crate) fn for_query_tiles(lists: &QueriesOfBlocks, place: usize, mut body: impl FnMut(&QueryTile<'_>)) {
    let mut done = 0;
    for (partly, queries) in [true, false].into_iter().zip(lists.of(place)) {
        for queries in queries.chunks(TILE_QUERIES) {
            done += queries.len();
            let behind = lists.behind(place, done);
            body(&QueryTile { queries, partly, next: &behind[..behind.len().min(TILE_QUERIES)] });
        }
    }
}
