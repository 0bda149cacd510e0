//! A token learns only from what it sees, to the bit: out, lse, its choice of blocks and its gradient are the same whatever lies in
//! what is hidden from it.

use half::bf16;
use mra_attention::{Budget, CoarserLevel, Mode, Window};
use ndarray::{Array3, Array4, Axis, s};

use crate::support::{
    CAUSAL, Case, Data, Number, Outcome, Pairs, Setup, assert_same_blocks, attend, bits, budget, differentiate, exact_of,
    levels, levels_for, plan_of, selected_by, with_problem,
};

/// Blocks larger than, equal to and smaller than a tile, and blocks that a tile cuts anywhere; hidden in turns by causality, by a
/// window, and by masks.
fn cases() -> Vec<Case> {
    let budgets = [(2.0, 1, None), (3.0, 2, Some(1)), (1.0, 1, Some(0)), (40.0, 1, None)];
    let sizes = [(70, 1, 8, 8), (150, 8, 16, 24), (130, 32, 9, 16), (170, 48, 16, 5), (200, 64, 8, 8), (260, 128, 8, 16)];
    let window = Window { left: Some(37), right: Some(12) };
    let hiding = [
        (CAUSAL, Pairs::All),
        (window, Pairs::All),
        (Window::default(), Pairs::Causal),
        (Window::default(), Pairs::Documents),
        (Window { left: Some(50), right: Some(0) }, Pairs::All),
        (Window::default(), Pairs::Window),
        (CAUSAL, Pairs::Holes),
    ];
    let all = sizes.into_iter().flat_map(|size| [Mode::Full, Mode::Sparse].map(|mode| (size, mode)));
    let two_resolutions = all.enumerate().map(|(index, ((length, block_size, head_dim, value_dim), mode))| {
        let (blocks, local_blocks, first_blocks) = budgets[index % budgets.len()];
        let (window, pairs) = hiding[index % hiding.len()];
        Case {
            group: 2,
            head_dim,
            value_dim,
            mode,
            window,
            pairs,
            budget: Budget { local_blocks, first_blocks, ..budget(blocks) },
            seed: index as u64,
            ..Case::causal(length, block_size, 1)
        }
    });
    two_resolutions.chain(ladders()).collect()
}

/// With several levels of blocks.
fn ladders() -> Vec<Case> {
    let levels = |sizes: &[usize], rate: f64| {
        sizes.iter().map(|&block_size| CoarserLevel { block_size, blocks_per_row: vec![rate] }).collect::<Vec<_>>()
    };
    let cases = [
        (CAUSAL, Pairs::All, 4, levels(&[32, 8], 2.0)),
        (Window { left: Some(77), right: Some(12) }, Pairs::All, 4, levels(&[64, 16], 1.0)),
        (Window::default(), Pairs::Documents, 2, levels(&[16, 4], 3.0)),
        (CAUSAL, Pairs::Holes, 8, levels(&[24], 2.0)),
    ];
    let case = |(index, (window, pairs, block_size, coarser))| Case {
        window,
        pairs,
        coarser,
        group: 2,
        head_dim: 8 + index,
        value_dim: 9,
        budget: budget(3.0),
        ..Case::causal(170, block_size, 1)
    };
    cases.into_iter().enumerate().map(case).collect()
}

/// Whether a query sees a key, in any head.
fn sees(case: &Case, data: &Data, t: usize, s: usize) -> bool {
    let near = |limit: Option<usize>, distance: usize| limit.is_none_or(|limit| distance <= limit);
    let by_window = if s <= t { near(case.window.left, t - s) } else { near(case.window.right, s - t) };
    let by_mask = |bias: &Array4<f64>| bias.slice(s![0, .., t, s]).iter().any(|&x| x != f64::NEG_INFINITY);
    by_window && data.bias.as_ref().is_none_or(by_mask)
}

/// The same numbers where a query sees them and at itself, elsewhere something else.
fn changed_where_hidden(case: &Case, data: &Data, t: usize, other: f64) -> Data {
    let mut changed = data.clone();
    for s in 0..case.key_len {
        if !sees(case, data, t, s) {
            for array in [&mut changed.key, &mut changed.value] {
                array.slice_mut(s![.., .., s, ..]).fill(other);
            }
        }
        if s != t {
            changed.query.slice_mut(s![.., .., s, ..]).fill(other);
        }
    }
    changed
}

