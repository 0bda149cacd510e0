//! The rows and the blocks of a batch item, and who sees whom: sections 1, 2 and 6 of the definitions.

use ndarray::{ArrayView3, Axis, s};

use super::{Attention, Form};
use crate::Window;

/// A batch item.
pub(super) struct Segment {
    pub(super) form: Form,
    pub(super) rows: Vec<Row>,
    /// The number of the first row in the block form: negative where padded queries lie in front of the first valid one.
    pub(super) first_row: i128,
    /// The valid keys of each block.
    pub(super) keys: Vec<Vec<usize>>,
    /// Blocks with a valid query, whatever the form.
    pub(super) query_blocks: usize,
    /// What is added to a query's place to make it a position.
    to_position: i128,
    window: Window,
    offset: i128,
    block_size: i128,
}

/// Queries that share a choice and a mean.
pub(super) struct Row {
    /// The queries that have an output.
    pub(super) queries: Vec<usize>,
    /// Those of which the mean is made.
    pub(super) pooled: Vec<usize>,
    /// Whether one of them is valid.
    pub(super) live: bool,
}

/// What a row sees of a block: nothing, a part, or all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Dead,
    Cut,
    Open,
}

impl Segment {
    pub(super) fn new(attention: &Attention<'_>, item: usize) -> Self {
        let (queries, keys) = (attention.query.dim().2, attention.key.dim().2);
        let bias = attention.bias.map(|bias| bias.index_axis_move(Axis(0), item));
        let offset = i128::from(attention.offsets[item.min(attention.offsets.len() - 1)]);
        let length = attention.key_lengths.map_or(keys, |lengths| lengths[item]);
        let mut valid: Vec<bool> =
            (0..keys).map(|s| s < length && attention.key_mask.is_none_or(|mask| mask[[item, s]])).collect();
        let mut answers: Vec<bool> = (0..queries).map(|t| attention.query_mask.is_none_or(|mask| mask[[item, t]])).collect();
        // Queries from which the mask hides everything count as padding, and so do keys that it hides from all others.
        if let Some(bias) = bias {
            for (t, answers) in answers.iter_mut().enumerate() {
                *answers &= (0..keys).any(|s| valid[s] && in_some_head(bias, t, s));
            }
            for (s, valid) in valid.iter_mut().enumerate() {
                *valid &= (0..queries).any(|t| answers[t] && in_some_head(bias, t, s));
            }
        }
        // Without a mask of their own, queries are padding where the keys are.
        let implied = attention.query_mask.is_none() && queries == keys;
        let counted: Vec<bool> = (0..queries).map(|t| answers[t] && (!implied || valid[t])).collect();

        let first_key = first(&valid);
        let (_, key_blocks) = blocks(&valid, first_key, attention.block_size);
        let (first_row, query_rows) = blocks(&answers, first(&counted), attention.block_size);
        let rows: Vec<Row> = query_rows.into_iter().map(|queries| Row::new(queries, &counted)).collect();
        let mut segment = Self {
            form: Form::Block,
            query_blocks: rows.iter().filter(|row| row.live).count(),
            rows,
            first_row,
            keys: key_blocks,
            to_position: offset - to_i128(first_key),
            window: attention.window,
            offset,
            block_size: to_i128(attention.block_size),
        };
        if segment.needs_tokens(attention, bias, &answers, &valid) {
            segment.form = Form::Token;
            let alone = |t: usize| if answers[t] { vec![t] } else { Vec::new() };
            segment.rows = (0..queries).map(|t| Row { queries: alone(t), pooled: alone(t), live: answers[t] }).collect();
        }
        segment
    }

