//! Which blocks are worth computing exactly in the block form (docs/definitions.md, section 3.1 to 3.5).
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

use std::ops::Range;

use super::plan::row_bytes;
use super::scores::Scores;
use crate::error::Result;
use crate::exec::{Chunks, threads};
use crate::kernels::{Candidate, FindNear};
use crate::mra::problem::{Batch, Budget, Problem, Segment};
use crate::mra::pyramid::Pyramid;
use crate::simd::{Level, Scalar};

/// Selects blocks for every flat head and writes them to the plan.
///
/// Deterministic: the same bits for any number of threads.
///
/// # Errors
/// If the scores do not fit in memory.
pub(crate) fn select_rows<T: Scalar>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    pyramid: &Pyramid<T>,
    plan: &mut [u8],
) -> Result<()> {
    select_rows_then(problem, batch, 0..batch.flat_heads(), pyramid, plan, || (), |(), _, _, _| ())
}

/// As [`select_rows`], for some flat heads. `then` is called with the scores of each flat head and the bits of its plan, and with what `scratch` makes for
/// each thread.
pub(crate) fn select_rows_then<T: Scalar, S>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    heads: Range<usize>,
    pyramid: &Pyramid<T>,
    plan: &mut [u8],
    scratch: impl Fn() -> S + Sync,
    then: impl Fn(&mut S, usize, &Scores<T>, &[u8]) + Sync,
) -> Result<()> {
    // To rank a block takes as long as several hundred multiplications.
    let ranked = heads.len().saturating_mul(batch.pairs_of_blocks().div_ceil(batch.segments.len().max(1)));
    let threads = problem.threads_for(ranked.saturating_mul(problem.head_dim + 512));
    Scores::<T>::check_memory(problem, batch, threads)?;
    let plan = Chunks::new(plan, 1);
    threads::for_each(
        threads,
        heads.len(),
        || (Scores::<T>::new(problem, batch), scratch()),
        |(scores, scratch), task| {
            let head = heads.start + task;
            let segment = batch.segment(head);
            // SAFETY: each task has its own head, and heads have their own bytes.
            let bits = unsafe { plan.range_mut(problem.plan_range(segment, head % problem.heads)) };
            bits.fill(0);
            scores.compute(problem, batch, head, pyramid);
            let row_bytes = row_bytes(segment.keys.len());
            let choice = Choice {
                level: problem.level,
                scores,
                segment,
                budget: &problem.budget,
                ratio: problem.ratio,
                head: head % problem.heads,
                row_bytes,
            };
            choice.take(bits);
            then(scratch, head, scores, bits);
        },
    );
    Ok(())
}

/// What decides which blocks of a head are selected.
struct Choice<'a, T> {
    level: Level,
    scores: &'a Scores<T>,
    segment: &'a Segment,
    budget: &'a Budget,
    ratio: usize,
    head: usize,
    row_bytes: usize,
}

impl<T: Scalar> Choice<'_, T> {
    /// Sets the bits of the selected blocks.
    fn take(&self, bits: &mut [u8]) {
        let keys = (0..self.segment.keys.len()).filter(|&j| self.segment.keys.count(j) > 0).count();
        let rows = self.segment.live_rows();
        let number = self.budget.blocks_of_head(self.head, rows).min(rows * keys);
        if keys == 0 {
            return;
        }
        if rows == 0 {
            self.take_for_padded(true, bits);
            return;
        }
        let bound = self.sampled_bound(number);
        let complete = bound >= T::HIGHEST;
        let mut candidates = if complete { self.all() } else { self.near(bound) };
        let forced = self.force(&candidates, bits);
        // The room that a plan has for what is chosen among the children of blocks follows from the budget.
        let taken = if self.ratio > 1 { number } else { number.max(forced) };
        self.take_for_padded(taken == rows * keys, bits);
        let rest = number.saturating_sub(forced);
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

    /// Rows of padded queries take their best block, or all of them if the budget is all, without a share in the budget.
    fn take_for_padded(&self, all: bool, bits: &mut [u8]) {
        for i in (0..self.segment.rows.len()).filter(|&i| !self.segment.is_live(i) && self.segment.rows.count(i) > 0) {
            let filled = || (0..self.segment.keys.len()).filter(|&j| self.segment.keys.count(j) > 0);
            if all {
                filled().for_each(|j| self.set(bits, i, j));
                continue;
            }
            let best = filled().find(|&j| self.scores.get(i, j) == self.scores.best()[i]);
            self.set(bits, i, best.or_else(|| filled().next()).expect("a block with keys"));
        }
    }

    /// Sets the bits of the forced blocks, among them the best one of each row, and returns how many there are.
    fn force(&self, candidates: &[Candidate<T>], bits: &mut [u8]) -> usize {
        let mut best = vec![None; self.segment.rows.len()];
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
                let position = self.segment.row_position(i);
                let forced = |&j: &usize| self.is_live(i, j) && self.budget.forces(position, j, self.ratio);
                (0..self.segment.keys.len()).filter(forced).for_each(force);
            }
        }
        forced
    }

    /// Where all scores of a row are infinite or NaN: its first block at `+inf`, or else the first live one.
    fn first_of_no_best(&self, i: usize) -> Option<usize> {
        let live = || (0..self.segment.keys.len()).filter(|&j| self.is_live(i, j));
        live().find(|&j| self.scores.get(i, j) == T::INFINITY).or_else(|| live().next())
    }

    fn is_live(&self, i: usize, j: usize) -> bool {
        self.segment.is_live(i) && self.segment.keys.count(j) > 0
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
        // Fewer of them take less time, and leave more candidates than are wanted.
        const FEWEST: usize = 1024;
        const MOST: usize = 4096;
        let columns = self.segment.keys.len();
        let total = self.segment.rows.len() * columns;
        if total <= 2 * MOST {
            return T::INFINITY;
        }
        // An odd step visits all columns even where their number is a power of two.
        let step = (total / (total / 16).clamp(FEWEST, MOST)) | 1;
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
            if i >= self.segment.rows.len() || !self.segment.is_live(i) || !(T::LOWEST <= *best && *best <= T::HIGHEST) {
                *best = T::NAN;
            }
        }
        for tile in 0..self.scores.tiles() {
            let (first_column, numbers) = (self.scores.rows_of(tile).start, self.scores.tile(tile, 0..self.segment.keys.len()));
            T::run(self.level, FindNear { numbers, best: &best[first_column..], bound, first_column, found: &mut found });
        }
        found
    }

    /// All live blocks.
    fn all(&self) -> Vec<Candidate<T>> {
        let number = |index: usize| u32::try_from(index).expect("fewer than 2^32 blocks");
        let blocks = (0..self.segment.rows.len()).flat_map(|i| (0..self.segment.keys.len()).map(move |j| (i, j)));
        let live = blocks.filter(|&(i, j)| self.is_live(i, j));
        live.map(|(i, j)| Candidate { distance: self.distance(i, j), column: number(i), row: number(j) }).collect()
    }
}
