//! The largest products of rows of 8-bit codes.

use crate::simd::{CODE_LANES, CodeLine, DotCodes, Kernel, KernelCodes, Scalar, Simd};

/// For each listed query, the largest product of its codes and those of a key, in the groups of four channels that the keys have kept.
///
/// ```text
/// for each tile of queries, for each two lines of keys, or the one that there is:
///     sum[query][key] += <four codes of the query, four codes of the key>      for each group that is kept
///     largest[query] = max(largest[query], sum[query][..])
/// ```
pub(crate) struct LargestProducts<'a> {
    /// Rows of codes with [`CODE_BIAS`](crate::simd::CODE_BIAS) added, `stride` codes apart.
    pub(crate) queries: &'a [u8],
    pub(crate) stride: usize,
    /// Which rows.
    pub(crate) numbers: &'a [u32],
    /// For each kept group the lines of all keys.
    pub(crate) lines: &'a [CodeLine],
    /// The kept groups.
    pub(crate) groups: &'a [u32],
    /// For each line of keys, what their sums start from.
    pub(crate) corrections: &'a [[i32; CODE_LANES]],
    /// A number for each listed query.
    pub(crate) largest: &'a mut [i32],
}

impl KernelCodes for LargestProducts<'_> {
    #[inline(always)]
    fn run<S: DotCodes>(self, simd: S) {
        let width = self.corrections.len();
        assert_eq!(self.lines.len(), width * self.groups.len(), "lines of every group");
        assert!(self.numbers.len() <= self.largest.len(), "a number for each query");
        let last = self.numbers.iter().copied().max().map_or(0, |number| number as usize + 1);
        let needed = self.groups.iter().copied().max().map_or(0, |group| 4 * (group as usize + 1));
        assert!(needed <= self.stride && last * self.stride <= self.queries.len(), "the listed queries have every group");
        let mut first = 0;
        macro_rules! tiles {
            ($($rows:literal),+) => {
                $(
                    while $rows <= S::ROWS && self.numbers.len() - first >= $rows {
                        let numbers = self.numbers[first..].first_chunk::<$rows>().expect("as many, as tested");
                        // SAFETY: rows and groups are within the queries, asserted above.
                        let largest = unsafe {
                            if width == 1 { self.tile::<S, $rows, 1>(simd, numbers) } else { self.tile::<S, $rows, 2>(simd, numbers) }
                        };
                        self.largest[first..first + $rows].copy_from_slice(&largest);
                        first += $rows;
                    }
                )+
            };
        }
        tiles!(8, 4, 2, 1);
    }
}

impl LargestProducts<'_> {
    /// # Safety
    /// - These queries have all kept groups.
    #[inline(always)]
    unsafe fn tile<S: DotCodes, const ROWS: usize, const LINES: usize>(&self, simd: S, numbers: &[u32; ROWS]) -> [i32; ROWS] {
        let width = self.corrections.len();
        let mut rows = [self.queries.as_ptr(); ROWS];
        for r in 0..ROWS {
            rows[r] = rows[r].wrapping_add(numbers[r] as usize * self.stride);
        }
        let mut largest = [i32::MIN; ROWS];
        for first in (0..width).step_by(LINES) {
            // An odd last line is computed twice: the larger of two equal numbers.
            let line: [usize; LINES] = std::array::from_fn(|l| (first + l).min(width - 1));
            let mut sums = [[simd.start(&self.corrections[first]); LINES]; ROWS];
            for l in 1..LINES {
                for r in 0..ROWS {
                    sums[r][l] = simd.start(&self.corrections[line[l]]);
                }
            }
            for (lines, &group) in self.lines.chunks_exact(width).zip(self.groups) {
                for r in 0..ROWS {
                    // SAFETY: the caller's.
                    let word = unsafe { simd.word(rows[r].wrapping_add(4 * group as usize)) };
                    for l in 0..LINES {
                        sums[r][l] = simd.dot(sums[r][l], word, &lines[line[l]]);
                    }
                }
            }
            let mut of_lines = sums.map(|sums| sums[0]);
            for l in 1..LINES {
                for r in 0..ROWS {
                    of_lines[r] = simd.max(of_lines[r], sums[r][l]);
                }
            }
            let of_lines = simd.max_across_each(of_lines);
            for r in 0..ROWS {
                largest[r] = largest[r].max(of_lines[r]);
            }
        }
        largest
    }
}

/// Rounds the multiples of a row to codes: the largest size becomes 127. Returns what a code of 1 stands for; 0 where all codes are.
pub(crate) struct Encode<'a, T> {
    pub(crate) row: &'a [T],
    /// What the row is multiplied by.
    pub(crate) factor: T,
    /// What is added to the codes.
    pub(crate) bias: u8,
    pub(crate) codes: &'a mut [u8],
}

impl<T: Scalar> Kernel<T> for Encode<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> T {
        let largest = largest_size(simd, self.row, self.factor);
        let (unit, per_unit) = unit_of_codes(largest);
        for (code, &x) in self.codes.iter_mut().zip(self.row) {
            *code = ((x * self.factor) * per_unit).to_code().cast_unsigned().wrapping_add(self.bias);
        }
        unit
    }
}

/// Replaces rows by what they differ from their mean, and sums the squares of each channel.
pub(crate) struct Deviate<'a, T> {
    /// Rows as long as the mean.
    pub(crate) rows: &'a mut [T],
    pub(crate) mean: &'a [T],
    pub(crate) squares: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for Deviate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) {
        self.squares.fill(T::ZERO);
        for row in self.rows.chunks_exact_mut(self.mean.len()) {
            for ((x, &mean), square) in row.iter_mut().zip(self.mean).zip(self.squares.iter_mut()) {
                let difference = *x - mean;
                *x = difference;
                *square += difference * difference;
            }
        }
    }
}

