//! Forward and backward of one query head, row by row: sections 3.6, 3.7 and 4.5 of the definitions, and "Backward".

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use super::segment::{Kind, Segment};
use crate::{Coarse, Mode, Score};

/// One query head and the keys and values that it reads.
pub(super) struct Head<'a> {
    pub(super) segment: &'a Segment,
    pub(super) query: ArrayView2<'a, f64>,
    pub(super) key: ArrayView2<'a, f64>,
    pub(super) value: ArrayView2<'a, f64>,
    pub(super) bias: Option<ArrayView2<'a, f64>>,
    pub(super) softcap: Option<f64>,
    /// Of the bias by distance.
    pub(super) slope: f64,
    pub(super) sink: Option<f64>,
    pub(super) scale: f64,
    pub(super) mode: Mode,
    pub(super) coarse: Coarse,
    pub(super) coarse_shift: f64,
    pub(super) score: Score,
}

/// What backward reads beside the inputs.
pub(super) struct Saved<'a> {
    pub(super) out: ArrayView2<'a, f64>,
    pub(super) lse: ArrayView1<'a, f64>,
    pub(super) grad_out: ArrayView2<'a, f64>,
    pub(super) grad_lse: Option<ArrayView1<'a, f64>>,
}

pub(super) struct HeadGradients<'a> {
    pub(super) query: ArrayViewMut2<'a, f64>,
    pub(super) key: ArrayViewMut2<'a, f64>,
    pub(super) value: ArrayViewMut2<'a, f64>,
    pub(super) sink: &'a mut f64,
    pub(super) bias: ArrayViewMut2<'a, f64>,
}

pub(super) fn dot(a: ArrayView1<'_, f64>, b: ArrayView1<'_, f64>) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// `sum += factor * row`.
pub(super) fn add(sum: &mut ArrayViewMut2<'_, f64>, index: usize, factor: f64, row: ArrayView1<'_, f64>) {
    sum.row_mut(index).scaled_add(factor, &row);
}

/// The mean over some tokens for each block; 0 where there are none.
pub(super) fn pool<'b>(rows: ArrayView2<'_, f64>, blocks: impl ExactSizeIterator<Item = &'b Vec<usize>>) -> Array2<f64> {
    let mut means = Array2::zeros((blocks.len(), rows.ncols()));
    for (mut mean, block) in means.rows_mut().into_iter().zip(blocks) {
        for &t in block {
            mean.scaled_add(1.0 / block.len() as f64, &rows.row(t));
        }
    }
    means
}

/// Gives each token of a mean its share of the mean's gradient.
pub(super) fn spread<'b>(pooled: &Array2<f64>, blocks: impl Iterator<Item = &'b Vec<usize>>, to: &mut ArrayViewMut2<'_, f64>) {
    for (block, row) in blocks.zip(pooled.rows()) {
        for &t in block {
            add(to, t, 1.0 / block.len() as f64, row);
        }
    }
}

