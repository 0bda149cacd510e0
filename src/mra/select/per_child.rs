//! As [`per_row`](super::per_row), among the children of refined blocks (docs/definitions.md, section 5).
//!
//! The scores of a head are those of its candidates alone: for each row of the level above, its rows in tiles, and for each tile a row
//! of lanes for each candidate.

use std::ops::Range;

use super::children::Children;
use super::plan::{row_bytes, set_bit};
use super::scores::add_mean_bias;
use crate::error::{Error, Result};
use crate::exec::{Buffer, Chunks, threads};
use crate::kernels::{Candidate, ColumnMaxima, FindNear, Gemm, Init, Matrix, MatrixMut, Softcap, pack_transposed};
use crate::mra::attend::{coarse_tile_columns, tiles};
use crate::mra::problem::Segment;
use crate::mra::pyramid::Pyramid;
use crate::simd::Scalar;

/// Selects blocks for every flat head and writes them to the plan.
///
/// Deterministic: the same bytes for any number of threads.
///
/// # Errors
/// If the scores do not fit in memory.
pub(crate) fn select_children<T: Scalar>(children: &Children<'_>, pyramid: &Pyramid<T>, plan: &mut [u8]) -> Result<()> {
    let (problem, batch) = (children.problem, children.batch);
    // To rank a block takes as long as several hundred multiplications.
    let threads = problem.threads_for(children.pairs().saturating_mul(problem.head_dim + 512));
    check_memory::<T>(children, threads)?;
    let plan = Chunks::new(plan, 1);
    threads::for_each(
        threads,
        batch.flat_heads(),
        || ChildScores::<T>::new(children),
        |scores, head| {
            // SAFETY: each task has its own head, and heads have their own bytes.
            let bits = unsafe { plan.range_mut(problem.plan_range(batch.segment(head), head % problem.heads)) };
            bits.fill(0);
            scores.compute(children, head, pyramid);
            Choice::new(children, scores, head).take(bits);
        },
    );
    Ok(())
}

/// Checks that the scores of as many heads as there are threads fit in memory.
fn check_memory<T: Scalar>(children: &Children<'_>, threads: usize) -> Result<()> {
    let (problem, batch) = (children.problem, children.batch);
    let lanes = problem.padded::<T>(children.ratio());
    let of_head = |head: usize| {
        let rows = 0..children.batch_above.segment(head).rows.len();
        rows.map(|row_above| children.candidates(head, row_above).saturating_mul(lanes)).fold(0, usize::saturating_add)
    };
    let most = (0..batch.flat_heads()).map(of_head).max().unwrap_or(0);
    let numbers = most.checked_mul(threads.min(batch.flat_heads()));
    if numbers.is_some_and(|numbers| Vec::<T>::new().try_reserve_exact(numbers).is_ok()) {
        return Ok(());
    }
    Err(Error::new(format!(
        "blocks_per_row: the scores of the blocks of {} tokens in what the level above refines do not fit in memory on {threads} \
         threads; fewer refined blocks would",
        problem.block_size
    )))
}

/// Some rows of one row of the level above.
struct Tile {
    row_above: usize,
    rows: Range<usize>,
    /// The place of the first row in its row of the level above.
    place: usize,
    candidates: usize,
    columns: usize,
    /// Where its scores begin, and its lanes.
    start: usize,
    first_lane: usize,
    /// How many blocks of the head are refined in the rows of the level above before.
    parents_before: usize,
}

/// The scores of one head. Where a block has no valid keys the score is `-inf`.
struct ChildScores<T> {
    values: Buffer<T>,
    /// The best score of each lane, NaN left out.
    best: Vec<T>,
    tiles: Vec<Tile>,
    packed: Buffer<T>,
}

impl<T: Scalar> ChildScores<T> {
    fn new(children: &Children<'_>) -> Self {
        let problem = children.problem;
        Self {
            values: Buffer::scratch(0),
            best: Vec::new(),
            tiles: Vec::new(),
            packed: Buffer::scratch(problem.head_dim * coarse_tile_columns::<T>(problem)),
        }
    }

