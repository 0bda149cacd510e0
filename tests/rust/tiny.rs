//! Every path through both forms at sizes that an interpreter can run: CONTRIBUTING.md says how to run these under Miri, which
//! sees reads of memory that nobody has written, accesses out of bounds, and two threads on the same row.

use half::bf16;
use mra_attention::{Budget, Mode};

use crate::support::{
    Case, CausalCase, Expected, Layout, Padding, Pairs, Setup, check, check_causal, check_causal_selection, levels, select,
};

fn setups() -> Vec<Setup> {
    let layouts = [(1, Layout::Contiguous), (2, Layout::TokensFirst)];
    levels().iter().flat_map(|&level| layouts.map(|(threads, layout)| Setup { level, threads, layout })).collect()
}

/// Short last blocks, channels that fill no vector, two query heads for each key head.
fn case(seed: u64) -> Case {
    Case {
        kv_heads: 1,
        group: 2,
        query_len: 7,
        key_len: 10,
        head_dim: 3,
        value_dim: 5,
        block_size: 4,
        budget: Budget { blocks_per_row: 1.5, num_blocks: None, first_blocks: 0, diagonal_blocks: 0 },
        seed,
        ..Case::default()
    }
}

#[test]
fn two_levels() {
    for (mode, padding, pairs) in [
        (Mode::Full, Padding::None, Pairs::All),
        (Mode::Sparse, Padding::Holes, Pairs::All),
        (Mode::Full, Padding::Holes, Pairs::Window),
        (Mode::Full, Padding::None, Pairs::Documents),
    ] {
        let case = Case { mode, key_padding: padding, query_padding: padding, pairs, ..case(1) };
        let (doubles, halves) = (case.data::<f64>(), case.data::<bf16>());
        let (expected, of_halves) = (Expected::new::<f64>(&case, &doubles), Expected::new::<bf16>(&case, &halves));
        for setup in setups() {
            assert_eq!(select::<f64>(&case, &doubles, setup), expected.plan, "{setup:?}, {case:?}");
            check::<f64>(&case, &doubles, &expected, setup);
            check::<bf16>(&case, &halves, &of_halves, setup);
        }
    }
}

#[test]
fn causal() {
    for (mode, offsets, key_lengths) in
        [(Mode::Full, vec![3], None), (Mode::Sparse, vec![0], None), (Mode::Full, vec![-2], Some(vec![6]))]
    {
        let case = Case { mode, ..case(2) };
        let causal = CausalCase { case, blocks: 2, local_blocks: 1, first_blocks: 0, offsets, key_lengths };
        for setup in setups() {
            check_causal_selection(&causal, setup);
        }
        check_causal::<f64>(&causal, setups());
        check_causal::<bf16>(&causal, setups());
    }
}
