//! The number of threads changes nothing, to the bit: neither how tasks are dealt nor whether backward makes one pass or two.

use half::bf16;
use mra_attention::{Budget, Coarse, Mode};
use ndarray::s;

use crate::support::{Case, Number, Outcome, Padding, Pairs, Setup, attend, bits, budget, levels_for, select, with_problem};

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
            coarse: if (index / 4 + index / 2) % 2 == 1 { Coarse::FirstOrder } else { Coarse::Mean },
            key_padding: if index % 2 == 0 { Padding::Holes } else { Padding::None },
            pairs: [Pairs::All, Pairs::Window, Pairs::Biased][index % 3],
            budget: Budget { diagonal_blocks: 3, ..budget(5.0) },
            seed: index as u64,
            ..Case::default()
        })
        .collect()
}

/// The same with causality, and with more queries than a range of the backward pass has.
fn causal_cases() -> Vec<Case> {
    let heads = [(1, 1, 1), (1, 1, 3), (2, 4, 1)];
    let all = heads.into_iter().flat_map(|heads| [Mode::Full, Mode::Sparse].map(|mode| (heads, mode)));
    let of = |((batch, kv_heads, group), mode): ((usize, usize, usize), Mode)| {
        let offsets = (0..batch).map(|item| 17 * item.cast_signed() as i64).collect();
        Case { batch, kv_heads, group, mode, offsets, head_dim: 16, ..Case::causal(600, 16, 4) }
    };
    all.map(of).chain([Case::causal(9000, 64, 3)]).collect()
}

fn same_bits<E: Number>(cases: &[Case]) {
    for case in cases {
        let data = case.data::<E>();
        for level in levels_for::<E>() {
            let setup = |threads| Setup { threads, ..Setup::new(level) };
            let alone = Outcome::<E>::own(case, &data, setup(1));
            for threads in [2, 3, 5] {
                let context = || format!("{} at {} with {threads} threads: {case:?}", E::NAME, level.name());
                assert!(select::<E>(case, &data, setup(threads)) == alone.plan, "selection of {}", context());
                let together = Outcome::<E>::own(case, &data, setup(threads));
                assert!(together.plan == alone.plan, "selection on the way of {}", context());
                for ((name, a), (_, b)) in alone.bits().into_iter().zip(together.bits()) {
                    assert!(a == b, "{name} of {}", context());
                }
            }
        }
    }
}

/// A block without valid keys has the mean 0, and 0 times NaN is NaN: in no way may that reach other queries.
#[test]
fn a_query_of_nan_beside_a_block_without_keys() {
    for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for num_blocks in [1, 5, 12] {
            let budget = Budget { num_blocks: Some(num_blocks), ..budget(1.0) };
            let case = Case { query_len: 32, key_len: 32, block_size: 8, budget, ..Case::default() };
            let mut data = case.data::<f32>();
            let mask = |valid: usize| Some(ndarray::Array2::from_shape_fn((1, 32), |(_, token)| token < valid));
            (data.query_mask, data.key_mask) = (mask(32), mask(24));
            data.query[[0, 0, 0, 0]] = odd;
            for level in levels_for::<f32>() {
                let run = |threads| {
                    let setup = Setup { threads, ..Setup::new(level) };
                    with_problem(&case, &data, setup, |problem| attend::<f32>(problem, &data, None, setup.layout))
                };
                let ((out, lse, plan), (again, lse_again, plan_again)) = (run(1), run(2));
                let same = plan == plan_again && bits(&out) == bits(&again) && bits(&lse) == bits(&lse_again);
                assert!(same, "{odd}, {num_blocks} blocks");
                if num_blocks == 12 {
                    let others = out.slice(s![.., .., 1.., ..]);
                    assert!(others.iter().all(|x| x.is_finite()), "{odd} of one query in others: {}", level.name());
                }
            }
        }
    }
}

#[test]
fn float32() {
    same_bits::<f32>(&cases());
}

#[test]
fn float64() {
    same_bits::<f64>(&cases());
}

#[test]
fn bfloat16() {
    same_bits::<bf16>(&cases());
}

#[test]
fn causal() {
    same_bits::<f32>(&causal_cases());
}

/// A small case of each form.
fn forms() -> [Case; 2] {
    let block = Case { query_len: 70, key_len: 70, block_size: 16, head_dim: 24, group: 2, ..Case::default() };
    [block, Case { head_dim: 24, group: 2, ..Case::causal(70, 16, 2) }]
}

/// Calls `body` with something that computes a small case, and says whether the bits are those of one thread.
fn for_forms(body: impl Fn(&(dyn Fn(usize) -> bool + Sync), &str)) {
    for case in forms() {
        let data = case.data::<bf16>();
        for level in levels_for::<bf16>() {
            let compute = |threads| Outcome::<bf16>::own(&case, &data, Setup { threads, ..Setup::new(level) }).bits();
            let expected = compute(1);
            body(&|threads| compute(threads) == expected, level.name());
        }
    }
}

/// Several at once, each with tiles of its own.
#[test]
fn threads_of_the_caller() {
    for_forms(|same, level| {
        std::thread::scope(|scope| {
            let callers: Vec<_> = [1, 2, 1].into_iter().map(|threads| scope.spawn(move || same(threads))).collect();
            assert!(callers.into_iter().all(|caller| caller.join().expect("a thread")), "{level}");
        });
    });
}

/// What a process may use, its children may.
#[cfg(unix)]
#[test]
fn forked_children() {
    unsafe extern "C" {
        fn fork() -> i32;
        fn waitpid(process: i32, status: *mut i32, options: i32) -> i32;
        fn _exit(status: i32) -> !;
    }
    for_forms(|same, level| {
        for threads in [1, 2] {
            // SAFETY: the child computes, which allocates and starts threads of its own, and ends without returning.
            let status = unsafe {
                let child = fork();
                if child == 0 {
                    let same = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| same(threads)));
                    _exit(i32::from(!same.unwrap_or(false)));
                }
                let mut status = -1;
                assert_eq!(waitpid(child, &raw mut status, 0), child);
                status
            };
            assert_eq!(status, 0, "{level} with {threads} threads");
            assert!(same(threads), "{level}, the parent");
        }
    });
}
