//! Random shapes, masks and budgets against the formulas.

use half::{bf16, f16};
use mra_attention::{Budget, Coarse, Mode, Score, Window};
use proptest::prelude::*;

use crate::support::{
    Case, Expected, Layout, Number, Padding, Pairs, Setup, assert_same_blocks, check, levels, levels_for, selected_by,
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
        2 => Just(Padding::Left),
        3 => Just(Padding::Holes),
        2 => Just(Padding::Blocks),
        1 => Just(Padding::All),
    ]
}

fn pairs() -> impl Strategy<Value = Pairs> {
    prop_oneof![
        4 => Just(Pairs::All),
        1 => Just(Pairs::Window),
        1 => Just(Pairs::Causal),
        1 => Just(Pairs::Keys),
        1 => Just(Pairs::Holes),
        1 => Just(Pairs::Biased),
        1 => Just(Pairs::Documents),
    ]
}

fn window() -> impl Strategy<Value = Window> {
    let limit = || proptest::option::weighted(0.7, 0..60usize);
    prop_oneof![
        3 => Just(Window::default()),
        2 => Just(Window { left: None, right: Some(0) }),
        2 => (limit(), limit()).prop_map(|(left, right)| Window { left, right }),
    ]
}

/// One number for all heads or one for each, some of which ask for every block.
fn rates(heads: usize) -> impl Strategy<Value = Vec<f64>> {
    let rate = || prop_oneof![8 => 0.01..9.0, 1 => Just(f64::INFINITY)];
    prop_oneof![3 => proptest::collection::vec(rate(), 1), 1 => proptest::collection::vec(rate(), heads.max(1))]
}

/// Some number up to `most`, and now and then 0.
fn length(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0), 30 => 1..=most]
}

/// Budgets, and positions before the first key, among the keys and behind the last one, with lengths of which some are 0.
fn placed(case: Case) -> impl Strategy<Value = Case> {
    let most = i64::try_from(case.key_len).expect("a short sequence");
    let offset = prop_oneof![4 => Just(0), 1 => Just(most - 1), 3 => -60..=most + 40];
    let key_length = prop_oneof![1 => Just(case.key_len), 1 => 0..=case.key_len];
    let offsets = proptest::collection::vec(offset, case.batch.max(1));
    let lengths = proptest::option::weighted(0.3, proptest::collection::vec(key_length, case.batch));
    let forced = (proptest::option::of(0..3usize), 0..6usize, 1..4usize);
    let budget = (rates(case.heads()), proptest::option::weighted(0.2, 1..60usize), forced);
    (offsets, lengths, budget).prop_map(move |(offsets, key_lengths, (blocks_per_row, num_blocks, forced))| {
        let (first_blocks, diagonal_blocks, local_blocks) = forced;
        let budget = Budget { blocks_per_row, num_blocks, first_blocks, diagonal_blocks, local_blocks };
        // A length per item is what a cache has, which has no padding beside it.
        let padded = case.key_padding != Padding::None || case.pairs != Pairs::All;
        Case { offsets, key_lengths: key_lengths.filter(|_| !padded), budget, ..case.clone() }
    })
}

prop_compose! {
    fn case()(
        (batch, kv_heads, group) in (length(2), length(2), 1..4usize),
        (query_len, key_len) in prop_oneof![
            2 => (length(90), length(140)),
            1 => length(90).prop_map(|length| (length, length)),
        ],
        (head_dim, value_dim) in (1..40usize, length(40)),
        block_size in prop_oneof![1..20usize, Just(32), Just(64), Just(128)],
        (mode, coarse, coarse_shift, score) in (
            prop_oneof![Just(Mode::Full), Just(Mode::Sparse)],
            prop_oneof![Just(Coarse::Mean), Just(Coarse::FirstOrder)],
            prop_oneof![2 => Just(0.0), 1 => -1.0..1.5],
            prop_oneof![Just(Score::Mean), Just(Score::Max)],
        ),
        (query_padding, key_padding, pairs) in (padding(), padding(), pairs()),
        (window, pool_queries) in (window(), prop_oneof![4 => Just(true), 1 => Just(false)]),
        (softcap, alibi, sinks) in (proptest::option::weighted(0.2, 10.0..40.0), proptest::bool::weighted(0.2), proptest::bool::weighted(0.2)),
        scale in prop_oneof![2 => Just(None), 1 => (-0.7..0.7).prop_map(Some)],
        magnitude in prop_oneof![4 => Just(1.0), 1 => Just(20.0)],
        grad_lse in any::<bool>(),
        seed in any::<u64>(),
    )(
        case in placed(Case {
            batch, kv_heads, group, query_len, key_len, head_dim, value_dim, block_size, mode, coarse, coarse_shift, score, window, pool_queries,
            query_padding,
            key_padding, pairs, softcap, alibi, sinks, scale, magnitude, grad_lse, seed, ..Case::default()
        })
    ) -> Case {
        case
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
    fn selection(case in case(), threads in 1..4usize) {
        let data = case.data::<f64>();
        let attention = data.attention(&case);
        let expected = attention.exact(&attention.select(&case.budget));
        for level in levels() {
            let (selected, _) = selected_by::<f64>(&case, &data, Setup { threads, ..Setup::new(level) });
            assert_same_blocks(&selected, &expected, || format!("at {}: {case:?}", level.name()));
        }
    }
}
