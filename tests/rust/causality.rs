//! What the causal form promises to the bit: nothing of a token depends on later ones, on the queries beside it, on who pooled the
//! blocks, or on the number of threads.

use half::bf16;
use mra_attention::{
    CausalBudget, CausalOptions, CausalProblem, Inputs, Level, Mode, PooledInputs, append, causal_forward_selecting,
};
use ndarray::{Array4, Axis, s};

use crate::support::{
    CausalCase, CausalData, CausalOutcome, Layout, Number, Rounded, Setup, Stored, bits, compute_causal, levels, select_causal,
};

/// Blocks larger than, equal to and smaller than a tile, and blocks that a tile cuts anywhere.
fn cases() -> Vec<CausalCase> {
    let budgets = [(2, 1, 0), (3, 2, 1), (1, 1, 0), (40, 1, 0)];
    let sizes = [(70, 1, 8, 8), (150, 8, 16, 24), (130, 32, 9, 16), (170, 48, 16, 5), (200, 64, 8, 8), (260, 128, 8, 16)];
    let all = sizes.into_iter().flat_map(|size| [Mode::Full, Mode::Sparse].map(|mode| (size, mode)));
    all.enumerate()
        .map(|(index, ((length, block_size, head_dim, value_dim), mode))| {
            let (blocks, local_blocks, first_blocks) = budgets[index % budgets.len()];
            CausalCase {
                group: 2,
                head_dim,
                value_dim,
                mode,
                budget: CausalBudget { blocks, local_blocks, first_blocks },
                seed: index as u64,
                ..CausalCase::square(length, block_size, blocks)
            }
        })
        .collect()
}

/// The same numbers up to position `p`, behind it something else.
fn changed_after(data: &CausalData, p: usize, later: f64) -> CausalData {
    let mut data = data.clone();
    for array in [&mut data.query, &mut data.key, &mut data.value] {
        array.slice_mut(s![.., .., p + 1.., ..]).fill(later);
    }
    data
}

/// Forward with the plan that it chooses, and backward from it.
fn all<E: Number>(case: &CausalCase, data: &CausalData, setup: Setup) -> CausalOutcome<E> {
    let (out, lse, plan) = select_causal::<E>(case, data, setup);
    let (out, lse) = (out.mapv(Rounded::exact), lse.mapv(Rounded::exact).remove_axis(Axis(3)));
    compute_causal(case, data, &plan, &out, &lse, setup)
}

fn later_tokens_change_nothing<E: Number>() {
    for case in cases() {
        let data = case.data::<E>();
        let (length, block) = (case.query_len, case.block_size);
        for level in levels() {
            let setup = Setup::new(level);
            let whole = all::<E>(&case, &data, setup);
            let width = whole.plan.len() / (case.heads() * length);
            for p in [0, block - 1, block, block + block / 2, length / 2, length - 2] {
                for later in [f64::NAN, f64::INFINITY, 1e4] {
                    let other = all::<E>(&case, &changed_after(&data, p, later), setup);
                    let context = || format!("position {p}, {later} behind, {} at {}: {case:?}", E::NAME, level.name());
                    let until = s![.., .., ..=p, ..];
                    assert!(bits(whole.out.slice(until)) == bits(other.out.slice(until)), "out: {}", context());
                    assert!(bits(whole.lse.slice(until)) == bits(other.lse.slice(until)), "lse: {}", context());
                    assert!(bits(whole.query.slice(until)) == bits(other.query.slice(until)), "dq: {}", context());
                    for head in 0..case.heads() {
                        let rows = head * length * width..(head * length + p + 1) * width;
                        assert!(whole.plan[rows.clone()] == other.plan[rows], "plan: {}", context());
                    }
                }
            }
        }
    }
}

#[test]
fn later_tokens_change_nothing_in_float32() {
    later_tokens_change_nothing::<f32>();
}

#[test]
fn later_tokens_change_nothing_in_bfloat16() {
    later_tokens_change_nothing::<bf16>();
}

