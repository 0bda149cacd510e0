//! The formulas of docs/definitions.md, section 3: the causal form, token by token.
//!
//! Shapes as in the module above; a selection is `(B, H, Lq, nk)`, true where a token computes a block exactly. What is stored
//! behind a batch item's last key is never read.

use ndarray::{Array1, Array2, Array3, Array4, ArrayView2, ArrayView4, s};

use super::{Gradients, Saved, add, dot, pool, spread};
use crate::{CausalBudget, Mode};

/// The inputs of causal attention and what does not follow from them.
#[derive(Debug, Clone, Copy)]
pub struct CausalAttention<'a> {
    /// `(B, H, Lq, D)`.
    pub query: ArrayView4<'a, f64>,
    /// `(B, Hk, Lk, D)`; `Hk` divides `H`, and consecutive query heads share a key head.
    pub key: ArrayView4<'a, f64>,
    /// `(B, Hk, Lk, Dv)`.
    pub value: ArrayView4<'a, f64>,
    /// The position of the first query of each batch item.
    pub offsets: &'a [i64],
    /// How many keys each batch item has.
    pub key_lengths: &'a [usize],
    /// Tokens per block.
    pub block_size: usize,
    /// The factor of the logits; `None` is `1 / sqrt(D)`.
    pub scale: Option<f64>,
    /// Which terms the softmax has.
    pub mode: Mode,
}

impl<'a> CausalAttention<'a> {
    /// The blocks that are exact for each token.
    pub fn select(&self, budget: &CausalBudget) -> Array4<bool> {
        let (batch, heads, length, _) = self.query.dim();
        let mut selected = Array4::from_elem((batch, heads, length, self.key.dim().2.div_ceil(self.block_size)), false);
        for (b, h) in self.heads() {
            let head = self.head(b, h);
            for t in 0..length {
                for j in head.select(t, budget) {
                    selected[[b, h, t, j]] = true;
                }
            }
        }
        selected
    }

    /// `out` and `lse` of all queries.
    pub fn forward(&self, selected: ArrayView4<'_, bool>) -> (Array4<f64>, Array3<f64>) {
        let (batch, heads, length, _) = self.query.dim();
        let mut out = Array4::zeros((batch, heads, length, self.value.dim().3));
        let mut lse = Array3::from_elem((batch, heads, length), f64::NEG_INFINITY);
        for (b, h) in self.heads() {
            let head = self.head(b, h);
            for t in 0..length {
                let terms = head.terms(t, &|j| selected[[b, h, t, j]]);
                let highest = terms.iter().map(|term| term.logit).fold(f64::NEG_INFINITY, f64::max);
                let z: f64 = terms.iter().map(|term| term.count * (term.logit - highest).exp()).sum();
                if !terms.is_empty() {
                    lse[[b, h, t]] = highest + z.ln();
                }
                for term in terms {
                    let weight = term.count * (term.logit - highest).exp() / z;
                    out.slice_mut(s![b, h, t, ..]).scaled_add(weight, &head.value_of(term.of));
                }
            }
        }
        (out, lse)
    }

    /// The gradients of query, key and value for a fixed selection.
    pub fn backward(&self, selected: ArrayView4<'_, bool>, saved: &Saved<'_>) -> Gradients {
        let mut gradients = Gradients {
            query: Array4::zeros(self.query.raw_dim()),
            key: Array4::zeros(self.key.raw_dim()),
            value: Array4::zeros(self.value.raw_dim()),
        };
        for (b, h) in self.heads() {
            let (head, kv) = (self.head(b, h), self.kv_head(h));
            let mut query = gradients.query.slice_mut(s![b, h, .., ..]);
            let mut key = gradients.key.slice_mut(s![b, kv, .., ..]);
            let mut value = gradients.value.slice_mut(s![b, kv, .., ..]);
            let (mut dkh, mut dvh) = (Array2::zeros(head.kh.raw_dim()), Array2::zeros(head.vh.raw_dim()));
            for t in 0..self.query.dim().2 {
                let (g, lse) = (saved.grad_out.slice(s![b, h, t, ..]), saved.lse[[b, h, t]]);
                let delta = dot(g, saved.out.slice(s![b, h, t, ..])) - saved.grad_lse.map_or(0.0, |gl| gl[[b, h, t]]);
                for term in head.terms(t, &|j| selected[[b, h, t, j]]) {
                    let p = term.count * (term.logit - lse).exp();
                    let ds = p * (dot(g, head.value_of(term.of).view()) - delta);
                    match term.of {
                        Of::Key(s) => {
                            add(&mut query, t, head.scale * ds, head.key.row(s));
                            add(&mut key, s, head.scale * ds, head.query.row(t));
                            add(&mut value, s, p, g);
                        }
                        Of::Block(j) => {
                            add(&mut query, t, head.scale * ds, head.kh.row(j));
                            add(&mut dkh.view_mut(), j, head.scale * ds, head.query.row(t));
                            add(&mut dvh.view_mut(), j, p, g);
                        }
                    }
                }
            }
            spread(&dkh, &head.blocks, &mut key);
            spread(&dvh, &head.blocks, &mut value);
        }
        gradients
    }

