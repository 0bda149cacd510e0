//! The number of threads changes nothing, to the bit: neither how tasks are dealt nor whether backward makes one pass or two.

use mra_attention::{Budget, Mode};

use crate::support::{Case, Expected, Number, Outcome, Padding, Pairs, Rounded, Setup, compute, levels_for, select};

/// Few heads (backward by rows and by columns) and many (by heads), blocks large enough that the exact level is worth several
/// threads and small enough that the coarse one is.
fn cases() -> Vec<Case> {
    let heads = [(1, 1, 1), (1, 1, 3), (2, 5, 1), (1, 4, 2)];
    let blocks = [(32, 3 * 128 + 7, 48, 24), (4, 519, 20, 12)];
    let modes = [Mode::Full, Mode::Sparse];
    let all =
        heads.into_iter().flat_map(|heads| blocks.into_iter().flat_map(move |blocks| modes.map(|mode| (heads, blocks, mode))));
    all.enumerate()
        .map(|(index, ((batch, kv_heads, group), (block_size, length, head_dim, value_dim), mode))| Case {
            batch,
            kv_heads,
            group,
            query_len: length,
            key_len: length - 20,
            head_dim,
            value_dim,
            block_size,
            mode,
            key_padding: if index % 2 == 0 { Padding::Holes } else { Padding::None },
            pairs: [Pairs::All, Pairs::Window, Pairs::Biased][index % 3],
            budget: Budget { blocks_per_row: 5.0, num_blocks: None, first_blocks: 0, diagonal_blocks: 3 },
            seed: index as u64,
            ..Case::default()
        })
        .collect()
}

fn bits<E: Number>(outcome: &Outcome<E>) -> [Vec<u64>; 5] {
    fn of<E: Rounded>(array: &ndarray::Array4<E>) -> Vec<u64> {
        array.iter().map(|x| x.exact().to_bits()).collect()
    }
    [of(&outcome.out), of(&outcome.lse), of(&outcome.query), of(&outcome.key), of(&outcome.value)]
}

fn same_bits<E: Number>() {
    for case in cases() {
        let data = case.data::<E>();
        for level in levels_for::<E>() {
            let setup = |threads| Setup { threads, ..Setup::new(level) };
            let selected = select::<E>(&case, &data, setup(1));
            // Any finite out and lse will do: every number of threads starts from the same.
            let expected = Expected::with_plan::<E>(&case, &data, selected.clone());
            let alone = bits(&compute::<E>(&case, &data, &expected, setup(1)));
            for threads in [2, 3, 5] {
                assert!(
                    select::<E>(&case, &data, setup(threads)) == selected,
                    "selection at {} with {threads} threads: {case:?}",
                    level.name()
                );
                let together = bits(&compute::<E>(&case, &data, &expected, setup(threads)));
                for (name, (a, b)) in ["out", "lse", "dq", "dk", "dv"].into_iter().zip(alone.iter().zip(&together)) {
                    assert!(
                        a == b,
                        "{name} of {} at {} differs between 1 and {threads} threads: {case:?}",
                        E::NAME,
                        level.name()
                    );
                }
            }
        }
    }
}

#[test]
fn float32() {
    same_bits::<f32>();
}

#[test]
fn float64() {
    same_bits::<f64>();
}

#[test]
fn bfloat16() {
    same_bits::<half::bf16>();
}
