//! Which blocks are selected, against the formulas.

use half::{bf16, f16};
use mra_attention::{Budget, Mode, Window};
use ndarray::{Array3, s};
use proptest::prelude::RngExt;

use crate::support::{
    CAUSAL, Case, Data, Layout, Number, Padding, Pairs, Setup, assert_same_blocks, attend, bits, budget, exact_of, levels,
    select, selected_by, with_problem,
};

const BUDGETS: [(f64, Option<usize>, Option<usize>, usize); 12] = [
    (0.1, None, None, 0),
    (0.5, None, None, 0),
    (1.0, None, None, 1),
    (1.3, None, None, 2),
    // Rounded up at an odd number of rows, and at any number but the multiples of 4.
    (1.5, None, None, 0),
    (1.75, None, None, 0),
    (2.0, None, Some(2), 0),
    (4.0, None, Some(1), 5),
    (f64::INFINITY, None, None, 0),
    (1.0, Some(1), None, 0),
    (1.0, Some(17), None, 3),
    (1.0, Some(usize::MAX), None, 0),
];

fn budgets() -> impl Iterator<Item = Budget> {
    BUDGETS.into_iter().map(|(blocks_per_row, num_blocks, first_blocks, diagonal_blocks)| Budget {
        num_blocks,
        first_blocks,
        diagonal_blocks,
        ..budget(blocks_per_row)
    })
}

fn check<E: Number>(case: &Case, data: &Data) {
    let attention = data.attention(case);
    let expected = attention.exact(&attention.select(&case.budget));
    for level in levels() {
        for layout in [Layout::Contiguous, Layout::TokensFirst] {
            let setup = Setup { layout, ..Setup::new(level) };
            let (selected, _) = selected_by::<E>(case, data, setup);
            assert_same_blocks(&selected, &expected, || format!("{} at {}: {setup:?}, {case:?}", E::NAME, level.name()));
        }
    }
}

/// The same case in both forms.
fn both_forms(case: Case) -> [Case; 2] {
    let pool_queries = false;
    [case.clone(), Case { pool_queries, ..case }]
}

#[test]
fn random_numbers() {
    let paddings = [Padding::None, Padding::Right, Padding::Holes, Padding::Blocks, Padding::All, Padding::Left];
    for (index, budget) in budgets().enumerate() {
        for (block_size, query_len, key_len) in [(1, 20, 33), (4, 30, 61), (16, 39, 17), (128, 300, 263)] {
            let case = Case {
                batch: 2,
                kv_heads: 2,
                group: 1 + index % 2,
                query_len,
                key_len,
                head_dim: [1, 8, 17][index % 3],
                block_size,
                query_padding: paddings[index % 6],
                key_padding: paddings[index / 2 % 6],
                budget: budget.clone(),
                seed: index as u64,
                ..Case::default()
            };
            for case in both_forms(case) {
                check::<f64>(&case, &case.data::<f64>());
            }
        }
    }
}

/// Small integers and powers of two as counts and scale: every type computes without rounding, and most scores are ties.
fn integers(case: &Case, data: &mut Data) {
    let mut rng = case.rng();
    for array in [&mut data.query, &mut data.key] {
        for x in array.iter_mut().filter(|x| x.is_finite()) {
            *x = f64::from(rng.random_range(-1..=1));
        }
    }
}

#[test]
fn ties_go_to_the_lower_block() {
    for (index, budget) in budgets().enumerate() {
        // The last pair has so many blocks that the threshold is guessed from a sample.
        for (block_size, query_len, key_len) in [(1, 20, 33), (4, 32, 60), (16, 48, 32), (1, 129, 131)] {
            let case = Case {
                batch: 2,
                kv_heads: 1,
                group: 2,
                query_len,
                key_len,
                head_dim: 4,
                block_size,
                // Holes of one token leave a count that is no power of two; blocks of one token have count 1.
                key_padding: if block_size == 1 { Padding::Holes } else { Padding::None },
                budget: budget.clone(),
                scale: Some(0.5),
                seed: index as u64,
                ..Case::default()
            };
            let mut data = case.data::<f64>();
            integers(&case, &mut data);
            for case in both_forms(case) {
                check::<f64>(&case, &data);
                check::<f32>(&case, &data);
                check::<bf16>(&case, &data);
                check::<f16>(&case, &data);
            }
        }
    }
}

/// So many blocks that the threshold is guessed from a sample: few and many selected, all equal, all different.
#[test]
fn many_blocks() {
    for num_blocks in [1, 200, 4000, 16_000, 17_000] {
        for scale in [0.0, 1.0] {
            let budget = Budget { num_blocks: Some(num_blocks), ..budget(1.0) };
            let case = Case {
                query_len: 260,
                key_len: 263,
                block_size: 2,
                query_padding: Padding::Right,
                budget,
                scale: Some(scale),
                seed: num_blocks as u64,
                ..Case::default()
            };
            check::<f64>(&case, &case.data::<f64>());
        }
    }
}

