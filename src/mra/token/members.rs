//! What the blocks of a group of heads consist of: keys at the finest level, and above it the means of smaller blocks.

use super::levels::TokenLevel;
use crate::mra::problem::{Blocks, Segment};
use crate::mra::select::child_columns;
use crate::simd::Element;
use crate::tensor::{Rows, Tensor};

/// The members of the blocks of a level.
pub(crate) enum Members<'a, E: Element> {
    Keys {
        blocks: &'a Blocks,
        rows: Rows<'a, E>,
    },
    /// The blocks of the level below, so many side by side, those without a valid key left out.
    Blocks {
        segment: &'a Segment,
        means: Rows<'a, E::Compute>,
        children: usize,
    },
}

impl<'a, E: Element> Members<'a, E> {
    /// Those of a level with means, whose blocks consist of the ones of the level `below` unless it is the finest one.
    pub(crate) fn of_group(
        level: &'a TokenLevel<'_, E::Compute>,
        below: Option<&'a TokenLevel<'_, E::Compute>>,
        key: &'a Tensor<'_, E>,
        group: usize,
    ) -> Self {
        let Some(TokenLevel { problem, batch, means }) = below else {
            let (item, kv_head) = level.batch.item_and_kv_head(group);
            return Self::Keys { blocks: &level.batch.segment_of_group(group).keys, rows: key.head(item, kv_head) };
        };
        Self::Blocks {
            segment: batch.segment_of_group(group),
            means: means.as_ref().expect("all levels have means, or none").keys(batch, group),
            children: problem.children().expect("a level below another one"),
        }
    }

    /// Writes the members of a block into rows, and returns how many there are.
    pub(crate) fn read<'r>(&self, block: usize, mut rows: impl Iterator<Item = &'r mut [E::Compute]>) -> usize
    where
        E::Compute: 'r,
    {
        let mut count = 0;
        let mut next = || {
            count += 1;
            rows.next().expect("a row for each member")
        };
        match self {
            Self::Keys { blocks, rows } => {
                blocks.numbers(block).for_each(|number| E::widen(rows.row(blocks.token(number)), next()));
            }
            Self::Blocks { segment, means, children } => {
                for child in child_columns(segment, block, *children).filter(|&child| segment.keys.count(child) > 0) {
                    let row = next();
                    row.copy_from_slice(&means.row(child)[..row.len()]);
                }
            }
        }
        count
    }
}

/// How many members a block of a level has at most.
pub(crate) fn most_members<T>(level: &TokenLevel<'_, T>, below: Option<&TokenLevel<'_, T>>) -> usize {
    below.map_or(level.problem.block_size, |below| below.problem.children().expect("a level below another one"))
}
