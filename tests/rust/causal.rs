//! The causal form against the formulas: random shapes, positions, lengths and budgets.

use half::{bf16, f16};
use mra_attention::Mode;
use proptest::prelude::*;

use crate::random::{config, length};
use crate::support::{Case, CausalCase, Layout, Setup, check_causal, check_causal_selection, levels};

/// One position for all batch items or one for each: before the first key, among the keys, behind the last one.
fn offsets(batch: usize, key_len: usize) -> impl Strategy<Value = Vec<i64>> {
    let most = i64::try_from(key_len).expect("a short sequence") + 40;
    let offset = prop_oneof![2 => Just(0), 3 => -60..=most].boxed();
    prop_oneof![offset.clone().prop_map(|offset| vec![offset]), prop::collection::vec(offset, batch)]
}

prop_compose! {
    fn shape()(
        (batch, kv_heads, group) in (length(2), length(2), 1..4usize),
        (query_len, key_len) in (length(90), length(140)),
        (head_dim, value_dim) in (1..40usize, length(40)),
        block_size in prop_oneof![1..20usize, Just(32), Just(64), Just(128)],
        mode in prop_oneof![Just(Mode::Full), Just(Mode::Sparse)],
        scale in prop_oneof![2 => Just(None), 1 => (-0.7..0.7).prop_map(Some)],
        magnitude in prop_oneof![4 => Just(1.0), 1 => Just(20.0)],
        grad_lse in any::<bool>(),
        seed in any::<u64>(),
    ) -> Case {
        Case {
            batch, kv_heads, group, query_len, key_len, head_dim, value_dim, block_size, mode, scale, magnitude, grad_lse, seed,
            ..Case::default()
        }
    }
}

fn case() -> impl Strategy<Value = CausalCase> {
    shape().prop_flat_map(|case| {
        let lengths = prop::collection::vec(0..=case.key_len, case.batch);
        let budget = (1..9usize, prop_oneof![3 => Just(1), 1 => 2..5usize], prop_oneof![2 => Just(0), 1 => 1..4usize]);
        (offsets(case.batch, case.key_len), proptest::option::of(lengths), budget).prop_map(
            move |(offsets, key_lengths, (blocks, local_blocks, first_blocks))| CausalCase {
                case: case.clone(),
                blocks,
                local_blocks,
                first_blocks,
                offsets,
                key_lengths,
            },
        )
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn forward_and_backward(case in case(), threads in 1..4usize, strided in any::<bool>()) {
        let layout = if strided { Layout::TokensFirst } else { Layout::Contiguous };
        let setups = || levels().into_iter().map(|level| Setup { level, threads, layout });
        check_causal::<f64>(&case, setups());
        check_causal::<f32>(&case, setups());
        check_causal::<bf16>(&case, setups());
        check_causal::<f16>(&case, setups());
    }

    #[test]
    fn selection(case in case(), threads in 1..4usize) {
        for level in levels() {
            check_causal_selection(&case, Setup { threads, ..Setup::new(level) });
        }
    }
}