/// No gradient reaches a key from an earlier query, whatever lies there.
#[test]
fn earlier_queries_give_no_gradient() {
    for case in cases() {
        let mut data = case.data::<f64>();
        let p = case.query_len / 2;
        data.grad_out.slice_mut(s![.., .., p.., ..]).fill(0.0);
        data.grad_lse = None;
        for level in levels() {
            let outcome = all::<f64>(&case, &data, Setup::new(level));
            let zero = |array: &Array4<f64>| array.slice(s![.., .., p.., ..]).iter().all(|&x| x == 0.0);
            assert!(zero(&outcome.key) && zero(&outcome.value), "{}: {case:?}", level.name());
        }
    }
}

/// A few queries against a cache of keys: the same rows as among all queries, with the means that `append` gives or without.
fn some_queries<E: Number>() {
    for case in cases() {
        let data = case.data::<E>();
        let (length, block) = (case.query_len, case.block_size);
        for level in levels() {
            let (out, lse, plan) = select_causal::<E>(&case, &data, Setup::new(level));
            let width = plan.len() / (case.heads() * length);
            for (start, count) in [(0, 1), (block - 1, 2), (block, 1), (length / 2, 33), (length - 1, 1)] {
                for with_means in [false, true] {
                    let rows = start..(start + count).min(length);
                    let (some_out, some_lse, some_plan) = decode::<E>(&case, &data, level, rows.clone(), with_means);
                    let context = || format!("{rows:?}, means {with_means}, {} at {}: {case:?}", E::NAME, level.name());
                    let part = s![.., .., rows.clone(), ..];
                    assert!(bits(out.slice(part)) == bits(&some_out), "out: {}", context());
                    assert!(bits(lse.slice(part)) == bits(&some_lse), "lse: {}", context());
                    for head in 0..case.heads() {
                        let of_whole = &plan[(head * length + rows.start) * width..(head * length + rows.end) * width];
                        let of_part = &some_plan[head * rows.len() * width..(head + 1) * rows.len() * width];
                        assert!(of_whole == of_part, "plan: {}", context());
                    }
                }
            }
        }
    }
}

fn decode<E: Number>(
    case: &CausalCase,
    data: &CausalData,
    level: Level,
    rows: std::ops::Range<usize>,
    with_means: bool,
) -> (Array4<E>, Array4<E::Compute>, Vec<i32>) {
    let query = Stored::<E>::new(data.query.slice(s![.., .., rows.clone(), ..]), Layout::Contiguous);
    let key = Stored::<E>::new(data.key.view(), Layout::TokensFirst);
    let value = Stored::<E>::new(data.value.view(), Layout::Contiguous);
    let options = CausalOptions {
        block_size: case.block_size,
        scale: case.scale,
        mode: case.mode,
        offsets: &[rows.start.cast_signed() as i64],
        key_lengths: None,
        dropout: 0.0,
        seed: 0,
        threads: 1,
        level,
    };
    let (heads, blocks) = (case.heads(), case.key_len.div_ceil(case.block_size));
    let problem =
        CausalProblem::new([1, heads, rows.len(), case.head_dim], [1, case.kv_heads, case.key_len, case.head_dim], &options)
            .expect("a valid case");
    let mean_of = |stored: &Stored<E>, channels| {
        let mut copy = Stored::<E>::unset((1, case.kv_heads, case.key_len, channels), Layout::Contiguous);
        let mut means = Stored::<E::Compute>::unset((1, case.kv_heads, blocks, channels), Layout::TokensFirst);
        let (mut tokens, mut to) = (copy.tensor_mut("stored"), means.tensor_mut("means"));
        append(&stored.tensor("new"), &mut tokens, &mut to, &[0], &[case.key_len], case.block_size, 1).expect("valid shapes");
        means
    };
    let (mean_keys, mean_values) = (mean_of(&key, case.head_dim), mean_of(&value, case.value_dim));
    let means = PooledInputs { key: mean_keys.tensor("pooled_key"), value: Some(mean_values.tensor("pooled_value")) };
    let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
    let mut out = Stored::<E>::unset((1, heads, rows.len(), case.value_dim), Layout::Contiguous);
    let mut lse = Stored::<E::Compute>::unset((1, heads, rows.len(), 1), Layout::Contiguous);
    let mut plan = vec![0; heads * rows.len() * problem.plan_width(&case.budget)];
    let (mut to_out, mut to_lse) = (out.tensor_mut("out"), lse.tensor_mut("lse"));
    let means = with_means.then_some(&means);
    causal_forward_selecting(&problem, &inputs, means, &case.budget, &mut plan, &mut to_out, &mut to_lse)
        .expect("a valid case");
    (out.read(), lse.read(), plan)
}

