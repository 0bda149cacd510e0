//! Every path through both forms at sizes that an interpreter can run: CONTRIBUTING.md says how to run these under Miri, which
//! sees reads of memory that nobody has written, accesses out of bounds, and two threads on the same row.

use half::bf16;
use mra_attention::{Coarse, Mode, Window};

use crate::support::{
    CAUSAL, Case, Expected, Layout, Number, Padding, Pairs, Setup, assert_same_blocks, budget, check, levels_for, selected_by,
};

/// One thread; two of them, and rows with gaps between them.
fn setups<E: Number>() -> impl Iterator<Item = Setup> {
    let ways = [(1, Layout::Contiguous), (2, Layout::TokensFirst)];
    levels_for::<E>().into_iter().flat_map(move |level| ways.map(|(threads, layout)| Setup { level, threads, layout }))
}

fn check_block_form<E: Number>(mode: Mode, coarse: Coarse, padding: Padding, pairs: Pairs) {
    let case = Case {
        group: 2,
        query_len: 6,
        key_len: 7,
        head_dim: 3,
        value_dim: 2,
        mode,
        coarse,
        query_padding: padding,
        key_padding: padding,
        pairs,
        budget: budget(1.0),
        ..Case::default()
    };
    let data = case.data::<E>();
    let expected = Expected::new::<E>(&case, &data);
    let exact = data.attention(&case).exact(&expected.selected);
    for setup in setups::<E>() {
        check::<E>(&case, &data, &expected, setup);
        let (selected, _) = selected_by::<E>(&case, &data, setup);
        assert_same_blocks(&selected, &exact, || format!("{setup:?}, {case:?}"));
    }
}

#[test]
fn block_form() {
    check_block_form::<f64>(Mode::Full, Coarse::Mean, Padding::None, Pairs::All);
    check_block_form::<f64>(Mode::Sparse, Coarse::Mean, Padding::Holes, Pairs::All);
    check_block_form::<f64>(Mode::Full, Coarse::Mean, Padding::Holes, Pairs::Biased);
    check_block_form::<bf16>(Mode::Full, Coarse::Mean, Padding::None, Pairs::Biased);
    check_block_form::<bf16>(Mode::Full, Coarse::Mean, Padding::Holes, Pairs::All);
    check_block_form::<f64>(Mode::Full, Coarse::FirstOrder, Padding::None, Pairs::Biased);
    check_block_form::<bf16>(Mode::Full, Coarse::FirstOrder, Padding::Holes, Pairs::All);
}

fn check_token_form<E: Number>(mode: Mode, window: Window, pairs: Pairs, offset: i64, key_length: usize) {
    let case = Case {
        group: 2,
        query_len: 5,
        head_dim: 3,
        value_dim: 2,
        mode,
        window,
        pairs,
        offsets: vec![offset],
        key_lengths: (key_length < 10).then(|| vec![key_length]),
        ..Case::causal(10, 3, 2)
    };
    let data = case.data::<E>();
    let expected = Expected::new::<E>(&case, &data);
    setups::<E>().for_each(|setup| check::<E>(&case, &data, &expected, setup));
}

#[test]
fn token_form() {
    check_token_form::<f64>(Mode::Full, CAUSAL, Pairs::All, 5, 10);
    check_token_form::<f64>(Mode::Sparse, CAUSAL, Pairs::All, -2, 7);
    check_token_form::<bf16>(Mode::Full, CAUSAL, Pairs::All, 9, 8);
    check_token_form::<f64>(Mode::Full, Window { left: Some(2), right: Some(1) }, Pairs::All, 1, 10);
    check_token_form::<f64>(Mode::Full, Window::default(), Pairs::Documents, 0, 10);
    check_token_form::<bf16>(Mode::Sparse, Window::default(), Pairs::Window, 0, 10);
}
