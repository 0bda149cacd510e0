//! Marks for an emulator that counts instructions: CONTRIBUTING.md says which one.

use std::arch::x86_64::__cpuid_count;

use half::bf16;
use mra_attention::{
    Budget, Gradients, Inputs, Mode, Options, Problem, Saved, Selection, Tensor, TensorMut, backward, forward,
};

use crate::support::levels;

const QUERIES: usize = 32;
const KEYS: usize = 128;
const DIM: usize = 64;

/// Ends what is counted, under this number.
fn mark(number: u32) {
    // SAFETY: every x86-64 CPU has CPUID, and answers to leaves that it does not know.
    #[allow(unused_unsafe, reason = "a safe function in later versions of Rust")]
    unsafe {
        __cpuid_count(0x6d_7261, number);
    }
}

fn view(data: &[bf16], shape: [usize; 4], strides: [usize; 4]) -> Tensor<'_, bf16> {
    Tensor::new("tensor", data, shape, strides).expect("a tensor")
}

/// Heads of one tile: 32 queries and 128 keys of 64 channels, all of them exact. Each level prints its number, to which 1 is added for
/// forward, 2 for backward, and 10 for every head. So what a head more adds is a tile with all that goes with it.
#[test]
#[ignore = "for an emulator that counts instructions"]
fn of_a_tile() {
    for (index, level) in (0u32..).zip(levels()).filter(|(_, level)| !["portable", "avx2"].contains(&level.name())) {
        println!("{}: {}", 100 * index, level.name());
        for heads in [1, 2, 3] {
            let number = 100 * index + 10 * u32::try_from(heads).expect("few");
            let options = Options {
                mode: Mode::Sparse,
                budget: Budget { num_blocks: Some(usize::MAX), ..Budget::default() },
                ..Options::new(level)
            };
            let shape = |length| ([1, heads, length, DIM], [heads * length * DIM, length * DIM, DIM, 1]);
            let ((query, of_query), (key, of_key)) = (shape(QUERIES), shape(KEYS));
            let problem = Problem::new(query, key, &options).expect("a valid problem");
            let numbers = |length: usize, seed: usize| -> Vec<bf16> {
                (0..heads * length * DIM).map(|i| bf16::from_f32(((i * 37 + seed) % 101) as f32 / 50.0 - 1.0)).collect()
            };
            let [q, grad, k, v] =
                [(QUERIES, 1), (QUERIES, 2), (KEYS, 3), (KEYS, 4)].map(|(length, seed)| numbers(length, seed));
            let inputs = Inputs { query: view(&q, query, of_query), key: view(&k, key, of_key), value: view(&v, key, of_key) };
            let (lse_shape, of_lse) = ([1, heads, QUERIES, 1], [heads * QUERIES, QUERIES, 1, 1]);
            let (mut out, mut lse) = (vec![bf16::ZERO; q.len()], vec![0f32; heads * QUERIES]);
            let mut plan = vec![0; problem.plan_bytes()];
            let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|like| vec![bf16::ZERO; like.len()]);
            // Once to find out what is found out once.
            for _ in 0..2 {
                let mut to = TensorMut::new("out", &mut out, query, of_query).expect("a tensor");
                let mut to_lse = TensorMut::new("lse", &mut lse, lse_shape, of_lse).expect("a tensor");
                mark(0);
                forward(&problem, &inputs, None, Selection::Chosen(&mut plan), &mut to, &mut to_lse).expect("forward");
                mark(number + 1);
                let saved = Saved {
                    grad_out: view(&grad, query, of_query),
                    grad_lse: None,
                    out: view(&out, query, of_query),
                    lse: Tensor::new("lse", &lse, lse_shape, of_lse).expect("a tensor"),
                };
                let mut gradients = Gradients {
                    query: TensorMut::new("query", &mut dq, query, of_query).expect("a tensor"),
                    key: TensorMut::new("key", &mut dk, key, of_key).expect("a tensor"),
                    value: TensorMut::new("value", &mut dv, key, of_key).expect("a tensor"),
                    sinks: None,
                    bias: None,
                };
                mark(0);
                backward(&problem, &inputs, &saved, &plan, &mut gradients).expect("backward");
                mark(number + 2);
            }
        }
    }
}