#[test]
fn some_queries_alone_are_as_among_all() {
    some_queries::<f32>();
    some_queries::<bf16>();
    some_queries::<f64>();
}

/// Few groups (queries, then keys) and many (all in one pass), and more queries than a range has.
#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let heads = [(1, 1, 1), (1, 1, 3), (2, 4, 1)];
    let mut cases: Vec<CausalCase> = Vec::new();
    for ((batch, kv_heads, group), mode) in
        heads.into_iter().flat_map(|heads| [Mode::Full, Mode::Sparse].map(|mode| (heads, mode)))
    {
        let square = CausalCase::square(600, 16, 4);
        let (offsets, key_lengths) =
            ((0..batch).map(|item| 17 * item).collect(), vec![600; usize::try_from(batch).unwrap_or(0)]);
        let batch = key_lengths.len();
        cases.push(CausalCase { batch, kv_heads, group, mode, offsets, key_lengths, head_dim: 16, ..square });
    }
    cases.push(CausalCase::square(9000, 64, 3));
    for case in cases {
        let data = case.data::<f32>();
        for level in levels() {
            let setup = |threads| Setup { threads, ..Setup::new(level) };
            let alone = all::<f32>(&case, &data, setup(1));
            for threads in [2, 3, 5] {
                let together = all::<f32>(&case, &data, setup(threads));
                let context = || format!("{threads} threads at {}: {case:?}", level.name());
                assert!(alone.plan == together.plan, "plan: {}", context());
                let pairs = [
                    ("out", &alone.out, &together.out),
                    ("lse", &alone.lse, &together.lse),
                    ("dq", &alone.query, &together.query),
                    ("dk", &alone.key, &together.key),
                    ("dv", &alone.value, &together.value),
                ];
                for (name, a, b) in pairs {
                    assert!(bits(a) == bits(b), "{name}: {}", context());
                }
            }
        }
    }
}

/// NaN scores come last, equal ones in order, and numbers that are no visible block, or a repeated one, count for nothing.
#[test]
fn scores_that_are_none_and_plans_that_are_odd() {
    let case =
        CausalCase { budget: CausalBudget { blocks: 3, local_blocks: 1, first_blocks: 0 }, ..CausalCase::square(24, 4, 3) };
    let mut data = case.data::<f64>();
    data.query.fill(1.0);
    data.key.fill(0.5);
    data.key.slice_mut(s![.., .., 4..8, ..]).fill(f64::NAN);
    data.key.slice_mut(s![.., .., 12..16, ..]).fill(f64::NEG_INFINITY);
    for level in levels() {
        let (_, _, plan) = select_causal::<f64>(&case, &data, Setup::new(level));
        assert_eq!(plan[23 * 3..], [0, 2, 5], "{}: ties to the lower block", level.name());
        assert_eq!(plan[15 * 3..16 * 3], [0, 2, 3], "{}", level.name());
        let all_bad = CausalCase { budget: CausalBudget { blocks: 5, ..case.budget }, ..case.clone() };
        let (_, _, plan) = select_causal::<f64>(&all_bad, &data, Setup::new(level));
        assert_eq!(plan[23 * 5..], [0, 2, 3, 4, 5], "{}: NaN comes last, behind -inf", level.name());

        let data = case.data::<f64>();
        let zeros = (Array4::zeros(data.grad_out.raw_dim()), ndarray::Array3::zeros((1, 1, 24)));
        let rows = |row: [i32; 4]| row.repeat(24);
        let odd = compute_causal::<f64>(&case, &data, &rows([2, 0, 2, 77]), &zeros.0, &zeros.1, Setup::new(level));
        let even = compute_causal::<f64>(&case, &data, &rows([0, 2, -1, -5]), &zeros.0, &zeros.1, Setup::new(level));
        assert!(bits(&odd.out) == bits(&even.out) && bits(&odd.key) == bits(&even.key), "{}", level.name());
    }
}
