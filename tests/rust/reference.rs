//! The formulas themselves, against what is known without them: exact attention, numbers worked out by hand, and finite
//! differences.

use mra_attention::reference::{Attention, Form, Saved};
use mra_attention::{Budget, Coarse, Mode, Score, Window};
use ndarray::{Array2, Array3, Array4, ArrayView4, array, s};

use crate::support::{CAUSAL, Case, Data, Padding, Pairs, budget};

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
        let (out, lse) = attention.forward(&attention.selection(|_, _, _, _| true));
        let (expected_out, expected_lse) = softmax_attention(&data, 1.0 / 8f64.sqrt());
        assert!((out - expected_out).iter().chain(&(lse - expected_lse)).all(|error| error.abs() < 1e-13));
    }
}

/// Nothing masked, nothing hidden, a scale of 1.
fn plain<'a>(
    query: ArrayView4<'a, f64>,
    key: ArrayView4<'a, f64>,
    value: ArrayView4<'a, f64>,
    block_size: usize,
) -> Attention<'a> {
    Attention {
        query,
        key,
        value,
        query_mask: None,
        key_mask: None,
        bias: None,
        softcap: None,
        alibi_slopes: None,
        sinks: None,
        window: Window::default(),
        offsets: &[0],
        key_lengths: None,
        pool_queries: true,
        block_size,
        scale: Some(1.0),
        mode: Mode::Full,
        coarse: Coarse::Mean,
        coarse_shift: 0.0,
        score: Score::Mean,
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
    let attention = Attention { key_mask: Some(key_mask.view()), ..plain(query.view(), key.view(), value.view(), 2) };
    let forward = |attention: &Attention<'_>, plan: [bool; 2]| {
        let (out, lse) = attention.forward(&[Array3::from_shape_vec((1, 1, 2), plan.to_vec()).unwrap()]);
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
    let attention = plain(query.view(), key.view(), key.view(), 1);
    let none = budget(0.1);
    let select = |budget: Budget| attention.select(&budget).remove(0).into_shape_with_order((2, 3)).unwrap();
    let best_of_each_row = array![[true, false, false], [true, false, false]];
    assert_eq!(select(none.clone()), best_of_each_row);
    // Five of six scores are 0; the next ones are taken in order.
    let number = |num_blocks| select(Budget { num_blocks: Some(num_blocks), ..none.clone() });
    assert_eq!(number(3), array![[true, false, true], [true, false, false]]);
    assert_eq!(number(4), array![[true, false, true], [true, true, false]]);
    assert_eq!(number(5), array![[true, false, true], [true, true, true]]);
    assert_eq!(number(6), Array2::from_elem((2, 3), true));
    // 1.25 * 2 + 0.5 = 3, rounded half up; 1.2 * 2 + 0.5 rounds to 2.
    assert_eq!(select(budget(1.25)), number(3));
    assert_eq!(select(budget(1.2)), best_of_each_row);
    let forced =
        |first_blocks, diagonal_blocks| select(Budget { first_blocks: Some(first_blocks), diagonal_blocks, ..none.clone() });
    assert_eq!(forced(0, 1), array![[true, false, false], [true, true, false]]);
    assert_eq!(forced(0, 2), array![[true, true, false], [true, true, true]]);
    assert_eq!(forced(1, 0), array![[true, true, true], [true, false, false]]);
}

/// Blocks of two keys, a window of 3 keys before a query and 1 behind: what is cut, what is first, what is chosen.
#[test]
fn a_window_by_hand() {
    let query = Array4::from_elem((1, 1, 8, 1), 1.0);
    let key = Array4::from_shape_fn((1, 1, 8, 1), |(_, _, s, _)| s as f64);
    let window = Window { left: Some(3), right: Some(1) };
    let attention = Attention { window, ..plain(query.view(), key.view(), key.view(), 2) };
    assert_eq!(attention.forms(), [Form::Token]);
    let select = |first_blocks, t: usize| {
        let exact = attention.select(&Budget { first_blocks, ..budget(1.0) });
        exact[0].slice(s![0, t, ..]).to_vec()
    };
    // Token 4 sees 1 to 5: block 0 is cut, 1 is open, 2 its own. Token 5 sees 2 to 6: 1 and 2 are open, 3 is cut.
    assert_eq!(select(Some(0), 4), [true, false, true, false]);
    assert_eq!(select(Some(0), 5), [false, false, true, true]);
    assert_eq!(select(None, 5), [false, true, true, true]);
    let (out, lse) = attention.forward(&attention.select(&Budget { first_blocks: Some(0), ..budget(1.0) }));
    let terms = [(1.0, 1.0), (2.0, 2.5), (1.0, 4.0), (1.0, 5.0)];
    let total: f64 = terms.iter().map(|&(count, x): &(f64, f64)| count * x.exp()).sum();
    let mean = terms.iter().map(|&(count, x)| count * x.exp() * x).sum::<f64>() / total;
    assert!((lse[[0, 0, 4]] - total.ln()).abs() < 1e-13 && (out[[0, 0, 4, 0]] - mean).abs() < 1e-13);
    // 12 blocks for 4 rows of blocks are 3 for each token.
    let three = Attention { window: Window { left: Some(3), right: None }, ..attention };
    let exact = three.select(&Budget { num_blocks: Some(12), first_blocks: Some(0), ..budget(1.0) });
    assert_eq!(exact[0].slice(s![0, 1, ..]).to_vec(), [true, false, true, true]);
}

