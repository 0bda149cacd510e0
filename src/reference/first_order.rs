//! Coarse blocks to first order: section 3.8 of the definitions.

use ndarray::{Array1, Array2};

use super::Form;
use super::head::{Head, HeadGradients, Saved, add, dot, spread};
use crate::Coarse;

/// What a block of keys is to a row.
pub(super) struct Summary {
    /// `a`, of each of the block's keys.
    weights: Vec<f64>,
    key: Array1<f64>,
    pub(super) value: Array1<f64>,
    /// The entropy of the weights, the mean bias and the shift of coarse blocks.
    offset: f64,
}

impl Head<'_> {
    /// Whether coarse blocks are expanded around the mean query.
    pub(super) fn expands(&self) -> bool {
        self.coarse == Coarse::FirstOrder && self.segment.form == Form::Block
    }

    /// The summary of every block for every row; of no block without keys.
    pub(super) fn summaries(&self) -> Array2<Option<Summary>> {
        let (rows, keys, qh) = (&self.segment.rows, &self.segment.keys, self.query_means());
        Array2::from_shape_fn((rows.len(), keys.len()), |(row, j)| {
            let logits: Vec<f64> = keys[j].iter().map(|&s| self.scale * dot(qh.row(row), self.key.row(s))).collect();
            let highest = logits.iter().copied().reduce(f64::max)?;
            let sum: f64 = logits.iter().map(|x| (x - highest).exp()).sum();
            let weights: Vec<f64> = logits.iter().map(|x| (x - highest).exp() / sum).collect();
            let entropy = -logits.iter().zip(&weights).map(|(x, a)| a * (x - highest - sum.ln())).sum::<f64>();
            let (mut key, mut value) = (Array1::zeros(self.key.ncols()), Array1::zeros(self.value.ncols()));
            for (&s, &a) in keys[j].iter().zip(&weights) {
                key.scaled_add(a, &self.key.row(s));
                value.scaled_add(a, &self.value.row(s));
            }
            Some(Summary { weights, key, value, offset: entropy + self.mean_bias(row, j) + self.coarse_shift })
        })
    }

    /// The logit of a block for a query.
    pub(super) fn logit_of(&self, summary: &Summary, t: usize) -> f64 {
        self.scale * dot(self.query.row(t), summary.key.view()) + summary.offset
    }

    /// Adds the gradients of the coarse blocks.
    pub(super) fn first_order_backward(&self, coarse: &Array2<bool>, saved: &Saved<'_>, to: &mut HeadGradients<'_>) {
        let (rows, qh, summaries) = (&self.segment.rows, self.query_means(), self.summaries());
        let mut dqh = Array2::zeros(qh.raw_dim());
        for ((row, j), summary) in summaries.indexed_iter().filter(|&(at, _)| coarse[at]) {
            let (Some(summary), keys) = (summary, &self.segment.keys[j]) else { continue };
            let mut dx = vec![0.0; keys.len()];
            for &t in &rows[row].queries {
                let Some(delta) = saved.delta(t) else { continue };
                let (q, g) = (self.query.row(t), saved.grad_out.row(t));
                let p = (self.logit_of(summary, t) - saved.lse[t]).exp();
                let dl = p * (dot(g, summary.value.view()) - delta);
                add(&mut to.query, t, self.scale * dl, summary.key.view());
                let turn = &q - &qh.row(row);
                for ((&s, &a), dx) in keys.iter().zip(&summary.weights).zip(&mut dx) {
                    let (k, v) = (self.key.row(s), self.value.row(s));
                    add(&mut to.key, s, self.scale * dl * a, q);
                    add(&mut to.value, s, p * a, g);
                    let by_value = p * (dot(g, v) - dot(g, summary.value.view()));
                    let by_key = self.scale * dl * (dot(turn.view(), k) - dot(turn.view(), summary.key.view()));
                    *dx += a * (by_value + by_key);
                }
            }
            for (&s, dx) in keys.iter().zip(dx) {
                add(&mut to.key, s, self.scale * dx, qh.row(row));
                add(&mut dqh.view_mut(), row, self.scale * dx, self.key.row(s));
            }
        }
        spread(&dqh, rows.iter().map(|row| &row.pooled), &mut to.query);
    }
}
