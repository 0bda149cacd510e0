//! Every path through both forms at sizes that an interpreter can run: CONTRIBUTING.md says how to run these under Miri, which
//! sees reads of memory that nobody has written, accesses out of bounds, and two threads on the same row.

use half::bf16;
use mra_attention::{Budget, CausalBudget, Mode};

use crate::support::{
    Case, CausalCase, CausalExpected, Expected, Layout, Number, Padding, Pairs, Setup, check, check_causal, levels_for, select,
};

/// One thread; two of them, and rows with gaps between them.
fn setups<E: Number>() -> impl Iterator<Item = Setup> {
    let ways = [(1, Layout::Contiguous), (2, Layout::TokensFirst)];
    levels_for::<E>().into_iter().flat_map(move |level| ways.map(|(threads, layout)| Setup { level, threads, layout }))
}

fn check_two_levels<E: Number>(mode: Mode, padding: Padding, pairs: Pairs) {
    let case = Case {
        group: 2,
        query_len: 6,
        key_len: 7,
        head_dim: 3,
        value_dim: 2,
        mode,
        query_padding: padding,
        key_padding: padding,
        pairs,
        budget: Budget { blocks_per_row: 1.0, num_blocks: None, first_blocks: 0, diagonal_blocks: 0 },
        ..Case::default()
    };
    let data = case.data::<E>();
    let expected = Expected::new::<E>(&case, &data);
    for setup in setups::<E>() {
        check::<E>(&case, &data, &expected, setup);
        assert_eq!(select::<E>(&case, &data, setup), expected.plan, "{setup:?}, {case:?}");
    }
}

#[test]
fn two_levels() {
    check_two_levels::<f64>(Mode::Full, Padding::None, Pairs::All);
    check_two_levels::<f64>(Mode::Sparse, Padding::Holes, Pairs::All);
    check_two_levels::<f64>(Mode::Full, Padding::Holes, Pairs::Window);
    check_two_levels::<bf16>(Mode::Full, Padding::None, Pairs::Documents);
    check_two_levels::<bf16>(Mode::Full, Padding::Holes, Pairs::All);
}

fn check_tiny_causal<E: Number>(mode: Mode, offset: i64, key_length: usize) {
    let case = CausalCase {
        group: 2,
        query_len: 5,
        key_len: 10,
        head_dim: 3,
        value_dim: 2,
        mode,
        offsets: vec![offset],
        key_lengths: vec![key_length],
        budget: CausalBudget { blocks: 2, local_blocks: 1, first_blocks: 0 },
        ..CausalCase::square(10, 3, 2)
    };
    let data = case.data::<E>();
    let expected = CausalExpected::new::<E>(&case, &data);
    setups::<E>().for_each(|setup| check_causal::<E>(&case, &data, &expected, setup));
}

#[test]
fn causal() {
    check_tiny_causal::<f64>(Mode::Full, 5, 10);
    check_tiny_causal::<f64>(Mode::Sparse, -2, 7);
    check_tiny_causal::<bf16>(Mode::Full, 9, 8);
}
