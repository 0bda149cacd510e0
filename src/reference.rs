//! The formulas of docs/definitions.md, section 2, in float64: written to be read, and to test the kernels with.
//!
//! Nothing is shared with the kernels: no matrix products, no plan, no running sums. Every term of every sum is an element
//! of a loop. The cost is that of exact attention, and more; nothing here is for speed.
//!
//! The shapes are those of the crate: query `(B, H, Lq, D)`, key `(B, Hk, Lk, D)`, value `(B, Hk, Lk, Dv)`, out
//! `(B, H, Lq, Dv)`, lse `(B, H, Lq)`, and a selection of blocks `(B, H, nq, nk)`, true where a block is computed exactly.
//! What is stored at padded tokens is never read.

#![allow(clippy::needless_pass_by_value, reason = "views are passed by value")]
#![allow(clippy::float_cmp, reason = "a score equals its row's best or does not; there is no tolerance in a selection")]

mod causal;

pub use causal::CausalAttention;
use ndarray::{
    Array1, Array2, Array3, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut1, ArrayViewMut2, Axis, s,
};

use crate::{Budget, Mode};

/// The inputs of attention and what does not follow from them.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// `(B, H, Lq, D)`.
    pub query: ArrayView4<'a, f64>,
    /// `(B, Hk, Lk, D)`; `Hk` divides `H`, and consecutive query heads share a key head.
    pub key: ArrayView4<'a, f64>,
    /// `(B, Hk, Lk, Dv)`.
    pub value: ArrayView4<'a, f64>,
    /// `(B, Lq)`, true where a query is valid; `None` is everywhere.
    pub query_mask: Option<ArrayView2<'a, bool>>,
    /// `(B, Lk)`, true where a key is valid; `None` is everywhere.
    pub key_mask: Option<ArrayView2<'a, bool>>,
    /// `(B, H, Lq, Lk)`, added to the logits; `-inf` hides a pair. `None` is 0 everywhere.
    pub bias: Option<ArrayView4<'a, f64>>,
    /// Tokens per block.
    pub block_size: usize,
    /// The factor of the logits; `None` is `1 / sqrt(D)`.
    pub scale: Option<f64>,
    /// Which terms the softmax has.
    pub mode: Mode,
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

/// The gradients of the inputs, in their shapes.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// `(B, H, Lq, D)`.
    pub query: Array4<f64>,
    /// `(B, Hk, Lk, D)`.
    pub key: Array4<f64>,
    /// `(B, Hk, Lk, Dv)`.
    pub value: Array4<f64>,
}

impl<'a> Attention<'a> {
    /// The selected blocks `(B, H, nq, nk)` (section 2.1 to 2.5).
    pub fn select(&self, budget: &Budget) -> Array4<bool> {
        let (batch, heads, nq, nk) = self.blocks();
        let mut selected = Array4::from_elem((batch, heads, nq, nk), false);
        for (b, h) in self.heads() {
            selected.slice_mut(s![b, h, .., ..]).assign(&self.head(b, h).select(budget));
        }
        selected
    }

    /// `out` and `lse` of all queries (section 2.6 and 2.7).
    pub fn forward(&self, selected: ArrayView4<'_, bool>) -> (Array4<f64>, Array3<f64>) {
        let (batch, heads, length, _) = self.query.dim();
        let mut out = Array4::zeros((batch, heads, length, self.value.dim().3));
        let mut lse = Array3::from_elem((batch, heads, length), f64::NEG_INFINITY);
        for (b, h) in self.heads() {
            let head = self.head(b, h);
            head.forward(selected.slice(s![b, h, .., ..]), out.slice_mut(s![b, h, .., ..]), lse.slice_mut(s![b, h, ..]));
        }
        (out, lse)
    }

    /// The gradients of query, key and value for a fixed selection (section 2, Backward).
    pub fn backward(&self, selected: ArrayView4<'_, bool>, saved: &Saved<'_>) -> Gradients {
        let mut gradients = Gradients {
            query: Array4::zeros(self.query.raw_dim()),
            key: Array4::zeros(self.key.raw_dim()),
            value: Array4::zeros(self.value.raw_dim()),
        };
        for (b, h) in self.heads() {
            let kv = self.kv_head(h);
            self.head(b, h).backward(
                selected.slice(s![b, h, .., ..]),
                saved.out.slice(s![b, h, .., ..]),
                saved.lse.slice(s![b, h, ..]),
                saved.grad_out.slice(s![b, h, .., ..]),
                saved.grad_lse.as_ref().map(|grad_lse| grad_lse.slice(s![b, h, ..])),
                &mut HeadGradients {
                    query: gradients.query.slice_mut(s![b, h, .., ..]),
                    key: gradients.key.slice_mut(s![b, kv, .., ..]),
                    value: gradients.value.slice_mut(s![b, kv, .., ..]),
                },
            );
        }
        gradients
    }

