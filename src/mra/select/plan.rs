//! The plan: which blocks are computed exactly, as bytes that a caller keeps from forward to backward.
//!
//! Selection is discontinuous, so it is made once and kept as a value: forward, backward and tests read the plan, never a threshold.
//!
//! ```text
//! for each batch item    8 bytes, of which the first one says the form
//! block form, for each head and block of queries    ceil(nk / 8) bytes: block j is bit j % 8 of byte j / 8
//! token form, for each head and token               width little-endian int32: blocks of which it sees all keys, ascending, then -1;
//!                                                   nothing (width 0) if every block is exact
//! ```
//!
//! Blocks that a mask cuts are exact whatever the plan says, so they need no room in it. Segments follow each other in what there is
//! for their batch item; what is behind them is not used.

use std::ops::Range;

use ndarray::Array3;

use crate::error::{Error, Result};
use crate::mra::problem::{Batch, Form, Kind, Problem, Segment};

impl Problem<'_> {
    /// Bytes of a plan. They follow from shapes and settings alone, not from what masks hold.
    pub fn plan_bytes(&self) -> usize {
        self.batch * self.plan_bytes_of_item()
    }

    fn plan_bytes_of_item(&self) -> usize {
        let (size, heads) = (self.block_size, self.heads);
        let (rows, row_bytes) = match self.packed {
            // A sequence has at most two blocks more than its share, and its rows one byte more.
            Some(count) => (self.query_len / size + 2 * count, self.key_len / (8 * size) + 2),
            // One row more: padded queries in front of the first valid one are cut backwards.
            None => (self.query_len.div_ceil(size) + 1, self.key_len.div_ceil(size).div_ceil(8)),
        };
        let block = heads * rows * row_bytes;
        let token = 4 * heads * self.query_len * self.budget.token_width(self.key_len.div_ceil(size));
        HEADER
            + match (self.form_is_open, &self.bias) {
                (false, _) => token,
                (true, None) => block,
                (true, Some(_)) => block + token,
            }
    }

    /// Checks the length of a plan.
    pub(crate) fn check_plan_length(&self, plan: &[u8]) -> Result<()> {
        let expected = self.plan_bytes();
        if plan.len() == expected {
            return Ok(());
        }
        Err(Error::new(format!("plan: {} bytes, expected {expected}", plan.len())))
    }

    /// Checks that a plan was made for the forms of this problem.
    pub(crate) fn check_plan(&self, plan: &[u8]) -> Result<()> {
        self.check_plan_length(plan)?;
        for segment in &self.segments {
            let found = plan[self.header(segment)];
            if found != tag(segment.form) {
                let form = |tag: u8| match tag {
                    BLOCK_TAG => "the block form",
                    TOKEN_TAG => "the token form",
                    _ => "no form",
                };
                return Err(Error::new(format!(
                    "plan: made for {} in batch item {}, expected {}: masks that hide other pairs make another plan",
                    form(found),
                    segment.batch,
                    form(tag(segment.form))
                )));
            }
        }
        Ok(())
    }

    /// Starts a plan: writes what [`Self::check_plan`] reads, and zeros where nothing else is written, so that equal calls give equal
    /// bytes.
    pub(crate) fn start_plan(&self, plan: &mut [u8]) {
        let item = self.plan_bytes_of_item();
        for (index, segment) in self.segments.iter().enumerate() {
            let header = self.header(segment);
            if self.packed.is_none() || index == 0 {
                plan[header..header + HEADER].fill(0);
                plan[header] = tag(segment.form);
            }
            if self.packed.is_none() || index + 1 == self.segments.len() {
                let end = self.plan_starts[index] + self.heads * self.head_bytes(segment);
                plan[end..header + item].fill(0);
            }
        }
    }

    fn header(&self, segment: &Segment) -> usize {
        segment.batch * self.plan_bytes_of_item()
    }

    /// How many numbers the plan has for each token of a segment of the token form.
    pub(crate) fn plan_width(&self, segment: &Segment) -> usize {
        self.budget.token_width(segment.keys.len())
    }

    /// Bytes of one head of a segment.
    fn head_bytes(&self, segment: &Segment) -> usize {
        match segment.form {
            Form::Block => segment.rows.len() * row_bytes(segment.keys.len()),
            Form::Token => segment.rows.tokens().len() * self.plan_width(segment) * 4,
        }
    }

    /// Where the plan of a head of a segment lies.
    pub(crate) fn plan_range(&self, segment: &Segment, head: usize) -> Range<usize> {
        let (start, bytes) = (self.plan_starts[segment.index], self.head_bytes(segment));
        start + head * bytes..start + (head + 1) * bytes
    }

    /// Where the plan of each segment starts.
    pub(crate) fn find_plan_starts(&self) -> Vec<usize> {
        if self.packed.is_none() {
            return (0..self.segments.len()).map(|index| index * self.plan_bytes_of_item() + HEADER).collect();
        }
        let starts = self.segments.iter().scan(HEADER, |next, segment| {
            let start = *next;
            *next += self.heads * self.head_bytes(segment);
            Some(start)
        });
        starts.collect()
    }

    /// A plan of given blocks: `selected(segment, head, row, block)`, where a row is a block of queries in the block form and a query,
    /// counted from the first one of the segment, in the token form. Blocks that a row sees nothing of are left out, and those for
    /// which a token has no room.
    ///
    /// # Panics
    /// If a sequence has more than 2^31 blocks.
    pub fn plan_from(&self, selected: impl Fn(usize, usize, usize, usize) -> bool) -> Vec<u8> {
        let (mut plan, selected) = (vec![0; self.plan_bytes()], &selected);
        self.start_plan(&mut plan);
        for segment in &self.segments {
            let (width, nk) = (self.plan_width(segment), segment.keys.len());
            for head in 0..self.heads {
                let bytes = &mut plan[self.plan_range(segment, head)];
                let blocks = |row| (0..nk).filter(move |&j| selected(segment.index, head, row, j));
                match segment.form {
                    Form::Block => {
                        for (i, bits) in bytes.chunks_exact_mut(row_bytes(nk).max(1)).enumerate() {
                            blocks(i).filter(|&j| segment.keys.count(j) > 0).for_each(|j| bits[j / 8] |= 1 << (j % 8));
                        }
                    }
                    Form::Token => {
                        for (row, numbers) in bytes.chunks_exact_mut((4 * width).max(1)).enumerate() {
                            let sight = self.sight(segment, head, segment.rows.tokens().start + row);
                            let mut open = blocks(row).filter(|&j| sight.kind(j) == Kind::Open);
                            for number in numbers.chunks_exact_mut(4) {
                                let block = open.next().map_or(-1, to_i32);
                                number.copy_from_slice(&block.to_le_bytes());
                            }
                        }
                    }
                }
            }
        }
        plan
    }

    /// The blocks that a plan makes exact, with those that are cut: for each segment `(H, rows, nk)`, rows as in [`Self::plan_from`].
    ///
    /// # Errors
    /// If the plan is not one of this problem.
    ///
    /// # Panics
    /// If a sequence has more than 2^31 blocks.
    pub fn is_exact(&self, plan: &[u8]) -> Result<Vec<Array3<bool>>> {
        self.check_plan(plan)?;
        let exact = self.segments.iter().map(|segment| {
            let rows = match segment.form {
                Form::Block => segment.rows.len(),
                Form::Token => segment.rows.tokens().len(),
            };
            let mut exact = Array3::from_elem((self.heads, rows, segment.keys.len()), false);
            for (head, mut exact) in exact.outer_iter_mut().enumerate() {
                let bytes = &plan[self.plan_range(segment, head)];
                for (row, mut exact) in exact.outer_iter_mut().enumerate() {
                    match segment.form {
                        Form::Block => blocks_of_row(segment, bytes, row).for_each(|j| exact[j] = true),
                        Form::Token => {
                            let sight = self.sight(segment, head, segment.rows.tokens().start + row);
                            let chosen = numbers_of_token(bytes, row, self.plan_width(segment));
                            for j in 0..exact.len() {
                                exact[j] = match sight.kind(j) {
                                    Kind::Dead => false,
                                    Kind::Cut => true,
                                    Kind::Open => chosen.as_ref().is_none_or(|chosen| chosen.contains(&to_i32(j))),
                                };
                            }
                        }
                    }
                }
            }
            exact
        });
        Ok(exact.collect())
    }
}