    fn compute(&mut self, children: &Children<'_>, head: usize, pyramid: &Pyramid<T>) {
        self.lay_out(children, head);
        let (problem, batch) = (children.problem, children.batch);
        let (segment, channels) = (batch.segment(head), problem.head_dim);
        let (queries, keys) = (pyramid.queries.of_head(batch, head), pyramid.keys.of_group(batch, batch.group(head)));
        for tile in &self.tiles {
            let columns = tile.columns;
            let mut packed = MatrixMut::new(&mut self.packed, channels, columns, columns);
            let means = tile.rows.clone().map(|i| &queries.row(i)[..channels]);
            pack_transposed(problem.level, means, T::from_f64(problem.scale), &mut packed);
            let values = &mut self.values[tile.start..][..tile.candidates * columns];
            let mut rest = &mut *values;
            for blocks in children.columns(head, tile.row_above) {
                let (logits, after) = rest.split_at_mut(blocks.len() * columns);
                rest = after;
                let (data, stride) = keys.tail(blocks.start);
                T::run(
                    problem.level,
                    Gemm {
                        a: Matrix::new(data, blocks.len(), channels, stride),
                        a_transposed: false,
                        b: Matrix::new(&self.packed, channels, columns, columns),
                        b_rows: None,
                        c: MatrixMut::new(logits, blocks.len(), columns, columns),
                        init: Init::Zero,
                        ahead: None,
                    },
                );
                if let Some(cap) = problem.softcap.map(T::from_f64) {
                    T::run(problem.level, Softcap { logits, cap, slopes: None });
                }
                add_mean_bias(problem, segment, head % problem.heads, tile.rows.clone(), blocks.clone(), logits, columns);
                if segment.keys.count_of_each(blocks.clone()).is_none() {
                    let empty = logits.chunks_exact_mut(columns).zip(blocks).filter(|&(_, j)| segment.keys.count(j) == 0);
                    empty.for_each(|(row, _)| row.fill(T::NEG_INFINITY));
                }
            }
            let numbers = Matrix::new(values, tile.candidates, columns, columns);
            T::run(problem.level, ColumnMaxima { numbers, maxima: &mut self.best[tile.first_lane..][..columns] });
        }
    }

    /// Gives each tile of a head its place.
    fn lay_out(&mut self, children: &Children<'_>, head: usize) {
        self.tiles.clear();
        let (mut start, mut first_lane, mut parents_before) = (0, 0, 0);
        for row_above in 0..children.batch_above.segment(head).rows.len() {
            let ((place, all), candidates) = (children.rows(head, row_above), children.candidates(head, row_above));
            for rows in tiles(all.clone()).filter(|_| candidates > 0) {
                let columns = children.problem.padded::<T>(rows.len());
                let place = place + rows.start - all.start;
                self.tiles.push(Tile { row_above, rows, place, candidates, columns, start, first_lane, parents_before });
                start += candidates * columns;
                first_lane += columns;
            }
            parents_before += children.parents(head, row_above).len();
        }
        if self.values.len() < start {
            self.values = Buffer::scratch(start);
        }
        self.best.resize(first_lane, T::ZERO);
    }

    fn get(&self, tile: &Tile, lane: usize, candidate: usize) -> T {
        self.values[tile.start + candidate * tile.columns + lane]
    }

    fn best_of(&self, tile: &Tile, lane: usize) -> T {
        self.best[tile.first_lane + lane]
    }
}

/// What decides which blocks of a head are selected. A candidate's number is its place among those of its row, so that candidates are in
/// the order of their blocks.
struct Choice<'a, T> {
    children: &'a Children<'a>,
    scores: &'a ChildScores<T>,
    segment: &'a Segment,
    head: usize,
    ratio: usize,
    /// For each row, its tile; none without candidates.
    tiles: Vec<Option<u32>>,
}

impl<'a, T: Scalar> Choice<'a, T> {
    fn new(children: &'a Children<'a>, scores: &'a ChildScores<T>, head: usize) -> Self {
        let segment = children.batch.segment(head);
        let mut tiles = vec![None; segment.rows.len()];
        for (index, tile) in scores.tiles.iter().enumerate() {
            tiles[tile.rows.clone()].fill(Some(u32::try_from(index).expect("fewer than 2^32 tiles")));
        }
        Self { children, scores, segment, head, ratio: children.ratio(), tiles }
    }

