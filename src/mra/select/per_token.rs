//! The blocks that each token of a tile chooses (docs/definitions.md, section 4).

use std::cmp::Ordering;
use std::ops::Range;

use crate::kernels::{Largest, Matrix};
use crate::mra::problem::{Forced, Kind, Sight, TokenBudget, common};
use crate::simd::{Level, Scalar};

/// What one query is free to choose.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    /// Its open blocks that are not forced lie here, and no forced ones.
    pub(crate) ranges: [Range<usize>; 2],
    /// How many they are.
    pub(super) free: usize,
    /// How many of them it takes.
    pub(super) take: usize,
}

impl Choice {
    fn new(sight: &Sight<'_>, forced: &Forced, budget: &TokenBudget) -> Self {
        let ranges = sight.free_ranges(forced);
        let free = sight.count_open(&ranges);
        // Cut and forced blocks count towards the budget, and are exact beyond it too.
        let take = budget.blocks.saturating_sub(sight.count_alive() - free).min(free);
        Self { ranges, free, take }
    }

    /// What it is free to choose among some blocks alone, which are these ranges.
    pub(super) fn among(
        sight: &Sight<'_>,
        forced: &Forced,
        budget: &TokenBudget,
        candidates: impl Iterator<Item = Range<usize>>,
    ) -> Self {
        let ranges = sight.free_ranges(forced);
        let (mut alive, mut free) = (0, 0);
        for blocks in candidates {
            alive += sight.count_alive_of(&blocks);
            free += ranges.iter().map(|range| sight.count_open_of(&common(&blocks, range))).sum::<usize>();
        }
        Self { ranges, free, take: budget.blocks.saturating_sub(alive - free).min(free) }
    }

    /// Whether something is left that it does not take.
    fn leaves_some(&self) -> bool {
        self.take < self.free
    }

    /// The range from the first block to the last one.
    fn span(&self) -> Range<usize> {
        let [before, behind] = &self.ranges;
        let start = if before.is_empty() { behind.start } else { before.start };
        start..if behind.is_empty() { before.end } else { behind.end }
    }

    pub(super) fn contains(&self, block: usize) -> bool {
        self.ranges.iter().any(|range| range.contains(&block))
    }
}

/// The buffers of a choice.
#[derive(Debug, Default)]
pub(crate) struct Chooser {
    choices: Vec<Choice>,
    wanted: Vec<usize>,
    taken: Vec<usize>,
    rows: Vec<u32>,
    order: Vec<u32>,
}

