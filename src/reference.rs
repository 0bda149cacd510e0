//! The formulas of docs/definitions.md in float64: written to be read, and to test the kernels with.
//!
//! Nothing is shared with the kernels: no matrix products, no running sums, no packed plan. Every term of every sum is an element
//! of a loop. The cost is that of exact attention, and more; nothing here is for speed.
//!
//! Both forms are sums over *rows*. A row is some queries, which share a choice of blocks and a mean: a block of queries in the block
//! form, a single token in the token form. So one forward and one backward serve both; `segment` says what the rows are and whom they
//! see, `select` what they choose.
//!
//! The shapes are those of the crate: query `(B, H, Lq, D)`, key `(B, Hk, Lk, D)`, value `(B, Hk, Lk, Dv)`, out
//! `(B, H, Lq, Dv)`, lse `(B, H, Lq)`. A selection has an array `(H, rows, nk)` for each batch item, true where a block is exact.
//! What is stored at padded tokens is never read.

#![allow(clippy::needless_pass_by_value, reason = "views are passed by value")]
#![allow(clippy::float_cmp, reason = "a score equals its row's best or does not; there is no tolerance in a selection")]

mod first_order;
mod head;
mod ladder;
mod score;
mod segment;
mod select;
mod token_ladder;

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4, s};

use self::head::{Head, HeadGradients};
pub use self::ladder::{Ladder, Refined};
use self::segment::Segment;
pub use self::token_ladder::TokenLadder;
use crate::{Budget, Coarse, Mode, Score, Window};

/// The inputs of attention and what does not follow from them.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// `(B, H, Lq, D)`.
    pub query: ArrayView4<'a, f64>,
    /// `(B, Hk, Lk, D)`; `Hk` divides `H`, and consecutive query heads share a key head.
    pub key: ArrayView4<'a, f64>,
    /// `(B, Hk, Lk, Dv)`.
    pub value: ArrayView4<'a, f64>,
    /// `(B, Lq)`, true where a query is valid; `None` is what section 6 says.
    pub query_mask: Option<ArrayView2<'a, bool>>,
    /// `(B, Lk)`, true where a key is valid; `None` is everywhere.
    pub key_mask: Option<ArrayView2<'a, bool>>,
    /// `(B, H, Lq, Lk)`, added to the logits; `-inf` hides a pair. `None` is 0 everywhere.
    pub bias: Option<ArrayView4<'a, f64>>,
    /// The bound of the logits, before biases are added.
    pub softcap: Option<f64>,
    /// `(B, H)`: a bias of minus the slope times the distance of query and key. `None` is 0 everywhere.
    pub alibi_slopes: Option<&'a [f64]>,
    /// `(B, H)`: one more logit, in the denominator only.
    pub sinks: Option<&'a [f64]>,
    /// Which keys a query sees before and behind its own position.
    pub window: Window,
    /// The place of the first query among the keys, one number for all batch items or one for each.
    pub offsets: &'a [i64],
    /// How many keys each batch item has; `None` is all.
    pub key_lengths: Option<&'a [usize]>,
    /// Whether the block form may be used.
    pub pool_queries: bool,
    /// Tokens per block.
    pub block_size: usize,
    /// The factor of the logits; `None` is `1 / sqrt(D)`, or 1 without channels.
    pub scale: Option<f64>,
    /// Which terms the softmax has.
    pub mode: Mode,
    /// What stands for coarse blocks in the block form. There is no softcap beside [`Coarse::FirstOrder`].
    pub coarse: Coarse,
    /// What is added to the logit of a block that is not exact.
    pub coarse_shift: f64,
    /// What a token ranks blocks by.
    pub score: Score,
}

/// What backward reads beside the inputs.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// `(B, H, Lq, Dv)`.
    pub out: ArrayView4<'a, f64>,
    /// `(B, H, Lq)`.
    pub lse: ArrayView3<'a, f64>,
    /// The gradient of `out`.
    pub grad_out: ArrayView4<'a, f64>,
    /// The gradient of `lse`, if it was used.
    pub grad_lse: Option<ArrayView3<'a, f64>>,
}

/// The gradients of the inputs, in their shapes, and of the bias.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// `(B, H, Lq, D)`.
    pub query: Array4<f64>,
    /// `(B, Hk, Lk, D)`.
    pub key: Array4<f64>,
    /// `(B, Hk, Lk, Dv)`.
    pub value: Array4<f64>,
    /// `(B, H)`; 0 without sinks.
    pub sinks: Array2<f64>,
    /// `(B, H, Lq, Lk)`: of every pair by itself, whether there is a bias or not.
    pub bias: Array4<f64>,
}

/// How a batch item is computed (section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Rows are blocks of queries.
    Block,
    /// Rows are tokens.
    Token,
}

impl<'a> Attention<'a> {
    /// The form of each batch item.
    pub fn forms(&self) -> Vec<Form> {
        self.segments().iter().map(|segment| segment.form).collect()
    }

