//! What a token sees (docs/definitions.md, section 4).

use std::ops::Range;

use super::blocks::{Blocks, to_i64};
use super::budget::TokenBudget;

/// What a token sees of a block of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No key.
    Dead,
    /// Some keys and not others, or all with biases so different that their mean stands for nothing.
    Cut,
    /// All keys.
    Open,
}

/// The keys that tokens see by their position: from `left` before to `right` behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Window {
    /// Keys before a token's position, at most; `None` is no limit.
    pub left: Option<usize>,
    /// Keys behind a token's position, at most; `None` is no limit. 0 is causal attention.
    pub right: Option<usize>,
}

impl Window {
    /// Whether all keys are seen.
    pub(crate) fn is_unlimited(&self) -> bool {
        self.left.is_none() && self.right.is_none()
    }

    /// The numbers of the keys that a token at this position sees. Key positions count from the first key on.
    fn numbers(&self, position: i64, keys: &Blocks) -> Range<usize> {
        let reach = |limit: usize| i64::try_from(limit).unwrap_or(i64::MAX);
        let start = self.left.map_or(0, |left| keys.number_at(position.saturating_sub(reach(left))));
        let end =
            self.right.map_or(keys.total(), |right| keys.number_at(position.saturating_add(reach(right)).saturating_add(1)));
        start..end.max(start)
    }
}

/// The blocks that are exact for a token whatever their logits: those before one, and local ones.
#[derive(Debug, Clone)]
pub(crate) struct Forced {
    behind_first: usize,
    local: Range<usize>,
}

impl Forced {
    /// The same at a level where a block has `ratio` of these side by side: those that contain one of them.
    pub(crate) fn at_level(&self, ratio: usize) -> Self {
        let local = self.local.start / ratio..self.local.end.div_ceil(ratio);
        Self { behind_first: self.behind_first.div_ceil(ratio), local }
    }
}

/// What one token sees.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sight<'a> {
    /// The numbers of the keys that the window leaves.
    pub(crate) keys: Range<usize>,
    /// The blocks in which they lie: all others are dead.
    pub(crate) live: Range<usize>,
    /// Blocks of which the window leaves every key.
    pub(crate) open: Range<usize>,
    /// The block of the token's own position, which may lie before the first block or behind the last one.
    own: i64,
    /// What a mask leaves of each block together with the window; empty without a mask.
    kinds: &'a [Kind],
}

impl<'a> Sight<'a> {
    /// What a token at this position sees.
    pub(crate) fn new(window: &Window, position: i64, keys: &Blocks, size: usize) -> Self {
        let own = position.div_euclid(to_i64(size));
        let seen = window.numbers(position, keys);
        if seen.is_empty() {
            return Self { own, ..Self::default() };
        }
        let live = keys.block_of(seen.start)..keys.block_of(seen.end - 1) + 1;
        let first = live.start + usize::from(keys.start(live.start) < seen.start);
        let last = live.end - usize::from(keys.start(live.end) > seen.end);
        Self { keys: seen, live, open: first..last.max(first), own, kinds: &[] }
    }

    /// The same, with what a mask leaves of each block; outside of `alive` all are dead.
    pub(crate) fn with_kinds(self, kinds: &'a [Kind], alive: Range<usize>) -> Self {
        let start = self.live.start.max(alive.start);
        Self { kinds, live: start..self.live.end.min(alive.end).max(start), ..self }
    }

    /// What the token sees of a block.
    #[inline]
    pub(crate) fn kind(&self, block: usize) -> Kind {
        if !self.live.contains(&block) {
            Kind::Dead
        } else if let Some(&kind) = self.kinds.get(block) {
            kind
        } else if self.open.contains(&block) {
            Kind::Open
        } else {
            Kind::Cut
        }
    }

    /// Whether the token sees all keys of a block.
    #[inline]
    pub(crate) fn is_open(&self, block: usize) -> bool {
        if self.is_masked() {
            self.live.contains(&block) && self.kinds[block] == Kind::Open
        } else {
            self.open.contains(&block)
        }
    }

    /// Whether a mask has a say.
    pub(crate) fn is_masked(&self) -> bool {
        !self.kinds.is_empty()
    }

    /// Whether the block is the token's own.
    pub(crate) fn is_own(&self, block: usize) -> bool {
        self.own == to_i64(block)
    }

    /// Calls `body` with every block that is cut.
    pub(crate) fn for_cut(&self, mut body: impl FnMut(usize)) {
        if self.is_masked() {
            self.live.clone().filter(|&block| self.kinds[block] == Kind::Cut).for_each(body);
        } else {
            // A window cuts the first and the last block at most.
            (self.live.start..self.open.start.min(self.live.end)).for_each(&mut body);
            (self.open.end.max(self.open.start.min(self.live.end))..self.live.end).for_each(&mut body);
        }
    }

    /// The blocks that are exact whatever their logits, if they are not dead; `self` speaks of the finest blocks.
    pub(crate) fn forced(&self, budget: &TokenBudget) -> Forced {
        let reach = i64::try_from(budget.local_blocks).unwrap_or(i64::MAX);
        let place = |block: i64| usize::try_from(block.max(0)).unwrap_or(usize::MAX);
        let local = place(self.own.saturating_sub(reach).saturating_add(1))..place(self.own.saturating_add(reach));
        Forced { behind_first: self.behind_first(budget.first_blocks), local }
    }

