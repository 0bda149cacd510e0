//! Random shapes, masks and budgets against the formulas.

use half::{bf16, f16};
use mra_attention::{Budget, CausalBudget, Mode};
use proptest::prelude::*;

use crate::support::{
    Case, CausalCase, CausalExpected, Expected, Layout, Number, Padding, Pairs, Setup, check, check_causal, levels, levels_for,
    select,
};

/// `PROPTEST_CASES` in the environment, or few enough for every day.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { 96 };
    // Failures are reported with the smallest case; there is no file to keep.
    ProptestConfig { cases, failure_persistence: None, ..default }
}

fn padding() -> impl Strategy<Value = Padding> {
    prop_oneof![
        3 => Just(Padding::None),
        2 => Just(Padding::Right),
        3 => Just(Padding::Holes),
        2 => Just(Padding::Blocks),
        1 => Just(Padding::All),
    ]
}

fn pairs() -> impl Strategy<Value = Pairs> {
    prop_oneof![
        4 => Just(Pairs::All),
        1 => Just(Pairs::Window),
        1 => Just(Pairs::Holes),
        1 => Just(Pairs::Biased),
        1 => Just(Pairs::Documents),
    ]
}

fn budget() -> impl Strategy<Value = Budget> {
    (0.01..9.0, proptest::option::weighted(0.2, 1..60usize), 0..3usize, 0..6usize).prop_map(
        |(blocks_per_row, num_blocks, first_blocks, diagonal_blocks)| Budget {
            blocks_per_row,
            num_blocks,
            first_blocks,
            diagonal_blocks,
        },
    )
}

/// Some number up to `most`, and now and then 0.
fn length(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0), 30 => 1..=most]
}

prop_compose! {
    fn case()(
        (batch, kv_heads, group) in (length(2), length(2), 1..4usize),
        (query_len, key_len) in (length(90), length(140)),
        (head_dim, value_dim) in (1..40usize, length(40)),
        block_size in prop_oneof![1..20usize, Just(32), Just(64), Just(128)],
        mode in prop_oneof![Just(Mode::Full), Just(Mode::Sparse)],
        (query_padding, key_padding, pairs) in (padding(), padding(), pairs()),
        budget in budget(),
        scale in prop_oneof![2 => Just(None), 1 => (-0.7..0.7).prop_map(Some)],
        magnitude in prop_oneof![4 => Just(1.0), 1 => Just(20.0)],
        grad_lse in any::<bool>(),
        seed in any::<u64>(),
    ) -> Case {
        Case {
            batch, kv_heads, group, query_len, key_len, head_dim, value_dim, block_size, mode, query_padding, key_padding, pairs,
            budget, scale, magnitude, grad_lse, equal_heads: false, seed,
        }
    }
}

/// Positions before the first key, among the keys and behind the last one, and lengths of which some are 0.
fn placed(case: CausalCase) -> impl Strategy<Value = CausalCase> {
    let most = i64::try_from(case.key_len).expect("a short sequence");
    let offset = prop_oneof![2 => Just(0), 1 => Just(most - 1), 3 => -60..=most + 40];
    let key_length = prop_oneof![1 => Just(case.key_len), 1 => 0..=case.key_len];
    let placed = (proptest::collection::vec(offset, case.batch), proptest::collection::vec(key_length, case.batch));
    placed.prop_map(move |(offsets, key_lengths)| CausalCase { offsets, key_lengths, ..case.clone() })
}

prop_compose! {
    fn causal_case()(
        (batch, kv_heads, group) in (length(2), length(2), 1..4usize),
        (query_len, key_len) in (length(90), length(140)),
        (head_dim, value_dim) in (1..40usize, length(40)),
        block_size in prop_oneof![1..20usize, Just(32), Just(64), Just(128)],
        mode in prop_oneof![Just(Mode::Full), Just(Mode::Sparse)],
        (blocks, local_blocks, first_blocks) in (1..9usize, 1..4usize, 0..3usize),
        scale in prop_oneof![2 => Just(None), 1 => (-0.7..0.7).prop_map(Some), 1 => Just(Some(8.0))],
        grad_lse in any::<bool>(),
        seed in any::<u64>(),
    )(
        case in placed(CausalCase {
            batch, kv_heads, group, query_len, key_len, head_dim, value_dim, block_size, mode, offsets: vec![], key_lengths: vec![],
            budget: CausalBudget { blocks, local_blocks, first_blocks }, scale, dropout: 0.0, grad_lse, seed,
        })
    ) -> CausalCase {
        case
    }
}

fn check_causal_type<E: Number>(case: &CausalCase, threads: usize, layout: Layout) {
    let data = case.data::<E>();
    let expected = CausalExpected::new::<E>(case, &data);
    for level in levels() {
        check_causal::<E>(case, &data, &expected, Setup { level, threads, layout });
    }
}

fn check_type<E: Number>(case: &Case, threads: usize, layout: Layout) {
    let data = case.data::<E>();
    let expected = Expected::new::<E>(case, &data);
    for level in levels_for::<E>() {
        check::<E>(case, &data, &expected, Setup { level, threads, layout });
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn forward_and_backward(case in case(), threads in 1..4usize, strided in any::<bool>()) {
        let layout = if strided { Layout::TokensFirst } else { Layout::Contiguous };
        check_type::<f64>(&case, threads, layout);
        check_type::<f32>(&case, threads, layout);
        check_type::<bf16>(&case, threads, layout);
        check_type::<f16>(&case, threads, layout);
    }

    #[test]
    fn causal(case in causal_case(), threads in 1..4usize, strided in any::<bool>()) {
        let layout = if strided { Layout::TokensFirst } else { Layout::Contiguous };
        check_causal_type::<f64>(&case, threads, layout);
        check_causal_type::<f32>(&case, threads, layout);
        check_causal_type::<bf16>(&case, threads, layout);
        check_causal_type::<f16>(&case, threads, layout);
    }

    #[test]
    fn selection(case in case(), threads in 1..4usize) {
        let data = case.data::<f64>();
        let expected = data.attention(&case).select(&case.budget);
        for level in levels() {
            let selected = select::<f64>(&case, &data, Setup { threads, ..Setup::new(level) });
            prop_assert_eq!(&selected, &expected, "at {}", level.name());
        }
    }
}
