//! One call of the causal form, and its comparison with the formulas.

use mra_attention::reference::{CausalAttention, Gradients as Expect, Saved as SavedExactly};
use mra_attention::{
    CausalBudget, CausalOptions, CausalProblem, Gradients, Inputs, Mode, Saved, causal_backward, causal_forward,
    causal_forward_selecting,
};
use ndarray::{Array3, Array4, ArrayView4, Axis};
use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::bounds::{Magnitudes, largest};
use super::compute::assert_close;
use super::{Bounds, Layout, Number, Rounded, Setup, Stored};

/// Everything that a call depends on; the numbers come from the seed.
#[derive(Debug, Clone)]
pub(crate) struct CausalCase {
    pub(crate) batch: usize,
    pub(crate) kv_heads: usize,
    /// Query heads per key head.
    pub(crate) group: usize,
    pub(crate) query_len: usize,
    pub(crate) key_len: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) block_size: usize,
    pub(crate) mode: Mode,
    /// For each batch item.
    pub(crate) offsets: Vec<i64>,
    pub(crate) key_lengths: Vec<usize>,
    pub(crate) budget: CausalBudget,
    pub(crate) scale: Option<f64>,
    pub(crate) dropout: f64,
    pub(crate) grad_lse: bool,
    pub(crate) seed: u64,
}

impl CausalCase {
    /// One batch item with one head of `length` tokens, queries and keys alike.
    pub(crate) fn square(length: usize, block_size: usize, blocks: usize) -> Self {
        Self {
            batch: 1,
            kv_heads: 1,
            group: 1,
            query_len: length,
            key_len: length,
            head_dim: 8,
            value_dim: 8,
            block_size,
            mode: Mode::Full,
            offsets: vec![0],
            key_lengths: vec![length],
            budget: CausalBudget { blocks, local_blocks: 1, first_blocks: 0 },
            scale: None,
            dropout: 0.0,
            grad_lse: true,
            seed: 0,
        }
    }

    pub(crate) fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// The numbers, each one exact in the type it is stored in, and NaN behind the last key.
    pub(crate) fn data<E: Rounded>(&self) -> CausalData {
        let mut seed = [7; 32];
        seed[..8].copy_from_slice(&self.seed.to_le_bytes());
        let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let mut numbers = |heads, length, channels| {
            let shape = (self.batch, heads, length, channels);
            Array4::from_shape_simple_fn(shape, || E::round(rng.random_range(-1.7..1.7)).exact())
        };
        let query = numbers(self.heads(), self.query_len, self.head_dim);
        let mut key = numbers(self.kv_heads, self.key_len, self.head_dim);
        let mut value = numbers(self.kv_heads, self.key_len, self.value_dim);
        let grad_out = numbers(self.heads(), self.query_len, self.value_dim);
        let grad_lse = self.grad_lse.then(|| numbers(self.heads(), self.query_len, 1).remove_axis(Axis(3)));
        for (b, &length) in self.key_lengths.iter().enumerate() {
            for array in [&mut key, &mut value] {
                array.slice_mut(ndarray::s![b, .., length.., ..]).fill(f64::NAN);
            }
        }
        CausalData { query, key, value, grad_out, grad_lse }
    }

    fn problem(&self, setup: Setup) -> CausalProblem {
        let options = CausalOptions {
            block_size: self.block_size,
            scale: self.scale,
            mode: self.mode,
            offsets: &self.offsets,
            key_lengths: Some(&self.key_lengths),
            dropout: self.dropout,
            seed: self.seed,
            threads: setup.threads,
            level: setup.level,
        };
        let query = [self.batch, self.heads(), self.query_len, self.head_dim];
        CausalProblem::new(query, [self.batch, self.kv_heads, self.key_len, self.head_dim], &options).expect("a valid case")
    }
}

/// The numbers of a case.
#[derive(Clone)]
pub(crate) struct CausalData {
    pub(crate) query: Array4<f64>,
    pub(crate) key: Array4<f64>,
    pub(crate) value: Array4<f64>,
    pub(crate) grad_out: Array4<f64>,
    pub(crate) grad_lse: Option<Array3<f64>>,
}

impl CausalData {
    fn attention<'a>(&'a self, case: &'a CausalCase) -> CausalAttention<'a> {
        CausalAttention {
            query: self.query.view(),
            key: self.key.view(),
            value: self.value.view(),
            offsets: &case.offsets,
            key_lengths: &case.key_lengths,
            block_size: case.block_size,
            scale: case.scale,
            mode: case.mode,
        }
    }
}