    /// Ranges that hold the open blocks that are not forced, and no forced one: the token chooses among them.
    pub(crate) fn free_ranges(&self, forced: &Forced) -> [Range<usize>; 2] {
        let candidates = if self.is_masked() { self.live.clone() } else { self.open.clone() };
        let start = candidates.start.max(forced.behind_first);
        let (local_start, local_end) = (forced.local.start, forced.local.end);
        let range = |start: usize, end: usize| start.min(end)..end;
        let before = range(start, candidates.end.min(local_start.max(start.min(candidates.end))));
        let behind = range(start.max(local_end).max(before.end), candidates.end.max(before.end));
        [before, behind]
    }

    /// The block behind the first `count` ones that are not dead.
    fn behind_first(&self, count: usize) -> usize {
        let Some(last) = count.checked_sub(1) else { return 0 };
        if !self.is_masked() {
            return self.live.start.saturating_add(count);
        }
        let mut alive = self.live.clone().filter(|&block| self.kinds[block] != Kind::Dead);
        alive.nth(last).map_or(self.live.end, |block| block + 1)
    }

    /// How many blocks of these ranges are open.
    pub(crate) fn count_open(&self, ranges: &[Range<usize>; 2]) -> usize {
        if self.is_masked() {
            ranges.iter().flat_map(Clone::clone).filter(|&block| self.kinds[block] == Kind::Open).count()
        } else {
            ranges.iter().map(Range::len).sum()
        }
    }

    /// How many blocks are not dead.
    pub(crate) fn count_alive(&self) -> usize {
        self.count_alive_of(&self.live)
    }

    /// How many of these blocks are not dead.
    pub(crate) fn count_alive_of(&self, blocks: &Range<usize>) -> usize {
        let live = common(blocks, &self.live);
        if self.is_masked() { live.filter(|&block| self.kinds[block] != Kind::Dead).count() } else { live.len() }
    }

    /// How many of these blocks are open.
    pub(crate) fn count_open_of(&self, blocks: &Range<usize>) -> usize {
        if self.is_masked() {
            common(blocks, &self.live).filter(|&block| self.kinds[block] == Kind::Open).count()
        } else {
            common(blocks, &self.open).len()
        }
    }
}

/// What two ranges have in common.
pub(crate) fn common(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sight(left: Option<usize>, right: Option<usize>, position: i64) -> Sight<'static> {
        Sight::new(&Window { left, right }, position, &Blocks::all(0..30, 4), 4)
    }

    fn free(sight: &Sight<'_>, first_blocks: usize, local_blocks: usize) -> Vec<usize> {
        let ranges = sight.free_ranges(&sight.forced(&TokenBudget { blocks: 1, first_blocks, local_blocks }));
        let blocks: Vec<usize> = ranges.iter().flat_map(Clone::clone).collect();
        assert_eq!(sight.count_open(&ranges), blocks.len());
        blocks
    }

    fn cut(sight: &Sight<'_>) -> Vec<usize> {
        let mut blocks = Vec::new();
        sight.for_cut(|block| blocks.push(block));
        assert!((0..8).all(|block| (sight.kind(block) == Kind::Cut) == blocks.contains(&block)));
        blocks
    }

    #[test]
    fn causal() {
        let sight = sight(None, Some(0), 13);
        assert_eq!((sight.live.clone(), sight.open.clone(), cut(&sight)), (0..4, 0..3, vec![3]));
        assert_eq!((free(&sight, 0, 1), free(&sight, 1, 1), free(&sight, 1, 2)), (vec![0, 1, 2], vec![1, 2], vec![1]));
        let before = super::tests::sight(None, Some(0), -1);
        assert_eq!((before.count_alive(), cut(&before), free(&before, 1, 1)), (0, vec![], vec![]));
        // The last token of a block sees all of it, and it is forced all the same.
        let last = super::tests::sight(None, Some(0), 11);
        assert_eq!((last.open.clone(), cut(&last), free(&last, 0, 1)), (0..3, vec![], vec![0, 1]));
        let behind = super::tests::sight(None, Some(0), 99);
        assert_eq!((behind.open.clone(), free(&behind, 0, 1)), (0..8, (0..8).collect()));
    }

    #[test]
    fn window_on_both_sides() {
        let sight = sight(Some(9), Some(9), 14);
        assert_eq!((sight.keys.clone(), sight.live.clone(), sight.open.clone(), cut(&sight)), (5..24, 1..6, 2..6, vec![1]));
        assert_eq!((free(&sight, 0, 1), free(&sight, 1, 1), free(&sight, 3, 1)), (vec![2, 4, 5], vec![2, 4, 5], vec![4, 5]));
        let narrow = super::tests::sight(Some(1), Some(0), 14);
        assert_eq!((narrow.live.clone(), cut(&narrow), narrow.count_alive()), (3..4, vec![3], 1));
    }

    #[test]
    fn masked() {
        use Kind::{Cut, Dead, Open};
        let kinds = [Dead, Open, Cut, Open, Dead, Open, Open, Dead];
        let sight = sight(None, None, 13).with_kinds(&kinds, 1..7);
        assert_eq!((cut(&sight), sight.count_alive()), (vec![2], 5));
        let budget = TokenBudget { blocks: 1, first_blocks: 1, local_blocks: 1 };
        let ranges = sight.free_ranges(&sight.forced(&budget));
        assert_eq!((ranges.clone(), sight.count_open(&ranges)), ([2..3, 4..7], 2));
    }
}
