//! The product of two rows.

use crate::simd::{Element, Kernel, Scalar, Simd};

/// The sum of the products of two rows, and whether the first one is all 0.
pub(crate) struct RowProduct<'a, E: Element> {
    pub(crate) x: &'a [E],
    /// As long.
    pub(crate) y: &'a [E],
    /// Scratch for both rows, if they are to be widened.
    pub(crate) lines: [&'a mut [E::Compute]; 2],
}

impl<E: Element> Kernel<E::Compute> for RowProduct<'_, E> {
    type Output = (E::Compute, bool);

    #[inline(always)]
    fn run<S: Simd<E::Compute>>(self, _: S) -> Self::Output {
        let [x_line, y_line] = self.lines;
        let (x, y) = (widened(self.x, x_line), widened(self.y, y_line));
        // No closure: it would be compiled without the instructions of the level.
        let mut is_zero = true;
        for &x in x {
            if x != E::Compute::ZERO {
                is_zero = false;
                break;
            }
        }
        (dot(x, y), is_zero)
    }
}

#[inline(always)]
fn widened<'a, E: Element>(row: &'a [E], line: &'a mut [E::Compute]) -> &'a [E::Compute] {
    if let Some(row) = E::as_compute(row) {
        return row;
    }
    let line = &mut line[..row.len()];
    E::widen(row, line);
    line
}

/// A sum of products. Several chains, since each addition waits for the one before; the compiler makes vectors of them.
#[inline(always)]
fn dot<T: Scalar>(x: &[T], y: &[T]) -> T {
    const CHAINS: usize = 16;
    assert_eq!(x.len(), y.len(), "rows of equal length");
    let mut sums = [T::ZERO; CHAINS];
    let whole = x.len() - x.len() % CHAINS;
    for start in (0..whole).step_by(CHAINS) {
        let (x, y) = (&x[start..][..CHAINS], &y[start..][..CHAINS]);
        for chain in 0..CHAINS {
            sums[chain] += x[chain] * y[chain];
        }
    }
    for channel in whole..x.len() {
        sums[channel - whole] += x[channel] * y[channel];
    }
    let mut total = T::ZERO;
    for sum in sums {
        total += sum;
    }
    total
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::simd::Level;

    /// Whole numbers, whose sums are exact in any order; lengths with and without a rest.
    #[test]
    fn it_is_the_sum_of_products() {
        for level in Level::available() {
            for len in [0, 1, 15, 16, 17, 64, 83] {
                let numbers = |step: i32| (0..len).map(|i| ((i * step) % 13 - 6) as f32).collect::<Vec<_>>();
                let (x, y) = (numbers(5), numbers(7));
                let expected: f64 = x.iter().zip(&y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
                let is_zero = x.iter().all(|&x| x == 0.0);
                let mut lines = [vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]];
                let [first, second] = &mut lines;
                let (result, zero) = f32::run(level, RowProduct { x: &x, y: &y, lines: [first, second] });
                assert_eq!((f64::from(result), zero), (expected, is_zero), "{}: {len}", level.name());
                let narrow = |from: &[f32]| from.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
                let (x, y) = (narrow(&x), narrow(&y));
                let (result, zero) = f32::run(level, RowProduct { x: &x, y: &y, lines: [first, second] });
                assert_eq!((f64::from(result), zero), (expected, is_zero), "{}: {len}, bfloat16", level.name());
                let zeros = vec![bf16::NEG_ZERO; y.len()];
                let (_, zero) = f32::run(level, RowProduct { x: &zeros, y: &y, lines: [first, second] });
                assert!(zero, "{}: {len}, zeros", level.name());
            }
        }
    }
}