    /// Whether a pair of a query and a key may be hidden, or a bias is used as a mask, or nothing is to be pooled.
    fn needs_tokens(
        &self,
        attention: &Attention<'_>,
        bias: Option<ArrayView3<'_, f64>>,
        answers: &[bool],
        valid: &[bool],
    ) -> bool {
        let window = attention.window.left.is_some() || attention.window.right.is_some();
        if window || !attention.pool_queries {
            return true;
        }
        let Some(bias) = bias else { return false };
        let pairs = || (0..answers.len()).flat_map(|t| (0..valid.len()).map(move |s| (t, s)));
        let hides = pairs().any(|(t, s)| answers[t] && valid[s] && !in_every_head(bias, t, s));
        let cuts = |h: usize, row: &Row, keys: &[usize]| self.kind(row, keys, |t, s| bias[[h, t, s]]) == Kind::Cut;
        hides || (0..bias.dim().0).any(|h| self.rows.iter().any(|row| self.keys.iter().any(|keys| cuts(h, row, keys))))
    }

    /// How many blocks of another size a block has side by side.
    pub(super) fn size_in(&self, other: &Self) -> i128 {
        self.block_size / other.block_size
    }

    /// The block of a query's position.
    pub(super) fn own_block(&self, t: usize) -> i128 {
        (to_i128(t) + self.to_position).div_euclid(self.block_size)
    }

    /// How far apart a query and a key are.
    pub(super) fn distance(&self, t: usize, s: usize) -> f64 {
        (to_i128(s) - (to_i128(t) + self.offset)).unsigned_abs() as f64
    }

    /// Whether the window lets a query see a key.
    pub(super) fn in_window(&self, t: usize, s: usize) -> bool {
        let ahead = to_i128(s) - (to_i128(t) + self.offset);
        self.window.left.is_none_or(|left| ahead >= -to_i128(left))
            && self.window.right.is_none_or(|right| ahead <= to_i128(right))
    }

    /// What a row sees of some keys with this bias.
    pub(super) fn kind(&self, row: &Row, keys: &[usize], bias: impl Fn(usize, usize) -> f64) -> Kind {
        let pairs = row.queries.iter().flat_map(|&t| keys.iter().map(move |&s| (t, s)));
        let biases: Vec<f64> = pairs.map(|(t, s)| if self.in_window(t, s) { bias(t, s) } else { f64::NEG_INFINITY }).collect();
        let (lowest, highest) = biases.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
        if biases.iter().all(|&x| x == f64::NEG_INFINITY) {
            Kind::Dead
        } else if biases.iter().all(|x| x.is_finite()) && highest - lowest <= 1e3 {
            Kind::Open
        } else {
            Kind::Cut
        }
    }
}

impl Row {
    fn new(queries: Vec<usize>, counted: &[bool]) -> Self {
        let valid: Vec<usize> = queries.iter().copied().filter(|&t| counted[t]).collect();
        let live = !valid.is_empty();
        Self { pooled: if live { valid } else { queries.clone() }, queries, live }
    }
}

/// Whether a mask lets a query see a key in one of the heads.
fn in_some_head(bias: ArrayView3<'_, f64>, t: usize, s: usize) -> bool {
    bias.slice(s![.., t, s]).iter().any(|&x| x != f64::NEG_INFINITY)
}

/// Whether a mask lets a query see a key in every head.
fn in_every_head(bias: ArrayView3<'_, f64>, t: usize, s: usize) -> bool {
    bias.slice(s![.., t, s]).iter().all(|&x| x != f64::NEG_INFINITY)
}

fn first(wanted: &[bool]) -> usize {
    wanted.iter().position(|&x| x).unwrap_or(0)
}

/// The number of the first block and the wanted tokens of each, where block 0 begins at `first`.
fn blocks(wanted: &[bool], first: usize, block_size: usize) -> (i128, Vec<Vec<usize>>) {
    let block_of = |t: usize| (to_i128(t) - to_i128(first)).div_euclid(to_i128(block_size));
    let tokens: Vec<usize> = (0..wanted.len()).filter(|&t| wanted[t]).collect();
    let (Some(&lowest), Some(&highest)) = (tokens.first(), tokens.last()) else { return (0, Vec::new()) };
    let numbers = block_of(lowest)..=block_of(highest);
    let of_block = |number| tokens.iter().copied().filter(|&t| block_of(t) == number).collect();
    (block_of(lowest), numbers.map(of_block).collect())
}

fn to_i128(x: usize) -> i128 {
    i128::try_from(x).expect("a length in memory")
}
