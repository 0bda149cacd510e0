//! A padded sequence gives what it gives alone, to the bit, whatever lies in the padding.

use half::bf16;
use mra_attention::{Mode, Window};
use ndarray::{Array2, Array3, Array4, Axis, s};

use crate::support::{
    CAUSAL, Case, Data, Number, Outcome, Pairs, Setup, assert_same_blocks, bits, budget, exact_of, levels_for, with_problem,
};

/// A sequence of 45 tokens; with whom it sees, and whether its queries may be pooled.
fn cases() -> Vec<Case> {
    let forms = [
        (Window::default(), true),
        (Window::default(), false),
        (CAUSAL, true),
        (Window { left: Some(13), right: Some(0) }, true),
        (Window { left: Some(6), right: Some(9) }, true),
    ];
    let modes = [Mode::Full, Mode::Sparse];
    let all = forms.into_iter().flat_map(|form| modes.map(|mode| (form, mode)));
    all.map(|((window, pool_queries), mode)| Case {
        group: 2,
        window,
        pool_queries,
        mode,
        budget: budget(1.5),
        ..Case::causal(45, 8, 1)
    })
    .collect()
}

/// Some tokens of padding before the sequence and behind it, which hold a number.
fn padded(array: &Array4<f64>, (before, behind): (usize, usize), number: f64) -> Array4<f64> {
    let (b, h, length, d) = array.dim();
    let mut longer = Array4::from_elem((b, h, before + length + behind, d), number);
    longer.slice_mut(s![.., .., before..before + length, ..]).assign(array);
    longer
}

/// The padded sequence; the padding is marked on the keys, and on the queries too if `queries`.
fn with_padding(case: &Case, data: &Data, around: (usize, usize), number: f64, queries: bool) -> (Case, Data) {
    let length = around.0 + case.key_len + around.1;
    let mask = Array2::from_shape_fn((1, length), |(_, t)| (around.0..around.0 + case.key_len).contains(&t));
    let grad_lse = data.grad_lse.as_ref().map(|array| {
        // Where queries are not marked, their outputs are used by nobody: their gradients are 0.
        let filled = padded(&array.view().insert_axis(Axis(3)).to_owned(), around, if queries { number } else { 0.0 });
        filled.remove_axis(Axis(3))
    });
    let longer = Data {
        query: padded(&data.query, around, number),
        key: padded(&data.key, around, number),
        value: padded(&data.value, around, number),
        grad_out: padded(&data.grad_out, around, if queries { number } else { 0.0 }),
        grad_lse,
        query_mask: queries.then(|| mask.clone()),
        key_mask: Some(mask),
        bias: None,
        ..data.clone()
    };
    (Case { query_len: length, key_len: length, ..case.clone() }, longer)
}

fn inner<E: Copy>(array: &Array4<E>, before: usize, length: usize) -> Array4<E> {
    array.slice(s![.., .., before..before + length, ..]).to_owned()
}

fn alone_or_padded<E: Number>() {
    for case in cases() {
        let data = case.data::<E>();
        for level in levels_for::<E>() {
            let setup = Setup::new(level);
            let alone = Outcome::<E>::own(&case, &data, setup);
            for around in [(0, 3), (0, 30), (5, 0), (8, 0), (29, 0), (11, 17)] {
                for (number, queries) in [(1.5, false), (1.5, true), (f64::NAN, false), (f64::NAN, true)] {
                    let (longer, padded) = with_padding(&case, &data, around, number, queries);
                    let outcome = Outcome::<E>::own(&longer, &padded, setup);
                    let context = |name: &str| {
                        format!(
                            "{name}, {around:?} tokens of {number}, queries {queries}, {} at {}: {case:?}",
                            E::NAME,
                            level.name()
                        )
                    };
                    let of = |array: &Array4<E>| bits(&inner(array, around.0, case.key_len));
                    assert!(of(&outcome.out) == bits(&alone.out), "{}", context("out"));
                    assert!(bits(&inner(&outcome.lse, around.0, case.key_len)) == bits(&alone.lse), "{}", context("lse"));
                    assert!(of(&outcome.query) == bits(&alone.query), "{}", context("dq"));
                    assert!(of(&outcome.key) == bits(&alone.key), "{}", context("dk"));
                    assert!(of(&outcome.value) == bits(&alone.value), "{}", context("dv"));
                    let rest = |array: &Array4<E>| bits(array).len() - of(array).len();
                    let zeros = |array: &Array4<E>| array.iter().filter(|x| x.exact() == 0.0).count() >= rest(array);
                    assert!(zeros(&outcome.key) && zeros(&outcome.value), "{}", context("gradients of padded keys"));
                    if queries {
                        assert!(zeros(&outcome.out) && zeros(&outcome.query), "{}", context("padded queries"));
                    }
                }
            }
        }
    }
}

#[test]
fn alone_or_padded_in_float32() {
    alone_or_padded::<f32>();
}

#[test]
fn alone_or_padded_in_float64() {
    alone_or_padded::<f64>();
}

#[test]
fn alone_or_padded_in_bfloat16() {
    alone_or_padded::<bf16>();
}

/// A mask that is the same for all queries is key padding, though it is written out as one of pairs.
#[test]
fn a_mask_that_is_the_same_for_all_queries_is_padding() {
    for mode in [Mode::Full, Mode::Sparse] {
        let case = Case { batch: 2, group: 2, query_len: 45, key_len: 45, block_size: 8, mode, ..Case::default() };
        let by_pairs = Case { pairs: Pairs::Keys, ..case.clone() };
        let written_out = by_pairs.data::<f32>();
        let bias = written_out.bias.clone().expect("a mask");
        let key_mask = Array2::from_shape_fn((2, 45), |(b, s)| bias[[b, 0, 0, s]] == 0.0);
        let padding = Data { bias: None, key_mask: Some(key_mask), ..written_out.clone() };
        for level in levels_for::<f32>() {
            let setup = Setup::new(level);
            let (a, b) = (Outcome::<f32>::own(&by_pairs, &written_out, setup), Outcome::<f32>::own(&case, &padding, setup));
            for ((name, a), (_, b)) in a.bits().into_iter().zip(b.bits()) {
                assert!(a == b, "{name} at {}: {mode:?}", level.name());
            }
            let exact = |case: &Case, data: &Data, plan: &[u8]| -> Vec<Array3<bool>> {
                with_problem(case, data, setup, |problem| exact_of(problem, plan))
            };
            assert_same_blocks(&exact(&by_pairs, &written_out, &a.plan), &exact(&case, &padding, &b.plan), || {
                format!("selection at {}", level.name())
            });
        }
    }
}