    /// A selection of whatever `chosen` says for (batch item, head, row, block).
    pub fn selection(&self, chosen: impl Fn(usize, usize, usize, usize) -> bool) -> Vec<Array3<bool>> {
        let sizes = |segment: &Segment| (self.query.dim().1, segment.rows.len(), segment.keys.len());
        let of_item =
            |(b, segment): (usize, Segment)| Array3::from_shape_fn(sizes(&segment), |(h, row, block)| chosen(b, h, row, block));
        self.segments().into_iter().enumerate().map(of_item).collect()
    }

    /// The blocks that are exact when each row chooses for itself (sections 3 and 4).
    pub fn select(&self, budget: &Budget) -> Vec<Array3<bool>> {
        let mut selected = self.selection(|_, _, _, _| false);
        for (b, segment) in self.segments().iter().enumerate() {
            for h in 0..self.query.dim().1 {
                let chosen = select::select(&self.head(segment, b, h), budget, h);
                selected[b].slice_mut(s![h, .., ..]).assign(&chosen);
            }
        }
        selected
    }

    /// What a selection makes exact: no block of which a row sees nothing, and every one of which it sees a part.
    pub fn exact(&self, selected: &[Array3<bool>]) -> Vec<Array3<bool>> {
        let mut exact = self.selection(|_, _, _, _| false);
        for (b, segment) in self.segments().iter().enumerate() {
            for h in 0..self.query.dim().1 {
                let of_head = self.head(segment, b, h).exact(selected[b].slice(s![h, .., ..]));
                exact[b].slice_mut(s![h, .., ..]).assign(&of_head);
            }
        }
        exact
    }

    /// `out` and `lse` of all queries (3.6, 3.7, 4.5).
    pub fn forward(&self, selected: &[Array3<bool>]) -> (Array4<f64>, Array3<f64>) {
        let (batch, heads, length, _) = self.query.dim();
        let mut out = Array4::zeros((batch, heads, length, self.value.dim().3));
        let mut lse = Array3::from_elem((batch, heads, length), f64::NEG_INFINITY);
        for (b, segment) in self.segments().iter().enumerate() {
            for h in 0..heads {
                let (out, lse) = (out.slice_mut(s![b, h, .., ..]), lse.slice_mut(s![b, h, ..]));
                self.head(segment, b, h).forward(selected[b].slice(s![h, .., ..]), out, lse);
            }
        }
        (out, lse)
    }

    /// The gradients of query, key, value and bias for a fixed selection (section 3, Backward; section 6).
    pub fn backward(&self, selected: &[Array3<bool>], saved: &Saved<'_>) -> Gradients {
        let mut gradients = self.no_gradients();
        for (b, segment) in self.segments().iter().enumerate() {
            for h in 0..self.query.dim().1 {
                let kv = self.kv_head(h);
                self.head(segment, b, h).backward(
                    selected[b].slice(s![h, .., ..]),
                    &head::Saved {
                        out: saved.out.slice(s![b, h, .., ..]),
                        lse: saved.lse.slice(s![b, h, ..]),
                        grad_out: saved.grad_out.slice(s![b, h, .., ..]),
                        grad_lse: saved.grad_lse.as_ref().map(|grad_lse| grad_lse.slice(s![b, h, ..])),
                    },
                    &mut HeadGradients {
                        query: gradients.query.slice_mut(s![b, h, .., ..]),
                        key: gradients.key.slice_mut(s![b, kv, .., ..]),
                        value: gradients.value.slice_mut(s![b, kv, .., ..]),
                        sink: &mut gradients.sinks[[b, h]],
                        bias: gradients.bias.slice_mut(s![b, h, .., ..]),
                    },
                );
            }
        }
        gradients
    }

    fn no_gradients(&self) -> Gradients {
        Gradients {
            query: Array4::zeros(self.query.raw_dim()),
            key: Array4::zeros(self.key.raw_dim()),
            value: Array4::zeros(self.value.raw_dim()),
            sinks: Array2::zeros((self.query.dim().0, self.query.dim().1)),
            bias: Array4::zeros((self.query.dim().0, self.query.dim().1, self.query.dim().2, self.key.dim().2)),
        }
    }

    fn segments(&self) -> Vec<Segment> {
        (0..self.query.dim().0).map(|b| Segment::new(self, b)).collect()
    }

    /// The key head of a query head.
    fn kv_head(&self, h: usize) -> usize {
        h / (self.query.dim().1 / self.key.dim().1)
    }

    fn head<'b>(&self, segment: &'b Segment, b: usize, h: usize) -> Head<'b>
    where
        'a: 'b,
    {
        let kv = self.kv_head(h);
        Head {
            segment,
            query: self.query.slice_move(s![b, h, .., ..]),
            key: self.key.slice_move(s![b, kv, .., ..]),
            value: self.value.slice_move(s![b, kv, .., ..]),
            bias: self.bias.map(|bias| bias.slice_move(s![b, h, .., ..])),
            softcap: self.softcap,
            slope: self.alibi_slopes.map_or(0.0, |slopes| slopes[b * self.query.dim().1 + h]),
            sink: self.sinks.map(|sinks| sinks[b * self.query.dim().1 + h]),
            scale: self.scale.unwrap_or(1.0 / (self.query.dim().3.max(1) as f64).sqrt()),
            mode: self.mode,
            coarse: self.coarse,
            coarse_shift: self.coarse_shift,
            score: self.score,
        }
    }
}
