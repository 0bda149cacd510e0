//! Packed sequences: each gets the bits that it gets alone, and a mask that separates them says the same.

use half::bf16;
use mra_attention::{Layout as Geometry, Mode, Options, Problem, Window};
use ndarray::{Array3, Array4, Axis, concatenate, s};

use crate::support::{
    CAUSAL, Case, Data, Layout, Number, Outcome, Rounded, Setup, assert_same_blocks, attend, bits, differentiate, exact_of,
    levels, levels_for, options, with_problem,
};

const LENGTHS: [(usize, usize); 6] = [(7, 7), (0, 5), (33, 20), (8, 41), (1, 0), (64, 64)];

/// Whom the sequences' tokens see, whether queries may be pooled, and where a window is aligned.
fn cases() -> Vec<(Case, bool)> {
    let forms = [
        (Window::default(), true, false),
        (Window::default(), false, false),
        (CAUSAL, true, false),
        (CAUSAL, true, true),
        (Window { left: Some(9), right: Some(5) }, true, true),
    ];
    let all = forms.into_iter().flat_map(|form| [Mode::Full, Mode::Sparse].map(|mode| (form, mode)));
    all.map(|((window, pool_queries, lower_right), mode)| {
        let case = Case { kv_heads: 2, group: 2, block_size: 8, window, pool_queries, mode, ..Case::default() };
        (case, lower_right)
    })
    .collect()
}

/// Each sequence as a case of its own.
fn sequences(case: &Case, lower_right: bool) -> Vec<Case> {
    let of = |(index, &(query_len, key_len)): (usize, &(usize, usize))| {
        let offset = if lower_right { key_len.cast_signed() as i64 - query_len.cast_signed() as i64 } else { 0 };
        Case { query_len, key_len, offsets: vec![offset], seed: index as u64, ..case.clone() }
    };
    LENGTHS.iter().enumerate().map(of).collect()
}

fn boundaries(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut starts = vec![0];
    starts.extend(lengths.scan(0, |sum, length| {
        *sum += length;
        Some(*sum)
    }));
    starts
}

/// All sequences in one tensor.
fn pack(data: &[Data]) -> Data {
    let tokens = |array: fn(&Data) -> &Array4<f64>| {
        let parts: Vec<_> = data.iter().map(|data| array(data).view()).collect();
        concatenate(Axis(2), &parts).expect("equal heads and channels")
    };
    let lse: Vec<_> = data.iter().map(|data| data.grad_lse.as_ref().expect("a gradient of lse").view()).collect();
    Data {
        query: tokens(|data| &data.query),
        key: tokens(|data| &data.key),
        value: tokens(|data| &data.value),
        grad_out: tokens(|data| &data.grad_out),
        grad_lse: Some(concatenate(Axis(2), &lse).expect("equal heads")),
        query_mask: None,
        key_mask: None,
        bias: None,
        alibi_slopes: None,
        sinks: None,
    }
}

fn together<E: Number>(case: &Case, data: &Data, lower_right: bool, setup: Setup) -> (Outcome<E>, Vec<Array3<bool>>) {
    let queries = boundaries(LENGTHS.iter().map(|lengths| lengths.0));
    let keys = boundaries(LENGTHS.iter().map(|lengths| lengths.1));
    let options = Options {
        block_size: case.block_size,
        mode: case.mode,
        coarse: case.coarse_term(),
        coarse_shift: case.coarse_shift,
        score: case.score,
        pool_queries: case.pool_queries,
        window: case.window,
        layout: Geometry::Packed { queries: &queries, keys: &keys, lower_right },
        budget: case.budget.clone(),
        threads: setup.threads,
        ..Options::new(setup.level)
    };
    let shape = |array: &Array4<f64>| <[usize; 4]>::from(array.dim());
    let problem = Problem::new(shape(&data.query), shape(&data.key), &options).expect("valid boundaries");
    let (out, lse, plan) = attend::<E>(&problem, data, None, setup.layout);
    let saved = (&out.mapv(Rounded::exact), &lse.mapv(Rounded::exact).remove_axis(Axis(3)));
    let [query, key, value] = differentiate::<E>(&problem, data, &plan, saved, setup.layout);
    let exact = exact_of(&problem, &plan);
    (Outcome { out, lse, plan, query, key, value }, exact)
}