/// The blocks that the bits of a head select for a row of the block form; none where no query is computed.
fn blocks_of_row<'a>(segment: &'a Segment, bits: &'a [u8], i: usize) -> impl Iterator<Item = usize> + use<'a> {
    let nk = if segment.rows.count(i) > 0 { segment.keys.len() } else { 0 };
    selected(bits, i, segment.keys.len(), 0..nk).filter(|&j| segment.keys.count(j) > 0)
}

/// The numbers that the plan of a head has for a token; `None` if every block is exact.
fn numbers_of_token(bytes: &[u8], row: usize, width: usize) -> Option<Vec<i32>> {
    (width > 0).then(|| bytes[row * width * 4..(row + 1) * width * 4].chunks_exact(4).map(number).collect())
}

fn to_i32(block: usize) -> i32 {
    i32::try_from(block).expect("fewer than 2^31 blocks")
}

/// Bytes of a batch item before its plan.
const HEADER: usize = 8;

const BLOCK_TAG: u8 = 1;
const TOKEN_TAG: u8 = 2;

fn tag(form: Form) -> u8 {
    match form {
        Form::Block => BLOCK_TAG,
        Form::Token => TOKEN_TAG,
    }
}

/// A number of the plan of a token.
pub(crate) fn number(bytes: &[u8]) -> i32 {
    i32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

/// Bytes that hold the bits of one row of blocks.
pub(crate) fn row_bytes(key_blocks: usize) -> usize {
    key_blocks.div_ceil(8)
}

/// The plan of the block form, by rows and by columns. Empty blocks are not in it.
#[derive(Debug)]
pub(crate) struct BlockPlan {
    rows: Lists,
    columns: Lists,
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
        let mut rows = Lists { offsets: Vec::with_capacity(batch.rows() + 1), indices: Vec::new() };
        rows.offsets.push(0);
        for flat in 0..batch.flat_heads() {
            let segment = batch.segment(flat);
            let bits = &plan[problem.plan_range(segment, flat % problem.heads)];
            for i in 0..segment.rows.len() {
                let blocks = blocks_of_row(segment, bits, i);
                rows.indices.extend(blocks.map(|j| u32::try_from(j).expect("fewer than 2^32 blocks")));
                rows.offsets.push(rows.indices.len());
            }
        }
        let columns = transpose(&rows, batch);
        Self { rows, columns }
    }

    /// The key blocks selected for a block of queries of a flat head, ascending.
    pub(crate) fn row(&self, batch: &Batch<'_>, head: usize, i: usize) -> &[u32] {
        self.rows.get(batch.row(head, i))
    }

    /// The blocks of queries of a flat head that selected a block of keys, ascending.
    pub(crate) fn column(&self, batch: &Batch<'_>, head: usize, j: usize) -> &[u32] {
        self.columns.get(column(batch, head, j))
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
