//! Outputs that several threads write, each thread its own rows.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::tensor::check_strides;

/// A tensor (batch, head, token, channel) whose rows are handed out for writing.
#[derive(Debug)]
pub struct TensorMut<'a, E> {
    data: *mut E,
    shape: [usize; 4],
    strides: [usize; 4],
    borrow: PhantomData<&'a mut [E]>,
}

// SAFETY: a row is reached through `row_mut` alone, whose callers vouch that no other thread has the same row; `new`
// vouches that different rows do not overlap.
unsafe impl<E: Send> Sync for TensorMut<'_, E> {}
// SAFETY: it is a mutable borrow of elements that may be sent.
unsafe impl<E: Send> Send for TensorMut<'_, E> {}

impl<'a, E> TensorMut<'a, E> {
    /// A view of `data` for writing.
    ///
    /// # Errors
    /// If the last stride is not 1, the shape and strides reach beyond `data`, or two elements share a place.
    /// `name` is the argument in the message.
    pub fn new(name: &str, data: &'a mut [E], shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        check_strides(name, data.len(), shape, strides)?;
        if overlaps(shape, strides) {
            return Err(Error::new(format!(
                "{name}: shape {shape:?} with strides {strides:?} has elements that share a place"
            )));
        }
        Ok(Self { data: data.as_mut_ptr(), shape, strides, borrow: PhantomData })
    }

    /// The sizes of batch, head, token and channel.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Checks that tokens lie one behind the other, without gaps.
    pub(crate) fn check_adjacent_rows(&self, name: &str) -> Result<()> {
        let ([.., tokens, channels], stride) = (self.shape, self.strides[2]);
        if tokens <= 1 || channels == 0 || stride == channels {
            return Ok(());
        }
        Err(Error::new(format!("{name}: stride {stride} from token to token, expected {channels}")))
    }

    /// Tokens that lie one behind the other, for writing.
    ///
    /// # Safety
    /// - [`Self::check_adjacent_rows`] has succeeded, unless it is a single token.
    /// - Nothing else holds one of these rows until the returned borrow ends.
    #[allow(clippy::mut_from_ref, reason = "the contract of this type: rows are disjoint and each has one writer")]
    pub(crate) unsafe fn rows_mut(&self, batch: usize, head: usize, tokens: Range<usize>) -> &mut [E] {
        let [b, h, l, d] = self.shape;
        assert!(batch < b && head < h && tokens.end <= l, "rows ({batch}, {head}, {tokens:?}) of shape {:?}", self.shape);
        if d == 0 || tokens.is_empty() {
            return &mut [];
        }
        let offset = batch * self.strides[0] + head * self.strides[1] + tokens.start * self.strides[2];
        // SAFETY: `new` has checked that every index within the shape lies in the borrowed memory, and rows without gaps hold
        // nothing else; the rest is the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(offset), tokens.len() * d) }
    }

    /// One row, for writing.
    ///
    /// # Safety
    /// - Nothing else holds this row until the returned borrow ends.
    #[allow(clippy::mut_from_ref, reason = "the contract of this type: rows are disjoint and each has one writer")]
    pub(crate) unsafe fn row_mut(&self, batch: usize, head: usize, token: usize) -> &mut [E] {
        // SAFETY: a single row has no gaps; the rest is the caller's.
        unsafe { self.rows_mut(batch, head, token..token + 1) }
    }
}

/// Whether two indices of the shape may share a place: sorted by stride, each dimension must step over all smaller ones.
fn overlaps(shape: [usize; 4], strides: [usize; 4]) -> bool {
    if shape.contains(&0) {
        return false;
    }
    let mut dims: Vec<_> = shape.into_iter().zip(strides).filter(|&(n, _)| n > 1).collect();
    dims.sort_unstable_by_key(|&(_, stride)| stride);
    let mut reach = 1;
    dims.into_iter().any(|(n, stride)| {
        let overlap = stride < reach;
        reach += (n - 1) * stride;
        overlap
    })
}

/// A contiguous buffer cut into chunks of equal length, each written by one task.
pub(crate) struct Chunks<'a, T> {
    cells: &'a [UnsafeCell<T>],
    chunk: usize,
}

// SAFETY: cells are reached through `range_mut` alone, whose callers vouch that no other thread has the same elements.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<'a, T> Chunks<'a, T> {
    pub(crate) fn new(data: &'a mut [T], chunk: usize) -> Self {
        let len = data.len();
        // SAFETY: `UnsafeCell<T>` has the layout of `T`, and the borrow is exclusive for `'a`.
        let cells = unsafe { std::slice::from_raw_parts(data.as_mut_ptr().cast::<UnsafeCell<T>>(), len) };
        Self { cells, chunk }
    }

    /// Chunk `index`, for writing.
    ///
    /// # Safety
    /// - Nothing else holds this chunk until the returned borrow ends.
    #[allow(clippy::mut_from_ref, reason = "the contract of this type: chunks are disjoint and each has one writer")]
    pub(crate) unsafe fn get_mut(&self, index: usize) -> &mut [T] {
        // SAFETY: the caller's.
        unsafe { self.range_mut(index * self.chunk..(index + 1) * self.chunk) }
    }

    /// Some elements, for writing.
    ///
    /// # Safety
    /// - Nothing else holds one of them until the returned borrow ends.
    #[allow(clippy::mut_from_ref, reason = "the contract of this type: ranges are disjoint and each has one writer")]
    pub(crate) unsafe fn range_mut(&self, range: Range<usize>) -> &mut [T] {
        let cells = &self.cells[range];
        // SAFETY: the slice above is in bounds; the caller vouches that its elements have no other user.
        unsafe { std::slice::from_raw_parts_mut(UnsafeCell::raw_get(cells.as_ptr()), cells.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expanded_outputs_are_refused() {
        let mut data = [0.0f32; 64];
        assert!(TensorMut::new("out", &mut data, [1, 2, 4, 8], [64, 0, 8, 1]).is_err(), "head stride 0");
        assert!(TensorMut::new("out", &mut data, [1, 2, 4, 8], [64, 8, 16, 1]).is_ok(), "tokens outermost");
        assert!(TensorMut::new("out", &mut data, [1, 2, 4, 8], [64, 32, 4, 1]).is_err(), "rows overlap");
        assert!(TensorMut::new("out", &mut data, [1, 2, 4, 8], [64, 64, 8, 1]).is_err(), "beyond the data");
    }
}
