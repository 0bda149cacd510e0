//! A dense evaluation in float64 of docs/definitions.md, sections 2, 3 and 5, for a given selection: every softmax is a list of
//! terms, and a term is what the mean of some queries and the mean of some keys give. Nothing is shared with the crate, nor with
//! its `reference`, which has neither masks of pairs nor the causal form.

use ndarray::{Array1, Array3, Array4, ArrayView4, s};

use super::Data;

/// One summand of the softmax of a query: `keys.len() exp(scale <mean of queries, mean of keys> + bias)`.
pub(crate) struct Term {
    pub(crate) queries: Vec<usize>,
    pub(crate) keys: Vec<usize>,
    pub(crate) bias: f64,
}

impl Term {
    /// An exact pair.
    pub(crate) fn pair(query: usize, key: usize, bias: f64) -> Self {
        Self { queries: vec![query], keys: vec![key], bias }
    }
}

/// All terms of every query of every head, `[b][h][t]`, and what their numbers are read from.
pub(crate) struct Terms<'a> {
    pub(crate) data: &'a Data,
    pub(crate) scale: f64,
    pub(crate) terms: Array3<Vec<Term>>,
}

/// Gradients of query, key and value, and the largest sum of the weights of a key.
pub(crate) struct TermGradients {
    pub(crate) query: Array4<f64>,
    pub(crate) key: Array4<f64>,
    pub(crate) value: Array4<f64>,
    pub(crate) column: f64,
}

impl Terms<'_> {
    fn kv_head(&self, h: usize) -> usize {
        h / (self.data.query.dim().1 / self.data.key.dim().1)
    }

    fn logit(&self, (b, h): (usize, usize), term: &Term) -> f64 {
        let query = mean(&self.data.query, b, h, &term.queries);
        let key = mean(&self.data.key, b, self.kv_head(h), &term.keys);
        self.scale * query.dot(&key) + term.bias
    }

    pub(crate) fn forward(&self) -> (Array4<f64>, Array3<f64>) {
        let mut out = Array4::zeros(self.data.grad_out.raw_dim());
        let mut lse = Array3::from_elem(self.terms.raw_dim(), f64::NEG_INFINITY);
        for ((b, h, t), terms) in self.terms.indexed_iter().filter(|(_, terms)| !terms.is_empty()) {
            let logits: Vec<f64> = terms.iter().map(|term| self.logit((b, h), term)).collect();
            let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weight = |index: usize| terms[index].keys.len() as f64 * (logits[index] - highest).exp();
            let sum: f64 = (0..terms.len()).map(weight).sum();
            for (index, term) in terms.iter().enumerate() {
                let value = mean(&self.data.value, b, self.kv_head(h), &term.keys);
                out.slice_mut(s![b, h, t, ..]).scaled_add(weight(index) / sum, &value);
            }
            lse[[b, h, t]] = highest + sum.ln();
        }
        (out, lse)
    }

    /// From a stored output and log-sum-exp, as section 2, Backward.
    pub(crate) fn backward(&self, out: ArrayView4<'_, f64>, lse: &Array3<f64>) -> TermGradients {
        let Data { query, key, value, grad_out, grad_lse, .. } = self.data;
        let (mut dq, mut dk, mut dv) =
            (Array4::zeros(query.raw_dim()), Array4::zeros(key.raw_dim()), Array4::zeros(value.raw_dim()));
        let mut column = Array3::<f64>::zeros((key.dim().0, key.dim().1, key.dim().2));
        for ((b, h, t), terms) in self.terms.indexed_iter() {
            let kv = self.kv_head(h);
            let g = grad_out.slice(s![b, h, t, ..]);
            let delta = g.dot(&out.slice(s![b, h, t, ..])) - grad_lse.as_ref().map_or(0.0, |gl| gl[[b, h, t]]);
            for term in terms {
                let weight = term.keys.len() as f64 * (self.logit((b, h), term) - lse[[b, h, t]]).exp();
                let ds = weight * (g.dot(&mean(value, b, kv, &term.keys)) - delta);
                let (of_query, of_key) = (1.0 / term.queries.len() as f64, 1.0 / term.keys.len() as f64);
                let (qh, kh) = (mean(query, b, h, &term.queries), mean(key, b, kv, &term.keys));
                for &u in &term.queries {
                    dq.slice_mut(s![b, h, u, ..]).scaled_add(self.scale * ds * of_query, &kh);
                }
                for &k in &term.keys {
                    dk.slice_mut(s![b, kv, k, ..]).scaled_add(self.scale * ds * of_key, &qh);
                    dv.slice_mut(s![b, kv, k, ..]).scaled_add(weight * of_key, &g);
                    column[[b, kv, k]] += weight * of_key;
                }
            }
        }
        TermGradients { query: dq, key: dk, value: dv, column: column.iter().copied().fold(0.0, f64::max) }
    }
}

fn mean(rows: &Array4<f64>, b: usize, h: usize, tokens: &[usize]) -> Array1<f64> {
    let mut sum = Array1::zeros(rows.dim().3);
    for &t in tokens {
        sum += &rows.slice(s![b, h, t, ..]);
    }
    sum / tokens.len() as f64
}
