//! The gradient of an additive bias, against the formulas summed over the pairs that share a number of it.

use half::{bf16, f16};
use mra_attention::{Bias, BiasData, BiasGradient, Level, Mode, Options, Problem, Window};
use ndarray::{Array4, Axis};

use crate::support::{
    CAUSAL, Case, Data, Expected, Layout, Number, Padding, Pairs, Rounded, Setup, Stored, assert_close, attend, bits, budget,
    differentiate_bias, flushed, levels_for, plan_of, rounds_weights, with_problem,
};

/// Along which of batch, head, query and key a bias is repeated.
type Repeated = [bool; 4];

const NOWHERE: Repeated = [false; 4];

/// Every way to repeat a bias.
fn ways() -> impl Iterator<Item = Repeated> {
    (0..16).map(|way| std::array::from_fn(|dim| way >> dim & 1 == 1))
}

/// A case with its bias repeated.
fn data_of<E: Number>(case: &Case, repeated: Repeated) -> Data {
    let mut data = case.data::<E>();
    let bias = data.bias.as_mut().expect("a case with a bias");
    for dim in (0..4).filter(|&dim| repeated[dim]) {
        let first = bias.index_axis(Axis(dim), 0).to_owned();
        bias.axis_iter_mut(Axis(dim)).for_each(|mut slice| slice.assign(&first));
    }
    data
}

/// The gradient of a bias that is repeated: the sum over all places of each number.
fn summed(gradient: &Array4<f64>, repeated: Repeated) -> Array4<f64> {
    (0..4).filter(|&dim| repeated[dim]).fold(gradient.clone(), |sum, dim| sum.sum_axis(Axis(dim)).insert_axis(Axis(dim)))
}

/// The gradient of the bias in float64, for the plan of `expected`, which says what backward starts from.
fn compute<E: Number>(case: &Case, data: &Data, expected: &Expected, setup: Setup, repeated: Repeated) -> Array4<f64> {
    let shape = summed(&expected.gradients.bias, repeated).dim();
    let mut stored = Stored::<f64>::unset(shape, setup.layout);
    with_problem(case, data, setup, |problem| {
        let plan = plan_of(problem, &expected.selected);
        let saved = (&expected.saved_out, &expected.saved_lse);
        let to = BiasGradient::F64(stored.tensor_mut("grad_bias"));
        differentiate_bias::<E>(problem, data, &plan, saved, setup.layout, Some(to));
    });
    stored.read()
}

fn check<E: Number>(case: &Case, repeated: Repeated) {
    let data = data_of::<E>(case, repeated);
    let expected = Expected::new::<E>(case, &data);
    let wanted = summed(&expected.gradients.bias, repeated);
    let pairs = expected.gradients.bias.len() / wanted.len().max(1);
    for (level, layout) in levels_for::<E>().into_iter().zip([Layout::Contiguous, Layout::TokensFirst].into_iter().cycle()) {
        let setup = Setup { layout, ..Setup::new(level) };
        let actual = compute::<E>(case, &data, &expected, setup, repeated);
        let flushed = if rounds_weights::<E>(level) { flushed(case, &data) } else { 0.0 };
        let bound = (expected.bounds.pair + flushed) * pairs as f64;
        assert_close(&actual, wanted.view(), bound, || {
            format!("the gradient of a bias repeated {repeated:?}, {} at {}, {case:?}", E::NAME, level.name())
        });
    }
}

/// Two batch items, two heads that share keys; more queries than a task has.
fn biased(pairs: Pairs, mode: Mode) -> Case {
    Case {
        batch: 2,
        group: 2,
        query_len: 75,
        key_len: 70,
        head_dim: 5,
        value_dim: 3,
        block_size: 8,
        mode,
        pairs,
        budget: budget(2.0),
        ..Case::default()
    }
}

#[test]
fn block_form_repeated_in_every_way() {
    for repeated in ways() {
        check::<f64>(&biased(Pairs::Biased, Mode::Full), repeated);
    }
    check::<f64>(&biased(Pairs::Biased, Mode::Sparse), NOWHERE);
    check::<f32>(&biased(Pairs::Biased, Mode::Full), [true, false, false, false]);
    check::<bf16>(&biased(Pairs::Biased, Mode::Full), [true, false, false, false]);
    check::<f16>(&biased(Pairs::Biased, Mode::Sparse), [false, true, true, false]);
}

#[test]
fn token_form_repeated_in_every_way() {
    let causal = |mode| Case { window: CAUSAL, offsets: vec![3, -2], ..biased(Pairs::Biased, mode) };
    for repeated in ways() {
        check::<f64>(&causal(Mode::Full), repeated);
    }
    check::<f64>(&causal(Mode::Sparse), NOWHERE);
    check::<f32>(&causal(Mode::Full), [true, false, false, false]);
    check::<bf16>(&causal(Mode::Full), [true, false, false, false]);
    check::<f64>(&Case { window: Window { left: Some(9), right: Some(4) }, ..biased(Pairs::Biased, Mode::Full) }, NOWHERE);
    check::<f64>(&Case { pool_queries: false, ..biased(Pairs::Biased, Mode::Full) }, [true; 4]);
}

