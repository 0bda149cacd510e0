//! Dropout of the causal form: what is dropped, and that backward drops the same.

use mra_attention::Mode;
use ndarray::{Array3, Array4};

use crate::support::{CausalCase, CausalData, Setup, bits, compute_causal, levels, select_causal};

fn case(mode: Mode) -> CausalCase {
    CausalCase { batch: 2, offsets: vec![0, 3], key_lengths: vec![50, 41], group: 2, mode, ..CausalCase::square(50, 8, 3) }
}

/// With the identity for values, `out[t, s]` is the weight of key `s`, or its share of its block's.
#[test]
fn weights_are_dropped_or_divided() {
    for mode in [Mode::Full, Mode::Sparse] {
        let whole = CausalCase { value_dim: 50, ..case(mode) };
        let mut data = whole.data::<f64>();
        data.value = Array4::from_shape_fn((2, 1, 50, 50), |(_, _, s, d)| f64::from(u8::from(s == d)));
        let (kept, dropped) = (CausalCase { dropout: 0.0, ..whole.clone() }, CausalCase { dropout: 0.25, ..whole });
        for level in levels() {
            let (weights, lse, plan) = select_causal::<f64>(&kept, &data, Setup::new(level));
            let (result, lse_with, plan_with) = select_causal::<f64>(&dropped, &data, Setup::new(level));
            assert!(
                plan == plan_with && bits(&lse) == bits(&lse_with),
                "{}: lse and plan do not depend on dropout",
                level.name()
            );
            let width = plan.len() / (2 * 2 * 50);
            let (mut zeros, mut all) = (0, 0);
            for ((b, h, t, s), &weight) in weights.indexed_iter().filter(|(_, weight)| **weight > 0.0) {
                let x = result[[b, h, t, s]];
                assert!(x == 0.0 || (x * 0.75 - weight).abs() < 1e-12, "{x} of {weight}");
                let row = &plan[((b * 2 + h) * 50 + t) * width..][..width];
                let exact = row.iter().any(|&j| j >= 0 && usize::try_from(j) == Ok(s / 8));
                assert!(exact || (x == 0.0) == (result[[b, h, t, s / 8 * 8]] == 0.0), "a pooled block is dropped as a unit");
                (zeros, all) = (zeros + usize::from(x == 0.0), all + 1);
            }
            // A few hundred decisions for each head at the least: within five standard deviations.
            let (expected, deviation) = (f64::from(all) * 0.25, (f64::from(all) * 8.0 * 0.25 * 0.75).sqrt());
            assert!((f64::from(u32::try_from(zeros).unwrap()) - expected).abs() < 5.0 * deviation, "{zeros} of {all}");
        }
    }
}

/// The gradients against differences of `sum(out * g)`, which has the same decisions: they depend on nothing but the place.
#[test]
fn gradients_are_those_of_what_was_kept() {
    for mode in [Mode::Full, Mode::Sparse] {
        let case = CausalCase { dropout: 0.3, grad_lse: false, ..case(mode) };
        let data = case.data::<f64>();
        let direction = CausalCase { seed: 99, ..case.clone() }.data::<f64>();
        for level in levels() {
            let setup = Setup::new(level);
            let (out, lse, plan) = select_causal::<f64>(&case, &data, setup);
            let lse = lse.remove_axis(ndarray::Axis(3));
            let gradients = compute_causal::<f64>(&case, &data, &plan, &out, &lse, setup);
            let loss = |step: f64| {
                let zeros = (Array4::zeros(out.raw_dim()), Array3::zeros(lse.raw_dim()));
                let moved = |a: &Array4<f64>, b: &Array4<f64>| a + &(b * step);
                let data = CausalData {
                    query: moved(&data.query, &direction.query),
                    key: moved(&data.key, &direction.key),
                    value: moved(&data.value, &direction.value),
                    ..data.clone()
                };
                let outcome = compute_causal::<f64>(&case, &data, &plan, &zeros.0, &zeros.1, setup);
                (outcome.out * &data.grad_out).sum()
            };
            let finite = |product: Array4<f64>| product.iter().filter(|x| x.is_finite()).sum::<f64>();
            let expected = finite(&gradients.query * &direction.query)
                + finite(&gradients.key * &direction.key)
                + finite(&gradients.value * &direction.value);
            let difference = (loss(1e-5) - loss(-1e-5)) / 2e-5;
            assert!((difference - expected).abs() < 1e-6 * (1.0 + expected.abs()), "{}: {difference} {expected}", level.name());
        }
    }
}

/// The same decisions whatever the tile, the thread and the number of passes.
#[test]
fn threads_decide_alike() {
    for mode in [Mode::Full, Mode::Sparse] {
        let case = CausalCase { dropout: 0.5, mode, head_dim: 32, ..CausalCase::square(1100, 16, 6) };
        let data = case.data::<f32>();
        for level in levels() {
            let setup = |threads| Setup { threads, ..Setup::new(level) };
            let (out, lse, plan) = select_causal::<f32>(&case, &data, setup(1));
            let (out, lse) = (out.mapv(f64::from), lse.mapv(f64::from).remove_axis(ndarray::Axis(3)));
            let compute = |threads| compute_causal::<f32>(&case, &data, &plan, &out, &lse, setup(threads));
            let (alone, together) = (compute(1), compute(3));
            assert!(bits(&alone.out) == bits(&together.out) && bits(&alone.query) == bits(&together.query), "{}", level.name());
            assert!(bits(&alone.key) == bits(&together.key) && bits(&alone.value) == bits(&together.value), "{}", level.name());
        }
    }
}
