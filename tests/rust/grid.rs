//! Forward and backward against the formulas, over the shapes that break kernels: lengths around multiples of the block, channels
//! that do not fill vectors, values unlike keys, groups of heads, padding of every kind, masks and biases of pairs, and nothing at all.

use half::{bf16, f16};
use mra_attention::{Budget, Coarse, Mode};

use crate::support::{Case, Padding, Pairs, budget, check_all};

/// All pairs of lengths around `block_size`, with everything else varied along.
fn cases(block_size: usize) -> Vec<Case> {
    let mut lengths = vec![1, block_size - 1, block_size, block_size + 1, 2 * block_size + 7];
    lengths.sort_unstable();
    lengths.dedup();
    let pairs = lengths.iter().flat_map(|&query_len| lengths.iter().map(move |&key_len| (query_len, key_len)));
    pairs.enumerate().map(|(index, (query_len, key_len))| case(index, block_size, query_len, key_len)).collect()
}

fn case(index: usize, block_size: usize, query_len: usize, key_len: usize) -> Case {
    let channels = [(1, 3), (8, 8), (17, 5), (64, 64), (80, 33), (5, 1)];
    let heads = [(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 1, 1), (2, 2, 1)];
    let paddings = [Padding::None, Padding::Holes, Padding::Right, Padding::Left, Padding::Blocks, Padding::All, Padding::None];
    let pairs = [Pairs::All, Pairs::Window, Pairs::Biased, Pairs::Documents, Pairs::Keys];
    let budgets = [
        (1.0, None, None, 0),
        (2.0, None, Some(1), 0),
        (1.5, None, None, 3),
        (f64::INFINITY, None, None, 0),
        (1.0, Some(5), Some(0), 1),
    ];
    let (batch, kv_heads, group) = heads[index % heads.len()];
    let (head_dim, value_dim) = channels[index % channels.len()];
    let (blocks_per_row, num_blocks, first_blocks, diagonal_blocks) = budgets[index / 2 % budgets.len()];
    Case {
        batch,
        kv_heads,
        group,
        query_len,
        key_len,
        head_dim,
        value_dim,
        block_size,
        mode: if index % 3 == 2 { Mode::Sparse } else { Mode::Full },
        coarse: if index.is_multiple_of(2) { Coarse::Mean } else { Coarse::FirstOrder },
        query_padding: paddings[index % paddings.len()],
        key_padding: paddings[index / 3 % paddings.len()],
        pairs: pairs[index / heads.len() % pairs.len()],
        budget: Budget { num_blocks, first_blocks, diagonal_blocks, ..budget(blocks_per_row) },
        scale: [None, None, Some(-0.3), Some(0.0)][index % 4],
        grad_lse: index.is_multiple_of(2),
        softcap: (index % 7 == 3).then_some(0.8),
        alibi: index % 5 == 2,
        sinks: index % 4 == 1,
        seed: index as u64,
        ..Case::default()
    }
}

macro_rules! grids {
    ($($name:ident: $block_size:literal),+) => {
        $(mod $name {
            #[test]
            fn float64() {
                crate::support::check_all::<f64>(&super::cases($block_size));
            }
            #[test]
            fn float32() {
                crate::support::check_all::<f32>(&super::cases($block_size));
            }
        })+
    };
}

grids!(blocks_of_1: 1, blocks_of_8: 8, blocks_of_16: 16, blocks_of_32: 32, blocks_of_64: 64, blocks_of_128: 128);

#[test]
fn bfloat16() {
    check_all::<bf16>(&cases(8));
    check_all::<bf16>(&cases(32));
}

#[test]
fn float16() {
    check_all::<f16>(&cases(8));
    check_all::<f16>(&cases(32));
}

/// More blocks and keys than one strip of the softmax takes, at both levels.
#[test]
fn many_strips() {
    let long = |block_size, query_len, key_len, mode| Case {
        query_len,
        key_len,
        block_size,
        mode,
        head_dim: 16,
        value_dim: 12,
        key_padding: Padding::Holes,
        budget: budget(40.0),
        seed: 7,
        ..Case::default()
    };
    let cases = [long(2, 150, 700, Mode::Full), long(8, 65, 801, Mode::Full), long(100, 130, 450, Mode::Sparse)];
    let expanded = cases.clone().map(|case| Case { coarse: Coarse::FirstOrder, ..case });
    let cases = [cases, expanded].concat();
    check_all::<f64>(&cases);
    check_all::<f32>(&cases);
}

/// Dimensions of size 0: nothing is read, and what there is to write is 0, or `-inf` for the lse.
#[test]
fn empty_dimensions() {
    let full = Case { batch: 2, kv_heads: 2, group: 2, query_len: 9, key_len: 11, ..Case::default() };
    for mode in [Mode::Full, Mode::Sparse] {
        let full = Case { mode, ..full.clone() };
        let cases = [
            Case { batch: 0, ..full.clone() },
            Case { batch: 0, key_padding: Padding::Holes, query_padding: Padding::Holes, ..full.clone() },
            Case { kv_heads: 0, ..full.clone() },
            Case { query_len: 0, ..full.clone() },
            Case { key_len: 0, ..full.clone() },
            Case { query_len: 0, key_len: 0, key_padding: Padding::Right, ..full.clone() },
            Case { value_dim: 0, ..full.clone() },
        ];
        check_all::<f64>(&cases);
        check_all::<f32>(&cases);
        check_all::<bf16>(&cases);
    }
}

/// Key heads that no query head reads: their gradients are 0.
#[test]
fn no_query_heads() {
    for mode in [Mode::Full, Mode::Sparse] {
        let case = Case { kv_heads: 2, group: 0, mode, ..Case::default() };
        check_all::<f32>(&[case]);
    }
}