/// 128 x 128 blocks are sampled at every fifth one, and those are made the best of their rows: so the threshold that is guessed
/// lets fewer through than are wanted.
#[test]
fn a_sample_that_misleads() {
    let case = Case {
        query_len: 128,
        key_len: 128,
        head_dim: 5,
        block_size: 1,
        budget: budget(64.0),
        scale: Some(1.0),
        ..Case::default()
    };
    let mut data = case.data::<f32>();
    let one_hot = |place: usize, channel: usize| f64::from(u8::from(place % 5 == channel));
    // <q_i, k_j> is 1 where i * 128 + j is a multiple of 5, else 0.
    data.query.indexed_iter_mut().for_each(|((_, _, i, channel), x)| *x = one_hot(2 * i, channel));
    data.key.indexed_iter_mut().for_each(|((_, _, j, channel), x)| *x = one_hot(j, channel));
    check::<f64>(&case, &data);
    check::<f32>(&case, &data);
}

#[test]
fn padding_changes_nothing_on_the_right() {
    let case = Case { query_len: 45, key_len: 37, block_size: 8, seed: 3, ..Case::default() };
    let data = case.data::<f32>();
    let longer = Case { query_len: 64, key_len: 96, ..case.clone() };
    let mut padded = longer.data::<f32>();
    let mask = |length, valid| Some(ndarray::Array2::from_shape_fn((1, length), |(_, t)| t < valid));
    (padded.query_mask, padded.key_mask) = (mask(64, 45), mask(96, 37));
    padded.query.fill(f64::NAN);
    padded.key.fill(f64::NAN);
    padded.query.slice_mut(s![.., .., ..45, ..]).assign(&data.query);
    padded.key.slice_mut(s![.., .., ..37, ..]).assign(&data.key);
    for level in levels() {
        let (alone, _) = selected_by::<f32>(&case, &data, Setup::new(level));
        let (among_padding, _) = selected_by::<f32>(&longer, &padded, Setup::new(level));
        assert_same_blocks(&among_padding, &alone, || level.name().to_owned());
    }
}

/// Every head has a budget of its own: the selection is the one that it makes when all have it.
#[test]
fn budgets_of_heads() {
    let rates = [1.0, 3.4, f64::INFINITY, 0.2];
    for form in both_forms(Case { kv_heads: 2, group: 2, query_len: 50, key_len: 61, ..Case::default() }) {
        let each = Case { budget: Budget { blocks_per_row: rates.to_vec(), ..Budget::default() }, ..form.clone() };
        let data = each.data::<f64>();
        check::<f64>(&each, &data);
        for level in levels() {
            let (together, _) = selected_by::<f64>(&each, &data, Setup::new(level));
            for (h, rate) in rates.into_iter().enumerate() {
                let (alike, _) = selected_by::<f64>(&Case { budget: budget(rate), ..form.clone() }, &data, Setup::new(level));
                let head = |exact: &[Array3<bool>]| vec![exact[0].slice(s![h..=h, .., ..]).to_owned()];
                assert_same_blocks(&head(&together), &head(&alike), || format!("head {h} at {}", level.name()));
            }
        }
    }
}

/// A plan keeps the selected blocks that have valid tokens, and no others.
#[test]
fn plans_leave_out_dead_blocks() {
    let case = Case {
        batch: 2,
        query_len: 30,
        key_len: 70,
        query_padding: Padding::Right,
        key_padding: Padding::Blocks,
        // In the token form a plan has room for no more blocks than the budget asks for.
        budget: budget(18.0),
        ..Case::default()
    };
    for case in both_forms(case) {
        let data = case.data::<f64>();
        let attention = data.attention(&case);
        let all = attention.selection(|_, _, _, _| true);
        let live = attention.exact(&all);
        let count = |exact: &[Array3<bool>]| exact.iter().flatten().filter(|&&x| x).count();
        assert!(count(&live) > 0 && count(&live) < count(&all));
        with_problem(&case, &data, Setup::new(levels()[0]), |problem| {
            let plan = problem.plan_from(|_, _, _, _| true);
            assert_same_blocks(&exact_of(problem, &plan), &live, || format!("{case:?}"));
        });
    }
}

/// Selecting and attending in one call is the same as one after the other, to the bit.
#[test]
fn selecting_on_the_way_changes_nothing() {
    let pairs = [Pairs::All, Pairs::Biased, Pairs::Documents];
    for level in levels() {
        for (mode, window) in
            [Mode::Full, Mode::Sparse].into_iter().flat_map(|mode| [(mode, Window::default()), (mode, CAUSAL)])
        {
            for pairs in pairs {
                let case = Case { query_len: 50, key_len: 77, mode, window, pairs, seed: 5, ..Case::default() };
                let (data, setup) = (case.data::<f32>(), Setup::new(level));
                let plan = select::<f32>(&case, &data, setup);
                with_problem(&case, &data, setup, |problem| {
                    let (out, lse, chosen) = attend::<f32>(problem, &data, None, setup.layout);
                    assert!(chosen == plan, "{}: {case:?}", level.name());
                    let (again, lse_again, _) = attend::<f32>(problem, &data, Some(&plan), setup.layout);
                    assert!(bits(&out) == bits(&again) && bits(&lse) == bits(&lse_again), "{}: {case:?}", level.name());
                });
            }
        }
    }
}
