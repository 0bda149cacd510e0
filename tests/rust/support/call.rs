//! Calls of the crate.

use mra_attention::{
    Bias, BiasData, BiasGradient, Gradients, Inputs, Layout as Geometry, Level, Mask, Options, Problem, Saved, Selection,
    backward, forward,
};
use ndarray::{Array2, Array3, Array4, Axis};

use super::case::HUGE;
use super::{Case, Data, Layout, Number, Stored};

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

/// Blocks of 4, and the defaults, at the best level of this CPU.
pub(crate) fn options() -> Options<'static> {
    let level = *Level::available().last().expect("the portable level is always there");
    Options { block_size: 4, ..Options::new(level) }
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
    fn new(bias: &Array4<f64>) -> Self {
        if bias.iter().all(|&x| x == 0.0 || x == f64::NEG_INFINITY) {
            Self::Mask(bias.iter().map(|&x| u8::from(x == 0.0)).collect())
        } else {
            #[allow(clippy::cast_possible_truncation, reason = "numbers that float32 holds")]
            Self::Additive(bias.iter().map(|&x| x as f32).collect())
        }
    }

    /// Read again and again along dimensions in which it is additive and does not change.
    fn bias(&self, array: &Array4<f64>) -> Bias<'_> {
        let (batch, heads, queries, keys) = array.dim();
        let data = match self {
            Self::Mask(bytes) => BiasData::Bool(bytes),
            Self::Additive(numbers) => BiasData::F32(numbers),
        };
        let mut strides = [heads * queries * keys, queries * keys, keys, 1];
        for (dim, stride) in strides.iter_mut().enumerate().filter(|_| matches!(self, Self::Additive(_))) {
            let mut slices = array.axis_iter(Axis(dim));
            let first = slices.next();
            if slices.all(|slice| Some(slice) == first) {
                *stride = 0;
            }
        }
        Bias::new("bias", data, [batch, heads, queries, keys], strides).expect("a bias within its elements")
    }
}

/// Calls `body` with the problem of a case.
pub(crate) fn with_problem<R>(case: &Case, data: &Data, setup: Setup, body: impl FnOnce(&Problem) -> R) -> R {
    with_options(case, data, setup, |options| {
        body(&Problem::new(case.query_shape(), case.key_shape(), &options).expect("a valid case"))
    })
}

