//! The blocks of a level that may be chosen in the block form: the children of those that the level above refines
//! (docs/definitions.md, section 5).

use std::ops::Range;

use super::block_plan::BlockPlan;
use super::plan::child_columns;
use crate::mra::problem::{Batch, Problem, Segment};

/// A level below another one.
#[derive(Clone, Copy)]
pub(crate) struct Children<'a> {
    pub(crate) problem: &'a Problem<'a>,
    pub(crate) batch: &'a Batch<'a>,
    pub(crate) batch_above: &'a Batch<'a>,
    /// What the level above refines.
    pub(crate) refined: &'a BlockPlan,
}

impl<'a> Children<'a> {
    /// How many blocks of the level a block of the level above has side by side.
    pub(crate) fn ratio(&self) -> usize {
        self.problem.children().expect("a level below another one")
    }

    /// Reads the plan of the level.
    pub(crate) fn read(&self, plan: &[u8]) -> BlockPlan {
        BlockPlan::below(self.problem, self.batch, (self.batch_above, self.refined), plan)
    }

    fn segment(&self, head: usize) -> &'a Segment {
        self.batch.segment(head)
    }

    /// The refined blocks of keys of a row of the level above.
    pub(crate) fn parents(&self, head: usize, row_above: usize) -> &'a [u32] {
        self.refined.row(self.batch_above, head, row_above)
    }

    /// The rows of a row of the level above, and the place of the first one among those that a whole block has.
    pub(crate) fn rows(&self, head: usize, row_above: usize) -> (usize, Range<usize>) {
        let mut rows = self.problem.child_rows(self.segment(head), row_above);
        rows.next().map_or((0, 0..0), |(place, first)| (place, first..first + 1 + rows.count()))
    }

    /// The row of the level above in which a row lies.
    pub(crate) fn row_above(&self, head: usize, i: usize) -> usize {
        let (lead, ratio) = (self.segment(head).lead(), self.ratio());
        (lead.div_ceil(ratio) * ratio - lead + i) / ratio
    }

    /// The blocks of keys in one of the level above.
    pub(crate) fn columns_of(&self, head: usize, column_above: usize) -> Range<usize> {
        child_columns(self.segment(head), column_above, self.ratio())
    }

    /// The candidates of the rows of a row of the level above, a range for each refined block.
    pub(crate) fn columns(&self, head: usize, row_above: usize) -> impl Iterator<Item = Range<usize>> + use<'a> {
        let (segment, ratio) = (self.segment(head), self.ratio());
        self.parents(head, row_above).iter().map(move |&parent| child_columns(segment, parent as usize, ratio))
    }

    /// How many candidates the rows of a row of the level above have.
    pub(crate) fn candidates(&self, head: usize, row_above: usize) -> usize {
        self.columns(head, row_above).map(|columns| columns.len()).sum()
    }

    /// How many of them have keys.
    pub(crate) fn filled(&self, head: usize, row_above: usize) -> usize {
        let keys = &self.segment(head).keys;
        let filled = |columns: Range<usize>| match keys.count_of_each(columns.clone()) {
            Some(_) => columns.len(),
            None => columns.filter(|&j| keys.count(j) > 0).count(),
        };
        self.columns(head, row_above).map(filled).sum()
    }

    /// Pairs of a row and a candidate, over all heads.
    pub(crate) fn pairs(&self) -> usize {
        self.refined.num_blocks() * self.ratio() * self.ratio()
    }
}