    /// Batch items, heads, query blocks and key blocks.
    pub fn blocks(&self) -> (usize, usize, usize, usize) {
        let (batch, heads, length, _) = self.query.dim();
        (batch, heads, length.div_ceil(self.block_size), self.key.dim().2.div_ceil(self.block_size))
    }

    fn heads(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (batch, heads, ..) = self.query.dim();
        (0..batch).flat_map(move |b| (0..heads).map(move |h| (b, h)))
    }

    /// The key head of a query head.
    fn kv_head(&self, h: usize) -> usize {
        h / (self.query.dim().1 / self.key.dim().1)
    }

    fn head(&self, b: usize, h: usize) -> Head<'a> {
        let kv = self.kv_head(h);
        let valid = |mask: Option<ArrayView2<'a, bool>>, length| {
            mask.map_or(vec![true; length], |mask| mask.index_axis(Axis(0), b).to_vec())
        };
        Head {
            query: self.query.slice_move(s![b, h, .., ..]),
            key: self.key.slice_move(s![b, kv, .., ..]),
            value: self.value.slice_move(s![b, kv, .., ..]),
            query_valid: valid(self.query_mask, self.query.dim().2),
            key_valid: valid(self.key_mask, self.key.dim().2),
            bias: self.bias.map(|bias| bias.slice_move(s![b, h, .., ..])),
            block_size: self.block_size,
            scale: self.scale.unwrap_or(1.0 / (self.query.dim().3 as f64).sqrt()),
            mode: self.mode,
        }
    }
}

/// One query head and the keys and values that it reads.
struct Head<'a> {
    query: ArrayView2<'a, f64>,
    key: ArrayView2<'a, f64>,
    value: ArrayView2<'a, f64>,
    query_valid: Vec<bool>,
    key_valid: Vec<bool>,
    bias: Option<ArrayView2<'a, f64>>,
    block_size: usize,
    scale: f64,
    mode: Mode,
}

/// What a bias makes of a block (section 5).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Dead,
    Cut,
    Open,
}

struct HeadGradients<'a> {
    query: ArrayViewMut2<'a, f64>,
    key: ArrayViewMut2<'a, f64>,
    value: ArrayViewMut2<'a, f64>,
}

fn dot(a: ArrayView1<'_, f64>, b: ArrayView1<'_, f64>) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// `sum += factor * row`.
fn add(sum: &mut ArrayViewMut2<'_, f64>, index: usize, factor: f64, row: ArrayView1<'_, f64>) {
    sum.row_mut(index).scaled_add(factor, &row);
}

/// The valid tokens of each block.
fn tokens(valid: &[bool], block_size: usize) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..valid.len()).collect();
    all.chunks(block_size).map(|block| block.iter().copied().filter(|&t| valid[t]).collect()).collect()
}

/// The mean over the valid tokens of each block; 0 where there are none.
fn pool(rows: ArrayView2<'_, f64>, blocks: &[Vec<usize>]) -> Array2<f64> {
    let mut means = Array2::zeros((blocks.len(), rows.ncols()));
    for (mut mean, block) in means.rows_mut().into_iter().zip(blocks) {
        for &t in block {
            mean.scaled_add(1.0 / block.len() as f64, &rows.row(t));
        }
    }
    means
}

