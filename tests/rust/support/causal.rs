//! One call of the causal form, and its comparison with the formulas.

use mra_attention::{
    CausalBudget, CausalOptions, CausalProblem, Gradients, Inputs, Mode, PooledInputs, Saved, causal_backward, causal_forward,
    causal_forward_selecting, pool,
};
use ndarray::{Array2, Array3, Array4, Axis, s};

use super::case::poison;
use super::compute::assert_close;
use super::terms::{Term, Terms};
use super::{Bounds, Case, Data, Number, Rounded, Setup, Stored};

/// A case without masks, and where its queries and keys are.
#[derive(Debug, Clone)]
pub(crate) struct CausalCase {
    pub(crate) case: Case,
    pub(crate) blocks: usize,
    pub(crate) local_blocks: usize,
    pub(crate) first_blocks: usize,
    pub(crate) offsets: Vec<i64>,
    /// Keys behind these lengths hold NaN and infinities.
    pub(crate) key_lengths: Option<Vec<usize>>,
}

/// What a query sees: its position, its own block, and the number of keys.
struct Sight {
    position: usize,
    own: usize,
    length: usize,
    block_size: usize,
}

impl Sight {
    fn keys(&self, block: usize) -> std::ops::Range<usize> {
        (block * self.block_size).min(self.length)..((block + 1) * self.block_size).min(self.length)
    }

    /// Blocks of which something is visible.
    fn blocks(&self) -> impl Iterator<Item = usize> {
        0..(self.own + 1).min(self.length.div_ceil(self.block_size))
    }
}

impl CausalCase {
    pub(crate) fn data<E: Rounded>(&self) -> Data {
        let mut data = self.case.data::<E>();
        if let Some(lengths) = &self.key_lengths {
            let valid = Array2::from_shape_fn((self.case.batch, self.case.key_len), |(b, t)| t < lengths[b]);
            poison(&mut data.key, Some(&valid));
            poison(&mut data.value, Some(&valid));
        }
        data
    }

    fn budget(&self) -> CausalBudget {
        CausalBudget { blocks: self.blocks, local_blocks: self.local_blocks, first_blocks: self.first_blocks }
    }

    fn key_blocks(&self) -> usize {
        self.case.key_len.div_ceil(self.case.block_size)
    }

    fn scale(&self) -> f64 {
        self.case.scale.unwrap_or(1.0 / (self.case.head_dim as f64).sqrt())
    }

    fn sight(&self, b: usize, t: usize) -> Option<Sight> {
        let offset = if self.offsets.len() == 1 { self.offsets[0] } else { self.offsets[b] };
        let position = usize::try_from(offset + i64::try_from(t).expect("a short sequence")).ok()?;
        let length = self.key_lengths.as_ref().map_or(self.case.key_len, |lengths| lengths[b]);
        let block_size = self.case.block_size;
        (length > 0).then_some(Sight { position, own: position / block_size, length, block_size })
    }

    /// The blocks that a query takes, by section 3, one token at a time.
    fn select(&self, data: &Data, b: usize, h: usize, t: usize) -> Vec<usize> {
        let Some(sight) = self.sight(b, t) else { return Vec::new() };
        let score = |j: usize| {
            let keys = data.key.slice(s![b, h / self.case.group, sight.keys(j), ..]);
            self.scale() * data.query.slice(s![b, h, t, ..]).dot(&keys.mean_axis(Axis(0)).expect("a key"))
        };
        let forced = |j: usize| j + self.local_blocks > sight.own || j < self.first_blocks;
        let mut chosen: Vec<usize> = sight.blocks().filter(|&j| forced(j)).collect();
        let mut others: Vec<(f64, usize)> = sight.blocks().filter(|&j| !forced(j)).map(|j| (score(j), j)).collect();
        others.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        chosen.extend(others.iter().take(self.blocks.saturating_sub(chosen.len())).map(|&(_, j)| j));
        chosen.sort_unstable();
        chosen
    }

