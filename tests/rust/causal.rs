//! The causal form against the formulas: lengths around multiples of the block, offsets before, within and behind the keys,
//! channels that do not fill vectors, groups of heads, sequences of different lengths, and nothing at all.

use half::{bf16, f16};
use mra_attention::{CausalBudget, Mode};

use crate::support::{CausalCase, CausalExpected, Layout, Number, Setup, check_causal, levels};

/// All pairs of lengths around `block_size`, with everything else varied along.
fn cases(block_size: usize) -> Vec<CausalCase> {
    let mut lengths = vec![1, block_size - 1, block_size, block_size + 1, 3 * block_size + 7];
    lengths.sort_unstable();
    lengths.dedup();
    let pairs = lengths.iter().flat_map(|&query_len| lengths.iter().map(move |&key_len| (query_len, key_len)));
    pairs.enumerate().map(|(index, (query_len, key_len))| case(index, block_size, query_len, key_len)).collect()
}

fn case(index: usize, block_size: usize, query_len: usize, key_len: usize) -> CausalCase {
    let (batch, kv_heads, group) = [(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 1, 1), (2, 2, 1)][index % 5];
    let (head_dim, value_dim) = [(1, 3), (8, 8), (17, 5), (64, 64), (40, 33), (5, 1)][index % 6];
    let (blocks, local_blocks, first_blocks) =
        [(1, 1, 0), (2, 1, 0), (3, 2, 0), (2, 1, 1), (100, 1, 0), (1, 3, 2)][index / 2 % 6];
    let (lq, lk, b) = (query_len.cast_signed() as i64, key_len.cast_signed() as i64, block_size.cast_signed() as i64);
    let offset = [0, lk - lq, -3, b / 2 + 1, lk, 5 * b, i64::MIN, i64::MAX / 2][index % 8];
    CausalCase {
        batch,
        kv_heads,
        group,
        query_len,
        key_len,
        head_dim,
        value_dim,
        mode: if index % 3 == 2 { Mode::Sparse } else { Mode::Full },
        offsets: (0..batch).map(|item| offset.saturating_add(item.cast_signed() as i64)).collect(),
        key_lengths: (0..batch).map(|item| key_len.saturating_sub(item * (block_size / 2 + 1))).collect(),
        budget: CausalBudget { blocks, local_blocks, first_blocks },
        scale: [None, None, Some(-0.3), Some(0.5)][index % 4],
        grad_lse: index.is_multiple_of(2),
        seed: index as u64,
        ..CausalCase::square(query_len, block_size, blocks)
    }
}

fn check_all<E: Number>(cases: &[CausalCase]) {
    for (index, case) in cases.iter().enumerate() {
        let data = case.data::<E>();
        let expected = CausalExpected::new::<E>(case, &data);
        for level in levels() {
            let layout = if index % 2 == 0 { Layout::Contiguous } else { Layout::TokensFirst };
            check_causal::<E>(case, &data, &expected, Setup { layout, ..Setup::new(level) });
        }
    }
}

macro_rules! grids {
    ($($name:ident: $block_size:literal),+) => {
        $(mod $name {
            #[test]
            fn float64() {
                super::check_all::<f64>(&super::cases($block_size));
            }
            #[test]
            fn float32() {
                super::check_all::<f32>(&super::cases($block_size));
            }
        })+
    };
}

grids!(blocks_of_1: 1, blocks_of_4: 4, blocks_of_12: 12, blocks_of_32: 32, blocks_of_64: 64, blocks_of_128: 128);

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

/// More blocks than one strip of the softmax takes, and every number of chosen blocks that has a way of its own to be found.
#[test]
fn many_blocks() {
    let mut cases = Vec::new();
    for (block_size, length, blocks) in [(2, 701, 4), (2, 420, 7), (4, 380, 14), (4, 380, 31), (4, 380, 50), (4, 380, 200)] {
        for mode in [Mode::Full, Mode::Sparse] {
            let square = CausalCase::square(length, block_size, blocks);
            cases.push(CausalCase { mode, seed: blocks as u64, ..square });
        }
    }
    check_all::<f64>(&cases);
    check_all::<f32>(&cases);
}

/// Dimensions of size 0: nothing is read, and what there is to write is 0, or `-inf` for the lse.
#[test]
fn empty_dimensions() {
    for mode in [Mode::Full, Mode::Sparse] {
        let full = CausalCase { kv_heads: 2, group: 2, mode, ..CausalCase::square(9, 4, 2) };
        let cases = [
            CausalCase { batch: 0, offsets: vec![], key_lengths: vec![], ..full.clone() },
            CausalCase { kv_heads: 0, ..full.clone() },
            CausalCase { group: 0, ..full.clone() },
            CausalCase { query_len: 0, ..full.clone() },
            CausalCase { key_lengths: vec![0], ..full.clone() },
            CausalCase { key_len: 0, key_lengths: vec![0], ..full.clone() },
            CausalCase { value_dim: 0, ..full.clone() },
        ];
        check_all::<f64>(&cases);
        check_all::<f32>(&cases);
        check_all::<bf16>(&cases);
    }
}
