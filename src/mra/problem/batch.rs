//! The sequences of one form, and the flat indices of their heads and blocks.

use std::ops::Range;

use super::Problem;
use super::segment::{Form, Segment};

/// The sequences of a call that have one form. A *flat head* is a head of one of them; its flat index runs over all heads of the first
/// sequence, then over those of the second one, and so on. Blocks of queries of flat heads and blocks of keys of groups have flat indices
/// likewise.
#[derive(Debug)]
pub(crate) struct Batch<'p> {
    pub(crate) segments: Vec<&'p Segment>,
    heads: usize,
    kv_heads: usize,
    /// Blocks of queries, and of keys, in one head of the sequences before each; then those of all.
    row_starts: Vec<usize>,
    column_starts: Vec<usize>,
}

impl<'p> Batch<'p> {
    pub(crate) fn new(problem: &'p Problem<'_>, form: Form) -> Self {
        let segments: Vec<&Segment> = problem.segments.iter().filter(|segment| segment.form == form).collect();
        let starts = |count: &dyn Fn(&Segment) -> usize| {
            let sums = segments.iter().scan(0, |sum, segment| {
                *sum += count(segment);
                Some(*sum)
            });
            std::iter::once(0).chain(sums).collect::<Vec<_>>()
        };
        Self {
            row_starts: starts(&|segment| segment.rows.len()),
            column_starts: starts(&|segment| segment.keys.len()),
            segments,
            heads: problem.heads,
            kv_heads: problem.kv_heads,
        }
    }

    /// Flat heads.
    pub(crate) fn flat_heads(&self) -> usize {
        self.segments.len() * self.heads
    }

    /// Groups of heads that share keys, of all sequences.
    pub(crate) fn groups(&self) -> usize {
        self.segments.len() * self.kv_heads
    }

    /// The sequence of a flat head.
    pub(crate) fn segment(&self, head: usize) -> &'p Segment {
        self.segments[head / self.heads]
    }

    /// The sequence of a group.
    pub(crate) fn segment_of_group(&self, group: usize) -> &'p Segment {
        self.segments[group / self.kv_heads]
    }

    /// The batch item of a flat head, and the head in it.
    pub(crate) fn item_and_head(&self, head: usize) -> (usize, usize) {
        (self.segment(head).batch, head % self.heads)
    }

    /// The batch item of a group, and the key head in it.
    pub(crate) fn item_and_kv_head(&self, group: usize) -> (usize, usize) {
        (self.segment_of_group(group).batch, group % self.kv_heads)
    }

    /// What dropout calls the flat head: it does not depend on the forms of other sequences.
    pub(crate) fn dropout_head(&self, head: usize) -> usize {
        self.segment(head).index * self.heads + head % self.heads
    }

    /// The group of a flat head.
    pub(crate) fn group(&self, head: usize) -> usize {
        head / self.heads * self.kv_heads + head % self.heads / (self.heads / self.kv_heads)
    }

    /// The flat heads of a group.
    pub(crate) fn heads_of(&self, group: usize) -> Range<usize> {
        let size = self.heads / self.kv_heads;
        let first = group / self.kv_heads * self.heads + group % self.kv_heads * size;
        first..first + size
    }

    /// The flat heads of some groups.
    pub(crate) fn heads_of_all(&self, groups: &Range<usize>) -> Range<usize> {
        if groups.is_empty() { 0..0 } else { self.heads_of(groups.start).start..self.heads_of(groups.end - 1).end }
    }

    /// The flat indices of the blocks of queries of some flat heads.
    pub(crate) fn rows_of(&self, heads: &Range<usize>) -> Range<usize> {
        let end = |head: usize| self.row(head, self.segment(head).rows.len());
        if heads.is_empty() { 0..0 } else { self.row(heads.start, 0)..end(heads.end - 1) }
    }

    /// The flat indices of the blocks of keys of some groups.
    pub(crate) fn columns_of(&self, groups: &Range<usize>) -> Range<usize> {
        let end = |group: usize| self.column(group, self.segment_of_group(group).keys.len());
        if groups.is_empty() { 0..0 } else { self.column(groups.start, 0)..end(groups.end - 1) }
    }

    /// Blocks of queries of all flat heads.
    pub(crate) fn rows(&self) -> usize {
        self.heads * self.row_starts[self.segments.len()]
    }

    /// Blocks of keys of all groups.
    pub(crate) fn columns(&self) -> usize {
        self.kv_heads * self.column_starts[self.segments.len()]
    }

    /// The flat index of a block of queries.
    pub(crate) fn row(&self, head: usize, i: usize) -> usize {
        let segment = head / self.heads;
        self.heads * self.row_starts[segment] + head % self.heads * self.segments[segment].rows.len() + i
    }

    /// The flat index of a block of keys.
    pub(crate) fn column(&self, group: usize, j: usize) -> usize {
        let segment = group / self.kv_heads;
        self.kv_heads * self.column_starts[segment] + group % self.kv_heads * self.segments[segment].keys.len() + j
    }

    /// The flat head and the block in it of a flat index of a block of queries.
    pub(crate) fn row_at(&self, index: usize) -> (usize, usize) {
        let segment = last_start(&self.row_starts, index, self.heads);
        let (blocks, rest) = (self.segments[segment].rows.len(), index - self.heads * self.row_starts[segment]);
        (segment * self.heads + rest / blocks, rest % blocks)
    }

    /// The group and the block in it of a flat index of a block of keys.
    pub(crate) fn column_at(&self, index: usize) -> (usize, usize) {
        let segment = last_start(&self.column_starts, index, self.kv_heads);
        let (blocks, rest) = (self.segments[segment].keys.len(), index - self.kv_heads * self.column_starts[segment]);
        (segment * self.kv_heads + rest / blocks, rest % blocks)
    }

    /// Most blocks of keys of a sequence.
    pub(crate) fn most_columns(&self) -> usize {
        self.segments.iter().map(|segment| segment.keys.len()).max().unwrap_or(0)
    }

    /// Most keys of a sequence, those that do not count among them.
    pub(crate) fn most_keys(&self) -> usize {
        self.segments.iter().map(|segment| segment.keys.tokens().len()).max().unwrap_or(0)
    }

    /// Pairs of blocks in one head of all sequences.
    pub(crate) fn pairs_of_blocks(&self) -> usize {
        self.segments.iter().map(|segment| segment.rows.len() * segment.keys.len()).sum()
    }
}

/// The last start that is not behind `index`, where each counts `times`; empty stretches are passed over.
fn last_start(starts: &[usize], index: usize, times: usize) -> usize {
    starts.partition_point(|&start| start * times <= index) - 1
}
