//! One call of the crate, and its comparison with the formulas.

use mra_attention::reference::{Gradients as Expect, Saved as SavedExactly};
use mra_attention::{
    Bias, BiasData, Gradients, Inputs, Level, Mask, Mode, Options, Plan, Problem, Saved, backward, forward, forward_selecting,
    select_blocks,
};
use ndarray::{Array2, Array3, Array4, ArrayView4, Axis};

use super::bounds::largest;
use super::case::poison;
use super::{Bounds, Case, Data, Layout, Number, Pairs, Rounded, Stored, rounds_weights};

/// How a case is computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) level: Level,
    pub(crate) threads: usize,
    pub(crate) layout: Layout,
}

impl Setup {
    pub(crate) fn new(level: Level) -> Self {
        Self { level, threads: 1, layout: Layout::Contiguous }
    }
}

/// Blocks of 4, no masks, full mode, one thread.
pub(crate) fn options() -> Options<'static> {
    let level = *Level::available().last().expect("the portable level is always there");
    Options {
        block_size: 4,
        scale: None,
        mode: Mode::Full,
        key_mask: None,
        query_mask: None,
        bias: None,
        dropout: 0.0,
        seed: 0,
        threads: 1,
        level,
    }
}

/// What the formulas give for a case. Backward starts from `out` and `lse` as the type of the tensor holds them.
pub(crate) struct Expected {
    pub(crate) plan: Array4<bool>,
    pub(crate) out: Array4<f64>,
    pub(crate) lse: Array3<f64>,
    pub(crate) saved_out: Array4<f64>,
    pub(crate) saved_lse: Array3<f64>,
    pub(crate) gradients: Expect,
    pub(crate) bounds: Bounds,
}

impl Expected {
    pub(crate) fn new<E: Number>(case: &Case, data: &Data) -> Self {
        let attention = data.attention(case);
        let plan = attention.select(&case.budget);
        Self::with_plan::<E>(case, data, plan)
    }

    pub(crate) fn with_plan<E: Number>(case: &Case, data: &Data, plan: Array4<bool>) -> Self {
        let attention = data.attention(case);
        let (out, lse) = attention.forward(plan.view());
        let mut saved_out = out.mapv(|x| E::round(x).exact());
        poison(&mut saved_out, data.query_mask.as_ref());
        let mut saved_lse = lse.mapv(|x| E::Compute::round(x).exact()).insert_axis(Axis(3));
        poison(&mut saved_lse, data.query_mask.as_ref());
        let saved_lse = saved_lse.remove_axis(Axis(3));
        let saved = SavedExactly {
            out: saved_out.view(),
            lse: saved_lse.view(),
            grad_out: data.grad_out.view(),
            grad_lse: data.grad_lse.as_ref().map(|array| array.view()),
        };
        let gradients = attention.backward(plan.view(), &saved);
        let bounds = Bounds::new::<E>(case, data, &attention, plan.view(), &saved);
        Self { plan, out, lse, saved_out, saved_lse, gradients, bounds }
    }
}

/// What the crate gives.
pub(crate) struct Outcome<E: Number> {
    pub(crate) out: Array4<E>,
    pub(crate) lse: Array4<E::Compute>,
    pub(crate) query: Array4<E>,
    pub(crate) key: Array4<E>,
    pub(crate) value: Array4<E>,
}

/// A mask as bytes: any but 0 is valid. Laid out with gaps where the tensors are.
struct Bytes {
    bytes: Vec<u8>,
    shape: [usize; 2],
    strides: [usize; 2],
}

impl Bytes {
    fn new(mask: &Array2<bool>, layout: Layout) -> Self {
        let (batch, length) = mask.dim();
        let step = if layout == Layout::Contiguous { 1 } else { 2 };
        let mut bytes = vec![1; batch * length * step];
        for ((b, t), &valid) in mask.indexed_iter() {
            bytes[(b * length + t) * step] = if valid { 1 << (t % 8) } else { 0 };
        }
        Self { bytes, shape: [batch, length], strides: [length * step, step] }
    }

    fn mask(&self, name: &str) -> Mask<'_> {
        Mask::new(name, &self.bytes, self.shape, self.strides).expect("a mask within its bytes")
    }
}

/// A mask as bytes where there are no other biases than 0 and `-inf`, or else as float32.
enum StoredBias {
    Mask(Vec<u8>),
    Additive(Vec<f32>),
}

