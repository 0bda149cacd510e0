//! The largest numbers of each column, and whether all numbers are finite.

use super::Matrix;
use crate::simd::{Kernel, MOST_LANES, Scalar, Simd};

/// Which rows hold the largest numbers of each column, as many as each column wants.
///
/// ```text
/// for each vector of columns:
///     top[0..K] = -inf
///     for each row:  x = row;  for t in top:  t, x = max(x, t), min(x, t)      top stays sorted; K = 8: eight rows at a time
///     bound = top[wanted - 1]
///     for each row:  take it if x > bound, or x = bound and there is room      so ties go to the lower row
/// ```
///
/// `K` is at least what any column wants. A column whose bound is not above `-inf` gets nothing: there are too few numbers
/// that are neither that nor NaN, and the caller has to look closer. So do all columns if one of them wants more than
/// [`MOST_LARGEST`].
pub(crate) struct Largest<'a, T> {
    /// The numbers; as many columns as whole vectors.
    pub(crate) numbers: Matrix<'a, T>,
    /// How many each column wants, at most the number of rows.
    pub(crate) wanted: &'a [usize],
    /// Rows that were taken, ascending: those of column `c` from `c * stride` on.
    pub(crate) rows: &'a mut [u32],
    /// Room for the rows of a column.
    pub(crate) stride: usize,
    /// How many rows each column got: what it wants, or 0.
    pub(crate) taken: &'a mut [usize],
}

/// The most that a column can want of [`Largest`]: beyond, the work for each number is that of its dot product.
pub(crate) const MOST_LARGEST: usize = 32;

/// Rows that are sorted at a time where 5 to 8 are wanted.
const EIGHT: usize = 8;

impl<T: Scalar> Kernel<T> for Largest<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let columns = self.numbers.cols;
        assert_eq!(columns % S::LANES, 0, "whole vectors of columns");
        assert!(columns <= self.wanted.len() && columns <= self.taken.len(), "a number for each column");
        let most = self.wanted[..columns].iter().copied().max().unwrap_or(0);
        assert!(most <= self.stride && columns * self.stride <= self.rows.len(), "room for what is wanted");
        self.taken[..columns].fill(0);
        for column in (0..columns).step_by(S::LANES) {
            match most {
                0 => {}
                1..=4 => self.vector::<S, 4>(simd, column),
                5..=8 => self.vector::<S, 8>(simd, column),
                9..=16 => self.vector::<S, 16>(simd, column),
                17..=MOST_LARGEST => self.vector::<S, MOST_LARGEST>(simd, column),
                _ => {}
            }
        }
    }
}

impl<T: Scalar> Largest<'_, T> {
    #[inline(always)]
    fn vector<S: Simd<T>, const K: usize>(&mut self, simd: S, column: usize) {
        let (height, stride) = (self.numbers.rows, self.numbers.stride);
        // Not a closure: it would be compiled without the instructions of `simd`.
        let first = self.numbers.as_ptr().wrapping_add(column);
        let lowest = simd.splat(T::NEG_INFINITY);
        let mut top = [lowest; K];
        // Eight rows at a time take 78 operations, one by one 136. Networks of 16 and 32 gained nothing.
        let whole = if K == EIGHT { height - height % EIGHT } else { 0 };
        for start in (0..whole).step_by(EIGHT) {
            let mut rows = [lowest; EIGHT];
            for (row, x) in (start..).zip(&mut rows) {
                // SAFETY: a whole vector of columns from `column` on is in bounds in every row, by the assertions of `run`.
                *x = simd.max(unsafe { simd.load(first.add(row * stride)) }, lowest);
            }
            sort_ascending(simd, &mut rows);
            keep_largest(simd, top.first_chunk_mut().expect("eight, as tested"), &rows);
        }
        for row in whole..height {
            // SAFETY: as above.
            let mut x = simd.max(unsafe { simd.load(first.add(row * stride)) }, lowest);
            for t in &mut top {
                (*t, x) = (simd.max(x, *t), simd.min(x, *t));
            }
        }
        let mut sorted = [[T::ZERO; MOST_LANES]; K];
        assert!(S::LANES <= MOST_LANES);
        for (line, t) in sorted.iter_mut().zip(top) {
            // SAFETY: a line has room for a vector, asserted above.
            unsafe { simd.store(line.as_mut_ptr(), t) };
        }
        let (mut bound, mut ties, mut tied) = ([T::NAN; MOST_LANES], [0; MOST_LANES], [false; MOST_LANES]);
        for lane in 0..S::LANES {
            let wanted = self.wanted[column + lane];
            if wanted > 0 && sorted[wanted - 1][lane] > T::NEG_INFINITY {
                bound[lane] = sorted[wanted - 1][lane];
                ties[lane] = wanted - sorted.iter().filter(|line| line[lane] > bound[lane]).count();
                // The next one is equal too, or is not known.
                tied[lane] = sorted.get(wanted).is_none_or(|line| line[lane] == bound[lane]);
            }
        }
        // SAFETY: room for a vector, asserted above.
        let bounds = unsafe { simd.load(bound.as_ptr()) };
        // Hits of several rows at a time: how many one row has is hard to foresee, and a wrong guess costs more than its hits.
        let rows_of_word = u64::BITS as usize / S::LANES;
        for start in (0..height).step_by(rows_of_word) {
            let mut hits = 0;
            for row in start..height.min(start + rows_of_word) {
                // SAFETY: as above.
                let row_hits = simd.at_least(unsafe { simd.load(first.add(row * stride)) }, bounds);
                hits |= u64::from(row_hits) << ((row - start) * S::LANES);
            }
            while hits != 0 {
                let bit = hits.trailing_zeros() as usize;
                hits &= hits - 1;
                let (row, lane) = (start + bit / S::LANES, bit % S::LANES);
                // SAFETY: a lane of that vector.
                if tied[lane] && unsafe { *first.add(row * stride + lane) } == bound[lane] {
                    if ties[lane] == 0 {
                        continue;
                    }
                    ties[lane] -= 1;
                }
                let taken = &mut self.taken[column + lane];
                self.rows[(column + lane) * self.stride + *taken] = u32::try_from(row).expect("fewer than 2^32 rows");
                *taken += 1;
            }
        }
    }
}

