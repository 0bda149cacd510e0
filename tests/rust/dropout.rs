//! Dropout: what is dropped, and that backward drops the same.

use mra_attention::{Mode, Window};
use ndarray::Array4;

use crate::support::{CAUSAL, Case, Data, Outcome, Setup, attend, bits, exact_of, levels, with_problem};

/// The block form and the token form, in both modes.
fn cases() -> Vec<Case> {
    let case = Case { batch: 2, group: 2, query_len: 50, key_len: 50, block_size: 8, ..Case::default() };
    let token = Case { offsets: vec![0, 3], key_lengths: Some(vec![50, 41]), window: CAUSAL, ..case.clone() };
    [case, token].into_iter().flat_map(|case| [Mode::Full, Mode::Sparse].map(|mode| Case { mode, ..case.clone() })).collect()
}

/// With the identity for values, `out[t, s]` is the weight of key `s`, or its share of its block's.
#[test]
fn weights_are_dropped_or_divided() {
    for whole in cases() {
        let whole = Case { value_dim: 50, ..whole };
        let mut data = whole.data::<f64>();
        data.value = Array4::from_shape_fn((2, 1, 50, 50), |(_, _, s, d)| f64::from(u8::from(s == d)));
        data.grad_out = Array4::zeros((2, 2, 50, 50));
        let dropped = Case { dropout: 0.25, ..whole.clone() };
        for level in levels() {
            let setup = Setup::new(level);
            let run = |case: &Case| {
                with_problem(case, &data, setup, |problem| {
                    let (out, lse, plan) = attend::<f64>(problem, &data, None, setup.layout);
                    let exact = exact_of(problem, &plan);
                    (out, lse, plan, exact)
                })
            };
            let (weights, lse, plan, exact) = run(&whole);
            let (result, lse_with, plan_with, _) = run(&dropped);
            let same = plan == plan_with && bits(&lse) == bits(&lse_with);
            assert!(same, "{}: lse and plan do not depend on dropout", level.name());
            let (mut zeros, mut all) = (0, 0);
            for ((b, h, t, s), &weight) in weights.indexed_iter().filter(|(_, weight)| **weight > 0.0) {
                let x = result[[b, h, t, s]];
                assert!(x == 0.0 || (x * 0.75 - weight).abs() < 1e-12, "{x} of {weight}");
                let row = if whole.window.right.is_some() { t } else { t / 8 };
                let alone = exact[b][[h, row, s / 8]] || (x == 0.0) == (result[[b, h, t, s / 8 * 8]] == 0.0);
                assert!(alone, "a coarse block is dropped as a unit");
                (zeros, all) = (zeros + u32::from(x == 0.0), all + 1_u32);
            }
            // In the block form up to 64 weights share a decision, in the token form 8: within five standard deviations.
            let shared = if whole.window.right.is_some() { 8.0 } else { 64.0 };
            let (expected, deviation) = (f64::from(all) * 0.25, (f64::from(all) * shared * 0.25 * 0.75).sqrt());
            assert!((f64::from(zeros) - expected).abs() < 5.0 * deviation, "{zeros} of {all}");
        }
    }
}

/// The gradients against differences of `sum(out * g)`, which has the same decisions: they depend on nothing but the place.
#[test]
fn gradients_are_those_of_what_was_kept() {
    for case in cases() {
        let case = Case { dropout: 0.3, grad_lse: false, ..case };
        let data = case.data::<f64>();
        let direction = Case { seed: 99, ..case.clone() }.data::<f64>();
        for level in levels() {
            let setup = Setup::new(level);
            let own = Outcome::<f64>::own(&case, &data, setup);
            let loss = |step: f64| {
                let moved = |a: &Array4<f64>, b: &Array4<f64>| a + &(b * step);
                let data = Data {
                    query: moved(&data.query, &direction.query),
                    key: moved(&data.key, &direction.key),
                    value: moved(&data.value, &direction.value),
                    ..data.clone()
                };
                let (out, ..) =
                    with_problem(&case, &data, setup, |problem| attend::<f64>(problem, &data, Some(&own.plan), setup.layout));
                (out * &data.grad_out).sum()
            };
            let finite = |product: Array4<f64>| product.iter().filter(|x| x.is_finite()).sum::<f64>();
            let expected = finite(&own.query * &direction.query)
                + finite(&own.key * &direction.key)
                + finite(&own.value * &direction.value);
            let difference = (loss(1e-5) - loss(-1e-5)) / 2e-5;
            assert!((difference - expected).abs() < 1e-6 * (1.0 + expected.abs()), "{}: {difference} {expected}", level.name());
        }
    }
}

/// The same decisions whatever the tile, the thread and the number of passes.
#[test]
fn threads_decide_alike() {
    for (window, mode) in [CAUSAL, Window::default()].into_iter().flat_map(|w| [(w, Mode::Full), (w, Mode::Sparse)]) {
        let case = Case { dropout: 0.5, mode, window, head_dim: 32, ..Case::causal(1100, 16, 6) };
        let data = case.data::<f32>();
        for level in levels() {
            let own = |threads| Outcome::<f32>::own(&case, &data, Setup { threads, ..Setup::new(level) });
            for ((name, a), (_, b)) in own(1).bits().into_iter().zip(own(3).bits()) {
                assert!(a == b, "{name} at {}: {case:?}", level.name());
            }
        }
    }
}
