//! Which blocks are worth computing exactly (docs/definitions.md, section 2.1 to 2.5).
//!
//! ```text
//! for each head:
//!     c = scale * qh kh^T                                   one product of the pooled tokens
//!     distance[i, j] = max_j' c[i, j'] - c[i, j]            0 for the best block of a row
//!     take the forced blocks, then as many of the smallest distances as the budget has left, ties by i * nk + j
//! ```
//!
//! The smallest are found in linear time: a sample of the distances gives a bound that very likely has a few more than
//! the wanted number below it, one pass collects those, and only they are partitioned. The scores are what grows with the
//! square of the length, so they are computed once, for the coarse level too, and no distance is stored but those of the
//! candidates.

use super::bias::{HeadPairs, Kind};
use super::blocks::Blocks;
use super::budget::Budget;
use super::plan::Plan;
use super::problem::Problem;
use super::pyramid::Pyramid;
use super::scores::Scores;
use crate::error::{Error, Result};
use crate::kernels::{Candidate, FindNear};
use crate::simd::{Element, Level, Scalar};
use crate::tensor::Tensor;
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
    select_blocks_from(problem, &Pyramid::new(problem, query, key), budget, bits)
}

/// As [`select_blocks`], from means that are already there.
pub(crate) fn select_blocks_from<T: Scalar>(
    problem: &Problem,
    pyramid: &Pyramid<T>,
    budget: &Budget,
    bits: &mut [u8],
) -> Result<()> {
    select_then(problem, pyramid, budget, bits, || (), |(), _, _, _| ())
}

/// As [`select_blocks_from`]. `then` is called with the scores of each head and what has been
/// selected in it, unless there are no blocks, and with what `scratch` makes for each thread.
pub(crate) fn select_then<T: Scalar, S>(
    problem: &Problem,
    pyramid: &Pyramid<T>,
    budget: &Budget,
    bits: &mut [u8],
    scratch: impl Fn() -> S + Sync,
    then: impl Fn(&mut S, usize, &Scores<T>, &[u8]) + Sync,
) -> Result<()> {
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
    // To rank a block takes as long as several hundred multiplications.
    let threads = problem.threads_for((problem.all_heads() * nq * nk).saturating_mul(problem.head_dim + 512));
    Scores::<T>::check_memory(problem, threads)?;
    let bits = Chunks::new(bits, nq * Plan::row_bytes(nk));
    threads::for_each(
        threads,
        problem.all_heads(),
        || (Scores::<T>::new(problem), scratch()),
        |(scores, scratch), head| {
            // SAFETY: each task has its own head.
            let bits = unsafe { bits.get_mut(head) };
            scores.compute(problem, head, pyramid);
            let (batch, pairs) = (head / problem.heads, problem.pairs.as_ref().map(|pairs| pairs.head(head)));
            let (queries, keys) = (problem.queries(batch), problem.keys(batch));
            Choice { level: problem.level, scores, queries, keys, pairs, budget, row_bytes: Plan::row_bytes(nk) }.take(bits);
            then(scratch, head, scores, bits);
        },
    );
    Ok(())
}

/// What decides which blocks of a head are selected.
struct Choice<'a, T> {
    level: Level,
    scores: &'a Scores<T>,
    queries: &'a Blocks,
    keys: &'a Blocks,
    pairs: Option<HeadPairs<'a>>,
    budget: &'a Budget,
    row_bytes: usize,
}