/// Orders pairs of lanes of an array of vectors, one after the other: the smaller number to the first place, the larger to the
/// second. Written out, as the vectors of a loop over places are kept in memory.
macro_rules! order {
    ($simd:ident, $vectors:ident: $($small:literal $large:literal),+) => {
        $(
            let (a, b) = ($vectors[$small], $vectors[$large]);
            ($vectors[$small], $vectors[$large]) = ($simd.min(a, b), $simd.max(a, b));
        )+
    };
}

/// Sorts each lane, the smallest number first, by Batcher's network (odd-even merge sort; Knuth, The Art of Computer Programming,
/// volume 3, section 5.3.4).
#[inline(always)]
fn sort_ascending<T, S: Simd<T>>(simd: S, rows: &mut [S::V; EIGHT]) {
    order!(simd, rows:
        0 1, 2 3, 4 5, 6 7, 0 2, 1 3, 4 6, 5 7, 1 2, 5 6, 0 4, 1 5, 2 6, 3 7, 2 4, 3 5, 1 2, 3 4, 5 6);
}

/// The largest numbers of each lane of `top`, the largest first, and of `rows`, the smallest first, into `top`.
#[inline(always)]
fn keep_largest<T, S: Simd<T>>(simd: S, top: &mut [S::V; EIGHT], rows: &[S::V; EIGHT]) {
    for (t, &x) in top.iter_mut().zip(rows) {
        *t = simd.max(x, *t);
    }
    // They fall and then rise: the rest of Batcher's bitonic sort.
    order!(simd, top:
        4 0, 5 1, 6 2, 7 3, 2 0, 3 1, 6 4, 7 5, 1 0, 3 2, 5 4, 7 6);
}

/// Whether every number of a matrix is finite.
pub(crate) struct AllFinite<'a, T>(pub(crate) Matrix<'a, T>);

