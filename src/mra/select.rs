//! Which blocks are worth computing exactly (docs/definitions.md, section 2.1 to 2.5).
//!
//! ```text
//! for each head:
//!     c = scale * qh kh^T                                   one product of the pooled tokens
//!     distance[i, j] = max_j' c[i, j'] - c[i, j]            0 for the best block of a row
//!     distance = -inf for forced blocks, +inf for dead ones
//!     take the budget's number of smallest distances, ties by i * nk + j
//! ```
//!
//! The smallest are found in linear time: a sample of the distances gives a bound that very likely has a few more than
//! the wanted number below it, one pass collects those, and only they are partitioned.

use std::ops::Range;

use super::bias::{HeadPairs, Kind};
use super::blocks::Blocks;
use super::budget::Budget;
use super::forward::Pyramid;
use super::plan::Plan;
use super::problem::Problem;
use super::scratch::Buffer;
use crate::error::{Error, Result};
use crate::kernels::{Gemm, Init, Matrix, MatrixMut, pack_transposed};
use crate::simd::{Element, SQUARE, Scalar};
use crate::tensor::{Rows, Tensor};
use crate::threads;
use crate::tiles::Chunks;

/// Selects blocks for every head of `query` and `key`, and writes them as [`Plan::from_bits`] reads them.
///
/// Deterministic: the same bits for any number of threads.
///
/// # Errors
/// If the tensors do not have the shapes of the problem, `bits` not the length of its plan, or the budget is invalid.
pub fn select_blocks<E: Element>(
    problem: &Problem,
    query: &Tensor<'_, E>,
    key: &Tensor<'_, E>,
    budget: &Budget,
    bits: &mut [u8],
) -> Result<()> {
    Problem::expect("query", query.shape(), [problem.batch, problem.heads, problem.query_len, problem.head_dim])?;
    Problem::expect("key", key.shape(), [problem.batch, problem.kv_heads, problem.key_len, problem.head_dim])?;
    select_from(problem, &Pyramid::new(problem, query, key), budget, bits)
}

/// As [`select_blocks`], from means that are already there.
pub(crate) fn select_from<T: Scalar>(problem: &Problem, pyramid: &Pyramid<T>, budget: &Budget, bits: &mut [u8]) -> Result<()> {
    budget.validate()?;
    let (nq, nk) = (problem.query_blocks(), problem.key_blocks());
    let bytes_per_head = nq * Plan::row_bytes(nk);
    let expected = problem.all_heads() * bytes_per_head;
    if bits.len() != expected {
        return Err(Error::new(format!("plan: {} bytes, expected {expected}", bits.len())));
    }
    bits.fill(0);
    if bits.is_empty() {
        return Ok(());
    }
    let threads = problem.threads_for(problem.all_heads() * nq * nk * problem.head_dim);
    Distances::<T>::check_memory(problem, threads)?;
    let bits = Chunks::new(bits, bytes_per_head);
    threads::for_each(
        threads,
        problem.all_heads(),
        || Distances::<T>::new(problem),
        |distances, head| {
            let batch = head / problem.heads;
            let (query_blocks, key_blocks) = (problem.queries(batch), problem.keys(batch));
            let pairs = problem.pairs.as_ref().map(|pairs| pairs.head(head));
            // SAFETY: each task has its own head.
            let bits = unsafe { bits.get_mut(head) };
            if let Some(pairs) = &pairs {
                mark_cut(pairs, query_blocks.len(), bits);
            }
            let live = pairs.as_ref().map_or_else(|| query_blocks.live() * key_blocks.live(), HeadPairs::open);
            if live == 0 {
                return;
            }
            distances.multiply(problem, &pyramid.queries.head(head), &pyramid.keys.head(problem.kv_row(head)));
            let forced = distances.subtract_from_best(query_blocks, key_blocks, pairs.as_ref(), budget);
            let number = budget.blocks(query_blocks.live()).max(forced).min(live);
            distances.take_smallest(number, bits);
        },
    );
    Ok(())
}