impl Chooser {
    /// Starts a tile of queries. Returns the blocks whose logits are needed, none if every query takes all that it may.
    ///
    /// `finest` is what the queries see of the finest blocks, which say what is forced; a block has `ratio` of them side by side.
    pub(crate) fn start(
        &mut self,
        budget: &TokenBudget,
        sights: &[Sight<'_>],
        finest: &[Sight<'_>],
        ratio: usize,
    ) -> Range<usize> {
        self.choices.clear();
        let forced = finest.iter().map(|sight| sight.forced(budget).at_level(ratio));
        self.choices.extend(sights.iter().zip(forced).map(|(sight, forced)| Choice::new(sight, &forced, budget)));
        let spans = self.choices.iter().filter(|choice| choice.leaves_some()).map(Choice::span);
        spans.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
    }

    /// Whether the logit of a block counts for a query: it does not take all, and may take this one.
    pub(crate) fn counts(&self, query: usize, sight: &Sight<'_>, block: usize) -> bool {
        let choice = &self.choices[query];
        choice.leaves_some() && choice.contains(block) && sight.is_open(block)
    }

    /// Where the logits of a query count, within two ranges.
    pub(crate) fn ranges(&self, query: usize) -> [Range<usize>; 2] {
        let choice = &self.choices[query];
        if choice.leaves_some() { choice.ranges.clone() } else { [choice.span().start..choice.span().start, 0..0] }
    }

    /// How many blocks each lane chooses by logits, once the tile is started; 0 for those without a query.
    pub(crate) fn wanted(&mut self, columns: usize) -> &[usize] {
        self.wanted.clear();
        self.wanted.extend(self.choices.iter().map(|choice| if choice.leaves_some() { choice.take } else { 0 }));
        self.wanted.resize(columns, 0);
        &self.wanted
    }

    /// Writes the plan of the tile: for each query `width` numbers, the open blocks that are exact, ascending, then -1.
    ///
    /// `logits` has a row for each of `blocks` and `columns` lanes, one for each query; `-inf` where a logit does not count.
    #[allow(clippy::too_many_arguments, reason = "a tile of queries, and what it chooses from")]
    pub(crate) fn choose<T: Scalar>(
        &mut self,
        level: Level,
        logits: &[T],
        columns: usize,
        blocks: &Range<usize>,
        sights: &[Sight<'_>],
        plan: &mut [i32],
        width: usize,
    ) {
        self.wanted(columns);
        self.taken.clear();
        self.taken.resize(columns, 0);
        let stride = self.wanted.iter().copied().max().unwrap_or(0);
        if stride > 0 {
            self.rows.resize(self.rows.len().max(columns * stride), 0);
            let numbers = Matrix::new(logits, blocks.len(), columns, columns);
            T::run(level, Largest { numbers, wanted: &self.wanted, rows: &mut self.rows, stride, taken: &mut self.taken });
        }
        for (lane, (sight, row)) in sights.iter().zip(plan.chunks_exact_mut(width)).enumerate() {
            let wanted = self.wanted[lane];
            if wanted > 0 && self.taken[lane] < wanted {
                self.by_sorting(logits, columns, blocks, sight, lane, wanted);
                let row = &mut self.rows[lane * stride..][..wanted];
                row.copy_from_slice(&self.order);
            }
            let chosen = if wanted > 0 { &self.rows[lane * stride..][..wanted] } else { &[] };
            write_row(sight, &self.choices[lane], chosen.iter().map(|&row| row as usize + blocks.start), PlanRow::new(row));
        }
    }

    /// The same choice by partial sorting: slower, but for any number of blocks, and with NaN in their place, which is the last.
    /// Leaves rows of logits in `order`.
    fn by_sorting<T: Scalar>(
        &mut self,
        logits: &[T],
        columns: usize,
        blocks: &Range<usize>,
        sight: &Sight<'_>,
        lane: usize,
        wanted: usize,
    ) {
        let logit = |row: u32| logits[row as usize * columns + lane];
        let choice = &self.choices[lane];
        self.order.clear();
        let candidates = blocks.clone().filter(|&block| choice.contains(block) && sight.is_open(block));
        self.order.extend(candidates.map(|block| u32::try_from(block - blocks.start).expect("fewer than 2^32 blocks")));
        self.order.select_nth_unstable_by(wanted - 1, |&a, &b| descending(logit(a), logit(b)).then(a.cmp(&b)));
        self.order.truncate(wanted);
        self.order.sort_unstable();
    }
}

/// Writes the open blocks that are forced, and among them those that are chosen, which are ascending.
fn write_row(sight: &Sight<'_>, choice: &Choice, chosen: impl Iterator<Item = usize>, mut row: PlanRow<'_>) {
    let [before, behind] = &choice.ranges;
    let mut chosen = chosen.peekable();
    let all = choice.take == choice.free;
    let mut next = sight.live.start;
    for range in [before, behind, &(sight.live.end..sight.live.end)] {
        (next..range.start).filter(|&block| sight.is_open(block)).for_each(|block| row.push(block));
        if all {
            range.clone().filter(|&block| sight.is_open(block)).for_each(|block| row.push(block));
        } else {
            while let Some(block) = chosen.next_if(|&block| block < range.end) {
                row.push(block);
            }
        }
        next = next.max(range.end);
    }
    row.finish();
}

/// Whether a query refines a block: it is cut, or the ascending `row` of the plan names it.
pub(crate) fn is_refined(sight: &Sight<'_>, row: &[i32], block: usize) -> bool {
    let before = |&number: &i32| usize::try_from(number).is_ok_and(|number| number < block);
    match sight.kind(block) {
        Kind::Dead => false,
        Kind::Cut => true,
        Kind::Open => row.get(row.partition_point(before)).is_some_and(|&number| usize::try_from(number) == Ok(block)),
    }
}

/// Larger numbers first, NaN last, zeros of both signs equal.
pub(super) fn descending<T: Scalar>(a: T, b: T) -> Ordering {
    let is_nan = |x: T| x.partial_cmp(&x).is_none();
    b.partial_cmp(&a).unwrap_or_else(|| is_nan(a).cmp(&is_nan(b)))
}

/// A row of a plan while it is written.
pub(super) struct PlanRow<'a> {
    row: &'a mut [i32],
    len: usize,
}

impl<'a> PlanRow<'a> {
    pub(super) fn new(row: &'a mut [i32]) -> Self {
        Self { row, len: 0 }
    }

    pub(super) fn push(&mut self, block: usize) {
        self.row[self.len] = i32::try_from(block).expect("fewer than 2^31 blocks");
        self.len += 1;
    }

    pub(super) fn finish(self) {
        self.row[self.len..].fill(-1);
    }
}
