//! A few queries against a cache of keys get the rows that they have among all queries, with the means that `append` gives or without.

use std::ops::Range;

use half::bf16;
use mra_attention::{
    Budget, CoarserLevel, Inputs, Layout as Geometry, Level, Mode, Options, PooledInputs, Problem, Selection, Window, append,
    forward,
};
use ndarray::{Array3, Array4, s};

use crate::support::{
    CAUSAL, Case, Data, Layout, Number, Setup, Stored, assert_same_blocks, attend, bits, budget, exact_of, levels, with_problem,
};

/// Blocks larger than, equal to and smaller than a tile; causal, and with windows.
fn cases() -> Vec<Case> {
    let budgets = [(2.0, 1, None), (3.0, 2, Some(1)), (1.0, 1, Some(0)), (40.0, 1, None)];
    let sizes = [(70, 1, 8, 8), (150, 8, 16, 24), (130, 32, 9, 16), (170, 48, 16, 5), (200, 64, 8, 8), (260, 128, 8, 16)];
    let windows = [CAUSAL, Window { left: Some(45), right: Some(0) }, Window { left: Some(30), right: Some(20) }];
    let all = sizes.into_iter().flat_map(|size| [Mode::Full, Mode::Sparse].map(|mode| (size, mode)));
    let two_resolutions = all.enumerate().map(|(index, ((length, block_size, head_dim, value_dim), mode))| {
        let (blocks, local_blocks, first_blocks) = budgets[index % budgets.len()];
        Case {
            group: 2,
            head_dim,
            value_dim,
            mode,
            window: windows[index % windows.len()],
            budget: Budget { local_blocks, first_blocks, ..budget(blocks) },
            seed: index as u64,
            ..Case::causal(length, block_size, 1)
        }
    });
    let levels = |sizes: &[usize], rate: f64| {
        sizes.iter().map(|&block_size| CoarserLevel { block_size, blocks_per_row: vec![rate] }).collect::<Vec<_>>()
    };
    let above = [(4, levels(&[32, 8], 2.0), 3.0), (8, levels(&[64], 1.0), 2.0), (1, levels(&[128, 16, 4], 3.0), 6.0)];
    let ladders = above.into_iter().enumerate().flat_map(|(index, (block_size, coarser, rate))| {
        [CAUSAL, Window { left: Some(75), right: Some(0) }].map(|window| Case {
            coarser: coarser.clone(),
            budget: budget(rate),
            window,
            value_dim: 8 + index,
            head_dim: 5,
            group: 2,
            mode: if index == 1 { Mode::Sparse } else { Mode::Full },
            ..Case::causal(210 + index, block_size, 1)
        })
    });
    two_resolutions.chain(ladders).collect()
}

/// The means of every level.
fn means<E: Number>(case: &Case, stored: &Stored<E>, channels: usize, level: Level) -> Vec<Stored<E::Compute>> {
    let sizes: Vec<usize> = case.coarser.iter().map(|level| level.block_size).chain([case.block_size]).collect();
    let mut copy = Stored::<E>::unset((1, case.kv_heads, case.key_len, channels), Layout::Contiguous);
    let unset = |size: &usize| {
        let shape = (1, case.kv_heads, case.key_len.div_ceil(*size), channels);
        Stored::<E::Compute>::unset(shape, Layout::TokensFirst)
    };
    let mut means: Vec<Stored<E::Compute>> = sizes.iter().map(unset).collect();
    let mut to: Vec<_> = means.iter_mut().map(|means| means.tensor_mut("means")).collect();
    let mut tokens = copy.tensor_mut("stored");
    append(&stored.tensor("new"), &mut tokens, &mut to, &[0], &[case.key_len], &sizes, 1, level).expect("valid shapes");
    means
}