impl StoredBias {
    fn new(case: &Case, bias: &Array4<f64>) -> Self {
        match case.pairs {
            Pairs::Window | Pairs::Holes => Self::Mask(bias.iter().map(|&x| u8::from(x == 0.0)).collect()),
            #[allow(clippy::cast_possible_truncation, reason = "numbers that float32 holds")]
            _ => Self::Additive(bias.iter().map(|&x| x as f32).collect()),
        }
    }

    fn bias(&self, case: &Case) -> Bias<'_> {
        let shape = [case.batch, case.heads(), case.query_len, case.key_len];
        let strides = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1];
        let data = match self {
            Self::Mask(bytes) => BiasData::Bool(bytes),
            Self::Additive(numbers) => BiasData::F32(numbers),
        };
        Bias::new("bias", data, shape, strides).expect("a bias within its elements")
    }
}

/// Calls `body` with the problem of a case.
fn with_problem<R>(case: &Case, data: &Data, setup: Setup, body: impl FnOnce(&Problem) -> R) -> R {
    let bytes = |mask: &Option<Array2<bool>>| mask.as_ref().map(|mask| Bytes::new(mask, setup.layout));
    let (query_mask, key_mask) = (bytes(&data.query_mask), bytes(&data.key_mask));
    let pairs = data.bias.as_ref().map(|bias| StoredBias::new(case, bias));
    let options = Options {
        block_size: case.block_size,
        scale: case.scale,
        mode: case.mode,
        key_mask: key_mask.as_ref().map(|bytes| bytes.mask("key_mask")),
        query_mask: query_mask.as_ref().map(|bytes| bytes.mask("query_mask")),
        bias: pairs.as_ref().map(|pairs| pairs.bias(case)),
        dropout: 0.0,
        seed: 0,
        threads: setup.threads,
        level: setup.level,
    };
    let query = [case.batch, case.heads(), case.query_len, case.head_dim];
    let key = [case.batch, case.kv_heads, case.key_len, case.head_dim];
    body(&Problem::new(query, key, &options).expect("a valid case"))
}

/// A plan as [`Plan::from_bits`] reads it.
pub(crate) fn plan_bits(plan: ArrayView4<'_, bool>) -> Vec<u8> {
    let row_bytes = Plan::row_bytes(plan.dim().3);
    let pack = |row: &[bool]| row.iter().rev().fold(0, |byte, &bit| byte << 1 | u8::from(bit));
    let rows = plan.rows();
    let bytes: Vec<u8> = rows.into_iter().flat_map(|row| row.to_vec().chunks(8).map(pack).collect::<Vec<_>>()).collect();
    assert_eq!(bytes.len(), plan.dim().0 * plan.dim().1 * plan.dim().2 * row_bytes);
    bytes
}

/// The selection of the crate.
pub(crate) fn select<E: Number>(case: &Case, data: &Data, setup: Setup) -> Array4<bool> {
    let (query, key) = (Stored::<E>::new(data.query.view(), setup.layout), Stored::<E>::new(data.key.view(), setup.layout));
    with_problem(case, data, setup, |problem| {
        let (nq, nk) = (problem.query_blocks(), problem.key_blocks());
        let row_bytes = Plan::row_bytes(nk);
        // Bits that are already there must not stay.
        let mut bits = vec![0xff; case.batch * case.heads() * nq * row_bytes];
        select_blocks(problem, &query.tensor("query"), &key.tensor("key"), &case.budget, &mut bits).expect("a valid case");
        let selected = Array4::from_shape_fn((case.batch, case.heads(), nq, nk), |(b, h, i, j)| {
            bits[((b * case.heads() + h) * nq + i) * row_bytes + j / 8] >> (j % 8) & 1 == 1
        });
        assert_eq!(plan_bits(selected.view()), bits, "bits beyond the last block");
        selected
    })
}

/// Selection and forward of the crate in one call: the bits of the plan, out and lse.
pub(crate) fn select_and_forward<E: Number>(
    case: &Case,
    data: &Data,
    setup: Setup,
) -> (Vec<u8>, Array4<E>, Array4<E::Compute>) {
    let [query, key, value] = [&data.query, &data.key, &data.value].map(|array| Stored::<E>::new(array.view(), setup.layout));
    let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
    let mut out = Stored::<E>::unset(data.grad_out.dim(), setup.layout);
    let mut lse = Stored::<E::Compute>::unset((case.batch, case.heads(), case.query_len, 1), setup.layout);
    let bits = with_problem(case, data, setup, |problem| {
        let mut bits = vec![0xff; Plan::bytes(problem)];
        let (mut out, mut lse) = (out.tensor_mut("out"), lse.tensor_mut("lse"));
        forward_selecting(problem, &inputs, &case.budget, &mut bits, &mut out, &mut lse).expect("a valid case");
        bits
    });
    (bits, out.read(), lse.read())
}

