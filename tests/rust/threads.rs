//! The number of threads changes nothing, to the bit: neither how tasks are dealt nor whether backward makes one pass or two.

use mra_attention::{Budget, Mode};

use crate::support::{
    Case, Data, Expected, Number, Outcome, Padding, Pairs, Rounded, Setup, compute, levels_for, plan_bits, select,
    select_and_forward,
};

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

fn of<E: Rounded>(array: &ndarray::Array4<E>) -> Vec<u64> {
    array.iter().map(|x| x.exact().to_bits()).collect()
}

fn bits<E: Number>(outcome: &Outcome<E>) -> [Vec<u64>; 5] {
    [of(&outcome.out), of(&outcome.lse), of(&outcome.query), of(&outcome.key), of(&outcome.value)]
}

/// Selecting on the way keeps the scores for the coarse level if there are as many heads as threads, and computes them again if
/// there are fewer.
fn selecting_on_the_way<E: Number>(case: &Case, data: &Data, setup: Setup, plan: &[u8], [out, lse, ..]: &[Vec<u64>; 5]) {
    let (selected, own_out, own_lse) = select_and_forward::<E>(case, data, setup);
    let context = || format!("{} at {}, {} threads: {case:?}", E::NAME, setup.level.name(), setup.threads);
    assert!(selected == plan, "plan of {}", context());
    assert!(of(&own_out) == *out && of(&own_lse) == *lse, "out or lse of {}", context());
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
            let plan = plan_bits(selected.view());
            selecting_on_the_way::<E>(&case, &data, setup(1), &plan, &alone);
            for threads in [2, 3, 5] {
                assert!(
                    select::<E>(&case, &data, setup(threads)) == selected,
                    "selection at {} with {threads} threads: {case:?}",
                    level.name()
                );
                selecting_on_the_way::<E>(&case, &data, setup(threads), &plan, &alone);
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

/// A block without valid keys has the mean 0, and 0 times what is no number is none: in no way may that reach other queries.
#[test]
fn a_query_that_is_no_number_beside_a_block_without_keys() {
    for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for num_blocks in [1, 5, 12] {
            let budget = Budget { blocks_per_row: 1.0, num_blocks: Some(num_blocks), first_blocks: 0, diagonal_blocks: 0 };
            let case = Case { query_len: 32, key_len: 32, block_size: 8, budget, ..Case::default() };
            let mut data = case.data::<f32>();
            data.key_mask = Some(ndarray::Array2::from_shape_fn((1, 32), |(_, token)| token < 24));
            data.query[[0, 0, 0, 0]] = odd;
            for level in levels_for::<f32>() {
                let setup = |threads| Setup { threads, ..Setup::new(level) };
                let (plan, out, lse) = select_and_forward::<f32>(&case, &data, setup(1));
                let again = select_and_forward::<f32>(&case, &data, setup(2));
                assert!((&plan, of(&out), of(&lse)) == (&again.0, of(&again.1), of(&again.2)), "{odd}, {num_blocks} blocks");
                if num_blocks == 12 {
                    let others = out.slice(ndarray::s![.., .., 1.., ..]);
                    assert!(others.iter().all(|x| x.is_finite()), "{odd} of one query in others: {}", level.name());
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