/// Out, lse and the exact blocks of some of the queries.
fn decode<E: Number>(
    case: &Case,
    data: &Data,
    level: Level,
    rows: Range<usize>,
    with_means: bool,
) -> (Array4<E>, Array4<E::Compute>, Vec<Array3<bool>>) {
    let query = Stored::<E>::new(data.query.slice(s![.., .., rows.clone(), ..]), Layout::Contiguous);
    let key = Stored::<E>::new(data.key.view(), Layout::TokensFirst);
    let value = Stored::<E>::new(data.value.view(), Layout::Contiguous);
    let offsets = [rows.start.cast_signed() as i64];
    let options = Options {
        block_size: case.block_size,
        coarser: case.coarser.clone(),
        scale: case.scale,
        mode: case.mode,
        coarse_shift: case.coarse_shift,
        score: case.score,
        window: case.window,
        layout: Geometry::Dense { offsets: &offsets, key_lengths: None },
        budget: case.budget.clone(),
        ..Options::new(level)
    };
    let heads = case.heads();
    let problem = Problem::new([1, heads, rows.len(), case.head_dim], case.key_shape(), &options).expect("a valid case");
    let (mean_keys, mean_values) = (means(case, &key, case.head_dim, level), means(case, &value, case.value_dim, level));
    let pooled: Vec<_> = mean_keys
        .iter()
        .zip(&mean_values)
        .map(|(keys, values)| PooledInputs { key: keys.tensor("pooled_key"), value: Some(values.tensor("pooled_value")) })
        .collect();
    let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
    let mut out = Stored::<E>::unset((1, heads, rows.len(), case.value_dim), Layout::Contiguous);
    let mut lse = Stored::<E::Compute>::unset((1, heads, rows.len(), 1), Layout::Contiguous);
    let mut plan = vec![0; problem.plan_bytes()];
    let (mut to_out, mut to_lse) = (out.tensor_mut("out"), lse.tensor_mut("lse"));
    let pooled = with_means.then_some(&pooled[..]);
    forward(&problem, &inputs, pooled, Selection::Chosen(&mut plan), &mut to_out, &mut to_lse).expect("a valid case");
    let (mut again, mut lse_again) = (
        Stored::<E>::unset((1, heads, rows.len(), case.value_dim), Layout::Contiguous),
        Stored::<E::Compute>::unset((1, heads, rows.len(), 1), Layout::Contiguous),
    );
    let (mut to_out, mut to_lse) = (again.tensor_mut("out"), lse_again.tensor_mut("lse"));
    forward(&problem, &inputs, pooled, Selection::Unkept, &mut to_out, &mut to_lse).expect("a valid case");
    assert!(bits(&out.read()) == bits(&again.read()), "a plan that nobody keeps is the same");
    assert!(bits(&lse.read()) == bits(&lse_again.read()), "a plan that nobody keeps is the same");
    (out.read(), lse.read(), exact_of(&problem, &plan))
}

fn some_queries<E: Number>() {
    for case in cases() {
        let data = case.data::<E>();
        let (length, block) = (case.query_len, case.block_size);
        for level in levels() {
            let setup = Setup::new(level);
            let (out, lse, exact) = with_problem(&case, &data, setup, |problem| {
                let (out, lse, plan) = attend::<E>(problem, &data, None, setup.layout);
                let exact = exact_of(problem, &plan);
                (out, lse, exact)
            });
            for (start, count) in [(0, 1), (block - 1, 2), (block, 1), (length / 2, 33), (length - 1, 1)] {
                for with_means in [false, true] {
                    let rows = start..(start + count).min(length);
                    let (some_out, some_lse, some_exact) = decode::<E>(&case, &data, level, rows.clone(), with_means);
                    let context = || format!("{rows:?}, means {with_means}, {} at {}: {case:?}", E::NAME, level.name());
                    let part = s![.., .., rows.clone(), ..];
                    assert!(bits(out.slice(part)) == bits(&some_out), "out: {}", context());
                    assert!(bits(lse.slice(part)) == bits(&some_lse), "lse: {}", context());
                    let of_part = vec![exact[0].slice(s![.., rows.clone(), ..]).to_owned()];
                    assert_same_blocks(&some_exact, &of_part, || format!("selection: {}", context()));
                }
            }
        }
    }
}

#[test]
fn some_queries_alone_are_as_among_all() {
    some_queries::<f32>();
    some_queries::<bf16>();
    some_queries::<f64>();
}