fn exact<E: Number>(case: &Case, data: &Data, setup: Setup, outcome: &Outcome<E>) -> Vec<Array3<bool>> {
    with_problem(case, data, setup, |problem| exact_of(problem, &outcome.plan))
}

fn hidden_tokens_change_nothing<E: Number>() {
    for case in cases() {
        let data = case.data::<E>();
        let (length, block) = (case.query_len, case.block_size);
        for level in levels_for::<E>() {
            let setup = Setup::new(level);
            let whole = Outcome::<E>::own(&case, &data, setup);
            let whole_exact = exact(&case, &data, setup, &whole);
            for t in [0, block - 1, block, block + block / 2, length / 2, length - 2] {
                for other in [f64::NAN, f64::INFINITY, 1e4] {
                    let changed = changed_where_hidden(&case, &data, t, other);
                    let outcome = Outcome::<E>::own(&case, &changed, setup);
                    let context = || format!("query {t}, {other} elsewhere, {} at {}: {case:?}", E::NAME, level.name());
                    let of = s![.., .., t, ..];
                    assert!(bits(whole.out.slice(of)) == bits(outcome.out.slice(of)), "out: {}", context());
                    assert!(bits(whole.lse.slice(of)) == bits(outcome.lse.slice(of)), "lse: {}", context());
                    assert!(bits(whole.query.slice(of)) == bits(outcome.query.slice(of)), "dq: {}", context());
                    let row = |exact: Vec<Array3<bool>>| vec![exact[0].slice(s![.., t..=t, ..]).to_owned()];
                    let changed_exact = exact(&case, &changed, setup, &outcome);
                    assert_same_blocks(&row(changed_exact), &row(whole_exact.clone()), || format!("selection: {}", context()));
                }
            }
        }
    }
}

#[test]
fn hidden_tokens_change_nothing_in_float32() {
    hidden_tokens_change_nothing::<f32>();
}

#[test]
fn hidden_tokens_change_nothing_in_bfloat16() {
    hidden_tokens_change_nothing::<bf16>();
}

/// No gradient reaches a key from queries that do not see it, whatever lies there.
#[test]
fn queries_give_no_gradient_to_what_they_do_not_see() {
    for case in cases() {
        let mut data = case.data::<f64>();
        let t = case.query_len / 2;
        let keep = data.grad_out.slice(s![.., .., t..=t, ..]).to_owned();
        data.grad_out.fill(0.0);
        data.grad_out.slice_mut(s![.., .., t..=t, ..]).assign(&keep);
        data.grad_lse = None;
        for level in levels() {
            let outcome = Outcome::<f64>::own(&case, &data, Setup::new(level));
            for s in (0..case.key_len).filter(|&s| !sees(&case, &data, t, s)) {
                let zero = |array: &Array4<f64>| array.slice(s![.., .., s, ..]).iter().all(|&x| x == 0.0);
                assert!(zero(&outcome.key) && zero(&outcome.value), "key {s} at {}: {case:?}", level.name());
            }
        }
    }
}