/// Padded tokens hold NaN and infinities; hidden pairs have a gradient of 0.
#[test]
fn padding_and_hidden_pairs() {
    for (query_padding, key_padding) in [
        (Padding::None, Padding::Left),
        (Padding::None, Padding::Right),
        (Padding::Holes, Padding::Holes),
        (Padding::Blocks, Padding::Blocks),
        (Padding::All, Padding::None),
        (Padding::None, Padding::All),
    ] {
        for (pairs, window) in
            [(Pairs::Biased, Window::default()), (Pairs::Biased, CAUSAL), (Pairs::Documents, Window::default())]
        {
            let square = Case { query_len: 70, query_padding, key_padding, window, ..biased(pairs, Mode::Full) };
            for repeated in [NOWHERE, [true, false, false, false], [true, true, false, false]] {
                check::<f64>(&square, repeated);
            }
        }
    }
    check::<f64>(&biased(Pairs::Huge, Mode::Full), NOWHERE);
}

#[test]
fn few_tokens() {
    for (batch, query_len, key_len) in [(2, 1, 9), (1, 9, 1), (1, 1, 1)] {
        for window in [Window::default(), CAUSAL] {
            check::<f64>(&Case { batch, query_len, key_len, window, ..biased(Pairs::Biased, Mode::Full) }, NOWHERE);
        }
    }
}

/// One batch item in the block form, the other one in the token form, with one bias.
#[test]
fn both_forms_add_to_one_bias() {
    let case = Case { query_len: 70, key_padding: Padding::Right, ..biased(Pairs::Biased, Mode::Full) };
    let mut data = data_of::<f64>(&case, [true, false, false, false]);
    // Far below all others, on keys that are padding in the second item alone.
    let bias = data.bias.as_mut().expect("a bias");
    let mask = data.key_mask.as_ref().expect("a mask of keys");
    let place = (0..70).find(|&s| mask[[0, s]] && !mask[[1, s]]).expect("items of different lengths");
    bias.outer_iter_mut().for_each(|mut item| item[[0, 3, place]] = -1e9);
    let forms = data.attention(&case).forms();
    assert!(forms[0] != forms[1]);
    let expected = Expected::new::<f64>(&case, &data);
    for level in levels_for::<f64>() {
        let repeated = [true, false, false, false];
        let actual = compute::<f64>(&case, &data, &expected, Setup::new(level), repeated);
        assert_close(&actual, summed(&expected.gradients.bias, repeated).view(), 1e-10, || level.name().to_owned());
    }
}

#[test]
fn threads_give_the_same_bits() {
    for window in [Window::default(), CAUSAL] {
        let case = Case { query_len: 300, key_len: 290, window, ..biased(Pairs::Biased, Mode::Full) };
        for repeated in [NOWHERE, [true, true, false, false], [true, true, true, false], [true, false, true, true]] {
            let data = data_of::<f32>(&case, repeated);
            let expected = Expected::new::<f32>(&case, &data);
            let run = |threads| {
                let setup = Setup { threads, ..Setup::new(*levels_for::<f32>().last().expect("a level")) };
                bits(&compute::<f32>(&case, &data, &expected, setup, repeated))
            };
            let alone = run(1);
            assert!([2, 3, 8].into_iter().all(|threads| run(threads) == alone), "{repeated:?}, {window:?}");
        }
    }
}

/// What is dropped of `<g, v>` is dropped of the gradient: the sum over the keys of a query, each weight kept or not, is that of delta.
#[test]
fn dropout_differentiates_what_forward_computed() {
    const STEP: f64 = 1e-5;
    for window in [Window::default(), CAUSAL] {
        let case =
            Case { dropout: 0.4, window, grad_lse: false, query_len: 17, key_len: 17, ..biased(Pairs::Biased, Mode::Full) };
        let mut data = case.data::<f64>();
        // Powers of two: the bias is stored in float32.
        let step = STEP.log2().round().exp2();
        let setup = Setup::new(*levels_for::<f64>().last().expect("a level"));
        let plan = plan_of_case(&case, &data, setup);
        let objective = |data: &Data| {
            let (out, _, _) =
                with_problem(&case, data, setup, |problem| attend::<f64>(problem, data, Some(&plan), setup.layout));
            (&out * &data.grad_out).sum()
        };
        let mut stored = Stored::<f64>::unset((2, 2, 17, 17), setup.layout);
        with_problem(&case, &data, setup, |problem| {
            let (out, lse, _) = attend::<f64>(problem, &data, Some(&plan), setup.layout);
            let to = BiasGradient::F64(stored.tensor_mut("grad_bias"));
            differentiate_bias::<f64>(problem, &data, &plan, (&out, &lse.remove_axis(Axis(3))), setup.layout, Some(to));
        });
        for (at, &derivative) in stored.read().indexed_iter().step_by(7) {
            let mut changed = |by: f64| {
                data.bias.as_mut().expect("a bias")[at] += by;
                let value = objective(&data);
                data.bias.as_mut().expect("a bias")[at] -= by;
                value
            };
            let difference = (changed(step) - changed(-step)) / (2.0 * step);
            assert!((difference - derivative).abs() < 1e-8, "{difference} and {derivative} at {at:?}, {window:?}");
        }
    }
}