/// Sets the bits of the blocks that are exact because a mask cuts them.
fn mark_cut(pairs: &HeadPairs<'_>, rows: usize, bits: &mut [u8]) {
    for (i, bits) in bits.chunks_mut(bits.len() / rows).enumerate() {
        for (j, _) in pairs.kinds(i).iter().enumerate().filter(|&(_, &kind)| kind == Kind::Cut) {
            bits[j / 8] |= 1 << (j % 8);
        }
    }
}

/// The scores of one head, with the sign turned: how far each block is from the best one of its row.
struct Distances<T> {
    values: Buffer<T>,
    keys: Buffer<T>,
    lines: Buffer<T>,
    rows: usize,
    columns: usize,
    stride: usize,
}

/// The largest of a row, NaN left out. Eight chains let the compiler use vectors.
fn maximum<T: Scalar>(row: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut chains = [T::NEG_INFINITY; 8];
    let chunks = row.chunks_exact(chains.len());
    let rest = chunks.remainder().iter().copied().fold(T::NEG_INFINITY, larger);
    for chunk in chunks {
        for (chain, &c) in chains.iter_mut().zip(chunk) {
            *chain = larger(*chain, c);
        }
    }
    chains.into_iter().fold(rest, larger)
}

impl<T: Scalar> Distances<T> {
    /// Checks that the scores of as many heads as there are threads fit in memory: they are what grows with the square of
    /// the length, and a failing allocation further down would end the process.
    fn check_memory(problem: &Problem, threads: usize) -> Result<()> {
        let (rows, columns) = (problem.query_blocks(), problem.padded::<T>(problem.key_blocks()));
        let numbers = rows.checked_mul(columns).and_then(|n| n.checked_mul(threads.min(problem.all_heads())));
        let fits = numbers.is_some_and(|numbers| Vec::<T>::new().try_reserve_exact(numbers).is_ok());
        if fits {
            return Ok(());
        }
        Err(Error::new(format!(
            "block_size: {}, the scores of {rows} x {} blocks on {threads} threads do not fit in memory; larger blocks would",
            problem.block_size,
            problem.key_blocks()
        )))
    }

    fn new(problem: &Problem) -> Self {
        let (rows, columns) = (problem.query_blocks(), problem.key_blocks());
        let stride = problem.padded::<T>(columns);
        Self {
            values: Buffer::scratch(rows * stride),
            keys: Buffer::scratch(problem.head_dim * stride),
            lines: Buffer::scratch(SQUARE * problem.head_dim),
            rows,
            columns,
            stride,
        }
    }

    /// The pooled logits.
    fn multiply(&mut self, problem: &Problem, queries: &Rows<'_, T>, keys: &Rows<'_, T>) {
        let (channels, stride) = (problem.head_dim, self.stride);
        let key_rows = (0..self.columns).map(|j| &keys.row(j)[..channels]);
        let mut packed = MatrixMut::new(&mut self.keys, channels, stride, stride);
        pack_transposed(problem.level, key_rows, T::from_f64(problem.scale), &mut self.lines, &mut packed);
        let (data, query_stride) = queries.tail(0);
        T::run(
            problem.level,
            Gemm {
                a: Matrix::new(data, self.rows, channels, query_stride),
                a_transposed: false,
                b: Matrix::new(&self.keys, channels, stride, stride),
                b_rows: None,
                c: MatrixMut::new(&mut self.values, self.rows, stride, stride),
                init: Init::Zero,
            },
        );
    }