/// What is hidden decides on the form, not how it is written.
#[test]
fn forms() {
    let form = |case: Case| {
        let data = case.data::<f64>();
        data.attention(&case).forms()[0]
    };
    let case = Case { query_len: 20, key_len: 20, ..Case::default() };
    let block = [
        case.clone(),
        Case { key_padding: Padding::Holes, ..case.clone() },
        Case { query_padding: Padding::Left, ..case.clone() },
        Case { pairs: Pairs::Biased, ..case.clone() },
        Case { pairs: Pairs::Keys, ..case.clone() },
    ];
    let token = [
        Case { window: CAUSAL, ..case.clone() },
        Case { pool_queries: false, ..case.clone() },
        Case { pairs: Pairs::Causal, ..case.clone() },
        Case { pairs: Pairs::Documents, ..case.clone() },
        Case { pairs: Pairs::Huge, ..case.clone() },
    ];
    assert!(block.into_iter().all(|case| form(case) == Form::Block));
    assert!(token.into_iter().all(|case| form(case) == Form::Token));
}

/// Three padded tokens, then five valid ones, in blocks of two: rows -2 and -1 lie in front of row 0.
#[test]
fn padding_in_front_by_hand() {
    let x = array![[[[9.0], [8.0], [7.0], [1.0], [2.0], [3.0], [4.0], [5.0]]]];
    let mask = Array2::from_shape_fn((1, 8), |(_, s)| s >= 3);
    let attention = Attention { key_mask: Some(mask.view()), ..plain(x.view(), x.view(), x.view(), 2) };
    let selected = attention.select(&Budget { num_blocks: Some(4), ..budget(1.0) });
    // Every row's best is the last block; the fourth goes to the row with the smallest queries.
    let last = [false, false, true];
    let rows: Vec<Vec<bool>> = selected[0].rows().into_iter().map(|row| row.to_vec()).collect();
    assert_eq!(rows, [last, last, [false, true, true], last, last]);
    let alone = x.slice(s![.., .., 3.., ..]);
    let own = plain(alone, alone, alone, 2);
    let (out, lse) = attention.forward(&selected);
    let (own_out, own_lse) = own.forward(&own.select(&Budget { num_blocks: Some(4), ..budget(1.0) }));
    assert!((&out.slice(s![.., .., 3.., ..]) - &own_out).iter().all(|error| error.abs() < 1e-14));
    assert!((&lse.slice(s![.., .., 3..]) - &own_lse).iter().all(|error| error.abs() < 1e-14));
    assert!(attention.select(&budget(3.0))[0].iter().all(|&exact| exact));
}

/// `sum g out + sum gl lse`, of which backward gives the gradient.
fn objective(case: &Case, data: &Data, selected: &[Array3<bool>]) -> f64 {
    let (out, lse) = data.attention(case).forward(selected);
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
        for (window, pairs, query_padding, key_padding, grad_lse) in [
            (Window::default(), Pairs::All, Padding::None, Padding::None, false),
            (Window::default(), Pairs::All, Padding::Holes, Padding::Holes, true),
            (Window::default(), Pairs::All, Padding::Right, Padding::Blocks, true),
            (Window::default(), Pairs::Biased, Padding::None, Padding::Left, true),
            (CAUSAL, Pairs::All, Padding::None, Padding::Right, true),
            (Window { left: Some(4), right: Some(1) }, Pairs::All, Padding::Holes, Padding::None, true),
            (Window::default(), Pairs::Documents, Padding::None, Padding::None, false),
        ] {
            let shape = Case {
                batch: 2,
                kv_heads: 1,
                group: 2,
                query_len: 9,
                key_len: 9,
                head_dim: 3,
                value_dim: 2,
                window,
                pairs,
                ..Case::default()
            };
            let case = Case { block_size: 3, mode, query_padding, key_padding, grad_lse, ..shape };
            let mut data = case.data::<f64>();
            let plan = data.attention(&case).select(&Budget { first_blocks: Some(0), ..budget(1.4) });
            let (out, lse) = data.attention(&case).forward(&plan);
            let saved = Saved {
                out: out.view(),
                lse: lse.view(),
                grad_out: data.grad_out.view(),
                grad_lse: data.grad_lse.as_ref().map(|array| array.view()),
            };
            let gradients = data.attention(&case).backward(&plan, &saved);
            let mut inputs: Vec<(Input, &Array4<f64>)> = vec![
                (|data| &mut data.query, &gradients.query),
                (|data| &mut data.key, &gradients.key),
                (|data| &mut data.value, &gradients.value),
            ];
            if data.bias.is_some() {
                inputs.push((|data| data.bias.as_mut().expect("there is one"), &gradients.bias));
            }
            for (index, (input, gradient)) in inputs.into_iter().enumerate() {
                for (at, &derivative) in gradient.indexed_iter() {
                    let before = input(&mut data)[at];
                    if before == f64::NEG_INFINITY {
                        assert_eq!(derivative, 0.0, "a hidden pair at {at:?}, {case:?}");
                        continue;
                    }
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