impl Head<'_> {
    /// `qh`: the mean of each row.
    pub(super) fn query_means(&self) -> Array2<f64> {
        pool(self.query, self.segment.rows.iter().map(|row| &row.pooled))
    }

    fn bias(&self, t: usize, s: usize) -> f64 {
        self.bias.map_or(0.0, |bias| bias[[t, s]])
    }

    /// Its own bias and that by distance.
    fn biases(&self, t: usize, s: usize) -> f64 {
        self.bias(t, s) - if self.slope == 0.0 { 0.0 } else { self.slope * self.segment.distance(t, s) }
    }

    /// The scaled product of a query and a key, bounded by the softcap.
    fn product(&self, q: ArrayView1<'_, f64>, k: ArrayView1<'_, f64>) -> f64 {
        let product = self.scale * dot(q, k);
        self.softcap.map_or(product, |cap| cap * (product / cap).tanh())
    }

    /// The derivative of the bounded product with respect to the unscaled one.
    pub(super) fn product_slope(&self, q: ArrayView1<'_, f64>, k: ArrayView1<'_, f64>) -> f64 {
        self.scale * self.softcap.map_or(1.0, |cap| 1.0 - (self.product(q, k) / cap).powi(2))
    }

    pub(super) fn sees(&self, t: usize, s: usize) -> bool {
        self.segment.in_window(t, s) && self.bias(t, s) != f64::NEG_INFINITY
    }

    /// `P[t, s]`.
    pub(super) fn logit(&self, t: usize, s: usize) -> f64 {
        self.product(self.query.row(t), self.key.row(s)) + self.biases(t, s)
    }

    /// `c[row, j]`, with the mean of the bias where the block is open.
    pub(super) fn pooled_logits(&self) -> Array2<f64> {
        let kinds = self.kinds();
        let (qh, kh) = (self.query_means(), pool(self.key, self.segment.keys.iter()));
        Array2::from_shape_fn(kinds.raw_dim(), |(row, j)| {
            let mean = if kinds[[row, j]] == Kind::Open { self.mean_bias(row, j) } else { 0.0 };
            self.product(qh.row(row), kh.row(j)) + mean
        })
    }

    /// The mean of the biases of a row and a block.
    pub(super) fn mean_bias(&self, row: usize, j: usize) -> f64 {
        let (queries, keys) = (&self.segment.rows[row].pooled, &self.segment.keys[j]);
        let pairs = queries.iter().flat_map(|&t| keys.iter().map(move |&s| (t, s)));
        pairs.map(|(t, s)| self.biases(t, s)).sum::<f64>() / (queries.len() * keys.len()) as f64
    }

    pub(super) fn kinds(&self) -> Array2<Kind> {
        let (rows, keys) = (&self.segment.rows, &self.segment.keys);
        Array2::from_shape_fn((rows.len(), keys.len()), |(row, j)| {
            self.segment.kind(&rows[row], &keys[j], |t, s| self.bias(t, s))
        })
    }

    /// The blocks that are computed exactly: those of the selection that are open, and those that are cut.
    pub(super) fn exact(&self, selected: ArrayView2<'_, bool>) -> Array2<bool> {
        let kinds = self.kinds();
        Array2::from_shape_fn(kinds.raw_dim(), |at| match kinds[at] {
            Kind::Dead => false,
            Kind::Cut => true,
            Kind::Open => selected[at],
        })
    }

    /// How many times a coarse block of these keys counts.
    fn weight(&self, keys: &[usize]) -> f64 {
        keys.len() as f64 * self.coarse_shift.exp()
    }

    /// The coarse blocks.
    fn coarse_blocks(&self, selected: ArrayView2<'_, bool>) -> Array2<bool> {
        let kinds = self.kinds();
        Array2::from_shape_fn(kinds.raw_dim(), |at| self.mode == Mode::Full && kinds[at] == Kind::Open && !selected[at])
    }

    /// Writes the output and the lse of every query that sees a key.
    pub(super) fn forward(
        &self,
        selected: ArrayView2<'_, bool>,
        mut out: ArrayViewMut2<'_, f64>,
        mut lse: ArrayViewMut1<'_, f64>,
    ) {
        let (c, exact, coarse) = (self.pooled_logits(), self.exact(selected), self.coarse_blocks(selected));
        let keys = &self.segment.keys;
        let vh = pool(self.value, keys.iter());
        let summaries = self.expands().then(|| self.summaries());
        for (row, t) in self.segment.rows.iter().enumerate().flat_map(|(row, of)| of.queries.iter().map(move |&t| (row, t))) {
            // The logit, how many keys it stands for, and their value.
            let mut terms = Vec::new();
            for (j, keys) in keys.iter().enumerate() {
                let summary = summaries.as_ref().and_then(|summaries| summaries[[row, j]].as_ref());
                if exact[[row, j]] {
                    let seen = keys.iter().filter(|&&s| self.sees(t, s));
                    terms.extend(seen.map(|&s| (self.logit(t, s), 1.0, self.value.row(s))));
                } else if let (true, Some(summary)) = (coarse[[row, j]], summary) {
                    terms.push((self.logit_of(summary, t), 1.0, summary.value.view()));
                } else if coarse[[row, j]] {
                    terms.push((c[[row, j]], self.weight(keys), vh.row(j)));
                }
            }
            if !terms.is_empty() {
                let highest = terms.iter().map(|term| term.0).chain(self.sink).fold(f64::NEG_INFINITY, f64::max);
                let sink = self.sink.map_or(0.0, |sink| (sink - highest).exp());
                let z = terms.iter().map(|(logit, count, _)| count * (logit - highest).exp()).sum::<f64>() + sink;
                for (logit, count, value) in terms {
                    add(&mut out, t, count * (logit - highest).exp() / z, value);
                }
                lse[t] = highest + z.ln();
            }
        }
    }

    /// Adds the gradients that this query head contributes.
    pub(super) fn backward(&self, selected: ArrayView2<'_, bool>, saved: &Saved<'_>, to: &mut HeadGradients<'_>) {
        let exact = self.exact(selected);
        for (row, t) in self.segment.rows.iter().enumerate().flat_map(|(row, of)| of.queries.iter().map(move |&t| (row, t))) {
            let Some(delta) = saved.delta(t) else { continue };
            let (g, lse) = (saved.grad_out.row(t), saved.lse[t]);
            if let Some(sink) = self.sink.filter(|_| lse > f64::NEG_INFINITY) {
                *to.sink -= (sink - lse).exp() * delta;
            }
            for (_, keys) in self.segment.keys.iter().enumerate().filter(|&(j, _)| exact[[row, j]]) {
                for &s in keys.iter().filter(|&&s| self.sees(t, s)) {
                    let p = (self.logit(t, s) - lse).exp();
                    let ds = p * (dot(g, self.value.row(s)) - delta);
                    let factor = ds * self.product_slope(self.query.row(t), self.key.row(s));
                    add(&mut to.query, t, factor, self.key.row(s));
                    add(&mut to.key, s, factor, self.query.row(t));
                    add(&mut to.value, s, p, g);
                    to.bias[[t, s]] += ds;
                }
            }
        }
        self.coarse_backward(selected, saved, to);
    }

    fn coarse_backward(&self, selected: ArrayView2<'_, bool>, saved: &Saved<'_>, to: &mut HeadGradients<'_>) {
        let (rows, keys) = (&self.segment.rows, &self.segment.keys);
        let (qh, kh, vh) = (self.query_means(), pool(self.key, keys.iter()), pool(self.value, keys.iter()));
        let (c, coarse) = (self.pooled_logits(), self.coarse_blocks(selected));
        if self.expands() {
            return self.first_order_backward(&coarse, saved, to);
        }
        let (mut dqh, mut dkh, mut dvh) =
            (Array2::zeros(qh.raw_dim()), Array2::zeros(kh.raw_dim()), Array2::zeros(vh.raw_dim()));
        for (i, row) in rows.iter().enumerate() {
            let unselected: Vec<usize> = (0..keys.len()).filter(|&j| coarse[[i, j]]).collect();
            let r = unselected.iter().map(|&j| c[[i, j]]).fold(f64::NEG_INFINITY, f64::max);
            let given: Vec<(usize, f64)> = row.queries.iter().filter_map(|&t| Some((t, saved.delta(t)?))).collect();
            if unselected.is_empty() || given.is_empty() {
                continue;
            }
            let (mut sum_g, mut sum_delta) = (Array1::<f64>::zeros(saved.grad_out.ncols()), 0.0);
            for (t, delta) in given {
                let factor = (r - saved.lse[t]).exp();
                sum_g.scaled_add(factor, &saved.grad_out.row(t));
                sum_delta += factor * delta;
            }
            for j in unselected {
                let (count, w) = (self.weight(&keys[j]), (c[[i, j]] - r).exp());
                let dc = count * w * (dot(sum_g.view(), vh.row(j)) - sum_delta);
                let factor = dc * self.product_slope(qh.row(i), kh.row(j));
                add(&mut dqh.view_mut(), i, factor, kh.row(j));
                add(&mut dkh.view_mut(), j, factor, qh.row(i));
                add(&mut dvh.view_mut(), j, count * w, sum_g.view());
                for (&t, &s) in row.pooled.iter().flat_map(|t| keys[j].iter().map(move |s| (t, s))) {
                    to.bias[[t, s]] += dc / (row.pooled.len() * keys[j].len()) as f64;
                }
            }
        }
        spread(&dqh, rows.iter().map(|row| &row.pooled), &mut to.query);
        spread(&dkh, keys.iter(), &mut to.key);
        spread(&dvh, keys.iter(), &mut to.value);
    }
}

impl Saved<'_> {
    /// `<g_t, out_t> - gl_t`, what all of a query's keys share; none if there is no incoming gradient.
    pub(super) fn delta(&self, t: usize) -> Option<f64> {
        let (g, gl) = (self.grad_out.row(t), self.grad_lse.map_or(0.0, |gl| gl[t]));
        (gl != 0.0 || g.iter().any(|&x| x != 0.0)).then(|| dot(g, self.out.row(t)) - gl)
    }
}