impl<T: Scalar> Choice<'_, T> {
    /// Sets the bits of the selected blocks, and of those that are exact because a mask cuts them.
    fn take(&self, bits: &mut [u8]) {
        let live = if let Some(pairs) = &self.pairs {
            self.mark_cut(pairs, bits);
            pairs.open()
        } else {
            self.queries.live() * self.keys.live()
        };
        if live == 0 {
            return;
        }
        let number = self.budget.blocks(self.queries.live()).min(live);
        let bound = self.sampled_bound(number);
        let complete = bound >= T::HIGHEST;
        let mut candidates = if complete { self.all() } else { self.near(bound) };
        let rest = number.saturating_sub(self.force(&candidates, bits));
        let free = |candidates: &mut Vec<Candidate<T>>| {
            candidates.retain(|candidate| !self.is_set(bits, candidate.column as usize, candidate.row as usize));
        };
        free(&mut candidates);
        if candidates.len() < rest && !complete {
            candidates = self.all();
            free(&mut candidates);
        }
        if rest > 0 {
            let place = |candidate: &Candidate<T>| (candidate.column, candidate.row);
            candidates.select_nth_unstable_by(rest - 1, |a, b| {
                a.distance.total_cmp(&b.distance).then_with(|| place(a).cmp(&place(b)))
            });
        }
        for candidate in &candidates[..rest] {
            self.set(bits, candidate.column as usize, candidate.row as usize);
        }
    }

    fn mark_cut(&self, pairs: &HeadPairs<'_>, bits: &mut [u8]) {
        for i in 0..self.queries.len() {
            for (j, _) in pairs.kinds(i).iter().enumerate().filter(|&(_, &kind)| kind == Kind::Cut) {
                self.set(bits, i, j);
            }
        }
    }

    /// Sets the bits of the forced blocks, among them the best one of each row, and returns how many there are.
    fn force(&self, candidates: &[Candidate<T>], bits: &mut [u8]) -> usize {
        let mut best = vec![None; self.queries.len()];
        for candidate in candidates.iter().filter(|candidate| candidate.distance == T::ZERO) {
            let (best, j) = (&mut best[candidate.column as usize], candidate.row as usize);
            *best = Some(best.map_or(j, |lowest: usize| lowest.min(j)));
        }
        let mut forced = 0;
        for (i, best) in best.into_iter().enumerate() {
            let mut force = |j| {
                forced += usize::from(!self.is_set(bits, i, j));
                self.set(bits, i, j);
            };
            if let Some(j) = best.or_else(|| self.first_of_no_best(i)) {
                force(j);
            }
            if self.budget.forces_any() {
                (0..self.keys.len()).filter(|&j| self.budget.forces(i, j) && self.is_live(i, j)).for_each(force);
            }
        }
        forced
    }

    /// Where all scores of a row are infinite or NaN: its first block at `+inf`, or else the first live one.
    fn first_of_no_best(&self, i: usize) -> Option<usize> {
        let live = || (0..self.keys.len()).filter(|&j| self.is_live(i, j));
        live().find(|&j| self.scores.get(i, j) == T::INFINITY).or_else(|| live().next())
    }

    fn is_live(&self, i: usize, j: usize) -> bool {
        let open = |pairs: &HeadPairs<'_>| pairs.kind(i, j) == Kind::Open;
        self.queries.count(i) > 0 && self.pairs.as_ref().map_or_else(|| self.keys.count(j) > 0, open)
    }

    fn is_set(&self, bits: &[u8], i: usize, j: usize) -> bool {
        bits[i * self.row_bytes + j / 8] >> (j % 8) & 1 == 1
    }

    fn set(&self, bits: &mut [u8], i: usize, j: usize) {
        bits[i * self.row_bytes + j / 8] |= 1 << (j % 8);
    }

    /// The distance of a block; infinite if it is not live.
    fn distance(&self, i: usize, j: usize) -> T {
        if !self.is_live(i, j) {
            return T::INFINITY;
        }
        let distance = self.scores.best()[i] - self.scores.get(i, j);
        // Not a number, or infinitely far: last among the live blocks.
        if distance < T::HIGHEST { distance } else { T::HIGHEST }
    }

    /// A bound that probably has between one and a few times `number` distances below it; infinite if there are few in all.
    fn sampled_bound(&self, number: usize) -> T {
        const SAMPLES: usize = 4096;
        let columns = self.keys.len();
        let total = self.queries.len() * columns;
        if total <= 2 * SAMPLES {
            return T::INFINITY;
        }
        // An odd step visits all columns even where their number is a power of two.
        let step = (total / SAMPLES) | 1;
        let mut sample: Vec<T> = (0..total).step_by(step).map(|n| self.distance(n / columns, n % columns)).collect();
        let expected = number * sample.len() / total;
        // Half as many again and some: the number below the bound varies by about the square root.
        let position = (expected + expected / 2 + 16).min(sample.len() - 1);
        *sample.select_nth_unstable_by(position, T::total_cmp).1
    }

    /// The live blocks up to a distance below the highest number.
    fn near(&self, bound: T) -> Vec<Candidate<T>> {
        let (mut found, mut best) = (Vec::new(), self.scores.best().to_vec());
        for (i, best) in best.iter_mut().enumerate() {
            // Nothing is near where nothing is best, nor in a lane without a valid query.
            if i >= self.queries.len() || self.queries.count(i) == 0 || !(T::LOWEST <= *best && *best <= T::HIGHEST) {
                *best = T::NAN;
            }
        }
        for tile in 0..self.scores.tiles() {
            let (first_column, numbers) = (self.scores.rows_of(tile).start, self.scores.tile(tile, 0..self.keys.len()));
            T::run(self.level, FindNear { numbers, best: &best[first_column..], bound, first_column, found: &mut found });
        }
        found
    }

    /// All live blocks.
    fn all(&self) -> Vec<Candidate<T>> {
        let number = |index: usize| u32::try_from(index).expect("fewer than 2^32 blocks");
        let blocks = (0..self.queries.len()).flat_map(|i| (0..self.keys.len()).map(move |j| (i, j)));
        let live = blocks.filter(|&(i, j)| self.is_live(i, j));
        live.map(|(i, j)| Candidate { distance: self.distance(i, j), column: number(i), row: number(j) }).collect()
    }
}