/// What a code of 1 stands for where the largest size is this one, and how many codes a 1 is.
fn unit_of_codes<T: Scalar>(largest: T) -> (T, T) {
    let most = T::from_f64(127.0);
    // Without a number to divide by, and with one that leaves nothing of the others, every code is 0.
    if largest > T::ZERO && largest < T::INFINITY { (largest / most, most / largest) } else { (T::ZERO, T::ZERO) }
}

/// The largest size of the multiples of a row; NaN is left out.
#[inline(always)]
fn largest_size<T: Scalar, S: Simd<T>>(simd: S, row: &[T], factor: T) -> T {
    let (zero, by) = (simd.splat(T::ZERO), simd.splat(factor));
    // Several chains, since each maximum waits for the one before.
    let mut largest = [zero; 4];
    let vectors = row.chunks_exact(S::LANES);
    let mut rest = T::ZERO;
    for &x in vectors.remainder() {
        for x in [x * factor, T::ZERO - x * factor] {
            rest = if x > rest { x } else { rest };
        }
    }
    for (index, vector) in vectors.enumerate() {
        // SAFETY: the chunk holds a whole vector.
        let x = simd.mul(unsafe { simd.load(vector.as_ptr()) }, by);
        largest[index % 4] = simd.max(x, simd.max(simd.sub(zero, x), largest[index % 4]));
    }
    let largest = simd.max_across(simd.max(simd.max(largest[0], largest[1]), simd.max(largest[2], largest[3])));
    if rest > largest { rest } else { largest }
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::float_cmp,
    reason = "small numbers, and units that are exact"
)]
mod tests {
    use proptest::prelude::RngExt;
    use proptest::test_runner::{RngAlgorithm, TestRng};

    use super::*;
    use crate::simd::{CODE_BIAS, CodeLevel, Level};

    /// All numbers of queries and lines that the tiles tell apart, and the largest codes.
    #[test]
    fn products_are_exact_at_every_level() {
        let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[5; 32]);
        for (width, kept, groups, count, most) in
            [(1, 1, 1, 1, 127), (2, 16, 16, 15, 127), (3, 5, 9, 8, 3), (2, 32, 64, 11, 90)]
        {
            let mut code = || rng.random_range(-most..=most);
            let queries: Vec<i32> = (0..20 * 4 * groups).map(|_| code()).collect();
            let lines: Vec<CodeLine> =
                (0..kept * width).map(|_| CodeLine(std::array::from_fn(|_| std::array::from_fn(|_| code() as i8)))).collect();
            let kept_groups: Vec<u32> = (0..kept).map(|group| (group * groups / kept) as u32).collect();
            let numbers: Vec<u32> = (0..count).map(|number| (number * 7 % 20) as u32).collect();
            let key = |group: usize, key: usize| lines[group * width + key / CODE_LANES].0[key % CODE_LANES].map(i32::from);
            let sum = |place: usize| -> i32 { (0..kept).flat_map(|group| key(group, place)).sum() };
            let corrections: Vec<[i32; CODE_LANES]> = (0..width)
                .map(|line| std::array::from_fn(|lane| -i32::from(CODE_BIAS) * sum(line * CODE_LANES + lane)))
                .collect();
            let product = |query: usize, place: usize| -> i32 {
                let of_group = |(group, &number): (usize, &u32)| {
                    let codes = &queries[query * 4 * groups + 4 * number as usize..][..4];
                    codes.iter().zip(key(group, place)).map(|(a, b)| a * b).sum::<i32>()
                };
                kept_groups.iter().enumerate().map(of_group).sum()
            };
            let largest_of = |&query: &u32| (0..width * CODE_LANES).map(|place| product(query as usize, place)).max().unwrap();
            let expected: Vec<i32> = numbers.iter().map(largest_of).collect();
            let biased: Vec<u8> = queries.iter().map(|&code| (code + i32::from(CODE_BIAS)) as u8).collect();
            for level in Level::available() {
                let mut largest = vec![0; count];
                CodeLevel::of(level).run(LargestProducts {
                    queries: &biased,
                    stride: 4 * groups,
                    numbers: &numbers,
                    lines: &lines,
                    groups: &kept_groups,
                    corrections: &corrections,
                    largest: &mut largest,
                });
                assert_eq!(largest, expected, "{}", level.name());
            }
        }
    }

    fn codes_are_rounded<T: Scalar>(level: Level) {
        let encode = |row: &[f64], factor: f64| {
            let row: Vec<T> = row.iter().map(|&x| T::from_f64(x)).collect();
            let mut codes = vec![0; row.len()];
            let unit = T::run(level, Encode { row: &row, factor: T::from_f64(factor), bias: CODE_BIAS, codes: &mut codes });
            let codes: Vec<i32> = codes.iter().map(|&code| i32::from(code) - i32::from(CODE_BIAS)).collect();
            (codes, unit.into())
        };
        let row = [0.0, 127.0, -127.0, 0.5, 1.5, -2.5, 2.51, 63.4];
        assert_eq!(encode(&row, 1.0), (vec![0, 127, -127, 0, 2, -2, 3, 63], 1.0), "{}", level.name());
        assert_eq!(encode(&row, -2.0), (vec![0, -127, 127, 0, -2, 2, -3, -63], 2.0), "{}", level.name());
        assert_eq!(encode(&[0.0, -0.0], 1.0), (vec![0, 0], 0.0), "{}", level.name());
        assert_eq!(encode(&[1.0, f64::INFINITY], 1.0).1, 0.0, "{}", level.name());
    }

    #[test]
    fn codes_are_those_of_the_definition() {
        for level in Level::available() {
            codes_are_rounded::<f32>(level);
            codes_are_rounded::<f64>(level);
        }
    }
}
