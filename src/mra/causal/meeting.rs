//! The queries of a range that meet a block, cut into tiles: what backward goes through.

use super::lists::BlockLists;
use super::problem::Sight;
use crate::mra::tile::TILE_QUERIES;
use crate::simd::Scalar;

/// Queries that meet a block together.
pub(crate) struct Meeting<'a> {
    /// The queries, numbered from the start of the range.
    pub(crate) queries: &'a [u32],
    /// How many keys of the block the last of them sees; none of them sees more.
    pub(crate) keys: usize,
    /// Whether some of them see fewer.
    pub(crate) partly: bool,
    /// The queries of the tile after this one: time to bring their rows nearer, since nothing else says which come next.
    pub(crate) next: &'a [u32],
}

impl Meeting<'_> {
    /// Sets the logits of keys behind each query to `-inf`. The keys of the block start at `start`.
    pub(crate) fn hide<T: Scalar>(&self, logits: &mut [T], columns: usize, sights: &[Sight], start: usize) {
        if !self.partly {
            return;
        }
        for (lane, &query) in self.queries.iter().enumerate() {
            for key in sights[query as usize].keys - start..self.keys {
                logits[key * columns + lane] = T::NEG_INFINITY;
            }
        }
    }

    /// Calls `body` with each query alone and the keys that it sees.
    pub(crate) fn one_by_one(&self, sights: &[Sight], start: usize, mut body: impl FnMut(Meeting<'_>)) {
        for queries in self.queries.chunks(1) {
            body(Meeting { queries, keys: sights[queries[0] as usize].keys - start, partly: false, next: &[] });
        }
    }

    /// The rows of the block that some of the queries do not see.
    pub(crate) fn hidden_from_some(&self, sights: &[Sight], start: usize) -> std::ops::Range<usize> {
        sights[self.queries[0] as usize].keys - start..self.keys
    }
}

/// Calls `body` with the tiles of the queries that have a block in their plan: first those of the block itself, which see
/// its keys up to their own, then later ones, which see them all. `start` and `count` are those of the block's keys.
pub(crate) fn for_meetings(
    lists: &BlockLists,
    block: usize,
    sights: &[Sight],
    start: usize,
    count: usize,
    mut body: impl FnMut(Meeting<'_>),
) {
    let (own, later) = lists.of(block).split_at(lists.own(block, sights));
    let next = |done: usize| {
        let behind = lists.behind(block, done);
        &behind[..behind.len().min(TILE_QUERIES)]
    };
    let mut done = 0;
    for queries in own.chunks(TILE_QUERIES) {
        let seen = |query: u32| (sights[query as usize].keys - start).min(count);
        let keys = seen(queries[queries.len() - 1]);
        done += queries.len();
        body(Meeting { queries, keys, partly: seen(queries[0]) < keys, next: next(done) });
    }
    for queries in later.chunks(TILE_QUERIES) {
        done += queries.len();
        body(Meeting { queries, keys: count, partly: false, next: next(done) });
    }
}