    /// Sets the bits of the selected blocks.
    fn take(&self, bits: &mut [u8]) {
        let (problem, head) = (self.children.problem, self.head % self.children.problem.heads);
        let live = self.count_live();
        let number = problem.budget.blocks_of_head(head, self.segment.live_rows()).min(live);
        let bound = self.sampled_bound(number);
        let complete = bound >= T::HIGHEST;
        let mut candidates = if complete { self.all() } else { self.near(bound) };
        let forced = self.force(&candidates, bits);
        let all = if problem.ratio == 1 {
            number.max(forced) == live
        } else {
            // The room that a plan has for what is chosen among the children of these follows from the budget.
            let filled = (0..self.segment.keys.len()).filter(|&j| self.segment.keys.count(j) > 0).count();
            number == live && problem.budget.covers(head, filled)
        };
        self.take_for_padded(all, bits);
        let rest = number.saturating_sub(forced);
        let free = |candidates: &mut Vec<Candidate<T>>| {
            candidates.retain(|candidate| {
                let (tile, lane) = self.place(candidate.column as usize).expect("a row of a candidate");
                !self.is_set(bits, tile, lane, candidate.row as usize)
            });
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
            let (tile, lane) = self.place(candidate.column as usize).expect("a row of a candidate");
            self.set(bits, tile, lane, candidate.row as usize);
        }
    }

    /// Rows of padded queries take their best block, or all of them if the budget is all, without a share in the budget.
    fn take_for_padded(&self, all: bool, bits: &mut [u8]) {
        for i in (0..self.segment.rows.len()).filter(|&i| !self.segment.is_live(i) && self.segment.rows.count(i) > 0) {
            let Some((tile, lane)) = self.place(i) else { continue };
            let filled = || (0..tile.candidates).filter(|&candidate| self.is_filled(tile, candidate));
            if all {
                filled().for_each(|candidate| self.set(bits, tile, lane, candidate));
                continue;
            }
            let best = filled().find(|&candidate| self.scores.get(tile, lane, candidate) == self.scores.best_of(tile, lane));
            if let Some(candidate) = best.or_else(|| filled().next()) {
                self.set(bits, tile, lane, candidate);
            }
        }
    }

    /// Sets the bits of the forced blocks, among them the best one of each row, and returns how many there are.
    fn force(&self, candidates: &[Candidate<T>], bits: &mut [u8]) -> usize {
        let mut best = vec![None; self.segment.rows.len()];
        for candidate in candidates.iter().filter(|candidate| candidate.distance == T::ZERO) {
            let (best, place) = (&mut best[candidate.column as usize], candidate.row);
            *best = Some(best.map_or(place, |lowest: u32| lowest.min(place)));
        }
        let mut forced = 0;
        for (i, best) in best.into_iter().enumerate().filter(|&(i, _)| self.segment.is_live(i)) {
            let Some((tile, lane)) = self.place(i) else { continue };
            let mut force = |candidate| {
                forced += usize::from(!self.is_set(bits, tile, lane, candidate));
                self.set(bits, tile, lane, candidate);
            };
            if let Some(candidate) = best.map(|best| best as usize).or_else(|| self.first_of_no_best(tile, lane)) {
                force(candidate);
            }
            let problem = self.children.problem;
            if problem.budget.forces_any() {
                let position = self.segment.row_position(i);
                let forced = |&candidate: &usize| {
                    self.is_filled(tile, candidate)
                        && problem.budget.forces(position, self.block(tile, candidate), problem.ratio)
                };
                (0..tile.candidates).filter(forced).for_each(force);
            }
        }
        forced
    }

    /// Where all scores of a row are infinite or NaN: its first block at `+inf`, or else the first one with keys.
    fn first_of_no_best(&self, tile: &Tile, lane: usize) -> Option<usize> {
        let filled = || (0..tile.candidates).filter(|&candidate| self.is_filled(tile, candidate));
        filled().find(|&candidate| self.scores.get(tile, lane, candidate) == T::INFINITY).or_else(|| filled().next())
    }

    /// Candidates of rows with a valid query, over all rows.
    fn count_live(&self) -> usize {
        let of_tile = |tile: &Tile| {
            let rows = tile.rows.clone().filter(|&i| self.segment.is_live(i)).count();
            rows * self.children.filled(self.head, tile.row_above)
        };
        self.scores.tiles.iter().map(of_tile).sum()
    }

    /// The tile of a row, and its lane there.
    fn place(&self, i: usize) -> Option<(&'a Tile, usize)> {
        let tile = &self.scores.tiles[self.tiles[i]? as usize];
        Some((tile, i - tile.rows.start))
    }

    /// The block of keys of a candidate.
    fn block(&self, tile: &Tile, candidate: usize) -> usize {
        let parents = self.children.parents(self.head, tile.row_above);
        parents[candidate / self.ratio] as usize * self.ratio + candidate % self.ratio
    }