/// What the formulas give. Backward starts from `out` and `lse` as the type of the tensor holds them.
pub(crate) struct CausalExpected {
    plan: Vec<i32>,
    out: Array4<f64>,
    lse: Array3<f64>,
    saved_out: Array4<f64>,
    saved_lse: Array3<f64>,
    gradients: Expect,
    bounds: Bounds,
}

impl CausalExpected {
    pub(crate) fn new<E: Number>(case: &CausalCase, data: &CausalData) -> Self {
        let attention = data.attention(case);
        let selected = attention.select(&case.budget);
        let (out, lse) = attention.forward(selected.view());
        let saved_out = out.mapv(|x| E::round(x).exact());
        let saved_lse = lse.mapv(|x| E::Compute::round(x).exact());
        let saved = SavedExactly {
            out: saved_out.view(),
            lse: saved_lse.view(),
            grad_out: data.grad_out.view(),
            grad_lse: data.grad_lse.as_ref().map(|array| array.view()),
        };
        let gradients = attention.backward(selected.view(), &saved);
        let steps = 2.0 * (selected.dim().3 as f64 + 2.0);
        let bounds = Bounds::of::<E>(&Magnitudes {
            head_dim: case.head_dim,
            value_dim: case.value_dim,
            block_size: case.block_size,
            keys: case.key_len,
            queries: case.query_len * case.group,
            scale: case.scale.unwrap_or(1.0 / (case.head_dim as f64).sqrt()),
            bias: 0.0,
            steps,
            query: &data.query,
            key: &data.key,
            value: &data.value,
            grad_out: &data.grad_out,
            grad_lse: data.grad_lse.as_ref(),
            out: saved.out,
            column: largest_column(case, &attention, selected.view(), &saved),
        });
        let plan = numbers(selected.view(), case.problem(Setup::new(super::levels()[0])).plan_width(&case.budget));
        Self { plan, out, lse, saved_out, saved_lse, gradients, bounds }
    }
}

/// The largest sum of the weights of a key: the gradient of a value whose outputs' are 1.
fn largest_column(
    case: &CausalCase,
    attention: &CausalAttention<'_>,
    selected: ArrayView4<'_, bool>,
    saved: &SavedExactly<'_>,
) -> f64 {
    let rows = (case.batch, case.heads(), case.query_len, 1);
    let (ones, zeros) = (Array4::ones(rows), Array4::zeros(rows));
    let value = Array4::zeros((case.batch, case.kv_heads, case.key_len, 1));
    let attention = CausalAttention { value: value.view(), ..*attention };
    let saved = SavedExactly { out: zeros.view(), grad_out: ones.view(), grad_lse: None, ..*saved };
    largest(&attention.backward(selected, &saved).value)
}

/// A selection as the crate takes it.
fn numbers(selected: ArrayView4<'_, bool>, width: usize) -> Vec<i32> {
    let mut plan = Vec::new();
    for row in selected.rows() {
        let start = plan.len();
        plan.extend(row.iter().enumerate().filter(|(_, exact)| **exact).map(|(j, _)| i32::try_from(j).expect("a few blocks")));
        assert!(plan.len() - start <= width, "room for the blocks of a token");
        plan.resize(start + width, -1);
    }
    plan
}

/// What the crate gives.
pub(crate) struct CausalOutcome<E: Number> {
    pub(crate) out: Array4<E>,
    pub(crate) lse: Array4<E::Compute>,
    pub(crate) plan: Vec<i32>,
    pub(crate) query: Array4<E>,
    pub(crate) key: Array4<E>,
    pub(crate) value: Array4<E>,
}

/// Out, lse and the plan that the crate chooses.
pub(crate) fn select_causal<E: Number>(
    case: &CausalCase,
    data: &CausalData,
    setup: Setup,
) -> (Array4<E>, Array4<E::Compute>, Vec<i32>) {
    let problem = case.problem(setup);
    let store = |array: &Array4<f64>| Stored::<E>::new(array.view(), setup.layout);
    let (query, key, value) = (store(&data.query), store(&data.key), store(&data.value));
    let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
    let (mut out, mut lse) = outputs::<E>(case, setup.layout);
    let mut plan = vec![i32::MIN; case.batch * case.heads() * case.query_len * problem.plan_width(&case.budget)];
    let (mut to_out, mut to_lse) = (out.tensor_mut("out"), lse.tensor_mut("lse"));
    causal_forward_selecting(&problem, &inputs, None, &case.budget, &mut plan, &mut to_out, &mut to_lse).expect("a valid case");
    (out.read(), lse.read(), plan)
}

