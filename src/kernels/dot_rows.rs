//! Products of listed rows with packed keys, those of each row in a place of its own.

use super::Matrix;
use super::dot_tile::dot_tile;
use super::gemm::{for_column_tiles, for_row_tiles};
use crate::simd::{Kernel, MOST_LANES, Scalar, Simd};

/// `to[place + s] = <queries[t], keys[.., s]>` for each listed query and place, and each key.
///
/// Sums run over the channels in their order, as those of [`AttendRows`](super::AttendRows) do.
pub(crate) struct DotRows<'a, T> {
    /// The rows of all queries.
    pub(crate) queries: Matrix<'a, T>,
    /// One row per channel, one column per key; columns are whole vectors, of which the last ones may be padding.
    pub(crate) keys: Matrix<'a, T>,
    /// How many keys there are.
    pub(crate) count: usize,
    /// Which queries, and where the first product of each goes.
    pub(crate) listed: &'a [(u32, usize)],
    pub(crate) to: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for DotRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let (columns, channels, count) = (self.keys.cols, self.keys.rows, self.count);
        assert_eq!(self.queries.cols, channels, "channels");
        assert!(columns.is_multiple_of(S::LANES) && columns >= count && S::LANES <= MOST_LANES, "whole vectors of keys");
        let fits = |&(query, place): &(u32, usize)| (query as usize) < self.queries.rows && place + count <= self.to.len();
        assert!(self.listed.iter().all(fits), "rows of queries, and room for their products");
        if self.listed.is_empty() {
            return;
        }
        let to = self.to.as_mut_ptr();
        for_row_tiles!(self.listed.len(), S::TILE_ROWS, |row, ROWS| {
            let listed: &[(u32, usize); ROWS] = self.listed[row..].first_chunk().expect("a tile of the list");
            // Without channels there is no row to point into, and none is read.
            let queries = listed.map(|(query, _)| self.queries.as_ptr().wrapping_add(query as usize * self.queries.stride));
            for_column_tiles!(columns, S::LANES, |column, VECTORS| {
                // SAFETY: by the assertions above these are rows of queries, whole vectors of columns of the keys, and places with
                // room for `count` products.
                unsafe {
                    let keys = self.keys.as_ptr().wrapping_add(column);
                    let tile = dot_tile::<T, S, ROWS, VECTORS>(simd, &queries, keys, self.keys.stride, channels);
                    for r in 0..ROWS {
                        for v in 0..VECTORS {
                            let first = column + v * S::LANES;
                            let (left, to) = (count.saturating_sub(first), to.add(listed[r].1 + first.min(count)));
                            if left >= S::LANES {
                                simd.store(to, tile[r][v]);
                            } else {
                                let mut line = [T::ZERO; MOST_LANES];
                                simd.store(line.as_mut_ptr(), tile[r][v]);
                                std::ptr::copy_nonoverlapping(line.as_ptr(), to, left);
                            }
                        }
                    }
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    /// Small integers, whose sums are exact, in places with gaps that nothing is written to.
    #[test]
    #[allow(clippy::float_cmp, reason = "sums of small integers are exact")]
    fn products_of_listed_rows() {
        for level in Level::available() {
            for (channels, count, listed) in [(5usize, 3usize, 1usize), (8, 16, 7), (3, 37, 20), (1, 1, 0), (0, 4, 3)] {
                let columns = count.next_multiple_of(f32::lanes(level));
                let query = |t: usize, c: usize| ((3 * t + 5 * c) % 7) as f32 - 3.0;
                let key = |s: usize, c: usize| ((2 * s + 3 * c) % 11) as f32 - 5.0;
                let queries: Vec<f32> = (0..40 * channels).map(|x| query(x / channels, x % channels)).collect();
                let packed: Vec<f32> = (0..channels * columns).map(|x| key(x % columns, x / columns)).collect();
                let places: Vec<(u32, usize)> =
                    (0..listed).map(|i| (39 - 2 * u32::try_from(i).unwrap(), i * (count + 2))).collect();
                let mut to = vec![-99.0f32; 20 * (count + 2)];
                let kernel = DotRows {
                    queries: Matrix::new(&queries, 40, channels, channels),
                    keys: Matrix::new(&packed, channels, columns, columns),
                    count,
                    listed: &places,
                    to: &mut to,
                };
                f32::run(level, kernel);
                for (place, &x) in to.iter().enumerate() {
                    let (i, s) = (place / (count + 2), place % (count + 2));
                    let product = |t: usize| (0..channels).map(|c| query(t, c) * key(s, c)).sum::<f32>();
                    let expected = if i < listed && s < count { product(39 - 2 * i) } else { -99.0 };
                    assert_eq!(x, expected, "{}: {count} keys, product {s} of place {i}", level.name());
                }
            }
        }
    }
}
