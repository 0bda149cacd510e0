//! Which blocks are selected, against the formulas.

use half::{bf16, f16};
use mra_attention::{Budget, Inputs, Options, Plan, Problem, forward, forward_selecting};
use ndarray::Array4;
use proptest::prelude::RngExt;

use crate::support::{Case, Data, Layout, Number, Padding, Setup, Stored, levels, options, plan_bits, select};

const BUDGETS: [(f64, Option<usize>, usize, usize); 12] = [
    (0.1, None, 0, 0),
    (0.5, None, 0, 0),
    (1.0, None, 0, 1),
    (1.3, None, 0, 2),
    // Rounded up at an odd number of rows, and at any number but the multiples of 4.
    (1.5, None, 0, 0),
    (1.75, None, 0, 0),
    (2.0, None, 2, 0),
    (4.0, None, 1, 5),
    (1e9, None, 0, 0),
    (1.0, Some(1), 0, 0),
    (1.0, Some(17), 0, 3),
    (1.0, Some(usize::MAX), 0, 0),
];

fn budgets() -> impl Iterator<Item = Budget> {
    BUDGETS.into_iter().map(|(blocks_per_row, num_blocks, first_blocks, diagonal_blocks)| Budget {
        blocks_per_row,
        num_blocks,
        first_blocks,
        diagonal_blocks,
    })
}

fn check<E: Number>(case: &Case, data: &Data) {
    let expected = data.attention(case).select(&case.budget);
    for level in levels() {
        for layout in [Layout::Contiguous, Layout::TokensFirst] {
            let setup = Setup { layout, ..Setup::new(level) };
            let selected = select::<E>(case, data, setup);
            let different: Vec<_> =
                selected.indexed_iter().zip(&expected).filter(|((_, a), b)| a != b).map(|((at, _), _)| at).collect();
            assert!(
                different.is_empty(),
                "{} at {}: {} blocks differ, the first at {:?}: {setup:?}, {case:?}",
                E::NAME,
                level.name(),
                different.len(),
                different[0]
            );
        }
    }
}

#[test]
fn random_numbers() {
    let paddings = [Padding::None, Padding::Right, Padding::Holes, Padding::Blocks, Padding::All];
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
                query_padding: paddings[index % 5],
                key_padding: paddings[index / 2 % 5],
                budget,
                seed: index as u64,
                ..Case::default()
            };
            check::<f64>(&case, &case.data::<f64>());
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
                budget,
                scale: Some(0.5),
                seed: index as u64,
                ..Case::default()
            };
            let mut data = case.data::<f64>();
            integers(&case, &mut data);
            check::<f64>(&case, &data);
            check::<f32>(&case, &data);
            check::<bf16>(&case, &data);
            check::<f16>(&case, &data);
        }
    }
}