    fn heads(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (batch, heads, ..) = self.query.dim();
        (0..batch).flat_map(move |b| (0..heads).map(move |h| (b, h)))
    }

    fn kv_head(&self, h: usize) -> usize {
        h / (self.query.dim().1 / self.key.dim().1)
    }

    fn head(&self, b: usize, h: usize) -> Head<'a> {
        let (kv, length) = (self.kv_head(h), self.key_lengths[b]);
        let key = self.key.slice_move(s![b, kv, ..length, ..]);
        let value = self.value.slice_move(s![b, kv, ..length, ..]);
        let tokens: Vec<usize> = (0..length).collect();
        let blocks: Vec<Vec<usize>> = tokens.chunks(self.block_size).map(<[usize]>::to_vec).collect();
        Head {
            query: self.query.slice_move(s![b, h, .., ..]),
            kh: pool(key, &blocks),
            vh: pool(value, &blocks),
            key,
            value,
            blocks,
            offset: self.offsets[b],
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
    kh: Array2<f64>,
    vh: Array2<f64>,
    /// The keys of each block.
    blocks: Vec<Vec<usize>>,
    offset: i64,
    block_size: usize,
    scale: f64,
    mode: Mode,
}

/// What a term of the softmax stands for.
#[derive(Clone, Copy)]
enum Of {
    Key(usize),
    Block(usize),
}

/// A term of the softmax: its logit, how many keys it stands for, and which.
struct Term {
    logit: f64,
    count: f64,
    of: Of,
}

impl Head<'_> {
    /// The position of a query and its own block; none before the first key.
    fn position(&self, t: usize) -> Option<(usize, usize)> {
        let position = usize::try_from(self.offset + i64::try_from(t).ok()?).ok()?;
        Some((position, position / self.block_size))
    }

    fn pooled_logit(&self, t: usize, j: usize) -> f64 {
        self.scale * dot(self.query.row(t), self.kh.row(j))
    }

    fn select(&self, t: usize, budget: &CausalBudget) -> Vec<usize> {
        let Some((_, own)) = self.position(t) else { return Vec::new() };
        let visible = (0..self.blocks.len()).filter(|&j| j <= own);
        let (mut exact, mut rest): (Vec<usize>, Vec<usize>) =
            visible.partition(|&j| j < budget.first_blocks || own - j < budget.local_blocks);
        // Adding 0 turns -0 into 0, which it ties with.
        let score = |j: usize| self.pooled_logit(t, j) + 0.0;
        rest.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
        exact.extend(rest.into_iter().take(budget.blocks.saturating_sub(exact.len())));
        exact
    }

    /// The terms of the softmax of a query.
    fn terms(&self, t: usize, selected: &dyn Fn(usize) -> bool) -> Vec<Term> {
        let Some((position, own)) = self.position(t) else { return Vec::new() };
        let mut terms = Vec::new();
        for (j, keys) in self.blocks.iter().enumerate() {
            if selected(j) {
                let visible = keys.iter().filter(|&&s| s <= position);
                terms.extend(visible.map(|&s| Term {
                    logit: self.scale * dot(self.query.row(t), self.key.row(s)),
                    count: 1.0,
                    of: Of::Key(s),
                }));
            } else if j < own && self.mode == Mode::Full {
                terms.push(Term { logit: self.pooled_logit(t, j), count: keys.len() as f64, of: Of::Block(j) });
            }
        }
        terms
    }

    fn value_of(&self, of: Of) -> Array1<f64> {
        match of {
            Of::Key(s) => self.value.row(s).to_owned(),
            Of::Block(j) => self.vh.row(j).to_owned(),
        }
    }
}
