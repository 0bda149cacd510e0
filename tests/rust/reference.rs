//! The formulas themselves, against what is known without them: exact attention, numbers worked out by hand, and finite
//! differences.

use mra_attention::reference::{Attention, Saved};
use mra_attention::{Budget, Mode};
use ndarray::{Array2, Array3, Array4, array};

use crate::support::{Case, Data, Padding};

/// Exact attention in its textbook form, without blocks or masks.
fn softmax_attention(data: &Data, scale: f64) -> (Array4<f64>, Array3<f64>) {
    let (batch, heads, length, _) = data.query.dim();
    let group = heads / data.key.dim().1;
    let weight = |b: usize, h: usize, t: usize, s: usize| {
        (scale * (0..data.query.dim().3).map(|d| data.query[[b, h, t, d]] * data.key[[b, h / group, s, d]]).sum::<f64>()).exp()
    };
    let keys = data.key.dim().2;
    let sum = Array3::from_shape_fn((batch, heads, length), |(b, h, t)| (0..keys).map(|s| weight(b, h, t, s)).sum::<f64>());
    let out = Array4::from_shape_fn(data.grad_out.raw_dim(), |(b, h, t, d)| {
        (0..keys).map(|s| weight(b, h, t, s) * data.value[[b, h / group, s, d]]).sum::<f64>() / sum[[b, h, t]]
    });
    (out, sum.mapv(f64::ln))
}

#[test]
fn everything_selected_is_exact_attention() {
    for mode in [Mode::Full, Mode::Sparse] {
        let case = Case { batch: 2, kv_heads: 2, group: 2, query_len: 13, key_len: 10, mode, ..Case::default() };
        let data = case.data::<f64>();
        let attention = data.attention(&case);
        let (out, lse) = attention.forward(Array4::from_elem(attention.blocks(), true).view());
        let (expected_out, expected_lse) = softmax_attention(&data, 1.0 / 8f64.sqrt());
        assert!((out - expected_out).iter().chain(&(lse - expected_lse)).all(|error| error.abs() < 1e-13));
    }
}

/// One query; two blocks of keys with logits (0, ln 4) and (ln 2, ln 2, one of them padded), only the first one selected.
#[test]
fn numbers_by_hand() {
    let ln_2 = std::f64::consts::LN_2;
    let query = array![[[[1.0]]]];
    let key = array![[[[0.0], [2.0 * ln_2], [f64::NAN], [ln_2]]]];
    let value = array![[[[1.0], [2.0], [f64::NAN], [4.0]]]];
    let key_mask = array![[true, true, false, true]];
    let attention = Attention {
        query: query.view(),
        key: key.view(),
        value: value.view(),
        query_mask: None,
        key_mask: Some(key_mask.view()),
        bias: None,
        block_size: 2,
        scale: Some(1.0),
        mode: Mode::Full,
    };
    let forward = |attention: &Attention<'_>, plan: [bool; 2]| {
        let (out, lse) = attention.forward(Array4::from_shape_vec((1, 1, 1, 2), plan.to_vec()).unwrap().view());
        (out[[0, 0, 0, 0]], lse[[0, 0, 0]].exp())
    };
    let near = |(a, b): (f64, f64), (c, d): (f64, f64)| (a - c).abs() < 1e-14 && (b - d).abs() < 1e-14;
    // exp(0) + exp(ln 4) + 1 exp(ln 2), the pooled key being the valid one.
    assert!(near(forward(&attention, [true, false]), ((1.0 + 8.0 + 8.0) / 7.0, 7.0)));
    // The first block by its mean: logit ln 2, value 1.5, counted twice.
    assert!(near(forward(&attention, [false, true]), ((2.0 * 2.0 * 1.5 + 8.0) / 6.0, 6.0)));
    let sparse = Attention { mode: Mode::Sparse, ..attention };
    assert!(near(forward(&sparse, [true, false]), (9.0 / 5.0, 5.0)));
    assert_eq!(forward(&sparse, [false, false]), (0.0, 0.0));
}