fn outputs<E: Number>(case: &CausalCase, layout: Layout) -> (Stored<E>, Stored<E::Compute>) {
    let shape = |channels| (case.batch, case.heads(), case.query_len, channels);
    (Stored::unset(shape(case.value_dim), layout), Stored::unset(shape(1), layout))
}

/// Forward and backward with a given plan, and what is saved for backward.
pub(crate) fn compute_causal<E: Number>(
    case: &CausalCase,
    data: &CausalData,
    plan: &[i32],
    saved_out: &Array4<f64>,
    saved_lse: &Array3<f64>,
    setup: Setup,
) -> CausalOutcome<E> {
    let problem = case.problem(setup);
    let store = |array: &Array4<f64>| Stored::<E>::new(array.view(), setup.layout);
    let store_rows = |array: &Array3<f64>| Stored::<E::Compute>::new(array.view().insert_axis(Axis(3)), setup.layout);
    let (query, key, value) = (store(&data.query), store(&data.key), store(&data.value));
    let (saved_out, grad_out) = (store(saved_out), store(&data.grad_out));
    let (saved_lse, grad_lse) = (store_rows(saved_lse), data.grad_lse.as_ref().map(store_rows));
    let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
    let saved = Saved {
        grad_out: grad_out.tensor("grad_out"),
        grad_lse: grad_lse.as_ref().map(|grad_lse| grad_lse.tensor("grad_lse")),
        out: saved_out.tensor("out"),
        lse: saved_lse.tensor("lse"),
    };
    let (mut out, mut lse) = outputs::<E>(case, setup.layout);
    causal_forward(&problem, &inputs, None, plan, &mut out.tensor_mut("out"), &mut lse.tensor_mut("lse"))
        .expect("a valid case");
    let unset = |array: &Array4<f64>| Stored::<E>::unset(array.dim(), setup.layout);
    let (mut dq, mut dk, mut dv) = (unset(&data.query), unset(&data.key), unset(&data.value));
    let mut gradients =
        Gradients { query: dq.tensor_mut("grad_query"), key: dk.tensor_mut("grad_key"), value: dv.tensor_mut("grad_value") };
    causal_backward(&problem, &inputs, &saved, plan, &mut gradients).expect("a valid case");
    CausalOutcome { out: out.read(), lse: lse.read(), plan: plan.to_vec(), query: dq.read(), key: dk.read(), value: dv.read() }
}

/// Compares the crate with the formulas.
pub(crate) fn check_causal<E: Number>(case: &CausalCase, data: &CausalData, expected: &CausalExpected, setup: Setup) {
    let CausalExpected { plan, saved_out, saved_lse, .. } = expected;
    let outcome = compute_causal::<E>(case, data, plan, saved_out, saved_lse, setup);
    let Bounds { out, lse, query, key, value } = expected.bounds;
    let context = |what: &str| format!("{what} of {} at {}, {setup:?}, {case:?}", E::NAME, setup.level.name());
    assert_close(&outcome.out, expected.out.view(), out, || context("out"));
    assert_close(&outcome.lse, expected.lse.view().insert_axis(Axis(3)), lse, || context("lse"));
    assert_close(&outcome.query, expected.gradients.query.view(), query, || context("the gradient of query"));
    assert_close(&outcome.key, expected.gradients.key.view(), key, || context("the gradient of key"));
    assert_close(&outcome.value, expected.gradients.value.view(), value, || context("the gradient of value"));
    if E::ROUNDOFF < f32::ROUNDOFF {
        // In float64 no two scores are so close that rounding decides.
        let (chosen_out, chosen_lse, chosen) = select_causal::<E>(case, data, setup);
        assert_eq!(&chosen, plan, "{}", context("the plan"));
        assert_eq!(bits(&chosen_out), bits(&outcome.out), "{}", context("out of the chosen plan"));
        assert_eq!(bits(&chosen_lse), bits(&outcome.lse), "{}", context("lse of the chosen plan"));
    }
}

/// For comparison to the bit.
pub(crate) fn bits<'a, E: Rounded + 'a>(numbers: impl IntoIterator<Item = &'a E>) -> Vec<u64> {
    numbers.into_iter().map(|x| x.exact().to_bits()).collect()
}
