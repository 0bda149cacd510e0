//! The token form against the formulas, whatever hides a pair: causal, windows, masks, padding beside them. Lengths around multiples
//! of the block, offsets before, within and behind the keys, channels that do not fill vectors, groups of heads, sequences of
//! different lengths, and nothing at all.

use half::{bf16, f16};
use mra_attention::{Budget, Mode, Score, Window};

use crate::support::{CAUSAL, Case, Padding, Pairs, budget, check_all};

/// What hides pairs, one after the other: a window, a mask, padding of queries and of keys, and whether queries may be pooled.
const HIDING: [(Window, Pairs, Padding, Padding, bool); 12] = [
    (CAUSAL, Pairs::All, Padding::None, Padding::None, true),
    (window(5, 3), Pairs::All, Padding::None, Padding::None, true),
    (CAUSAL, Pairs::All, Padding::None, Padding::Left, true),
    (window(9, 0), Pairs::All, Padding::Holes, Padding::Right, true),
    (NOTHING, Pairs::All, Padding::None, Padding::None, false),
    (NOTHING, Pairs::Causal, Padding::None, Padding::None, true),
    (NOTHING, Pairs::Window, Padding::None, Padding::Holes, true),
    (CAUSAL, Pairs::Documents, Padding::None, Padding::None, true),
    (NOTHING, Pairs::Holes, Padding::Right, Padding::None, true),
    (window(20, 20), Pairs::Biased, Padding::None, Padding::Blocks, true),
    (CAUSAL, Pairs::All, Padding::Left, Padding::Left, true),
    (NOTHING, Pairs::Biased, Padding::Blocks, Padding::None, false),
];
const NOTHING: Window = Window { left: None, right: None };

const fn window(left: usize, right: usize) -> Window {
    Window { left: Some(left), right: Some(right) }
}

/// All pairs of lengths around `block_size`, with everything else varied along.
fn cases(block_size: usize) -> Vec<Case> {
    let mut lengths = vec![1, block_size - 1, block_size, block_size + 1, 3 * block_size + 7];
    lengths.sort_unstable();
    lengths.dedup();
    let pairs = lengths.iter().flat_map(|&query_len| lengths.iter().map(move |&key_len| (query_len, key_len)));
    pairs.enumerate().map(|(index, (query_len, key_len))| case(index, block_size, query_len, key_len)).collect()
}

fn case(index: usize, block_size: usize, query_len: usize, key_len: usize) -> Case {
    let (batch, kv_heads, group) = [(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 1, 1), (2, 2, 1)][index % 5];
    let (head_dim, value_dim) = [(1, 3), (8, 8), (17, 5), (64, 64), (40, 33), (5, 1)][index % 6];
    let (blocks, local_blocks, first_blocks, diagonal_blocks) = [
        (1.0, 1, None, 0),
        (2.0, 1, Some(0), 0),
        (3.0, 2, None, 0),
        (2.0, 1, Some(2), 3),
        (f64::INFINITY, 1, None, 0),
        (1.0, 3, Some(2), 0),
    ][index / 2 % 6];
    let (lq, lk, b) = (query_len.cast_signed() as i64, key_len.cast_signed() as i64, block_size.cast_signed() as i64);
    let offset = [0, lk - lq, -3, b / 2 + 1, lk, 5 * b, i64::MIN, i64::MAX / 2][index % 8];
    let (window, pairs, query_padding, key_padding, pool_queries) = HIDING[index % HIDING.len()];
    // Heads that share keys may have unlike budgets.
    let blocks_per_row = if index % 4 == 3 { (0..kv_heads * group).map(|h| blocks + h as f64).collect() } else { vec![blocks] };
    let lengths = (0..batch).map(|item| key_len.saturating_sub(item * (block_size / 2 + 1))).collect();
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
        coarse_shift: [0.0, 0.8, 0.0, -1.5][index % 4],
        score: if index % 2 == 1 { Score::Max } else { Score::Mean },
        window,
        offsets: (0..batch).map(|item| offset.saturating_add(item.cast_signed() as i64)).collect(),
        key_lengths: (key_padding == Padding::None && pairs == Pairs::All && pool_queries).then_some(lengths),
        pool_queries,
        query_padding,
        key_padding,
        pairs,
        budget: Budget { blocks_per_row, first_blocks, diagonal_blocks, local_blocks, ..Budget::default() },
        scale: [None, None, Some(-0.3), Some(0.5)][index % 4],
        grad_lse: index.is_multiple_of(2),
        softcap: (index % 7 == 3).then_some(0.8),
        // Far from all keys such a bias is of no size that float32 has.
        alibi: index % 5 == 2 && offset.unsigned_abs() < 1 << 20,
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

/// Every way to hide pairs, where there are many blocks to choose from: lengths that are no multiples, and longer ones.
#[test]
fn many_blocks_of_every_kind() {
    let mut cases = Vec::new();
    for (index, (window, pairs, query_padding, key_padding, pool_queries)) in HIDING.into_iter().enumerate() {
        for (block_size, query_len, key_len) in [(2, 61, 75), (4, 90, 90)] {
            let mode = if index % 2 == 0 { Mode::Full } else { Mode::Sparse };
            cases.push(Case {
                query_len,
                key_len,
                block_size,
                mode,
                window,
                pairs,
                query_padding,
                key_padding,
                pool_queries,
                seed: index as u64,
                ..Case::default()
            });
        }
    }
    cases.push(Case { query_len: 61, key_len: 75, pairs: Pairs::Huge, ..Case::default() });
    check_all::<f64>(&cases);
    check_all::<f32>(&cases);
}

/// More blocks than one strip of the softmax takes, and every number of chosen blocks that has a way of its own to be found.
#[test]
fn long_sequences() {
    let mut cases = Vec::new();
    for (block_size, length, blocks) in [(2, 701, 4), (2, 420, 7), (4, 380, 14), (4, 380, 31), (4, 380, 50), (4, 380, 200)] {
        for mode in [Mode::Full, Mode::Sparse] {
            cases.push(Case { mode, seed: blocks as u64, ..Case::causal(length, block_size, blocks) });
        }
    }
    check_all::<f64>(&cases);
    check_all::<f32>(&cases);
}

/// A number for the whole head is shared by its tokens.
#[test]
fn num_blocks_of_tokens() {
    let of = |num_blocks| Case {
        budget: Budget { num_blocks: Some(num_blocks), ..budget(1.0) },
        ..Case { query_len: 50, key_len: 50, block_size: 4, ..Case::causal(50, 4, 1) }
    };
    // 13 rows of blocks: 1, 1.5 and 3 blocks for each token, and all.
    check_all::<f64>(&[of(1), of(13), of(20), of(39), of(usize::MAX)]);
}

/// Dimensions of size 0: nothing is read, and what there is to write is 0, or `-inf` for the lse.
#[test]
fn empty_dimensions() {
    for mode in [Mode::Full, Mode::Sparse] {
        for window in [CAUSAL, window(2, 1)] {
            let full = Case { kv_heads: 2, group: 2, mode, window, ..Case::causal(9, 4, 2) };
            let cases = [
                Case { batch: 0, ..full.clone() },
                Case { kv_heads: 0, ..full.clone() },
                Case { group: 0, ..full.clone() },
                Case { query_len: 0, ..full.clone() },
                Case { key_lengths: Some(vec![0]), ..full.clone() },
                Case { key_len: 0, ..full.clone() },
                Case { value_dim: 0, ..full.clone() },
            ];
            check_all::<f64>(&cases);
            check_all::<f32>(&cases);
            check_all::<bf16>(&cases);
        }
    }
}