#[test]
fn selection_by_hand() {
    // Blocks of one token, logits: row 0: 3 1 3; row 1: 0 0 0. Scores: 0 -2 0; 0 0 0.
    let query = array![[[[1.0], [0.0]]]];
    let key = array![[[[3.0], [1.0], [3.0]]]];
    let attention = Attention {
        query: query.view(),
        key: key.view(),
        value: key.view(),
        query_mask: None,
        key_mask: None,
        bias: None,
        block_size: 1,
        scale: Some(1.0),
        mode: Mode::Full,
    };
    let none = Budget { blocks_per_row: 0.1, num_blocks: None, first_blocks: 0, diagonal_blocks: 0 };
    let select = |budget: &Budget| attention.select(budget).into_shape_with_order((2, 3)).unwrap();
    let best_of_each_row = array![[true, false, false], [true, false, false]];
    assert_eq!(select(&none), best_of_each_row);
    // Five of six scores are 0; the next ones are taken in order.
    let number = |num_blocks| select(&Budget { num_blocks: Some(num_blocks), ..none });
    assert_eq!(number(3), array![[true, false, true], [true, false, false]]);
    assert_eq!(number(4), array![[true, false, true], [true, true, false]]);
    assert_eq!(number(5), array![[true, false, true], [true, true, true]]);
    assert_eq!(number(6), Array2::from_elem((2, 3), true));
    // 1.25 * 2 + 0.5 = 3, rounded half up; 1.2 * 2 + 0.5 rounds to 2.
    assert_eq!(select(&Budget { blocks_per_row: 1.25, ..none }), number(3));
    assert_eq!(select(&Budget { blocks_per_row: 1.2, ..none }), best_of_each_row);
    let forced = |first_blocks, diagonal_blocks| select(&Budget { first_blocks, diagonal_blocks, ..none });
    assert_eq!(forced(0, 1), array![[true, false, false], [true, true, false]]);
    assert_eq!(forced(0, 2), array![[true, true, false], [true, true, true]]);
    assert_eq!(forced(1, 0), array![[true, true, true], [true, false, false]]);
}

/// `sum g out + sum gl lse`, of which backward gives the gradient.
fn objective(case: &Case, data: &Data, plan: &Array4<bool>) -> f64 {
    let (out, lse) = data.attention(case).forward(plan.view());
    let valid = |b: usize, t: usize| data.query_mask.as_ref().is_none_or(|mask| mask[[b, t]]);
    let of_out = out.indexed_iter().filter(|((b, _, t, _), _)| valid(*b, *t)).map(|(at, x)| x * data.grad_out[at]).sum::<f64>();
    let visible = lse.indexed_iter().filter(|((b, _, t), x)| valid(*b, *t) && x.is_finite());
    of_out + data.grad_lse.as_ref().map_or(0.0, |grad_lse| visible.map(|(at, x)| x * grad_lse[at]).sum())
}

/// Reaches an input.
type Input = fn(&mut Data) -> &mut Array4<f64>;

#[test]
fn backward_is_the_derivative_of_forward() {
    // Central differences of a function whose values and derivatives are of order 1 to 100: the third derivative times
    // STEP^2 and the rounding over STEP both stay below 1e-8.
    const STEP: f64 = 1e-5;
    for mode in [Mode::Full, Mode::Sparse] {
        for (query_padding, key_padding, grad_lse) in [
            (Padding::None, Padding::None, false),
            (Padding::Holes, Padding::Holes, true),
            (Padding::Right, Padding::Blocks, true),
        ] {
            let shape = Case {
                batch: 2,
                kv_heads: 1,
                group: 2,
                query_len: 7,
                key_len: 9,
                head_dim: 3,
                value_dim: 2,
                ..Case::default()
            };
            let case = Case { block_size: 3, mode, query_padding, key_padding, grad_lse, ..shape };
            let mut data = case.data::<f64>();
            let budget = Budget { blocks_per_row: 1.4, ..case.budget };
            let plan = data.attention(&case).select(&budget);
            let (out, lse) = data.attention(&case).forward(plan.view());
            let saved = Saved {
                out: out.view(),
                lse: lse.view(),
                grad_out: data.grad_out.view(),
                grad_lse: data.grad_lse.as_ref().map(|array| array.view()),
            };
            let gradients = data.attention(&case).backward(plan.view(), &saved);
            let inputs: [(Input, &Array4<f64>); 3] = [
                (|data| &mut data.query, &gradients.query),
                (|data| &mut data.key, &gradients.key),
                (|data| &mut data.value, &gradients.value),
            ];
            for (index, (input, gradient)) in inputs.into_iter().enumerate() {
                for (at, &derivative) in gradient.indexed_iter() {
                    let before = input(&mut data)[at];
                    input(&mut data)[at] = before + STEP;
                    let above = objective(&case, &data, &plan);
                    input(&mut data)[at] = before - STEP;
                    let below = objective(&case, &data, &plan);
                    input(&mut data)[at] = before;
                    let difference = (above - below) / (2.0 * STEP);
                    assert!(
                        (difference - derivative).abs() < 1e-8,
                        "input {index} at {at:?}: {difference} and {derivative}, {case:?}"
                    );
                }
            }
        }
    }
}