    fn is_filled(&self, tile: &Tile, candidate: usize) -> bool {
        self.segment.keys.count(self.block(tile, candidate)) > 0
    }

    /// The bits of the blocks in the refined block of a candidate.
    fn bits_of(&self, tile: &Tile, lane: usize, candidate: usize) -> Range<usize> {
        let row = (tile.parents_before + candidate / self.ratio) * self.ratio + tile.place + lane;
        row * row_bytes(self.ratio)..(row + 1) * row_bytes(self.ratio)
    }

    fn is_set(&self, bits: &[u8], tile: &Tile, lane: usize, candidate: usize) -> bool {
        let bit = candidate % self.ratio;
        bits[self.bits_of(tile, lane, candidate)][bit / 8] >> (bit % 8) & 1 == 1
    }

    fn set(&self, bits: &mut [u8], tile: &Tile, lane: usize, candidate: usize) {
        set_bit(&mut bits[self.bits_of(tile, lane, candidate)], candidate % self.ratio);
    }

    /// The distance of a candidate; infinite if it is not live.
    fn distance(&self, tile: &Tile, lane: usize, candidate: usize) -> T {
        if !self.segment.is_live(tile.rows.start + lane) || !self.is_filled(tile, candidate) {
            return T::INFINITY;
        }
        let distance = self.scores.best_of(tile, lane) - self.scores.get(tile, lane, candidate);
        // Not a number, or infinitely far: last among the live blocks.
        if distance < T::HIGHEST { distance } else { T::HIGHEST }
    }

    /// A bound that probably has between one and a few times `number` distances below it; infinite if there are few in all.
    fn sampled_bound(&self, number: usize) -> T {
        const SAMPLES: usize = 4096;
        let pairs = |tile: &Tile| tile.rows.len() * tile.candidates;
        let total: usize = self.scores.tiles.iter().map(pairs).sum();
        if total <= 2 * SAMPLES {
            return T::INFINITY;
        }
        // An odd step visits all candidates even where their number is a power of two.
        let step = (total / SAMPLES) | 1;
        let (mut sample, mut next) = (Vec::with_capacity(SAMPLES), 0);
        for tile in &self.scores.tiles {
            while next < pairs(tile) {
                sample.push(self.distance(tile, next / tile.candidates, next % tile.candidates));
                next += step;
            }
            next -= pairs(tile);
        }
        let expected = number * sample.len() / total;
        // Half as many again and some: the number below the bound varies by about the square root.
        let position = (expected + expected / 2 + 16).min(sample.len() - 1);
        *sample.select_nth_unstable_by(position, T::total_cmp).1
    }

    /// The live blocks up to a distance below the highest number.
    fn near(&self, bound: T) -> Vec<Candidate<T>> {
        let (mut found, mut best) = (Vec::new(), Vec::new());
        for tile in &self.scores.tiles {
            // Nothing is near where nothing is best, nor in a lane without a valid query.
            best.clear();
            best.extend((0..tile.columns).map(|lane| {
                let best = self.scores.best_of(tile, lane);
                let is_live = lane < tile.rows.len() && self.segment.is_live(tile.rows.start + lane);
                if is_live && T::LOWEST <= best && best <= T::HIGHEST { best } else { T::NAN }
            }));
            let values = &self.scores.values[tile.start..][..tile.candidates * tile.columns];
            let numbers = Matrix::new(values, tile.candidates, tile.columns, tile.columns);
            let (level, first_column) = (self.children.problem.level, tile.rows.start);
            T::run(level, FindNear { numbers, best: &best, bound, first_column, found: &mut found });
        }
        found
    }

    /// All live blocks.
    fn all(&self) -> Vec<Candidate<T>> {
        let number = |index: usize| u32::try_from(index).expect("fewer than 2^32 blocks");
        let mut all = Vec::new();
        for tile in &self.scores.tiles {
            for (lane, i) in tile.rows.clone().enumerate().filter(|&(_, i)| self.segment.is_live(i)) {
                let filled = (0..tile.candidates).filter(|&candidate| self.is_filled(tile, candidate));
                all.extend(filled.map(|candidate| Candidate {
                    distance: self.distance(tile, lane, candidate),
                    column: number(i),
                    row: number(candidate),
                }));
            }
        }
        all
    }
}