/// Forward and backward of the crate; backward starts from what `expected` says.
pub(crate) fn compute<E: Number>(case: &Case, data: &Data, expected: &Expected, setup: Setup) -> Outcome<E> {
    let store = |array: &Array4<f64>| Stored::<E>::new(array.view(), setup.layout);
    let store_rows = |array: &Array3<f64>| Stored::<E::Compute>::new(array.view().insert_axis(Axis(3)), setup.layout);
    let (query, key, value) = (store(&data.query), store(&data.key), store(&data.value));
    let (saved_out, grad_out) = (store(&expected.saved_out), store(&data.grad_out));
    let (saved_lse, grad_lse) = (store_rows(&expected.saved_lse), data.grad_lse.as_ref().map(store_rows));
    let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
    let saved = Saved {
        grad_out: grad_out.tensor("grad_out"),
        grad_lse: grad_lse.as_ref().map(|grad_lse| grad_lse.tensor("grad_lse")),
        out: saved_out.tensor("out"),
        lse: saved_lse.tensor("lse"),
    };
    // Several elements of an output never share a place.
    let layout = if setup.layout == Layout::Expanded { Layout::TokensFirst } else { setup.layout };
    let mut out = Stored::<E>::unset(data.grad_out.dim(), layout);
    let mut lse = Stored::<E::Compute>::unset((case.batch, case.heads(), case.query_len, 1), layout);
    let mut grad_query = Stored::<E>::unset(data.query.dim(), layout);
    let mut grad_key = Stored::<E>::unset(data.key.dim(), layout);
    let mut grad_value = Stored::<E>::unset(data.value.dim(), layout);
    with_problem(case, data, setup, |problem| {
        let plan = Plan::from_bits(problem, &plan_bits(expected.plan.view())).expect("a plan of the problem");
        forward(problem, &inputs, &plan, &mut out.tensor_mut("out"), &mut lse.tensor_mut("lse")).expect("a valid case");
        let mut gradients = Gradients {
            query: grad_query.tensor_mut("grad_query"),
            key: grad_key.tensor_mut("grad_key"),
            value: grad_value.tensor_mut("grad_value"),
        };
        backward(problem, &inputs, &saved, &plan, &mut gradients).expect("a valid case");
    });
    Outcome { out: out.read(), lse: lse.read(), query: grad_query.read(), key: grad_key.read(), value: grad_value.read() }
}

/// Compares forward and backward of the crate with the formulas.
pub(crate) fn check<E: Number>(case: &Case, data: &Data, expected: &Expected, setup: Setup) {
    let outcome = compute::<E>(case, data, expected, setup);
    let Bounds { mut out, lse, query, key, value } = expected.bounds;
    if rounds_weights::<E>(setup.level) {
        // The weights of a query sum to 1, and each is off by a factor.
        out += E::ROUNDOFF * largest(&data.value);
    }
    let context = |what: &str| format!("{what} of {} at {}, {setup:?}, {case:?}", E::NAME, setup.level.name());
    let expected_lse = expected.lse.view().insert_axis(Axis(3));
    assert_close(&outcome.out, expected.out.view(), out, || context("out"));
    assert_close(&outcome.lse, expected_lse, lse, || context("lse"));
    assert_close(&outcome.query, expected.gradients.query.view(), query, || context("the gradient of query"));
    assert_close(&outcome.key, expected.gradients.key.view(), key, || context("the gradient of key"));
    assert_close(&outcome.value, expected.gradients.value.view(), value, || context("the gradient of value"));
}

/// Every element within `bound` of what is expected, and half a unit in the last place for the rounding to its type.
pub(crate) fn assert_close<E: Rounded>(
    results: &Array4<E>,
    expected: ArrayView4<'_, f64>,
    bound: f64,
    context: impl Fn() -> String,
) {
    assert_eq!(results.dim(), expected.dim(), "{}", context());
    assert!(bound.is_finite(), "{}: no bound", context());
    for ((index, result), &expected) in results.indexed_iter().zip(expected) {
        let error = (result.exact() - expected).abs();
        let bound = bound + E::ROUNDOFF * (expected.abs() + bound) + E::UNDERFLOW;
        // The infinities of an lse are equal, and their difference is NaN.
        assert!(
            result.exact() == expected || error <= bound,
            "{result:?} at {index:?} is off by {error:e} from {expected:e}, more than {bound:e}: {}",
            context()
        );
    }
}
