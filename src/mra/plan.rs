//! The plan: which blocks are computed exactly.

use std::ops::Range;

use super::bias::Kind;
use super::problem::Problem;
use crate::error::{Error, Result};

/// The selected blocks of every head, by rows and by columns.
///
/// Selection is discontinuous, so it is made once and kept as a value: forward, backward and tests read the plan, never a
/// threshold. Blocks without a valid query or a valid key are not in it, nor those that a mask hides; those that it cuts are.
#[derive(Debug)]
pub struct Plan {
    query_blocks: usize,
    key_blocks: usize,
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

impl Plan {
    /// Bytes that hold the bits of one row of blocks.
    pub fn row_bytes(key_blocks: usize) -> usize {
        key_blocks.div_ceil(8)
    }

    /// Bytes that hold the bits of all rows.
    pub fn bytes(problem: &Problem) -> usize {
        problem.all_heads() * problem.query_blocks() * Self::row_bytes(problem.key_blocks())
    }

    /// Reads a plan from bits: for each batch item, head and query block `ceil(nk / 8)` bytes, block `j` in bit `j % 8` of byte
    /// `j / 8`. Bits beyond the last block and bits of blocks without valid tokens or visible pairs are left out; blocks that
    /// the problem's mask cuts are selected in any case.
    ///
    /// # Errors
    /// If `bits` has not the length that the problem needs.
    ///
    /// # Panics
    /// If the sequences have more than 2^32 blocks.
    pub fn from_bits(problem: &Problem, bits: &[u8]) -> Result<Self> {
        let (query_blocks, key_blocks) = (problem.query_blocks(), problem.key_blocks());
        let row_bytes = Self::row_bytes(key_blocks);
        let expected = Self::bytes(problem);
        if bits.len() != expected {
            return Err(Error::new(format!("plan: {} bytes, expected {expected}", bits.len())));
        }
        let mut rows = Lists { offsets: Vec::with_capacity(problem.all_heads() * query_blocks + 1), indices: Vec::new() };
        rows.offsets.push(0);
        for head in 0..problem.all_heads() {
            let (queries, keys) = (problem.queries(head / problem.heads), problem.keys(head / problem.heads));
            for i in 0..query_blocks {
                if queries.count(i) > 0 {
                    let row = &bits[(head * query_blocks + i) * row_bytes..][..row_bytes];
                    let number = |j| u32::try_from(j).expect("fewer than 2^32 blocks");
                    if let Some(pairs) = &problem.pairs {
                        let kinds = pairs.head(head).kinds(i);
                        let selected = kinds.iter().enumerate().filter(|&(j, kind)| match kind {
                            Kind::Dead => false,
                            Kind::Cut => true,
                            Kind::Open => row[j / 8] >> (j % 8) & 1 == 1,
                        });
                        rows.indices.extend(selected.map(|(j, _)| number(j)));
                    } else {
                        rows.indices.extend(ones(row).filter(|&j| j < key_blocks && keys.count(j) > 0).map(number));
                    }
                }
                rows.offsets.push(rows.indices.len());
            }
        }
        let columns = transpose(&rows, problem.all_heads(), query_blocks, key_blocks);
        Ok(Self { query_blocks, key_blocks, rows, columns })
    }

    /// The blocks of a range that the bits of a head select for a query block, ascending.
    pub(crate) fn selected(bits: &[u8], i: usize, key_blocks: usize, blocks: Range<usize>) -> impl Iterator<Item = usize> {
        let row = &bits[i * Self::row_bytes(key_blocks)..][..Self::row_bytes(key_blocks)];
        let first = blocks.start / 8;
        ones(&row[first..blocks.end.div_ceil(8)]).map(move |bit| first * 8 + bit).filter(move |j| blocks.contains(j))
    }

    /// The key blocks selected for a query block, ascending. Heads of all batch items are numbered through.
    pub(crate) fn row(&self, head: usize, i: usize) -> &[u32] {
        self.rows.get(head * self.query_blocks + i)
    }

    /// The query blocks that selected a key block, ascending.
    pub(crate) fn column(&self, head: usize, j: usize) -> &[u32] {
        self.columns.get(head * self.key_blocks + j)
    }

    /// Checks that the plan was read for a problem of this shape.
    pub(crate) fn validate(&self, problem: &Problem) -> Result<()> {
        let heads = self.rows.offsets.len() - 1;
        if (self.query_blocks, self.key_blocks) == (problem.query_blocks(), problem.key_blocks())
            && heads == problem.all_heads() * self.query_blocks
        {
            return Ok(());
        }
        Err(Error::new(format!(
            "plan: {} x {} blocks, expected {} x {} for each of {} heads",
            self.query_blocks,
            self.key_blocks,
            problem.query_blocks(),
            problem.key_blocks(),
            problem.all_heads()
        )))
    }

    /// How many blocks are selected, over all heads.
    pub fn num_blocks(&self) -> usize {
        self.rows.indices.len()
    }
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

/// Lists by column from lists by row: a counting sort.
fn transpose(rows: &Lists, heads: usize, query_blocks: usize, key_blocks: usize) -> Lists {
    let mut offsets = vec![0; heads * key_blocks + 1];
    let entries = || {
        (0..heads).flat_map(move |head| {
            (0..query_blocks).flat_map(move |i| rows.get(head * query_blocks + i).iter().map(move |&j| (head, i, j)))
        })
    };
    for (head, _, j) in entries() {
        offsets[head * key_blocks + j as usize + 1] += 1;
    }
    for column in 0..heads * key_blocks {
        offsets[column + 1] += offsets[column];
    }
    let mut next = offsets.clone();
    let mut indices = vec![0; rows.indices.len()];
    for (head, i, j) in entries() {
        let place = &mut next[head * key_blocks + j as usize];
        indices[*place] = u32::try_from(i).expect("fewer than 2^32 blocks");
        *place += 1;
    }
    Lists { offsets, indices }
}
