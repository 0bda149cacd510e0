//! Both products of a block against sums in float64. What is not to be read holds NaN.

use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::*;
use crate::mra::problem::Options;
use crate::simd::tmul_levels;
use crate::test_support::{Padded, ROUNDOFF, ROUNDOFF_BF16};

fn check(level: Level, [head_dim, value_dim, keys]: [usize; 3], listed: &[u32]) {
    const QUERY_LEN: usize = 90;
    let context = format!("{}: {keys} keys of {head_dim} and {value_dim}, {} queries", level.name(), listed.len());
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[17; 32]);
    let key_len = 2 * keys + 1;
    let options = Options { block_size: keys, ..Options::new(level) };
    let problem = Problem::new([1, 1, QUERY_LEN, head_dim], [1, 1, key_len, head_dim], &options).expect("a valid problem");
    let mut tmul = TmulKeys::<f32>::new::<bf16>(&problem, value_dim).expect("a level with tiles");
    let tokens: Vec<u32> = (0..u32::try_from(keys).expect("few")).rev().map(|key| 2 * key + 1).collect();
    let mut rows = |count, cols, used: &[u32]| Padded::of_rows(count, cols, used, || rng.random_range(-2.0..2.0));
    let (queries, stored) = (rows(QUERY_LEN, head_dim, listed), rows(key_len, head_dim, &tokens));
    let [first, second] = [(); 2].map(|()| rows(key_len, value_dim, &tokens));
    let (queries, stored, first, second) = (queries.matrix(), stored.matrix(), first.matrix(), second.matrix());

    tmul.pack(stored, first, &tokens);
    let (logits, places) = tmul.multiply(queries, listed);
    assert_eq!(places.len(), listed.len(), "{context}");
    for (&place, &query) in places.iter().zip(listed) {
        for (&token, &logit) in tokens.iter().zip(&logits[place..]) {
            let pairs = queries.row(query as usize).iter().zip(stored.row(token as usize));
            let products: Vec<f64> = pairs.map(|(&x, &y)| problem.scale * f64::from(x) * f64::from(y)).collect();
            let (exact, magnitude) = (products.iter().sum::<f64>(), products.iter().map(|x| x.abs()).sum::<f64>());
            // The scale is rounded to float32 and multiplied by.
            let error = (f64::from(logit) - exact).abs();
            assert!(error <= (head_dim + 4) as f64 * ROUNDOFF * magnitude, "{context}: logit {logit}, not {exact}");
        }
    }

    let (columns, width) = (problem.padded::<f32>(keys), problem.padded::<f32>(value_dim));
    for (values, again) in [(first, false), (second, true)] {
        if again {
            tmul.pack_values(values, &tokens);
        }
        let mut state = State::<f32>::new(QUERY_LEN, width);
        state.values.fill(f32::NAN);
        for &query in listed {
            state.values[query as usize * width..][..width].fill_with(|| rng.random_range(-1.0..1.0));
        }
        // Lanes without a key have no weight.
        let mut weights = vec![0f32; listed.len() * columns];
        weights.chunks_exact_mut(columns).for_each(|row| row[..keys].fill_with(|| rng.random_range(0.0..1.0)));
        let rescale: Vec<f32> = (0u8..).map(|row| f32::from(row % 3) / 2.0).take(listed.len()).collect();
        let before = state.values.to_vec();
        tmul.add_values(listed, &mut weights, &rescale, &mut state);
        for (place, (&sum, &before)) in state.values.iter().zip(&before).enumerate() {
            let (query, channel) = (place / width, place % width);
            let Some(row) = listed.iter().position(|&listed| listed as usize == query) else {
                assert!(sum.is_nan(), "{context}: query {query} is not listed");
                continue;
            };
            let start = f64::from(rescale[row]) * f64::from(before);
            let value = |token: u32| values.row(token as usize).get(channel).map_or(0.0, |&x| f64::from(x));
            let terms: Vec<f64> = tokens
                .iter()
                .zip(&weights[row * columns..])
                .map(|(&token, &weight)| f64::from(weight) * value(token))
                .collect();
            let (exact, magnitude) = (start + terms.iter().sum::<f64>(), terms.iter().map(|x| x.abs()).sum::<f64>());
            let bound = ROUNDOFF_BF16 * magnitude + (keys + 3) as f64 * ROUNDOFF * 2.0 * (start.abs() + magnitude);
            let error = (f64::from(sum) - exact).abs();
            assert!(error <= bound, "{context}, packed again: {again}: {sum} at {query}, {channel}, not {exact}");
        }
    }
}

#[test]
fn logits_and_weighted_values_are_those_of_the_formulas() {
    let some: Vec<u32> = (0..33).map(|query| 2 * query + 7).collect();
    let many: Vec<u32> = (3..3 + 64).collect();
    for level in tmul_levels() {
        for sizes in [[1, 1, 1], [20, 37, 19], [32, 16, 32], [64, 64, 47]] {
            for listed in [&some[..1], &some, &many] {
                check(level, sizes, listed);
            }
        }
    }
}