fn plan_of_case(case: &Case, data: &Data, setup: Setup) -> Vec<u8> {
    with_problem(case, data, setup, |problem| plan_of(problem, &data.attention(case).select(&case.budget)))
}

/// The same number rounded to each type.
#[test]
fn every_type_of_bias() {
    fn rounded<B: Rounded>(exact: &Array4<f64>, run: impl FnOnce(&mut Stored<B>)) {
        let mut stored = Stored::<B>::unset(exact.dim(), Layout::Contiguous);
        run(&mut stored);
        let actual = stored.read();
        assert!(actual.iter().zip(exact).all(|(x, &e)| x.exact() == B::round(e).exact()), "{}", B::NAME);
    }
    let case = biased(Pairs::Biased, Mode::Full);
    let data = data_of::<f64>(&case, NOWHERE);
    let expected = Expected::new::<f64>(&case, &data);
    let setup = Setup::new(*levels_for::<f64>().last().expect("a level"));
    let exact = compute::<f64>(&case, &data, &expected, setup, NOWHERE);
    let run = |to: BiasGradient<'_>| {
        with_problem(&case, &data, setup, |problem| {
            let plan = plan_of(problem, &expected.selected);
            let saved = (&expected.saved_out, &expected.saved_lse);
            differentiate_bias::<f64>(problem, &data, &plan, saved, setup.layout, Some(to));
        });
    };
    rounded::<f32>(&exact, |stored| run(BiasGradient::F32(stored.tensor_mut("grad_bias"))));
    rounded::<bf16>(&exact, |stored| run(BiasGradient::Bf16(stored.tensor_mut("grad_bias"))));
    rounded::<f16>(&exact, |stored| run(BiasGradient::F16(stored.tensor_mut("grad_bias"))));
}

/// A gradient that does not fit the bias is refused, and one of a mask.
#[test]
fn what_does_not_fit_is_refused() {
    let [query, key] = [[2, 2, 6, 3], [2, 2, 7, 3]];
    let refusal = |data: BiasData<'_>, strides: [usize; 4], shape: (usize, usize, usize, usize)| {
        let bias = Bias::new("bias", data, [2, 2, 6, 7], strides).expect("a bias");
        let level = *Level::available().last().expect("a level");
        let problem =
            Problem::new(query, key, &Options { bias: Some(bias), block_size: 4, ..Options::new(level) }).expect("a problem");
        let case = Case { batch: 2, kv_heads: 2, query_len: 6, key_len: 7, head_dim: 3, value_dim: 3, ..Case::default() };
        let inputs = case.data::<f32>();
        let (out, lse, plan) = attend::<f32>(&problem, &inputs, None, Layout::Contiguous);
        let mut stored = Stored::<f32>::unset(shape, Layout::Contiguous);
        let to = BiasGradient::F32(stored.tensor_mut("grad_bias"));
        let saved = (&out.mapv(f64::from), &lse.mapv(f64::from).remove_axis(Axis(3)));
        let call = || differentiate_bias::<f32>(&problem, &inputs, &plan, saved, Layout::Contiguous, Some(to));
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).err();
        panic.map_or_else(String::new, |panic| panic.downcast_ref::<String>().expect("a message").clone())
    };
    let numbers = [0.5f32; 168];
    let full = [84, 42, 7, 1];
    assert!(refusal(BiasData::F32(&numbers), full, (2, 2, 6, 7)).is_empty());
    assert!(refusal(BiasData::F32(&numbers), [0, 42, 7, 1], (1, 2, 6, 7)).is_empty());
    assert!(refusal(BiasData::F32(&numbers), [0, 42, 7, 1], (2, 2, 6, 7)).is_empty());
    assert!(refusal(BiasData::F32(&numbers), full, (1, 2, 6, 7)).contains("grad_bias: shape [1, 2, 6, 7], expected"));
    assert!(refusal(BiasData::F32(&numbers), full, (2, 2, 6, 8)).contains("grad_bias: shape"));
    assert!(refusal(BiasData::Bool(&[1; 168]), full, (2, 2, 6, 7)).contains("grad_bias: given"));
}