impl<T: Scalar> Kernel<T> for AllFinite<'_, T> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> bool {
        // 0 times a finite number is 0, times any other NaN.
        let zero = simd.splat(T::ZERO);
        let (mut sums, mut rest) = ([zero; 4], T::ZERO);
        for row in 0..self.0.rows {
            let vectors = self.0.row(row).chunks_exact(S::LANES);
            for &x in vectors.remainder() {
                rest += x * T::ZERO;
            }
            for (index, vector) in vectors.enumerate() {
                // SAFETY: the chunk holds a whole vector.
                let x = unsafe { simd.load(vector.as_ptr()) };
                sums[index % 4] = simd.mul_add(x, zero, sums[index % 4]);
            }
        }
        let sum = simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3]));
        simd.at_least(sum, zero).count_ones() as usize == S::LANES && rest == T::ZERO
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::RngExt;
    use proptest::test_runner::{RngAlgorithm, TestRng};

    use super::*;
    use crate::simd::Level;

    /// Few different numbers, so that there are ties, zeros of both signs among the largest, and too few numbers at times.
    fn the_largest_ties_to_the_lower_row<T: Scalar>(level: Level) {
        let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[9; 32]);
        let odd = [f64::NAN, f64::NEG_INFINITY, -0.0].map(T::from_f64);
        let columns = 2 * T::lanes(level);
        let sizes = [(1, 1), (5, 3), (40, 4), (7, 7), (8, 8), (16, 8), (40, 8), (203, 8), (70, 16), (70, 32), (33, 32)];
        for ((height, most), (lowest, odd_ones)) in
            sizes.into_iter().flat_map(|size| [(-20, 0.1), (-3, 0.4)].map(|of| (size, of)))
        {
            let numbers: Vec<T> = (0..height * columns)
                .map(|_| {
                    if rng.random_bool(odd_ones) {
                        odd[rng.random_range(0..3)]
                    } else {
                        T::from_f64(f64::from(rng.random_range(lowest..=0)))
                    }
                })
                .collect();
            let wanted: Vec<usize> = (0..columns).map(|_| rng.random_range(0..=most.min(height))).collect();
            let (mut rows, mut taken) = (vec![u32::MAX; columns * most], vec![0; columns]);
            let kernel = Largest {
                numbers: Matrix::new(&numbers, height, columns, columns),
                wanted: &wanted,
                rows: &mut rows,
                stride: most,
                taken: &mut taken,
            };
            T::run(level, kernel);
            for column in 0..columns {
                let value = |row: usize| numbers[row * columns + column];
                let mut order: Vec<usize> = (0..height).filter(|&row| value(row) > T::NEG_INFINITY).collect();
                order.sort_by(|&a, &b| (value(b) + T::ZERO).total_cmp(&(value(a) + T::ZERO)).then(a.cmp(&b)));
                let mut expected = if order.len() < wanted[column] { &[] } else { &order[..wanted[column]] }.to_vec();
                expected.sort_unstable();
                let result = &rows[column * most..][..taken[column]];
                assert!(result.iter().map(|&row| row as usize).eq(expected), "{}: column {column}", level.name());
            }
        }
    }

    #[test]
    fn the_largest_of_each_column() {
        for level in Level::available() {
            the_largest_ties_to_the_lower_row::<f32>(level);
            the_largest_ties_to_the_lower_row::<f64>(level);
        }
    }

    /// Checks both networks with every input of zeros and ones: one that is right for these is right for all numbers (Knuth, as
    /// above).
    struct Networks;

    impl<T: Scalar> Kernel<T> for Networks {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd<T>>(self, simd: S) {
            let [zero, one] = [0.0, 1.0].map(|x| simd.splat(T::from_f64(x)));
            for pattern in 0_u32..1 << EIGHT {
                let mut rows = [zero; EIGHT];
                for (i, x) in rows.iter_mut().enumerate() {
                    *x = if pattern >> i & 1 == 1 { one } else { zero };
                }
                sort_ascending(simd, &mut rows);
                let ones = pattern.count_ones() as usize;
                assert_eq!(ones_of(simd, rows), 0xff << (EIGHT - ones) & 0xff, "{pattern:08b}");
                for before in 0..=EIGHT {
                    let mut top = [zero; EIGHT];
                    top[..before].fill(one);
                    keep_largest(simd, &mut top, &rows);
                    assert_eq!(ones_of(simd, top), (1 << EIGHT.min(before + ones)) - 1, "{before} and {ones}");
                }
            }
        }
    }

    /// Which vectors are 1 in all lanes, one bit for each; the others are 0 in all lanes.
    #[inline(always)]
    fn ones_of<T: Scalar, S: Simd<T>>(simd: S, vectors: [S::V; EIGHT]) -> usize {
        let mut bits = 0;
        for (i, x) in vectors.into_iter().enumerate() {
            let reached = simd.at_least(x, simd.splat(T::from_f64(1.0))).count_ones() as usize;
            assert!(reached == 0 || reached == S::LANES, "lanes differ");
            bits |= usize::from(reached > 0) << i;
        }
        bits
    }

    #[test]
    fn the_networks_sort() {
        for level in Level::available() {
            f32::run(level, Networks);
            f64::run(level, Networks);
        }
    }

    #[test]
    fn one_number_that_is_not_finite_is_found() {
        for level in Level::available() {
            // Whole vectors and some more, with NaN between the rows.
            let (rows, columns) = (3, 3 * f32::lanes(level) + 5);
            let stride = columns + 2;
            let mut numbers = vec![f32::NAN; rows * stride];
            numbers.chunks_exact_mut(stride).for_each(|row| row[..columns].fill(f32::MAX));
            let finite = |numbers: &[f32]| f32::run(level, AllFinite(Matrix::new(numbers, rows, columns, stride)));
            assert!(finite(&numbers), "{}", level.name());
            for place in (0..rows * stride).filter(|place| place % stride < columns) {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    numbers[place] = bad;
                    assert!(!finite(&numbers), "{}: {bad} at {place}", level.name());
                }
                numbers[place] = -1e-45;
            }
        }
    }
}