/// So many blocks that the threshold is guessed from a sample: few and many selected, all equal, all different.
#[test]
fn many_blocks() {
    for num_blocks in [1, 200, 4000, 16_000, 17_000] {
        for scale in [0.0, 1.0] {
            let budget = Budget { blocks_per_row: 1.0, num_blocks: Some(num_blocks), first_blocks: 0, diagonal_blocks: 0 };
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
    let budget = Budget { blocks_per_row: 64.0, num_blocks: None, first_blocks: 0, diagonal_blocks: 0 };
    let case = Case { query_len: 128, key_len: 128, head_dim: 5, block_size: 1, budget, scale: Some(1.0), ..Case::default() };
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
    padded.query.slice_mut(ndarray::s![.., .., ..45, ..]).assign(&data.query);
    padded.key.slice_mut(ndarray::s![.., .., ..37, ..]).assign(&data.key);
    for level in levels() {
        let alone = select::<f32>(&case, &data, Setup::new(level));
        let among_padding = select::<f32>(&longer, &padded, Setup::new(level));
        let (nq, nk) = (alone.dim().2, alone.dim().3);
        assert_eq!(among_padding.slice(ndarray::s![.., .., ..nq, ..nk]), alone, "{}", level.name());
        assert_eq!(among_padding.iter().filter(|&&x| x).count(), alone.iter().filter(|&&x| x).count(), "{}", level.name());
    }
}

/// The plan keeps the selected blocks that have valid tokens, and no others.
#[test]
fn plans_leave_out_dead_blocks() {
    let case = Case {
        batch: 2,
        query_len: 30,
        key_len: 70,
        query_padding: Padding::Right,
        key_padding: Padding::Blocks,
        ..Case::default()
    };
    let data = case.data::<f64>();
    let valid = |mask: &Option<ndarray::Array2<bool>>, b: usize, block: usize| {
        mask.as_ref().unwrap().row(b).iter().skip(block * case.block_size).take(case.block_size).any(|&valid| valid)
    };
    let all = Array4::from_elem((2, 1, 8, 18), true);
    let live =
        all.indexed_iter().filter(|&((b, _, i, j), _)| valid(&data.query_mask, b, i) && valid(&data.key_mask, b, j)).count();
    assert!(live > 0 && live < all.len());
    let bytes = |mask: &Option<ndarray::Array2<bool>>| mask.as_ref().unwrap().iter().map(|&x| u8::from(x)).collect::<Vec<_>>();
    let (query_valid, key_valid) = (bytes(&data.query_mask), bytes(&data.key_mask));
    let mask = |name: &str, bytes, length| Some(mra_attention::Mask::new(name, bytes, [2, length], [length, 1]).unwrap());
    let options =
        Options { query_mask: mask("query_mask", &query_valid, 30), key_mask: mask("key_mask", &key_valid, 70), ..options() };
    let problem = Problem::new([2, 1, 30, 8], [2, 1, 70, 8], &options).unwrap();
    assert_eq!(Plan::from_bits(&problem, &plan_bits(all.view())).unwrap().num_blocks(), live);
    assert_eq!(Plan::from_bits(&problem, &vec![0xff; plan_bits(all.view()).len()]).unwrap().num_blocks(), live);
}

/// Selecting and attending in one call is the same as one after the other, to the bit.
#[test]
fn selecting_on_the_way_changes_nothing() {
    for level in levels() {
        for mode in [mra_attention::Mode::Full, mra_attention::Mode::Sparse] {
            let case = Case { query_len: 50, key_len: 77, mode, seed: 5, ..Case::default() };
            let data = case.data::<f32>();
            let selected = select::<f32>(&case, &data, Setup::new(level));
            let stored =
                [&data.query, &data.key, &data.value].map(|array| Stored::<f32>::new(array.view(), Layout::Contiguous));
            let inputs =
                Inputs { query: stored[0].tensor("query"), key: stored[1].tensor("key"), value: stored[2].tensor("value") };
            let options = Options { level, mode, ..options() };
            let problem = Problem::new([1, 1, 50, 8], [1, 1, 77, 8], &options).unwrap();
            let unset = || {
                (
                    Stored::<f32>::unset((1, 1, 50, 8), Layout::Contiguous),
                    Stored::<f32>::unset((1, 1, 50, 1), Layout::Contiguous),
                )
            };
            let ((mut out, mut lse), (mut other_out, mut other_lse)) = (unset(), unset());
            let mut bits = vec![0xff; plan_bits(selected.view()).len()];
            let (mut to, mut lse_to) = (out.tensor_mut("out"), lse.tensor_mut("lse"));
            forward_selecting(&problem, &inputs, &case.budget, &mut bits, &mut to, &mut lse_to).unwrap();
            assert_eq!(bits, plan_bits(selected.view()), "{}", level.name());
            let plan = Plan::from_bits(&problem, &bits).unwrap();
            forward(&problem, &inputs, &plan, &mut other_out.tensor_mut("out"), &mut other_lse.tensor_mut("lse")).unwrap();
            assert_eq!(out.read(), other_out.read(), "{}", level.name());
            assert_eq!(lse.read(), other_lse.read(), "{}", level.name());
        }
    }
}
