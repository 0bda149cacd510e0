//! The number that so many numbers of a column reach, and who reaches it.

use super::Matrix;
use crate::simd::{Kernel, MOST_LANES, Scalar, Simd};

/// For each column a bound that at least its `wanted` numbers reach, and at most an eighth more where numbers are not too close for
/// that. Where there are fewer numbers that are neither NaN nor `-inf`, all of them reach it; where none is wanted, no number does.
///
/// ```text
/// for each vector of columns:
///     low = the largest, then 4, 8, 16, ... less, until enough numbers reach it;  high = the last one that too few reach
///     halve low..high until not too many numbers reach low, or nothing lies between
/// ```
///
/// The time does not depend on how many are wanted. To find as many as are wanted to the one takes half as long again.
pub(crate) struct Bounds<'a, T> {
    /// The numbers; as many columns as whole vectors.
    pub(crate) numbers: Matrix<'a, T>,
    pub(crate) wanted: &'a [usize],
    pub(crate) bounds: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for Bounds<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Self { numbers, wanted, bounds } = self;
        assert_eq!(numbers.cols % S::LANES, 0, "whole vectors of columns");
        assert!(numbers.cols <= wanted.len() && numbers.cols <= bounds.len(), "a number for each column");
        for column in (0..numbers.cols).step_by(S::LANES) {
            let wanted = &wanted[column..column + S::LANES];
            let bounds = &mut bounds[column..column + S::LANES];
            search(simd, &numbers, column, wanted, bounds);
        }
    }
}

/// The searches of the lanes of a vector. Arrays without branches: the compiler makes vectors of them, and a lane that is done waits
/// for the others.
struct Search<T> {
    /// The largest number, as far as it is finite.
    top: [T; MOST_LANES],
    wanted: [T; MOST_LANES],
    most: [T; MOST_LANES],
    /// Enough numbers reach it, once that is known.
    low: [T; MOST_LANES],
    /// Too few numbers reach it.
    high: [T; MOST_LANES],
    /// How far below the largest number to look next, until enough numbers reach `low`; then 0.
    step: [T; MOST_LANES],
    /// The number to try next.
    next: [T; MOST_LANES],
    done: [bool; MOST_LANES],
}

/// Where the search starts below the largest number: most of what is wanted has weights that matter, and those are within.
const FIRST_STEP: f64 = 4.0;

#[inline(always)]
fn search<T: Scalar, S: Simd<T>>(simd: S, numbers: &Matrix<'_, T>, column: usize, wanted: &[usize], bounds: &mut [T]) {
    let mut search = Search::new(largest_of_columns(simd, numbers, column), wanted);
    while !search.done.iter().all(|&done| done) {
        let counts = count(simd, numbers, column, &search.next);
        search.learn(&counts);
    }
    for (lane, bound) in bounds.iter_mut().enumerate() {
        *bound = if wanted[lane] == 0 { T::INFINITY } else { search.low[lane] };
    }
}

impl<T: Scalar> Search<T> {
    #[inline(always)]
    fn new(largest: [T; MOST_LANES], wanted: &[usize]) -> Self {
        let mut search = Self {
            top: largest.map(|x| if x < T::HIGHEST { x } else { T::HIGHEST }),
            wanted: [T::ZERO; MOST_LANES],
            most: [T::ZERO; MOST_LANES],
            low: largest,
            high: [T::INFINITY; MOST_LANES],
            step: [T::from_f64(FIRST_STEP); MOST_LANES],
            next: largest,
            done: [true; MOST_LANES],
        };
        for (lane, &wanted) in wanted.iter().enumerate() {
            search.wanted[lane] = T::from_f64(wanted as f64);
            search.most[lane] = T::from_f64((wanted + wanted / 8) as f64);
            // Without a number that counts there is nothing to find.
            let nothing = largest[lane] == T::NEG_INFINITY;
            search.low[lane] = if nothing { T::LOWEST } else { largest[lane] };
            search.done[lane] = nothing || wanted == 0;
        }
        search
    }