/// Calls `body` with the options of a case.
pub(crate) fn with_options<R>(case: &Case, data: &Data, setup: Setup, body: impl FnOnce(Options<'_>) -> R) -> R {
    let bytes = |mask: &Option<Array2<bool>>| mask.as_ref().map(|mask| Bytes::new(mask, setup.layout));
    let (query_mask, key_mask) = (bytes(&data.query_mask), bytes(&data.key_mask));
    let bias = data.bias.as_ref().map(StoredBias::new);
    let options = Options {
        block_size: case.block_size,
        coarser: case.coarser.clone(),
        scale: case.scale,
        mode: case.mode,
        coarse: case.coarse_term(),
        coarse_shift: case.coarse_shift,
        score: case.score,
        pool_queries: case.pool_queries,
        window: case.window,
        layout: Geometry::Dense { offsets: &case.offsets, key_lengths: case.key_lengths.as_deref() },
        key_mask: key_mask.as_ref().map(|bytes| bytes.mask("key_mask")),
        query_mask: query_mask.as_ref().map(|bytes| bytes.mask("query_mask")),
        softcap: case.softcap,
        alibi_slopes: data.alibi_slopes.as_deref(),
        sinks: data.sinks.as_deref(),
        bias: bias.as_ref().zip(data.bias.as_ref()).map(|(bias, array)| bias.bias(array)),
        budget: case.budget.clone(),
        dropout: case.dropout,
        seed: case.seed,
        threads: setup.threads,
        ..Options::new(setup.level)
    };
    body(options)
}

/// A selection as the crate takes it.
pub(crate) fn plan_of(problem: &Problem, selected: &[Array3<bool>]) -> Vec<u8> {
    let plan = problem.plan_from(|b, h, row, j| selected[b].get((h, row, j)).copied().unwrap_or(false));
    assert_eq!(plan.len(), problem.plan_bytes(), "a plan has the size that follows from shapes and settings");
    plan
}

/// The blocks that a plan makes exact.
pub(crate) fn exact_of(problem: &Problem, plan: &[u8]) -> Vec<Array3<bool>> {
    problem.is_exact(plan).expect("a plan of the problem")
}

/// Room for a plan, which holds something else.
fn unwritten_plan(problem: &Problem) -> Vec<u8> {
    vec![0xff; problem.plan_bytes()]
}

/// The plan that the crate chooses.
pub(crate) fn select<E: Number>(case: &Case, data: &Data, setup: Setup) -> Vec<u8> {
    let (query, key) = (Stored::<E>::new(data.query.view(), setup.layout), Stored::<E>::new(data.key.view(), setup.layout));
    with_problem(case, data, setup, |problem| {
        let mut plan = unwritten_plan(problem);
        mra_attention::select(problem, &query.tensor("query"), &key.tensor("key"), &mut plan).expect("a valid case");
        plan
    })
}

/// The layout of outputs, of which several elements never share a place.
fn of_outputs(layout: Layout) -> Layout {
    if layout == Layout::Expanded { Layout::TokensFirst } else { layout }
}

/// Out and lse, for a plan or for the one that the crate then chooses, and the plan.
pub(crate) fn attend<E: Number>(
    problem: &Problem,
    data: &Data,
    plan: Option<&[u8]>,
    layout: Layout,
) -> (Array4<E>, Array4<E::Compute>, Vec<u8>) {
    let [query, key, value] = [&data.query, &data.key, &data.value].map(|array| Stored::<E>::new(array.view(), layout));
    let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
    let (batch, heads, length, _) = data.grad_out.dim();
    let mut out = Stored::<E>::unset(data.grad_out.dim(), of_outputs(layout));
    let mut lse = Stored::<E::Compute>::unset((batch, heads, length, 1), of_outputs(layout));
    let mut chosen = plan.map_or_else(|| unwritten_plan(problem), <[u8]>::to_vec);
    let selection = plan.map_or(Selection::Chosen(&mut chosen), Selection::Given);
    forward(problem, &inputs, None, selection, &mut out.tensor_mut("out"), &mut lse.tensor_mut("lse")).expect("a valid case");
    (out.read(), lse.read(), chosen)
}

/// The gradients of query, key and value, from a plan, an output and an lse.
pub(crate) fn differentiate<E: Number>(
    problem: &Problem,
    data: &Data,
    plan: &[u8],
    saved: (&Array4<f64>, &Array3<f64>),
    layout: Layout,
) -> [Array4<E>; 3] {
    differentiate_bias::<E>(problem, data, plan, saved, layout, None)
}

/// As [`differentiate`], with the gradient of the bias.
pub(crate) fn differentiate_bias<E: Number>(
    problem: &Problem,
    data: &Data,
    plan: &[u8],
    (out, lse): (&Array4<f64>, &Array3<f64>),
    layout: Layout,
    bias: Option<BiasGradient<'_>>,
) -> [Array4<E>; 3] {
    let store = |array: &Array4<f64>| Stored::<E>::new(array.view(), layout);
    let store_rows = |array: &Array3<f64>| Stored::<E::Compute>::new(array.view().insert_axis(Axis(3)), layout);
    let (query, key, value) = (store(&data.query), store(&data.key), store(&data.value));
    let (saved_out, grad_out) = (store(out), store(&data.grad_out));
    let (saved_lse, grad_lse) = (store_rows(lse), data.grad_lse.as_ref().map(store_rows));
    let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
    let saved = Saved {
        grad_out: grad_out.tensor("grad_out"),
        grad_lse: grad_lse.as_ref().map(|grad_lse| grad_lse.tensor("grad_lse")),
        out: saved_out.tensor("out"),
        lse: saved_lse.tensor("lse"),
    };
    let mut grads = [&data.query, &data.key, &data.value].map(|array| Stored::<E>::unset(array.dim(), of_outputs(layout)));
    let [grad_query, grad_key, grad_value] = &mut grads;
    let mut gradients = Gradients {
        query: grad_query.tensor_mut("grad_query"),
        key: grad_key.tensor_mut("grad_key"),
        value: grad_value.tensor_mut("grad_value"),
        sinks: None,
        bias,
    };
    backward(problem, &inputs, &saved, plan, &mut gradients).expect("a valid case");
    grads.map(|grad| grad.read())
}

impl Data {
    /// The largest bias that counts: numbers that hide are far from every logit.
    pub(crate) fn largest_bias(&self) -> f64 {
        let counts = |x: &&f64| x.is_finite() && **x > HUGE / 2.0;
        self.bias.iter().flatten().filter(counts).fold(0.0, |most, x| x.abs().max(most))
    }
}
