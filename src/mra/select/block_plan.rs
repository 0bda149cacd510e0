//! The plan of the block form as what forward and backward walk along: the blocks of each row, and of each column.

use std::ops::Range;
use std::sync::OnceLock;

use super::plan::{child_columns, row_bytes};
use crate::mra::problem::{Batch, Problem, Segment};

/// The plan of the block form, by rows and by columns. Empty blocks are not in it.
#[derive(Debug)]
pub(crate) struct BlockPlan {
    rows: Lists,
    /// Listed when one is first asked for: forward goes by rows alone.
    columns: OnceLock<Lists>,
}

/// Lists of block indices, one after the other.
#[derive(Debug)]
struct Lists {
    offsets: Vec<usize>,
    indices: Vec<u32>,
}

impl Lists {
    fn get(&self, list: usize) -> &[u32] {
        &self.indices[self.offsets[list]..self.offsets[list + 1]]
    }
}

impl BlockPlan {
    /// Reads the plan of the segments of the block form.
    pub(crate) fn read(problem: &Problem<'_>, batch: &Batch<'_>, plan: &[u8]) -> Self {
        let mut read = Self::unread(batch);
        read.read_next(problem, batch, 0..batch.flat_heads(), plan);
        read
    }

    /// Of no flat head.
    pub(crate) fn unread(batch: &Batch<'_>) -> Self {
        let mut offsets = Vec::with_capacity(batch.rows() + 1);
        offsets.push(0);
        Self { rows: Lists { offsets, indices: Vec::new() }, columns: OnceLock::new() }
    }

    /// Reads the plan of the flat heads that follow those which have been read.
    pub(crate) fn read_next(&mut self, problem: &Problem<'_>, batch: &Batch<'_>, heads: Range<usize>, plan: &[u8]) {
        let rows = &mut self.rows;
        for flat in heads {
            let segment = batch.segment(flat);
            let bits = &plan[problem.plan_range(segment, flat % problem.heads)];
            for i in 0..segment.rows.len() {
                let blocks = blocks_of_row(segment, bits, i);
                rows.indices.extend(blocks.map(|j| u32::try_from(j).expect("fewer than 2^32 blocks")));
                rows.offsets.push(rows.indices.len());
            }
        }
    }

    /// Reads the plan of the level below one whose batch and plan are given.
    pub(crate) fn below(level: &Problem<'_>, batch: &Batch<'_>, above: (&Batch<'_>, &Self), plan: &[u8]) -> Self {
        let ((batch_above, above), children) = (above, level.children().expect("a level below another one"));
        let mut rows = Lists { offsets: Vec::with_capacity(batch.rows() + 1), indices: Vec::new() };
        rows.offsets.push(0);
        for head in 0..batch.flat_heads() {
            let segment = batch.segment(head);
            let bits = &plan[level.plan_range(segment, head % level.heads)];
            let mut bits = bits.chunks_exact(children * row_bytes(children));
            for row_above in 0..batch_above.segment(head).rows.len() {
                let parents = above.row(batch_above, head, row_above);
                let of_parents: Vec<&[u8]> = bits.by_ref().take(parents.len()).collect();
                for (child, i) in level.child_rows(segment, row_above) {
                    for (&parent, bits) in parents.iter().zip(&of_parents).filter(|_| segment.rows.count(i) > 0) {
                        let columns = child_columns(segment, parent as usize, children);
                        let set = selected(bits, child, children, 0..columns.len()).map(|j| j + columns.start);
                        let set = set.filter(|&j| segment.keys.count(j) > 0);
                        rows.indices.extend(set.map(|j| u32::try_from(j).expect("fewer than 2^32 blocks")));
                    }
                    rows.offsets.push(rows.indices.len());
                }
            }
        }
        Self { rows, columns: OnceLock::new() }
    }

    /// The key blocks selected for a block of queries of a flat head, ascending.
    pub(crate) fn row(&self, batch: &Batch<'_>, head: usize, i: usize) -> &[u32] {
        self.rows.get(batch.row(head, i))
    }

    /// The blocks of queries of a flat head that selected a block of keys, ascending.
    pub(crate) fn column(&self, batch: &Batch<'_>, head: usize, j: usize) -> &[u32] {
        self.columns.get_or_init(|| transpose(&self.rows, batch)).get(column(batch, head, j))
    }

    /// How many blocks are selected for some blocks of queries, by their flat indices.
    pub(crate) fn num_blocks_of(&self, rows: &Range<usize>) -> usize {
        self.rows.offsets[rows.end] - self.rows.offsets[rows.start]
    }

    /// How many blocks are selected, over all heads.
    pub(crate) fn num_blocks(&self) -> usize {
        self.rows.indices.len()
    }
}

/// The blocks of a range that the bits of a head select for a row, ascending.
pub(crate) fn selected(bits: &[u8], i: usize, key_blocks: usize, blocks: Range<usize>) -> impl Iterator<Item = usize> {
    let row = &bits[i * row_bytes(key_blocks)..][..row_bytes(key_blocks)];
    let first = blocks.start / 8;
    ones(&row[first..blocks.end.div_ceil(8)]).map(move |bit| first * 8 + bit).filter(move |j| blocks.contains(j))
}

/// The blocks that the bits of a head select for a row of the block form; none where no query is computed.
pub(super) fn blocks_of_row<'a>(segment: &'a Segment, bits: &'a [u8], i: usize) -> impl Iterator<Item = usize> + use<'a> {
    let nk = if segment.rows.count(i) > 0 { segment.keys.len() } else { 0 };
    selected(bits, i, segment.keys.len(), 0..nk).filter(|&j| segment.keys.count(j) > 0)
}

/// The positions of the bits that are 1.
fn ones(bytes: &[u8]) -> impl Iterator<Item = usize> {
    bytes.chunks(8).enumerate().flat_map(|(index, chunk)| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let mut word = u64::from_le_bytes(word);
        std::iter::from_fn(move || {
            (word != 0).then(|| {
                let bit = word.trailing_zeros() as usize;
                word &= word - 1;
                index * 64 + bit
            })
        })
    })
}

/// The index of the list of a block of keys for one flat head, rather than for a group.
fn column(batch: &Batch<'_>, head: usize, j: usize) -> usize {
    let of_group = batch.heads_of(batch.group(head));
    let blocks = batch.segment(head).keys.len();
    batch.column(batch.group(head), 0) * of_group.len() + (head - of_group.start) * blocks + j
}

/// Lists by column from lists by row: a counting sort.
fn transpose(rows: &Lists, batch: &Batch<'_>) -> Lists {
    let lists = if batch.groups() == 0 { 0 } else { batch.columns() * batch.heads_of(0).len() };
    let mut offsets = vec![0; lists + 1];
    let entries = || {
        (0..batch.flat_heads()).flat_map(move |head| {
            (0..batch.segment(head).rows.len())
                .flat_map(move |i| rows.get(batch.row(head, i)).iter().map(move |&j| (column(batch, head, j as usize), i)))
        })
    };
    entries().for_each(|(list, _)| offsets[list + 1] += 1);
    for list in 0..lists {
        offsets[list + 1] += offsets[list];
    }
    let mut next = offsets.clone();
    let mut indices = vec![0; rows.indices.len()];
    for (list, i) in entries() {
        indices[next[list]] = u32::try_from(i).expect("fewer than 2^32 blocks");
        next[list] += 1;
    }
    Lists { offsets, indices }
}