    /// Takes in how many numbers reach what was tried.
    #[allow(clippy::needless_bitwise_bool, reason = "a branch would keep the compiler from making vectors")]
    #[inline(always)]
    fn learn(&mut self, counts: &[T; MOST_LANES]) {
        let half = T::from_f64(0.5);
        for lane in 0..MOST_LANES {
            let (tried, step, wanted) = (self.next[lane], self.step[lane], self.wanted[lane]);
            let (enough, looking) = (counts[lane] >= wanted, step > T::ZERO);
            let lower = self.top[lane] - step;
            let lower = if lower > T::LOWEST { lower } else { T::LOWEST };
            let otherwise = if looking { lower } else { self.low[lane] };
            let low = if enough { tried } else { otherwise };
            let high = if enough { self.high[lane] } else { tried };
            let step = if enough { T::ZERO } else { step + step };
            let middle = low * half + high * half;
            let between = (middle > low) & (middle < high);
            // Below the lowest number there is nothing.
            let over = (enough & (counts[lane] <= self.most[lane])) | (!enough & looking & (tried == T::LOWEST));
            let over = over | ((step == T::ZERO) & !between);
            let done = self.done[lane];
            self.low[lane] = if done { self.low[lane] } else { low };
            self.high[lane] = if done { self.high[lane] } else { high };
            self.step[lane] = if done { self.step[lane] } else { step };
            self.next[lane] = if step > T::ZERO { low } else { middle };
            self.done[lane] = done | over;
        }
    }
}

/// How many numbers of each column reach the number of its lane.
#[inline(always)]
fn count<T: Scalar, S: Simd<T>>(simd: S, numbers: &Matrix<'_, T>, column: usize, bounds: &[T; MOST_LANES]) -> [T; MOST_LANES] {
    assert!(S::LANES <= MOST_LANES && column + S::LANES <= numbers.cols);
    let first = numbers.as_ptr().wrapping_add(column);
    // SAFETY: there is room for a vector, and a whole vector of columns from `column` on is in bounds in every row, asserted above.
    unsafe {
        let bounds = simd.load(bounds.as_ptr());
        let mut sums = [simd.splat(T::ZERO); 4];
        let whole = numbers.rows - numbers.rows % sums.len();
        for row in (0..whole).step_by(sums.len()) {
            for (index, sum) in sums.iter_mut().enumerate() {
                *sum = simd.count_at_least(*sum, simd.load(first.wrapping_add((row + index) * numbers.stride)), bounds);
            }
        }
        for row in whole..numbers.rows {
            sums[0] = simd.count_at_least(sums[0], simd.load(first.wrapping_add(row * numbers.stride)), bounds);
        }
        let mut counts = [T::ZERO; MOST_LANES];
        simd.store(counts.as_mut_ptr(), simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])));
        counts
    }
}

/// The largest number of each column; `-inf` where there is none.
#[inline(always)]
fn largest_of_columns<T: Scalar, S: Simd<T>>(simd: S, numbers: &Matrix<'_, T>, column: usize) -> [T; MOST_LANES] {
    assert!(S::LANES <= MOST_LANES && column + S::LANES <= numbers.cols);
    let first = numbers.as_ptr().wrapping_add(column);
    let mut lanes = [T::NEG_INFINITY; MOST_LANES];
    // SAFETY: as in `count`.
    unsafe {
        let mut largest = simd.splat(T::NEG_INFINITY);
        for row in 0..numbers.rows {
            largest = simd.max(simd.load(first.wrapping_add(row * numbers.stride)), largest);
        }
        simd.store(lanes.as_mut_ptr(), largest);
    }
    lanes
}

/// Lists the columns whose number in a row reaches their bound, ascending.
pub(crate) struct Reached<'a, T> {
    /// Whole vectors.
    pub(crate) row: &'a [T],
    pub(crate) bounds: &'a [T],
    pub(crate) columns: &'a mut Vec<u32>,
}

