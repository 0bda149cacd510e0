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
//! the wanted number below it, one pass collects those, and only they are partitioned. The distances are what grows with the
//! square of the length, so each is written once, when its row is in the cache, and read once.

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
    let expected = Plan::bytes(problem);
    if bits.len() != expected {
        return Err(Error::new(format!("plan: {} bytes, expected {expected}", bits.len())));
    }
    bits.fill(0);
    if bits.is_empty() {
        return Ok(());
    }
    let threads = problem.threads_for(problem.all_heads() * nq * nk * problem.head_dim);
    Distances::<T>::check_memory(problem, threads)?;
    let bits = Chunks::new(bits, nq * Plan::row_bytes(nk));
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
            let (queries, keys) = (pyramid.queries.head(head), pyramid.keys.head(problem.kv_row(head)));
            let rule = Rule { query_blocks, key_blocks, pairs: pairs.as_ref(), budget };
            let forced = distances.compute(problem, &queries, &keys, &rule);
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

/// What decides which blocks of a head are live and which are forced.
struct Rule<'a> {
    query_blocks: &'a Blocks,
    key_blocks: &'a Blocks,
    pairs: Option<&'a HeadPairs<'a>>,
    budget: &'a Budget,
}

impl Rule<'_> {
    fn is_live(&self, i: usize, j: usize) -> bool {
        self.pairs.map_or_else(|| self.key_blocks.count(j) > 0, |pairs| pairs.kind(i, j) == Kind::Open)
    }

    /// Turns the logits of row `i` into distances and returns how many of its blocks are forced. `dead` are the blocks without
    /// valid keys; with a mask it is overwritten by the blocks of this row that do not compete.
    fn subtract_from_best<T: Scalar>(&self, i: usize, row: &mut [T], dead: &mut Vec<usize>) -> usize {
        if self.query_blocks.count(i) == 0 {
            row.fill(T::INFINITY);
            return 0;
        }
        if let Some(pairs) = self.pairs {
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
                return 0;
            }
        }
        for &j in dead.iter() {
            row[j] = T::NEG_INFINITY;
        }
        let best = maximum(row);
        // Without a best one (all NaN or -inf) the first live block takes its place: every row has a forced block.
        let found = row.iter().position(|&c| c == best && c > T::NEG_INFINITY);
        let first_best = found.or_else(|| (0..row.len()).find(|&j| self.is_live(i, j)));
        for c in row.iter_mut() {
            let distance = best - *c;
            // Not a number, or infinitely far: last among the live blocks, before the dead ones.
            *c = if distance < T::HIGHEST { distance } else { T::HIGHEST };
        }
        for &j in dead.iter() {
            row[j] = T::INFINITY;
        }
        let mut forced = 0;
        if let Some(j) = first_best {
            row[j] = T::NEG_INFINITY;
            forced += 1;
        }
        if self.budget.forces_any() {
            for (j, distance) in row.iter_mut().enumerate() {
                if self.budget.forces(i, j) && self.is_live(i, j) && *distance > T::NEG_INFINITY {
                    *distance = T::NEG_INFINITY;
                    forced += 1;
                }
            }
        }
        forced
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

/// Rows whose distances are computed together: they fit in a second-level cache with 4096 blocks in a row.
const ROWS_AT_ONCE: usize = 16;

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

    /// Computes the distances and returns how many blocks are forced.
    fn compute(&mut self, problem: &Problem, queries: &Rows<'_, T>, keys: &Rows<'_, T>, rule: &Rule<'_>) -> usize {
        let (channels, stride) = (problem.head_dim, self.stride);
        let key_rows = (0..self.columns).map(|j| &keys.row(j)[..channels]);
        let mut packed = MatrixMut::new(&mut self.keys, channels, stride, stride);
        pack_transposed(problem.level, key_rows, T::from_f64(problem.scale), &mut self.lines, &mut packed);
        let mut dead: Vec<usize> = (0..self.columns).filter(|&j| rule.key_blocks.count(j) == 0).collect();
        let mut forced = 0;
        for first in (0..self.rows).step_by(ROWS_AT_ONCE) {
            let rows = first..(first + ROWS_AT_ONCE).min(self.rows);
            let values = &mut self.values[rows.start * stride..rows.end * stride];
            let (data, query_stride) = queries.tail(first);
            T::run(
                problem.level,
                Gemm {
                    a: Matrix::new(data, rows.len(), channels, query_stride),
                    a_transposed: false,
                    b: Matrix::new(&self.keys, channels, stride, stride),
                    b_rows: None,
                    c: MatrixMut::new(values, rows.len(), stride, stride),
                    init: Init::Zero,
                    ahead: None,
                },
            );
            for (i, row) in rows.zip(values.chunks_exact_mut(stride)) {
                forced += rule.subtract_from_best(i, &mut row[..self.columns], &mut dead);
            }
        }
        forced
    }

    /// Sets the bits of the `number` smallest distances, which is at least 1; ties in order of `(i, j)`.
    fn take_smallest(&self, number: usize, bits: &mut [u8]) {
        let mut candidates = self.collect(self.sampled_bound(number));
        if candidates.len() < number {
            candidates = self.collect(T::INFINITY);
        }
        let mut distances: Vec<T> = candidates.iter().map(|&(distance, _)| distance).collect();
        let (smaller, &mut bound, _) = distances.select_nth_unstable_by(number - 1, T::total_cmp);
        let mut ties = number - smaller.iter().filter(|distance| distance.total_cmp(&bound).is_lt()).count();
        let row_bytes = Plan::row_bytes(self.columns);
        for (distance, (i, j)) in candidates {
            let order = distance.total_cmp(&bound);
            if order.is_lt() || (order.is_eq() && ties > 0) {
                ties -= usize::from(order.is_eq());
                bits[i as usize * row_bytes + j as usize / 8] |= 1 << (j % 8);
            }
        }
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

    /// The distances up to a bound and their places `(i, j)`, in order of those.
    fn collect(&self, bound: T) -> Vec<(T, (u32, u32))> {
        const AT_ONCE: usize = 16;
        let number = |index: usize| u32::try_from(index).expect("fewer than 2^32 blocks");
        let mut found = Vec::new();
        for i in 0..self.rows {
            for (chunk, distances) in self.row(i).chunks(AT_ONCE).enumerate() {
                // Most chunks have none: this much is vectors, which a short-circuit would not be.
                if distances.iter().filter(|&&distance| distance <= bound).count() > 0 {
                    let places = (chunk * AT_ONCE..).zip(distances).filter(|&(_, &distance)| distance <= bound);
                    found.extend(places.map(|(j, &distance)| (distance, (number(i), number(j)))));
                }
            }
        }
        found
    }

    fn row(&self, i: usize) -> &[T] {
        &self.values[self.range(i)]
    }

    fn range(&self, i: usize) -> Range<usize> {
        i * self.stride..i * self.stride + self.columns
    }
}