    /// `(B, H, Lq, W)`: the blocks of every query ascending, then -1.
    fn plan(&self, data: &Data) -> Array4<i32> {
        let case = &self.case;
        let width = self.key_blocks().min(self.blocks.max(self.local_blocks + self.first_blocks));
        let mut plan = Array4::from_elem((case.batch, case.heads(), case.query_len, width), -1);
        for ((b, h, t), mut row) in
            ndarray::indices((case.batch, case.heads(), case.query_len)).into_iter().zip(plan.rows_mut())
        {
            for (place, j) in row.iter_mut().zip(self.select(data, b, h, t)) {
                *place = i32::try_from(j).expect("few blocks");
            }
        }
        plan
    }

    fn terms<'a>(&self, data: &'a Data, plan: &Array4<i32>) -> Terms<'a> {
        let case = &self.case;
        let terms = Array3::from_shape_fn((case.batch, case.heads(), case.query_len), |(b, h, t)| {
            let Some(sight) = self.sight(b, t) else { return Vec::new() };
            let exact = |j: usize| plan.slice(s![b, h, t, ..]).iter().any(|&k| usize::try_from(k) == Ok(j));
            let mut terms = Vec::new();
            for j in sight.blocks() {
                if exact(j) {
                    terms.extend(sight.keys(j).filter(|&k| k <= sight.position).map(|k| Term::pair(t, k, 0.0)));
                } else if j < sight.own && case.mode == Mode::Full {
                    terms.push(Term { queries: vec![t], keys: sight.keys(j).collect(), bias: 0.0 });
                }
            }
            terms
        });
        Terms { data, scale: self.scale(), terms }
    }

    fn problem(&self, setup: Setup) -> CausalProblem {
        let case = &self.case;
        let options = CausalOptions {
            block_size: case.block_size,
            scale: case.scale,
            mode: case.mode,
            offsets: &self.offsets,
            key_lengths: self.key_lengths.as_deref(),
            threads: setup.threads,
            level: setup.level,
        };
        let query = [case.batch, case.heads(), case.query_len, case.head_dim];
        CausalProblem::new(query, [case.batch, case.kv_heads, case.key_len, case.head_dim], &options).expect("a valid case")
    }
}

/// Compares the selection of the crate in float64 with the formulas, and forward by it, with the means of blocks made
/// beforehand and without, bit by bit.
pub(crate) fn check_causal_selection(causal: &CausalCase, setup: Setup) {
    let (case, data) = (&causal.case, causal.data::<f64>());
    let expected = causal.plan(&data);
    let store = |array: &Array4<f64>| Stored::<f64>::new(array.view(), setup.layout);
    let (query, key, value) = (store(&data.query), store(&data.key), store(&data.value));
    let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
    let problem = causal.problem(setup);
    let means = |tensor, channels| {
        let mut to = Stored::<f64>::unset((case.batch, case.kv_heads, causal.key_blocks(), channels), setup.layout);
        pool::<f64>(&tensor, &mut to.tensor_mut("out"), case.block_size, setup.threads).expect("a valid case");
        to
    };
    let (pooled_key, pooled_value) = (means(inputs.key, case.head_dim), means(inputs.value, case.value_dim));
    let pooled = PooledInputs { key: pooled_key.tensor("pooled_key"), value: Some(pooled_value.tensor("pooled_value")) };
    let given = [None, Some(&pooled)];
    // The means of a block beside the end of the keys are other ones than those of its keys.
    let results = given[..if causal.key_lengths.is_none() { 2 } else { 1 }].iter().map(|&pooled| {
        let mut plan = vec![i32::MIN; expected.len()];
        let mut out = Stored::<f64>::unset(data.grad_out.dim(), setup.layout);
        let mut lse = Stored::<f64>::unset((case.batch, case.heads(), case.query_len, 1), setup.layout);
        let (to_out, to_lse) = (&mut out.tensor_mut("out"), &mut lse.tensor_mut("lse"));
        causal_forward_selecting(&problem, &inputs, pooled, &causal.budget(), &mut plan, to_out, to_lse).expect("valid");
        let chosen = Array4::from_shape_vec(expected.dim(), plan).expect("the width of the plan");
        assert_eq!(chosen, expected, "at {}, {causal:?}", setup.level.name());
        (out.read(), lse.read())
    });
    let results: Vec<_> = results.collect();
    assert!(results.iter().all(|result| result == &results[0]), "with means at {}, {causal:?}", setup.level.name());
}