impl<T: Scalar> Kernel<T> for Reached<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let len = self.row.len();
        assert!(len.is_multiple_of(S::LANES) && len <= self.bounds.len(), "whole vectors, and bounds for them");
        self.columns.clear();
        // Hits of several vectors at a time: how many one has is hard to foresee.
        for start in (0..len).step_by(u64::BITS as usize) {
            let mut hits = 0_u64;
            for column in (start..len.min(start + u64::BITS as usize)).step_by(S::LANES) {
                // SAFETY: whole vectors of both, asserted above.
                let reached = unsafe {
                    simd.at_least(simd.load(self.row.as_ptr().add(column)), simd.load(self.bounds.as_ptr().add(column)))
                };
                hits |= u64::from(reached) << (column - start);
            }
            while hits != 0 {
                self.columns.push(u32::try_from(start).expect("fewer than 2^32 columns") + hits.trailing_zeros());
                hits &= hits - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::RngExt;
    use proptest::test_runner::{RngAlgorithm, TestRng};

    use super::*;
    use crate::simd::Level;

    /// What reaches the bound of a column is what the definition says, whatever is among the numbers.
    fn so_many_reach_it<T: Scalar>(level: Level) {
        let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
        let odd = [f64::NAN, f64::NEG_INFINITY, f64::INFINITY, -0.0, -1e30, 3e38, 1e-40].map(T::from_f64);
        let columns = 2 * T::lanes(level);
        for (height, magnitude, odd_ones) in [(1, 1.0, 0.5), (9, 1e-6, 0.0), (70, 5.0, 0.0), (203, 1e4, 0.1), (40, 2.0, 0.9)] {
            let numbers: Vec<T> = (0..height * columns)
                .map(|_| {
                    if rng.random_bool(odd_ones) {
                        odd[rng.random_range(0..odd.len())]
                    } else {
                        // Few different ones in half of the columns.
                        let x: f64 = rng.random_range(-1.0..1.0);
                        T::from_f64(magnitude * if rng.random_bool(0.5) { (4.0 * x).round() } else { x })
                    }
                })
                .collect();
            let wanted: Vec<usize> = (0..columns).map(|_| rng.random_range(0..=height + 2)).collect();
            let (mut bounds, mut reached) = (vec![T::ZERO; columns], Vec::new());
            T::run(
                level,
                Bounds { numbers: Matrix::new(&numbers, height, columns, columns), wanted: &wanted, bounds: &mut bounds },
            );
            let mut actual = vec![Vec::new(); columns];
            for (row, numbers) in numbers.chunks_exact(columns).enumerate() {
                T::run(level, Reached { row: numbers, bounds: &bounds, columns: &mut reached });
                for &column in &reached {
                    actual[column as usize].push(row);
                }
            }
            for column in (0..columns).filter(|&column| wanted[column] > 0) {
                let number = |row: usize| numbers[row * columns + column];
                let mut order: Vec<T> = (0..height).map(number).filter(|&x| x > T::NEG_INFINITY).collect();
                order.sort_by(|a, b| b.total_cmp(a));
                let (least, most) = (wanted[column], wanted[column] + wanted[column] / 8);
                let reached = actual[column].len();
                assert!(reached >= least.min(order.len()), "{}: {reached} of {least}", level.name());
                // The largest ones, and more than that only where they are too close.
                let last = order.get(reached.wrapping_sub(1)).copied().unwrap_or(T::INFINITY);
                let expected: Vec<usize> = (0..height).filter(|&row| number(row) >= last && reached > 0).collect();
                assert_eq!(actual[column], expected, "{}: column {column} of {height}", level.name());
                if reached > most {
                    let (first, last): (f64, f64) = (order[most - 1].into(), last.into());
                    let close = first <= last || first - last < 1e-6 * first.abs().max(last.abs());
                    assert!(close, "{}: {reached} of {most}, {first:e} to {last:e}", level.name());
                }
            }
        }
    }

    #[test]
    fn as_many_as_are_wanted_reach_the_bound() {
        for level in Level::available() {
            so_many_reach_it::<f32>(level);
            so_many_reach_it::<f64>(level);
        }
    }
}