impl Head<'_> {
    fn query_blocks(&self) -> Vec<Vec<usize>> {
        tokens(&self.query_valid, self.block_size)
    }

    fn key_blocks(&self) -> Vec<Vec<usize>> {
        tokens(&self.key_valid, self.block_size)
    }

    fn valid_queries(&self) -> impl Iterator<Item = usize> {
        (0..self.query_valid.len()).filter(|&t| self.query_valid[t])
    }

    fn bias(&self, t: usize, s: usize) -> f64 {
        self.bias.map_or(0.0, |bias| bias[[t, s]])
    }

    /// `P[t, s]`.
    fn logit(&self, t: usize, s: usize) -> f64 {
        if self.bias(t, s) == f64::NEG_INFINITY {
            return f64::NEG_INFINITY;
        }
        self.scale * dot(self.query.row(t), self.key.row(s)) + self.bias(t, s)
    }

    /// `c[i, j]`, with the mean of the bias where the block is open.
    fn pooled_logits(&self) -> Array2<f64> {
        let (query_blocks, key_blocks, kinds) = (self.query_blocks(), self.key_blocks(), self.kinds());
        let (qh, kh) = (pool(self.query, &query_blocks), pool(self.key, &key_blocks));
        Array2::from_shape_fn((qh.nrows(), kh.nrows()), |(i, j)| {
            let pairs = query_blocks[i].iter().flat_map(|&t| key_blocks[j].iter().map(move |&s| (t, s)));
            let mean = pairs.map(|(t, s)| self.bias(t, s)).sum::<f64>() / (query_blocks[i].len() * key_blocks[j].len()) as f64;
            self.scale * dot(qh.row(i), kh.row(j)) + if kinds[[i, j]] == Kind::Open { mean } else { 0.0 }
        })
    }

    fn kinds(&self) -> Array2<Kind> {
        let (query_blocks, key_blocks) = (self.query_blocks(), self.key_blocks());
        Array2::from_shape_fn((query_blocks.len(), key_blocks.len()), |(i, j)| {
            let pairs = query_blocks[i].iter().flat_map(|&t| key_blocks[j].iter().map(move |&s| (t, s)));
            let biases: Vec<f64> = pairs.map(|(t, s)| self.bias(t, s)).collect();
            let (lowest, highest) = biases.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
            if biases.iter().all(|&x| x == f64::NEG_INFINITY) {
                Kind::Dead
            } else if biases.iter().all(|x| x.is_finite()) && highest - lowest <= 1e3 {
                Kind::Open
            } else {
                Kind::Cut
            }
        })
    }

    /// The blocks that are computed exactly: those of the selection that are open, and those that the bias cuts.
    fn exact(&self, selected: ArrayView2<'_, bool>) -> Array2<bool> {
        let kinds = self.kinds();
        Array2::from_shape_fn(kinds.raw_dim(), |at| match kinds[at] {
            Kind::Dead => false,
            Kind::Cut => true,
            Kind::Open => selected[at],
        })
    }

    fn select(&self, budget: &Budget) -> Array2<bool> {
        let c = self.pooled_logits();
        let query_blocks = self.query_blocks();
        let live_rows: Vec<usize> = (0..c.nrows()).filter(|&i| !query_blocks[i].is_empty()).collect();
        let kinds = self.kinds();
        let mut selected = Array2::from_elem(c.raw_dim(), false);
        let mut candidates = Vec::new();
        for &i in &live_rows {
            let live_columns: Vec<usize> = (0..c.ncols()).filter(|&j| kinds[[i, j]] == Kind::Open).collect();
            let best = live_columns.iter().map(|&j| c[[i, j]]).fold(f64::NEG_INFINITY, f64::max);
            let first_best = live_columns.iter().position(|&j| c[[i, j]] == best);
            for (place, &j) in live_columns.iter().enumerate() {
                let near = budget.diagonal_blocks > 0 && i.abs_diff(j) <= budget.diagonal_blocks / 2;
                let first = i < budget.first_blocks || j < budget.first_blocks;
                if near || first || Some(place) == first_best {
                    selected[[i, j]] = true;
                } else {
                    // Adding 0 turns -0 into 0, which it ties with.
                    candidates.push((c[[i, j]] - best + 0.0, i, j));
                }
            }
        }
        // The highest score first; among equal ones the lower `i * nk + j`.
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let forced = selected.iter().filter(|&&exact| exact).count();
        for (_, i, j) in candidates.into_iter().take(number_of_blocks(budget, live_rows.len()).saturating_sub(forced)) {
            selected[[i, j]] = true;
        }
        self.exact(selected.view())
    }

    /// Writes the output and the lse of every valid query that sees a key.
    fn forward(&self, selected: ArrayView2<'_, bool>, mut out: ArrayViewMut2<'_, f64>, mut lse: ArrayViewMut1<'_, f64>) {
        let (c, key_blocks) = (self.pooled_logits(), self.key_blocks());
        let vh = pool(self.value, &key_blocks);
        let (kinds, exact) = (self.kinds(), self.exact(selected));
        for (i, t) in self.query_blocks().iter().enumerate().flat_map(|(i, queries)| queries.iter().map(move |&t| (i, t))) {
            // The logit, how many keys it stands for, and their value.
            let mut terms = Vec::new();
            for (j, keys) in key_blocks.iter().enumerate() {
                if exact[[i, j]] {
                    let seen = keys.iter().filter(|&&s| self.bias(t, s) != f64::NEG_INFINITY);
                    terms.extend(seen.map(|&s| (self.logit(t, s), 1.0, self.value.row(s))));
                } else if self.mode == Mode::Full && kinds[[i, j]] == Kind::Open {
                    terms.push((c[[i, j]], keys.len() as f64, vh.row(j)));
                }
            }
            if !terms.is_empty() {
                let highest = terms.iter().map(|term| term.0).fold(f64::NEG_INFINITY, f64::max);
                let z: f64 = terms.iter().map(|(logit, count, _)| count * (logit - highest).exp()).sum();
                for (logit, count, value) in terms {
                    add(&mut out, t, count * (logit - highest).exp() / z, value);
                }
                lse[t] = highest + z.ln();
            }
        }
    }

    /// Adds the gradients that this query head contributes.
    fn backward(
        &self,
        selected: ArrayView2<'_, bool>,
        out: ArrayView2<'_, f64>,
        lse: ArrayView1<'_, f64>,
        g: ArrayView2<'_, f64>,
        grad_lse: Option<ArrayView1<'_, f64>>,
        to: &mut HeadGradients<'_>,
    ) {
        // <g_t, out_t> - gl_t; what all of a query's keys share.
        let mut delta = Array1::zeros(lse.len());
        for t in self.valid_queries() {
            delta[t] = dot(g.row(t), out.row(t)) - grad_lse.map_or(0.0, |gl| gl[t]);
        }
        let (query_blocks, key_blocks) = (self.query_blocks(), self.key_blocks());
        let exact = self.exact(selected);
        for (i, queries) in query_blocks.iter().enumerate() {
            for (_, keys) in key_blocks.iter().enumerate().filter(|&(j, _)| exact[[i, j]]) {
                let pairs = queries.iter().flat_map(|t| keys.iter().map(move |s| (t, s)));
                for (&t, &s) in pairs.filter(|&(&t, &s)| self.bias(t, s) != f64::NEG_INFINITY) {
                    let p = (self.logit(t, s) - lse[t]).exp();
                    let ds = p * (dot(g.row(t), self.value.row(s)) - delta[t]);
                    add(&mut to.query, t, self.scale * ds, self.key.row(s));
                    add(&mut to.key, s, self.scale * ds, self.query.row(t));
                    add(&mut to.value, s, p, g.row(t));
                }
            }
        }
        if self.mode == Mode::Full {
            self.coarse_backward(selected, lse, g, delta.view(), to);
        }
    }

    fn coarse_backward(
        &self,
        selected: ArrayView2<'_, bool>,
        lse: ArrayView1<'_, f64>,
        g: ArrayView2<'_, f64>,
        delta: ArrayView1<'_, f64>,
        to: &mut HeadGradients<'_>,
    ) {
        let (query_blocks, key_blocks) = (self.query_blocks(), self.key_blocks());
        let (qh, kh, vh) = (pool(self.query, &query_blocks), pool(self.key, &key_blocks), pool(self.value, &key_blocks));
        let (c, kinds, exact) = (self.pooled_logits(), self.kinds(), self.exact(selected));
        let (mut dqh, mut dkh, mut dvh) =
            (Array2::zeros(qh.raw_dim()), Array2::zeros(kh.raw_dim()), Array2::zeros(vh.raw_dim()));
        for (i, queries) in query_blocks.iter().enumerate().filter(|(_, queries)| !queries.is_empty()) {
            let unselected: Vec<usize> =
                (0..key_blocks.len()).filter(|&j| !exact[[i, j]] && kinds[[i, j]] == Kind::Open).collect();
            let r = unselected.iter().map(|&j| c[[i, j]]).fold(f64::NEG_INFINITY, f64::max);
            let (mut sum_g, mut sum_delta) = (Array1::<f64>::zeros(g.ncols()), 0.0);
            for &t in queries.iter().filter(|_| !unselected.is_empty()) {
                sum_g.scaled_add((r - lse[t]).exp(), &g.row(t));
                sum_delta += (r - lse[t]).exp() * delta[t];
            }
            for j in unselected {
                let (count, w) = (key_blocks[j].len() as f64, (c[[i, j]] - r).exp());
                let dc = count * w * (dot(sum_g.view(), vh.row(j)) - sum_delta);
                add(&mut dqh.view_mut(), i, self.scale * dc, kh.row(j));
                add(&mut dkh.view_mut(), j, self.scale * dc, qh.row(i));
                add(&mut dvh.view_mut(), j, count * w, sum_g.view());
            }
        }
        spread(&dqh, &query_blocks, &mut to.query);
        spread(&dkh, &key_blocks, &mut to.key);
        spread(&dvh, &key_blocks, &mut to.value);
    }
}

/// Gives each valid token of a block its share of the gradient of the block's mean.
fn spread(pooled: &Array2<f64>, blocks: &[Vec<usize>], to: &mut ArrayViewMut2<'_, f64>) {
    for (block, row) in blocks.iter().zip(pooled.rows()) {
        for &t in block {
            add(to, t, 1.0 / block.len() as f64, row);
        }
    }
}

/// The budget of one head, before the bounds by forced and live blocks.
fn number_of_blocks(budget: &Budget, live_rows: usize) -> usize {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of blocks; more than there are means all"
    )]
    budget.num_blocks.unwrap_or((budget.blocks_per_row * live_rows as f64 + 0.5).floor() as usize)
}