/// A query without an incoming gradient adds nothing to any sum, though it holds NaN.
#[test]
fn queries_without_a_gradient_add_nothing() {
    for case in cases() {
        for window in [case.window, Window::default()] {
            let case = Case { window, pairs: if window.right.is_some() { case.pairs } else { Pairs::All }, ..case.clone() };
            // Averaged queries share their largest blocks.
            let largest = case.coarser.first().map_or(case.block_size, |level| level.block_size);
            let (data, half) = (case.data::<f32>(), case.query_len / largest / 2 * largest);
            let mut silent = data.clone();
            silent.grad_out.slice_mut(s![.., .., half.., ..]).fill(0.0);
            silent.grad_lse.as_mut().expect("a gradient of lse").slice_mut(s![.., .., half..]).fill(0.0);
            let mut spoiled = silent.clone();
            spoiled.query.slice_mut(s![.., .., half.., ..]).fill(f64::NAN);
            for level in levels() {
                let setup = Setup::new(level);
                let plan = Outcome::<f32>::own(&case, &data, setup).plan;
                let run = |data: &Data| {
                    with_problem(&case, data, setup, |problem| {
                        let (out, lse, _) = attend::<f32>(problem, data, Some(&plan), setup.layout);
                        let saved = (&out.mapv(f64::from), &lse.mapv(f64::from).remove_axis(Axis(3)));
                        differentiate::<f32>(problem, data, &plan, saved, setup.layout)
                    })
                };
                let ([_, dk, dv], [_, dk_spoiled, dv_spoiled]) = (run(&silent), run(&spoiled));
                assert!(bits(&dk) == bits(&dk_spoiled), "dk at {}: {case:?}", level.name());
                assert!(bits(&dv) == bits(&dv_spoiled), "dv at {}: {case:?}", level.name());
            }
        }
    }
}

/// A triangular mask is causality, a banded one a window: the same bits, gradients too.
#[test]
fn what_a_mask_says_decides() {
    for mode in [Mode::Full, Mode::Sparse] {
        for (pairs, window) in [(Pairs::Causal, CAUSAL), (Pairs::Window, Window { left: Some(5), right: Some(5) })] {
            let by_window = Case { group: 2, mode, ..Case::causal(77, 8, 3) };
            let by_window = Case { window, ..by_window };
            let by_mask = Case { window: Window::default(), pairs, ..by_window.clone() };
            let masked = by_mask.data::<f32>();
            let data = Data { bias: None, ..masked.clone() };
            for level in levels() {
                let setup = Setup::new(level);
                let (a, b) = (Outcome::<f32>::own(&by_window, &data, setup), Outcome::<f32>::own(&by_mask, &masked, setup));
                for ((name, a), (_, b)) in a.bits().into_iter().zip(b.bits()) {
                    assert!(a == b, "{name} of {pairs:?} at {}", level.name());
                }
            }
        }
    }
}

/// NaN scores come last, behind `-inf`; equal ones go to the lower block.
#[test]
fn scores_that_are_nan_and_scores_that_are_equal() {
    let case = Case { budget: Budget { first_blocks: Some(0), ..budget(3.0) }, ..Case::causal(24, 4, 3) };
    let mut data = case.data::<f64>();
    data.query.fill(1.0);
    data.key.fill(0.5);
    data.key.slice_mut(s![.., .., 4..8, ..]).fill(f64::NAN);
    data.key.slice_mut(s![.., .., 12..16, ..]).fill(f64::NEG_INFINITY);
    let blocks = |case: &Case, t: usize, setup| -> Vec<usize> {
        let (exact, _) = selected_by::<f64>(case, &data, setup);
        exact[0].slice(s![0, t, ..]).iter().enumerate().filter(|(_, exact)| **exact).map(|(j, _)| j).collect()
    };
    for level in levels() {
        let setup = Setup::new(level);
        assert_eq!(blocks(&case, 23, setup), [0, 2, 5], "{}: ties to the lower block", level.name());
        assert_eq!(blocks(&case, 15, setup), [0, 2, 3], "{}", level.name());
        let five = Case { budget: Budget { first_blocks: Some(0), ..budget(5.0) }, ..case.clone() };
        assert_eq!(blocks(&five, 23, setup), [0, 2, 3, 4, 5], "{}: NaN comes last, behind -inf", level.name());
    }
}

/// A plan adds no block that a token does not see and takes no cut one away.
#[test]
fn given_plans_hide_and_show_nothing() {
    let case = Case { pairs: Pairs::Documents, ..Case::causal(40, 8, 2) };
    let data = case.data::<f64>();
    let attention = data.attention(&case);
    for chosen in [true, false] {
        let selected = attention.selection(|_, _, _, _| chosen);
        let expected = attention.exact(&selected);
        for level in levels() {
            let exact =
                with_problem(&case, &data, Setup::new(level), |problem| exact_of(problem, &plan_of(problem, &selected)));
            assert_same_blocks(&exact, &expected, || format!("{chosen} at {}", level.name()));
        }
    }
}