fn as_alone<E: Number>() {
    for (case, lower_right) in cases() {
        let sequences = sequences(&case, lower_right);
        let data: Vec<Data> = sequences.iter().map(Case::data::<E>).collect();
        let packed = pack(&data);
        for level in levels_for::<E>() {
            for (threads, layout) in [(1, Layout::Contiguous), (3, Layout::TokensFirst)] {
                let setup = Setup { level, threads, layout };
                let (all, exact) = together::<E>(&case, &packed, lower_right, setup);
                let (mut query, mut key) = (0, 0);
                for (index, (sequence, data)) in sequences.iter().zip(&data).enumerate() {
                    let alone = Outcome::<E>::own(sequence, data, Setup::new(level));
                    let (q, k) = (query..query + sequence.query_len, key..key + sequence.key_len);
                    let context =
                        |name: &str| format!("{name} of sequence {index} of {} at {}: {case:?}", E::NAME, level.name());
                    assert!(bits(all.out.slice(s![.., .., q.clone(), ..])) == bits(&alone.out), "{}", context("out"));
                    assert!(bits(all.lse.slice(s![.., .., q.clone(), ..])) == bits(&alone.lse), "{}", context("lse"));
                    assert!(bits(all.query.slice(s![.., .., q.clone(), ..])) == bits(&alone.query), "{}", context("dq"));
                    assert!(bits(all.key.slice(s![.., .., k.clone(), ..])) == bits(&alone.key), "{}", context("dk"));
                    assert!(bits(all.value.slice(s![.., .., k.clone(), ..])) == bits(&alone.value), "{}", context("dv"));
                    let own = with_problem(sequence, data, Setup::new(level), |problem| exact_of(problem, &alone.plan));
                    assert_same_blocks(&exact[index..=index], &own, || context("selection"));
                    (query, key) = (q.end, k.end);
                }
            }
        }
    }
}

#[test]
fn every_sequence_is_as_alone_in_float32() {
    as_alone::<f32>();
}

#[test]
fn every_sequence_is_as_alone_in_float64() {
    as_alone::<f64>();
}

#[test]
fn every_sequence_is_as_alone_in_bfloat16() {
    as_alone::<bf16>();
}

/// Documents that begin with a block, once packed and once by a mask.
#[test]
fn documents_by_a_mask_are_packed_documents() {
    const ENDS: [usize; 4] = [16, 40, 48, 75];
    let document = |t: usize| ENDS.iter().position(|&end| t < end);
    for (window, pool_queries) in [(CAUSAL, true), (Window::default(), false)] {
        for mode in [Mode::Full, Mode::Sparse] {
            let case = Case { group: 2, window, pool_queries, mode, ..Case::causal(75, 8, 2) };
            let data = case.data::<f64>();
            let hidden = |t, s| document(t) != document(s);
            let bias = Array4::from_shape_fn((1, 2, 75, 75), |(_, _, t, s)| if hidden(t, s) { f64::NEG_INFINITY } else { 0.0 });
            let masked = Data { bias: Some(bias), ..data.clone() };
            for level in levels() {
                let setup = Setup::new(level);
                let by_mask = Outcome::<f64>::own(&case, &masked, setup);
                let mut start = 0;
                for end in ENDS {
                    let length = end - start;
                    let part = |array: &Array4<f64>| array.slice(s![.., .., start..end, ..]).to_owned();
                    let own = Data {
                        query: part(&data.query),
                        key: part(&data.key),
                        value: part(&data.value),
                        grad_out: part(&data.grad_out),
                        grad_lse: data.grad_lse.as_ref().map(|array| array.slice(s![.., .., start..end]).to_owned()),
                        ..data.clone()
                    };
                    let alone = Case { query_len: length, key_len: length, ..case.clone() };
                    let alone = Outcome::<f64>::own(&alone, &own, setup);
                    let context = |name: &str| format!("{name} of tokens {start} to {end} at {}: {case:?}", level.name());
                    let of = s![.., .., start..end, ..];
                    assert!(bits(by_mask.out.slice(of)) == bits(&alone.out), "{}", context("out"));
                    assert!(bits(by_mask.lse.slice(of)) == bits(&alone.lse), "{}", context("lse"));
                    assert!(bits(by_mask.query.slice(of)) == bits(&alone.query), "{}", context("dq"));
                    // Sums over queries: the tiles begin at other tokens, and round in another order.
                    for (name, a, b) in [("dk", &by_mask.key, &alone.key), ("dv", &by_mask.value, &alone.value)] {
                        let near = (&a.slice(of) - b).iter().all(|error| error.abs() <= 1e-10);
                        assert!(near, "{}", context(name));
                    }
                    start = end;
                }
            }
        }
    }
}

/// Boundaries that do not rise from 0 to the number of tokens are refused.
#[test]
fn boundaries_rise_from_0_to_the_end() {
    let good: [&[usize]; 2] = [&[0, 3, 10], &[0, 2, 7]];
    let refused: [[&[usize]; 2]; 6] = [
        [&[0, 3, 9], good[1]],
        [&[1, 3, 10], good[1]],
        [&[0, 11, 10], good[1]],
        [good[0], &[0, 7]],
        [good[0], &[0, 2, 8]],
        [&[], &[]],
    ];
    let new = |[queries, keys]: [&[usize]; 2]| {
        let layout = Geometry::Packed { queries, keys, lower_right: false };
        Problem::new([1, 4, 10, 8], [1, 2, 7, 8], &Options { layout, ..options() }).map(|_| ())
    };
    assert!(new(good).is_ok());
    for boundaries in refused {
        assert!(new(boundaries).is_err(), "{boundaries:?}");
    }
}