/// Compares forward and backward of the crate with the formulas, for the selection of the formulas.
pub(crate) fn check_causal<E: Number>(causal: &CausalCase, setups: impl IntoIterator<Item = Setup>) {
    let (case, data) = (&causal.case, causal.data::<E>());
    let plan = causal.plan(&data);
    let terms = causal.terms(&data, &plan);
    let (expected_out, lse) = terms.forward();
    let expected_lse = lse.view().insert_axis(Axis(3));
    let saved_out = expected_out.mapv(|x| E::round(x).exact());
    let saved_lse = lse.mapv(|x| E::Compute::round(x).exact());
    let expected = terms.backward(saved_out.view(), &saved_lse);
    let bounds = Bounds::with_column::<E>(case, &data, saved_out.view(), expected.column);
    for setup in setups {
        let store = |array: &Array4<f64>| Stored::<E>::new(array.view(), setup.layout);
        let store_rows = |array: &Array3<f64>| Stored::<E::Compute>::new(array.view().insert_axis(Axis(3)), setup.layout);
        let (query, key, value) = (store(&data.query), store(&data.key), store(&data.value));
        let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
        let (stored_out, grad_out) = (store(&saved_out), store(&data.grad_out));
        let (stored_lse, grad_lse) = (store_rows(&saved_lse), data.grad_lse.as_ref().map(store_rows));
        let saved = Saved {
            grad_out: grad_out.tensor("grad_out"),
            grad_lse: grad_lse.as_ref().map(|grad_lse| grad_lse.tensor("grad_lse")),
            out: stored_out.tensor("out"),
            lse: stored_lse.tensor("lse"),
        };
        let mut out = Stored::<E>::unset(data.grad_out.dim(), setup.layout);
        let mut lse = Stored::<E::Compute>::unset((case.batch, case.heads(), case.query_len, 1), setup.layout);
        let mut dq = Stored::<E>::unset(data.query.dim(), setup.layout);
        let mut dk = Stored::<E>::unset(data.key.dim(), setup.layout);
        let mut dv = Stored::<E>::unset(data.value.dim(), setup.layout);
        let (problem, plan) = (causal.problem(setup), plan.as_slice().expect("a new array"));
        causal_forward(&problem, &inputs, None, plan, &mut out.tensor_mut("out"), &mut lse.tensor_mut("lse")).expect("valid");
        let mut gradients = Gradients {
            query: dq.tensor_mut("grad_query"),
            key: dk.tensor_mut("grad_key"),
            value: dv.tensor_mut("grad_value"),
        };
        causal_backward(&problem, &inputs, &saved, plan, &mut gradients).expect("a valid case");
        let context = |what: &str| format!("{what} of {} at {}, {setup:?}, {causal:?}", E::NAME, setup.level.name());
        assert_close(&out.read(), expected_out.view(), bounds.out, || context("out"));
        assert_close(&lse.read(), expected_lse, bounds.lse, || context("lse"));
        assert_close(&dq.read(), expected.query.view(), bounds.query, || context("the gradient of query"));
        assert_close(&dk.read(), expected.key.view(), bounds.key, || context("the gradient of key"));
        assert_close(&dv.read(), expected.value.view(), bounds.value, || context("the gradient of value"));
    }
}