    /// Turns logits into distances and returns how many blocks are forced.
    fn subtract_from_best(
        &mut self,
        query_blocks: &Blocks,
        key_blocks: &Blocks,
        pairs: Option<&HeadPairs<'_>>,
        budget: &Budget,
    ) -> usize {
        // The blocks that do not compete: the same in every row, unless a mask says otherwise.
        let mut dead: Vec<usize> = (0..self.columns).filter(|&j| key_blocks.count(j) == 0).collect();
        let mut forced = 0;
        for i in 0..self.rows {
            let row = &mut self.values[i * self.stride..][..self.columns];
            if query_blocks.count(i) == 0 {
                row.fill(T::INFINITY);
                continue;
            }
            if let Some(pairs) = pairs {
                dead.clear();
                for (j, (c, kind)) in row.iter_mut().zip(pairs.kinds(i)).enumerate() {
                    if *kind == Kind::Open {
                        *c += T::from_f64(pairs.mean(i, j));
                    } else {
                        dead.push(j);
                    }
                }
                if dead.len() == row.len() {
                    row.fill(T::INFINITY);
                    continue;
                }
            }
            for &j in &dead {
                row[j] = T::NEG_INFINITY;
            }
            let best = maximum(row);
            // Without a best one (all NaN or -inf) the first live block takes its place: every row has a forced block.
            let found = row.iter().position(|&c| c == best && c > T::NEG_INFINITY);
            let live = |j: usize| pairs.map_or_else(|| key_blocks.count(j) > 0, |pairs| pairs.kind(i, j) == Kind::Open);
            let first_best = found.or_else(|| (0..row.len()).find(|&j| live(j)));
            for c in row.iter_mut() {
                let distance = best - *c;
                // Not a number, or infinitely far: last among the live blocks, before the dead ones.
                *c = if distance < T::HIGHEST { distance } else { T::HIGHEST };
            }
            for &j in &dead {
                row[j] = T::INFINITY;
            }
            if budget.forces_any() {
                for (j, distance) in row.iter_mut().enumerate() {
                    if budget.forces(i, j) && live(j) {
                        *distance = T::NEG_INFINITY;
                    }
                }
            }
            if let Some(j) = first_best {
                row[j] = T::NEG_INFINITY;
            }
            forced += row.iter().filter(|&&distance| distance == T::NEG_INFINITY).count();
        }
        forced
    }

    /// Sets the bits of the `number` smallest distances, which is at least 1; ties in order of `(i, j)`.
    fn take_smallest(&self, number: usize, bits: &mut [u8]) {
        let row_bytes = Plan::row_bytes(self.columns);
        let (bound, mut ties) = self.bound_of_smallest(number);
        for (i, bits) in bits.chunks_mut(row_bytes).enumerate() {
            for (j, distance) in self.row(i).iter().enumerate() {
                let order = distance.total_cmp(&bound);
                if order.is_lt() || (order.is_eq() && ties > 0) {
                    ties -= usize::from(order.is_eq());
                    bits[j / 8] |= 1 << (j % 8);
                }
            }
        }
    }

    /// The `number`-th smallest distance, and how many equal to it are among the `number` smallest.
    fn bound_of_smallest(&self, number: usize) -> (T, usize) {
        let guess = self.sampled_bound(number);
        let mut candidates = self.collect(|distance| distance <= guess);
        if candidates.len() < number {
            candidates = self.collect(|_| true);
        }
        let (smaller, &mut bound, _) = candidates.select_nth_unstable_by(number - 1, T::total_cmp);
        let below = smaller.iter().filter(|distance| distance.total_cmp(&bound).is_lt()).count();
        (bound, number - below)
    }

    /// A bound that probably has between one and a few times `number` distances below it.
    fn sampled_bound(&self, number: usize) -> T {
        const SAMPLES: usize = 4096;
        let total = self.rows * self.columns;
        if total <= 2 * SAMPLES {
            return T::INFINITY;
        }
        // An odd step visits all columns even where their number is a power of two.
        let step = (total / SAMPLES) | 1;
        let mut sample: Vec<T> =
            (0..total).step_by(step).map(|n| self.values[n / self.columns * self.stride + n % self.columns]).collect();
        let expected = number * sample.len() / total;
        // Half as many again and some: the number below the bound varies by about the square root.
        let position = (expected + expected / 2 + 16).min(sample.len() - 1);
        *sample.select_nth_unstable_by(position, T::total_cmp).1
    }

    fn collect(&self, wanted: impl Fn(T) -> bool) -> Vec<T> {
        (0..self.rows).flat_map(|i| self.row(i).iter().copied().filter(|&distance| wanted(distance))).collect()
    }

    fn row(&self, i: usize) -> &[T] {
        &self.values[self.range(i)]
    }

    fn range(&self, i: usize) -> Range<usize> {
        i * self.stride..i * self.stride + self.columns
    }
}
